"""The first state of a run on its devices: initialized, loaded, resumed or branched off."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from ctde_jax.aggregate import Strategy, with_hyperparams_of
from ctde_jax.checkpoint import BEST, INPUTS, Checkpoint
from ctde_jax.devices import PyTree, hosts, memory, replica
from ctde_jax.rounds import Feed, Phase, state
from ctde_jax.trainer.best import Best
from ctde_jax.trainer.checks import check_examples_apart
from ctde_jax.trainer.claim import Found
from ctde_jax.trainer.training import Training
from ctde_jax.trainer.warm_start import note_on_meaning, start_from


class Beginning(NamedTuple):
    """The first state of a run, and the values that training needs to continue from it."""

    train_state: state.TrainState  # on the devices
    center: tuple[PyTree, PyTree]
    """Initial parameters and model state on the host, without a replica axis."""

    best: Best
    """Early stopping, with its progress if the run is resumed."""

    feed: Feed
    key: jax.Array  # key[], replicated


def begin(
    training: Training, phases: Sequence[Phase], found: Found, say: Callable[[Any], None]
) -> Beginning:
    """Creates the first state of a run on its devices.

    Args:
        training: Model, data and all options that determine the result of the run.
        phases: The unfinished phases; the state belongs to the first of them.
        found: The checkpoint from which the run continues, if there is one.
        say: Prints a line or a table.

    Raises:
        InputError: The state exceeds the memory, outputs of the model depend on other examples of a
            batch in inference, or the checkpoint or `init_from` does not match the model.
    """
    devices = training.devices
    strategy = phases[0].strategy
    keeps_average = training.ema_decay is not None

    # Refuse sizes that cannot fit, from shapes alone, before anything is allocated.
    traced = jax.jit(training.raw_model.init).trace(*init_arguments(training))
    shapes_of_params, shapes_of_state = traced.out_info
    trained, frozen = jax.eval_shape(training.divide, shapes_of_params)
    like = state.like_created(
        trained,
        shapes_of_state,
        training.optimizer,
        strategy,
        len(devices),
        keeps_average,
        frozen,
    )
    memory.check_training(like, state.axes(strategy), trained, devices)

    # Initialize on one device. A checkpoint needs that as well, for its shapes and dtypes.
    init = compile_init(traced, training)
    params, model_state = init(*init_arguments(training))
    if found.checkpoint is None:
        params, model_state = warmed(training, params, model_state, say)
        check_examples_apart(training.raw_model, params, model_state, training.data)

    # The parameters of host 0 are those of all hosts, bit for bit.
    params, model_state = hosts.arrays_of_the_first((params, model_state))

    # Put the state on the devices, and replace it by the state of the checkpoint.
    trained, frozen = training.divide(params)
    train_state = state.place(
        trained, model_state, training.optimizer, strategy, devices, keeps_average, frozen
    )
    best = Best(training.patience)
    if found.checkpoint is not None:
        train_state = restored(found.checkpoint, found.is_branch, train_state, strategy, devices)
        # A branch is a new run, so its early stopping starts without a best loss.
        if not found.is_branch:
            best.restore(found.checkpoint, (params, model_state))
    feed = training.source.feed(devices)
    return Beginning(
        train_state,
        (params, model_state),
        best,
        feed,
        replica.replicate(train_key(training), devices),
    )


def init_arguments(training: Training) -> tuple[jax.Array, np.ndarray]:
    """Returns the arguments of `Model.init`: a key, and the inputs of the first global batch."""
    return _keys(training)[0], training.source.inputs(0)


def train_key(training: Training) -> jax.Array:
    """Returns the key for all random numbers of the rounds, key[]."""
    return _keys(training)[1]


def _keys(training: Training) -> jax.Array:
    return jax.random.split(jax.random.key(training.seed))


def compile_init(traced: jax.stages.Traced, training: Training) -> replica.Program:
    """Compiles the trace of `Model.init` for one device."""
    return replica.compiled(traced.lower(), jax.local_devices()[:1], training.strategy.exact)


def warmed(
    training: Training, params: PyTree, model_state: PyTree, say: Callable[[Any], None]
) -> tuple[PyTree, PyTree]:
    """Replaces initialized parameters and model state by those of `init_from`, if it is given.

    Args:
        training: Model, data and all options that determine the result of the run.
        params: The initialized parameters.
        model_state: The initialized model state.
        say: Prints a line or a table.

    Raises:
        InputError: `init_from` does not match the model.
    """
    if training.given is not None:
        params, model_state, table = start_from(
            training.given, params, model_state, training.patterns
        )
        say(table)
        if note := note_on_meaning(training.given, training.data):
            say(note)
    # If the user passed the model of a `Trained` alone, its parameters are random all the same.
    elif training.model.unscaled is not None:
        say("start      random parameters; pass init_from=trained for those of a Trained")
    return params, model_state


def restored(
    checkpoint: Checkpoint,
    is_branch: bool,
    fresh: state.TrainState,
    strategy: Strategy,
    devices: Sequence[jax.Device],
) -> state.TrainState:
    """Returns the state of a checkpoint; a branch gets the hyperparameters of the new optimizer.

    Args:
        checkpoint: The checkpoint.
        is_branch: Whether the checkpoint belongs to another run.
        fresh: Initial state of this run on the devices.
        strategy: Strategy of the phase to which both states belong.
        devices: Devices, with one replica on each.

    Raises:
        InputError: The checkpoint does not match the initial state.
    """
    # The best parameters and the scaling of the inputs are stored beside the state.
    tensors = {
        name: tensor
        for name, tensor in checkpoint.tensors.items()
        if not name.startswith((BEST, INPUTS))
    }
    option = "branch_from" if is_branch else "run_dir"
    replicas = checkpoint.facts["replicas"]
    restored = state.from_tensors(tensors, fresh, strategy, replicas, devices, option)
    if not is_branch:
        return restored
    opt_state = with_hyperparams_of(fresh.opt_state, restored.opt_state)
    return restored._replace(opt_state=opt_state)
