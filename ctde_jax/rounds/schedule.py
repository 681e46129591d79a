"""The schedule of a run.

A run has one or more *phases*, each with a single strategy. A phase is divided into *spans*, one
per evaluation interval. A span consists of rows of the history, and each row covers a whole number
of rounds; the last row may be shorter. Each *dispatch* (one call of the compiled program) computes
whole rows, and checkpoints are written only between rows, so the history does not depend on the
length of dispatches or on the step from which a run is resumed.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from math import ceil
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Int32

from ctde_jax.aggregate import Strategy
from ctde_jax.devices import PyTree, replica
from ctde_jax.errors import InputError
from ctde_jax.rounds import state
from ctde_jax.rounds.feed import Piece, Span


class Phase(NamedTuple):
    """A part of a run with a single strategy."""

    strategy: Strategy
    before: Strategy
    """Strategy of the phase before this one; that of this one if it is the first."""

    start: int
    """Number of steps before the phase."""

    spans: list[Span]
    """All spans of the phase, one per evaluation interval."""

    def begin(
        self, train_state: state.TrainState, devices: Sequence[jax.Device]
    ) -> state.TrainState:
        """Returns the first state of this phase, given the last one of the phase before."""
        return state.change_strategy(train_state, self.before, self.strategy, devices)

    def like_begun(
        self, train_state: state.TrainState, devices: Sequence[jax.Device]
    ) -> state.TrainState:
        """Returns shapes and dtypes of the result of `begin`; reads only those of `train_state`."""
        return state.like_changed(train_state, self.before, self.strategy, devices)

    def make_center(self, devices: Sequence[jax.Device]) -> Callable[[state.TrainState], PyTree]:
        """Makes the function that returns the central parameters of a state, replicated.

        `state.evaluated_point` defines them.
        """
        evaluated_point = partial(state.evaluated_point, strategy=self.strategy)

        # pmap needs at least one argument with a row for each replica.
        rows = replica.shard(np.arange(len(devices), dtype=np.int32), devices)
        on_replicas = replica.parallel(
            lambda _, train_state: evaluated_point(train_state),
            devices,
            (0, state.axes(self.strategy)),
            None,
        )
        compute = replica.compiled_once(on_replicas, devices)

        def center(train_state: state.TrainState) -> PyTree:
            # If the state contains the central parameters, nothing runs on the devices.
            if state.is_computed(train_state, self.strategy):
                return compute(rows, train_state)
            return evaluated_point(train_state)

        return center

    def begins_with(self, spans: Sequence[Span]) -> bool:
        """Returns whether the state must first be converted from the phase before this one.

        Args:
            spans: The unfinished spans of this phase.
        """
        return bool(spans) and spans[0].start == self.start > 0

    def after(self, step: int) -> list[Span]:
        """Returns the spans that remain after the first `step` steps of the run.

        The first of them is shortened if it has begun; `step` must be the end of a row.
        """
        return [
            span._replace(start=max(span.start, step)) for span in self.spans if span.stop > step
        ]


_DISPATCH_SECONDS = 0.1
"""Target duration of a dispatch in seconds.

It is long compared to the overhead of a dispatch, about a millisecond. Progress is shown, and
Ctrl-C takes effect, between dispatches.
"""

_MOST_EVALUATIONS = 2**20
"""Maximum number of evaluations in a run; the span of each takes about 300 bytes of memory."""


def make_phases(
    strategy: Strategy, total_steps: int, eval_every: int, row_steps: int, piece_steps: int
) -> list[Phase]:
    """Divides a run into the phases of its strategy; those that begin after its end are left out.

    Args:
        strategy: Strategy of the run.
        total_steps: Number of steps of the run.
        eval_every: Number of steps between two evaluations, rounded up to whole rounds.
        row_steps: Maximum number of steps in a row; a row has at least one round.
        piece_steps: Maximum number of steps in a piece; a piece has at least one row.

    Raises:
        InputError: If there would be more than `_MOST_EVALUATIONS` evaluations.
    """
    # Checked before the list of spans is made.
    if total_steps > eval_every * _MOST_EVALUATIONS:
        raise InputError(
            "eval_every",
            f"must be at least {ceil(total_steps / _MOST_EVALUATIONS):,}, so that {total_steps:,} "
            f"steps have at most {_MOST_EVALUATIONS:,} evaluations, got {eval_every:,}.",
        )

    parts = {start: each for start, each in strategy.phases.items() if start < total_steps}
    strategies = list(parts.values())
    ends = [*list(parts)[1:], total_steps]
    return [
        Phase(each, before, start, _spans(each, eval_every, row_steps, piece_steps, start, stop))
        for (start, each), before, stop in zip(
            parts.items(), strategies[:1] + strategies[:-1], ends, strict=True
        )
    ]


def count_rounds(spans: Sequence[Span]) -> int:
    """Returns the number of rounds in some spans."""
    return sum(ceil((span.stop - span.start) / span.round_steps) for span in spans)


def unfinished(phases: Sequence[Phase], step: int) -> list[Phase]:
    """Returns the phases from the one that contains the last of the first `step` steps of the run.

    A phase that ends at `step` is included, because the state is not yet converted to the next one.
    """
    at_work = max((number for number, phase in enumerate(phases) if phase.start < step), default=0)
    return list(phases[at_work:])


def cut(
    pieces: Iterable[Piece], pace: Callable[[], int]
) -> Iterator[tuple[PyTree, Int32[Array, "replicas rounds round_steps per_replica"], int, int]]:
    """Divides pieces into dispatches.

    Args:
        pieces: Pieces that a feed yields.
        pace: Function that returns the number of rounds of the next dispatch; a dispatch at the end
            of a piece may have fewer.

    Yields:
        `(examples, indices, first, last)`: the examples and indices of the piece, and the rounds of
        the dispatch within the piece, from `first` up to but not including `last`.
    """
    for examples, indices, rounds in pieces:
        first = 0
        while first < rounds:
            # The meter may change the pace between dispatches.
            last = min(first + pace(), rounds)
            yield examples, indices, first, last
            first = last


def _spans(
    strategy: Strategy, eval_every: int, row_steps: int, piece_steps: int, start: int, stop: int
) -> list[Span]:
    # Synchronous steps are rounds of one step.
    round_steps = max(1, strategy.inner_steps)
    rounds = ceil(min(eval_every, stop - start) / round_steps)

    # As few rows as `row_steps` allows, of equal length except for the last; pieces are whole rows.
    rows = ceil(rounds / max(1, row_steps // round_steps))
    row_rounds = ceil(rounds / rows)
    piece_rounds = row_rounds * min(rows, max(1, piece_steps // (row_rounds * round_steps)))
    interval = rounds * round_steps
    return [
        Span(
            first,
            min(first + interval, stop),
            round_steps,
            row_rounds,
            piece_rounds,
            strategy.shared_batches,
        )
        for first in range(start, stop, interval)
    ]


def rows_per_dispatch(row_seconds: float) -> int:
    """Returns the number of rows in a dispatch of at most 0.1 seconds, or 1 if a row takes longer.

    Args:
        row_seconds: Duration of one row in seconds.
    """
    return max(1, int(_DISPATCH_SECONDS / row_seconds))
