"""A profile of a training: the time of each part of a step, measured in turns.

A step consists of four parts:

- *input*: indices are made and put on the devices. Measured directly.
- *dispatch*: the time until the host's call returns. Measured directly.
- *compute*: a dispatch of the same number of steps without communication, until its results are
  ready, less the host's call.
- *aggregation*: the additional time of the strategy's dispatch: encoding, sending, combining, and
  waiting for the slowest device (the straggler).

The training loop overlaps some of these parts, so their sum may exceed a step of that loop, which
is measured, too.

Fake CPU devices share the cores with the host, so the host's call may return only after they have
started. On them, the sum of dispatch and compute is more accurate than either.

The compiled programs that are compared, the *contestants*, take turns in one process, so that other
load on the machine affects all of them. A *turn* measures each of them once.
"""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import optax

from ctde_jax.aggregate import Strategy
from ctde_jax.data import index_blocks
from ctde_jax.devices import PyTree, count_cores, replica
from ctde_jax.errors import InputError
from ctde_jax.rounds import (
    Resident,
    Span,
    Sums,
    make_digests,
    make_evaluate,
    make_gradient,
    make_reestimate,
    parallel_rounds,
    rows_per_dispatch,
    state,
)
from ctde_jax.trainer.training import Training

PARTS = ("input", "dispatch", "compute", "aggregation")
"""The parts of a step, in the order in which they happen."""

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


Partition = Callable[[int], Sequence[np.ndarray] | None]
"""Function from a number of devices to the partition of the examples for it, or to None."""


@dataclass(frozen=True)
class Profile:
    """The measured times of a training, in seconds."""

    replicas: int
    cores: int | None
    """Number of cores that CPU devices share with the host; None for accelerators."""

    batch_size: int
    steps: int
    """Number of optimizer steps of the whole run, of which only a few are measured."""

    steps_per_dispatch: int
    steps_per_evaluation: int

    once: dict[str, float]
    """Time of each part of the start-up, before the first step."""

    parts: dict[str, Spread]
    """Time of each part of a step."""

    scaling: dict[int, Spread]
    """Time of a step of the training loop, by number of devices, at the same global batch size."""

    evaluation: Spread
    """Time of an evaluation on all splits, including the re-estimation of batch statistics."""

    half_batch: Spread | None
    """Ratio of the time of a step with half the batch size to that of a step with the whole one.

    None if the batch size cannot be halved.
    """

    turns: int
    """Number of turns."""

    @property
    def step(self) -> Spread:
        """Time of a step of the training loop on all devices."""
        return self.scaling[self.replicas]


def measure(
    training: Training,
    partition: Partition,
    seconds: float,
    trace: Path | None = None,
    say: Callable[[str], None] = print,
) -> Profile:
    """Measures the time of each part of a training in a few steps.

    This takes the memory of several trainings: one for each number of devices, one without
    communication, and one with half the batch size.

    Args:
        training: The training to measure. If it starts with a synchronous phase, the phase after
            that is measured.
        partition: The partition of the training as a function of the number of devices.
        seconds: Approximate duration of all turns; there are at least 5 turns and at most 100.
        trace: Folder for a trace of a few dispatches, or None.
        say: Prints the stage of the measurement.

    Raises:
        InputError: The training data are not in memory.
    """
    if training.data.train.is_on_disk or training.data.stream is not None:
        raise InputError(
            "dataset",
            f"must be in memory to be profiled, got {training.data.name}, which is on disk or a "
            "stream; profile a subset of it.",
        )
    phase = training.phases(training.log_every)[-1]
    strategy = phase.strategy
    span = phase.spans[0]

    # Time the initialization, compilation included, as a run does it once.
    before = time.perf_counter()
    first = training.data.train.inputs[: training.batch_size]
    center = jax.jit(training.raw_model.init)(
        jax.random.split(jax.random.key(training.seed))[0], first
    )
    jax.block_until_ready(center)
    started = time.perf_counter() - before

    # Size the dispatches as training does: from the time of one row, measured after a first
    # dispatch that starts the threads.
    say(f"compiling for {len(training.devices)} devices")
    whole = _Contestant(training, center, strategy, span)
    whole.dispatch()
    rows = rows_per_dispatch(whole.dispatch().ready * span.row_rounds * span.round_steps)
    whole.rounds = min(rows * span.row_rounds, span.piece_rounds)
    steps = whole.rounds * span.round_steps

    # Compile the evaluation.
    before = time.perf_counter()
    evaluate = _make_evaluation(training, center, whole)
    compiled_evaluation = time.perf_counter() - before

    # To compare with: the same steps without communication, half the batch size, fewer devices.
    without_reduction = Strategy(steps, optax.identity(), inner=strategy.inner)
    alone = _Contestant(training, center, without_reduction, Span(0, steps, steps), whole)
    half = None
    if training.batch_size % (2 * len(training.devices) * training.accumulation_steps) == 0:
        half = _Contestant(
            replace(training, batch_size=training.batch_size // 2), center, strategy, span, whole
        )
    scaling = _on_fewer_devices(training, partition, center, strategy, span, say)
    scaling[len(training.devices)] = whole

    # Measure before the trace is written, because the profiler affects the times.
    turns, loops = _take_turns(whole, alone, half, scaling, evaluate, seconds, say)
    if trace is not None:
        say("tracing")
        whole.trace(trace)

    # Summarize the turns by median and quartiles.
    measured = {name: spread([turn[name] for turn in turns]) for name in turns[0]}
    return Profile(
        replicas=len(training.devices),
        cores=count_cores() if training.devices[0].platform == "cpu" else None,
        batch_size=training.batch_size,
        steps=training.total_steps,
        steps_per_dispatch=steps,
        steps_per_evaluation=span.stop - span.start,
        once={
            "initialize the model": started,
            **whole.once,
            "compile evaluation": compiled_evaluation,
        },
        parts={part: measured[part] for part in PARTS},
        scaling={count: spread(loops[count]) for count in sorted(loops)},
        evaluation=measured["evaluation"],
        half_batch=measured.get("half"),
        turns=len(turns),
    )


def _on_fewer_devices(
    training: Training,
    partition: Partition,
    center: tuple[PyTree, PyTree],
    strategy: Strategy,
    span: Span,
    say: Callable[[str], None],
) -> dict[int, "_Contestant"]:
    """Compiles the same training for the smaller powers of two of devices on which it can run.

    Returns:
        The contestants by number of devices.
    """
    scaling = {}
    for count in _fewer(len(training.devices)):
        say(f"compiling for {count} of {len(training.devices)} devices")
        try:
            fewer = replace(training, devices=training.devices[:count], partition=partition(count))
        except InputError:
            # The strategy, the batch size or the partition rules out this number of devices.
            continue
        scaling[count] = _Contestant(fewer, center, strategy, span)
    return scaling


def _take_turns(
    whole: "_Contestant",
    alone: "_Contestant",
    half: "_Contestant | None",
    scaling: dict[int, "_Contestant"],
    evaluate: Callable[[], float],
    seconds: float,
    say: Callable[[str], None],
) -> tuple[list[dict[str, float]], dict[int, list[float]]]:
    """Measures all contestants in turns.

    Args:
        whole: The training itself.
        alone: The same steps without communication.
        half: The training with half the batch size, or None.
        scaling: The training on each number of devices, including `whole`.
        evaluate: Function that evaluates and returns the duration in seconds.
        seconds: Approximate duration of all turns.
        say: Prints the stage of the measurement.

    Returns:
        The seconds of each part of a step in each turn, and the seconds of a step of the training
        loop in each turn, by number of devices.
    """
    # Warm up with dispatches of the same length for all, and choose the length of the loops.
    say("warming up")
    for contestant in (*([half] if half else []), *scaling.values()):
        contestant.rounds = whole.rounds
        contestant.dispatch()
    alone.dispatch()
    evaluate()
    dispatched = whole.dispatch().ready * whole.steps
    length = int(np.clip(_LOOP_SECONDS / dispatched, _LEAST_LOOP, _MOST_LOOP))

    # Every turn measures all contestants, so that a slow moment of the machine affects all of them.
    turns: list[dict[str, float]] = []
    loops: dict[int, list[float]] = {count: [] for count in scaling}
    ends = time.perf_counter() + seconds
    while len(turns) < _LEAST_TURNS or (time.perf_counter() < ends and len(turns) < _MOST_TURNS):
        say(f"measuring, turn {len(turns) + 1}")
        taken = whole.dispatch()
        taken_alone = alone.dispatch()
        # The module's docstring explains the differences.
        turn = {
            "input": whole.input(len(turns)),
            "dispatch": taken.returned,
            "compute": taken_alone.ready - taken.returned,
            "aggregation": taken.ready - taken_alone.ready,
            "evaluation": evaluate(),
        }
        if half:
            turn["half"] = half.dispatch().ready / taken.ready
        for count, contestant in scaling.items():
            loops[count].append(contestant.loop(length))
        turns.append(turn)
    return turns, loops


def spread(values: Sequence[float]) -> Spread:
    """Returns the median and the quartiles of values; negative results become 0.

    Differences of times can be negative because of noise.

    Args:
        values: Times in seconds, differences of times, or ratios of times.
    """
    low, middle, high = np.maximum(np.percentile(values, [25, 50, 75]), 0)
    return Spread(float(middle), float(low), float(high))


class _Dispatch(NamedTuple):
    """Seconds per step until the host's call has returned, and until the results are ready."""

    returned: float
    ready: float


class _Contestant:
    """A compiled program of rounds, with its current state and its next batches.

    Args:
        training: The training, whose data are in memory.
        center: Pair of the initial parameters and model state.
        strategy: The strategy of the rounds.
        span: Span with the sizes of rounds, rows and pieces.
        sharing: A contestant on the same devices whose examples this one uses as well; None if this
            one transfers the examples to the devices.
    """

    def __init__(
        self,
        training: Training,
        center: tuple[PyTree, PyTree],
        strategy: Strategy,
        span: Span,
        sharing: "_Contestant | None" = None,
    ):
        # Draw the batches in the order of training.
        devices = training.devices
        self.devices = devices
        self.rounds = span.row_rounds
        self._span = span
        assert isinstance(training.source, Resident), "checked by measure"
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
        self.examples = training.source.hold(devices) if sharing is None else sharing.examples
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

    @property
    def steps(self) -> int:
        """Number of steps of a dispatch."""
        return self.rounds * self._span.round_steps

    def dispatch(self) -> _Dispatch:
        """Runs the program once, with its input already on the devices, and times it."""
        drawn = jax.block_until_ready(next(self._inputs))
        steps = self.steps
        before = time.perf_counter()
        sums = self._advance(*drawn)
        returned = time.perf_counter()
        jax.block_until_ready((self._state, sums))
        return _Dispatch((returned - before) / steps, (time.perf_counter() - before) / steps)

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


def _make_evaluation(
    training: Training, center: tuple[PyTree, PyTree], contestant: _Contestant
) -> Callable[[], float]:
    """Makes a function that evaluates as training does, and returns the duration in seconds."""
    devices = contestant.devices
    batches = contestant.batches
    center = replica.replicate(center, devices)
    splits = [
        split for split in (training.data.validation, training.data.test) if split is not None
    ]
    averages = [
        make_evaluate(training.raw_model, training.task, split, devices, *center)
        for split in splits
    ]
    # int32[replica, steps, per_replica]; at least one step, even if nothing is reestimated.
    reestimate = make_reestimate(training.raw_model, devices, batches.axis)
    again = batches.steps(0, max(1, training.reestimate_batches)).swapaxes(0, 1)
    indices = replica.shard(np.ascontiguousarray(again), devices)

    def evaluate() -> float:
        before = time.perf_counter()
        params, model_state = center
        # Averages are numbers on the host, so each call has waited for its result.
        if training.reestimate_batches:
            model_state = reestimate(
                params, model_state, contestant.examples, indices, contestant.key
            )
        for average in averages:
            average(params, model_state)
        return time.perf_counter() - before

    return evaluate


def _fewer(devices: int) -> list[int]:
    """Returns the powers of two below the number of devices: 1, 2, 4, ..."""
    return [2**power for power in range((devices - 1).bit_length())]
