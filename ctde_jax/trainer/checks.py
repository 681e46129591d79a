"""Checks of the arguments of `fit`, made before anything is trained or written."""

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
from ctde_jax.devices import AXIS, PyTree, replica
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
    """Checks that the model and the task are compatible with the data and with each other.

    The model is only traced. The loss of a user's task is also evaluated on two random outputs.

    Args:
        model: A model that takes inputs as the data set stores them.
        center: Pair of the parameters and the model state; only shapes and dtypes are read.
        data: Training and test examples.
        task: The loss and the metrics.
        takes_mask: Whether the user's model takes the mask of real examples.
        reestimates: Whether batch statistics are re-estimated before evaluations.

    Raises:
        InputError: The state or the outputs of the model are unsuitable, or the task fails on the
            outputs and labels.
    """
    # Trace abstractly: one example `[1, ...]`, a key[], parameters and state without values.
    inputs = data.train.inputs[:1]
    key = jax.eval_shape(jax.random.key, 0)
    params, model_state = center
    has_state = bool(jax.tree.leaves(model_state))

    # A stateful model must know which examples are padding; others have nothing to reestimate.
    if has_state and not takes_mask:
        raise InputError(
            "model",
            "has state, so its apply must take a fifth argument, mask=None: bool[examples], False "
            "for padding examples, which must not affect the state; see models.Model.",
        )
    if reestimates and not has_state:
        raise InputError(
            "reestimate_batches", "requires a model with batch statistics; set it to 0."
        )
    if not isinstance(task.metrics, Mapping) or not all(map(callable, task.metrics.values())):
        raise InputError(
            "task",
            "must have metrics that map names to functions, such as "
            f'{{"error": function}}, got {task.metrics!r:.60}.',
        )

    # Two batch sizes: one alone does not reveal a model that drops or merges the examples axis.
    # Each is traced without a key, as in inference, and with one, as in training.
    for examples in (1, 2):
        few = _like(inputs, examples)
        outputs, _ = jax.eval_shape(model.apply, params, model_state, few, None)
        _check_outputs(outputs, examples, data, task)
        jax.eval_shape(model.apply, params, model_state, few, key)
    _check_task(task, outputs, data)


def check_strategy(
    model: Model,
    center: tuple[PyTree, PyTree],
    trained: PyTree,
    data: Dataset,
    strategy: Strategy,
    replicas: int,
) -> None:
    """Checks that a strategy supports the number of replicas and the model.

    Args:
        model: A model that takes inputs as the data set stores them.
        center: Pair of the parameters and the model state; only shapes and dtypes are read.
        trained: The parameters that are trained and sent; only shapes and dtypes are read.
        data: Data set with at least one training example.
        strategy: Strategy to check.
        replicas: Number of replicas.

    Raises:
        InputError: The strategy does not support this number of replicas, or is exact and the model
            uses collectives.
    """
    params, model_state = center
    for each in strategy.phases.values():
        state.check(trained, each, replicas)
    if strategy.exact:
        exact.check_model(model, params, model_state, data.train.inputs[:1])


def check_augment(augment: Augment, data: Dataset) -> None:
    """Traces an augmentation on one training example, so that its errors are raised here."""
    key = jax.eval_shape(jax.random.key, 0)
    jax.eval_shape(partial(apply_to, augment), key, data.train.inputs[:1], np.zeros(1, np.int32))


def check_devices(devices: object) -> None:
    """Raises InputError unless `devices` is a sequence of JAX devices, one for each replica.

    Devices with several replicas must have the same number of them, in a row.
    """
    if (
        isinstance(devices, Sequence)
        and devices
        and all(hasattr(each, "platform") for each in devices)
    ):
        present = replica.distinct(devices)
        if list(devices) == list(np.repeat(present, len(devices) // len(present))):
            return
        raise InputError(
            "devices",
            "must contain every device equally often, in a row; pass the result of "
            f"devices.start(replicas=...), got {[device.id for device in devices]!r:.60}.",
        )

    # A number is a common mistake, so show the call that returns this number of devices.
    way_out = (
        f"pass devices.start({devices})"
        if isinstance(devices, int)
        else "pass the result of devices.start()"
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
    """Traces an update of the optimizer and of the outer optimizer, and checks their options.

    Args:
        optimizer: The optimizer of every step.
        strategy: The strategy, whose outer optimizer is checked as well.
        params: The parameters; only their shapes and dtypes are read.
        replicas: The number of replicas.
        averages: Whether a moving average of the parameters is kept (`ema_decay`).
        rolls_back: Whether `on_nonfinite` is `rollback`.

    Raises:
        InputError: An optimizer fails in a training step, or conflicts with the strategy, with
            `averages` or with `rolls_back`.
    """

    # Trace one update of each optimizer on the replica axis, as optimizers may use collectives.
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

    # Optimizers such as schedule_free compute the parameters from points in their state, which the
    # average over the replicas' parameters does not change.
    name = transformations.own_point(opt_state)
    if name and strategy.inner_steps:
        raise InputError(
            "optimizer",
            f"must not be {name} in local steps, because it computes parameters from points in its "
            "state, which averaging the parameters does not change; aggregate at every step, or "
            "use it as the outer optimizer.",
        )

    # Otherwise the outer optimizer may hold such points; the rules below apply to both.
    option, name = (
        ("optimizer", name) if name else ("outer", transformations.own_point(outer_state))
    )
    if name and strategy.diverges:
        raise InputError(
            option,
            f"must not be {name} if replicas diverge, because they share no parameters; use "
            "another optimizer.",
        )
    for part in (opt_state, outer_state):
        if averages and transformations.has_evaluated_point(part):
            raise InputError(
                "ema_decay",
                f"cannot be combined with {transformations.own_point(part)}, which is already "
                "evaluated at other parameters than it trains.",
            )
    if name and rolls_back:
        raise InputError(
            "on_nonfinite",
            f"must not be rollback with {name}, because halving its updates does not halve the "
            "changes of the points in its state; use skip, or a lower learning rate.",
        )


def takes_mask(model: Model) -> bool:
    """Returns whether `model.apply` takes a fifth argument, the mask of real examples."""
    # Bind five placeholders, as only the number of arguments matters.
    try:
        signature(model.apply).bind(*range(5))
    except TypeError:
        return False
    return True


_TYPES = {
    "data": (Dataset, "a Dataset, such as data.digits() or data.from_arrays(...)"),
    "optimizer": (
        optax.GradientTransformation,
        "an optax transformation, such as optax.adam(0.001)",
    ),
    "strategy": (Strategy, "a Strategy, such as Strategy(inner_steps=16) or strategy('diloco')"),
    "task": (Task, "a Task, such as Task(your_loss, {...}), or in fit its name"),
}
"""Type of each argument, and its description for errors."""


def check_types(**arguments: object) -> None:
    """Raises InputError for an argument of the wrong type; `_TYPES` lists the argument names.

    As an optimizer, any object with `init` and `update` is accepted, such as `optax.MultiSteps`.
    """
    for name, value in arguments.items():
        kind, wanted = _TYPES[name]
        # `optax.MultiSteps` has `init` and `update`, but is not a GradientTransformation.
        is_like_multi_steps = (
            name == "optimizer" and not isinstance(value, type) and _has_init_and_update(value)
        )
        if not isinstance(value, kind) and not is_like_multi_steps:
            raise InputError(name, f"must be {wanted}, got {type(value).__name__} {value!r:.60}.")


def _has_init_and_update(value: object) -> bool:
    """Returns whether an object can be called like `optax.MultiSteps`."""
    return all(callable(getattr(value, name, None)) for name in ("init", "update"))


def _like(array: Any, examples: int) -> jax.ShapeDtypeStruct:
    # JAX computes in the canonical dtype, such as float32 for float64, unless x64 is enabled.
    return jax.ShapeDtypeStruct(
        (examples, *array.shape[1:]), jax.dtypes.canonicalize_dtype(array.dtype)
    )


def _check_task(task: Task, outputs: PyTree, data: Dataset) -> None:
    """Checks that a task accepts the outputs, and that its loss does not mix examples.

    For example, a loss mixes examples if it broadcasts `[n, 1]` minus `[n]` to `[n, n]`. For a
    user's task, the check evaluates one trace of the loss on random outputs `a, b`, then on `a, a`
    and `b, b`. As there is only one trace, a loss that draws random numbers while it is traced is
    not reported.

    Args:
        task: The task.
        outputs: Shapes and dtypes of the model's outputs for two examples.
        data: Data set whose labels are used.

    Raises:
        InputError: The task fails, or its loss mixes examples.
    """

    def losses(outputs: PyTree, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
        measured = task.measure(outputs, labels)
        return measured["loss"], task.minimized(outputs, labels, measured)

    # The trace itself raises the task's errors. Values are needed only to find mixed examples.
    labels = jax.numpy.asarray(data.train.labels[:2])
    traced = jax.make_jaxpr(losses)(outputs, _like(data.train.labels, 2))
    if task.predicts != "anything" or len(labels) < 2:
        return

    # Random outputs, mostly between 0 and 1, where most losses are finite.
    rng = np.random.default_rng(0)
    drawn = jax.tree.map(lambda leaf: rng.normal(0.5, 0.2, leaf.shape).astype(leaf.dtype), outputs)
    evaluate = jaxpr_as_fun(traced)
    if _mixes(lambda *pair: evaluate(*jax.tree.leaves(pair)), drawn, labels):
        shapes = f"outputs {describe(outputs)} and labels {describe(labels)}"
        raise InputError(
            "task",
            "must compute the loss of each example from that example alone, but it mixes the "
            f"examples of {shapes}; make their shapes equal, as in outputs[..., 0] - labels.",
        )


def check_examples_apart(model: Model, params: PyTree, model_state: PyTree, data: Dataset) -> None:
    """Checks that outputs in inference do not depend on the other examples of a batch.

    Otherwise the averages of an evaluation would depend on the batch size. The check compiles the
    inference of two examples.

    Args:
        model: A model that takes inputs as the data set stores them.
        params: The initial parameters. Leaves of zeros, such as the kernel of a last layer, are
            replaced, because they could hide the dependence.
        model_state: The initial model state.
        data: A data set with at least one training example.

    Raises:
        InputError: The outputs of one example depend on the other one.
    """

    @jax.jit
    def infer(params: PyTree, model_state: PyTree, inputs: jax.Array) -> PyTree:
        return model.apply(params, model_state, inputs, None)[0]

    # Halve the second example: the maxima of two pictures are often equal. Half a token is a token.
    few = np.asarray(data.train.inputs[:2])
    pair = np.stack([few[0], (few[-1] / 2).astype(few.dtype)])
    if _mixes(partial(infer, jax.tree.map(_nonzero, params), model_state), pair):
        channels = ", and add a channel axis for convolutions, x[..., None]"
        raise InputError(
            "model",
            "must compute the outputs of each example from that example alone in inference, but "
            "they depend on the other examples of the batch; instead of x - x.mean(0) or "
            "x / x.max(), normalize by constants or with BatchNorm"
            f"{channels if pair.ndim == 3 else ''}.",
        )


def _nonzero(leaf: jax.Array) -> jax.Array | np.ndarray:
    if np.asarray(leaf).any():
        return leaf
    return np.linspace(-0.1, 0.1, leaf.size).reshape(leaf.shape).astype(leaf.dtype)


def _mixes(function: Callable[..., PyTree], *pair: PyTree) -> bool:
    """Returns whether the results for two examples `a, b` differ from those for `a, a` and `b, b`.

    The same row of the same program is compared, so rounding does not matter. Results without an
    axis of examples are not compared.

    Args:
        function: Function from a pair of examples to its results.
        *pair: Arguments, trees of arrays `[2, ...]`.
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
    # The tolerance is relative to the largest number, as single outputs may be close to zero.
    largest = np.abs(one[np.isfinite(one)]).max(initial=0)
    return np.allclose(one, other, rtol=0, atol=1e-3 * largest + 1e-6, equal_nan=True)


def _check_outputs(outputs: PyTree, examples: int, data: Dataset, task: Task) -> None:
    """Checks the shapes of a model's outputs.

    Args:
        outputs: Shapes and dtypes of the outputs.
        examples: Number of examples for which they were traced.
        data: Data set, whose labels determine the shape of logits.
        task: The task, which determines whether outputs must be logits.

    Raises:
        InputError: The outputs have no axis of examples, or not the shape that the task requires.
    """
    # Every task needs an output for each example, `[examples, ...]`.
    got = describe(outputs)
    count = "one example" if examples == 1 else f"{examples} examples"
    if not any(leaf.shape[:1] == (examples,) for leaf in jax.tree.leaves(outputs)):
        raise InputError(
            "model",
            f"must return outputs for each example, [examples, ...], got {got} for {count}; the "
            "batch size varies, so keep the first axis, as x.reshape(len(x), -1) does.",
        )
    if task.predicts == "anything":
        return

    # The other tasks need one array, of a shape that follows from the labels.
    if not hasattr(outputs, "shape"):
        raise InputError(
            "model",
            f"must return one array for a task that predicts {task.predicts}, got {got}; return "
            f"only {'predictions' if task.predicts == 'targets' else 'the logits'}, or pass "
            "task=Task(lambda outputs, labels: ...).",
        )
    classes = len(data.vocabulary or data.classes)
    if task.predicts == "targets":
        wanted = (examples, data.targets)
        axes = f"[examples, {data.targets}], one for each target"
    elif task.predicts == "tokens":
        places = data.train.labels.shape[1:]
        tokens = classes or outputs.shape[-1]
        wanted = (examples, *places, tokens)
        axes = f"[examples, length, {tokens}], one for each token"
    elif classes:
        wanted = (examples, classes)
        axes = f"[examples, {classes}], one for each class"
    else:
        raise InputError(
            "task",
            "must be 'regression' or Task(your_loss) if the labels are not classes; "
            f"{targets_or_classes(data.train.labels)}.",
        )
    if outputs.shape != wanted:
        raise InputError(
            "model",
            f"must return outputs of shape {axes}, got {list(outputs.shape)} for {count}.",
        )
