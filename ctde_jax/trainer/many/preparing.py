"""The first states of a family's runs on the devices, and the programs that advance them."""

from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import numpy as jnp

from ctde_jax.cost import Traffic, measure
from ctde_jax.data import Batches
from ctde_jax.devices import Program, PyTree, divide, memory, replica
from ctde_jax.errors import InputError, shortened
from ctde_jax.rounds import Phase, Resident, Span, make_phases, many, state, unfinished
from ctde_jax.trainer.beginning import compile_init, init_arguments, restored, train_key, warmed
from ctde_jax.trainer.best import Best
from ctde_jax.trainer.checks import check_examples_apart
from ctde_jax.trainer.claim import Found
from ctde_jax.trainer.many.family import Family
from ctde_jax.trainer.programs import measure_traffic
from ctde_jax.trainer.training import Training

Say = Callable[[Any], None]


class PhasePrograms(NamedTuple):
    """The compiled programs of a phase for all runs, and its unfinished spans; see `many`."""

    phase: Phase
    spans: Sequence[Span]
    change: Callable[[PyTree, state.TrainState], state.TrainState]
    train_rounds: Program
    evaluate: Program
    traffic: Traffic
    """The collectives of a round of a run with one replica on each device."""

    @property
    def begins(self) -> bool:
        """Whether the states must first be converted from those of the phase before this one."""
        return self.phase.begins_with(self.spans)


class Arrays(NamedTuple):
    """The arrays of the runs that do not change, on the devices."""

    numbers: dict[str, jax.Array]
    """The numbers in which the runs differ, `[run]` each."""

    keys: jax.Array
    """The keys of the runs, key[run]."""

    examples: PyTree
    """The training examples; without a run axis if they are equal in all runs."""

    parts: PyTree
    """The splits to evaluate by name, in batches; without a run axis if they are equal."""


class Prepared(NamedTuple):
    """The states of all runs on the devices, and the programs that advance them."""

    trainings: Sequence[Training]
    """The training of each run; copies of the first follow, to give each device equally many."""

    devices: Sequence[jax.Device]
    arrays: Arrays
    train_state: state.TrainState
    bests: Sequence[Best]
    """Early stopping of each run, with its progress if the run is resumed."""

    programs: Sequence[PhasePrograms]


def prepare(
    family: Family, found: Sequence[Found], devices: Sequence[jax.Device], say: Say
) -> Prepared:
    """Creates the first states of all runs, and compiles all programs.

    Args:
        family: The runs, all of which have gone through the same number of steps.
        found: The checkpoint from which each run continues, if there is one.
        devices: Devices over which the runs are divided.
        say: Prints a line or a table.

    Raises:
        InputError: The runs exceed the memory, or a checkpoint does not match the model.
    """
    # Each device has equally many runs, so copies of the first may follow the others.
    trainings = [variant.training for variant in family.variants]
    values = [variant.values for variant in family.variants]
    devices = replica.distinct(devices)
    padding = -len(trainings) % len(devices)
    trainings += trainings[:1] * padding
    values += values[:1] * padding

    # The phases of the first run are those of all. A piece has the indices of all runs.
    training = trainings[0]
    row_steps = family.variants[0].saving.row_steps(training)
    piece_steps = max(1, training.source.piece_steps // len(trainings))
    phases = make_phases(
        training.strategy, training.total_steps, training.interval, row_steps, piece_steps
    )
    gone_through = found[0].position.gone_through
    phases = unfinished(phases, gone_through)

    # Place what differs between runs. Examples that are equal in all runs are placed only once.
    # Python numbers stay weakly typed, so that they do not widen the state of an optimizer.
    numbers = {
        name: jnp.stack([jnp.asarray(each[name]) for each in values]) for name in family.names
    }
    splits, are_splits_shared = _stacked_splits(trainings)
    parts, are_parts_shared = _stacked_parts(trainings)
    arrays = Arrays(
        divide(numbers, devices),
        divide(jnp.stack([train_key(each) for each in trainings]), devices),
        (replica.replicate if are_splits_shared else divide)(splits, devices),
        (replica.replicate if are_parts_shared else divide)(parts, devices),
    )

    # Create the states, then compile the programs of each phase for the shapes of its first state.
    all_runs = [_runs(family, phase, devices) for phase in phases]
    train_state, bests = _begin(trainings, found, all_runs[0], arrays.numbers, say)
    programs: list[PhasePrograms] = []
    like = train_state
    for phase, before, runs in zip(phases, [all_runs[0], *all_runs], all_runs, strict=False):
        change = many.make_change(before, runs)
        if programs:
            like = change.lower(arrays.numbers, like).out_info
        train_rounds = _lower_rounds(training, phase, runs, like, arrays, are_splits_shared)
        evaluate = many.make_many_evaluate(runs, are_parts_shared)
        compiled_rounds = replica.compiled(train_rounds, devices)
        memory.check_program(compiled_rounds, devices)
        program = PhasePrograms(
            phase,
            phase.after(gone_through),
            change,
            compiled_rounds,
            replica.compiled(evaluate.lower(arrays.numbers, like, arrays.parts), devices),
            _measure_traffic(training, phase, like, arrays.keys, compiled_rounds),
        )
        programs.append(program)
    return Prepared(trainings, devices, arrays, train_state, bests, programs)


def _runs(family: Family, phase: Phase, devices: Sequence[jax.Device]) -> many.Runs:
    """Returns what the programs of a phase need to know of the runs."""
    training = family.variants[0].training

    def make(numbers: many.Numbers) -> many.Parts:
        try:
            parts = family.make(numbers)
        # Errors of JAX on traced numbers are TypeErrors, as are those of Python's functions. The
        # parts of each run were already made from its numbers, so the functions are sound.
        except TypeError as error:
            raise InputError(
                "sweep",
                "must contain numbers by which the functions of optimizer, strategy and task do "
                "not decide, and which they pass to functions of jax.numpy alone, as they are "
                f"called with traced numbers: {shortened(str(error))}",
            ) from error
        return parts._replace(strategy=parts.strategy.phases[phase.start])

    return many.Runs(
        training.raw_model,
        make,
        phase.strategy,
        devices,
        len(training.devices),
        training.ema_decay is not None,
    )


def _begin(
    trainings: Sequence[Training],
    found: Sequence[Found],
    runs: many.Runs,
    numbers: PyTree,
    say: Say,
) -> tuple[state.TrainState, list[Best]]:
    """Creates the first states of all runs on the devices.

    Args:
        trainings: The training of each run and of each padding run.
        found: The checkpoint from which each run continues, if there is one.
        runs: The runs in their first phase.
        numbers: The numbers of the runs on the devices.
        say: Prints a line or a table.
    """
    # Refuse too many runs, from shapes alone, before anything is allocated.
    training = trainings[0]
    traced = jax.jit(training.raw_model.init).trace(*init_arguments(training))
    shapes_of_params, shapes_of_state = traced.out_info
    trained, frozen = jax.eval_shape(training.divide, shapes_of_params)
    like = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct((len(trainings), *leaf.shape), leaf.dtype),
        (trained, shapes_of_state, frozen),
    )
    rows = np.zeros((len(trainings), runs.replicas), np.int32)
    lowered = many.make_create(runs).lower(numbers, rows, *like)
    memory.check_runs(lowered.out_info, trained, len(trainings), runs.devices)

    # Initialize one run after another by one program, so that each has the bits of a single run.
    init = compile_init(traced, training)
    centers: list[tuple[PyTree, PyTree]] = []
    for each in trainings[: len(found)]:
        params, model_state = init(*init_arguments(each))
        centers.append(warmed(each, params, model_state, _say_nothing if centers else say))
    params, model_state = centers[0]
    check_examples_apart(training.raw_model, params, model_state, training.data)

    # Create the states on the devices of the runs.
    centers += centers[:1] * (len(trainings) - len(found))
    divided = [
        (each.divide(params), model_state)
        for each, (params, model_state) in zip(trainings, centers, strict=True)
    ]
    (trained, frozen), model_state = _stack(divided)
    placed = divide((trained, model_state, frozen), runs.devices)
    create = replica.compiled(lowered, runs.devices)
    train_state = state.copied(create(numbers, rows, *placed))

    # Replace them by the states of the checkpoints.
    bests = [Best(each.patience) for each in trainings[: len(found)]]
    if any(each.checkpoint for each in found):
        on_first = [runs.devices[0]] * runs.replicas
        states = [jax.tree.map(itemgetter(place), train_state) for place in range(len(trainings))]
        for place, each in enumerate(found):
            if each.checkpoint is not None:
                bests[place].restore(each.checkpoint, centers[place])
                states[place] = restored(each.checkpoint, False, states[place], runs.like, on_first)
        stacked = _stack(jax.device_put(states, on_first[0]))
        train_state = state.copied(divide(stacked, runs.devices))
    return train_state, bests


def _lower_rounds(
    training: Training,
    phase: Phase,
    runs: many.Runs,
    like: state.TrainState,
    arrays: Arrays,
    is_shared: bool,
) -> jax.stages.Lowered:
    train_rounds = many.make_many_rounds(
        runs,
        training.source.axis,
        is_shared,
        training.augment,
        training.accumulation_steps,
        training.ema_decay,
        training.on_nonfinite == "skip",
        training.weigh,
    )
    count = len(arrays.keys)
    _, indices = training.source.shapes(phase.spans[0])
    return train_rounds.lower(
        arrays.numbers,
        np.zeros(count, bool),
        like,
        arrays.examples,
        jax.ShapeDtypeStruct((count, *indices.shape), indices.dtype),
        np.int32(0),
        np.int32(0),
        arrays.keys,
    )


def _measure_traffic(
    training: Training, phase: Phase, like: PyTree, keys: jax.Array, train_rounds: Program
) -> Traffic:
    """Counts the bytes of a round of one run, with one replica on each device."""
    # Without other replicas, nothing is sent, as the compiled program shows.
    if len(training.devices) == 1:
        return measure(train_rounds.as_text() or "", phase.strategy.inner_steps)
    of_one = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), like)
    return measure_traffic(training, phase, of_one, keys[0])


def _stacked_splits(trainings: Sequence[Training]) -> tuple[PyTree, bool]:
    """Returns the training examples, and whether they are equal in all runs.

    If not, they have a run axis.
    """
    splits = [batches_of(training).split for training in trainings]
    if all(split is splits[0] for split in splits):
        return splits[0], True
    return _stack(splits), False


def batches_of(training: Training) -> Batches:
    """Returns the order of the examples of a run whose training split is in memory."""
    assert isinstance(training.source, Resident)
    return training.source.batches


def _stacked_parts(trainings: Sequence[Training]) -> tuple[PyTree, bool]:
    """Returns the splits to evaluate in batches, and whether they are equal in all runs.

    If not, they have a run axis, and shorter splits are padded to the longest.
    """
    datasets = [training.data for training in trainings]
    unequal = {id(data): data for data in datasets}
    longest = {
        name: max((getattr(data, name) for data in unequal.values()), key=lambda it: len(it.labels))
        for name in ("validation", "test")
        if getattr(datasets[0], name) is not None
    }
    parts = {
        key: {name: many.in_batches(getattr(data, name), like) for name, like in longest.items()}
        for key, data in unequal.items()
    }
    if len(parts) == 1:
        return parts[id(datasets[0])], True
    return _stack([parts[id(data)] for data in datasets]), False


def _stack(trees: Sequence[PyTree]) -> PyTree:
    """Stacks trees of equal structure along a new first axis."""
    return jax.tree.map(lambda *leaves: _joined(leaves), *trees)


def _joined(leaves: Sequence[Any]) -> Any:
    # Numpy arrays stay on the host; jax stacks its own arrays, and keys.
    stack = np.stack if isinstance(leaves[0], np.ndarray) else jnp.stack
    return stack(leaves)


def _say_nothing(text: Any) -> None:
    pass
