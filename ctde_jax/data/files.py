"""Loads a file of numpy arrays; large arrays stay in the file, unless it is compressed."""

import math
import os
import struct
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import IO, BinaryIO, TypeAlias, get_args

import numpy as np
from rich.filesize import decimal

from ctde_jax.bundle import open_regular
from ctde_jax.data.arrays import targets_or_classes
from ctde_jax.data.classes import CLASSIFY, REGRESS, Use, is_one_hot
from ctde_jax.data.dataset import Dataset, from_arrays
from ctde_jax.data.disk import STREAMED_FROM, DiskArray, in_file, most_unpacked
from ctde_jax.devices import memory
from ctde_jax.errors import InputError, check_known, shortened

REQUIRED = ("x_train", "y_train")
OPTIONAL = ("x_test", "y_test", "weights")
Arrays: TypeAlias = dict[str, np.ndarray | DiskArray]


def from_npz(path: Path | str, task: Use = "auto") -> Dataset:
    """Loads `x_train` and `y_train` from a .npz file, and the other arrays if present.

    Names and dtypes are those of `from_arrays`: `x_test` and `y_test` are the test split, and
    `weights` the weights of the training examples. Labels are integers from 0, or class names.

    The path may also be a folder with `x_train.npy` and so on. Arrays of a gigabyte or more stay in
    their file and are read during training, unless they are compressed or stored by columns; the
    notes list them. Nothing is ever unpickled.

    Args:
        path: .npz file, or folder of .npy files.
        task: `regression` reads real-valued targets in y_train and y_test instead of labels, and
            `multilabel` several labels of 0 or 1 per example.

    Raises:
        InputError: If a file cannot be read or is incomplete, an array is missing, or the arrays do
            not make a data set.

    Examples:
        >>> inputs, labels = ctde.data.digits().train
        >>> np.savez("digits.npz", x_train=inputs, y_train=labels)
        >>> ctde.data.from_npz("digits.npz")
        Dataset('digits', 1,150 training and 288 test examples, 10 classes)
    """
    check_known("task", task, get_args(Use))
    path = Path(os.path.expanduser(path))
    arrays = _arrays_of_folder(path) if os.path.isdir(path) else _arrays(path)

    # A file has no custom task, so its labels are numbers, or classes: integers or names.
    for name in ("y_train", "y_test"):
        if name in arrays:
            arrays[name] = _labels(path, name, arrays[name], task)
    train = (arrays["x_train"], arrays["y_train"])
    test = (arrays.get("x_test"), arrays.get("y_test"))
    try:
        # An error names an argument of `from_arrays`, but the user passed a file.
        dataset = from_arrays(*train, *test, name=path.stem, weights=arrays.get("weights"))
    except InputError as error:
        raise InputError(
            "data_file", f"{path} does not contain a valid data set: {error}"
        ) from error
    return replace(dataset, notes=(*_notes(arrays), *dataset.notes))


def _labels(
    path: Path, name: str, labels: np.ndarray | DiskArray, task: Use
) -> np.ndarray | DiskArray:
    if task == "regression" and labels.dtype.kind in "biuf":
        return labels.astype(np.float32)
    if task == "regression":
        raise faulty(
            path,
            f"does not contain numbers in {name}, but {labels.dtype}",
            f"save targets as floats, or {CLASSIFY}",
        )
    if labels.dtype.kind not in "iubUS":
        regress = "" if is_one_hot(labels) else f", or {REGRESS}"
        raise faulty(
            path,
            f"does not contain class indices in {name} ({targets_or_classes(labels)})",
            f"save them as integers from 0{regress}",
        )
    return labels


def _notes(arrays: Arrays) -> list[str]:
    """Returns a note for each large array, on whether it stays in its file."""
    sizes = {name: array.dtype.itemsize * math.prod(array.shape) for name, array in arrays.items()}
    return [
        f"{name} ({decimal(sizes[name])}) "
        + (
            "stays in its file, and is read from there during training."
            if isinstance(array, DiskArray)
            else "was loaded into memory, as it is compressed or in column-major order; to keep it "
            "in its file, save a C-contiguous array with numpy.savez."
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
            "save the arrays in it with numpy.save",
        )
    arrays = {}
    for name, path in paths.items():
        if path.is_file():
            with opened(path) as file, _reading(path, name):
                # A .npy file is not compressed, so its content is left in place from 0 on.
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
                f"lacks {' and '.join(missing)}, but has "
                f"{', '.join(present[:_NAMED]) or 'no array'}{more}",
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
    # A malformed directory makes zipfile raise many kinds of exceptions.
    except Exception as error:
        raise faulty(
            path,
            f"is not a complete .npz file ({shortened(str(error))})",
            "save the arrays with numpy.savez, or copy it again",
        ) from error


def _member(
    path: Path, file: BinaryIO, archive: zipfile.ZipFile, name: str
) -> np.ndarray | DiskArray:
    with _reading(path, name), archive.open(f"{name}.npy") as member:
        info = archive.getinfo(f"{name}.npy")
        # Only a member that is not compressed has its bytes in the file.
        start = _start(file, info) if info.compress_type == zipfile.ZIP_STORED else None
        return _array(path, member, start, info.file_size)


def _start(file: BinaryIO, member: zipfile.ZipInfo) -> int:
    """Returns the offset of a zip member's content, after its header, name and extra field."""
    # The local header has 30 bytes; the lengths of name and extra field are the last four of them.
    place = file.tell()
    file.seek(member.header_offset + 26)
    lengths = struct.unpack("<HH", file.read(4))
    file.seek(place)
    return member.header_offset + 30 + sum(lengths)


def _array(path: Path, content: IO[bytes], start: int | None, size: int) -> np.ndarray | DiskArray:
    """Reads an array in .npy format, or leaves it on disk if it is large and not compressed.

    numpy allocates the size in the header before it reads, so this size is first compared with that
    of the file.

    Args:
        path: Path of the file, for errors and for an array that stays on disk.
        content: Open .npy content.
        start: Offset of the .npy content in the file; None if it is compressed.
        size: Size of the .npy content, in bytes.

    Raises:
        EOFError: If the content is shorter than the shape in its header.
        ValueError: If the header is malformed or not supported, or the array contains objects.
        InputError: If a compressed array does not fit into memory.
    """
    # Parse the header, of a version and a length that arrays of numbers have.
    version = np.lib.format.read_magic(content)
    if version not in _HEADERS:
        raise ValueError(f"version {version} of its format is not supported")
    if version == (2, 0) and int.from_bytes(content.read(4), "little") > _LONGEST_HEADER:
        raise ValueError(f"its header is longer than {_LONGEST_HEADER:,} bytes")
    content.seek(np.lib.format.MAGIC_LEN)
    shape, by_columns, dtype = _HEADERS[version](content)
    takes = math.prod(shape) * dtype.itemsize
    there = path.stat().st_size

    # Check the size; `read_array` rejects objects, whose size is not in the header.
    if not dtype.hasobject:
        if (
            min(shape, default=0) < 0
            or takes > size - content.tell()
            or (start is not None and size > there)
        ):
            raise EOFError("it is shorter than the shape in its header")
        # A compressed array is loaded, so it must fit into memory.
        if start is None and takes > most_unpacked(there):
            raise ValueError(
                f"it would take {decimal(takes)} of memory, but the file has only {decimal(there)}"
            )
        if start is None:
            memory.check(
                "data_file", f"the values of an array in {path}", takes, "save fewer examples"
            )

        # Leave a large array in the file if its rows are contiguous there.
        if start is not None and takes >= STREAMED_FROM and not by_columns:
            array = in_file(path, start + content.tell(), dtype, shape)
            if array.offset + takes > there:
                raise EOFError("it is shorter than the shape in its header")
            return array
    content.seek(0)
    return np.lib.format.read_array(content, allow_pickle=False)


_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}
_LONGEST_HEADER = 2**16
_NAMED = 10
"""Maximum number of arrays that a sentence names."""

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
    # Malformed content makes zipfile, its decompressors and numpy raise many kinds of exceptions.
    except Exception as error:
        # numpy has no exception class for this error, only the text.
        if "Object arrays" in str(error):
            raise faulty(
                path,
                f"contains Python objects in {name}, which are not unpickled",
                "save an array of numbers, with examples of the same shape",
            ) from error
        raise faulty(
            path,
            f"has a damaged array {name} ({shortened(str(error))})",
            "save or copy the file again",
        ) from error


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """Opens the user's file; raises InputError if it is not regular or a read fails."""
    try:
        file = open_regular(path)
    except (OSError, ValueError) as error:  # ValueError: invalid characters in the path
        reason = error.strerror if isinstance(error, OSError) else error
        raise faulty(
            path, f"cannot be opened ({reason})", "pass the path of a readable file"
        ) from error
    with file:
        try:
            yield file
        except OSError as error:
            raise faulty(
                path, f"cannot be read ({error.strerror or error})", "copy the file again"
            ) from error


def check_size(file: BinaryIO) -> None:
    """Raises InputError if an open file does not fit into memory."""
    memory.check(
        "data_file",
        f"the bytes of {file.name}",
        os.fstat(file.fileno()).st_size,
        "use a smaller file",
    )


def not_utf8(path: Path, first: bytes, fault: str) -> InputError:
    """Returns the InputError for a file that is not UTF-8.

    Args:
        path: Path of the file.
        first: First bytes of the file, from which a compressed file is recognized.
        fault: Description of the invalid byte, for a file that is not compressed.
    """
    for start, compression in _COMPRESSED.items():
        if first.startswith(start):
            return faulty(
                path,
                f"is compressed ({compression})",
                "decompress it, or save it as plain text in UTF-8",
            )
    return faulty(path, f"{fault}, which is not valid UTF-8", "save it in UTF-8")


def faulty(path: Path | str, fault: str, way_out: str) -> InputError:
    """Returns the InputError for the user's file or table.

    Args:
        path: Path of the file, or a description of the table.
        fault: Description of the fault, as a predicate of the path.
        way_out: Remedy, as an imperative.
    """
    # A data frame has no path; it is the argument `source` of `from_table`.
    if isinstance(path, Path):
        return InputError("data_file", f"{path} {fault}; {way_out}.")
    return InputError("source", f"{fault}; {way_out}.")
