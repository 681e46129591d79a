"""The programs of a run, which are all compiled before the first step.

An error in any of them is therefore reported before training starts.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np

from ctde_jax.cost import Traffic, measure
from ctde_jax.devices import Program, PyTree, memory, one_for_each, replica
from ctde_jax.rounds import (
    Averages,
    Phase,
    Span,
    digests,
    make_evaluate,
    make_gradient_for,
    of_first_steps,
    parallel_rounds,
    state,
)
from ctde_jax.trainer.beginning import Beginning
from ctde_jax.trainer.training import Training


class PhaseProgram(NamedTuple):
    """The compiled programs of a phase, and its unfinished spans."""

    phase: Phase
    spans: Sequence[Span]
    """The unfinished spans."""

    train_rounds: Program
    """Computes the rounds of a dispatch; see `rounds.parallel_rounds`."""

    digest: Program
    """Sums over the replicas and digests the state after a dispatch; see `rounds.make_digests`."""

    shared: Sequence[str]
    """Names of the leaves that must be equal on all devices."""

    traffic: Traffic
    """The collectives of a round with one replica on each device."""

    center_of: Callable[[state.TrainState], PyTree]
    """Function from a state to the central parameters to evaluate."""

    @property
    def begins(self) -> bool:
        """Whether the state must first be converted from that of the phase before this one."""
        return self.phase.begins_with(self.spans)

    @property
    def sent(self) -> float:
        """Bytes that each device sends per round."""
        return self.traffic.sent


class Programs(NamedTuple):
    """All programs that the devices run."""

    phases: Sequence[PhaseProgram]
    evaluate: Mapping[str, Callable[[PyTree, PyTree], Averages]]
    """Functions from parameters and model state to averages, by split: validation, then test."""

    reestimate: Callable[[PyTree, PyTree], PyTree]
    """Function from parameters and model state to the model state for their evaluation."""


def compile_programs(
    training: Training, phases: Sequence[Phase], beginning: Beginning, gone_through: int
) -> Programs:
    """Compiles the programs for the remaining steps of a run.

    Args:
        training: Model, data and all options that determine the result of the run.
        phases: The unfinished phases.
        beginning: The first state.
        gone_through: Number of steps that are already done; see `Position`.

    Raises:
        InputError: A program needs more memory than its devices have, or the bytes of its
            collectives cannot be determined.
    """
    devices = training.devices
    source = training.source
    model = training.raw_model
    is_exact = training.strategy.exact

    # Compile the rounds of each phase for the shapes and dtypes of its first state.
    like = beginning.train_state
    key = beginning.key
    programs: list[PhaseProgram] = []
    for phase in phases:
        if programs:
            like = phase.like_begun(like, devices)
        lowered = _lower_rounds(training, phase, like, key, devices)
        digest = digests.make_digests(devices, phase.strategy)
        train_rounds = replica.compiled(lowered, devices, is_exact)
        memory.check_program(train_rounds, devices)

        traffic = measure_traffic(training, phase, like, key, train_rounds)
        program = PhaseProgram(
            phase,
            phase.after(gone_through),
            train_rounds,
            replica.compiled(replica.lowered(digest, lowered.out_info[1], like), devices),
            list(digests.shared(like, phase.strategy)),
            traffic,
            phase.make_center(devices),
        )
        programs.append(program)

    # Put the splits on the devices once; evaluate parameters with the initial shapes and dtypes.
    center = replica.replicate(beginning.center, devices)
    splits = {"validation": training.data.validation, "test": training.data.test}
    evaluate = {
        name: make_evaluate(model, training.task, split, devices, *center)
        for name, split in splits.items()
        if split is not None
    }

    # Batch statistics are estimated over the first batches of the run, which are drawn here.
    batches_used = training.reestimate_batches
    reestimate = of_first_steps(model, beginning.feed, devices, source.axis, batches_used, key)
    return Programs(programs, evaluate, reestimate)


def _lower_rounds(
    training: Training,
    phase: Phase,
    like: state.TrainState,
    key: jax.Array,
    devices: Sequence[jax.Device],
) -> jax.stages.Lowered:
    """Lowers the rounds of a phase for these devices, one for each replica."""
    source = training.source
    strategy = training.strategy
    # The gradient is the same in all phases; each phase applies it by its strategy.
    gradient = make_gradient_for(
        strategy,
        training.raw_model,
        training.weighted_task,
        training.augment,
        training.accumulation_steps,
    )
    rounds = parallel_rounds(
        gradient,
        training.optimizer,
        phase.strategy,
        devices,
        source.axis,
        training.ema_decay,
        training.on_nonfinite == "skip",
    )
    # Lower for shapes alone: one piece, whose first and last round are arguments.
    piece = source.shapes(phase.spans[0])
    return replica.lowered(rounds, like, *piece, np.int32(0), np.int32(0), key)


def measure_traffic(
    training: Training,
    phase: Phase,
    like: state.TrainState,
    key: jax.Array,
    train_rounds: Program | None = None,
) -> Traffic:
    """Counts the bytes in the optimized HLO, as the compiler may change dtypes and collectives.

    Virtual replicas send nothing, so their bytes are those of the program for real devices.

    Args:
        training: Model, data and all options that determine the result of the run.
        phase: The phase whose rounds are measured.
        like: State of the phase; only shapes and dtypes are read.
        key: Key of the rounds; only its dtype is read.
        train_rounds: The compiled rounds, if each replica has a device.
    """
    devices = one_for_each(training.devices)
    if train_rounds is None or replica.is_virtual(training.devices):
        lowered = _lower_rounds(training, phase, like, key, devices)
        train_rounds = replica.compiled(lowered, devices)
    host_of_each = [device.process_index for device in training.devices]
    return measure(train_rounds.as_text() or "", phase.strategy.inner_steps, host_of_each)
