"""A data set: arrays for training and testing, checked once, and how raw inputs become numbers near zero.

Inputs stay as they were stored (a picture is uint8), so that a data set takes a quarter of the room on the devices; the
model subtracts `shift` and multiplies by `scale` there, in their type. For tokens that is int32, so they stay numbers
of a vocabulary.
"""

from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from ctde_jax.data.disk import DiskArray, on_disk, pieces, stays_on_disk
from ctde_jax.errors import InputError

if TYPE_CHECKING:
    from ctde_jax.data.stream import Stream

TEST_FRACTION = 0.2
CLASSES = 2**16
"""Labels may count so many classes, or as many as there are labels, if that is more; each class gets a name."""


class Split(NamedTuple):
    """Examples with their labels, in memory, or in a file of which rows are read when they are needed."""

    inputs: np.ndarray | DiskArray  # [examples, ...], uint8, int32 or float32
    labels: np.ndarray | DiskArray  # int32[examples]; or int32 or float32[examples, ...] for targets, no classes

    @property
    def is_on_disk(self) -> bool:
        """Whether examples are read when they are needed."""
        return any(isinstance(array, DiskArray) for array in self)


class Drawn(NamedTuple):
    """Examples that were drawn from a split, with their numbers there, by which they are augmented."""

    inputs: np.ndarray
    labels: np.ndarray
    numbers: np.ndarray  # int32[examples]


@dataclass(frozen=True, repr=False)
class Dataset:
    """Training and test examples; the model sees `(inputs - shift) * scale`."""

    name: str
    train: Split
    test: Split
    classes: tuple[str, ...]
    """The label names, in the order of the labels; empty where labels are targets that are no classes."""

    shift: np.ndarray  # float32[] or float32[1, ...]; int32[] for integer inputs
    scale: np.ndarray  # likewise
    notes: tuple[str, ...] = ()
    """What was decided for the user, one sentence each."""

    vocabulary: tuple[str, ...] = ()
    """The characters of a text, in the order of their tokens."""

    validation: Split | None = None
    """Examples set aside from training that say when to stop; see `hold_out`."""

    stream: "Stream | None" = None
    """Where the training examples come in batches, one after another; then `train` is the first of them."""

    def __repr__(self) -> str:
        of_each = "training examples in a batch" if self.stream else "training"
        train, test = len(self.train.inputs), len(self.test.inputs)
        return f"Dataset({self.name!r}, {train:,} {of_each} and {test:,} test examples, {self.kinds})"

    def check_arrays(self, option: str) -> None:
        """Raises InputError for an option that goes through all training examples where they come in batches."""
        if self.stream is not None:
            raise InputError(option, f"goes with arrays, and {self.name} comes in batches; do it where they are made.")

    @property
    def kinds(self) -> str:
        """Says how many different labels there are: characters of a text, or classes."""
        return f"{len(self.vocabulary)} characters" if self.vocabulary else f"{len(self.classes)} classes"


def from_arrays(
    x_train: np.ndarray | DiskArray,
    y_train: np.ndarray | DiskArray,
    x_test: np.ndarray | DiskArray | None = None,
    y_test: np.ndarray | DiskArray | None = None,
    *,
    name: str = "arrays",
    classes: tuple[str, ...] | None = None,
) -> Dataset:
    """Makes a data set of the user's own arrays.

    Unsigned bytes are pixels, and reach the model divided by 255. Other integers, such as the tokens of a text, reach
    it as they are in int32, and everything else as it is in float32. Without test arrays, a random fifth of the
    examples (always the same) becomes the test split. The data set's notes say so.

    A memory map (`np.load(path, mmap_mode="r")`, or `np.memmap`) may be larger than memory: it stays in its file, and
    what trains on it reads each batch when it is its turn.

    Args:
        x_train: Inputs, `[examples, ...]`.
        y_train: Labels, integers from 0 in `[examples]`; or targets for a task of the user's own, such as the next
            token at every place in `[examples, length]`, or floating-point numbers.
        x_test: Test inputs, shaped like the training inputs.
        y_test: Test labels.
        name: What to call the data set.
        classes: Label names; by default the numbers from 0 to the largest training label, where there is one label
            for each example.

    Raises:
        InputError: Lengths differ, values are NaN or infinite, or labels are not among the classes.
    """
    if (x_test is None) != (y_test is None):
        missing, present = ("x_test", "y_test") if x_test is None else ("y_test", "x_test")
        raise InputError(missing, f"is missing although {present} is given; pass both or neither.")
    inputs, labels = _checked_inputs("x_train", x_train), _checked_labels("y_train", y_train)
    if classes is None:
        classes = numbered(labels)
    _check_pair("y_train", inputs, labels, len(classes))

    notes: tuple[str, ...] = ()
    if x_test is None or y_test is None:
        if len(inputs) < 2:
            raise InputError("x_train", "must hold at least two examples where there is no test split, got one.")
        train, test = _split_off_test(Split(inputs, labels))
        held_out = f"{len(test.inputs):,} of the {len(inputs):,} examples were set aside at random for testing"
        notes = (f"There is no test split, so {held_out}.",)
    else:
        train = Split(inputs, labels)
        test = Split(_checked_inputs("x_test", x_test), _checked_labels("y_test", y_test))
        _check_pair("y_test", test.inputs, test.labels, len(classes))
        if test.inputs.dtype != inputs.dtype:
            raise InputError("x_test", f"must be {inputs.dtype} like x_train, got {test.inputs.dtype}; convert one.")
        if test.inputs.shape[1:] != inputs.shape[1:]:
            raise InputError(
                "x_test",
                f"must have examples of the training shape {inputs.shape[1:]}, got {test.inputs.shape[1:]}.",
            )
    seen_as = np.int32 if inputs.dtype == np.int32 else np.float32
    scale = np.asarray(1 / 255 if inputs.dtype == np.uint8 else 1, seen_as)
    return Dataset(name, train, test, classes, np.zeros((), seen_as), scale, notes)


def hold_out(dataset: Dataset, share: float, seed: int = 0) -> Dataset:
    """Sets a random share of the training examples aside for validation.

    Examples that overlap, such as windows of a text with a small stride, leave hardly anything unseen to validate on.

    Raises:
        InputError: The share is not between 0 and 1, or leaves no example for training or for validation.
    """
    dataset.check_arrays("validation_share")
    examples = len(dataset.train.inputs)
    held_out = round(share * examples) if 0 < share < 1 else 0
    if not 0 < held_out < examples:
        raise InputError(
            "validation_share",
            f"must leave some of the {examples:,} training examples for training and some for validation, got {share}.",
        )
    order = np.random.default_rng(seed).permutation(examples)
    kept, validation = np.sort(order[held_out:]), np.sort(order[:held_out])
    note = f"{held_out:,} of the {examples:,} training examples are set aside at random for validation."
    return replace(
        dataset,
        train=_rows(dataset.train, kept),
        validation=_rows(dataset.train, validation),
        notes=(*dataset.notes, note),
    )


def standardized(dataset: Dataset) -> Dataset:
    """Gives every feature zero mean and unit variance over the training split; a constant feature becomes zero."""
    dataset.check_arrays("standardized")
    inputs, total, squares = dataset.train.inputs, np.zeros(()), np.zeros(())
    for _, piece in pieces(inputs):
        total = total + piece.sum(axis=0, keepdims=True, dtype=np.float64)
    mean = total / len(inputs)
    for _, piece in pieces(inputs):
        squares = squares + np.square(piece - mean).sum(axis=0, keepdims=True)
    deviation = np.sqrt(squares / len(inputs))
    varies = deviation >= np.finfo(np.float32).tiny  # of less there is no reciprocal in float32
    scale = np.where(varies, 1 / np.where(varies, deviation, 1), 0)
    note = "Every feature is standardized by the training split's mean and deviation before it reaches the model."
    return replace(
        dataset,
        shift=mean.astype(np.float32),
        scale=scale.astype(np.float32),
        notes=(*dataset.notes, note),
    )


def as_batch(name: str, inputs: ArrayLike, labels: ArrayLike, classes: int = 0) -> Split:
    """Makes a split of a batch, with types and checks as in `from_arrays`."""
    batch = Split(_checked_inputs(f"inputs of {name}", inputs), _checked_labels(f"labels of {name}", labels))
    _check_pair(f"labels of {name}", *batch, classes)
    return batch


def numbered(labels: np.ndarray | DiskArray) -> tuple[str, ...]:
    """Names the classes from 0 to the largest label, where there is one integer for each example.

    Raises:
        InputError: The largest label is no class's number.
    """
    if isinstance(labels, DiskArray) or labels.dtype != np.int32 or labels.ndim != 1:
        return ()
    largest = int(labels.max(initial=0))
    if largest >= max(CLASSES, len(labels)):
        raise InputError(
            "y_train",
            f"must count the classes from 0, got {largest} for example {labels.argmax()}, and there are only "
            f"{len(labels):,} labels; number the classes without gaps.",
        )
    return tuple(str(i) for i in range(largest + 1))


def _split_off_test(split: Split) -> tuple[Split, Split]:
    """Moves a random fifth of the examples, always the same ones, into a test split."""
    order = np.random.default_rng(0).permutation(len(split.inputs))
    test = max(1, round(TEST_FRACTION * len(order)))
    train_rows, test_rows = np.sort(order[test:]), np.sort(order[:test])
    return _rows(split, train_rows), _rows(split, test_rows)


def _rows(split: Split, rows: np.ndarray) -> Split:
    inputs, labels = (array.select(rows) if isinstance(array, DiskArray) else array[rows] for array in split)
    return Split(inputs, labels)


def _checked_inputs(option: str, inputs: ArrayLike | DiskArray) -> np.ndarray | DiskArray:
    inputs = _stored(option, inputs)
    if inputs.ndim < 2:
        raise InputError(option, f"must have the shape [examples, ...], got {inputs.shape}.")
    if 0 in inputs.shape:
        raise InputError(
            option, f"must hold at least one example, of at least one number, got the shape {inputs.shape}."
        )
    if inputs.dtype == np.uint8:
        return inputs
    if inputs.dtype.kind not in "biuf":
        raise InputError(option, f"must hold real numbers, got the type {inputs.dtype}.")
    if np.issubdtype(inputs.dtype, np.integer):
        return _as_int32(option, inputs)
    with np.errstate(over="ignore", invalid="ignore"):  # what does not fit in float32 becomes infinite, and is refused
        for first, piece in pieces(inputs):
            is_finite = np.isfinite(piece.astype(np.float32, copy=False))
            if not is_finite.all():
                row, *place = np.argwhere(~is_finite)[0]
                where = ", ".join(map(str, (first + row, *place)))
                raise InputError(
                    option,
                    f"must be finite in float32, got NaN or infinity at [{where}]; remove or fill in such examples.",
                )
        return inputs.astype(np.float32)


def _checked_labels(option: str, labels: ArrayLike | DiskArray) -> np.ndarray | DiskArray:
    labels = _stored(option, labels)
    if labels.ndim == 0:
        raise InputError(option, f"must have the shape [examples], got {labels.shape}.")
    if 0 in labels.shape[1:] or labels.dtype.kind == "m":
        raise InputError(option, f"must hold numbers for each example, got the shape {labels.shape}, {labels.dtype}.")
    if labels.ndim == 1:
        labels = np.asarray(labels)
    if labels.dtype == np.bool_ or np.issubdtype(labels.dtype, np.integer):
        if labels.ndim != 1 and prod(labels.shape[1:]) == 1:
            raise InputError(option, f"must have the shape [examples], got {labels.shape}.")
        return _as_int32(option, labels)
    if np.issubdtype(labels.dtype, np.floating):
        if not all(np.isfinite(piece).all() for _, piece in pieces(labels)):
            raise InputError(option, "must be finite, got NaN or infinity; remove or fill in such examples.")
        return labels.astype(np.float32)
    raise InputError(option, f"must hold integers from 0, or real-valued targets, got the type {labels.dtype}.")


def _stored(option: str, array: ArrayLike | DiskArray) -> np.ndarray | DiskArray:
    array = array if isinstance(array, DiskArray) else np.asarray(array)
    return on_disk(option, array) if array.ndim and stays_on_disk(array) else array


def _check_pair(option: str, inputs: np.ndarray | DiskArray, labels: np.ndarray | DiskArray, classes: int) -> None:
    if len(inputs) != len(labels):
        raise InputError(
            option, f"must have one label for each of the {len(inputs):,} examples, got {len(labels):,} labels."
        )
    for first, piece in pieces(labels) if classes else ():
        if piece.min() < 0:
            place = np.unravel_index(np.argmin(piece), piece.shape)
            example = first + place[0]
            raise InputError(option, f"must count the classes from 0, got {piece[place]} for example {example}.")
        outside = piece >= classes
        if outside.any():
            place = tuple(np.argwhere(outside)[0])
            raise InputError(
                option,
                f"must lie from 0 to {classes - 1}, one for each of the {classes} classes, "
                f"got {piece[place]} for example {first + place[0]}.",
            )


def _as_int32(option: str, integers: np.ndarray | DiskArray) -> np.ndarray | DiskArray:
    bounds = np.iinfo(np.int32)
    stored = integers.dtype
    if stored.kind != "b" and not (np.iinfo(stored).min >= bounds.min and np.iinfo(stored).max <= bounds.max):
        for _, piece in pieces(integers):
            for value in (piece.min(initial=0), piece.max(initial=0)):
                if not bounds.min <= int(value) <= bounds.max:
                    raise InputError(option, f"must fit in int32, got {value}; convert measurements to floating point.")
    return integers.astype(np.int32)
