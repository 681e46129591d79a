"""What `fit` refuses, in sentences, before anything is computed or written."""

from functools import partial
from inspect import signature

import jax
import numpy as np
import optax

from ctde_jax import state
from ctde_jax.aggregate import Strategy
from ctde_jax.augment import Augment, apply_to
from ctde_jax.data import Dataset
from ctde_jax.errors import InputError, check_at_least, check_known, check_seed
from ctde_jax.gradient import SHARDS, check_exact_model
from ctde_jax.models import Model, with_raw_inputs
from ctde_jax.replica import PyTree
from ctde_jax.tasks import Task


def check_run(
    model: Model,
    data: Dataset,
    strategy: Strategy,
    task: Task,
    replicas: int,
    *,
    batch_size: int,
    seed: int,
    augment: Augment | None,
    accumulate: int,
    ema_decay: float | None,
    reestimate_batches: int,
    patience: int | None,
    eval_every: int | None,
    log_every: int,
    keep_best: str | None,
    save_every: int | None = None,
    keep_checkpoints: int = 1,
) -> None:
    """Raises InputError for arguments of `fit` that break a rule, before anything is computed or written."""
    check_types(task=task)
    check_seed(seed)
    check_at_least(1, accumulate=accumulate, patience=patience, eval_every=eval_every, log_every=log_every)
    check_at_least(1, save_every=save_every, keep_checkpoints=keep_checkpoints)
    check_at_least(0, reestimate_batches=reestimate_batches)
    if batch_size % (replicas * accumulate):
        own = batch_size // replicas
        rule = f"must cut the {own} examples that each device has of a batch into equal groups"
        raise InputError("accumulate", f"{rule}, got {accumulate}.")
    if strategy.is_exact:
        check_exact(replicas, batch_size, accumulate)
    if ema_decay is not None and not 0 <= ema_decay < 1:
        raise InputError("ema_decay", f"must be at least 0 and less than 1, got {ema_decay}.")
    if patience is not None and data.validation is None:
        raise InputError("patience", "needs data with a validation split (hold_out, or --validation-share).")
    if keep_best is not None:
        check_known("keep_best", keep_best, task.names)

    takes_mask, inputs = _takes_mask(model), data.train.inputs[:1]
    model = with_raw_inputs(model, data.shift, data.scale)
    key = jax.eval_shape(jax.random.key, 0)
    params, model_state = jax.eval_shape(model.init, key, inputs)
    state.check(params, strategy, replicas)
    if jax.tree.leaves(model_state) and not takes_mask:
        raise InputError(
            "model",
            "has a state, so its apply must take a fifth argument, mask=None: bool[examples], False for examples that "
            "only fill a short batch and must not count in the state; see models.Model.",
        )
    if strategy.is_exact:
        check_exact_model(model, params, model_state, inputs)
    outputs, _ = jax.eval_shape(model.apply, params, model_state, inputs, None)
    _check_outputs(outputs, data, task)
    if reestimate_batches and not jax.tree.leaves(model_state):
        raise InputError("reestimate_batches", "goes with a model that has batch statistics; leave it out.")
    if augment is not None:
        jax.eval_shape(partial(apply_to, augment), key, inputs, np.zeros(1, np.int32))


def _takes_mask(model: Model) -> bool:
    try:
        signature(model.apply).bind(*range(5))
    except TypeError:
        return False
    return True


def check_exact(replicas: int, batch_size: int, accumulate: int) -> None:
    """Raises InputError where a batch cannot be cut into the same shards on any number of devices."""
    if SHARDS % replicas:
        raise InputError("devices", f"must divide the {SHARDS} shards whose sum is exact, got {replicas}.")
    if batch_size % SHARDS:
        raise InputError(
            "batch_size", f"must be a multiple of the {SHARDS} shards whose sum is exact, got {batch_size}."
        )
    if accumulate > 1:
        raise InputError("accumulate", f"must be 1 where shards are computed one after another, got {accumulate}.")


_MADE_BY = {
    "model": (Model, "models.mlp(...), models.from_nnx(YourModule) or models.from_linen(YourModule())"),
    "data": (Dataset, "data.digits() or data.from_arrays(...)"),
    "optimizer": (optax.GradientTransformation, "optax, such as optax.adam(0.001)"),
    "strategy": (Strategy, "Strategy(...)"),
    "task": (Task, "Task(your_loss, {...})"),
}


def check_types(**arguments: object) -> None:
    """Raises InputError for an argument that is not what its name says, such as a module in place of a model."""
    for name, value in arguments.items():
        kind, maker = _MADE_BY[name]
        if not isinstance(value, kind):
            raise InputError(name, f"must be made by {maker}, got {type(value).__name__} {value!r:.60}.")


def _check_outputs(outputs: PyTree, data: Dataset, task: Task) -> None:
    """Raises InputError for a model that does not give the outputs for one example that the task predicts."""
    if task.predicts == "anything":
        return
    classes = len(data.vocabulary or data.classes)
    if task.predicts == "tokens":
        places, tokens = data.train.labels.shape[1:], classes or outputs.shape[-1]
        wanted, says = (1, *places, tokens), f"[examples, length, {tokens}], one for each token"
    elif classes:
        wanted, says = (1, classes), f"[examples, {classes}], one for each class"
    else:
        raise InputError("task", "must be a loss of your own where labels are neither classes nor a text.")
    if outputs.shape != wanted:
        raise InputError("model", f"must give outputs of the shape {says}, got {list(outputs.shape)} for one example.")
