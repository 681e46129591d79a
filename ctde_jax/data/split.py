"""Examples with their labels: a split of a data set, or a batch."""

from typing import NamedTuple, TypeAlias, TypeVar

import numpy as np
from numpy.typing import ArrayLike

from ctde_jax.data.arrays import checked_inputs, checked_labels, checked_weights
from ctde_jax.data.disk import DiskArray, slices
from ctde_jax.errors import InputError


class Split(NamedTuple):
    """Examples with their labels, in memory or in a file whose rows are read on demand.

    Examples:
        >>> digits = ctde.data.digits()
        >>> few = ctde.data.Split(digits.test.inputs[:50], digits.test.labels[:50])
        >>> few.inputs.shape, few.labels.dtype
        ((50, 8, 8), dtype('int32'))
    """

    # uint8, int32 or float32[examples, ...]
    inputs: np.ndarray | DiskArray
    # int32[examples] for classes; int32 or float32[examples, ...] for targets
    labels: np.ndarray | DiskArray

    @property
    def is_on_disk(self) -> bool:
        """Whether examples are read from a file on demand."""
        return any(isinstance(array, DiskArray) for array in self)

    @property
    def weights(self) -> None:
        """None, as all examples have equal weight; see `WeightedSplit`."""
        return None


class WeightedSplit(NamedTuple):
    """Examples for training with their labels, and with weights that multiply their losses.

    Examples:
        >>> digits = ctde.data.digits()
        >>> weights = 1.0 + (digits.train.labels == 8)
        >>> ctde.data.weighted(digits, weights).train.weights[:4]
        array([1., 1., 1., 1.], dtype=float32)
    """

    inputs: np.ndarray | DiskArray  # as in `Split`
    labels: np.ndarray | DiskArray
    weights: np.ndarray  # float32[examples], at least 0

    @property
    def is_on_disk(self) -> bool:
        """Whether examples are read from a file on demand."""
        return any(isinstance(array, DiskArray) for array in self)


TrainingSplit: TypeAlias = Split | WeightedSplit

AnySplit = TypeVar("AnySplit", bound=TrainingSplit)


class Drawn(NamedTuple):
    """Examples taken from a split, with their indices in it.

    Augmentation keys are derived from the indices.
    """

    inputs: np.ndarray
    labels: np.ndarray
    numbers: np.ndarray  # int32[examples]
    weights: np.ndarray | None = None  # float32[examples]


def take(split: TrainingSplit, numbers: np.ndarray) -> Drawn:
    """Takes the examples with these indices, `int[...]`, from a split."""
    weights = None if split.weights is None else split.weights[numbers]
    return Drawn(split.inputs[numbers], split.labels[numbers], numbers, weights)


def select(split: AnySplit, rows: np.ndarray) -> AnySplit:
    """Returns the split of these rows, `int[rows]`; those on disk are not read."""
    arrays = {
        name: array.select(rows) if isinstance(array, DiskArray) else array[rows]
        for name, array in zip(split._fields, split, strict=True)
    }
    return split._replace(**arrays)


def as_batch(
    name: str,
    inputs: ArrayLike,
    labels: ArrayLike,
    weights: ArrayLike | None = None,
    classes: int = 0,
) -> TrainingSplit:
    """Converts a batch to a split, with the dtypes of `from_arrays`.

    Args:
        name: Description of the batch in error messages.
        inputs: Inputs, `[examples, ...]`.
        labels: Labels or targets, `[examples, ...]`.
        weights: Weights of the examples, or None.
        classes: Number of classes; 0 if the labels are targets.

    Raises:
        InputError: As for `checked_inputs`, `checked_labels`, `checked_weights` and `check_pair`.
    """
    batch = Split(
        checked_inputs(f"inputs of {name}", inputs), checked_labels(f"labels of {name}", labels)
    )
    check_pair(f"labels of {name}", *batch, classes)
    if weights is None:
        return batch
    return WeightedSplit(*batch, checked_weights(f"weights of {name}", weights, len(batch.inputs)))


def check_pair(
    option: str, inputs: np.ndarray | DiskArray, labels: np.ndarray | DiskArray, classes: int
) -> None:
    """Raises InputError unless each example has a label that is the index of a class.

    Args:
        option: Name of the labels in error messages.
        inputs: Inputs, `[examples, ...]`.
        labels: Labels or targets, `[examples, ...]`.
        classes: Number of classes; 0 if the labels are targets, whose values are not checked.
    """
    if len(inputs) != len(labels):
        raise InputError(
            option,
            f"must have one label for each of the {len(inputs):,} examples, got {len(labels):,} "
            "labels.",
        )
    # Labels may be on disk, so they are checked in pieces; `first` is the first row of a piece.
    for first, piece in slices(labels) if classes else ():
        if piece.min() < 0:
            place = np.unravel_index(np.argmin(piece), piece.shape)
            example = first + place[0]
            raise InputError(
                option, f"must be class indices from 0, got {piece[place]} for example {example}."
            )
        outside = piece >= classes
        if outside.any():
            place = tuple(np.argwhere(outside)[0])
            raise InputError(
                option,
                f"must be from 0 to {classes - 1}, one for each of the {classes} classes, "
                f"got {piece[place]} for example {first + place[0]}.",
            )
