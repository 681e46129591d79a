"""Arrays that stay in their file: only the rows that are indexed are read.

Every page of a memory map that is touched, and pages around it, count as memory of the process.
Rows are therefore read by plain reads, in the order of the file and each once. The operating system
is advised of all reads first, so that the disk serves many requests at a time.
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
"""Arrays of at least this many bytes stay in their file; smaller ones are kept on the devices."""

MOST_PACKED = 100
"""Maximum compression ratio of a file that decompresses to more than `STREAMED_FROM` bytes:
measured data compresses less, and a small file could fill the memory."""

PIECE_BYTES = 2**24
"""Size in bytes of the pieces in which a whole array is processed."""


@dataclass(frozen=True, eq=False)
class DiskArray:
    """An array in a file, whose rows are indexed like those of an array in memory."""

    path: Path
    offset: int  # of the first row, in bytes
    stride: int  # from one row to the next, in bytes
    stored: np.dtype  # in the file
    dtype: np.dtype  # in memory
    shape: tuple[int, ...]
    numbers: np.ndarray | None = None  # int32[rows], indices of rows in the file; None for all

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: int | slice | np.ndarray) -> np.ndarray:
        """Reads rows into memory.

        Raises:
            IndexError: If an index is out of range.
            InputError: If the file cannot be read.
        """
        # Indices into this array, with negative ones counted from its end.
        if isinstance(rows, slice):
            numbers = np.arange(*rows.indices(len(self)))
        else:
            numbers = np.asarray(rows)
            if numbers.size and not (-len(self) <= numbers.min() and numbers.max() < len(self)):
                raise IndexError(
                    f"row {np.abs(numbers).max()} is out of range for the {len(self)} rows of "
                    f"{self.path}"
                )
            numbers = np.where(numbers < 0, numbers + len(self), numbers)
        # Read each row once, in the order of the file, then copy it to the requested positions.
        in_file = numbers.ravel() if self.numbers is None else self.numbers[numbers.ravel()]
        wanted, places = np.unique(in_file, return_inverse=True)
        # A cast may overflow without a warning, as in the checks of arrays.
        with np.errstate(over="ignore", invalid="ignore"):
            found = self._read(wanted).astype(self.dtype, copy=False)
        return found[places].reshape(*numbers.shape, *self.shape[1:])

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:
        """Reads all rows into memory."""
        # `copy` belongs to numpy's protocol; each call reads a new array anyway.
        return self[:].astype(dtype or self.dtype, copy=False)

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    def astype(self, dtype: DTypeLike) -> "DiskArray":
        """Returns the array with a different dtype, to which rows are cast when they are read."""
        return replace(self, dtype=np.dtype(dtype))

    def reshape(self, rows: int, *shape: int) -> "DiskArray":
        """Returns the array with its rows reshaped to `shape`.

        Raises:
            ValueError: If `rows` is neither the number of rows nor -1, or the sizes differ.
        """
        if rows not in (-1, len(self)) or prod(shape) != prod(self.shape[1:]):
            raise ValueError(f"rows of the shape {self.shape[1:]} cannot be reshaped to {shape}")
        return replace(self, shape=(len(self), *shape))

    def select(self, rows: np.ndarray) -> "DiskArray":
        """Returns the array of these rows, `int[rows]`, without reading them."""
        numbers = (rows if self.numbers is None else self.numbers[rows]).astype(np.int32)
        return replace(self, shape=(len(numbers), *self.shape[1:]), numbers=numbers)

    def _read(self, rows: np.ndarray) -> np.ndarray:
        """Reads rows of the file, `int[rows]`, which are distinct and in ascending order."""
        found = np.empty((len(rows), *self.shape[1:]), self.stored)
        size = self.stored.itemsize * prod(self.shape[1:])
        content = found.reshape(-1).view(np.uint8).data
        # Find the runs of adjacent rows, each of which takes one read. If rows have gaps between
        # them, as in a slice of a memory map, each row is a run.
        is_first = (
            np.diff(rows, prepend=-2) != 1 if self.stride == size else np.ones(len(rows), bool)
        )
        firsts = np.flatnonzero(is_first)
        places = (self.offset + self.stride * rows[firsts].astype(np.int64)).tolist()
        cuts = [*(firsts * size).tolist(), len(content)]

        # Advise the system of all reads, then read; `readinto` may return less than was asked for.
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
                        raise OSError(None, "the file was truncated")
                    start += got
        return found


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Raises InputError if the file of an array can no longer be read."""
    try:
        yield
    except OSError as error:
        raise InputError(
            "data",
            f"could not be read from {path} during training ({error.strerror}); restore the file.",
        ) from error


def stays_on_disk(array: np.ndarray | DiskArray) -> bool:
    """Returns whether an array is in a file: a memory map, a view of one, or a `DiskArray`."""
    return isinstance(array, DiskArray) or _map_of(array) is not None


def on_disk(option: str, array: np.ndarray | DiskArray) -> DiskArray:
    """Converts a memory map, or a view of one, to a `DiskArray`.

    Raises:
        InputError: If the map is copy-on-write, so that it may differ from its file, or an example
            is not contiguous in the file.
    """
    if isinstance(array, DiskArray):
        return array
    mapped = _map_of(array)
    assert mapped is not None, "see stays_on_disk"
    # A copy-on-write map may differ from its file.
    if mapped.filename is None or mapped.mode == "c":
        raise InputError(
            option, f"must be a memory map in the mode 'r', got the mode {mapped.mode!r}."
        )
    if len(array) and not array[0].flags.c_contiguous:
        raise InputError(
            option,
            "must store each example contiguously in its file, got a memory map in column-major "
            "order or a slice of one; save it with numpy.ascontiguousarray.",
        )
    # The file offset of the first row, from its distance to the start of the map in memory.
    offset = mapped.offset + array.ctypes.data - mapped.ctypes.data
    return DiskArray(
        Path(mapped.filename), offset, array.strides[0], array.dtype, array.dtype, array.shape
    )


def in_file(path: Path, offset: int, dtype: np.dtype, shape: tuple[int, ...]) -> DiskArray:
    """Returns the array that is stored C-contiguously in a file, starting at byte `offset`."""
    return DiskArray(path, offset, dtype.itemsize * prod(shape[1:]), dtype, dtype, shape)


def slices(array: np.ndarray | DiskArray) -> Iterator[tuple[int, np.ndarray]]:
    """Yields `(index of the first row, rows)` for pieces of at most `PIECE_BYTES` or one row."""
    # At least one row, however large it is.
    rows = max(1, PIECE_BYTES // max(1, array.dtype.itemsize * prod(array.shape[1:])))
    for first in range(0, len(array), rows):
        yield first, array[first : first + rows]


def most_unpacked(size: int) -> int:
    """Returns the maximum number of bytes to which a compressed file of `size` may decompress."""
    return max(STREAMED_FROM, MOST_PACKED * size)


def _map_of(array: np.ndarray) -> np.memmap | None:
    """Returns the memory map that an array is a view of, or None."""
    while isinstance(array.base, np.ndarray):
        array = array.base
    # A copy of a map has the class `memmap`, too, but no mmap as its base.
    return array if isinstance(array, np.memmap) and isinstance(array.base, mmap.mmap) else None
