"""SHA-256 digests of arrays and data sets, by which a run recognizes the data that it was started with."""

from collections.abc import Sequence
from hashlib import sha256
from math import prod

import numpy as np

from ctde_jax.data.dataset import Dataset
from ctde_jax.data.disk import DiskArray, slices

WHOLE_BYTES = 2**28
"""Arrays of at most this size are digested whole, in 0.2 to 0.6 s per 256 MiB; of larger ones, samples."""

_SAMPLES = 4096
"""Rows of a larger array that are digested: evenly spaced, the first and the last among them."""


def digest(array: np.ndarray | DiskArray) -> str:
    """Returns the SHA-256 of shape, dtype and content; equal for an array in memory and the same array in a file.

    Args:
        array: Any shape and dtype. Of more than `WHOLE_BYTES`, only `_SAMPLES` rows are read.
    """
    total = sha256(f"{array.dtype}{list(array.shape)}".encode())
    if array.ndim == 0 or len(array) == 0:
        total.update(np.asarray(array).tobytes())
    elif array.dtype.itemsize * prod(array.shape) <= WHOLE_BYTES:
        for _, piece in slices(array):
            total.update(_bytes_of(piece))
    else:
        for row in np.unique(np.linspace(0, len(array) - 1, _SAMPLES).astype(np.int64)):
            total.update(_bytes_of(array[row : row + 1]))
    return total.hexdigest()


def digests_of(data: Dataset, partition: Sequence[np.ndarray] | None = None) -> dict[str, str]:
    """Returns a digest of each part of a data set, by the name that an error message gives it.

    Training batches that arrive one after another are left out: they cannot be read twice.

    Args:
        data: The data set.
        partition: The indices of the examples of each device or client, if examples stay with one.
    """
    splits = {"validation": data.validation, "test": data.test}
    if data.stream is None:
        splits = {"training": data.train, **splits}
    found = {
        f"the {part} of the {name} split": digest(array)
        for name, split in splits.items()
        if split is not None
        for part, array in zip(split._fields, split, strict=True)
    }
    found["the shift of the inputs"] = digest(data.shift)
    found["the scale of the inputs"] = digest(data.scale)
    found["the class names"] = _digest_of_names(data.classes)
    found["the column names"] = _digest_of_names(data.columns)
    found["the vocabulary"] = _digest_of_names(data.vocabulary)
    if partition is not None:
        parts = [np.asarray(part, np.int64).tobytes() for part in partition]
        found["the partition"] = sha256(
            b"".join(len(part).to_bytes(8) + part for part in parts)
        ).hexdigest()
    return found


def _bytes_of(rows: np.ndarray) -> memoryview:
    return np.ascontiguousarray(rows).reshape(-1).view(np.uint8).data


def _digest_of_names(names: Sequence[str]) -> str:
    return sha256(repr([str(name) for name in names]).encode()).hexdigest()
