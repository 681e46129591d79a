"""SHA-256 digests by which a run recognizes the data set that it was started with."""

from collections.abc import Sequence
from hashlib import sha256
from math import prod

import numpy as np

from ctde_jax.data.dataset import Dataset
from ctde_jax.data.disk import DiskArray, slices

WHOLE_BYTES = 2**28
"""Arrays up to this size are hashed whole, in 0.2 to 0.6 s per 256 MiB; larger ones by samples."""

_SAMPLES = 4096
"""Number of rows that are hashed of a larger array: evenly spaced, with the first and the last."""


def digest(array: np.ndarray | DiskArray) -> str:
    """Returns the SHA-256 of shape, dtype and content, equal for an array in memory and in a file.

    Args:
        array: Array of any shape and dtype. Above `WHOLE_BYTES`, only `_SAMPLES` rows are read.
    """
    # Shape and dtype are hashed, too, so that a reshaped array has a different digest.
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
    """Returns a digest of each part of a data set, keyed by the part's name in error messages.

    Training batches from a stream are left out, because they cannot be read twice.

    Args:
        data: Data set.
        partition: Example indices of each device or client, if the examples are partitioned.
    """
    splits = {"validation": data.validation, "test": data.test}
    if data.stream is None:
        splits = {"training": data.train, **splits}

    # Arrays of the splits.
    found = {
        f"the {part} of the {name} split": digest(array)
        for name, split in splits.items()
        if split is not None
        for part, array in zip(split._fields, split, strict=True)
    }

    found |= digests_of_conversion(data)

    # Each part is preceded by its length, so that the digest depends on their borders.
    if partition is not None:
        parts = [np.asarray(part, np.int64).tobytes() for part in partition]
        found["the partition"] = sha256(
            b"".join(len(part).to_bytes(8) + part for part in parts)
        ).hexdigest()
    return found


def digests_of_conversion(data: Dataset) -> dict[str, str]:
    """Returns the entries of `digests_of` that need no examples.

    They are those of normalization, of the names of classes, columns and characters, and of the
    recipe of a table.
    """
    found = {
        "the shift of the inputs": digest(data.shift),
        "the scale of the inputs": digest(data.scale),
        "the class names": _digest_of_names(data.classes),
        "the column names": _digest_of_names(data.columns),
        "the vocabulary": _digest_of_names(data.vocabulary),
    }
    if data.recipe is not None:
        found["the recipe of the columns"] = sha256(repr(data.recipe).encode()).hexdigest()
    return found


def _bytes_of(rows: np.ndarray) -> memoryview:
    return np.ascontiguousarray(rows).reshape(-1).view(np.uint8).data


def _digest_of_names(names: Sequence[str]) -> str:
    return sha256(repr([str(name) for name in names]).encode()).hexdigest()
