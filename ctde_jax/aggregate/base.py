"""A strategy determines when replicas communicate, what they send and how the result is applied."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise

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

    A run may have several *phases*, each with another strategy; see `later`.

    Raises:
        InputError: `inner_steps` is negative, `exact` or `shared_batches` is combined with inner
            steps, later phases or another reducer, `per_host` is less than 1 or unsuitable for
            `diverges` or `reduce`, an argument that needs inner steps is given without them, or a
            phase of `later` cannot follow the one before it.

    Examples:
        >>> gradients = ctde.Strategy()
        >>> local_sgd = ctde.Strategy(inner_steps=8)
        >>> outer = optax.sgd(0.7, momentum=0.9, nesterov=True)
        >>> diloco = ctde.Strategy(inner_steps=32, outer=outer)
        >>> post_local_sgd = ctde.Strategy(later={64: ctde.Strategy(inner_steps=16)})
        >>> hosts_of_eight = ctde.Strategy(inner_steps=32, per_host=8)
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

    diverges: bool = False
    """Whether parameters differ between replicas after a round, as with `gossip`.

    Their mean over the replicas is then evaluated and returned.
    """

    exact: bool = False
    """Whether training computes the same bits on 1, 2, 4 and 8 fake CPU devices.

    A batch is cut into 8 shards, and every replica sums the gradients of all shards in the same
    order; see `rounds/exact.py`. Requires the default reducer.
    """

    per_host: int = 1
    """Number of consecutive replicas, such as the devices of a host, that average every gradient of
    their local steps.

    Their parameters are equal during a round, too, and they send one message together. Batch
    statistics of the local steps are those of one replica, unless all replicas are on one host.
    """

    shared_batches: bool = False
    """Whether all replicas take the same steps, on the batches of the first one, and send nothing.

    It is a common start without communication: with R replicas, a step uses 1 / R of the global
    batch. Requires the default reducer and data that are not assigned to replicas.
    """

    later: Mapping[int, "Strategy"] = field(default_factory=dict, hash=False)
    """Strategies of later phases by their first step, such as `{64: Strategy(inner_steps=16)}`.

    The first step of a phase must be a multiple of the inner steps of the phase and of the phase
    before it. Parameters and the state of the optimizer continue. The states of the reducer, of the
    outer optimizer and of `inner` continue if both phases have inner steps and states of the same
    shapes; otherwise they are initialized.
    """

    def __post_init__(self):
        check_at_least(0, inner_steps=self.inner_steps)

        # Exact training computes and sums the gradients itself; with shared batches, all replicas
        # have the same gradient.
        for option in ("exact", "shared_batches"):
            if getattr(self, option):
                self._check_without_reducer(option)

        # Options that have no effect without inner steps are rejected, not ignored.
        if self.inner_steps == 0:
            self._requires_inner_steps(
                "outer", self.outer is not AVERAGE, "the optimizer updates the shared parameters"
            )
            self._requires_inner_steps(
                "inner", self.inner is not UNCHANGED, "there are no local steps"
            )
            self._requires_inner_steps("diverges", self.diverges, "replicas cannot diverge")
            self._requires_inner_steps("per_host", self.per_host > 1, "there are no local steps")
        self._check_per_host()
        if self.later:
            self._check_phases()

    @property
    def phases(self) -> dict[int, "Strategy"]:
        """The strategies of all phases by their first step, each without later phases."""
        if not self.later:
            return {0: self}
        return {0: replace(self, later={}), **dict(sorted(self.later.items()))}

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

    def _check_without_reducer(self, option: str) -> None:
        if self.inner_steps:
            raise InputError(option, f"requires inner_steps=0, got {self.inner_steps}.")
        if self.reduce is not MEAN:
            reason = {
                "exact": "it sums the gradients itself",
                "shared_batches": "nothing is sent",
            }[option]
            raise InputError(option, f"requires the default reducer, because {reason}.")
        if self.exact and (self.later or self.shared_batches):
            raise InputError("exact", "requires a single phase without shared batches.")

    def _check_phases(self) -> None:
        """Checks that each phase of `later` can follow the one before it."""
        for start, strategy in self.later.items():
            if not isinstance(start, int) or start < 1:
                raise InputError("later", f"must have steps of at least 1 as keys, got {start!r}.")
            if not isinstance(strategy, Strategy):
                rule = "must have strategies as values"
                raise InputError("later", f"{rule}, got {strategy!r:.60} at step {start:,}.")
            if strategy.later or strategy.exact:
                rule = "must have strategies that are not exact and have no later phases"
                raise InputError("later", f"{rule}, got another at step {start:,}.")

        for (_, before), (start, after) in pairwise(self.phases.items()):
            for steps in (before.inner_steps, after.inner_steps):
                if steps and start % steps:
                    rule = f"must begin a phase at a multiple of its {steps} inner steps"
                    raise InputError("later", f"{rule} and of those before it, got {start:,}.")
            # After local steps, each replica has another state of the optimizer.
            if before.inner_steps and not after.inner_steps:
                rule = "must have inner steps in all phases after the first one with inner steps"
                raise InputError("later", f"{rule}, got 0 at step {start:,}.")
            if before.diverges and not after.diverges:
                rule = "must diverge in all phases after the first one that diverges"
                raise InputError("later", f"{rule}, got a strategy that does not at {start:,}.")

    def _check_per_host(self) -> None:
        check_at_least(1, per_host=self.per_host)
        if self.per_host == 1:
            return
        if self.diverges:
            raise InputError("per_host", f"must be 1 if replicas diverge, got {self.per_host}.")
        # The messages of a host are equal; a rule must not take them for independent ones.
        if isinstance(self.reduce, IndependentReducer) and self.reduce.per_host % self.per_host:
            raise InputError(
                "per_host",
                "must divide that of a reducer that requires independent messages, which is "
                f"{self.reduce.per_host}, got {self.per_host}.",
            )

    def _requires_inner_steps(self, part: str, given: bool, reason: str) -> None:
        if given:
            raise InputError(
                part, f"requires inner_steps of at least 1; with inner_steps=0, {reason}."
            )
