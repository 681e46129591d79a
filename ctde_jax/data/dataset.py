"""A data set: arrays for training and testing, checked once, and the normalization of the inputs.

Inputs keep the dtype in which they are stored (uint8 for images), so that a data set takes a
quarter of the memory on the devices. There the model subtracts `shift` and multiplies by `scale`,
in the dtype of these. For tokens it is int32, so they remain indices into a vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod

import numpy as np
from numpy.typing import ArrayLike

from ctde_jax.bundle import Recipe, are_numbers
from ctde_jax.data.arrays import (
    check_precision,
    checked_inputs,
    checked_labels,
    checked_weights,
    plain,
)
from ctde_jax.data.classes import from_words, look_up, note_on_numbers, notes_on_classes, numbered
from ctde_jax.data.disk import DiskArray, slices
from ctde_jax.data.split import Split, TrainingSplit, WeightedSplit, check_pair, select
from ctde_jax.data.stream import Stream
from ctde_jax.errors import InputError, check_at_least, check_at_most

TEST_FRACTION = 0.2

SENSIBLE = (0.01, 10.0)
"""Inputs get a note on their scale if their root mean square is outside of this range: networks are
initialized for numbers around 1."""

_MEASURED = 4096
"""Number of examples from which the scale is measured."""

_EXACT = 2**24
"""Integers up to this one are exact in float32."""


@dataclass(frozen=True, repr=False)
class Dataset:
    """Training and test examples; the model receives `(inputs - shift) * scale`.

    Examples:
        >>> data = ctde.data.digits()
        >>> data
        Dataset('digits', 1,438 training and 359 test examples, 10 classes)
        >>> data.train.inputs.shape, data.train.inputs.dtype, float(data.scale)
        ((1438, 8, 8), dtype('uint8'), 0.0625)
    """

    name: str
    train: TrainingSplit
    test: Split
    classes: tuple[str, ...]
    """Label names, in the order of the labels; empty if the labels are targets and not classes."""

    shift: np.ndarray  # float32[] or float32[1, ...]; int32[] for integer inputs
    scale: np.ndarray  # like shift
    notes: tuple[str, ...] = ()
    """Decisions that were made for the user, one sentence each."""

    vocabulary: tuple[str, ...] = ()
    """Characters of a text, in the order of their tokens."""

    validation: Split | None = None
    """Examples held out from training, for early stopping; see `hold_out`."""

    columns: tuple[str, ...] = ()
    """Feature names of a table, in the order of the inputs; empty if they have none."""

    recipe: Recipe | None = None
    """Conversion of the rows of a table to inputs, fit on the training split.

    None if the table has only numbers, or the examples are no table.
    """

    stream: Stream | None = None
    """Source of the training batches, if they come from an iterable.

    `train` is then the first batch.
    """

    def __repr__(self) -> str:
        of_each = "training examples in a batch" if self.stream else "training"
        train = len(self.train.inputs)
        test = len(self.test.inputs)
        return (
            f"Dataset({self.name!r}, {train:,} {of_each} and {test:,} test examples, {self.kinds})"
        )

    def check_arrays(self, option: str) -> None:
        """Raises InputError for `option`, which needs all examples, if they come from a stream."""
        if self.stream is not None:
            raise InputError(
                option,
                f"requires a data set of arrays, but {self.name} yields batches; apply it to the "
                "source of the batches.",
            )

    @property
    def kinds(self) -> str:
        """Number of characters of a text, of classes, or of targets per example, as a phrase."""
        if self.vocabulary:
            return f"{len(self.vocabulary)} characters"
        if self.classes:
            return f"{len(self.classes)} classes"
        return f"{self.targets:,} target{'s' * (self.targets > 1)} per example"

    @property
    def targets(self) -> int:
        """Number of labels of an example."""
        return prod(self.train.labels.shape[1:])


def from_arrays(
    x_train: ArrayLike | DiskArray,
    y_train: ArrayLike | DiskArray,
    x_test: ArrayLike | DiskArray | None = None,
    y_test: ArrayLike | DiskArray | None = None,
    *,
    name: str = "arrays",
    classes: Sequence[str] | None = None,
    weights: ArrayLike | None = None,
) -> Dataset:
    """Makes a data set of arrays of numpy, JAX, PyTorch (on the CPU) or pandas, or of lists.

    uint8 inputs are pixels, which are divided by 255. Images of 16 bits (uint16 in
    `[examples, height, width, ...]`) are divided by 2**b - 1 if the brightest pixel needs b bits.
    Other integers, such as the tokens of a text, become int32 without scaling, and everything else
    becomes float32; if these are far from 1, a note recommends `standardized`. Without test arrays,
    a random fifth of the examples (always the same) becomes the test split. The data set's notes
    list these decisions.

    A memory map (`np.load(path, mmap_mode="r")`, or `np.memmap`) may be larger than memory: it
    stays in its file, from which training reads each batch.

    Args:
        x_train: Inputs, `[examples, ...]`.
        y_train: Labels, `[examples]`: integers from 0, booleans, or class names. Or targets for a
            custom task, such as the next token at every position in `[examples, length]`, or
            floating-point numbers.
        x_test: Test inputs, shaped like the training inputs.
        y_test: Test labels.
        name: Name of the data set.
        classes: Label names; by default the numbers from 0 to the largest training label, or the
            sorted names in the training labels, if there is one label per example.
        weights: Weight of each example of `x_train`, `[examples]`, at least 0; see `weighted`.

    Raises:
        InputError: If lengths differ, values are NaN or infinite, arrays are sparse, masked or not
            numeric, float32 does not distinguish the numbers of a feature, labels are not among
            the classes, or weights are negative or all 0.

    Examples:
        >>> points = np.random.default_rng(0).normal(size=(100, 2))
        >>> sides = np.where(points[:, 0] < 0, "left", "right")
        >>> data = ctde.data.from_arrays(points, sides)
        >>> data.classes, data.train.inputs.shape
        (('left', 'right'), (80, 2))
    """
    dataset = assemble(x_train, y_train, x_test, y_test, name, classes, weights)
    return replace(dataset, notes=(*dataset.notes, *notes_on_inputs(dataset)))


def assemble(
    x_train: ArrayLike | DiskArray,
    y_train: ArrayLike | DiskArray,
    x_test: ArrayLike | DiskArray | None,
    y_test: ArrayLike | DiskArray | None,
    name: str,
    classes: Sequence[str] | None,
    weights: ArrayLike | None = None,
) -> Dataset:
    """Makes a data set as `from_arrays` does, without the notes of `notes_on_inputs`."""
    # Test arrays are given as a pair, or not at all.
    if (x_test is None) != (y_test is None):
        missing, present = ("x_test", "y_test") if x_test is None else ("y_test", "x_test")
        raise InputError(missing, f"is missing although {present} is given; pass both or neither.")
    x_train = plain("x_train", x_train)
    y_train = plain("y_train", y_train)
    y_test = None if y_test is None else plain("y_test", y_test)

    # Class names become class numbers, in the order of `classes` or in sorted order.
    spells_numbers = False
    if isinstance(y_train, np.ndarray) and y_train.ndim == 1 and y_train.dtype.kind == "U":
        if classes is None:
            classes, _ = from_words(y_train.tolist())
            spells_numbers = are_numbers(classes)
        y_train = look_up("y_train", y_train, classes)
        y_test = None if y_test is None else look_up("y_test", np.asarray(y_test), classes)

    # Check the training arrays, and number the classes if they have no names.
    inputs = checked_inputs("x_train", x_train)
    labels = checked_labels("y_train", y_train)
    is_numbered = classes is None
    has_numbers = is_numbered or spells_numbers
    classes = numbered(labels) if classes is None else tuple(classes)
    check_pair("y_train", inputs, labels, len(classes))
    given = Split(inputs, labels)
    if weights is not None:
        given = WeightedSplit(*given, checked_weights("weights", weights, len(inputs)))

    # Split off a test set, or check the given one against the training arrays.
    notes: list[str] = []
    if x_test is None or y_test is None:
        if len(inputs) < 2:
            raise InputError(
                "x_train", "must contain at least two examples if there is no test split, got one."
            )
        in_train, in_test = split_rows(len(inputs))
        train = select(given, in_train)
        test = select(Split(inputs, labels), in_test)
        notes.append(note_on_test_split(len(test.inputs), len(inputs)))
    else:
        train = given
        test = Split(
            checked_inputs("x_test", x_test),
            _like_training(labels, checked_labels("y_test", y_test)),
        )
        check_pair("y_test", test.inputs, test.labels, len(classes))
        if test.inputs.dtype != inputs.dtype:
            raise InputError(
                "x_test",
                f"must have the dtype of x_train, {inputs.dtype}, got {test.inputs.dtype}; convert "
                "one of them.",
            )
        if test.inputs.shape[1:] != inputs.shape[1:]:
            raise InputError(
                "x_test",
                f"must have examples of the shape of x_train, {inputs.shape[1:]}, got "
                f"{test.inputs.shape[1:]}.",
            )

    _check_any_weight(train)

    # Add notes on classes that may be measurements, or that have no examples.
    if classes and labels.ndim == 1:
        if has_numbers:
            notes += note_on_numbers(len(np.unique(labels)), "y_train")
        notes += notes_on_classes(
            classes, np.asarray(train.labels), np.asarray(test.labels), is_numbered
        )

    # Scale pixels to [0, 1]: uint8, and uint16, which became int32; other inputs are not scaled.
    is_deep = x_train.dtype == np.uint16 and x_train.ndim > 2
    highest = _highest(inputs) if is_deep else 255 if inputs.dtype == np.uint8 else 1
    seen_as = np.int32 if inputs.dtype == np.int32 and not is_deep else np.float32
    scale = np.asarray(1 / highest, seen_as)
    return Dataset(name, train, test, classes, np.zeros((), seen_as), scale, tuple(notes))


def notes_on_inputs(dataset: Dataset) -> list[str]:
    """Returns notes, if they apply: on channels first, 16-bit images, and inputs far from 1."""
    inputs = dataset.train.inputs
    notes = []
    if is_channels_first(inputs.shape[1:]):
        notes.append(
            f"Images of the shape {list(inputs.shape[1:])} seem to have channels first, but Flax "
            "convolutions expect them last; pass inputs.transpose(0, 2, 3, 1)."
        )

    # int32 inputs with a float32 scale are images of 16 bits.
    if inputs.dtype == np.int32 and not dataset.scale.ndim and dataset.scale.dtype == np.float32:
        highest = round(1 / float(dataset.scale))
        notes.append(
            f"Images of 16 bits are divided by {highest:,}, as their brightest pixel needs "
            f"{highest.bit_length()} bits."
        )

    # Inputs that are scaled, or have several labels per example as tokens do, get no note.
    if dataset.scale.ndim or not np.all(dataset.scale == 1) or dataset.train.labels.ndim > 1:
        return notes
    some = np.asarray(inputs[:_MEASURED]).astype(np.float64)
    size = float(np.sqrt(np.square(some).mean()))
    least = some.min()
    largest = some.max()
    if size and not SENSIBLE[0] <= size <= SENSIBLE[1]:
        # The fix depends on whether these look like pixels, tokens or measurements.
        way_out = "ctde_jax.data.standardized(data) scales every feature"
        if some.ndim > 2 and least >= 0 and largest <= 255 and np.array_equal(some, np.rint(some)):
            way_out = "save pixels as uint8, which are divided by 255"
        elif inputs.dtype == np.int32:
            rounded = (
                ", but float32 rounds those above 16,777,216"
                if max(-least, largest) > _EXACT
                else ""
            )
            way_out = f"this is correct for tokens{rounded}; for measurements, {way_out}"
        notes.append(
            f"Inputs are not scaled and range from {least:.6g} to {largest:.6g}, but networks "
            f"train best on numbers around 1; {way_out}."
        )
    return notes


def is_channels_first(shape: Sequence[int]) -> bool:
    """Returns whether the shape of an image looks like `[channels, height, width]`."""
    # Only the first axis may look like channels; images of up to 4 pixels a side are ambiguous.
    channels = (1, 3, 4)
    return (
        len(shape) == 3
        and shape[0] in channels
        and shape[2] not in channels
        and min(shape[1:]) > max(channels)
    )


def weighted(dataset: Dataset, weights: ArrayLike) -> Dataset:
    """Gives each training example a weight, by which its loss is multiplied.

    The objective of a batch is `sum(weight * loss) / examples`, as with class weights, by which it
    is also multiplied if there are any; it is not divided by the sum of the weights. The reported
    loss and the metrics do not change.

    Args:
        dataset: Data set of arrays; weights that it already has are replaced.
        weights: Weight of each example of `dataset.train`, `[examples]`, at least 0.

    Raises:
        InputError: If there is not one weight for each training example, one is negative, NaN or
            infinite, all of them are 0, or the examples come from a stream.

    Examples:
        >>> data = ctde.data.digits()
        >>> twice = ctde.data.weighted(data, np.where(data.train.labels == 8, 2, 1))
        >>> len(twice.train.weights)
        1438
    """
    dataset.check_arrays("weights")
    inputs = dataset.train.inputs
    train = WeightedSplit(
        inputs, dataset.train.labels, checked_weights("weights", weights, len(inputs))
    )
    _check_any_weight(train)
    return replace(dataset, train=train)


def _check_any_weight(train: TrainingSplit) -> None:
    """Raises InputError if all training examples have weight 0, so that no gradient exists."""
    if train.weights is not None and not train.weights.any():
        raise InputError(
            "weights",
            f"must be above 0 for at least one of the {len(train.weights):,} training examples, "
            "got only 0.",
        )


def hold_out(dataset: Dataset, validation_fraction: float, seed: int = 0) -> Dataset:
    """Holds out a random fraction of the training examples for validation.

    If examples overlap, such as windows of a text with a small stride, the model has seen most of
    the validation split in training.

    Args:
        dataset: Data set of arrays.
        validation_fraction: Fraction of the training examples to hold out, between 0 and 1.
        seed: Random seed of the choice.

    Raises:
        InputError: If the fraction is not between 0 and 1, or leaves no example for training or for
            validation, if the data set has a validation split, or if the examples come from a
            stream.

    Examples:
        >>> data = ctde.data.hold_out(ctde.data.digits(), 0.1)
        >>> len(data.train.inputs), len(data.validation.inputs)
        (1294, 144)
    """
    _check_no_validation(dataset, "validation_fraction", validation_fraction)
    examples = len(dataset.train.inputs)
    # A fraction outside of (0, 1) holds out nothing, which is rejected.
    held_out = round(validation_fraction * examples) if 0 < validation_fraction < 1 else 0
    if not 0 < held_out < examples:
        raise InputError(
            "validation_fraction",
            f"must leave some of the {examples:,} training examples for training and some for "
            f"validation, got {validation_fraction}.",
        )

    order = np.random.default_rng(seed).permutation(examples)
    return _with_validation(dataset, order[:held_out], order[held_out:])


def folds(dataset: Dataset, count: int, seed: int = 0) -> list[Dataset]:
    """Divides the training examples into random folds of equal size, for cross-validation.

    The validation split of each result is one fold, its training split the others; the sizes of two
    folds differ by at most one. Scale and classes are those of all training examples.

    Args:
        dataset: Data set of arrays.
        count: Number of folds, at least 2.
        seed: Random seed of the division.

    Raises:
        InputError: If there are fewer than 2 folds or more folds than examples, if the data set has
            a validation split, or if the examples come from a stream.

    Examples:
        >>> for fold in ctde.data.folds(ctde.data.digits(), 5)[:1]:
        ...     print(len(fold.train.inputs), len(fold.validation.inputs))
        1150 288
    """
    _check_no_validation(dataset, "count", count)
    check_at_least(2, count=count)
    check_at_most(len(dataset.train.inputs), count=count)
    order = np.random.default_rng(seed).permutation(len(dataset.train.inputs))
    parts = np.array_split(order, count)
    return [
        _with_validation(dataset, part, np.concatenate([*parts[:fold], *parts[fold + 1 :]]))
        for fold, part in enumerate(parts)
    ]


def _check_no_validation(dataset: Dataset, option: str, value: float) -> None:
    dataset.check_arrays(option)
    if dataset.validation is not None:
        raise InputError(
            option,
            f"must not be set, as {dataset.name} has a validation split of "
            f"{len(dataset.validation.inputs):,} examples, got {value}.",
        )


def _with_validation(dataset: Dataset, validation: np.ndarray, kept: np.ndarray) -> Dataset:
    """Moves the training examples with the indices `validation` to the validation split."""
    train = select(dataset.train, np.sort(kept))
    _check_any_weight(train)
    note = (
        f"{len(validation):,} of the {len(validation) + len(kept):,} training examples are held "
        "out at random for validation."
    )
    # Sorted, so that examples keep their order, and rows on disk are read in that of the file.
    whole = Split(dataset.train.inputs, dataset.train.labels)
    return replace(
        dataset,
        train=train,
        validation=select(whole, np.sort(validation)),
        notes=(*dataset.notes, note),
    )


def standardized(dataset: Dataset) -> Dataset:
    """Scales every feature to zero mean and unit variance over the training split.

    A constant feature becomes zero. The stored inputs do not change: `shift` and `scale` become
    float32 `[1, ...]`, with one number for each feature.

    Raises:
        InputError: If the examples come from a stream, or float32 does not distinguish the numbers
            of a feature.

    Examples:
        >>> data = ctde.data.standardized(ctde.data.digits())
        >>> data.shift.shape, data.scale.dtype
        ((1, 8, 8), dtype('float32'))
    """
    dataset.check_arrays("standardized")
    check_precision("standardized", dataset.train.inputs)
    mean, deviation = moments(dataset.train.inputs)
    scale = np.where(deviation, 1 / np.where(deviation, deviation, 1), 0)
    scaled = replace(dataset, shift=mean.astype(np.float32), scale=scale.astype(np.float32))

    # Notes on the scale of the raw inputs no longer apply.
    outdated = {*notes_on_inputs(dataset)} - {*notes_on_inputs(scaled)}
    note = "Every feature is standardized by the mean and standard deviation of the training split."
    kept = [each for each in dataset.notes if each not in outdated]
    return replace(scaled, notes=(*kept, note))


def moments(array: np.ndarray | DiskArray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the mean and the standard deviation of each feature, `float64[1, ...]`.

    The deviation is 0 if the feature is equal in all examples, or if its deviation has no
    reciprocal in float32.

    Args:
        array: Numbers `[examples, ...]`, with at least one example.

    Examples:
        >>> ctde.data.moments(np.array([[1.0, 5.0], [3.0, 5.0]]))
        (array([[2., 5.]]), array([[1., 0.]]))
    """
    # First pass: mean and range.
    total = np.zeros(())
    least = largest = np.asarray(array[:1])
    for _, piece in slices(array):
        total = total + piece.sum(axis=0, keepdims=True, dtype=np.float64)
        least = np.minimum(least, piece.min(axis=0, keepdims=True))
        largest = np.maximum(largest, piece.max(axis=0, keepdims=True))
    mean = total / len(array)

    # Second pass: variance around the mean, so that a large mean causes no cancellation.
    squares = np.zeros(())
    for _, piece in slices(array):
        squares = squares + np.square(piece - mean).sum(axis=0, keepdims=True)
    deviation = np.sqrt(squares / len(array))

    # The mean of equal numbers is rounded, so their deviation may exceed 0; hence the range.
    varies = (largest > least) & (deviation >= np.finfo(np.float32).tiny)
    return mean, np.where(varies, deviation, 0)


def _highest(inputs: np.ndarray | DiskArray) -> int:
    """Returns 2**b - 1, if the largest input needs b bits."""
    largest = max(int(piece.max()) for _, piece in slices(inputs))
    return 2 ** max(1, largest.bit_length()) - 1


def split_rows(examples: int) -> tuple[np.ndarray, np.ndarray]:
    """Chooses a random fifth of the examples, always the same, for the test split.

    Returns:
        The indices of the training examples and those of the test examples, in ascending order.
    """
    order = np.random.default_rng(0).permutation(examples)
    test = max(1, round(TEST_FRACTION * examples))
    return np.sort(order[test:]), np.sort(order[:test])


def note_on_test_split(test: int, examples: int) -> str:
    """Returns the note on a test split of `test` examples that was held out at random."""
    return (
        f"There is no test split, so {test:,} of the {examples:,} examples were held out at random "
        "for testing."
    )


def _like_training(
    train: np.ndarray | DiskArray, test: np.ndarray | DiskArray
) -> np.ndarray | DiskArray:
    """Casts test labels to the dtype of the training labels; raises InputError on a mismatch."""
    if test.shape[1:] != train.shape[1:]:
        wanted, got = (
            str(["examples", *array.shape[1:]]).replace("'", "") for array in (train, test)
        )
        raise InputError(
            "y_test", f"must have the shape {wanted} like y_train, got {got}; reshape one of them."
        )
    # Integers can be cast to float targets, but not the reverse.
    if train.dtype != np.float32 and test.dtype == np.float32:
        raise InputError(
            "y_test", f"must be integers like y_train, got {test.dtype}; convert one of them."
        )
    return test if test.dtype == train.dtype else test.astype(train.dtype)
