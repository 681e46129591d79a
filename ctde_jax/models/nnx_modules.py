"""Adapter from any nnx module to a `Model`."""

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
from ctde_jax.models.base import KeyPath, Model, Recurrence, are_arrays, as_outputs
from ctde_jax.models.batch_statistics import BatchStatistics, NormSettings, Statistics, compute
from ctde_jax.models.modes import MODES, RANDOM, Modes, effect_of, find_modes, without_addresses
from ctde_jax.models.user_code import reported


class _Abstract(NamedTuple):
    """A module without its arrays, from which calls rebuild it."""

    graph: Any
    random_state: nnx.State
    """The RNG streams, of which only shapes and dtypes are used."""

    kind: type
    call: Callable[..., Any]
    """The module's `__call__`, of which only the signature is used."""

    start: Callable[[int], PyTree] | None
    """The module's method `start`, if it can process a sequence position by position."""


def from_nnx(
    module: Callable[..., nnx.Module] | nnx.Module,
    batch_statistics: BatchStatistics = "synchronized",
    *,
    train: Mapping[str, Any] = {},
    infer: Mapping[str, Any] = {},
) -> Model:
    """Makes a model from an nnx module or a function such as `lambda rngs: MyNet(64, rngs=rngs)`.

    `nnx.Param` variables with a floating-point dtype are parameters. All other arrays are model
    state: other variables, integer parameters, and arrays that are plain attributes. The mode,
    training or inference, is set by the module's methods `train` and `eval`, by its Boolean
    attributes with a known name, and by the mode argument of its `__call__`; see
    `modes.find_modes`. Sown values are dropped; if a loss needs them, return them as outputs.

    Every call of `Model.apply` resets the RNG streams of the module. If
    `nnx.state(module, nnx.RngState)` has n arrays in the order of `jax.tree.leaves`, the i-th array
    becomes `jax.random.split(jax.random.split(key, n)[i], shape)` if it holds keys of this shape,
    and 0 if it is a count. If `__call__` takes `rngs`, it receives `nnx.Rngs(key)`. In inference
    the key is `jax.random.key(0)`.

    If the module has the methods `start(examples) -> carry` and
    `step(carry, inputs) -> (outputs, carry)`, the model can also process a sequence position by
    position.

    Args:
        module: Class or function that builds the module from RNG streams, `nnx.Rngs`. If it is a
            module instance, every seed starts from the weights of the instance, which itself is not
            changed.
        batch_statistics: See `BatchStatistics`; a batch normalization with an `axis_name` takes its
            statistics over that axis instead.
        train: Keyword arguments to pass to `__call__` in training, if their meaning cannot be
            inferred.
        infer: The same arguments with their values in inference.

    Raises:
        InputError: If the module cannot be built from RNG streams alone. The functions of the
            model raise it if the module raises an exception, or if it writes to parameters or
            attributes that must not change in training.

    Examples:
        >>> model = ctde.models.from_nnx(lambda rngs: nnx.Linear(4, 3, rngs=rngs))
        >>> inputs = np.ones((5, 4), np.float32)
        >>> params, model_state = model.init(jax.random.key(0), inputs)
        >>> outputs, _ = model.apply(params, model_state, inputs, None)
        >>> outputs.shape
        (5, 3)
    """
    wrapped = NnxAdapter(module, batch_statistics, Modes(train, infer))
    start = wrapped.abstract.start
    return Model(
        wrapped.init, wrapped.apply, wrapped.layers, start and Recurrence(start, wrapped.step)
    )


class NnxAdapter:
    """The functions of a model that calls an nnx module.

    Args:
        module: The module, or a class or function that builds it.
        batch_statistics: See `BatchStatistics`.
        given: Arguments `train` and `infer` of `from_nnx`.
    """

    def __init__(self, module: Any, batch_statistics: BatchStatistics, given: Modes):
        self._make = _maker(module)
        self._batch_statistics: BatchStatistics = batch_statistics
        self._given = given
        self._calls: dict[Any, Modes] = {}
        self.abstract = _abstract(self._split_made, module)

    def init(self, key, inputs):
        """See `Model.init`."""
        _, params, _, model_state = self._split_made(key)
        return _pure(params), _pure(model_state)

    def apply(self, params, model_state, inputs, key, mask=None):
        """See `Model.apply`."""
        # Build the module of this call; in inference a fixed key makes the outputs deterministic.
        call = self._find_call(inputs)
        training = key is not None
        key = jax.random.key(0) if key is None else key
        module = self.merge(params, model_state, key, training)
        if training:
            _replace_norms(module, NormSettings(mask, self._batch_statistics))

        # An nnx module changes in place, so record its attributes and parameters before the call.
        attributes = _attributes(module)
        raw_params = _raw_params(module)
        arguments = call.train if training else call.infer
        with reported("model", "your module", inputs=inputs):
            outputs = as_outputs(module(inputs, **arguments, **self.random(key)))
        if not training:
            return outputs, model_state

        # Attributes and parameters must not change in a step. Compare cheaply first, as the full
        # checks trace the module again.
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

    def module(self, params: PyTree, model_state: PyTree) -> nnx.Module:
        """Rebuilds the module in inference mode, with these arrays and the streams of key 0."""
        return self.merge(params, model_state, jax.random.key(0), False)

    def layers(self, params, model_state, inputs):
        """See `Model.layers`."""
        key = jax.random.key(0)
        module = self.merge(params, model_state, key, False)
        recorded = _record_outputs(module)  # empty until the module is called
        module(inputs, **self._find_call(inputs).infer, **self.random(key))
        return recorded

    def step(self, params, model_state, carry, inputs):
        """See `Recurrence.step`."""
        module = self.merge(params, model_state, jax.random.key(0), False)
        outputs, carry = module.step(carry, inputs)
        # The carry keeps the float32 of `start`, even if the model computes in bfloat16.
        return jnp.asarray(outputs, jnp.float32), optax.tree.cast(carry, jnp.float32)

    def merge(self, params, model_state, key, training: bool) -> Any:
        """Rebuilds the module with these arrays and reset RNG streams, in training or inference."""
        streams = _reseed(self.abstract.random_state, key)
        params, model_state = jax.tree.map(_writable, (params, model_state))
        merged = nnx.merge(self.abstract.graph, params, streams, model_state)
        _set_mode(merged, training)
        return merged

    def random(self, key) -> dict[str, Any]:
        """Returns the RNG streams and keys that `__call__` takes as arguments, by name."""
        return _random(self.abstract.call, key)

    def _split_made(self, key):
        with reported("model", "the constructor of your module"):
            return _split(self._make(key))

    def _find_call(self, inputs) -> Modes:
        """Returns the mode arguments of `__call__` for inputs of this shape and dtype.

        The result is cached.
        """
        # The number of examples is left out of the key, as it does not change the modes.
        place = (jnp.shape(inputs)[1:], jnp.result_type(inputs))
        if place in self._calls:
            return self._calls[place]

        # The arguments of `run` have the order that `effect_of` expects.
        def effect(arguments):
            def run(key, model_state, inputs, params):
                merged = self.merge(params, model_state, key, True)
                outputs = merged(inputs, **arguments, **self.random(key))
                return outputs, _state_after(merged, model_state)

            like = jax.ShapeDtypeStruct(jnp.shape(inputs), place[1])
            params, model_state = jax.eval_shape(self.init, jax.eval_shape(jax.random.key, 0), like)
            return effect_of(run, model_state, like, params)

        call = self.abstract.call
        name = self.abstract.kind.__name__
        self._calls[place] = find_modes(call, name, effect, self._given)
        return self._calls[place]


def _check_attributes(
    wrapped: NnxAdapter, changed: Mapping[Any, Any], like: Any, arguments: Mapping[str, Any]
) -> None:
    """Raises InputError if attributes that a training step has changed alter later steps.

    Args:
        wrapped: The functions of the model.
        changed: New values of the attributes, by owner's path and name.
        like: Shapes and dtypes of the parameters, the model state and the inputs.
        arguments: Mode arguments of `__call__` in training.
    """
    later = []

    def program(attributes) -> str:
        # A training step of the module with these attributes, as a printed jaxpr.
        def run(params, model_state, inputs, key):
            merged = wrapped.merge(params, model_state, key, True)
            _set_attributes(merged, attributes)
            before = _attributes(merged)
            outputs = merged(inputs, **arguments, **wrapped.random(key))
            later.append(_changed(before, _attributes(merged)))
            params = _pure(nnx.state(merged, is_trained))
            return outputs, params, _state_after(merged, model_state)

        return without_addresses(str(jax.make_jaxpr(run)(*like, jax.eval_shape(jax.random.key, 0))))

    if program({}) != program(changed) or later[-1]:
        names = ", ".join(sorted(".".join(map(str, (*path, name))) for path, name in changed))
        raise InputError(
            "model",
            f"must not change {names} in __call__, because a compiled step does not update Python "
            "attributes; make it an nnx.Variable that holds an array.",
        )


def _check_params(wrapped: NnxAdapter, like: Any, arguments: Mapping[str, Any]) -> None:
    """Raises InputError if a call in training writes a different value to a parameter.

    The arguments are those of `_check_attributes`.
    """

    def run(params, model_state, inputs, key):
        merged = wrapped.merge(params, model_state, key, True)
        merged(inputs, **arguments, **wrapped.random(key))
        return _pure(nnx.state(merged, is_trained))

    # Some nnx transformations copy parameters, so a different array may have equal values: compare
    # values. The caller is usually being traced, hence the evaluation at compile time.
    with jax.ensure_compile_time_eval():
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
            f"must not write to its parameters in __call__, but it writes to {names[0]}, as "
            "nnx.SpectralNorm and nnx.WeightNorm do; compute the new value without storing it, or "
            "use the layer of flax.linen.",
        )


def _maker(module: Any) -> Callable[[jax.Array], nnx.Module]:
    """Returns a function from a key to the module.

    Raises:
        InputError: If the module cannot be built from RNG streams alone.
    """
    # A clone keeps the current weights if the caller changes the instance later. Values that
    # earlier calls have sown are not state.
    if isinstance(module, nnx.Module):
        built = nnx.clone(module)
        nnx.pop(built, nnx.Intermediate)
        return lambda key: built
    if not callable(module):
        raise InputError(
            "module", f"must be an nnx module, or a function that builds one, got {module!r:.60}."
        )

    # A class or function may require `rngs`, or one argument of any name, which then receives the
    # RNG streams or a key.
    name = getattr(module, "__name__", type(module).__name__)
    parameters = _parameters(module)
    required = [
        p
        for p in parameters
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    names = [parameter.name for parameter in required]
    streams = next(iter(required), None)
    takes_rngs = any(parameter.name == "rngs" for parameter in parameters)
    if len([other for other in names if other != "rngs"]) > (0 if takes_rngs else 1):
        arguments = ", ".join(f"{other}=..." for other in names if other != "rngs")
        raise InputError(
            "module",
            f"must require no arguments but rngs, but {name} requires {', '.join(names)}; pass "
            f"functools.partial({name}, {arguments}), or lambda rngs: {name}(..., rngs=rngs).",
        )

    # A required argument with a name of `RANDOM`, except `rngs`, receives a key, unless it is
    # annotated as nnx.Rngs.
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
                "module", f"must build an nnx module, but {name} returns {type(made).__name__}."
            )
        return made

    return make


def _parameters(function: Callable[..., Any]) -> list[Parameter]:
    """Returns the parameters of a function, or of the constructor of a class, which nnx hides."""
    if isinstance(function, partial) and isclass(function.func):
        # None takes the place of `self`.
        function = partial(function.func.__init__, None, *function.args, **function.keywords)
        return list(signature(function).parameters.values())
    if isclass(function):
        return list(signature(function.__init__).parameters.values())[1:]
    return list(signature(function).parameters.values())


def _abstract(split_made: Callable[[jax.Array], Any], module: Any) -> _Abstract:
    """Builds the module abstractly, without computing its arrays."""
    if isinstance(module, nnx.Module):
        graph, params, random_state, model_state = split_made(jax.random.key(0))
    else:
        # `eval_shape` returns only shapes, so the graph leaves the traced function in a list.
        graphs = []

        def states_of(key):
            graph, *states = split_made(key)
            graphs.append(graph)
            return states

        params, random_state, model_state = jax.eval_shape(
            states_of, jax.eval_shape(jax.random.key, 0)
        )
        (graph,) = graphs

    # `start` is bound to a module that may hold shapes only, so it must not read parameters.
    merged: Any = nnx.merge(graph, params, random_state, model_state)
    kind: Any = type(merged)
    if not callable(merged):
        raise InputError("module", f"must have a method __call__, but {kind.__name__} has none.")
    start = getattr(merged, "start", None)
    is_stream = callable(getattr(kind, "start", None)) and callable(getattr(kind, "step", None))
    return _Abstract(graph, random_state, kind, merged.__call__, start if is_stream else None)


def is_trained(path: Any, value: Any) -> bool:
    """Returns whether a variable is a parameter to differentiate; serves as an nnx filter."""
    return isinstance(value, nnx.Param) and _is_a(value, jnp.inexact)


def is_random(path: Any, value: Any) -> bool:
    """Returns whether a variable is part of an RNG stream; serves as an nnx filter."""
    return isinstance(value, nnx.RngState) or _is_a(value, jax.dtypes.prng_key)


def _is_a(value: Any, kind: Any) -> bool:
    value = value.get_value() if isinstance(value, nnx.Variable) else value
    dtypes = [jnp.result_type(leaf) for leaf in jax.tree.leaves(value)]
    return bool(dtypes) and all(jnp.issubdtype(dtype, kind) for dtype in dtypes)


def _split(module: nnx.Module) -> tuple[Any, nnx.State, nnx.State, nnx.State]:
    """Splits a module into its graph, parameters, RNG streams and model state.

    Raises:
        InputError: If the module hides an array of the current trace from flax.
    """
    for _, node in nnx.iter_graph(module):
        for name, value in vars(node).items() if isinstance(node, nnx.Pytree) else ():
            # Flax treats a traced array attribute as static: mark it as data.
            if isinstance(value, Tracer) and not node._pytree__nodes.get(name, True):
                setattr(node, name, nnx.data(value))
            # An array that flax does not find would leak out of the trace.
            elif not node._pytree__nodes.get(name, False) and _hides_tracer(value):
                raise InputError(
                    "module",
                    "must store arrays in attributes that flax tracks, but the constructor of "
                    f"{type(node).__name__} stores one inside {name}; make it an attribute or an "
                    "nnx.Variable, or build the module first and pass the instance.",
                )
    graph, *states = nnx.split(module, is_trained, is_random, ...)
    params, random_state, model_state = states
    return graph, params, random_state, model_state


def _content(cell: Any) -> Any:
    """Returns the content of a closure cell; None if its variable has no value yet."""
    try:
        return cell.cell_contents
    except ValueError:
        return None


def _hides_tracer(value: Any, depth: int = 3) -> bool:
    """Returns whether a function, container or object contains an array of the current trace."""
    if isinstance(value, Tracer):
        return True
    # Flax itself finds the arrays of its modules and variables.
    if depth == 0 or isinstance(value, (nnx.Pytree, nnx.Variable, type)):
        return False
    cells = getattr(value, "__closure__", None) or ()
    parts: list[Any] = [_content(cell) for cell in cells]
    if isinstance(value, partial):
        parts += [value.func, *value.args, *value.keywords.values()]
    if isinstance(value, (tuple, list)):
        parts += value
    parts += (value if isinstance(value, dict) else getattr(value, "__dict__", {})).values()
    return any(_hides_tracer(part, depth - 1) for part in parts)


def _writable(leaf: Any) -> Any:
    """Converts a numpy array to a JAX array, so that a module can write to it by index."""
    return jnp.asarray(leaf) if isinstance(leaf, np.ndarray) else leaf


def _pure(state: nnx.State) -> dict[Any, Any]:
    # An explicit dtype drops weak types, so that the state has the same types before and after a
    # step.
    return jax.tree.map(
        lambda leaf: jnp.asarray(leaf, jnp.result_type(leaf)), nnx.to_pure_dict(state)
    )


def _set_mode(module: nnx.Module, training: bool) -> None:
    """Sets the mode of a module and the mode attributes of its submodules."""
    module.train() if training else module.eval()
    for _, part in nnx.iter_modules(module):
        for name in MODES.keys() & vars(part).keys():
            if isinstance(getattr(part, name), bool):
                setattr(part, name, MODES[name] == training)


def _random(call: Callable[..., Any], key: jax.Array) -> dict[str, Any]:
    """Returns the RNG streams or a key for each argument of `__call__` that takes one of them."""
    given = {}
    for name, parameter in signature(call).parameters.items():
        if name == "rngs" or (name in RANDOM and "Rngs" in str(parameter.annotation)):
            given[name] = nnx.Rngs(key)
        elif name in RANDOM:
            given[name] = key
    return given


def _state_after(module: nnx.Module, before: PyTree) -> PyTree:
    """Returns the state after a step, with the structure and dtypes that it had before.

    Raises:
        InputError: If the step created state other than sown values.
    """
    # Each filter takes the variables that earlier ones left, so the last has no intermediates.
    *_, after = nnx.state(module, is_trained, is_random, nnx.Intermediate, ...)
    after = nnx.to_pure_dict(after)

    def pick(after: Any, before: Any, path: str) -> Any:
        if not isinstance(before, dict):
            return jnp.asarray(after, before.dtype)
        for name in after.keys() - before.keys():
            if not isinstance(after[name], tuple):  # a tuple is made by `sow`
                raise InputError(
                    "model",
                    f"must create its variables in the constructor, but {path}{name} is created "
                    "in __call__; for a value that is only reported, use a subclass of "
                    "nnx.Intermediate.",
                )
        return {name: pick(after[name], before[name], f"{path}{name}/") for name in before}

    return pick(after, before, "")


def _attributes(module: nnx.Module) -> dict[tuple[KeyPath, str], Any]:
    """Returns the static attributes of a module and its submodules, by owner's path and name.

    These are all attributes except arrays, variables and modules.
    """
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
                # An array of an earlier trace cannot enter this one; use zeros of its shape.
                is_array = isinstance(value, jax.Array)
                setattr(node, name, jnp.zeros(value.shape, value.dtype) if is_array else value)


def _changed(before: Mapping[Any, Any], after: Mapping[Any, Any]) -> dict[Any, Any]:
    """Returns the attributes of `after` that are missing from `before` or differ from it."""

    # Arrays may be tracers, which have no values to compare.
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
    # The elements of floats are distinct and nonzero, so a write seldom leaves them equal.
    return jnp.linspace(0.5, 1.5, like.size).reshape(like.shape).astype(like.dtype)


def _leaves(tree: PyTree) -> list[tuple[Any, Any]]:
    return jax.tree_util.tree_leaves_with_path(tree)


class _MaskedBatchNorm(nnx.BatchNorm):
    """Replaces `nnx.BatchNorm` in training; see `batch_statistics.py`."""

    norm_settings: NormSettings

    def __call__(self, x, use_running_average=None, *, mask=None):
        mode = self.use_running_average if use_running_average is None else use_running_average
        if mode is None or mode:  # in inference, or an error that flax reports
            return super().__call__(x, use_running_average, mask=mask)

        # Flax passes the running averages through `promote_dtype` before it normalizes: substitute
        # the batch's statistics there, and call flax in inference mode, in which it computes none.
        promote_dtype = self.promote_dtype

        def with_statistics_of_batch(arrays, dtype):
            x, _, _, scale, bias = promote_dtype(arrays, dtype=dtype)
            running = Statistics(self.mean[...], self.var[...])
            batch, updated = compute(self, x, running, self.norm_settings, mask)
            self.mean[...], self.var[...] = updated
            return x, *batch, scale, bias

        self.promote_dtype = with_statistics_of_batch
        try:
            return super().__call__(x, use_running_average=True)
        finally:
            self.promote_dtype = promote_dtype


def _replace_norms(module: nnx.Module, settings: NormSettings) -> None:
    """Replaces the class of each `nnx.BatchNorm` in a module, so that it uses these settings."""
    for _, layer in nnx.iter_modules(module):
        if isinstance(layer, nnx.BatchNorm):
            layer.__class__ = _masked_kind(type(layer))
            layer.norm_settings = settings  # pyright: ignore[reportAttributeAccessIssue]


@cache
def _masked_kind(kind: Any) -> type[nnx.BatchNorm]:
    """Inserts `_MaskedBatchNorm` between `nnx.BatchNorm` and a subclass, whose methods are kept."""
    if kind is nnx.BatchNorm:
        return _MaskedBatchNorm
    return type(kind)(kind.__name__, (kind, _MaskedBatchNorm), {})


def _record_outputs(module: nnx.Module) -> OrderedDict[KeyPath, PyTree]:
    """Makes layers with parameters record their first outputs; returns the records."""
    recorded = OrderedDict()

    def recording(kind: Any, path: KeyPath) -> Any:
        def call(self, *args, **kwargs):
            outputs = kind.__call__(self, *args, **kwargs)
            if are_arrays(outputs):
                recorded.setdefault(path, outputs)
            return outputs

        return type(kind)(kind.__name__, (kind,), {"__call__": call})

    # Layers of a recurrent cell run inside the scan of `nnx.RNN`, whose tracers must not leave it.
    parts = list(nnx.iter_modules(module))
    cells = {path for path, part in parts if isinstance(part, nnx.RNNCellBase)}
    for path, part in parts:
        in_cell = any(path[:depth] in cells for depth in range(len(path)))
        has_params = any(isinstance(value, nnx.Param) for value in vars(part).values())
        if has_params and callable(part) and not in_cell:
            part.__class__ = recording(type(part), path)
    return recorded


def _reseed(random_state: nnx.State, key: jax.Array) -> nnx.State:
    """Derives a separate key for every RNG stream of a module, and resets its count to zero."""
    # A key is also split off for each count: `from_nnx` documents this rule, so it must not change.
    leaves, tree = jax.tree.flatten(random_state)
    keys = jax.random.split(key, max(1, len(leaves)))
    is_key = [jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) for leaf in leaves]
    fresh = [
        jax.random.split(keys[i], leaf.shape) if is_key[i] else jnp.zeros(leaf.shape, leaf.dtype)
        for i, leaf in enumerate(leaves)
    ]
    return jax.tree.unflatten(tree, fresh)
