"""What `fit` refuses, in sentences, before anything is trained or written."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from inspect import signature
from typing import Any

import jax
import numpy as np
import optax
from jax.extend.core import jaxpr_as_fun

from ctde_jax.aggregate import Strategy, transformations
from ctde_jax.data import Augment, Dataset, apply_to, targets_or_classes
from ctde_jax.devices import AXIS, PyTree
from ctde_jax.errors import InputError
from ctde_jax.models import Model, Task, describe
from ctde_jax.rounds import exact, state


def check_network(
    model: Model,
    center: tuple[PyTree, PyTree],
    data: Dataset,
    task: Task,
    takes_mask: bool,
    reestimates: bool,
) -> None:
    """Raises InputError for a model whose state or outputs do not go with the data and the task.

    Everything is traced on shapes and dtypes alone.

    Args:
        model: Takes inputs as the data set stores them.
        center: Shapes and dtypes of its parameters and state.
        data: Training and test examples.
        task: The loss and the metrics.
        takes_mask: Whether the user's model takes the mask of real examples.
        reestimates: Whether batch statistics are estimated again before evaluations.
    """
    inputs = data.train.inputs[:1]
    key = jax.eval_shape(jax.random.key, 0)
    params, model_state = center
    has_state = bool(jax.tree.leaves(model_state))
    if has_state and not takes_mask:
        raise InputError(
            "model",
            "has a state, so its apply must take a fifth argument, mask=None: bool[examples], False for examples that "
            "only fill a short batch and must not count in the state; see models.Model.",
        )
    if reestimates and not has_state:
        raise InputError(
            "reestimate_batches", "goes with a model that has batch statistics; leave it out."
        )
    if not isinstance(task.metrics, Mapping) or not all(map(callable, task.metrics.values())):
        raise InputError(
            "task",
            f'must have metrics by name, such as {{"error": function}}, got {task.metrics!r:.60}.',
        )

    # Two batch sizes: a model may drop or merge the axis of examples, which one size alone does not show.
    for examples in (1, 2):
        few = _like(inputs, examples)
        outputs, _ = jax.eval_shape(model.apply, params, model_state, few, None)
        _check_outputs(outputs, examples, data, task)
        jax.eval_shape(model.apply, params, model_state, few, key)
    _check_task(task, outputs, data)


def check_strategy(
    model: Model, center: tuple[PyTree, PyTree], data: Dataset, strategy: Strategy, replicas: int
) -> None:
    """Raises InputError for a strategy that cannot run on this number of replicas, or not with this model."""
    params, model_state = center
    state.check(params, strategy, replicas)
    if strategy.exact:
        exact.check_model(model, params, model_state, data.train.inputs[:1])


def check_augment(augment: Augment, data: Dataset) -> None:
    """Raises what an augmentation raises for examples like these, which is traced on their shapes and dtypes."""
    key = jax.eval_shape(jax.random.key, 0)
    jax.eval_shape(partial(apply_to, augment), key, data.train.inputs[:1], np.zeros(1, np.int32))


def check_devices(devices: object) -> None:
    """Raises InputError for a number, or anything else that is no list of devices."""
    if devices is None or (
        isinstance(devices, Sequence) and all(hasattr(each, "platform") for each in devices)
    ):
        return
    way_out = (
        f"pass devices.start({devices})"
        if isinstance(devices, int)
        else "pass what devices.start() returns"
    )
    raise InputError("devices", f"must be a list of JAX devices, got {devices!r:.60}; {way_out}.")


def check_optimizer(
    optimizer: optax.GradientTransformation,
    strategy: Strategy,
    params: PyTree,
    replicas: int,
    averages: bool,
    rolls_back: bool,
) -> None:
    """Raises InputError for optimizers that do not work in a step, or not with other options.

    Args:
        optimizer: Of every step.
        strategy: Whose outer optimizer is checked, too.
        params: Of which only shapes and dtypes are read.
        replicas: The number of replicas.
        averages: Whether a moving average of the parameters is kept.
        rolls_back: Whether a run that is not finite continues with smaller updates.
    """

    def on_replicas(option: str, optimizer: optax.GradientTransformation) -> PyTree:
        trace = jax.vmap(
            partial(transformations.traced, optimizer, option=option),
            in_axes=None,
            axis_name=AXIS,
            axis_size=replicas,
        )
        return jax.eval_shape(trace, params)

    opt_state = on_replicas("optimizer", optimizer)
    outer_state = on_replicas("outer", strategy.outer)
    own = transformations.own_point(opt_state)
    if own and strategy.inner_steps:
        rule = f"must not be {own} in local steps: each replica would go back to a point of its own after the average"
        raise InputError(
            "optimizer", f"{rule}; aggregate at every step, or make it the outer optimizer."
        )
    option, own = ("optimizer", own) if own else ("outer", transformations.own_point(outer_state))
    if own and strategy.diverges:
        raise InputError(
            option, f"must not be {own} if replicas diverge, as no parameters are shared."
        )
    if averages and transformations.has_evaluated_point((opt_state, outer_state)):
        raise InputError(
            "ema_decay",
            f"must be left out with {own}, which is evaluated at a point of its own already.",
        )
    if own and rolls_back:
        rule = (
            f"must not be rollback with {own}: halved updates do not halve the steps of its point"
        )
        raise InputError("on_nonfinite", f"{rule}; use skip, or a lower learning rate.")


def takes_mask(model: Model) -> bool:
    """Returns whether a model takes the mask of real examples, its fifth argument."""
    try:
        signature(model.apply).bind(*range(5))
    except TypeError:
        return False
    return True


_MADE_BY = {
    "data": (Dataset, "data.digits() or data.from_arrays(...)"),
    "optimizer": (optax.GradientTransformation, "optax, such as optax.adam(0.001)"),
    "strategy": (Strategy, "Strategy(...)"),
    "task": (Task, "Task(your_loss, {...})"),
}


def check_types(**arguments: object) -> None:
    """Raises InputError for an argument that has the wrong type."""
    for name, value in arguments.items():
        kind, maker = _MADE_BY[name]
        is_like_multi_steps = (
            name == "optimizer" and not isinstance(value, type) and _has_init_and_update(value)
        )
        if not isinstance(value, kind) and not is_like_multi_steps:
            raise InputError(
                name, f"must be made by {maker}, got {type(value).__name__} {value!r:.60}."
            )


def _has_init_and_update(value: object) -> bool:
    """Returns whether an object can be called as `optax.MultiSteps` is, without being a transformation."""
    return all(callable(getattr(value, name, None)) for name in ("init", "update"))


def _like(array: Any, examples: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(
        (examples, *array.shape[1:]), jax.dtypes.canonicalize_dtype(array.dtype)
    )


def _check_task(task: Task, outputs: PyTree, data: Dataset) -> None:
    """Raises InputError for a task that fails on outputs and labels like these, or whose loss mixes examples.

    A loss mixes them if it broadcasts `[n, 1]` minus `[n]` to `[n, n]`, for example. That is tried on one trace of the
    loss, with random outputs `a, b`, then `a, a` and `b, b`: a loss that draws numbers as it is traced is no mixture.
    """

    def losses(outputs: PyTree, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
        measured = task.measure(outputs, labels)
        return measured["loss"], task.minimized(outputs, labels, measured)

    labels = jax.numpy.asarray(data.train.labels[:2])
    traced = jax.make_jaxpr(losses)(outputs, _like(data.train.labels, 2))
    if task.predicts != "anything" or len(labels) < 2:
        return
    rng = np.random.default_rng(0)
    drawn = jax.tree.map(lambda leaf: rng.normal(0.5, 0.2, leaf.shape).astype(leaf.dtype), outputs)
    evaluate = jaxpr_as_fun(traced)
    if _mixes(lambda *pair: evaluate(*jax.tree.leaves(pair)), drawn, labels):
        shapes = f"outputs {describe(outputs)} and labels {describe(labels)}"
        raise InputError(
            "task",
            "must compute the loss of each example from that example alone, but it mixes the examples of "
            f"{shapes}; give both the same shape, as outputs[..., 0] - labels does.",
        )


def check_examples_apart(model: Model, params: PyTree, model_state: PyTree, data: Dataset) -> None:
    """Raises InputError for a model whose outputs for one example depend on the others of the batch in inference.

    The averages of its evaluation would depend on the batch size. The check compiles the inference of two examples.

    Args:
        model: Takes inputs as they are stored.
        params: The initial parameters. Zeros, as in the kernel of a last layer, are replaced: they would hide the rest.
        model_state: The initial state.
        data: At least one training example.
    """

    @jax.jit
    def infer(params: PyTree, model_state: PyTree, inputs: jax.Array) -> PyTree:
        return model.apply(params, model_state, inputs, None)[0]

    # The second example is halved, as the maxima of two pictures are often equal; half a token is a token.
    few = np.asarray(data.train.inputs[:2])
    pair = np.stack([few[0], (few[-1] / 2).astype(few.dtype)])
    if _mixes(partial(infer, jax.tree.map(_nonzero, params), model_state), pair):
        raise InputError(
            "model",
            "must compute the outputs of each example from that example alone in inference, but they change with the "
            "other examples of the batch; in place of x - x.mean(0) or x / x.max(), normalize by constants or with "
            f"BatchNorm{', and give convolutions a channel axis, x[..., None]' if pair.ndim == 3 else ''}.",
        )


def _nonzero(leaf: jax.Array) -> jax.Array | np.ndarray:
    if np.asarray(leaf).any():
        return leaf
    return np.linspace(-0.1, 0.1, leaf.size).reshape(leaf.shape).astype(leaf.dtype)


def _mixes(function: Callable[..., PyTree], *pair: PyTree) -> bool:
    """Returns whether results for two examples `a, b` differ from those for `a, a` and `b, b`.

    The same row of the same program is compared, so rounding does not matter. Results without an axis of examples may
    differ.
    """
    together = jax.tree.leaves(function(*pair))
    for example in range(2):
        twice = np.full(2, example)
        alone = jax.tree.leaves(
            function(*jax.tree.map(lambda leaf, twice=twice: leaf[twice], pair))
        )
        for result, of_one in zip(together, alone, strict=True):
            if result.shape[:1] == (2,) and not _is_close(
                np.asarray(result)[example], np.asarray(of_one)[example]
            ):
                return True
    return False


def _is_close(one: np.ndarray, other: np.ndarray) -> bool:
    largest = np.abs(one[np.isfinite(one)]).max(initial=0)
    return np.allclose(one, other, rtol=0, atol=1e-3 * largest + 1e-6, equal_nan=True)


def _check_outputs(outputs: PyTree, examples: int, data: Dataset, task: Task) -> None:
    """Raises InputError if the outputs for so many examples are not what the task predicts."""
    got, count = describe(outputs), "one example" if examples == 1 else f"{examples} examples"
    if not any(leaf.shape[:1] == (examples,) for leaf in jax.tree.leaves(outputs)):
        raise InputError(
            "model",
            f"must return outputs for each example, [examples, ...], got {got} for {count}; batches have "
            "any size, so keep the first axis, as x.reshape(len(x), -1) does.",
        )
    if task.predicts == "anything":
        return
    if not hasattr(outputs, "shape"):
        raise InputError(
            "model",
            f"must return one array for a task that predicts {task.predicts}, got {got}; return the logits alone, or "
            "pass task=Task(lambda outputs, labels: ...).",
        )
    classes = len(data.vocabulary or data.classes)
    if task.predicts == "tokens":
        places, tokens = data.train.labels.shape[1:], classes or outputs.shape[-1]
        wanted, says = (
            (examples, *places, tokens),
            f"[examples, length, {tokens}], one for each token",
        )
    elif classes:
        wanted, says = (examples, classes), f"[examples, {classes}], one for each class"
    else:
        raise InputError(
            "task",
            f"must be a loss of your own for labels that are no classes; {targets_or_classes(data.train.labels)}.",
        )
    if outputs.shape != wanted:
        raise InputError(
            "model",
            f"must give outputs of the shape {says}, got {list(outputs.shape)} for {count}.",
        )
