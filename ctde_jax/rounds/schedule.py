"""When a run does what: phases of one strategy each, spans between evaluations, rows, dispatches.

A span is computed without a break, row by row; a row of the history is whole rounds. What a dispatch or a checkpoint
comes after is always a whole row, so rows are the same however a run is cut, and where it was broken off.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from math import ceil
from typing import NamedTuple

import jax
import numpy as np

from ctde_jax.aggregate import Strategy
from ctde_jax.devices import PyTree, replica
from ctde_jax.errors import InputError
from ctde_jax.rounds import state
from ctde_jax.rounds.feed import Piece, Span


class Phase(NamedTuple):
    """A part of a run in which one strategy is at work."""

    strategy: Strategy
    start: int
    spans: list[Span]
    """From one evaluation to the next, all cut alike."""

    def begin(
        self, train_state: state.TrainState, devices: Sequence[jax.Device]
    ) -> state.TrainState:
        """Goes over from the synchronous phase before this one."""
        return state.go_over(train_state, Strategy(), self.strategy, devices)

    def like_begun(
        self, train_state: state.TrainState, devices: Sequence[jax.Device]
    ) -> state.TrainState:
        """Says what shapes and types `begin` makes of a state, of which only these are read."""
        return state.like_after(train_state, Strategy(), self.strategy, devices)

    def make_center(self, devices: Sequence[jax.Device]) -> Callable[[state.TrainState], PyTree]:
        """Makes the function from the state to the central parameters to evaluate, replicated."""
        evaluated_point = partial(state.evaluated_point, strategy=self.strategy)
        rows = replica.shard(
            np.arange(len(devices), dtype=np.int32), devices
        )  # pmap needs an argument with rows
        on_replicas = replica.parallel(
            lambda _, train_state: evaluated_point(train_state),
            devices,
            (0, state.axes(self.strategy)),
            None,
        )
        compute = replica.compiled_once(on_replicas, devices)

        def center(train_state: state.TrainState) -> PyTree:
            if state.has_evaluated_point(train_state, self.strategy):
                return compute(rows, train_state)
            return evaluated_point(train_state)

        return center

    def after(self, step: int) -> list[Span]:
        """Returns what is left of the spans after this step, which is the end of a row."""
        return [
            span._replace(start=max(span.start, step)) for span in self.spans if span.stop > step
        ]


_DISPATCH_SECONDS = 0.1
"""What a dispatch should take: long beside the millisecond that it costs, short for who waits or stops it."""

_MOST_EVALUATIONS = 2**20
"""Spans between evaluations are listed in memory, some 300 bytes each."""


def make_phases(
    strategy: Strategy, total_steps: int, eval_every: int, row_steps: int, piece_steps: int
) -> list[Phase]:
    """Cuts a run into its phases: where a strategy is synchronous at first, two.

    Args:
        strategy: Of the run.
        total_steps: Of the run.
        eval_every: Steps between two evaluations, which come at the end of a round.
        row_steps: At most so many, or those of a round where these are more, make a row.
        piece_steps: At most so many, or those of a row where these are more, make a piece.
    """
    if total_steps > eval_every * _MOST_EVALUATIONS:
        raise InputError(
            "eval_every",
            f"must be at least {ceil(total_steps / _MOST_EVALUATIONS):,}, so that {total_steps:,} steps have at most "
            f"{_MOST_EVALUATIONS:,} evaluations, got {eval_every:,}.",
        )
    switch = min(strategy.synchronous_steps, total_steps)
    phases = [(Strategy(), 0, switch), (strategy, switch, total_steps)]
    return [
        Phase(own, start, _spans(own.inner_steps, eval_every, row_steps, piece_steps, start, stop))
        for own, start, stop in phases
        if start < stop
    ]


def unfinished(phases: Sequence[Phase], step: int) -> list[Phase]:
    """Returns the phases from the one whose strategy was at work in this step; step 0 is before the first."""
    at_work = max((number for number, phase in enumerate(phases) if phase.start < step), default=0)
    return list(phases[at_work:])


def cut(
    pieces: Iterable[Piece], pace: Callable[[], int]
) -> Iterator[tuple[PyTree, jax.Array, int, int]]:
    """Cuts pieces into dispatches, of so many rounds as the pace says: from a first one up to a last, not included."""
    for examples, indices, rounds in pieces:
        first = 0
        while first < rounds:
            last = min(first + pace(), rounds)
            yield examples, indices, first, last
            first = last


def _spans(
    inner_steps: int, eval_every: int, row_steps: int, piece_steps: int, start: int, stop: int
) -> list[Span]:
    round_steps = max(1, inner_steps)
    rounds = ceil(min(eval_every, stop - start) / round_steps)
    rows = ceil(rounds / max(1, row_steps // round_steps))
    row_rounds = ceil(rounds / rows)
    piece_rounds = row_rounds * min(rows, max(1, piece_steps // (row_rounds * round_steps)))
    interval = rounds * round_steps
    return [
        Span(first, min(first + interval, stop), round_steps, row_rounds, piece_rounds)
        for first in range(start, stop, interval)
    ]


def rows_a_dispatch(row_seconds: float) -> int:
    """Returns how many rows of so many seconds one dispatch computes."""
    return max(1, int(_DISPATCH_SECONDS / row_seconds))
