"""Any nnx module as a model."""

from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import cache, partial
from inspect import Parameter, isclass, signature
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from flax import nnx
from jax import numpy as jnp
from jax.core import Tracer

from ctde_jax.devices import PyTree
from ctde_jax.errors import InputError
from ctde_jax.models.base import KeyPath, Model, Recurrence, as_outputs
from ctde_jax.models.batch_statistics import BatchStatistics, Counted, Statistics, compute
from ctde_jax.models.modes import MODES, RANDOM, Modes, effect_of, find_modes, without_addresses
from ctde_jax.models.user_code import reported


class _Abstract(NamedTuple):
    """A module without its arrays."""

    graph: Any
    random_state: nnx.State
    """Shapes and types."""

    kind: type
    call: Callable[..., Any]
    """Its `__call__`, of which only the signature is read."""

    start: Callable[[int], PyTree] | None
    """Its method `start`, if it reads a sequence place by place."""


def from_nnx(
    module: Callable[..., nnx.Module] | nnx.Module,
    batch_statistics: BatchStatistics = "synchronized",
    *,
    train: Mapping[str, Any] = {},
    infer: Mapping[str, Any] = {},
) -> Model:
    """Makes a model of a function that builds an nnx module, such as `lambda rngs: MyNet(64, rngs=rngs)`.

    `nnx.Param` variables of floating-point numbers are parameters. Any other array is state: other variables, integer
    parameters, and arrays that are plain attributes. Whether the module trains is set by its methods `train` and
    `eval`, by its Boolean attributes of a known name, and by the argument that its `__call__` has for it; see
    `modes.find_modes`. What it sows is dropped: a loss that needs it takes it from the outputs.

    At every call of `Model.apply` the random streams of the module start again: the i-th of the n arrays of
    `nnx.state(module, nnx.RngState)`, in the order of `jax.tree.leaves`, becomes
    `jax.random.split(jax.random.split(key, n)[i], shape)` if it holds keys of this shape, and 0 if it is a
    count. A `__call__` that takes `rngs` is given `nnx.Rngs(key)`. In inference the key is `jax.random.key(0)`.

    A module that has the methods `start(examples) -> carry` and `step(carry, inputs) -> (outputs, carry)` also reads a
    sequence place by place.

    Args:
        module: A class or function that builds the module from random streams, `nnx.Rngs`. A module that is already
            built starts from its weights, whatever the seed; the module itself is not changed.
        batch_statistics: See `BatchStatistics`; a batch normalization with an `axis_name` of its own keeps that.
        train: Keyword arguments of `__call__` in training, for those whose meaning cannot be known.
        infer: The same in inference.

    Raises:
        InputError: It cannot be built from random streams alone. Later, from the functions of the model: the module
            raised an exception, or writes to what cannot change in training.
    """
    wrapped = _Wrapped(module, batch_statistics, Modes(train, infer))
    start = wrapped.abstract.start
    return Model(
        wrapped.init, wrapped.apply, wrapped.layers, start and Recurrence(start, wrapped.step)
    )


class _Wrapped:
    """The functions of a model that calls an nnx module.

    Args:
        module: Builds the module, or is one.
        batch_statistics: See `BatchStatistics`.
        given: The arguments of `__call__` that the user has given for both modes.
    """

    def __init__(self, module: Any, batch_statistics: BatchStatistics, given: Modes):
        self._make = _maker(module)
        self._batch_statistics: BatchStatistics = batch_statistics
        self._given = given
        self._calls: dict[Any, Modes] = {}
        self.abstract = _abstract(self._split_made, module)

    def init(self, key, inputs):
        _, params, _, model_state = self._split_made(key)
        return _pure(params), _pure(model_state)

    def apply(self, params, model_state, inputs, key, mask=None):
        call, training = self._find_call(inputs), key is not None
        key = jax.random.key(0) if key is None else key
        module = self.merge(params, model_state, key, training)
        if training:
            _count(module, Counted(mask, self._batch_statistics))
        attributes, raw_params = _attributes(module), _raw_params(module)
        arguments = call.train if training else call.infer
        with reported("model", "your module", inputs=inputs):
            outputs = as_outputs(module(inputs, **arguments, **self.random(key)))
        if not training:
            return outputs, model_state

        # What stays the same from step to step must not have changed.
        changed = _changed(attributes, _attributes(module))
        is_written = any(
            one is not other for one, other in zip(raw_params, _raw_params(module), strict=True)
        )
        if changed or is_written:
            like = jax.eval_shape(lambda *arrays: arrays, params, model_state, inputs)
            if changed:
                _check_attributes(self, changed, like, arguments)
            if is_written:
                _check_params(self, like, arguments)
        return outputs, _state_after(module, model_state)

    def layers(self, params, model_state, inputs):
        key = jax.random.key(0)
        module = self.merge(params, model_state, key, False)
        heard = _listen(module)
        module(inputs, **self._find_call(inputs).infer, **self.random(key))
        return heard

    def step(self, params, model_state, carry, inputs):
        module = self.merge(params, model_state, jax.random.key(0), False)
        outputs, carry = module.step(carry, inputs)
        return jnp.asarray(outputs, jnp.float32), optax.tree.cast(carry, jnp.float32)

    def merge(self, params, model_state, key, training: bool) -> Any:
        """Returns the module with these arrays, its random streams begun again, in training or inference mode."""
        streams = _reseed(self.abstract.random_state, key)
        params, model_state = jax.tree.map(_writable, (params, model_state))
        merged = nnx.merge(self.abstract.graph, params, streams, model_state)
        _set_mode(merged, training)
        return merged

    def random(self, key) -> dict[str, Any]:
        """Returns the random streams that `__call__` takes as an argument."""
        return _random(self.abstract.call, key)

    def _split_made(self, key):
        with reported("model", "the constructor of your module"):
            return _split(self._make(key))

    def _find_call(self, inputs) -> Modes:
        """Finds the arguments of `__call__` for inputs of this shape and dtype, once."""
        place = (jnp.shape(inputs)[1:], jnp.result_type(inputs))
        if place in self._calls:
            return self._calls[place]

        def effect(arguments):
            def run(key, model_state, inputs, params):
                merged = self.merge(params, model_state, key, True)
                outputs = merged(inputs, **arguments, **self.random(key))
                return outputs, _state_after(merged, model_state)

            like = jax.ShapeDtypeStruct(jnp.shape(inputs), place[1])
            params, model_state = jax.eval_shape(self.init, jax.eval_shape(jax.random.key, 0), like)
            return effect_of(run, model_state, like, params)

        call, name = self.abstract.call, self.abstract.kind.__name__
        self._calls[place] = find_modes(call, name, effect, self._given)
        return self._calls[place]


def _check_attributes(
    wrapped: _Wrapped, changed: Mapping[Any, Any], like: Any, arguments: Mapping[str, Any]
) -> None:
    """Raises InputError if the attributes that a call in training has changed change what a later call computes."""
    later = []

    def program(attributes) -> str:
        def run(params, model_state, inputs, key):
            merged = wrapped.merge(params, model_state, key, True)
            _set_attributes(merged, attributes)
            outputs = merged(inputs, **arguments, **wrapped.random(key))
            later.append(_changed(attributes, _attributes(merged)))
            return outputs, _pure(nnx.state(merged, is_trained))

        return without_addresses(str(jax.make_jaxpr(run)(*like, jax.eval_shape(jax.random.key, 0))))

    if program({}) != program(changed) or later[-1]:
        names = ", ".join(sorted(".".join(map(str, (*path, name))) for path, name in changed))
        raise InputError(
            "model",
            f"must not change {names} in __call__, as Python attributes do not follow compiled steps; make it an "
            "nnx.Variable that holds an array.",
        )


def _check_params(wrapped: _Wrapped, like: Any, arguments: Mapping[str, Any]) -> None:
    """Raises InputError if a call in training has written another value to a parameter."""

    def run(params, model_state, inputs, key):
        merged = wrapped.merge(params, model_state, key, True)
        merged(inputs, **arguments, **wrapped.random(key))
        return _pure(nnx.state(merged, is_trained))

    with jax.ensure_compile_time_eval():  # some transformations copy parameters, so values decide
        ramps, *rest = jax.tree.map(_ramp, like)
        written = jax.jit(run)(ramps, *rest, jax.random.key(0))
        is_same = jax.tree.map(lambda one, other: bool(jnp.array_equal(one, other)), ramps, written)
    names = [
        jax.tree_util.keystr(path, simple=True, separator=".")
        for path, same in _leaves(is_same)
        if not same
    ]
    if names:
        raise InputError(
            "model",
            f"must not write to its parameters in __call__, as it does to {names[0]} (nnx.SpectralNorm and "
            "nnx.WeightNorm do); compute what is written from the parameter instead, or use flax.linen's layer.",
        )


def _maker(module: Any) -> Callable[[jax.Array], nnx.Module]:
    """Returns the function from a key to the module; raises InputError if it needs more than random streams."""
    if isinstance(module, nnx.Module):
        built = nnx.clone(module)
        nnx.pop(built, nnx.Intermediate)
        return lambda key: built
    if not callable(module):
        raise InputError(
            "module", f"must be an nnx module, or a function that builds one, got {module!r:.60}."
        )
    name = getattr(module, "__name__", type(module).__name__)
    parameters = _parameters(module)
    required = [
        p
        for p in parameters
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    names, streams = [parameter.name for parameter in required], next(iter(required), None)
    takes_rngs = any(parameter.name == "rngs" for parameter in parameters)
    if len([other for other in names if other != "rngs"]) > (0 if takes_rngs else 1):
        arguments = ", ".join(f"{other}=..." for other in names if other != "rngs")
        raise InputError(
            "module",
            f"must be built from rngs alone, and {name} needs {', '.join(names)}: pass functools.partial({name}, "
            f"{arguments}), or lambda rngs: {name}(..., rngs=rngs).",
        )

    def make(key: jax.Array) -> nnx.Module:
        rngs = nnx.Rngs(key)
        if takes_rngs:
            made = module(rngs=rngs)
        elif streams is None:
            made = module()
        elif (
            streams.name in RANDOM
            and streams.name != "rngs"
            and "Rngs" not in str(streams.annotation)
        ):
            made = module(**{streams.name: rngs.params()})
        elif streams.kind == streams.KEYWORD_ONLY:
            made = module(**{streams.name: rngs})
        else:
            made = module(rngs)
        if not isinstance(made, nnx.Module):
            raise InputError(
                "module", f"must build an nnx module, and {name} returns {type(made).__name__}."
            )
        return made

    return make


def _parameters(function: Callable[..., Any]) -> list[Parameter]:
    """Returns the parameters of a function or class, of which nnx hides those of the constructor."""
    if isinstance(function, partial) and isclass(function.func):
        function = partial(function.func.__init__, None, *function.args, **function.keywords)
        return list(signature(function).parameters.values())
    if isclass(function):
        return list(signature(function.__init__).parameters.values())[1:]
    return list(signature(function).parameters.values())


def _abstract(split_made: Callable[[jax.Array], Any], module: Any) -> _Abstract:
    """Builds the module without computing its arrays."""
    if isinstance(module, nnx.Module):
        graph, params, random_state, model_state = split_made(jax.random.key(0))
    else:
        graphs = []

        def states_of(key):
            graph, *states = split_made(key)
            graphs.append(graph)
            return states

        params, random_state, model_state = jax.eval_shape(
            states_of, jax.eval_shape(jax.random.key, 0)
        )
        (graph,) = graphs
    merged: Any = nnx.merge(graph, params, random_state, model_state)
    kind: Any = type(merged)
    if not callable(merged):
        raise InputError("module", f"must have a method __call__, and {kind.__name__} has none.")
    start = getattr(merged, "start", None)
    is_stream = callable(getattr(kind, "start", None)) and callable(getattr(kind, "step", None))
    return _Abstract(graph, random_state, kind, merged.__call__, start if is_stream else None)


def is_trained(path: Any, value: Any) -> bool:
    """Returns whether a variable is a parameter that is differentiated; an nnx filter."""
    return isinstance(value, nnx.Param) and _is_a(value, jnp.inexact)


def is_random(path: Any, value: Any) -> bool:
    """Returns whether a variable is part of a random stream; an nnx filter."""
    return isinstance(value, nnx.RngState) or _is_a(value, jax.dtypes.prng_key)


def _is_a(value: Any, kind: Any) -> bool:
    value = value.get_value() if isinstance(value, nnx.Variable) else value
    dtypes = [jnp.result_type(leaf) for leaf in jax.tree.leaves(value)]
    return bool(dtypes) and all(jnp.issubdtype(dtype, kind) for dtype in dtypes)


def _split(module: nnx.Module) -> tuple[Any, nnx.State, nnx.State, nnx.State]:
    """Splits a module into its graph, its parameters, its random streams and its state."""
    for _, node in nnx.iter_graph(module):
        for name, value in vars(node).items() if isinstance(node, nnx.Pytree) else ():
            if isinstance(value, Tracer) and not node._pytree__nodes.get(name, True):
                setattr(
                    node, name, nnx.data(value)
                )  # flax takes an array for static where it is traced
            elif not node._pytree__nodes.get(name, False) and _hides_tracer(value):
                raise InputError(
                    "module",
                    f"must keep arrays where flax sees them, and the constructor of {type(node).__name__} keeps one "
                    f"inside {name}; make it an attribute or an nnx.Variable, or build the module first and pass that.",
                )
    graph, *states = nnx.split(module, is_trained, is_random, ...)
    params, random_state, model_state = states
    return graph, params, random_state, model_state


def _hides_tracer(value: Any, depth: int = 3) -> bool:
    """Whether a function, a container or an object contains an array of the trace that builds the module."""
    if isinstance(value, Tracer):
        return True
    if depth == 0 or isinstance(value, (nnx.Pytree, nnx.Variable, type)):
        return False
    parts: list[Any] = [cell.cell_contents for cell in getattr(value, "__closure__", None) or ()]
    if isinstance(value, partial):
        parts += [value.func, *value.args, *value.keywords.values()]
    if isinstance(value, (tuple, list)):
        parts += value
    parts += (value if isinstance(value, dict) else getattr(value, "__dict__", {})).values()
    return any(_hides_tracer(part, depth - 1) for part in parts)


def _writable(leaf: Any) -> Any:
    """Makes a JAX array of a numpy array, which a module could not write to by index."""
    return jnp.asarray(leaf) if isinstance(leaf, np.ndarray) else leaf


def _pure(state: nnx.State) -> dict[Any, Any]:
    return jax.tree.map(
        lambda leaf: jnp.asarray(leaf, jnp.result_type(leaf)), nnx.to_pure_dict(state)
    )


def _set_mode(module: nnx.Module, training: bool) -> None:
    """Sets the attributes of a module and its parts that say whether it trains."""
    module.train() if training else module.eval()
    for _, part in nnx.iter_modules(module):
        for name in MODES.keys() & vars(part).keys():
            if isinstance(getattr(part, name), bool):
                setattr(part, name, MODES[name] == training)


def _random(call: Callable[..., Any], key: jax.Array) -> dict[str, Any]:
    """Returns the random streams, or the key, for an argument of `__call__` that takes them."""
    given = {}
    for name, parameter in signature(call).parameters.items():
        if name == "rngs" or (name in RANDOM and "Rngs" in str(parameter.annotation)):
            given[name] = nnx.Rngs(key)
        elif name in RANDOM:
            given[name] = key
    return given


def _state_after(module: nnx.Module, before: PyTree) -> PyTree:
    """Returns the state after a step, with the structure and types that it had before.

    Raises:
        InputError: The step has made new state, other than what it sows.
    """
    *_, after = nnx.state(module, is_trained, is_random, nnx.Intermediate, ...)
    after = nnx.to_pure_dict(after)

    def pick(after: Any, before: Any, path: str) -> Any:
        if not isinstance(before, dict):
            return jnp.asarray(after, before.dtype)
        for name in after.keys() - before.keys():
            if not isinstance(after[name], tuple):  # which `sow` makes
                raise InputError(
                    "model",
                    f"must make its variables in the constructor, and {path}{name} is made in __call__; for what is "
                    "only reported, use a subclass of nnx.Intermediate.",
                )
        return {name: pick(after[name], before[name], f"{path}{name}/") for name in before}

    return pick(after, before, "")


def _attributes(module: nnx.Module) -> dict[tuple[KeyPath, str], Any]:
    """Returns the attributes that are not arrays, variables or modules, by the path of their owner and their name."""
    return {
        (path, name): value
        for path, node in nnx.iter_graph(module)
        if isinstance(node, nnx.Pytree)
        for name, value in vars(node).items()
        if not name.startswith("_pytree_") and not node._pytree__nodes.get(name, False)
    }


def _set_attributes(module: nnx.Module, attributes: Mapping[tuple[KeyPath, str], Any]) -> None:
    for path, node in list(nnx.iter_graph(module)):
        for (owner, name), value in attributes.items():
            if owner == path:
                is_array = isinstance(value, jax.Array)
                setattr(node, name, jnp.zeros(value.shape, value.dtype) if is_array else value)


def _changed(before: Mapping[Any, Any], after: Mapping[Any, Any]) -> dict[Any, Any]:
    """Returns the attributes that differ from those before."""

    def is_same(one: Any, other: Any) -> bool:
        if isinstance(one, jax.Array) and isinstance(other, jax.Array):
            return (one.shape, one.dtype) == (other.shape, other.dtype)
        return one is other or (
            type(one) is type(other) and not isinstance(one, jax.Array) and bool(one == other)
        )

    missing = object()
    return {
        place: value
        for place, value in after.items()
        if not is_same(before.get(place, missing), value)
    }


def _raw_params(module: nnx.Module) -> list[Any]:
    return [
        variable.get_raw_value() for _, variable in nnx.to_flat_state(nnx.state(module, is_trained))
    ]


def _ramp(like: jax.ShapeDtypeStruct) -> jax.Array:
    return jnp.linspace(0.5, 1.5, like.size).reshape(like.shape).astype(like.dtype)


def _leaves(tree: PyTree) -> list[tuple[Any, Any]]:
    return jax.tree_util.tree_leaves_with_path(tree)


class _CountedBatchNorm(nnx.BatchNorm):
    """Takes its statistics over the examples that count; the base of every batch normalization in training."""

    counted: Counted

    def __call__(self, x, use_running_average=None, *, mask=None):
        mode = self.use_running_average if use_running_average is None else use_running_average
        if mode is None or mode:  # in inference, or an error that flax reports
            return super().__call__(x, use_running_average, mask=mask)
        promote_dtype = self.promote_dtype

        def with_statistics_of_batch(arrays, dtype):
            x, _, _, scale, bias = promote_dtype(arrays, dtype=dtype)
            running = Statistics(self.mean[...], self.var[...])
            batch, updated = compute(self, x, running, self.counted, mask)
            self.mean[...], self.var[...] = updated
            return x, *batch, scale, bias

        self.promote_dtype = with_statistics_of_batch
        try:
            return super().__call__(x, use_running_average=True)
        finally:
            self.promote_dtype = promote_dtype


def _count(module: nnx.Module, counted: Counted) -> None:
    """Gives batch normalization in training the statistics of the examples that count."""
    for _, layer in nnx.iter_modules(module):
        if isinstance(layer, nnx.BatchNorm):
            layer.__class__ = _counted_kind(type(layer))
            layer.counted = counted  # pyright: ignore[reportAttributeAccessIssue]


@cache
def _counted_kind(kind: Any) -> type[nnx.BatchNorm]:
    """Puts `_CountedBatchNorm` between a subclass and `nnx.BatchNorm`, so that what the subclass does stays."""
    if kind is nnx.BatchNorm:
        return _CountedBatchNorm
    return type(kind)(kind.__name__, (kind, _CountedBatchNorm), {})


def _listen(module: nnx.Module) -> OrderedDict[KeyPath, jax.Array]:
    """Makes the layers of a module write down what they return; returns the dictionary into which they write."""
    heard = OrderedDict()

    def listening(kind: Any, path: KeyPath) -> Any:
        def call(self, *args, **kwargs):
            outputs = kind.__call__(self, *args, **kwargs)
            heard.setdefault(path, outputs)
            return outputs

        return type(kind)(kind.__name__, (kind,), {"__call__": call})

    parts = list(nnx.iter_modules(module))
    cells = {path for path, part in parts if isinstance(part, nnx.RNNCellBase)}
    for path, part in parts:
        in_cell = any(path[:depth] in cells for depth in range(len(path)))
        if isinstance(getattr(part, "kernel", None), nnx.Param) and not in_cell:
            part.__class__ = listening(type(part), path)
    return heard


def _reseed(random_state: nnx.State, key: jax.Array) -> nnx.State:
    """Gives every random stream of a module its own key, and sets its count to zero."""
    leaves, tree = jax.tree.flatten(random_state)
    keys = jax.random.split(key, max(1, len(leaves)))
    is_key = [jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) for leaf in leaves]
    fresh = [
        jax.random.split(keys[i], leaf.shape) if is_key[i] else jnp.zeros(leaf.shape, leaf.dtype)
        for i, leaf in enumerate(leaves)
    ]
    return jax.tree.unflatten(tree, fresh)
