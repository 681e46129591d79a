"""Checks that arrays have the kind, shape and range that a model was trained on."""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from ctde_jax.errors import InputError


class Accepted(NamedTuple):
    """Specification of inputs or labels `[examples, ...]` that are like those of the data set."""

    dtype: str
    shape: tuple[int | None, ...]  # of one example; None accepts any length
    largest: int | None = None
    """Largest integer, with 0 as the smallest one; None accepts the whole range of the dtype."""

    def conform(self, option: str, values: ArrayLike) -> np.ndarray:
        """Checks values against the training data and converts them to its dtype.

        A conversion changes no number beyond the rounding of float64 to float32, and never the
        scale. Integers of any width, floats of any precision and booleans are accepted, but a model
        trained on integers (such as pixels from 0 to 255) accepts no floats, and a model trained on
        floats (such as pixels from 0 to 1) no integers. In a list, integers may stand for floats.

        Args:
            option: Name of the argument in error messages.
            values: Boolean, integer or float array `[examples, *shape]`, possibly of 0 examples.

        Returns:
            Contiguous array `[examples, *shape]` of `dtype`.

        Raises:
            InputError: If the shape, dtype or range differs, or a number is NaN or infinite.
        """
        # An empty list has no example shape: use length 1 for each variable one.
        array = np.asarray(values)
        dtype = np.dtype(self.dtype)
        is_list = not hasattr(values, "dtype")
        if is_list and array.shape == (0,):
            return np.zeros((0, *(length or 1 for length in self.shape)), dtype)

        # Shape: a variable length matches any; a single example is a common mistake.
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

        # Kind: a wrong one suggests another scale, so it is not converted. A list has no dtype that
        # the user has chosen.
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
