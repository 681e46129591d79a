"""Validates the user's arrays, of any library and dtype, and converts them to training dtypes."""

from collections.abc import Iterator
from math import prod
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ctde_jax.data.classes import is_one_hot
from ctde_jax.data.disk import DiskArray, on_disk, slices, stays_on_disk
from ctde_jax.errors import InputError

COARSE = 0.01
"""Maximum rounding error of a feature in float32, as a fraction of its standard deviation."""

NOISE = 1e-12
"""Numbers are treated as equal up to float64 rounding if their standard deviation is at most this
fraction of their largest magnitude."""


def plain(option: str, array: ArrayLike | DiskArray) -> np.ndarray | DiskArray:
    """Converts an array of any library, or a list, to a numpy array of numbers or text.

    A memory map becomes a `DiskArray`, which stays in its file. Bytes are decoded to `str`. Python
    objects become int64, float64 or `str`, and dtypes that numpy lacks, such as bfloat16, float32.

    Args:
        option: Name of the argument in error messages.
        array: Array or list.

    Raises:
        InputError: If the array is sparse, ragged or masked, has fields or objects that are neither
            all numbers nor all text, or is a memory map that `disk.on_disk` rejects.
    """
    if isinstance(array, DiskArray):
        return array

    # numpy would wrap a sparse array as a single object, and discard a mask.
    if hasattr(array, "toarray") and not isinstance(array, np.ndarray):
        raise InputError(
            option,
            f"must be a dense array, got a sparse {type(array).__name__}; pass its .toarray().",
        )
    if isinstance(array, np.ma.MaskedArray) and np.ma.is_masked(array):
        raise InputError(
            option,
            "must not contain masked values; replace them with .filled(...).",
        )

    # Convert to a numpy array.
    try:
        found = np.asarray(array)
    except ValueError as error:  # of a ragged list
        raise InputError(
            option, "must contain examples of the same shape, got a ragged list."
        ) from error

    # In a list with text, numpy also converts the numbers to text, such as NaN; objects keep them.
    if found.dtype.kind in "SU" and not hasattr(array, "dtype"):
        found = np.asarray(array, object)

    # Convert the remaining kinds of dtypes to numbers or `str`.
    if found.dtype.names is not None:
        names = ", ".join(found.dtype.names)
        raise InputError(
            option,
            f"must be an array without fields, got the fields {names}; stack them along an axis.",
        )
    if found.dtype == object:
        found = _of_objects(option, found)
    if found.dtype.kind == "V":  # such as bfloat16
        found = _as_float32(option, found)
    if found.dtype.kind == "S":
        found = np.char.decode(found, "utf-8", "replace")
    return on_disk(option, found) if found.ndim and stays_on_disk(found) else found


def checked_inputs(option: str, inputs: ArrayLike | DiskArray) -> np.ndarray | DiskArray:
    """Validates inputs `[examples, ...]` and converts them to a dtype of training.

    uint8 is kept, other integers and booleans become int32, and floats become float32.

    Args:
        option: Name of the argument in error messages.
        inputs: Array of any library, or a list.

    Raises:
        InputError: If the inputs have rank below 2, are empty, are not real numbers, overflow int32
            or float32, contain NaN or infinity, or lose too much precision in float32; see
            `check_precision`. Also as for `plain`.
    """
    # Check the shape.
    inputs = plain(option, inputs)
    if inputs.ndim < 2:
        raise InputError(option, f"must have the shape [examples, ...], got {inputs.shape}.")
    if 0 in inputs.shape:
        raise InputError(
            option,
            "must contain at least one example with at least one feature, got the shape "
            f"{inputs.shape}.",
        )

    # Integers: uint8 stays, all others and booleans become int32.
    if inputs.dtype == np.uint8:
        return inputs
    if inputs.dtype.kind not in "biuf":
        raise InputError(option, f"must contain real numbers, got the dtype {inputs.dtype}.")
    if inputs.dtype.kind != "f":
        return _as_int32(option, inputs)

    # Floats: a number that exceeds float32 becomes infinite in the cast, and is rejected.
    with np.errstate(over="ignore", invalid="ignore"):
        for first, piece in slices(inputs):
            is_finite = np.isfinite(piece.astype(np.float32, copy=False))
            if not is_finite.all():
                row, *place = np.argwhere(~is_finite)[0]
                where = ", ".join(map(str, (first + row, *place)))
                raise InputError(
                    option,
                    f"must be finite in float32, got NaN or infinity at [{where}]; remove or "
                    "impute such examples.",
                )
    check_precision(option, inputs)
    return inputs.astype(np.float32)


def checked_labels(option: str, labels: ArrayLike | DiskArray) -> np.ndarray | DiskArray:
    """Validates labels `[examples]` or targets `[examples, ...]`, and converts them.

    Integers and booleans become int32, and floats become float32.

    Args:
        option: Name of the argument in error messages.
        labels: Array of any library, or a list.

    Raises:
        InputError: If the labels are a scalar, a column `[examples, 1]` of integers, booleans or
            text, have no element per example, are not real numbers, overflow int32, or contain NaN
            or infinity. Also as for `plain`.
    """
    # Check the shape, and reject time differences (kind `m`).
    labels = plain(option, labels)
    if labels.ndim == 0:
        raise InputError(option, f"must have the shape [examples], got {labels.shape}.")
    if 0 in labels.shape[1:] or labels.dtype.kind == "m":
        raise InputError(
            option,
            f"must contain numbers for each example, got {labels.dtype} of the shape "
            f"{labels.shape}.",
        )

    # Labels with one number per example are loaded, even if they are in a file.
    if labels.ndim == 1:
        labels = np.asarray(labels)

    # A column of labels is probably meant as `[examples]`.
    if labels.dtype.kind in "biuU" and labels.ndim != 1 and prod(labels.shape[1:]) == 1:
        raise InputError(
            option,
            f"must have the shape [examples], got {labels.shape}; flatten the labels with "
            "numpy.ravel.",
        )

    # Integers are classes or tokens, floats are targets.
    if labels.dtype.kind in "biu":
        return _as_int32(option, labels)
    if labels.dtype.kind == "f":
        for first, piece in slices(labels):
            if not np.isfinite(piece).all():
                row = first + np.argwhere(~np.isfinite(piece))[0][0]
                fault = f"got NaN or infinity for example {row}"
                raise InputError(
                    option, f"must be finite, {fault}; remove or impute such examples."
                )
        return labels.astype(np.float32)
    raise InputError(
        option,
        f"must contain integers from 0 or real-valued targets, got the dtype {labels.dtype}.",
    )


def checked_weights(option: str, weights: ArrayLike, examples: int) -> np.ndarray:
    """Validates the weights of examples, and converts them to float32.

    Args:
        option: Name of the argument in error messages.
        weights: Array of any library, or a list, `[examples]`.
        examples: Number of examples.

    Raises:
        InputError: If the weights are not one number for each example, or one is negative, NaN, or
            infinite in float32. Also as for `plain`.
    """
    found = np.asarray(plain(option, weights))
    if found.dtype.kind not in "biuf" or found.shape != (examples,):
        raise InputError(
            option,
            f"must have one number for each of the {examples:,} examples, got {found.dtype} of the "
            f"shape {list(found.shape)}.",
        )
    # A number that exceeds float32 becomes infinite in the cast.
    with np.errstate(over="ignore"):
        converted = found.astype(np.float32)
    is_valid = np.isfinite(converted) & (converted >= 0)
    if not is_valid.all():
        place = int(np.argmin(is_valid))
        raise InputError(
            option,
            f"must be finite and at least 0, got {found[place]} for example {place}.",
        )
    return converted


def check_precision(option: str, inputs: np.ndarray | DiskArray) -> None:
    """Raises InputError if float32 is too coarse for a feature, such as seconds since 1970.

    It is too coarse if the largest rounding error exceeds `COARSE` times the standard deviation of
    the feature. Features that are constant up to float64 rounding (`NOISE`) pass.

    Args:
        option: Name of the argument in error messages.
        inputs: Inputs of any numeric dtype, `[examples, ...]`.
    """
    # float32 represents float16 and integers up to 16 bits exactly.
    if inputs.dtype.itemsize <= 2 or inputs.dtype == np.float32:
        return

    # Sums are relative to the first example, so that a large mean causes no cancellation.
    origin = np.asarray(inputs[:1]).astype(np.float64)
    error, largest, total, squares = (np.zeros_like(origin) for _ in range(4))
    for piece in _in_float64(inputs):
        error = np.maximum(
            error, np.abs(piece.astype(np.float32) - piece).max(axis=0, keepdims=True)
        )
        largest = np.maximum(largest, np.abs(piece).max(axis=0, keepdims=True))
        total += (piece - origin).sum(axis=0, keepdims=True)
        squares += np.square(piece - origin).sum(axis=0, keepdims=True)
    deviation = np.sqrt(np.maximum(squares / len(inputs) - np.square(total / len(inputs)), 0))

    # A deviation below `NOISE` comes from the rounding of equal numbers.
    is_coarse = (error > COARSE * deviation) & (deviation > NOISE * largest)
    if is_coarse.any():
        _, *place = np.argwhere(is_coarse)[0]
        where = ", ".join(map(str, place))
        raise InputError(
            option,
            "must contain numbers that float32 distinguishes, got numbers around "
            f"{origin[0][tuple(place)]:.17g} with a standard deviation of "
            f"{deviation[0][tuple(place)]:.3g} at [:, {where}]; subtract their minimum in "
            "float64 first.",
        )


def targets_or_classes(labels: np.ndarray | DiskArray) -> str:
    """Returns the end of an error message about labels that are not class indices.

    It starts with "got", describes the labels, and adds the fix if they are one-hot or whole.
    """
    if is_one_hot(labels):
        return f"got one-hot labels of the shape {list(labels.shape)}; pass labels.argmax(1)"
    some = np.asarray(labels[:4096])
    if labels.ndim == 1 and labels.dtype.kind == "f" and np.array_equal(some, np.rint(some)):
        return (
            f"got whole numbers of the dtype {labels.dtype}; pass labels.astype(int) if they are "
            "classes"
        )
    return f"got labels of the dtype {labels.dtype} and the shape {list(labels.shape)}"


def _in_float64(array: np.ndarray | DiskArray) -> Iterator[np.ndarray]:
    for _, piece in slices(array):
        yield piece.astype(np.float64)


def _of_objects(option: str, objects: np.ndarray) -> np.ndarray:
    """Converts objects, such as those of a table with mixed dtypes, to text, integers or floats."""
    values: list[Any] = objects.ravel().tolist()

    # Text alone.
    is_text = [isinstance(value, str | bytes) for value in values]
    if values and all(is_text):
        texts = [
            value.decode("utf-8", "replace") if isinstance(value, bytes) else value
            for value in values
        ]
        return np.array(texts).reshape(objects.shape)

    # Text and other objects: in labels, the others are probably missing values.
    if any(is_text) and prod(objects.shape[1:]) == 1:
        place = is_text.index(False)
        raise InputError(
            option,
            f"must contain only text or only numbers, got text and {type(values[place]).__name__} "
            f"{values[place]!r:.60} at [{place}]; impute or remove such examples.",
        )

    # Numbers alone; they are integers if all of them can be an index.
    for place, value in enumerate(values):
        if isinstance(value, str | bytes) or not hasattr(value, "__float__"):
            where = ", ".join(map(str, np.unravel_index(place, objects.shape)))
            raise InputError(
                option,
                f"must contain numbers, got {type(value).__name__} {value!r:.60} at [{where}]; "
                "convert or remove it.",
            )
    is_whole = all(hasattr(value, "__index__") for value in values)
    try:
        return objects.astype(np.int64 if is_whole else np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError(option, f"must contain numbers, got other objects ({error}).") from error


def _as_float32(option: str, array: np.ndarray) -> np.ndarray:
    try:
        return array.astype(np.float32)
    except (TypeError, ValueError) as error:
        raise InputError(
            option, f"must contain real numbers, got the dtype {array.dtype}."
        ) from error


def _as_int32(option: str, integers: np.ndarray | DiskArray) -> np.ndarray | DiskArray:
    # Values are checked only if the dtype exceeds int32; `initial` is for empty pieces.
    bounds = np.iinfo(np.int32)
    stored = integers.dtype
    if stored.kind != "b" and not (
        np.iinfo(stored).min >= bounds.min and np.iinfo(stored).max <= bounds.max
    ):
        for _, piece in slices(integers):
            for value in (piece.min(initial=0), piece.max(initial=0)):
                if not bounds.min <= int(value) <= bounds.max:
                    raise InputError(
                        option,
                        f"must fit in int32, got {value}; convert measurements to floating point.",
                    )
    return integers.astype(np.int32)
