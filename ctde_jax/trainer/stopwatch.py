"""Where the time of a training goes: each part measured beside the others, in turns.

A step is *input* (its indices made and put on the devices), *dispatch* (until the host's call has returned), *compute*
and *aggregation*. Input and dispatch are measured. So is a dispatch of as many steps in which every device stays alone,
until its results are there: without the host's call that is compute. By how much longer the strategy's own dispatch
takes is aggregation: what is encoded, sent and combined, and waiting for the slowest device. The loop of training does
some of this at the same time, so the parts may come to more than a step of that loop, which is measured, too.

Fake CPU devices share the cores with the host, whose call may return only after they have begun: there the sum of
dispatch and compute is more certain than either.

The contestants take turns in one process, so that whatever else the machine does meets them all.
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
    make_evaluate,
    make_gradient,
    make_look,
    make_reestimate,
    parallel_rounds,
    rows_a_dispatch,
    state,
)
from ctde_jax.trainer.training import Training

PARTS = ("input", "dispatch", "compute", "aggregation")
"""Of a step, in the order in which they happen."""

_LEAST_TURNS, _MOST_TURNS = 5, 100
_LOOP_SECONDS, _LEAST_LOOP, _MOST_LOOP = (
    0.1,
    3,
    50,
)  # how long a loop is, and how many dispatches at least and at most
_TRACED_DISPATCHES = 3

_NOT_DRAWN = 2**20
"""The orders from this one on are not in the cache, as no contestant takes so many."""


class Spread(NamedTuple):
    """What the middle turn has measured, and the quartiles."""

    median: float
    low: float
    high: float


Partition = Callable[[int], Sequence[np.ndarray] | None]
"""From a number of devices to the examples that each of them keeps, or None."""


@dataclass(frozen=True)
class Profile:
    """What has been measured; times are in seconds."""

    replicas: int
    cores: int | None
    """Those that fake CPU devices share; None for devices that are what they seem."""

    batch_size: int
    steps: int
    """Of the whole run, of which only a few have been taken."""

    steps_per_dispatch: int
    steps_per_evaluation: int

    once: dict[str, float]
    """Before the first step."""

    parts: dict[str, Spread]
    """Of a step."""

    scaling: dict[int, Spread]
    """A step of the training loop by the number of devices, always with the same global batch."""

    evaluation: Spread
    half_batch: Spread | None
    """How many times as long as a step one with half the batch takes; None where the batch cannot be halved."""

    turns: int

    @property
    def step(self) -> Spread:
        """A step of the training loop."""
        return self.scaling[self.replicas]


def measure(
    training: Training,
    partition: Partition,
    seconds: float,
    trace: Path | None = None,
    say: Callable[[str], None] = print,
) -> Profile:
    """Measures the parts of a training, without finishing it.

    It takes the memory of several trainings: one for each number of devices, and two to compare with.

    Args:
        training: What is trained; if its strategy is synchronous at first, the phase after that is measured.
        partition: That of the training, for fewer devices, too.
        seconds: Seconds after which the turns end, but not before there are enough for a median.
        trace: A folder for a trace of a few dispatches, or None.
        say: Prints what is being done.

    Raises:
        InputError: The training data are not in memory.
    """
    if training.data.train.is_on_disk or training.data.stream is not None:
        raise InputError(
            "dataset",
            f"must be in memory to be profiled, got {training.data.name}, which is not; profile part of it.",
        )
    phase = training.phases(training.log_every)[-1]
    strategy, span = phase.strategy, phase.spans[0]
    before = time.perf_counter()
    first = training.data.train.inputs[: training.batch_size]
    center = jax.jit(training.raw_model.init)(
        jax.random.split(jax.random.key(training.seed))[0], first
    )
    jax.block_until_ready(center)
    started = time.perf_counter() - before

    say(f"compiling for {len(training.devices)} devices")
    own = _Contestant(training, center, strategy, span)
    own.dispatch()  # which starts the threads
    rows = rows_a_dispatch(own.dispatch().ready * span.row_rounds * span.round_steps)
    own.rounds = min(rows * span.row_rounds, span.piece_rounds)
    steps = own.rounds * span.round_steps
    before = time.perf_counter()
    evaluate = _make_evaluation(training, center, own)
    compiled_evaluation = time.perf_counter() - before

    # Beside it: the same steps without communication, steps of half the batch, and fewer devices.
    lonely = Strategy(steps, optax.identity(), inner=strategy.inner)
    alone = _Contestant(training, center, lonely, Span(0, steps, steps), own)
    half = None
    if training.batch_size % (2 * len(training.devices) * training.accumulate) == 0:
        half = _Contestant(
            replace(training, batch_size=training.batch_size // 2), center, strategy, span, own
        )
    scaling = _on_fewer_devices(training, partition, center, strategy, span, say)
    scaling[len(training.devices)] = own

    turns, loops = _take_turns(own, alone, half, scaling, evaluate, seconds, say)
    if trace is not None:
        say("tracing")
        own.trace(trace)

    measured = {name: spread([turn[name] for turn in turns]) for name in turns[0]}
    return Profile(
        replicas=len(training.devices),
        cores=count_cores() if training.devices[0].platform == "cpu" else None,
        batch_size=training.batch_size,
        steps=training.total_steps,
        steps_per_dispatch=steps,
        steps_per_evaluation=span.stop - span.start,
        once={"start of the model": started, **own.once, "compile evaluation": compiled_evaluation},
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
    """Compiles the same training for each smaller number of devices that it can run on."""
    scaling = {}
    for count in _fewer(len(training.devices)):
        say(f"compiling for {count} of {len(training.devices)} devices")
        try:
            fewer = replace(training, devices=training.devices[:count], partition=partition(count))
        except InputError:
            continue  # a strategy, a batch or a partition that does not go with so few devices
        scaling[count] = _Contestant(fewer, center, strategy, span)
    return scaling


def _take_turns(
    own: "_Contestant",
    alone: "_Contestant",
    half: "_Contestant | None",
    scaling: dict[int, "_Contestant"],
    evaluate: Callable[[], float],
    seconds: float,
    say: Callable[[str], None],
) -> tuple[list[dict[str, float]], dict[int, list[float]]]:
    """Measures all contestants in turns.

    Returns:
        The seconds of each part of a step in each turn, and those of a step of the loop by number of devices.
    """
    say("warming up")
    for contestant in (*([half] if half else []), *scaling.values()):
        contestant.rounds = own.rounds
        contestant.dispatch()
    alone.dispatch()
    evaluate()
    dispatched = own.dispatch().ready * own.steps
    length = int(np.clip(_LOOP_SECONDS / dispatched, _LEAST_LOOP, _MOST_LOOP))

    turns: list[dict[str, float]] = []
    loops: dict[int, list[float]] = {count: [] for count in scaling}
    ends = time.perf_counter() + seconds
    while len(turns) < _LEAST_TURNS or (time.perf_counter() < ends and len(turns) < _MOST_TURNS):
        say(f"measuring, turn {len(turns) + 1}")
        taken, taken_alone = own.dispatch(), alone.dispatch()
        turn = {
            "input": own.input(len(turns)),
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
    """Returns median and quartiles. A difference of times that is negative is noise around zero, and becomes zero."""
    low, middle, high = np.maximum(np.percentile(values, [25, 50, 75]), 0)
    return Spread(float(middle), float(low), float(high))


class _Dispatch(NamedTuple):
    """Seconds a step, from the host's call until it has returned, and until the results are there."""

    returned: float
    ready: float


class _Contestant:
    """A compiled program of rounds, the state with which it goes on, and the batches to come.

    One on the same devices may stand beside it, whose examples it uses.
    """

    def __init__(
        self,
        training: Training,
        center: tuple[PyTree, PyTree],
        strategy: Strategy,
        span: Span,
        beside: "_Contestant | None" = None,
    ):
        devices = training.devices
        self.devices = devices
        self.rounds = span.row_rounds
        self._span = span
        assert isinstance(training.source, Resident), "checked by measure"
        self.source = training.source
        self.batches = training.source.batches
        self._inputs = self._draw()

        before = time.perf_counter()
        averages = training.ema_decay is not None
        params, model_state = center
        self._state = state.place(
            params, model_state, training.optimizer, strategy, devices, averages
        )
        self.examples = self.source.hold(devices) if beside is None else beside.examples
        self.key = replica.replicate(jax.random.split(jax.random.key(training.seed))[1], devices)
        jax.block_until_ready((self._state, self.examples))
        placed = time.perf_counter()
        gradient = make_gradient(
            training.raw_model, training.task, training.augment, training.accumulate
        )
        rounds = parallel_rounds(
            gradient, training.optimizer, strategy, devices, self.batches.axis, training.ema_decay
        )
        arguments = (self._state, self.examples, *next(self._inputs), self.key)
        ready = time.perf_counter()
        jax.eval_shape(rounds, *arguments)
        traced = time.perf_counter()
        lowered = rounds.lower(*arguments)
        is_lowered = time.perf_counter()
        self._run = replica.compiled(lowered, devices)
        self._look = make_look(devices, strategy)
        self.once = {
            "state and data on the devices": placed - before,
            "trace": traced - ready,
            "lower": is_lowered - traced,
            "compile": time.perf_counter() - is_lowered,
        }

    @property
    def steps(self) -> int:
        """The steps of a dispatch."""
        return self.rounds * self._span.round_steps

    def dispatch(self) -> _Dispatch:
        """Runs the program once, its input there already."""
        drawn, steps = jax.block_until_ready(next(self._inputs)), self.steps
        before = time.perf_counter()
        sums = self._advance(*drawn)
        returned = time.perf_counter()
        jax.block_until_ready((self._state, sums))
        return _Dispatch((returned - before) / steps, (time.perf_counter() - before) / steps)

    def loop(self, length: int) -> float:
        """Runs the program so many times as training does, and returns the seconds that a step has taken."""
        before, unread = time.perf_counter(), None
        for _ in range(length):
            sums = self._look(self._advance(*next(self._inputs)), self._state)
            if unread is not None:
                jax.device_get(unread)  # of the dispatch before, while this one runs
            unread = sums
        jax.device_get(unread)
        return (time.perf_counter() - before) / (length * self.steps)

    def input(self, turn: int) -> float:
        """Makes the batches of a piece and puts them on the devices; returns the seconds that a step of it takes.

        Where the order is drawn for more steps than these, each of those bears its share of it.
        """
        drawn_steps = self.batches.steps_per_draw
        steps = self._span.piece_rounds * self._span.round_steps
        number = _NOT_DRAWN + turn
        before = time.perf_counter()
        if drawn_steps > steps:
            self.batches.draw(number)
        drawn = time.perf_counter()
        start = number * max(drawn_steps, steps)
        cut = index_blocks(
            self.batches, self._span.round_steps, self._span.piece_rounds, start, start + steps
        )
        jax.block_until_ready(replica.shard(next(cut)[0], self.devices))
        return (drawn - before) / drawn_steps + (time.perf_counter() - drawn) / steps

    def trace(self, folder: Path) -> None:
        """Writes what host and devices do in a few dispatches, for XProf and Perfetto."""
        with jax.profiler.trace(folder, create_perfetto_trace=True):
            for number in range(_TRACED_DISPATCHES):
                with jax.profiler.StepTraceAnnotation("dispatch", step_num=number):
                    self.dispatch()

    def _draw(self) -> Iterator[tuple[jax.Array, np.int32, np.int32]]:
        """Yields the indices of a piece with the first and the last round of each dispatch, all of them full."""
        for indices, _ in index_blocks(
            self.batches, self._span.round_steps, self._span.piece_rounds, 0, sys.maxsize
        ):
            indices, first = replica.shard(indices, self.devices), 0
            while first + self.rounds <= self._span.piece_rounds:
                yield indices, np.int32(first), np.int32(first + self.rounds)
                first += self.rounds

    def _advance(self, indices: jax.Array, first: np.int32, last: np.int32) -> Sums:
        self._state, sums = self._run(self._state, self.examples, indices, first, last, self.key)
        return sums


def _make_evaluation(
    training: Training, center: tuple[PyTree, PyTree], contestant: _Contestant
) -> Callable[[], float]:
    """Makes the function that evaluates as training does, and returns the seconds that it took."""
    devices, batches = contestant.devices, contestant.batches
    center = replica.replicate(center, devices)
    splits = [
        split for split in (training.data.validation, training.data.test) if split is not None
    ]
    averages = [
        make_evaluate(training.raw_model, training.task, split, devices, *center)
        for split in splits
    ]
    reestimate = make_reestimate(training.raw_model, devices, batches.axis)
    again = batches.steps(0, max(1, training.reestimate_batches)).swapaxes(0, 1)
    indices = replica.shard(np.ascontiguousarray(again), devices)

    def evaluate() -> float:
        before = time.perf_counter()
        params, model_state = center
        if training.reestimate_batches:
            model_state = reestimate(
                params, model_state, contestant.examples, indices, contestant.key
            )
        for average in averages:
            average(params, model_state)
        return time.perf_counter() - before

    return evaluate


def _fewer(devices: int) -> list[int]:
    """Counts 1, 2, 4, ... up to less than all devices."""
    return [2**power for power in range((devices - 1).bit_length())]
