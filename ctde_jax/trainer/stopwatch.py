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

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import optax

from ctde_jax.aggregate import Strategy
from ctde_jax.devices import PyTree, count_cores, replica
from ctde_jax.errors import InputError
from ctde_jax.rounds import Span, make_evaluate, make_reestimate
from ctde_jax.trainer.contestant import (
    Contestant,
    Spread,
    check_data,
    initialize,
    needs_turn,
    spread,
)
from ctde_jax.trainer.training import Training

PARTS = ("input", "dispatch", "compute", "aggregation")
"""The parts of a step, in the order in which they happen."""

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
        training: The training to measure, in the last phase of its strategy.
        partition: The partition of the training as a function of the number of devices.
        seconds: Approximate duration of all turns; there are at least 5 turns and at most 100.
        trace: Folder for a trace of a few dispatches, or None.
        say: Prints the stage of the measurement.

    Raises:
        InputError: The training data are not in memory.
    """
    check_data(training)
    phase = training.phases(training.log_every)[-1]
    strategy = phase.strategy
    span = phase.spans[0]

    # Time the initialization, compilation included, as a run does it once.
    before = time.perf_counter()
    center = initialize(training)
    started = time.perf_counter() - before

    # Compile the rounds.
    say(f"compiling for {len(training.devices)} devices")
    whole = Contestant(training, center, strategy, span)
    whole.size_dispatches()
    steps = whole.steps

    # Compile the evaluation.
    before = time.perf_counter()
    evaluate = _make_evaluation(training, center, whole)
    compiled_evaluation = time.perf_counter() - before

    # To compare with: the same steps without communication, half the batch size, fewer devices.
    without_reduction = Strategy(steps, optax.identity(), inner=strategy.inner)
    alone = Contestant(training, center, without_reduction, Span(0, steps, steps), whole.examples)
    half = None
    if training.batch_size % (2 * len(training.devices) * training.accumulation_steps) == 0:
        halved = replace(training, batch_size=training.batch_size // 2)
        half = Contestant(halved, center, strategy, span, whole.examples)
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
) -> dict[int, Contestant]:
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
        scaling[count] = Contestant(fewer, center, strategy, span)
    return scaling


def _take_turns(
    whole: Contestant,
    alone: Contestant,
    half: Contestant | None,
    scaling: dict[int, Contestant],
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
    length = whole.loop_length()

    # Every turn measures all contestants, so that a slow moment of the machine affects all of them.
    turns: list[dict[str, float]] = []
    loops: dict[int, list[float]] = {count: [] for count in scaling}
    ends = time.perf_counter() + seconds
    while needs_turn(len(turns), ends):
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


def _make_evaluation(
    training: Training, center: tuple[PyTree, PyTree], contestant: Contestant
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
