"""A strategy says when replicas talk, what they send, and what the center does with it."""

from dataclasses import dataclass

import optax

from ctde_jax.aggregate.mean import mean
from ctde_jax.aggregate.reducer import IndependentReducer
from ctde_jax.aggregate.transformations import adapted
from ctde_jax.errors import InputError, check_at_least

AVERAGE = optax.sgd(1.0)
"""The outer optimizer that makes the shared parameters the average of the replicas' own."""

UNCHANGED = optax.identity()

MEAN = mean()


@dataclass(frozen=True)
class Strategy:
    """One composition for every way to agree.

    With `inner_steps = 0` the message is the gradient of every step: `gradient -> reduce -> optimizer`. With
    `inner_steps = H` every replica takes H optimizer steps alone, and the message is the outer gradient, the shared
    parameters minus its own: `H local steps -> outer gradient -> reduce -> outer`.
    """

    inner_steps: int = 0
    """Optimizer steps that a replica takes alone between two aggregations; 0 aggregates every gradient."""

    reduce: optax.GradientTransformation = MEAN
    """Turns a replica's message into the agreed one; see `reducer.py`."""

    outer: optax.GradientTransformation = AVERAGE
    """The center's optimizer, applied to the agreed outer gradient where there are inner steps."""

    inner: optax.GradientTransformation = UNCHANGED
    """What a replica does to its own gradients before the optimizer of its inner steps.

    Its `update` is also given `anchor`, the parameters with which the round began.
    """

    synchronous_steps: int = 0
    """Steps at the start of a run at which the gradients are averaged, before this strategy's rounds begin; whole
    rounds of them."""

    diverges: bool = False
    """Whether every replica keeps parameters of its own; what is evaluated and returned is their mean."""

    exact: bool = False
    """Whether a training has the same bits on 1, 2, 4 and 8 fake CPU devices: a batch is cut into 8 shards, and every
    replica sums all their gradients in the same order; see `rounds/exact.py`. Needs the default reducer."""

    def __post_init__(self):
        check_at_least(0, inner_steps=self.inner_steps, synchronous_steps=self.synchronous_steps)
        if self.exact and self.inner_steps:
            raise InputError("exact", f"requires inner_steps=0, got {self.inner_steps}.")
        if self.exact and self.reduce is not MEAN:
            raise InputError(
                "exact", "must be left out with another reducer, as it sums gradients itself."
            )
        if self.inner_steps == 0:
            self._needs_inner_steps(
                "outer", self.outer is not AVERAGE, "where the optimizer is the center's own"
            )
            self._needs_inner_steps(
                "inner", self.inner is not UNCHANGED, "where no step is a replica's own"
            )
            self._needs_inner_steps(
                "synchronous_steps", self.synchronous_steps > 0, "where every step is synchronous"
            )
            self._needs_inner_steps("diverges", self.diverges, "where no step is a replica's own")
        elif self.synchronous_steps % self.inner_steps:
            rule = f"must be a multiple of the {self.inner_steps} inner steps of a round"
            raise InputError("synchronous_steps", f"{rule}, got {self.synchronous_steps}.")

    @property
    def is_independent(self) -> bool:
        """Whether the reducer judges each message by itself."""
        return isinstance(self.reduce, IndependentReducer)

    def local(
        self, optimizer: optax.GradientTransformation
    ) -> optax.GradientTransformationExtraArgs:
        """Returns the optimizer of a replica's steps: `inner`, and then the run's, both adapted to a training step."""
        return optax.with_extra_args_support(optax.chain(adapted(self.inner), adapted(optimizer)))

    def _needs_inner_steps(self, part: str, given: bool, reason: str) -> None:
        if given:
            raise InputError(part, f"needs inner_steps of at least 1, got 0, {reason}.")
