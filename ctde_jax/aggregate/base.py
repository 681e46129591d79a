"""A strategy says when replicas talk, what they send, and what the center does with it."""

from dataclasses import dataclass, field

import optax

from ctde_jax.aggregate.mean import mean
from ctde_jax.errors import InputError, check_at_least

AVERAGE = optax.sgd(1.0)
"""The outer optimizer that makes the shared parameters the average of the replicas' own."""


@dataclass(frozen=True)
class Strategy:
    """One composition for every way to agree.

    With `inner_steps = 0` the message is the gradient of every step: `gradient -> reduce -> optimizer`. With
    `inner_steps = H` every replica takes H optimizer steps alone, and the message is the outer gradient, the shared
    parameters minus its own: `H local steps -> outer gradient -> reduce -> outer`.
    """

    inner_steps: int = 0
    """Optimizer steps that a replica takes alone between two aggregations; 0 aggregates every gradient."""

    reduce: optax.GradientTransformation = field(default_factory=mean)
    """Turns a replica's message into the agreed one by collectives over `replica.AXIS`.

    Its `update` is also given `weight`, float32[]: the number of examples behind this replica's message. Its state is
    each replica's own.
    """

    outer: optax.GradientTransformation = AVERAGE
    """The center's optimizer, applied to the agreed outer gradient where there are inner steps."""

    def __post_init__(self):
        check_at_least(0, inner_steps=self.inner_steps)
        if self.inner_steps == 0 and self.outer is not AVERAGE:
            raise InputError(
                "outer", "needs inner_steps of at least 1, got 0, where the optimizer is the center's own."
            )
