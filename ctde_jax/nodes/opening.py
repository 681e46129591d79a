"""Opens the folder of a server: a new run, or one that continues from its newest checkpoint."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import jax
import numpy as np

from ctde_jax.checkpoint import CHECKPOINTS, METRICS, open_saver
from ctde_jax.data import Dataset
from ctde_jax.devices import replica
from ctde_jax.errors import InputError, check_at_least, check_at_most, check_whole
from ctde_jax.nodes.answers import Answers
from ctde_jax.nodes.center import Algorithm, Center, make_algorithm
from ctde_jax.nodes.federation import Federation
from ctde_jax.nodes.members import Members
from ctde_jax.nodes.server import Server, ServerState
from ctde_jax.rounds import make_evaluate, state
from ctde_jax.trainer import (
    AnyCallback,
    Best,
    Record,
    Saving,
    Stop,
    Training,
    claim,
    console,
    open_callbacks,
    open_log,
    prepare_folder,
)


@contextmanager
def open_server(
    federation: Federation,
    data: Dataset,
    saving: Saving,
    *,
    quorum: int | None = None,
    keep_answers: int = 200,
    options: Mapping[str, Any] | None = None,
    callbacks: Sequence[AnyCallback] = (),
    stop: Stop | None = None,
    show: bool = True,
) -> Iterator[Server]:
    """Opens a server, whose folder is locked until the body ends.

    Args:
        federation: The federation.
        data: Data set with the test split, on which the server evaluates.
        saving: Options of the files of the run; it needs a folder.
        quorum: Minimum number of messages in a round; by default, one from each of the
            federation's nodes.
        keep_answers: Number of rounds whose answers are kept for nodes that were away; a node that
            was away for longer receives the center itself.
        options: Options that the nodes receive, serializable as JSON; see `node.MakeSetup`.
        callbacks: Callbacks, as of `fit`.
        stop: Set if a callback stops the run.
        show: Whether to show progress.

    Raises:
        InputError: An argument is invalid, the strategy cannot run between nodes or with this
            quorum, or the folder is in use, cannot be written to or has another run.
    """
    quorum = federation.nodes if quorum is None else quorum
    check_whole(quorum=quorum, keep_answers=keep_answers)
    check_at_least(1, quorum=quorum, keep_answers=keep_answers)
    check_at_most(federation.nodes, quorum=quorum)
    if saving.folder is None:
        raise InputError("run_dir", "must be the folder of the server, got None.")
    training = federation.of_server(data)
    _check_quorum(training, quorum)

    # A lock on the folder, and the newest checkpoint of the same run.
    with ExitStack() as stack:
        notes = console(quiet=not show)
        found = stack.enter_context(claim(training, saving, notes.print))
        prepare_folder(saving, found, notes.print)
        kept = 0 if found.checkpoint is None else found.checkpoint.facts["rows"]
        log = stack.enter_context(open_log(training.total_steps, saving.folder, show, kept))
        algorithm = make_algorithm(training, federation.strategy, federation.nodes, log.say)
        begun, best = _begin(training, algorithm, found.checkpoint)

        # The record of the run, and what the server knows of its nodes.
        called = stack.enter_context(open_callbacks(callbacks, stop or Stop()))
        saver = stack.enter_context(
            open_saver(
                saving.folder / CHECKPOINTS,
                saving.keep_checkpoints,
                saving.choose(training),
                saving.folder / METRICS,
            )
        )
        record = Record(training, saving, found, best, log, saver, called)
        rounds = found.position.gone_through // federation.round_steps
        server = Server(
            federation,
            record,
            algorithm,
            begun,
            Members(saving.folder),
            Answers(saving.folder, keep_answers, rounds),
            _introduction(training, options),
            _make_evaluate(training, begun),
            quorum,
            log.say,
        )
        called("on_start", found.decided, log.rows)
        if found.is_new:
            server.save()
        yield server


def _check_quorum(training: Training, quorum: int) -> None:
    """Raises InputError if the rule of the strategy needs more messages than the quorum."""
    try:
        state.check(training.shapes_of_parts[0], training.strategy, quorum)
    except InputError as error:
        raise InputError("quorum", error.sentence.replace("devices", "nodes")) from error


def _begin(training: Training, algorithm: Algorithm, found) -> tuple[ServerState, Best]:
    """Returns the first state, or that of a checkpoint, and early stopping."""
    center = algorithm.begin()
    with algorithm.place():
        reducer = jax.device_get(algorithm.star.init_server(center.params))
    ema_params = center.params if training.ema_decay is not None else ()
    begun = ServerState(center, reducer, ema_params)
    best = Best(training.patience)
    if found is None:
        return begun, best
    best.restore(found, (center.params, center.model_state))
    like = begun.as_train_state(0)
    names = state.named(like)
    tensors = {name: tensor for name, tensor in found.tensors.items() if name in names}
    read = state.tree_from_tensors(tensors, like, "run_dir")
    center = Center(read.params, read.model_state, read.outer_state, read.frozen)
    return ServerState(center, read.reduce_state, read.ema_params), best


def _introduction(
    training: Training, options: Mapping[str, Any] | None
) -> tuple[Mapping[str, Any], list[bytes]]:
    """Returns header and arrays of the first request to a node.

    They are the meaning of inputs and labels, which the nodes adopt, and the options.
    """
    data = training.data
    arrays = [data.shift, data.scale, *(training.task.units or ())]
    arrays = [np.asarray(array) for array in arrays]
    header = {
        "kind": "join",
        "classes": data.classes,
        "vocabulary": data.vocabulary,
        "arrays": [[array.dtype.str, array.shape] for array in arrays],
        "options": options,
    }
    return header, [array.tobytes() for array in arrays]


def _make_evaluate(training: Training, begun: ServerState):
    """Makes the functions that evaluate a center on each split of the server."""
    devices = training.devices[:1]
    splits = {"validation": training.data.validation, "test": training.data.test}
    train_state = begun.as_train_state(0)
    params = state.evaluated_point(train_state, training.strategy)
    center = replica.replicate((params, begun.center.model_state), devices)

    def on_devices(split):
        evaluate = make_evaluate(training.raw_model, training.task, split, devices, *center)
        return lambda *center: evaluate(*replica.replicate(center, devices))

    return {name: on_devices(split) for name, split in splits.items() if split is not None}
