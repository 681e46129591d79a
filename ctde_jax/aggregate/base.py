"""A strategy determines when replicas communicate, what they send and how the result is applied."""

from dataclasses import dataclass

import optax

from ctde_jax.aggregate.mean import MEAN
from ctde_jax.aggregate.reducer import IndependentReducer
from ctde_jax.aggregate.transformations import adapted
from ctde_jax.errors import InputError, check_at_least

AVERAGE = optax.sgd(1.0)
"""Outer optimizer that sets the shared parameters to the average of the replicas' parameters."""

UNCHANGED = optax.identity()
"""Default `Strategy.inner`, which does not change the gradients."""


@dataclass(frozen=True)
class Strategy:
    """When replicas communicate, what they send, and how the result is applied.

    A *message* is the pytree that a replica sends, with the shapes of the parameters. With
    `inner_steps = 0`, it is the gradient of every step: `gradient -> reduce -> optimizer`. With
    `inner_steps = H`, each replica takes H optimizer steps without communication, and the message
    is the outer gradient, the shared parameters minus those of the replica:
    `H local steps -> outer gradient -> reduce -> outer`.

    Raises:
        InputError: `inner_steps` or `synchronous_steps` is negative, `synchronous_steps` is not a
            multiple of `inner_steps`, `exact` is combined with inner steps or another reducer, or
            an argument that needs inner steps is given without them.

    Examples:
        >>> gradients = ctde.Strategy()
        >>> local_sgd = ctde.Strategy(inner_steps=8)
        >>> outer = optax.sgd(0.7, momentum=0.9, nesterov=True)
        >>> diloco = ctde.Strategy(inner_steps=32, outer=outer)
    """

    inner_steps: int = 0
    """Local optimizer steps between two aggregations; 0 aggregates the gradient of every step."""

    reduce: optax.GradientTransformation = MEAN
    """Reducer that combines the messages of all replicas; see `reducer.py`."""

    outer: optax.GradientTransformation = AVERAGE
    """Outer optimizer, applied to the reduced outer gradient if there are inner steps."""

    inner: optax.GradientTransformation = UNCHANGED
    """Transformation of a replica's gradients before the optimizer of its inner steps.

    Its `update` also receives `anchor`, the parameters at the start of the round.
    """

    synchronous_steps: int = 0
    """Steps at the start of a run that average gradients, before the rounds of this strategy begin.

    They must be a multiple of `inner_steps`.
    """

    diverges: bool = False
    """Whether parameters differ between replicas after a round, as with `gossip`.

    Their mean over the replicas is then evaluated and returned.
    """

    exact: bool = False
    """Whether training computes the same bits on 1, 2, 4 and 8 fake CPU devices.

    A batch is cut into 8 shards, and every replica sums the gradients of all shards in the same
    order; see `rounds/exact.py`. Requires the default reducer.
    """

    def __post_init__(self):
        check_at_least(0, inner_steps=self.inner_steps, synchronous_steps=self.synchronous_steps)

        # Exact training computes and sums the gradients itself.
        if self.exact and self.inner_steps:
            raise InputError("exact", f"requires inner_steps=0, got {self.inner_steps}.")
        if self.exact and self.reduce is not MEAN:
            raise InputError(
                "exact", "requires the default reducer, because it sums the gradients itself."
            )

        # Options that have no effect without inner steps are rejected, not ignored.
        if self.inner_steps == 0:
            self._requires_inner_steps(
                "outer", self.outer is not AVERAGE, "the optimizer updates the shared parameters"
            )
            self._requires_inner_steps(
                "inner", self.inner is not UNCHANGED, "there are no local steps"
            )
            self._requires_inner_steps(
                "synchronous_steps", self.synchronous_steps > 0, "every step is synchronous"
            )
            self._requires_inner_steps("diverges", self.diverges, "replicas cannot diverge")
        elif self.synchronous_steps % self.inner_steps:
            rule = f"must be a multiple of the {self.inner_steps} inner steps of a round"
            raise InputError("synchronous_steps", f"{rule}, got {self.synchronous_steps}.")

    @property
    def is_independent(self) -> bool:
        """Whether the reducer is an `IndependentReducer`."""
        return isinstance(self.reduce, IndependentReducer)

    def local(
        self, optimizer: optax.GradientTransformation
    ) -> optax.GradientTransformationExtraArgs:
        """Returns the optimizer of a replica's steps: `inner`, followed by `optimizer`.

        Both accept any extra arguments; see `transformations.adapted`.
        """
        return optax.with_extra_args_support(optax.chain(adapted(self.inner), adapted(optimizer)))

    def _requires_inner_steps(self, part: str, given: bool, reason: str) -> None:
        if given:
            raise InputError(
                part, f"requires inner_steps of at least 1; with inner_steps=0, {reason}."
            )
