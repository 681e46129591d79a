"""The programs of a run, all compiled before its first step, so that a mistake costs seconds and not an epoch."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from ctde_jax.cost import Traffic, measure
from ctde_jax.devices import Program, PyTree, memory, replica
from ctde_jax.rounds import (
    Averages,
    Phase,
    Span,
    guard,
    make_evaluate,
    make_gradient_for,
    of_first_steps,
    parallel_rounds,
    state,
)
from ctde_jax.trainer.beginning import Beginning
from ctde_jax.trainer.training import Training


class PhaseProgram(NamedTuple):
    """The compiled rounds of a phase, and what is left of it."""

    phase: Phase
    spans: Sequence[Span]
    """The spans that are not finished."""

    train_rounds: Program
    look: Program
    """Adds up the sums of a dispatch over all replicas, and digests the state that it leaves."""

    shared: Sequence[str]
    """Names of the leaves that must be equal on all devices."""

    traffic: Traffic
    center_of: Callable[[state.TrainState], PyTree]
    """From a state to the central parameters to evaluate."""

    @property
    def begins(self) -> bool:
        """Whether the run goes over to this phase from the synchronous one before it."""
        return bool(self.spans) and self.spans[0].start == self.phase.start > 0


class Programs(NamedTuple):
    """Everything that the devices compute in a run."""

    phases: Sequence[PhaseProgram]
    evaluate: Mapping[str, Callable[[PyTree, PyTree], Averages]]
    """By split, validation first if there is one."""

    reestimate: Callable[[PyTree, PyTree], PyTree]
    """From central parameters and model state to the model state to evaluate them with."""


def compile_programs(
    training: Training, phases: Sequence[Phase], beginning: Beginning, gone_through: int
) -> Programs:
    """Compiles what a run computes from its first state on.

    Args:
        training: What determines the numbers.
        phases: Those that are not finished.
        beginning: The first state.
        gone_through: Steps that are done already.

    Raises:
        InputError: A program needs more memory than its devices have.
    """
    devices, source, model = training.devices, training.source, training.raw_model
    is_exact = training.strategy.exact
    strategy = training.strategy
    gradient = make_gradient_for(
        strategy, model, training.task, training.augment, training.accumulate
    )
    host_of_each = [device.process_index for device in devices]

    # Compile the rounds of each phase for the state that the phase before leaves.
    like, key = beginning.train_state, beginning.key
    programs: list[PhaseProgram] = []
    for phase in phases:
        if programs:
            like = phase.like_begun(like, devices)
        rounds = parallel_rounds(
            gradient,
            training.optimizer,
            phase.strategy,
            devices,
            source.axis,
            training.ema_decay,
            training.on_nonfinite == "skip",
        )
        piece = source.shapes(phase.spans[0])
        lowered = replica.lowered(rounds, like, *piece, np.int32(0), np.int32(0), key)
        look = guard.make_look(devices, phase.strategy)
        train_rounds = replica.compiled(lowered, devices, is_exact)
        memory.check_program(train_rounds, devices)
        text, inner_steps = train_rounds.as_text() or "", phase.strategy.inner_steps
        program = PhaseProgram(
            phase,
            phase.after(gone_through),
            train_rounds,
            replica.compiled(replica.lowered(look, lowered.out_info[1], like), devices),
            list(guard.shared(like, phase.strategy)),
            measure(text, inner_steps, host_of_each),
            phase.make_center(devices),
        )
        programs.append(program)

    # The splits are put on the devices once, and evaluated with parameters like the initial ones.
    center = replica.replicate(beginning.center, devices)
    splits = {"validation": training.data.validation, "test": training.data.test}
    evaluate = {
        name: make_evaluate(model, training.task, split, devices, *center)
        for name, split in splits.items()
        if split is not None
    }
    batches_used = training.reestimate_batches
    reestimate = of_first_steps(model, beginning.feed, devices, source.axis, batches_used, key)
    return Programs(programs, evaluate, reestimate)
