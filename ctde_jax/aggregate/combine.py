"""Rules by which the owner of a slice combines all messages; robust rules are in `robust.py`."""

from collections.abc import Callable
from typing import NamedTuple

import jax
from jax import numpy as jnp

from ctde_jax.devices import PyTree


class Combine(NamedTuple):
    """A rule that combines rows of messages.

    It runs on a replica, which owns one slice, so a sum over whole messages is a `psum` over
    slices.
    """

    init: Callable[[int], PyTree]
    """`init(size) -> state` for a slice of `size` numbers.

    Raises InputError if there are too few replicas for the rule.
    """

    update: Callable[[jax.Array, jax.Array, PyTree], tuple[jax.Array, PyTree]]
    """`update(rows, weights, state) -> (combined, state)`

    `rows` is float32[replica, size], `weights` is float32[replica], and `combined` is
    float32[size].
    """

    weighted: bool = False
    """Whether rows with weight 0 are ignored; if False, every row counts once."""


def average() -> Combine:
    """Computes the weighted mean of the rows.

    Rows with weight 0 are ignored, even if they hold NaN. If all weights are 0, the mean is 0.
    """

    def update(rows: jax.Array, weights: jax.Array, state: PyTree) -> tuple[jax.Array, PyTree]:
        # The rows are masked too, since a share of 0 times NaN is NaN.
        shares = weights / jnp.where(weights.sum() > 0, weights.sum(), 1)
        return shares @ jnp.where(weights[:, None] > 0, rows, 0), state

    return Combine(lambda size: (), update, weighted=True)
