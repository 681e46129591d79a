"""Which arrays a trained model takes: those of the type, the shape and the range that it was trained on."""

from typing import NamedTuple

import numpy as np

from ctde_jax.errors import InputError


class Accepted(NamedTuple):
    """Arrays `[examples, ...]` like those of the data set: inputs, or labels."""

    dtype: str
    shape: tuple[int | None, ...]  # of one example; None is any length
    largest: int | None = None
    """The numbers lie from 0 to this one; None is any number of the type."""

    def check(self, option: str, array: np.ndarray) -> None:
        """Raises InputError for an array of another type, shape or range."""
        lengths = [own if wanted is None else wanted for own, wanted in zip(array.shape[1:], self.shape, strict=False)]
        has_shape = array.ndim == 1 + len(self.shape) and [*array.shape[1:]] == lengths
        if not has_shape or array.dtype != self.dtype:
            shape = str(list(self.shape)).replace("None", "length")
            way_out = "" if array.dtype == self.dtype else "; scale and convert them as the training data were"
            raise InputError(
                option,
                f"must be {self.dtype}, examples of the shape {shape}, got {array.dtype} of the shape "
                f"{list(array.shape[1:])}{way_out}.",
            )
        if self.largest is not None and array.size and not (array.min() >= 0 and array.max() <= self.largest):
            raise InputError(
                option, f"must lie from 0 to {self.largest}, as in training, got {array.min()} to {array.max()}."
            )
