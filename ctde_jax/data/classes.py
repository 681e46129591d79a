"""Labels as classes: names for words and numbers, and which numbers cannot be classes."""

from collections.abc import Sequence

import numpy as np

from ctde_jax.bundle import are_numbers, finder, number_of
from ctde_jax.data.disk import DiskArray
from ctde_jax.errors import InputError, check_known

CLASSES = 2**16
"""The largest number of numbered classes, unless there are more labels than that; each class gets a name."""

FEW_CLASSES = 5
"""So few different labels are classes, however few examples there are."""

MANY_CLASSES = 20
"""A note is written on whole numbers that are taken as more classes than this: they may be measurements."""

_NAMED = 10
"""Classes that a sentence names at most."""


def from_words(words: Sequence[str]) -> tuple[tuple[str, ...], np.ndarray]:
    """Names the classes of labels that are written as text, in sorted order.

    If all of them are finite numbers, they are sorted as numbers, and two spellings of one number ("9" and "9.0") are
    one class. Codes such as "007" are words.

    Returns:
        The names, each as it is spelled first, and the class of each word, `int32[examples]`.
    """
    keys = _keys(words)
    spelled = dict(zip(reversed(keys), reversed(words), strict=True))
    ordered = sorted(spelled)
    place = {key: number for number, key in enumerate(ordered)}
    return tuple(spelled[key] for key in ordered), np.array([place[key] for key in keys], np.int32)


def look_up(option: str, words: np.ndarray, classes: Sequence[str]) -> np.ndarray:
    """Returns the class of each word, `int32[examples]`.

    Raises:
        InputError: The labels are no words, or one is not the name of a class.
    """
    if words.ndim != 1 or words.dtype.kind != "U":
        raise InputError(
            option,
            f"must hold names of classes in the shape [examples], got {words.dtype} of the shape {words.shape}.",
        )
    labels = list(map(finder(classes), words.tolist()))
    if None in labels:
        check_known(option, words.tolist()[labels.index(None)], classes)
    return np.array(labels, np.int32)


def numbered(labels: np.ndarray | DiskArray, option: str = "y_train") -> tuple[str, ...]:
    """Names the classes from 0 to the largest label, or returns none if labels are not `int32[examples]`.

    Raises:
        InputError: The labels are too large, or too many and too far apart, to be numbers of classes.
    """
    if isinstance(labels, DiskArray) or labels.dtype != np.int32 or labels.ndim != 1:
        return ()
    largest = int(labels.max(initial=0))
    if largest >= max(CLASSES, len(labels)):
        raise InputError(
            option,
            f"must count the classes from 0, got {largest} for example {labels.argmax()}, and there are only "
            f"{len(labels):,} labels; number the classes without gaps.",
        )
    different = len(np.unique(labels))
    if largest + 1 > 2 * different and look_measured(labels.tolist()):
        raise InputError(
            option,
            f"must count the classes from 0, got {different:,} different numbers up to {largest:,} for {len(labels):,} "
            "examples, which look like measurements; number the classes without gaps, or pass measurements as floats "
            "with a task of your own.",
        )
    return tuple(str(i) for i in range(largest + 1))


def look_measured(labels: Sequence[float]) -> bool:
    """Returns whether whole numbers look like measurements, such as prices, and not like classes.

    That is if there are more than `FEW_CLASSES` different ones with fewer than three examples each on average, or with
    fewer than two if they are consecutive, as numbers of classes are.
    """
    different = set(labels)
    if len(different) <= FEW_CLASSES:
        return False
    is_consecutive = max(different) - min(different) == len(different) - 1
    return len(labels) < (2 if is_consecutive else 3) * len(different)


def note_on_numbers(different: int, place: str) -> list[str]:
    """Returns a sentence on many whole numbers that are taken as classes, and none on few.

    Args:
        different: How many different numbers there are.
        place: Where they are, as the sentence names it.
    """
    if different <= MANY_CLASSES:
        return []
    return [
        f"The {different:,} different whole numbers in {place} are taken as classes; if they are measurements, pass "
        "them as floats to data.from_arrays, with a Task of your own."
    ]


def notes_on_classes(
    classes: Sequence[str], train: np.ndarray, test: np.ndarray, is_numbered: bool
) -> list[str]:
    """Returns a sentence on classes without any example, and one on classes that only the test split has.

    Args:
        classes: Their names.
        train: `int32[examples]`
        test: `int32[examples]`
        is_numbered: Whether the classes are all numbers up to the largest label, so that some may be gaps.
    """
    in_train, in_test = (
        np.bincount(labels, minlength=len(classes)) > 0 for labels in (train, test)
    )
    notes, gaps, unseen = (
        [],
        np.flatnonzero(~in_train & ~in_test),
        np.flatnonzero(~in_train & in_test),
    )
    if is_numbered and len(gaps):
        notes.append(
            f"No example has the label {_list(classes, gaps)}, of the classes from 0 to {len(classes) - 1}."
        )
    if len(unseen):
        notes.append(
            f"The test split has examples of the classes {_list(classes, unseen)}, and the training split has none."
        )
    return notes


def is_one_hot(labels: np.ndarray | DiskArray) -> bool:
    """Returns whether labels are rows of zeros with a single one."""
    if labels.ndim != 2 or labels.shape[1] < 2:
        return False
    some = np.asarray(labels[:4096])
    return bool(((some == 0) | (some == 1)).all() and (some.sum(axis=1) == 1).all())


def _keys(words: Sequence[str]) -> list:
    return [number_of(word) for word in words] if are_numbers(words) else list(words)


def _list(names: Sequence[str], places: np.ndarray) -> str:
    more = f" and {len(places) - _NAMED:,} more" if len(places) > _NAMED else ""
    return ", ".join([names[int(place)] for place in places[:_NAMED]]) + more
