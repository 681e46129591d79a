"""A data set: arrays for training and testing, checked once, and how raw inputs become numbers near zero.

Inputs stay as they were stored (a picture is uint8), so that a data set takes a quarter of the room on the devices; the
model subtracts `shift` and multiplies by `scale` there, in their type. For tokens that is int32, so they stay numbers
of a vocabulary.
"""

from dataclasses import dataclass, replace
from math import prod
from typing import NamedTuple

import numpy as np

from ctde_jax.errors import InputError

TEST_FRACTION = 0.2


class Split(NamedTuple):
    """Examples with their labels."""

    inputs: np.ndarray  # [examples, ...], uint8, int32 or float32
    labels: np.ndarray  # int32[examples]; or int32 or float32[examples, ...] for targets that are no classes


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

    def __repr__(self) -> str:
        train, test = len(self.train.inputs), len(self.test.inputs)
        return f"Dataset({self.name!r}, {train:,} training and {test:,} test examples, {self.kinds})"

    @property
    def kinds(self) -> str:
        """Says how many different labels there are: characters of a text, or classes."""
        return f"{len(self.vocabulary)} characters" if self.vocabulary else f"{len(self.classes)} classes"


def from_arrays(
    x_train: np.ndarray,
    y_train: np.ndarray,
    x_test: np.ndarray | None = None,
    y_test: np.ndarray | None = None,
    *,
    name: str = "arrays",
    classes: tuple[str, ...] | None = None,
) -> Dataset:
    """Makes a data set of the user's own arrays.

    Unsigned bytes are pixels, and reach the model divided by 255. Other integers, such as the tokens of a text, reach
    it as they are in int32, and everything else as it is in float32. Without test arrays, a random fifth of the
    examples (always the same) becomes the test split. The data set's notes say so.

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
        are_classes = np.issubdtype(labels.dtype, np.integer) and labels.ndim == 1
        classes = tuple(str(i) for i in range(int(labels.max(initial=0)) + 1)) if are_classes else ()
    _check_pair("train", inputs, labels, classes)

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
        _check_pair("test", test.inputs, test.labels, classes)
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
    examples = len(dataset.train.inputs)
    held_out = round(share * examples)
    if not (0 < share < 1 and 0 < held_out < examples):
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
    inputs = dataset.train.inputs.astype(np.float64)
    deviation = inputs.std(axis=0, keepdims=True)
    scale = np.where(deviation > 0, 1 / np.where(deviation > 0, deviation, 1), 0)
    note = "Every feature is standardized by the training split's mean and deviation before it reaches the model."
    return replace(
        dataset,
        shift=inputs.mean(axis=0, keepdims=True).astype(np.float32),
        scale=scale.astype(np.float32),
        notes=(*dataset.notes, note),
    )


def _split_off_test(split: Split) -> tuple[Split, Split]:
    """Moves a random fifth of the examples, always the same ones, into a test split."""
    order = np.random.default_rng(0).permutation(len(split.inputs))
    test = max(1, round(TEST_FRACTION * len(order)))
    train_rows, test_rows = np.sort(order[test:]), np.sort(order[:test])
    return _rows(split, train_rows), _rows(split, test_rows)


def _rows(split: Split, rows: np.ndarray) -> Split:
    return Split(split.inputs[rows], split.labels[rows])


def _checked_inputs(option: str, inputs: np.ndarray) -> np.ndarray:
    inputs = np.asarray(inputs)
    if inputs.ndim < 2:
        raise InputError(option, f"must have the shape [examples, ...], got {inputs.shape}.")
    if len(inputs) == 0:
        raise InputError(option, f"must hold at least one example, got the shape {inputs.shape}.")
    if inputs.dtype == np.uint8:
        return inputs
    if not (np.issubdtype(inputs.dtype, np.number) or inputs.dtype == np.bool_) or np.iscomplexobj(inputs):
        raise InputError(option, f"must hold real numbers, got the type {inputs.dtype}.")
    if np.issubdtype(inputs.dtype, np.integer):
        return _as_int32(option, inputs)
    with np.errstate(over="ignore"):  # what does not fit in float32 becomes infinite, and is refused as such
        inputs = inputs.astype(np.float32)
    if not np.isfinite(inputs).all():
        where = ", ".join(str(i) for i in np.argwhere(~np.isfinite(inputs))[0])
        raise InputError(
            option,
            f"must be finite in float32, got NaN or infinity at [{where}]; remove or fill in such examples.",
        )
    return inputs


def _checked_labels(option: str, labels: np.ndarray) -> np.ndarray:
    labels = np.asarray(labels)
    if labels.dtype == np.bool_ or np.issubdtype(labels.dtype, np.integer):
        if labels.ndim != 1 and prod(labels.shape[1:]) == 1:
            raise InputError(option, f"must have the shape [examples], got {labels.shape}.")
        return _as_int32(option, labels)
    if np.issubdtype(labels.dtype, np.floating):
        if not np.isfinite(labels).all():
            raise InputError(option, "must be finite, got NaN or infinity; remove or fill in such examples.")
        return labels.astype(np.float32)
    raise InputError(option, f"must hold integers from 0, or real-valued targets, got the type {labels.dtype}.")


def _check_pair(split: str, inputs: np.ndarray, labels: np.ndarray, classes: tuple[str, ...]) -> None:
    if len(inputs) != len(labels):
        raise InputError(
            f"y_{split}", f"must have one label for each of the {len(inputs):,} examples, got {len(labels):,} labels."
        )
    if not classes:
        return
    if labels.min() < 0:
        place = np.unravel_index(np.argmin(labels), labels.shape)
        raise InputError(f"y_{split}", f"must count the classes from 0, got {labels[place]} for example {place[0]}.")
    outside = labels >= len(classes)
    if outside.any():
        place = tuple(np.argwhere(outside)[0])
        raise InputError(
            f"y_{split}",
            f"must lie from 0 to {len(classes) - 1}, one for each of the {len(classes)} classes, "
            f"got {labels[place]} for example {place[0]}.",
        )


def _as_int32(option: str, integers: np.ndarray) -> np.ndarray:
    for value in (integers.min(initial=0), integers.max(initial=0)):
        if not np.iinfo(np.int32).min <= int(value) <= np.iinfo(np.int32).max:
            raise InputError(option, f"must fit in int32, got {value}; convert measurements to floating point.")
    return integers.astype(np.int32)
