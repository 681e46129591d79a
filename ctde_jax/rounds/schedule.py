"""The schedule of a run: phases with one strategy each, spans between evaluations, dispatches.

A span is computed without interruption, row by row; a row of the history is a whole number of
rounds. Dispatches and checkpoints end with a whole row, so the rows do not depend on how a run is
cut, or on the step at which it was interrupted.
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
    start: int
    spans: list[Span]
    """Spans from one evaluation to the next, all cut alike."""

    def begin(
        self, train_state: state.TrainState, devices: Sequence[jax.Device]
    ) -> state.TrainState:
        """Converts the state of the preceding synchronous phase to one for this phase."""
        return state.go_over(train_state, Strategy(), self.strategy, devices)

    def like_begun(
        self, train_state: state.TrainState, devices: Sequence[jax.Device]
    ) -> state.TrainState:
        """Returns the shapes and dtypes of the result of `begin`; reads only those of the state."""
        return state.like_after(train_state, Strategy(), self.strategy, devices)

    def make_center(self, devices: Sequence[jax.Device]) -> Callable[[state.TrainState], PyTree]:
        """Makes the function from the state to the central parameters to evaluate, replicated."""
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
            # If the parameters to evaluate are part of the state, nothing runs on the devices.
            if state.has_evaluated_point(train_state, self.strategy):
                return compute(rows, train_state)
            return evaluated_point(train_state)

        return center

    def after(self, step: int) -> list[Span]:
        """Returns the rest of the spans after this step, which is the end of a row."""
        return [
            span._replace(start=max(span.start, step)) for span in self.spans if span.stop > step
        ]


_DISPATCH_SECONDS = 0.1
"""Target duration of a dispatch.

It is long compared to the overhead of about a millisecond, and short for someone who waits for it
or stops it.
"""

_MOST_EVALUATIONS = 2**20
"""Limit of the spans between evaluations, which are listed in memory at about 300 bytes each."""


def make_phases(
    strategy: Strategy, total_steps: int, eval_every: int, row_steps: int, piece_steps: int
) -> list[Phase]:
    """Cuts a run into phases: the synchronous steps at its start, if there are any, and the rest.

    Args:
        strategy: Strategy of the run.
        total_steps: Number of steps of the run.
        eval_every: Steps between two evaluations, rounded up to whole rounds.
        row_steps: Maximum steps in a row, or those of a round if these are more.
        piece_steps: Maximum steps in a piece, or those of a row if these are more.

    Raises:
        InputError: There would be more than `_MOST_EVALUATIONS` evaluations.
    """
    # Checked before the list of spans is made.
    if total_steps > eval_every * _MOST_EVALUATIONS:
        raise InputError(
            "eval_every",
            f"must be at least {ceil(total_steps / _MOST_EVALUATIONS):,}, so that {total_steps:,} "
            f"steps have at most {_MOST_EVALUATIONS:,} evaluations, got {eval_every:,}.",
        )

    # Empty phases are left out, so there are one or two.
    switch = min(strategy.synchronous_steps, total_steps)
    phases = [(Strategy(), 0, switch), (strategy, switch, total_steps)]
    return [
        Phase(own, start, _spans(own.inner_steps, eval_every, row_steps, piece_steps, start, stop))
        for own, start, stop in phases
        if start < stop
    ]


def unfinished(phases: Sequence[Phase], step: int) -> list[Phase]:
    """Returns the phases from the one that took this step, counted from 1; all for step 0."""
    at_work = max((number for number, phase in enumerate(phases) if phase.start < step), default=0)
    return list(phases[at_work:])


def cut(
    pieces: Iterable[Piece], pace: Callable[[], int]
) -> Iterator[tuple[PyTree, Int32[Array, "replicas rounds round_steps per_replica"], int, int]]:
    """Cuts pieces into dispatches of `pace()` rounds.

    Args:
        pieces: Pieces, as drawn by a feed.
        pace: Function that returns the number of rounds of the next dispatch.

    Yields:
        The examples, the indices, and the first round and the last, which is not included.
    """
    for examples, indices, rounds in pieces:
        first = 0
        while first < rounds:
            # The meter may change the pace between dispatches.
            last = min(first + pace(), rounds)
            yield examples, indices, first, last
            first = last


def _spans(
    inner_steps: int, eval_every: int, row_steps: int, piece_steps: int, start: int, stop: int
) -> list[Span]:
    # Synchronous steps are rounds of one step.
    round_steps = max(1, inner_steps)
    rounds = ceil(min(eval_every, stop - start) / round_steps)

    # As few rows as `row_steps` allows, of equal length except for the last; pieces are whole rows.
    rows = ceil(rounds / max(1, row_steps // round_steps))
    row_rounds = ceil(rounds / rows)
    piece_rounds = row_rounds * min(rows, max(1, piece_steps // (row_rounds * round_steps)))
    interval = rounds * round_steps
    return [
        Span(first, min(first + interval, stop), round_steps, row_rounds, piece_rounds)
        for first in range(start, stop, interval)
    ]


def rows_a_dispatch(row_seconds: float) -> int:
    """Returns how many rows one dispatch computes.

    Args:
        row_seconds: Duration of one row in seconds.
    """
    return max(1, int(_DISPATCH_SECONDS / row_seconds))
