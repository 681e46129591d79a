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
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import optax

from ctde_jax.aggregate import Strategy
from ctde_jax.data import Augment, Batches, Dataset, deal, index_blocks
from ctde_jax.devices import PyTree, count_cores, replica
from ctde_jax.errors import InputError
from ctde_jax.models import Model, Task, with_raw_inputs
from ctde_jax.rounds import (
    Span,
    Sums,
    make_evaluate,
    make_gradient,
    make_look,
    make_phases,
    make_reestimate,
    parallel_rounds,
    rows_a_dispatch,
    state,
    steps_a_piece,
)

PARTS = ("input", "dispatch", "compute", "aggregation")
"""Of a step, in the order in which they happen."""

_LEAST_TURNS, _MOST_TURNS = 5, 100
_LOOP_SECONDS, _LEAST_LOOP, _MOST_LOOP = 0.1, 3, 50  # how long a loop is, and how many dispatches at least and at most
_TRACED_DISPATCHES = 3


class Spread(NamedTuple):
    """What the middle turn has measured, and the quartiles."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Training:
    """What is trained, with the names and meanings of the arguments of `fit`."""

    model: Model
    data: Dataset
    optimizer: optax.GradientTransformation
    strategy: Strategy
    task: Task
    batch_size: int
    steps: int
    eval_every: int
    log_every: int
    partition: Callable[[int], Sequence[np.ndarray] | None]
    """From the number of devices to the examples that each of them keeps, or None."""

    seed: int = 0
    augment: Augment | None = None
    accumulate: int = 1
    ema_decay: float | None = None
    reestimate_batches: int = 0


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
    devices: Sequence[jax.Device],
    seconds: float,
    trace: Path | None = None,
    say: Callable[[str], None] = print,
) -> Profile:
    """Measures the parts of a training, without finishing it.

    It takes the memory of several trainings: one for each number of devices, and two to compare with.

    Args:
        training: What is trained; where its strategy is synchronous at first, what comes then is measured.
        devices: All that there are to train on.
        seconds: The turns end after about so long, but not before there are enough for a median.
        trace: A folder for a trace of a few dispatches, or None.
        say: Is told what is being done.

    Raises:
        InputError: The training data are not in memory.
    """
    if training.data.train.is_on_disk or training.data.stream is not None:
        raise InputError(
            "dataset", f"must be in memory to be profiled, got {training.data.name}, which is not; profile part of it."
        )
    piece_steps = steps_a_piece(_deal(training, len(devices), training.batch_size))
    phase = make_phases(training.strategy, training.steps, training.eval_every, training.log_every, piece_steps)[-1]
    strategy, span = phase.strategy, phase.spans[0]
    before = time.perf_counter()
    model = with_raw_inputs(training.model, training.data.shift, training.data.scale)
    first = training.data.train.inputs[: training.batch_size]
    center = jax.jit(model.init)(jax.random.split(jax.random.key(training.seed))[0], first)
    jax.block_until_ready(center)
    started = time.perf_counter() - before

    say(f"compiling for {len(devices)} devices")
    own = _Contestant(training, model, center, strategy, span, devices, training.batch_size)
    own.dispatch()  # which starts the threads
    rows = rows_a_dispatch(own.dispatch().ready * span.row_rounds * span.round_steps)
    own.rounds = min(rows * span.row_rounds, span.piece_rounds)
    steps = own.rounds * span.round_steps
    lonely = Strategy(steps, optax.identity(), inner=strategy.inner)
    alone = _Contestant(training, model, center, lonely, Span(0, steps, steps), devices, training.batch_size, own)
    half = None
    if training.batch_size % (2 * len(devices) * training.accumulate) == 0:
        half = _Contestant(training, model, center, strategy, span, devices, training.batch_size // 2, own)
    before = time.perf_counter()
    evaluate = _make_evaluation(training, model, center, own)
    compiled_evaluation = time.perf_counter() - before
    scaling = {len(devices): own}
    for count in _fewer(len(devices)):
        say(f"compiling for {count} of {len(devices)} devices")
        try:
            scaling[count] = _Contestant(training, model, center, strategy, span, devices[:count], training.batch_size)
        except InputError:
            continue  # a strategy, a batch or a partition that does not go with so few devices

    say("warming up")
    for contestant in (*([half] if half else []), *scaling.values()):
        contestant.rounds = own.rounds
        contestant.dispatch()
    alone.dispatch()
    evaluate()
    dispatched = own.dispatch().ready * steps
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
    if trace is not None:
        say("tracing")
        own.trace(trace)

    measured = {name: spread([turn[name] for turn in turns]) for name in turns[0]}
    return Profile(
        replicas=len(devices),
        cores=count_cores() if devices[0].platform == "cpu" else None,
        batch_size=training.batch_size,
        steps=training.steps,
        steps_per_dispatch=steps,
        steps_per_evaluation=span.stop - span.start,
        once={"start of the model": started, **own.once, "compile evaluation": compiled_evaluation},
        parts={part: measured[part] for part in PARTS},
        scaling={count: spread(loops[count]) for count in sorted(loops)},
        evaluation=measured["evaluation"],
        half_batch=measured.get("half"),
        turns=len(turns),
    )


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
        model: Model,
        center: tuple[PyTree, PyTree],
        strategy: Strategy,
        span: Span,
        devices: Sequence[jax.Device],
        batch_size: int,
        beside: "_Contestant | None" = None,
    ):
        self.devices, self._span, self.rounds = devices, span, span.row_rounds
        state.check(center[0], strategy, len(devices))
        self.batches, self._fresh = (_deal(training, len(devices), batch_size) for _ in range(2))
        self._inputs = self._draw()

        before = time.perf_counter()
        self._state = state.place(*center, training.optimizer, strategy, devices, training.ema_decay is not None)
        place = replica.replicate if self.batches.axis is None else replica.shard
        self.examples = place(self.batches.split, devices) if beside is None else beside.examples
        self.key = replica.replicate(jax.random.split(jax.random.key(training.seed))[1], devices)
        jax.block_until_ready((self._state, self.examples))
        placed = time.perf_counter()
        gradient = make_gradient(model, training.task, training.augment, training.accumulate)
        rounds = parallel_rounds(gradient, training.optimizer, strategy, devices, self.batches.axis, training.ema_decay)
        arguments = (self._state, self.examples, *next(self._inputs), self.key)
        ready = time.perf_counter()
        jax.eval_shape(rounds, *arguments)
        traced = time.perf_counter()
        lowered = rounds.lower(*arguments)
        is_lowered = time.perf_counter()
        self._run, self._look = replica.compiled(lowered, devices), make_look(devices, strategy)
        self.once = {
            "state and data on the devices": placed - before,
            "trace": traced - ready,
            "lower": is_lowered - traced,
            "compile": time.perf_counter() - is_lowered,
        }

    def dispatch(self) -> _Dispatch:
        """Runs the program once, its input there already."""
        drawn, steps = jax.block_until_ready(next(self._inputs)), self.rounds * self._span.round_steps
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
        return (time.perf_counter() - before) / (length * self.rounds * self._span.round_steps)

    def input(self, turn: int) -> float:
        """Makes the batches of a piece and puts them on the devices; returns the seconds that a step of it takes.

        Where the order is drawn for more steps than these, each of those bears its share of it.
        """
        drawn_steps, steps = self._fresh.steps_per_draw, self._span.piece_rounds * self._span.round_steps
        before = time.perf_counter()
        if drawn_steps > steps:
            self._fresh.draw(turn)
        drawn = time.perf_counter()
        start = turn * max(drawn_steps, steps)
        cut = index_blocks(self._fresh, self._span.round_steps, self._span.piece_rounds, start, start + steps)
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
        for indices, _ in index_blocks(self.batches, self._span.round_steps, self._span.piece_rounds, 0, sys.maxsize):
            indices, first = replica.shard(indices, self.devices), 0
            while first + self.rounds <= self._span.piece_rounds:
                yield indices, np.int32(first), np.int32(first + self.rounds)
                first += self.rounds

    def _advance(self, indices: jax.Array, first: np.int32, last: np.int32) -> Sums:
        self._state, sums = self._run(self._state, self.examples, indices, first, last, self.key)
        return sums


def _deal(training: Training, replicas: int, batch_size: int) -> Batches:
    partition = training.partition(replicas)
    inner_steps = max(1, training.strategy.inner_steps)
    return deal(training.data.train, replicas, batch_size, training.seed, partition, inner_steps)


def _make_evaluation(
    training: Training, model: Model, center: tuple[PyTree, PyTree], contestant: _Contestant
) -> Callable[[], float]:
    """Makes the function that evaluates as training does, and returns how many seconds that took."""
    devices, batches = contestant.devices, contestant.batches
    center = replica.replicate(center, devices)
    splits = [split for split in (training.data.validation, training.data.test) if split is not None]
    averages = [make_evaluate(model, training.task, split, devices, *center) for split in splits]
    reestimate = make_reestimate(model, devices, batches.axis)
    again = batches.steps(0, max(1, training.reestimate_batches)).swapaxes(0, 1)
    indices = replica.shard(np.ascontiguousarray(again), devices)

    def evaluate() -> float:
        before = time.perf_counter()
        params, model_state = center
        if training.reestimate_batches:
            model_state = reestimate(params, model_state, contestant.examples, indices, contestant.key)
        for average in averages:
            average(params, model_state)
        return time.perf_counter() - before

    return evaluate


def _fewer(devices: int) -> list[int]:
    """Counts 1, 2, 4, ... up to less than all devices."""
    return [2**power for power in range((devices - 1).bit_length())]
