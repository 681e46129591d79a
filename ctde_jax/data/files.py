"""The user's own file of arrays that numpy saved. Large arrays stay in their file, unless it is compressed."""

import math
import os
import struct
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import IO, BinaryIO, TypeAlias

import numpy as np
from rich.filesize import decimal

from ctde_jax.bundle import open_regular
from ctde_jax.data.arrays import targets_or_classes
from ctde_jax.data.dataset import Dataset, from_arrays
from ctde_jax.data.disk import STREAMED_FROM, DiskArray, in_file, most_unpacked
from ctde_jax.devices import memory
from ctde_jax.errors import InputError, shortened

REQUIRED, OPTIONAL = ("x_train", "y_train"), ("x_test", "y_test")
Arrays: TypeAlias = dict[str, np.ndarray | DiskArray]


def from_npz(path: Path | str) -> Dataset:
    """Loads the arrays `x_train` and `y_train` of a .npz file, and `x_test` and `y_test` if it has them.

    Their types are treated as in `from_arrays`; labels are integers from 0, or names of classes.

    Instead of a .npz file it may be a folder with `x_train.npy` and so on. What takes more than a gigabyte stays in its
    file and is read while training goes on, unless it is compressed; the notes say so. Nothing is ever unpickled.

    Raises:
        InputError: The file is no whole .npz file, or what it holds makes no data set.
    """
    path = Path(os.path.expanduser(path))
    arrays = _arrays_of_folder(path) if os.path.isdir(path) else _arrays(path)
    for name in ("y_train", "y_test"):
        if name in arrays and arrays[name].dtype.kind not in "iubUS":
            raise faulty(
                path,
                f"has labels of the type {arrays[name].dtype} in {name} ({targets_or_classes(arrays[name])})",
                "save them as integers from 0, one for each class",
            )
    train, test = (
        (arrays["x_train"], arrays["y_train"]),
        (arrays.get("x_test"), arrays.get("y_test")),
    )
    try:
        dataset = from_arrays(*train, *test, name=path.stem)
    except InputError as error:
        raise InputError(
            "data_file", f"names {path}, whose arrays make no data set: {error}"
        ) from error
    return replace(dataset, notes=(*_notes(arrays), *dataset.notes))


def _notes(arrays: Arrays) -> list[str]:
    """Says of large arrays whether they stay in their file."""
    sizes = {name: array.dtype.itemsize * math.prod(array.shape) for name, array in arrays.items()}
    return [
        f"{name} takes {decimal(sizes[name])}, and "
        + (
            "stays in its file, from which it is read while training goes on."
            if isinstance(array, DiskArray)
            else "was loaded, as it is compressed or stored by columns: numpy.savez of a contiguous array would not be."
        )
        for name, array in arrays.items()
        if sizes[name] >= STREAMED_FROM and array.ndim > 1
    ]


def _arrays_of_folder(folder: Path) -> Arrays:
    paths = {name: folder / f"{name}.npy" for name in REQUIRED + OPTIONAL}
    missing = [paths[name].name for name in REQUIRED if not paths[name].is_file()]
    if missing:
        raise faulty(
            folder,
            f"is a folder without {' and '.join(missing)}",
            "save the arrays there with numpy.save",
        )
    arrays = {}
    for name, path in paths.items():
        if path.is_file():
            with opened(path) as file, _reading(path, name):
                arrays[name] = _array(path, file, 0, path.stat().st_size)
    return arrays


def _arrays(path: Path) -> Arrays:
    with opened(path) as file, _archive(path, file) as archive:
        present = [member.removesuffix(".npy") for member in archive.namelist()]
        missing = [name for name in REQUIRED if name not in present]
        if missing:
            more = f" and {len(present) - _NAMED:,} more" if len(present) > _NAMED else ""
            raise faulty(
                path,
                f"lacks {' and '.join(missing)} and has {', '.join(present[:_NAMED]) or 'no array'}{more}",
                "save the arrays with numpy.savez(path, x_train=..., y_train=...)",
            )
        return {
            name: _member(path, file, archive, name)
            for name in REQUIRED + OPTIONAL
            if name in present
        }


def _archive(path: Path, file: BinaryIO) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(file)
    except Exception as error:  # a malformed directory makes zipfile stumble in many ways
        raise faulty(
            path,
            f"is not a whole .npz file ({shortened(str(error))})",
            "save the arrays with numpy.savez, or copy it again",
        ) from error


def _member(
    path: Path, file: BinaryIO, archive: zipfile.ZipFile, name: str
) -> np.ndarray | DiskArray:
    with _reading(path, name), archive.open(f"{name}.npy") as member:
        info = archive.getinfo(f"{name}.npy")
        start = _start(file, info) if info.compress_type == zipfile.ZIP_STORED else None
        return _array(path, member, start, info.file_size)


def _start(file: BinaryIO, member: zipfile.ZipInfo) -> int:
    """Returns where in a zip file the content of a member starts, after its header, its name and its extra field."""
    place = file.tell()
    file.seek(member.header_offset + 26)
    lengths = struct.unpack("<HH", file.read(4))
    file.seek(place)
    return member.header_offset + 30 + sum(lengths)


def _array(path: Path, content: IO[bytes], start: int | None, size: int) -> np.ndarray | DiskArray:
    """Reads an array, or leaves it on disk if it is large and its bytes are in the file as they are from `start` on.

    As numpy makes room for what the header says before it reads, the header is held against the size first.
    """
    version = np.lib.format.read_magic(content)
    if version not in _HEADERS:
        raise ValueError(
            f"it is in version {version} of the format, which no array of numbers needs"
        )
    if version == (2, 0) and int.from_bytes(content.read(4), "little") > _LONGEST_HEADER:
        raise ValueError("its header is longer than that of any array of numbers")
    content.seek(np.lib.format.MAGIC_LEN)
    shape, by_columns, dtype = _HEADERS[version](content)
    takes, there = math.prod(shape) * dtype.itemsize, path.stat().st_size
    if not dtype.hasobject:
        if (
            min(shape, default=0) < 0
            or takes > size - content.tell()
            or (start is not None and size > there)
        ):
            raise EOFError("it is shorter than its header says")
        if start is None and takes > most_unpacked(there):
            raise ValueError(
                f"it would take {decimal(takes)} of memory, and the file takes {decimal(there)}"
            )
        if start is None:
            memory.check(
                "data_file", f"the numbers of an array in {path}", takes, "save fewer examples"
            )
        if start is not None and takes >= STREAMED_FROM and not by_columns:
            array = in_file(path, start + content.tell(), dtype, shape)
            if array.offset + takes > there:
                raise EOFError("it is shorter than its header says")
            return array
    content.seek(0)
    return np.lib.format.read_array(content, allow_pickle=False)


_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}
_LONGEST_HEADER = 2**16
_NAMED = 10
"""Arrays that a sentence names at most."""

_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"PK\x03\x04": "zip, as .npz and .xlsx files are",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
}
"""First bytes of compressed files."""


@contextmanager
def _reading(path: Path, name: str) -> Iterator[None]:
    try:
        with warnings.catch_warnings(action="ignore"):  # of a header that is Python in odd ways
            yield
    except (
        Exception
    ) as error:  # malformed content makes zipfile, its decompressors and numpy stumble in many ways
        if "Object arrays" in str(error):
            raise faulty(
                path,
                f"has Python objects in {name}, which are never unpickled",
                "save a plain array of numbers, with examples of one shape",
            ) from error
        raise faulty(
            path, f"is damaged in {name} ({shortened(str(error))})", "save or copy the file again"
        ) from error


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """Opens the user's file for reading; raises InputError if it is not a regular file or cannot be read."""
    try:
        file = open_regular(path)
    except (OSError, ValueError) as error:  # the latter for what no path can hold
        reason = error.strerror if isinstance(error, OSError) else error
        raise faulty(
            path, f"cannot be opened ({reason})", "give the path of a readable file"
        ) from error
    with file:
        try:
            yield file
        except OSError as error:
            raise faulty(
                path, f"cannot be read ({error.strerror or error})", "copy the file again"
            ) from error


def check_size(file: BinaryIO) -> None:
    """Raises InputError for an open file that does not fit into memory."""
    memory.check(
        "data_file",
        f"the bytes of {file.name}",
        os.fstat(file.fileno()).st_size,
        "give a smaller file",
    )


def not_utf8(path: Path, first: bytes, fault: str) -> InputError:
    """Returns the error for a file that is not UTF-8; its first bytes show whether it is compressed."""
    for start, compression in _COMPRESSED.items():
        if first.startswith(start):
            return faulty(
                path,
                f"is compressed ({compression})",
                "decompress it, or save it as plain text in UTF-8",
            )
    return faulty(path, f"{fault}, which is not UTF-8", "save it in UTF-8")


def faulty(path: Path, fault: str, way_out: str) -> InputError:
    """Says what is wrong with the user's file, and the way out."""
    return InputError("data_file", f"names {path}, which {fault}: {way_out}.")
