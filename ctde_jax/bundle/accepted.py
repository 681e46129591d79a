"""Validates arrays against the dtype, shape and integer range of the training data.

Valid arrays are converted to the dtype of the training data.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from ctde_jax.errors import InputError


class Accepted(NamedTuple):
    """Specification of the inputs or labels `[examples, ...]` that a trained model accepts."""

    dtype: str
    shape: tuple[int | None, ...]  # of one example; None for an axis of any length
    largest: int | None = None
    """Largest accepted integer; the smallest is then 0. None accepts the range of the dtype."""

    def conform(self, option: str, values: ArrayLike) -> np.ndarray:
        """Validates values against this specification and converts them to its dtype.

        If `dtype` is an integer dtype, integers of any width and booleans are accepted, but no
        floats. If it is float32, floats of any precision and booleans are accepted, and integers
        only in a list. Values are never rescaled: integers instead of floats suggest a different
        scale, such as pixels from 0 to 255 instead of 0 to 1, so they raise an error.

        Args:
            option: Name of the argument in error messages.
            values: Boolean, integer or float array `[examples, *shape]`, possibly of 0 examples.

        Returns:
            Contiguous array `[examples, *shape]` of `dtype`.

        Raises:
            InputError: If the values violate the specification, or a number is NaN or infinite
                after the conversion.
        """
        # An empty list has no example shape: use length 1 for each axis of any length.
        array = np.asarray(values)
        dtype = np.dtype(self.dtype)
        is_list = not hasattr(values, "dtype")
        if is_list and array.shape == (0,):
            return np.zeros((0, *(length or 1 for length in self.shape)), dtype)

        # Shape: None matches any length. Passing a single example is a common mistake.
        lengths = (
            own if wanted is None else wanted
            for wanted, own in zip(self.shape, array.shape[1:], strict=False)
        )
        if array.ndim != len(self.shape) + 1 or array.shape[1:] != tuple(lengths):
            shape = str(list(self.shape)).replace("None", "length")
            is_one = len(array.shape) == len(self.shape) and all(
                wanted in (None, own) for wanted, own in zip(self.shape, array.shape, strict=True)
            )
            way_out = "; pass a single example as x[None]" if is_one else ""
            raise InputError(
                option,
                f"must be examples of the shape {shape}, got the shape {list(array.shape)}"
                f"{way_out}.",
            )

        # Kind of the dtype: integers instead of floats, or the reverse, suggest a different scale,
        # so they are not converted. The dtype of a list was not chosen by the user.
        kinds = "biu" if dtype.kind != "f" else "bfiu" if is_list else "bf"
        if array.dtype.kind not in kinds:
            kind = "floats" if dtype.kind == "f" else "integers"
            way_out = f"scale them as in training and convert them with .astype({str(dtype)!r})"
            raise InputError(
                option,
                f"must be {kind}, as the model was trained on {dtype}, got {array.dtype}; "
                f"{way_out}.",
            )
        if not array.size:
            return np.zeros(array.shape, dtype)

        # Floats: float64 beyond the range of float32 becomes infinite, which is rejected.
        if dtype.kind == "f":
            with np.errstate(over="ignore"):
                converted = np.ascontiguousarray(array, dtype)
            if not np.isfinite(converted).all():
                raise InputError(
                    option,
                    f"must be finite in {dtype}, got NaN or infinity; remove or impute such "
                    "examples.",
                )
            return converted

        # Integers: check the range before the cast, which would wrap around.
        low, high = (
            (np.iinfo(dtype).min, np.iinfo(dtype).max)
            if self.largest is None
            else (0, self.largest)
        )
        least = int(array.min())
        most = int(array.max())
        if not low <= least <= most <= high:
            raise InputError(
                option,
                f"must be from {low} to {high}, as in training, got numbers from {least} to "
                f"{most}.",
            )
        return np.ascontiguousarray(array, dtype)
