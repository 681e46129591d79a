"""A compiled program of rounds that is measured, with its state and its batches.

It runs as in training. Several contestants can take turns in one process, so that other load on the
machine affects all of them.
"""

import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from ctde_jax.aggregate import Strategy
from ctde_jax.data import index_blocks
from ctde_jax.devices import PyTree, memory, replica
from ctde_jax.errors import InputError
from ctde_jax.rounds import (
    Resident,
    Span,
    Sums,
    make_digests,
    make_gradient,
    parallel_rounds,
    rows_per_dispatch,
    state,
)
from ctde_jax.trainer.training import Training

_LEAST_TURNS = 5
_MOST_TURNS = 100
_LOOP_SECONDS = 0.1
_LEAST_LOOP = 3  # dispatches
_MOST_LOOP = 50  # dispatches
_TRACED_DISPATCHES = 3


class Spread(NamedTuple):
    """Median and quartiles of the values of all turns."""

    median: float
    low: float
    """Lower quartile."""

    high: float
    """Upper quartile."""


def spread(values: Sequence[float]) -> Spread:
    """Returns the median and the quartiles of values; negative results become 0.

    Differences of times can be negative because of noise.

    Args:
        values: Times in seconds, differences of times, or ratios of times.
    """
    low, middle, high = np.maximum(np.percentile(values, [25, 50, 75]), 0)
    return Spread(float(middle), float(low), float(high))


def needs_turn(turns: int, ends: float) -> bool:
    """Returns whether another turn is measured: there are at least 5 turns and at most 100.

    Args:
        turns: Number of turns so far.
        ends: Time by `time.perf_counter` after which the minimum number of turns suffices.
    """
    return turns < _LEAST_TURNS or (time.perf_counter() < ends and turns < _MOST_TURNS)


def check_data(training: Training) -> None:
    """Raises InputError if the training data are not in memory."""
    if training.data.train.is_on_disk or training.data.stream is not None:
        raise InputError(
            "dataset",
            f"must be in memory to be profiled, got {training.data.name}, which is on disk or a "
            "stream; profile a subset of it.",
        )


def initialize(training: Training) -> tuple[PyTree, PyTree]:
    """Returns the initial parameters and the initial model state."""
    first = training.data.train.inputs[: training.batch_size]
    init_key, _ = jax.random.split(jax.random.key(training.seed))
    return jax.block_until_ready(jax.jit(training.raw_model.init)(init_key, first))


class Dispatch(NamedTuple):
    """Seconds per step until the host's call has returned, and until the results are ready."""

    returned: float
    ready: float


class Contestant:
    """A compiled program of rounds, with its current state and its next batches.

    Args:
        training: The training, whose data are in memory.
        center: Pair of the initial parameters and model state.
        strategy: The strategy of the rounds.
        span: Span with the sizes of rounds, rows and pieces.
        examples: The examples of another contestant on the same devices, which this one uses as
            well; None if this one transfers the examples to the devices.

    Raises:
        InputError: The temporary arrays of a step exceed the memory of the devices.
    """

    def __init__(
        self,
        training: Training,
        center: tuple[PyTree, PyTree],
        strategy: Strategy,
        span: Span,
        examples: PyTree | None = None,
    ):
        # Draw the batches in the order of training.
        devices = training.devices
        self.devices = devices
        self.rounds = span.row_rounds
        self._span = span
        assert isinstance(training.source, Resident), "checked by check_data"
        # Each contestant has a separate cache of draws, and `input` another.
        self.batches = training.source.batches.with_empty_cache()
        self._fresh = training.source.batches.with_empty_cache()
        self._inputs = self._draw()

        # Put the state and the examples on the devices.
        before = time.perf_counter()
        averages = training.ema_decay is not None
        params, model_state = center
        trained, frozen = training.divide(params)
        self._state = state.place(
            trained, model_state, training.optimizer, strategy, devices, averages, frozen
        )
        self.examples = training.source.hold(devices) if examples is None else examples
        self.key = replica.replicate(jax.random.split(jax.random.key(training.seed))[1], devices)
        jax.block_until_ready((self._state, self.examples))
        placed = time.perf_counter()

        # Trace, lower and compile, each timed. The first inputs are drawn before the clock starts.
        gradient = make_gradient(
            training.raw_model,
            training.weighted_task,
            training.augment,
            training.accumulation_steps,
        )
        rounds = parallel_rounds(
            gradient, training.optimizer, strategy, devices, self.batches.axis, training.ema_decay
        )
        arguments = (self._state, self.examples, *next(self._inputs), self.key)
        ready = time.perf_counter()
        # `eval_shape` only traces, so that tracing and lowering are timed apart.
        jax.eval_shape(rounds, *arguments)
        traced = time.perf_counter()
        lowered = rounds.lower(*arguments)
        is_lowered = time.perf_counter()
        self._run = replica.compiled(lowered, devices)
        self._digest = make_digests(devices, strategy)
        self.once = {
            "place state and data": placed - before,
            "trace": traced - ready,
            "lower": is_lowered - traced,
            "compile": time.perf_counter() - is_lowered,
        }
        memory.check_program(self._run, devices)
        self.temporary = memory.temporary(self._run)

    @property
    def steps(self) -> int:
        """Number of steps of a dispatch."""
        return self.rounds * self._span.round_steps

    def size_dispatches(self) -> None:
        """Sizes the dispatches as training does, from the time of one row.

        The time is measured after a first dispatch, which starts the threads.
        """
        self.rounds = self._span.row_rounds
        self.dispatch()
        rows = rows_per_dispatch(self.dispatch().ready * self.steps)
        self.rounds = min(rows * self._span.row_rounds, self._span.piece_rounds)

    def loop_length(self) -> int:
        """Returns the number of dispatches that take about 0.1 seconds, from 3 to 50."""
        dispatched = self.dispatch().ready * self.steps
        return int(np.clip(_LOOP_SECONDS / dispatched, _LEAST_LOOP, _MOST_LOOP))

    def dispatch(self) -> Dispatch:
        """Runs the program once, with its input already on the devices, and times it."""
        drawn = jax.block_until_ready(next(self._inputs))
        steps = self.steps
        before = time.perf_counter()
        sums = self._advance(*drawn)
        returned = time.perf_counter()
        jax.block_until_ready((self._state, sums))
        return Dispatch((returned - before) / steps, (time.perf_counter() - before) / steps)

    def loop(self, length: int) -> float:
        """Runs the program `length` times as training does; returns the seconds of a step."""
        before = time.perf_counter()
        unread = None
        for _ in range(length):
            sums = self._digest(self._advance(*next(self._inputs)), self._state)
            # Read the previous dispatch while this one runs, as training does.
            if unread is not None:
                jax.device_get(unread)
            unread = sums
        jax.device_get(unread)
        return (time.perf_counter() - before) / (length * self.steps)

    def step(self, seconds: float) -> Spread:
        """Measures the time of a step of the training loop, in turns of about `seconds` in all."""
        self.size_dispatches()
        length = self.loop_length()
        # The first loop is not measured, as it compiles the digests.
        self.loop(1)
        ends = time.perf_counter() + seconds
        times: list[float] = []
        while needs_turn(len(times), ends):
            times.append(self.loop(length))
        return spread(times)

    def input(self, turn: int) -> float:
        """Makes the batches of a piece and puts them on the devices; returns the seconds per step.

        If the order is drawn for more steps than a piece has, the time of a draw is divided by its
        number of steps.
        """
        drawn_steps = self.batches.steps_per_draw
        steps = self._span.piece_rounds * self._span.round_steps
        # Draw outside the piece's time, into the cache from which `index_blocks` then takes it.
        before = time.perf_counter()
        if drawn_steps > steps:
            self._fresh.draw(turn)
        drawn = time.perf_counter()

        # Make the piece's indices and put them on the devices.
        start = turn * max(drawn_steps, steps)
        cut = index_blocks(
            self._fresh, self._span.round_steps, self._span.piece_rounds, start, start + steps
        )
        jax.block_until_ready(replica.shard(next(cut)[0], self.devices))
        return (drawn - before) / drawn_steps + (time.perf_counter() - drawn) / steps

    def trace(self, folder: Path) -> None:
        """Writes a trace of host and devices during a few dispatches, for XProf and Perfetto."""
        with jax.profiler.trace(folder, create_perfetto_trace=True):
            for number in range(_TRACED_DISPATCHES):
                with jax.profiler.StepTraceAnnotation("dispatch", step_num=number):
                    self.dispatch()

    def _draw(self) -> Iterator[tuple[jax.Array, np.int32, np.int32]]:
        """Yields the indices of a piece with the first and the last round of each full dispatch."""
        for indices, _ in index_blocks(
            self.batches, self._span.round_steps, self._span.piece_rounds, 0, sys.maxsize
        ):
            indices = replica.shard(indices, self.devices)
            first = 0
            # All dispatches must have the same length, so remaining rounds are left out.
            while first + self.rounds <= self._span.piece_rounds:
                yield indices, np.int32(first), np.int32(first + self.rounds)
                first += self.rounds

    def _advance(self, indices: jax.Array, first: np.int32, last: np.int32) -> Sums:
        self._state, sums = self._run(self._state, self.examples, indices, first, last, self.key)
        return sums
