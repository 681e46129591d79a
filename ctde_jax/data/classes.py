"""Labels as classes: class names of text and integers, and checks for labels that are measurements.

A *note* is a sentence in the notes of a data set, for the user.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np

from ctde_jax.bundle import are_numbers, finder, number_of
from ctde_jax.data.disk import DiskArray
from ctde_jax.errors import InputError, check_known

Use = Literal["auto", "classification", "multilabel", "regression"]
"""Use of the labels of a file: as classes, as several labels of 0 or 1, or as targets.

`auto` is classification, but refuses numbers that look like measurements.
"""

# Ways out that several sentences name.
CLASSIFY = "pass task='classification' (--task classification)"
REGRESS = "pass task='regression' (--task regression) to predict them"

CLASSES = 2**16
"""Integer labels must be below this number, or below the number of labels.

Each number up to the largest label is the name of a class.
"""

FEW_CLASSES = 5
"""Integer labels with at most this many distinct values are classes, however few examples exist."""

MANY_CLASSES = 20
"""A note is added if integers result in more classes than this, as they may be measurements."""

_NAMED = 10
"""Maximum number of classes that a sentence names."""


def from_words(words: Sequence[str]) -> tuple[tuple[str, ...], np.ndarray]:
    """Finds the classes of labels that are written as text, in sorted order.

    If all labels are finite numbers, they are sorted as numbers, and two spellings of one number
    ("9" and "9.0") are one class. If one has a leading zero, such as "007", all are sorted as text.

    Returns:
        The class names, each in its first spelling, and the class index of each label,
        `int32[examples]`.
    """
    keys = _keys(words)
    # In reverse, so that the first spelling of a key is the one that stays.
    spelled = dict(zip(reversed(keys), reversed(words), strict=True))
    ordered = sorted(spelled)
    place = {key: number for number, key in enumerate(ordered)}
    return tuple(spelled[key] for key in ordered), np.array([place[key] for key in keys], np.int32)


def look_up(option: str, words: np.ndarray, classes: Sequence[str]) -> np.ndarray:
    """Returns the class index of each label, `int32[examples]`.

    Args:
        option: Name of the argument in error messages.
        words: Labels, `str[examples]`.
        classes: Class names.

    Raises:
        InputError: If the labels are not text, or a label is not the name of a class.
    """
    if words.ndim != 1 or words.dtype.kind != "U":
        raise InputError(
            option,
            f"must contain class names of the shape [examples], got {words.dtype} of the shape "
            f"{words.shape}.",
        )
    labels = list(map(finder(classes), words.tolist()))
    # `check_known` raises for the first unknown word, with the nearest names.
    if None in labels:
        check_known(option, words.tolist()[labels.index(None)], classes)
    return np.array(labels, np.int32)


def numbered(labels: np.ndarray | DiskArray, option: str = "y_train") -> tuple[str, ...]:
    """Returns class names for integer labels: the numbers from 0 to the largest label.

    Args:
        labels: Labels or targets, `[examples, ...]`.
        option: Name of the argument in error messages.

    Returns:
        The names; empty if the labels are on disk or not `int32[examples]`.

    Raises:
        InputError: If the labels are too large, or too many and too far apart, to be class numbers.
    """
    if isinstance(labels, DiskArray) or labels.dtype != np.int32 or labels.ndim != 1:
        return ()
    # Every number up to the largest gets a name, so a single large label would fill the memory.
    largest = int(labels.max(initial=0))
    if largest >= max(CLASSES, len(labels)):
        raise InputError(
            option,
            f"must be class indices from 0, got {largest} for example {labels.argmax()}, but "
            f"there are only {len(labels):,} labels; number the classes without gaps.",
        )
    # Gaps alone are allowed: a class may lack examples.
    different = len(np.unique(labels))
    if largest + 1 > 2 * different and may_be_measurements(labels.tolist()):
        raise InputError(
            option,
            f"must be class indices from 0, got {different:,} distinct integers up to "
            f"{largest:,} for {len(labels):,} examples, which look like measurements; number the "
            "classes without gaps, or pass measurements as floats with task='regression'.",
        )
    return tuple(str(i) for i in range(largest + 1))


def may_be_measurements(labels: Sequence[float]) -> bool:
    """Returns whether integer labels are probably measurements, such as prices, and not classes.

    They are if there are more than `FEW_CLASSES` distinct ones, with fewer than three examples each
    on average, or fewer than two if the integers are consecutive, as class indices are.
    """
    different = set(labels)
    if len(different) <= FEW_CLASSES:
        return False
    is_consecutive = max(different) - min(different) == len(different) - 1
    return len(labels) < (2 if is_consecutive else 3) * len(different)


def note_on_numbers(different: int, place: str) -> list[str]:
    """Returns a note that integers are used as classes, or [] for at most `MANY_CLASSES` classes.

    Args:
        different: Number of distinct labels.
        place: Location of the labels in the note, such as "y_train".
    """
    if different <= MANY_CLASSES:
        return []
    return [
        f"The {different:,} distinct integers in {place} are used as classes; if they are "
        "measurements, pass --task regression, or in Python floats and task='regression'."
    ]


def notes_on_classes(
    classes: Sequence[str], train: np.ndarray, test: np.ndarray, is_numbered: bool
) -> list[str]:
    """Returns notes on classes without examples, and on classes that occur only in the test split.

    Args:
        classes: Class names.
        train: Training labels, `int32[examples]`.
        test: Test labels, `int32[examples]`.
        is_numbered: Whether the classes are the numbers up to the largest label; only then is there
            a note on classes without any example.
    """
    # Which classes have examples, `bool[classes]`.
    in_train, in_test = (
        np.bincount(labels, minlength=len(classes)) > 0 for labels in (train, test)
    )

    notes = []
    gaps = np.flatnonzero(~in_train & ~in_test)
    unseen = np.flatnonzero(~in_train & in_test)
    if is_numbered and len(gaps):
        notes.append(
            f"No example has the label {_list(classes, gaps)}, although classes range from 0 to "
            f"{len(classes) - 1}."
        )
    if len(unseen):
        notes.append(
            f"The test split has examples of the classes {_list(classes, unseen)}, but the "
            "training split has none."
        )
    return notes


def is_one_hot(labels: np.ndarray | DiskArray) -> bool:
    """Returns whether the first 4,096 labels are one-hot, `[examples, classes]`."""
    if labels.ndim != 2 or labels.shape[1] < 2:
        return False
    # The first rows are enough for a hint in an error message.
    some = np.asarray(labels[:4096])
    return bool(((some == 0) | (some == 1)).all() and (some.sum(axis=1) == 1).all())


def _keys(words: Sequence[str]) -> list:
    # Numbers are sorted by value, so that 10 comes after 9.
    return [number_of(word) for word in words] if are_numbers(words) else list(words)


def _list(names: Sequence[str], places: np.ndarray) -> str:
    more = f" and {len(places) - _NAMED:,} more" if len(places) > _NAMED else ""
    return ", ".join([names[int(place)] for place in places[:_NAMED]]) + more
