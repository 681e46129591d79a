"""Which arrays a trained model takes: those of the kind, the shape and the range that it was trained on."""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from ctde_jax.errors import InputError


class Accepted(NamedTuple):
    """Arrays `[examples, ...]` like those of the data set: inputs, or labels."""

    dtype: str
    shape: tuple[int | None, ...]  # of one example; None is any length
    largest: int | None = None
    """Integers lie from 0 to this one; None is any number of the type."""

    def conform(self, option: str, values: ArrayLike) -> np.ndarray:
        """Checks values against those of the training, and returns them in the dtype of the training.

        A conversion never changes a number beyond the rounding of float64 to float32, and never the
        scale: integers are accepted in any width, floats in any precision and booleans everywhere,
        but no floats by a model of integers (which may be pixels from 0 to 255) and no integers by a
        model of floats (which may be pixels from 0 to 1). In a list, integers may stand for floats.

        Args:
            option: The name of the values in a refusal.
            values: `[examples, *shape]`, boolean, integer or float; there may be 0 examples.

        Returns:
            Contiguous array `[examples, *shape]` of `dtype`.

        Raises:
            InputError: The shape, the dtype or the range differs, or a number is NaN or infinite.
        """
        array, dtype = np.asarray(values), np.dtype(self.dtype)
        is_list = not hasattr(values, "dtype")
        if is_list and array.shape == (0,):  # an empty list has no shape
            return np.zeros((0, *(length or 1 for length in self.shape)), dtype)
        lengths = (
            own if wanted is None else wanted
            for wanted, own in zip(self.shape, array.shape[1:], strict=False)
        )
        if array.ndim != len(self.shape) + 1 or array.shape[1:] != tuple(lengths):
            shape = str(list(self.shape)).replace("None", "length")
            is_one = len(array.shape) == len(self.shape) and all(
                wanted in (None, own) for wanted, own in zip(self.shape, array.shape, strict=True)
            )
            way_out = "; add an axis to a single example: x[None]" if is_one else ""
            raise InputError(
                option,
                f"must be examples of the shape {shape}, got the shape {list(array.shape)}{way_out}.",
            )
        kinds = "biu" if dtype.kind != "f" else "bfiu" if is_list else "bf"
        if array.dtype.kind not in kinds:
            kind = "floats" if dtype.kind == "f" else "integers"
            way_out = f"bring them to the scale of the training and convert them with .astype({str(dtype)!r})"
            raise InputError(
                option,
                f"must be {kind}, as the model was trained on {dtype}, got {array.dtype}; {way_out}.",
            )
        if not array.size:
            return np.zeros(array.shape, dtype)
        if dtype.kind == "f":
            with np.errstate(
                over="ignore"
            ):  # float64 beyond float32 becomes infinite, and is refused
                converted = np.ascontiguousarray(array, dtype)
            if not np.isfinite(converted).all():
                raise InputError(
                    option,
                    f"must be finite in {dtype}, got NaN or infinity; remove or fill in such examples.",
                )
            return converted
        low, high = (
            (np.iinfo(dtype).min, np.iinfo(dtype).max)
            if self.largest is None
            else (0, self.largest)
        )
        least, most = int(array.min()), int(array.max())
        if not low <= least <= most <= high:
            raise InputError(
                option,
                f"must be from {low} to {high}, as in training, got numbers from {least} to {most}.",
            )
        return np.ascontiguousarray(array, dtype)
