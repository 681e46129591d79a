"""Digests of the data and the program of a run, stored in its checkpoints and compared on resume.

The program is digested in parts, so that a difference can be named. Each part is traced on shapes
and dtypes alone, on the replica axis; nothing is compiled. A part has two digests: one of its
inputs and one of its computation. If a model has other parameters, the inputs of its optimizer
differ as well, so the optimizer is not reported as a second difference.
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
"""Averages of the loss at which derived metrics are compared; the others are multiples of it."""

Part = tuple[str, str]
"""Digests of the inputs and of the computation of a part of the program."""


class Difference(NamedTuple):
    """Differences between a run and the run of a checkpoint."""

    data: list[str]
    """Names of the parts of the data that differ."""

    program: list[str]
    """Names of the parts of the program that differ."""

    notes: list[str]
    """Parts that were not compared, each with the reason."""


class Identity:
    """Digests of the data and the program of a run, computed on first use.

    Args:
        data: Data set.
        partition: Integer arrays with the example indices of each device or client; None if the
            examples are not partitioned.
        trace: Function from a number of replicas to the digests of the program for that number; see
            `parts_of`.
        replicas: Number of replicas of this run.
    """

    def __init__(
        self,
        data: Dataset,
        partition: Sequence[np.ndarray] | None,
        trace: Callable[[int], Mapping[str, Part]],
        replicas: int,
    ):
        self._data = data
        self._partition = partition
        self._trace = trace
        self._replicas = replicas

    @cached_property
    def facts(self) -> dict[str, Any]:
        """Values to store in a checkpoint; serializable as JSON."""
        return {
            "data": digests_of(self._data, self._partition),
            "program": {name: [*part] for name, part in self._trace(self._replicas).items()},
            "replicas": self._replicas,
            "versions": _versions(),
        }

    def digests(self) -> dict[str, Any]:
        """Returns the digests of data and program by name, which must be equal on all hosts."""
        return {**self.facts["data"], **self.facts["program"]}

    def compare(self, before: Mapping[str, Any] | None) -> Difference:
        """Compares this run with the `facts` of a checkpoint.

        The program is traced for the checkpoint's number of replicas, so that a run can continue on
        another number of devices.

        Args:
            before: Facts of the checkpoint; None if its version did not store them.
        """
        if before is None:
            return Difference([], [], ["data and program, as the checkpoint has no digests"])

        # Batches of a stream cannot be read in advance, so they have no digest.
        notes = ["the training batches, as a stream is read only once"] if self._data.stream else []
        data = differing(before["data"], self.facts["data"])

        # Jaxprs are comparable only if equal versions of these packages have traced them.
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
                [*notes, f"the program, traced with {there} in the checkpoint and {here} here"],
            )

        # The versions are equal, so the program is compared part by part.
        program, unstable = self._compare_program(before, bool(data))
        return Difference(
            data,
            program,
            notes + [f"{name}, as two traces of it differ" for name in unstable],
        )

    def _compare_program(
        self, before: Mapping[str, Any], data_differ: bool
    ) -> tuple[list[str], list[str]]:
        """Compares the program with that of a checkpoint part by part.

        Args:
            before: Facts of the checkpoint.
            data_differ: Whether the data differ, which explains differences in the program.

        Returns:
            The names of the parts that differ, and of those that cannot be compared, because two
            traces of them in this process differ.
        """
        # Both traces must be for the same number of replicas.
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

        # Trace a second time: a part that draws constants while it is traced has no stable digest.
        again = self._trace(before["replicas"])
        unstable = [name for name in names if again.get(name) != here.get(name)]
        names = [name for name in names if name not in unstable]

        # Report the causes: parts that differ though their inputs are the same. If there are none,
        # and the data do not explain the differences either, report all parts that differ.
        given_the_same = [
            name
            for name in names
            if name not in there or name not in here or there[name][0] == here[name][0]
        ]
        return (given_the_same if given_the_same or data_differ else names), unstable


def differing(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Returns the names whose digests differ or that are in only one of the two mappings."""
    names = (*before, *(name for name in now if name not in before))
    return [name for name in names if before.get(name) != now.get(name)]


def is_identity(facts: object) -> bool:
    """Returns whether facts from a manifest have the form of `Identity.facts`."""
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
    """Traces the parts of a training program on one example, and returns the digests of each.

    Args:
        model: The model before `with_raw_inputs`, as shift and scale belong to the data.
        data: Data set; only its shapes and dtypes are read.
        task: Loss and metrics.
        optimizer: Optimizer of each step.
        strategy: Strategy by which the replicas communicate.
        augment: Augmentation of the training examples, or None.
        replicas: Length of the replica axis.

    Returns:
        The digests by the name of the part, such as "the model".
    """
    # Shapes and dtypes of one example, and of parameters, state and outputs for it.
    key = jax.eval_shape(jax.random.key, 0)
    raw, labels = (
        jax.ShapeDtypeStruct((1, *array.shape[1:]), array.dtype)
        for array in (data.train.inputs, data.train.labels)
    )
    inputs = jax.ShapeDtypeStruct(raw.shape, data.scale.dtype)
    params, model_state = jax.eval_shape(model.init, key, inputs)
    outputs, _ = jax.eval_shape(model.apply, params, model_state, inputs, None)
    number = jax.ShapeDtypeStruct((), jnp.float32)

    # The functions that a step computes, with the gradients that it takes.
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

    # Model, loss and metrics. A derived metric cannot be traced, so it is evaluated instead.
    center = (params, model_state)
    predicted = (outputs, labels)
    parts = {
        "the model": digest((inputs,), (train, *center, inputs, key), (infer, *center, inputs)),
        "the initialization": digest((inputs, center), (model.init, key, inputs)),
        "the loss": digest(predicted, (lose, *predicted)),
    }
    for name, metric in task.metrics.items():
        parts[f"the metric {name}"] = digest(predicted, (metric, *predicted))
    if task.moments:
        parts["the moments of metrics"] = digest(
            predicted, *((moment, *predicted) for moment in task.moments.values())
        )
    for name, function in task.derived.items():
        parts[f"the metric {name}"] = (
            digest_of_shapes(),
            repr([_probed(function, task.summed, loss) for loss in _PROBES]),
        )

    # Optimizer, strategy and augmentation.
    parts["the optimizer"] = digest((params,), (optimize, params, params, number))
    try:
        agree = _agreement(strategy)
        parts["the strategy"] = digest((params,), (agree, params, params, number, key))
    except InputError as error:
        # The strategy does not support this number of replicas, unlike that of the checkpoint.
        parts["the strategy"] = digest_of_shapes(params), str(error)
    if augment is not None:
        numbers = jax.ShapeDtypeStruct((1,), jnp.int32)
        parts["the augmentation"] = digest(
            (raw,), (lambda *of: apply_to(augment, *of), key, raw, numbers)
        )
    return parts


def _agreement(strategy: Strategy) -> Callable[..., PyTree]:
    """Returns the function that applies the transformations of all phases to one message."""
    phases = [_agreement_of_phase(each) for each in strategy.phases.values()]
    return lambda *arguments: [agree(*arguments) for agree in phases]


def _agreement_of_phase(strategy: Strategy) -> Callable[..., PyTree]:
    """Returns the function that applies the transformations of a phase to one message.

    They are the reducer, `inner`, and, if there are local steps, the outer optimizer; each starts
    from its initial state.
    """
    # The outer optimizer is part of a round only if the round has local steps, and the reducer only
    # if the round is not exact.
    reduce = optax.with_extra_args_support(optax.identity() if strategy.exact else strategy.reduce)
    inner = optax.with_extra_args_support(strategy.inner)

    def agree(message, params, weight, key):
        reduce_state = reduce.init(params)
        inner_state = inner.init(params)
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
    """Returns the results of a function, and the gradient of the sum of floats in the first one."""

    def total(argument: PyTree) -> tuple[jax.Array, PyTree]:
        results = function(argument)
        leaves = [
            leaf for leaf in jax.tree.leaves(results[0]) if jnp.issubdtype(leaf.dtype, jnp.inexact)
        ]
        return sum((jnp.sum(leaf.real) for leaf in leaves), jnp.float32(0)), results

    # Integer arguments have gradients of dtype float0, which hold no numbers.
    grads, results = jax.grad(total, has_aux=True, allow_int=True)(argument)
    return results, [grad for grad in jax.tree.leaves(grads) if grad.dtype != jax.dtypes.float0]


def _probed(
    function: Callable[[Mapping[str, float]], float], names: Sequence[str], loss: float
) -> float | None:
    """Returns a derived metric, or None if it raises ArithmeticError or ValueError.

    The averages that it receives are the loss, twice the loss, and so on, in the order of `names`.
    """
    try:
        return float(function({name: loss * number for number, name in enumerate(names, start=1)}))
    except (ArithmeticError, ValueError):
        return None


def _versions() -> dict[str, str]:
    return {name: version(name) for name in _TRACED_BY}
