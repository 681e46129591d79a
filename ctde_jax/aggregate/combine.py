"""Rules by which the owner of a slice combines all messages; robust rules are in `robust.py`."""

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

from jax import numpy as jnp
from jaxtyping import Array, Float32

from ctde_jax.devices import PyTree

Rows: TypeAlias = Float32[Array, "replicas size"]
"""The messages of all replicas for one slice."""


class Combine(NamedTuple):
    """A rule that combines the messages of all replicas, slice by slice.

    `two_phase` cuts messages into slices and runs the rule on the owner of each slice, whose rows
    are the slices of all messages. A sum over whole messages is therefore a `psum` over the owners.

    Examples:
        >>> def update(rows, weights, state):
        ...     return rows.max(axis=0), state
        >>> largest = ctde.aggregate.Combine(init=lambda size: (), update=update)
        >>> strategy = ctde.Strategy(reduce=ctde.aggregate.two_phase(combine=largest))
    """

    init: Callable[[int], PyTree]
    """`init(size) -> state` for a slice of `size` elements.

    Raises InputError if there are too few replicas for the rule.
    """

    update: Callable[
        [Float32[Array, "replicas size"], Float32[Array, " replicas"], PyTree],
        tuple[Float32[Array, " size"], PyTree],
    ]
    """`update(rows, weights, state) -> (combined, state)`"""

    weighted: bool = False
    """Whether the rule uses the weights and ignores rows with weight 0; else all rows are equal."""


def average() -> Combine:
    """Computes the weighted mean of the rows.

    Rows with weight 0 are ignored, even if they hold NaN. If all weights are 0, the mean is 0.

    Examples:
        >>> rule = ctde.aggregate.average()
        >>> rows = np.array([[1, 2], [3, 6], [np.nan, 0]], np.float32)
        >>> combined, _ = rule.update(rows, np.array([1, 1, 0], np.float32), ())
        >>> combined
        Array([2., 4.], dtype=float32)
    """

    def update(
        rows: Rows, weights: Float32[Array, " replicas"], state: PyTree
    ) -> tuple[Float32[Array, " size"], PyTree]:
        # The rows are masked too, since 0 times NaN is NaN.
        shares = weights / jnp.where(weights.sum() > 0, weights.sum(), 1)
        return shares @ jnp.where(weights[:, None] > 0, rows, 0), state

    return Combine(lambda size: (), update, weighted=True)
