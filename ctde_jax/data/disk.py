"""Arrays that stay in their file: only the rows that are asked for are read.

A memory map counts every page that it has touched, and pages around them, as the process's memory. So rows are read by
plain reads, in the order of the file and each once; the system is told of all of them first, so that the disk works on
many at a time.
"""

import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from io import FileIO
from math import prod
from pathlib import Path

import numpy as np
from numpy.typing import DTypeLike

from ctde_jax.errors import InputError

STREAMED_FROM = 2**30
"""An array of a file that takes so many bytes stays there; a smaller one is loaded, and kept on the devices."""

MOST_PACKED = 100
"""What is as large as `STREAMED_FROM` when it is decompressed, and shrinks by more than this, is not loaded: nothing
that was measured is so empty, and a small file could fill the memory."""

PIECE_BYTES = 2**24
"""What goes through a whole array takes so many bytes at a time."""


@dataclass(frozen=True, eq=False)
class DiskArray:
    """An array in a file, whose rows are indexed like those of an array in memory."""

    path: Path
    offset: int  # of the first row, in bytes
    stride: int  # from one row to the next, in bytes
    stored: np.dtype  # in the file
    dtype: np.dtype  # in memory
    shape: tuple[int, ...]
    numbers: np.ndarray | None = None  # int32[rows], of the rows in the file; None for all of them

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: int | slice | np.ndarray) -> np.ndarray:
        """Reads rows into memory."""
        if isinstance(rows, slice):
            numbers = np.arange(*rows.indices(len(self)))
        else:
            numbers = np.asarray(rows)
            if numbers.size and not (-len(self) <= numbers.min() and numbers.max() < len(self)):
                raise IndexError(
                    f"row {np.abs(numbers).max()} of an array of {len(self)} rows in {self.path}"
                )
            numbers = np.where(numbers < 0, numbers + len(self), numbers)
        in_file = numbers.ravel() if self.numbers is None else self.numbers[numbers.ravel()]
        wanted, places = np.unique(in_file, return_inverse=True)
        with np.errstate(over="ignore", invalid="ignore"):  # as where arrays in memory are checked
            found = self._read(wanted).astype(self.dtype, copy=False)
        return found[places].reshape(*numbers.shape, *self.shape[1:])

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:
        """Reads everything into memory."""
        return self[:].astype(dtype or self.dtype, copy=False)

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return len(self.shape)

    def astype(self, dtype: DTypeLike) -> "DiskArray":
        """Reads as another type from now on."""
        return replace(self, dtype=np.dtype(dtype))

    def reshape(self, rows: int, *shape: int) -> "DiskArray":
        """Gives each row another shape; the number of rows, which may be said as -1, stays."""
        if rows not in (-1, len(self)) or prod(shape) != prod(self.shape[1:]):
            raise ValueError(f"rows of the shape {self.shape[1:]} cannot be reshaped to {shape}")
        return replace(self, shape=(len(self), *shape))

    def select(self, rows: np.ndarray) -> "DiskArray":
        """Leaves only these rows, and reads nothing yet."""
        numbers = (rows if self.numbers is None else self.numbers[rows]).astype(np.int32)
        return replace(self, shape=(len(numbers), *self.shape[1:]), numbers=numbers)

    def _read(self, rows: np.ndarray) -> np.ndarray:
        """Reads these rows of the file, which are in order and each there once."""
        found = np.empty((len(rows), *self.shape[1:]), self.stored)
        size = self.stored.itemsize * prod(self.shape[1:])
        content = found.reshape(-1).view(np.uint8).data
        is_first = (
            np.diff(rows, prepend=-2) != 1 if self.stride == size else np.ones(len(rows), bool)
        )
        firsts = np.flatnonzero(is_first)  # of rows that lie side by side
        places = (self.offset + self.stride * rows[firsts].astype(np.int64)).tolist()
        cuts = [*(firsts * size).tolist(), len(content)]
        with _reading(self.path), FileIO(self.path) as file:
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
                for place, start, stop in zip(places, cuts, cuts[1:], strict=False):
                    os.posix_fadvise(file.fileno(), place, stop - start, os.POSIX_FADV_WILLNEED)
            for place, start, stop in zip(places, cuts, cuts[1:], strict=False):
                file.seek(place)
                while start < stop:
                    got = file.readinto(content[start:stop])
                    if not got:
                        raise OSError(None, "it has become shorter")
                    start += got
        return found


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Raises InputError if the file of an array cannot be read any more."""
    try:
        yield
    except OSError as error:
        raise InputError(
            "data",
            f"are read from {path} while training goes on, which failed: {error.strerror}; restore the file.",
        ) from error


def stays_on_disk(array: np.ndarray | DiskArray) -> bool:
    """Says whether an array is in a file: a memory map, a view of one, or one that is read by rows already."""
    return isinstance(array, DiskArray) or _map_of(array) is not None


def on_disk(option: str, array: np.ndarray | DiskArray) -> DiskArray:
    """Makes of what stays on disk an array that is read by rows.

    Raises:
        InputError: Its rows are not in the file as they are in the map.
    """
    if isinstance(array, DiskArray):
        return array
    mapped = _map_of(array)
    assert mapped is not None, "see stays_on_disk"
    if mapped.filename is None or mapped.mode == "c":
        raise InputError(
            option, f"must be mapped from a file in the mode 'r', got the mode {mapped.mode!r}."
        )
    if len(array) and not array[0].flags.c_contiguous:
        raise InputError(
            option,
            "must have the numbers of an example side by side in its file, got a map that is stored by columns or cut "
            "across examples; save it with numpy.ascontiguousarray.",
        )
    offset = mapped.offset + array.ctypes.data - mapped.ctypes.data
    return DiskArray(
        Path(mapped.filename), offset, array.strides[0], array.dtype, array.dtype, array.shape
    )


def in_file(path: Path, offset: int, dtype: np.dtype, shape: tuple[int, ...]) -> DiskArray:
    """Makes an array of the bytes that follow each other in a file from this place on."""
    return DiskArray(path, offset, dtype.itemsize * prod(shape[1:]), dtype, dtype, shape)


def slices(array: np.ndarray | DiskArray) -> Iterator[tuple[int, np.ndarray]]:
    """Goes through an array by some rows at a time, each piece with the number of its first row."""
    rows = max(1, PIECE_BYTES // max(1, array.dtype.itemsize * prod(array.shape[1:])))
    for first in range(0, len(array), rows):
        yield first, array[first : first + rows]


def most_unpacked(size: int) -> int:
    """Returns how many bytes a compressed file of a size may decompress to."""
    return max(STREAMED_FROM, MOST_PACKED * size)


def _map_of(array: np.ndarray) -> np.memmap | None:
    """Returns the memory map that an array is a view of, if it is one."""
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array if isinstance(array, np.memmap) and isinstance(array.base, mmap.mmap) else None
