"""The inputs that a trained model accepts: one rule for bundles and for the trained model itself."""

from collections.abc import Sequence
from math import prod

import numpy as np
from numpy.typing import ArrayLike

from ctde_jax.errors import InputError


def conform(
    inputs: ArrayLike,
    shape: Sequence[int],
    dtype: str | np.dtype,
    highest: int = 255,
    vocabulary_size: int = 0,
) -> np.ndarray:
    """Checks raw inputs against those that the model was trained on, and returns them in the model's dtype.

    A conversion never changes a number beyond the rounding of float64 to float32, and never the scale: integers are
    accepted in any width, floats in any precision and booleans everywhere, but no floats by a model of integers (which
    may be pixels from 0 to 255) and no integers by a model of floats (which may be pixels from 0 to 1).

    Args:
        inputs: `[examples, *shape]`, boolean, integer or float; there may be 0 examples.
        shape: Shape of one example.
        dtype: Of the training inputs as the data set stores them: uint8, int32 or float32.
        highest: Largest value of uint8 inputs, which reaches the model as 1.
        vocabulary_size: Number of tokens, if inputs are tokens; 0 otherwise.

    Returns:
        Contiguous array `[examples, *shape]` of `dtype`.

    Raises:
        InputError: The shape, the dtype or the range differs, or a number is NaN or infinite.
    """
    array, shape, dtype = np.asarray(inputs), tuple(shape), np.dtype(dtype)
    if array.ndim != len(shape) + 1 or array.shape[1:] != shape:
        raise _refusal(f"examples of the shape {list(shape)}", f"the shape {list(array.shape)}")
    if array.dtype.kind not in ("bf" if dtype.kind == "f" else "biu"):
        kind = "floats" if dtype.kind == "f" else "integers"
        way_out = f"bring them to the scale of the training inputs and convert them with .astype({str(dtype)!r})"
        raise _refusal(f"{kind}, as the model was trained on {dtype}", f"{array.dtype}; {way_out}")
    if not prod(array.shape):
        return np.zeros(array.shape, dtype)
    if dtype.kind == "f":
        with np.errstate(over="ignore"):  # float64 beyond float32 becomes infinite, and is refused
            converted = np.ascontiguousarray(array, dtype)
        if not np.isfinite(converted).all():
            raise _refusal(f"finite in {dtype}", "NaN or infinity; remove or fill in such examples")
        return converted
    low, high = int(np.iinfo(dtype).min), int(np.iinfo(dtype).max)
    if vocabulary_size:
        low, high = 0, vocabulary_size - 1
    elif dtype == np.uint8:
        high = highest
    least, most = int(array.min()), int(array.max())
    if not low <= least <= most <= high:
        raise _refusal(f"from {low} to {high}, as in training", f"numbers from {least} to {most}")
    return np.ascontiguousarray(array, dtype)


def _refusal(rule: str, got: str) -> InputError:
    return InputError("inputs", f"must be {rule}, got {got}.")
