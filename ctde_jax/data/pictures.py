"""PNG and JPEG files as arrays: each is decoded once, into a file in the user's cache folder.

The file is named by a digest of the pictures' paths, sizes and modification times, so that changed
pictures are decoded again. It contains the pixels as an array in .npy format, followed by a second
array with a flag for each picture, which is true if it is readable.
"""

import os
import shutil
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from hashlib import sha256
from math import prod
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import IO, NamedTuple

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image, ImageOps
from platformdirs import user_cache_path
from rich.console import Console
from rich.filesize import decimal
from rich.progress import track

from ctde_jax.bundle import open_regular
from ctde_jax.data.disk import STREAMED_FROM, DiskArray, in_file
from ctde_jax.errors import InputError

SUFFIXES = (".png", ".jpg", ".jpeg")

_FORMATS = ("PNG", "JPEG")
GRAY = ("1", "L", "LA")
"""Modes of Pillow without color; palettes count as color."""

_RULES = 1
"""Version of the conversion to pixels; a cache file with other rules is not used."""

_AT_ONCE = 64
"""Number of pictures that are decoded in parallel, and held in memory."""

_MANY = 1000
"""Without a terminal, decoding at least this many pictures is announced in a line."""


class Decoded(NamedTuple):
    """The pixels of the readable pictures, and which ones these are."""

    path: Path
    pixels: np.ndarray | DiskArray  # uint8[readable, height, width] or [readable, height, width, 3]
    is_readable: Bool[np.ndarray, " pictures"]


def decoded(paths: Sequence[Path], size: tuple[int, int] | None) -> Decoded:
    """Decodes pictures, unless a file in the cache folder has their pixels.

    Pixels are gray if all pictures are, otherwise RGB. From a gigabyte on, they stay in the file.

    Args:
        paths: PNG and JPEG files.
        size: Height and width to which pictures are resized; None if all have the same size.

    Raises:
        InputError: If a file cannot be opened or has 16 bits per channel, no picture is readable,
            sizes differ and `size` is None, or the cache folder is not writable or too small.
    """
    target = user_cache_path("ctde_jax") / "pictures" / f"{_key(paths, size)}.npy"
    if not target.exists():
        _decode_to(target, paths, size)
    return _load(target)


def read_picture(
    path: Path, size: tuple[int, int] | None, is_gray: bool
) -> UInt8[np.ndarray, "height width *channels"] | None:
    """Decodes one picture upright, as its EXIF orientation describes, and without transparency.

    Args:
        path: PNG or JPEG file.
        size: Height and width. The picture is resized so that it covers them, bilinearly and with
            its aspect ratio, and cropped at the center.
        is_gray: Whether to return gray pixels, otherwise RGB.

    Returns:
        The pixels; None if the file is not a complete picture.

    Raises:
        InputError: If the file cannot be opened, or has 16 bits per channel.
    """
    with _opened(path) as file:
        _check_depth(path, file)
        try:
            with Image.open(file, formats=_FORMATS) as image:
                upright = ImageOps.exif_transpose(image)
            plain = without_transparency(upright).convert("L" if is_gray else "RGB")
        # A malformed picture raises exceptions of many types.
        except Exception as error:
            _raise_of_system(path, error)
            return None
    return np.asarray(plain if size is None else resized(plain, size))


def resized(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Resizes a picture bilinearly so that it covers height and width, and crops its center."""
    height, width = size
    return ImageOps.fit(image, (width, height), Image.Resampling.BILINEAR)


def without_transparency(image: Image.Image) -> Image.Image:
    """Composites transparent pixels over white; `convert` would expose colors below them."""
    if not image.has_transparency_data:
        return image
    layer = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)


def _is_gray(path: Path) -> bool:
    """Returns whether a picture has no color, from its header; an unreadable one has none."""
    with _opened(path) as file:
        try:
            with Image.open(file, formats=_FORMATS) as image:
                return image.mode in GRAY
        except Exception as error:
            _raise_of_system(path, error)
            return True


def _check_depth(path: Path, file: IO[bytes]) -> None:
    # Pillow would clip gray pixels of 16 bits, and drop 8 bits of colored ones. The header of a PNG
    # file has the bit depth in byte 24.
    header = file.read(25)
    file.seek(0)
    if header.startswith(b"\x89PNG") and header[24:] == b"\x10":
        raise InputError(
            "data_dir",
            f"must contain pictures of 8 bits, but {path} has 16 bits per channel; convert it, or "
            "pass the pixels as uint16 to data.from_arrays.",
        )


def _opened(path: Path) -> IO[bytes]:
    try:
        return open_regular(path)
    except OSError as error:
        raise _cannot_be_read(path, error) from error


def _raise_of_system(path: Path, error: Exception) -> None:
    """Raises InputError for an error of the operating system, which may be gone next time."""
    if isinstance(error, OSError) and error.errno is not None:
        raise _cannot_be_read(path, error) from error


def _cannot_be_read(path: Path, error: OSError) -> InputError:
    return InputError(
        "data_dir",
        f"contains {path}, which cannot be read ({error.strerror}); remove or repair it.",
    )


def _key(paths: Sequence[Path], size: tuple[int, int] | None) -> str:
    """Returns a digest of the pictures' paths, sizes and modification times, and the image size."""
    total = sha256(repr((_RULES, size)).encode())
    for path in paths:
        try:
            found = path.stat()
        except OSError as error:
            raise _cannot_be_read(path, error) from error
        total.update(repr((os.fspath(path), found.st_size, found.st_mtime_ns)).encode())
    return total.hexdigest()[:32]


def _decode_to(target: Path, paths: Sequence[Path], size: tuple[int, int] | None) -> None:
    """Writes a file of the cache; it appears complete or not at all."""
    is_gray = all(map(_is_gray, paths))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with NamedTemporaryFile(dir=target.parent, suffix=".part", delete=False) as file:
            try:
                _write(file, paths, partial(read_picture, size=size, is_gray=is_gray))
                file.close()
                os.replace(file.name, target)
            except BaseException:
                Path(file.name).unlink(missing_ok=True)
                raise
    except OSError as error:
        raise InputError(
            "data_dir",
            f"cannot be decoded into {target.parent} ({error.strerror or error}); make it "
            "writable, or a link to another folder.",
        ) from error


def _write(
    file: IO[bytes], paths: Sequence[Path], decode: Callable[[Path], np.ndarray | None]
) -> None:
    is_readable = np.zeros(len(paths), bool)
    first: tuple[Path, np.ndarray] | None = None
    # Closed at an error, too, so that the progress bar ends before the message.
    with closing(_in_order(decode, paths)) as in_order:
        for number, pixels in enumerate(in_order):
            if pixels is None:
                continue
            is_readable[number] = True

            # The first readable picture determines the shape, and so the size of the file.
            if first is None:
                first = (paths[number], pixels)
                _check_space(Path(file.name).parent, len(paths) * pixels.size)
                _write_header(file, len(paths), pixels.shape)
            if pixels.shape != first[1].shape:
                raise _sizes_differ(*first, paths[number], pixels)
            file.write(pixels.tobytes())

    if first is None:
        raise InputError(
            "data_dir",
            f"must contain pictures, but none of {len(paths):,} files is a complete PNG or JPEG "
            f"picture, such as {paths[0]}; save them again.",
        )
    # numpy pads a header, so that it has the same length for any number of rows.
    np.save(file, is_readable)
    file.seek(0)
    _write_header(file, int(is_readable.sum()), first[1].shape)


def _write_header(file: IO[bytes], rows: int, shape: tuple[int, ...]) -> None:
    header = {"descr": "|u1", "fortran_order": False, "shape": (rows, *shape)}
    np.lib.format.write_array_header_1_0(file, header)


def _in_order(
    decode: Callable[[Path], np.ndarray | None], paths: Sequence[Path]
) -> Generator[np.ndarray | None, None, None]:
    """Decodes pictures in threads, and yields their pixels in the order of the paths."""

    def batches(pool: ThreadPoolExecutor) -> Iterator[np.ndarray | None]:
        for first in range(0, len(paths), _AT_ONCE):
            yield from pool.map(decode, paths[first : first + _AT_ONCE])

    # Without a terminal, one line instead of a progress bar.
    is_terminal = sys.stderr.isatty()
    what = f"Decoding {len(paths):,} pictures"
    if not is_terminal and len(paths) >= _MANY:
        print(what, file=sys.stderr)
    with ThreadPoolExecutor() as pool:
        yield from track(
            batches(pool),
            what,
            len(paths),
            console=Console(stderr=True),
            transient=True,
            disable=not is_terminal,
        )


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise InputError(
            "data_dir",
            f"must fit on the disk when decoded: the pixels take {decimal(needed)}, but {folder} "
            f"has {decimal(free)} free; lower image_size, or make that folder a link to another "
            "disk.",
        )


def _sizes_differ(path: Path, pixels: np.ndarray, other: Path, others: np.ndarray) -> InputError:
    (height, width), (other_height, other_width) = pixels.shape[:2], others.shape[:2]
    return InputError(
        "image_size",
        f"must be given if pictures have different sizes, but {path} has {height} x {width} and "
        f"{other} {other_height} x {other_width} pixels; pass the height and width to resize to.",
    )


def _load(path: Path) -> Decoded:
    """Opens a file of the cache; its pixels are read into memory if they are small."""
    try:
        with path.open("rb") as file:
            np.lib.format.read_magic(file)
            shape, _, dtype = np.lib.format.read_array_header_1_0(file)
            pixels = in_file(path, file.tell(), dtype, shape)
            file.seek(prod(shape), os.SEEK_CUR)
            is_readable = np.load(file)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(
            "data_dir",
            f"was decoded into {path}, which is damaged ({error}); remove that file.",
        ) from error
    is_large = prod(shape) >= STREAMED_FROM
    return Decoded(path, pixels if is_large else np.asarray(pixels), is_readable)
