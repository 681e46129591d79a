"""What a run trains: digests of its data and its program, which its checkpoints keep and later calls are compared with.

The program is digested in parts, so that a difference can be named. Each part is traced on shapes and dtypes alone, on
the replica axis, and nothing is compiled. A part has two digests: of what it is given, and of what it computes. If a
model has other parameters, its optimizer is given something else, and is not named as a second difference.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from importlib.metadata import version
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax import numpy as jnp

from ctde_jax.aggregate import Strategy, adapted
from ctde_jax.checkpoint.jaxprs import digest_of, digest_of_shapes
from ctde_jax.data import Augment, Dataset, apply_to, digests_of
from ctde_jax.devices import PyTree
from ctde_jax.errors import InputError
from ctde_jax.models import Model, Task

_TRACED_BY = ("ctde_jax", "jax", "flax", "optax", "numpy")
"""Packages whose versions change how the same program is traced."""

_PROBES = (0.1, 0.5, 1.0, 2.0, 5.0)
"""Losses at which a metric that is a function of the loss is compared."""

Part = tuple[str, str]
"""Digests of what a part of the program is given, and of what it computes."""


class Difference(NamedTuple):
    """How a run differs from that of a checkpoint."""

    data: list[str]
    """Names of the data that differ."""

    program: list[str]
    """Names of the parts of the program that differ."""

    notes: list[str]
    """What was not compared, and why."""


class Identity:
    """Digests of the data and the program of a run, made when they are first asked for.

    Args:
        data: The data set.
        partition: The indices of the examples of each device or client, if examples stay with one.
        trace: Digests the parts of the program, given the number of replicas; made with `parts_of`.
        replicas: The number of replicas of this run.
    """

    def __init__(
        self,
        data: Dataset,
        partition: Sequence[np.ndarray] | None,
        trace: Callable[[int], Mapping[str, Part]],
        replicas: int,
    ):
        self._data, self._partition, self._trace, self._replicas = data, partition, trace, replicas

    @cached_property
    def facts(self) -> dict[str, Any]:
        """What a checkpoint keeps, as JSON has it."""
        return {
            "data": digests_of(self._data, self._partition),
            "program": {name: [*part] for name, part in self._trace(self._replicas).items()},
            "replicas": self._replicas,
            "versions": _versions(),
        }

    def digests(self) -> dict[str, Any]:
        """Returns all digests by the name of what they are of, as hosts compare them."""
        return {**self.facts["data"], **self.facts["program"]}

    def compare(self, before: Mapping[str, Any] | None) -> Difference:
        """Compares with the facts of a checkpoint; None if it was written before there were any.

        The program is traced for the number of replicas that the checkpoint's was traced for, so that a run may be
        continued on another number of devices.
        """
        if before is None:
            return Difference([], [], ["data and program, of which the checkpoint has no digests"])
        notes = (
            ["the training batches, which arrive one after another"] if self._data.stream else []
        )
        data = differing(before["data"], self.facts["data"])
        others = {
            name: number
            for name, number in before["versions"].items()
            if number != _versions().get(name)
        }
        if others:
            there = ", ".join(f"{name} {number}" for name, number in others.items())
            here = ", ".join(f"{name} {_versions().get(name, 'not installed')}" for name in others)
            return Difference(
                data,
                [],
                [*notes, f"the program, which was traced by {there} and is now traced by {here}"],
            )
        program, unstable = self._compare_program(before, bool(data))
        return Difference(
            data,
            program,
            notes + [f"{name}, which is traced differently each time" for name in unstable],
        )

    def _compare_program(
        self, before: Mapping[str, Any], data_differ: bool
    ) -> tuple[list[str], list[str]]:
        """Names the parts that differ, and those of which two traces in this process already differ."""
        there = {name: tuple(part) for name, part in before["program"].items()}
        here = (
            self.facts["program"]
            if before["replicas"] == self._replicas
            else self._trace(before["replicas"])
        )
        here = {name: tuple(part) for name, part in here.items()}
        names = [
            name
            for name in (*there, *(name for name in here if name not in there))
            if there.get(name) != here.get(name)
        ]
        if not names:
            return [], []
        again = self._trace(
            before["replicas"]
        )  # one whose constants are drawn while it is traced has no digest
        unstable = [name for name in names if again.get(name) != here.get(name)]
        names = [name for name in names if name not in unstable]
        given_the_same = [
            name
            for name in names
            if name not in there or name not in here or there[name][0] == here[name][0]
        ]
        return (given_the_same if given_the_same or data_differ else names), unstable


def differing(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Names what has another digest, or is only in one of the two."""
    names = (*before, *(name for name in now if name not in before))
    return [name for name in names if before.get(name) != now.get(name)]


def is_identity(facts: object) -> bool:
    """Returns whether facts read from a manifest have the form of `Identity.facts`."""
    if not isinstance(facts, dict) or not isinstance(facts.get("replicas"), int):
        return False
    groups = [facts.get(name) for name in ("data", "program", "versions")]
    return all(isinstance(group, dict) for group in groups) and all(
        isinstance(part, list) and len(part) == 2 for part in facts["program"].values()
    )


def parts_of(
    model: Model,
    data: Dataset,
    task: Task,
    optimizer: optax.GradientTransformation,
    strategy: Strategy,
    augment: Augment | None,
    replicas: int,
) -> dict[str, Part]:
    """Traces the parts of a training program on one example, and digests each.

    Args:
        model: Before `with_raw_inputs`: shift and scale are data.
        data: Only shapes and dtypes are read.
        task: The loss and the metrics.
        optimizer: Of every step.
        strategy: How the replicas agree.
        augment: The augmentation, if there is one.
        replicas: The length of the replica axis.
    """
    key = jax.eval_shape(jax.random.key, 0)
    raw, labels = (jax.ShapeDtypeStruct((1, *array.shape[1:]), array.dtype) for array in data.train)
    inputs = jax.ShapeDtypeStruct(raw.shape, data.scale.dtype)
    params, model_state = jax.eval_shape(model.init, key, inputs)
    outputs, _ = jax.eval_shape(model.apply, params, model_state, inputs, None)
    number = jax.ShapeDtypeStruct((), jnp.float32)

    def train(params, model_state, inputs, key):
        return _differentiated(lambda params: model.apply(params, model_state, inputs, key), params)

    def infer(params, model_state, inputs):
        return model.apply(params, model_state, inputs, None)

    def lose(outputs, labels):
        def loss(outputs):
            measured = {"loss": task.loss(outputs, labels)}
            return task.minimized(outputs, labels, measured), measured

        return _differentiated(loss, outputs)

    def optimize(grads, params, value):
        whole = adapted(optimizer)
        opt_state = whole.init(params)
        return opt_state, whole.update(grads, opt_state, params, value=lambda: value)

    def digest(given: tuple[PyTree, ...], *programs: tuple[Any, ...]) -> Part:
        return digest_of_shapes(*given), "".join(
            digest_of(*each, replicas=replicas) for each in programs
        )

    center, predicted = (params, model_state), (outputs, labels)
    parts = {
        "the model": digest((inputs,), (train, *center, inputs, key), (infer, *center, inputs)),
        "the initialization": digest((inputs, center), (model.init, key, inputs)),
        "the loss": digest(predicted, (lose, *predicted)),
    }
    for name, metric in task.metrics.items():
        parts[f"the metric {name}"] = digest(predicted, (metric, *predicted))
    for name, function in task.of_the_loss.items():
        parts[f"the metric {name}"] = (
            digest_of_shapes(),
            repr([_probed(function, loss) for loss in _PROBES]),
        )
    parts["the optimizer"] = digest((params,), (optimize, params, params, number))
    try:
        agree = _agreement(strategy)
        parts["the strategy"] = digest((params,), (agree, params, params, number, key))
    except (
        InputError
    ) as error:  # it does not run on so many replicas, unlike that of the checkpoint
        parts["the strategy"] = digest_of_shapes(params), str(error)
    if augment is not None:
        numbers = jax.ShapeDtypeStruct((1,), jnp.int32)
        parts["the augmentation"] = digest(
            (raw,), (lambda *of: apply_to(augment, *of), key, raw, numbers)
        )
    return parts


def _agreement(strategy: Strategy) -> Callable[..., PyTree]:
    """Makes the function that a round computes of a replica's message, from the strategy's first state on."""
    reduce = optax.with_extra_args_support(strategy.reduce)
    inner = optax.with_extra_args_support(strategy.inner)

    def agree(message, params, weight, key):
        reduce_state, inner_state = reduce.init(params), inner.init(params)
        results = [
            strategy.diverges,
            reduce_state,
            reduce.update(message, reduce_state, params, weight=weight, key=key),
            inner_state,
            inner.update(message, inner_state, params, anchor=message),
        ]
        if strategy.inner_steps:
            outer = adapted(strategy.outer)
            outer_state = outer.init(params)
            results += [
                outer_state,
                outer.update(message, outer_state, params, value=lambda: weight),
            ]
        return results

    return agree


def _differentiated(
    function: Callable[[PyTree], tuple[PyTree, PyTree]], argument: PyTree
) -> PyTree:
    """Returns what a function computes, and the gradient of the sum of its first result's floating-point leaves."""

    def total(argument: PyTree) -> tuple[jax.Array, PyTree]:
        results = function(argument)
        leaves = [
            leaf for leaf in jax.tree.leaves(results[0]) if jnp.issubdtype(leaf.dtype, jnp.inexact)
        ]
        return sum((jnp.sum(leaf.real) for leaf in leaves), jnp.float32(0)), results

    grads, results = jax.grad(total, has_aux=True, allow_int=True)(argument)
    return results, [grad for grad in jax.tree.leaves(grads) if grad.dtype != jax.dtypes.float0]


def _probed(function: Callable[[float], float], loss: float) -> float | None:
    """Calls a function of the loss, which may have no value at this one."""
    try:
        return float(function(loss))
    except (ArithmeticError, ValueError):
        return None


def _versions() -> dict[str, str]:
    return {name: version(name) for name in _TRACED_BY}
