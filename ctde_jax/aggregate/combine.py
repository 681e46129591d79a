"""How the owner of a slice makes one message of everybody's: the average here, the robust rules in `robust.py`."""

from collections.abc import Callable
from typing import NamedTuple

import jax
from jax import numpy as jnp

from ctde_jax.devices import PyTree


class Combine(NamedTuple):
    """A rule for rows of messages. It runs on a replica, so a sum over whole messages is a `psum` over the slices."""

    init: Callable[[int], PyTree]
    """`init(size) -> state`, for a slice of so many numbers.

    Raises InputError where there are too few replicas for the rule.
    """

    update: Callable[[jax.Array, jax.Array, PyTree], tuple[jax.Array, PyTree]]
    """`update(rows float32[replica, size], weights float32[replica], state) -> (float32[size], state)`"""

    weighted: bool = False
    """Whether a row without weight is not heard; otherwise every row counts once."""


def average() -> Combine:
    """Averages the rows by their weights; a row without weight does not count, not even with a NaN."""

    def update(rows: jax.Array, weights: jax.Array, state: PyTree) -> tuple[jax.Array, PyTree]:
        shares = weights / jnp.where(weights.sum() > 0, weights.sum(), 1)
        return shares @ jnp.where(weights[:, None] > 0, rows, 0), state

    return Combine(lambda size: (), update, weighted=True)
