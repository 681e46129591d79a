"""The IDX format, and the two data sets of 28 x 28 images that are published in it.

Files that are already in the folder are used as they are; missing files are downloaded.
"""

import math
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
from rich.filesize import decimal

from ctde_jax.data.dataset import Dataset, from_arrays
from ctde_jax.data.disk import STREAMED_FROM, DiskArray, in_file, most_unpacked
from ctde_jax.data.published.download import content_of, damaged, existing, fetch
from ctde_jax.data.published.registry import Published
from ctde_jax.errors import InputError

PICTURE = (28, 28)

MNIST = Published(
    name="mnist",
    classes=tuple("0123456789"),
    mirrors=(
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        "https://storage.googleapis.com/cvdf-datasets/mnist/",
        "http://yann.lecun.com/exdb/mnist/",
    ),
    sha256={
        "train-images-idx3-ubyte": (
            "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db"
        ),
        "train-labels-idx1-ubyte": (
            "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5"
        ),
        "t10k-images-idx3-ubyte": (
            "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7"
        ),
        "t10k-labels-idx1-ubyte": (
            "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2"
        ),
    },
)

FASHION_MNIST = Published(
    name="fashion_mnist",
    classes=(
        *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
        *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
    ),
    mirrors=(
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/",
    ),
    sha256={
        "train-images-idx3-ubyte": (
            "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888"
        ),
        "train-labels-idx1-ubyte": (
            "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9"
        ),
        "t10k-images-idx3-ubyte": (
            "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b"
        ),
        "t10k-labels-idx1-ubyte": (
            "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34"
        ),
    },
)


def mnist(data_dir: Path | str | None = None) -> Dataset:
    """Loads the handwritten digits of LeCun et al. (1998), `uint8[examples, 28, 28]`.

    There are 60,000 training and 10,000 test images in 10 classes, with labels `int32[examples]`.

    Args:
        data_dir: Existing folder with the IDX files, plain or .gz; by default the user's cache
            folder. Missing files are downloaded into it.

    Raises:
        InputError: If there is no such folder, a file in it is damaged, or one is missing and no
            mirror provides it.

    Examples:
        >>> data = ctde.data.mnist()  # doctest: +SKIP
    """
    return _load(MNIST, data_dir)


def fashion_mnist(data_dir: Path | str | None = None) -> Dataset:
    """Loads the images of clothes of Xiao et al. (2017), in the format of MNIST.

    Shapes, dtypes, arguments and errors are those of `mnist`.

    Examples:
        >>> data = ctde.data.fashion_mnist()  # doctest: +SKIP
    """
    return _load(FASHION_MNIST, data_dir)


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """Reads an IDX file of unsigned bytes, plain or .gz, as a uint8 array.

    Args:
        path: IDX file.
        dimensions: Number of axes that the array must have.

    Raises:
        InputError: If the file is damaged, is not an IDX file, or has a different number of axes.
    """
    return _parse(_content(path, dimensions), dimensions)


def _load(published: Published, data_dir: Path | str | None) -> Dataset:
    folder = published.folder(data_dir)
    arrays = []
    contents = {}
    large = []
    for name, sha256 in published.sha256.items():
        # A local file comes first. A large one stays on disk, unless it is compressed.
        urls = [f"{mirror}{name}.gz" for mirror in published.mirrors]
        path = _local(folder, name) or fetch(urls, folder / f"{name}.gz", sha256)
        if path.suffix != ".gz" and path.stat().st_size >= STREAMED_FROM:
            arrays.append(_on_disk(path, 3 if "images" in name else 1))
            large.append(
                f"{path} ({decimal(path.stat().st_size)}) stays on disk, and is read from there "
                "during training."
            )
        else:
            contents[name] = _content(path, 3 if "images" in name else 1)
            arrays.append(_parse(contents[name], 3 if "images" in name else 1))
        # Other data in the same format is accepted, but not other sizes of images.
        if "images" in name and arrays[-1].shape[1:] != PICTURE:
            raise damaged(
                path, f"contains images of the size {arrays[-1].shape[1:]} instead of {PICTURE}"
            )
    try:
        # The user's files may not match each other.
        dataset = from_arrays(*arrays, name=published.name, classes=published.classes)
    except InputError as error:
        raise InputError(
            "data_dir",
            f"{folder} does not contain a valid {published.name} data set: {error} To download the "
            "published files, remove those that differ from them.",
        ) from error
    return replace(dataset, notes=(*large, *published.notes(folder, contents)))


def _local(folder: Path, name: str) -> Path | None:
    # Some distributions unpack the files with a dot in their names.
    spellings = (name, name.replace("-idx", ".idx"))
    return existing(
        folder / f"{spelling}{suffix}" for spelling in spellings for suffix in ("", ".gz")
    )


def _on_disk(path: Path, dimensions: int) -> DiskArray:
    # The header is enough: the rest of the file is read during training.
    header = next(content_of(path), b"")[: _header_bytes(dimensions)]
    shape = _shape(header, path, dimensions)
    _check_size(path, shape, path.stat().st_size - len(header))
    return in_file(path, len(header), np.dtype(np.uint8), shape)


def _content(path: Path, dimensions: int) -> bytes:
    """Reads a file and decompresses it, at most to the size of the shape in its header.

    Raises:
        InputError: If the header is invalid, or the size of the content differs from its shape.
    """
    blocks = content_of(path)
    read = [next(blocks, b"")]
    shape = _shape(read[0], path, dimensions)
    size = path.stat().st_size
    # A small .gz file with a huge shape is rejected before it is decompressed.
    if path.suffix == ".gz" and math.prod(shape) > most_unpacked(size):
        raise damaged(
            path,
            f"has only {decimal(size)}, but the shape {shape} in its header takes "
            f"{decimal(math.prod(shape))}",
        )

    # One block beyond the announced size is enough to detect trailing bytes.
    got = len(read[0]) - _header_bytes(dimensions)
    while got <= math.prod(shape) and (block := next(blocks, b"")):
        read.append(block)
        got += len(block)
    _check_size(path, shape, got)
    return b"".join(read)


def _parse(content: bytes, dimensions: int) -> np.ndarray:
    header = _header_bytes(dimensions)
    return np.frombuffer(content, np.uint8, offset=header).reshape(_lengths(content, dimensions))


def _header_bytes(dimensions: int) -> int:
    # The magic number, and each length as a big-endian uint32.
    return 4 + 4 * dimensions


def _lengths(content: bytes, dimensions: int) -> tuple[int, ...]:
    return struct.unpack_from(f">{dimensions}I", content, 4)


def _shape(content: bytes, path: Path, dimensions: int) -> tuple[int, ...]:
    """Parses the shape from the start of a file, and checks the header."""
    # The magic number: two zeros, the code of the dtype, and the number of dimensions.
    magic = bytes((0, 0, 8, dimensions))  # 8 stands for unsigned bytes
    header = _header_bytes(dimensions)
    if not content:
        raise damaged(path, "is empty")
    if content[:3] != magic[:3]:
        start = content[:4].hex(" ")
        raise damaged(path, f"starts with {start} instead of the magic number {magic.hex(' ')}")
    if content[3:4] not in (b"", magic[3:]):
        raise damaged(path, f"has {content[3]} dimensions instead of {dimensions}")
    if len(content) < header:
        raise damaged(path, f"is truncated in its header of {header} bytes")
    return _lengths(content, dimensions)


def _check_size(path: Path, shape: tuple[int, ...], got: int) -> None:
    """Raises InputError unless the content has the size of the shape in its header.

    Args:
        path: Path of the file.
        shape: Shape in the header.
        got: Number of bytes after the header; a lower bound if there are too many.
    """
    announced = math.prod(shape)
    if got != announced:
        fault, many = (
            ("is truncated", "") if got < announced else ("has trailing bytes", "at least ")
        )
        raise damaged(
            path, f"{fault}: its shape {shape} takes {announced:,} bytes, but it has {many}{got:,}"
        )
