"""Adapter from any linen module to a `Model`."""

from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import partial
from inspect import isclass, signature, unwrap
from typing import Any, NamedTuple
from zlib import crc32

import jax
from flax import linen
from flax.core import unfreeze
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import numpy as jnp

from ctde_jax.devices import PyTree
from ctde_jax.errors import InputError
from ctde_jax.models.base import Model, are_arrays, as_outputs
from ctde_jax.models.batch_statistics import BatchStatistics, NormSettings, Statistics, compute
from ctde_jax.models.modes import MODES, RANDOM, Effect, Modes, effect_of, find_modes
from ctde_jax.models.user_code import reported


class _Call(NamedTuple):
    """How a module is called on inputs of one shape and dtype."""

    modes: Modes
    streams: Mapping[bool, tuple[str, ...]]
    """Names of the RNG streams that are requested in training (True) and in inference (False)."""

    writes_in_inference: bool
    """Whether inference requires mutable collections, because the module writes to its state."""


def from_linen(
    module: linen.Module | Callable[..., linen.Module],
    batch_statistics: BatchStatistics = "synchronized",
    *,
    train: Mapping[str, Any] = {},
    infer: Mapping[str, Any] = {},
) -> Model:
    """Makes a model from a linen module.

    The mode, training or inference, is set by the mode argument of the module's `__call__` or by
    its mode fields; see `modes.find_modes`. In training, the RNG stream `dropout` receives the
    key of `Model.apply`, and every other stream that the module requests receives
    `jax.random.fold_in(key, zlib.crc32(name.encode()))`. In inference, streams other than `dropout`
    receive keys derived from `jax.random.key(0)` in the same way.

    All collections except `params` are model state. Parameters without a floating-point dtype are
    constants, and also part of the state. Sown and perturbed values are dropped; if a loss needs
    them, return them as outputs. Partitioning metadata is removed.

    Args:
        module: Module such as `MyNet(64)`, class without required fields, or function that returns
            a module.
        batch_statistics: See `BatchStatistics`; a batch normalization with an `axis_name` takes its
            statistics over that axis instead.
        train: Keyword arguments to pass to `__call__` in training, if their meaning cannot be
            inferred.
        infer: The same arguments with their values in inference.

    Raises:
        InputError: If `module` does not give an unbound linen module. The functions of the model
            raise it if the meaning of an argument cannot be inferred, if the module raises an
            exception, or if the shape of its state depends on the number of examples.

    Examples:
        >>> from flax import linen
        >>> model = ctde.models.from_linen(linen.Dense(3))
        >>> inputs = np.ones((5, 4), np.float32)
        >>> params, model_state = model.init(jax.random.key(0), inputs)
        >>> jax.tree.map(np.shape, params)
        {'bias': (3,), 'kernel': (4, 3)}
    """
    wrapped = LinenAdapter(_built(module), batch_statistics, Modes(train, infer))
    return Model(wrapped.init, wrapped.apply, wrapped.layers)


class LinenAdapter:
    """The functions of a model that calls a linen module.

    Args:
        network: The module.
        batch_statistics: See `BatchStatistics`.
        given: Arguments `train` and `infer` of `from_linen`.
    """

    def __init__(self, network: linen.Module, batch_statistics: BatchStatistics, given: Modes):
        self._batch_statistics: BatchStatistics = batch_statistics
        self._network = network
        self._given = given
        self._calls: dict[Any, _Call] = {}

    def init(self, key, inputs):
        """See `Model.init`."""
        return split_variables(self._variables(self._find_call(inputs), key, inputs))

    def apply(self, params, model_state, inputs, key, mask=None):
        """See `Model.apply`."""
        call = self._find_call(inputs)
        variables = _merged(params, model_state)
        collections = [name for name in model_state if name != "params"]

        # Inference: the key is fixed, and the changes of the state are dropped.
        if key is None:
            arguments = call.modes.infer
            streams = call.streams[False]
            fixed_key = jax.random.key(0)
            # If batch statistics are written in inference, a layer has the wrong mode: flax raises.
            mutable = (
                [name for name in collections if name != "batch_stats"]
                if call.writes_in_inference
                else False
            )
            inferring = _in_mode(self._network, False)
            outputs, _ = _call_with(
                inferring, variables, inputs, fixed_key, arguments, streams, mutable
            )
            return outputs, model_state

        # Training: all collections but the constants in "params" may change.
        arguments = call.modes.train
        streams = call.streams[True]
        training = _in_mode(self._network, True)
        with linen.intercept_methods(_norm_interceptor(NormSettings(mask, self._batch_statistics))):
            outputs, after = _call_with(
                training, variables, inputs, key, arguments, streams, collections
            )
        return outputs, _like(model_state, {**model_state, **unfreeze(linen.meta.unbox(after))})

    def module(self, params: PyTree, model_state: PyTree) -> tuple[linen.Module, PyTree]:
        """Returns the module in inference mode, and its variables."""
        return _in_mode(self._network, False), _merged(params, model_state)

    def layers(self, params, model_state, inputs):
        """See `Model.layers`."""
        recorded = OrderedDict()

        def record(call, args, kwargs, context):
            outputs = call(*args, **kwargs)
            layer = context.module
            in_cell = isinstance(layer.parent, linen.RNNCellBase)
            # The parameters of sublayers are nested dictionaries.
            own = layer.variables.get("params", {}).values()
            has_params = any(not isinstance(value, Mapping) for value in own)
            is_listed = has_params and not in_cell and are_arrays(outputs)
            if context.method_name == "__call__" and is_listed:
                recorded.setdefault(layer.path, outputs)
            return outputs

        with linen.intercept_methods(record):
            self.apply(params, model_state, inputs, None)
        return recorded

    def _find_call(self, inputs) -> _Call:
        """Returns how the module is called on inputs of this shape and dtype, and caches it."""
        # The number of examples is left out of the key, as it does not change the modes.
        place = (jnp.shape(inputs)[1:], jnp.result_type(inputs))
        if place not in self._calls:
            like = jax.ShapeDtypeStruct(jnp.shape(inputs), place[1])
            # The check calls `init`, which looks up this entry.
            self._calls[place] = _examine(self._network, like, self._given)
            try:
                _check_state(self.init, *place)
            except BaseException:
                del self._calls[place]
                raise
        return self._calls[place]

    def _variables(self, call: _Call, key, inputs):
        """Initializes the variables of inference, and those that exist only in training."""
        streams = call.streams[True]
        in_training = _in_mode(self._network, True)
        everything = _init_as(
            _in_mode(self._network, False), call.modes.infer, key, inputs, streams
        )
        # Both initializations use the same key, so variables that exist in both modes are equal.
        if in_training is not self._network or call.modes.train:
            more = _init_as(in_training, call.modes.train, key, inputs, streams)
            everything = unflatten_dict({**flatten_dict(more), **flatten_dict(everything)})
        return everything


def _init_as(module: linen.Module, arguments: Mapping[str, Any], key, inputs, streams=()):
    rngs = {name: _stream_key(key, name) for name in streams} | {"params": key, "dropout": key}
    with linen.intercept_methods(_sow_nothing), reported("model", "your module", inputs=inputs):
        return unfreeze(
            linen.meta.unbox(module.init(rngs, inputs, **{**arguments, **_random(module, key)}))
        )


def _call_with(module: linen.Module, variables, inputs, key, arguments, streams, mutable):
    rngs = {name: _stream_key(key, name) for name in streams}
    arguments = {**arguments, **_random(module, key)}
    with linen.intercept_methods(_sow_nothing), reported("model", "your module", inputs=inputs):
        outputs = module.apply(variables, inputs, **arguments, rngs=rngs, mutable=mutable)
        # Flax returns a pair only if a collection may change.
        outputs, after = (outputs, {}) if mutable is False else outputs
        return as_outputs(outputs), after


def _built(module: Any) -> linen.Module:
    """Returns a module itself, or the one that a class or function builds without arguments.

    Raises:
        InputError: If the module cannot be built without arguments, or is not an unbound linen
            module.
    """
    # A linen class or a function is called without arguments.
    if not isinstance(module, linen.Module):
        is_ours = not isclass(module) or issubclass(module, linen.Module)
        if not callable(module) or not is_ours:
            raise InputError(
                "module", f"must be a linen module such as MyNet(64), got {module!r:.60}."
            )
        name = getattr(module, "__name__", type(module).__name__)
        parameters = signature(module).parameters.values()
        required = [
            p.name
            for p in parameters
            if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        ]
        if required:
            raise InputError(
                "module",
                f"must be an instance, because {name} requires the arguments "
                f"{', '.join(required)}; pass {name}(...).",
            )
        with reported("module", f"{name}()"):
            module = module()

    # Check the module, whether it was passed or has just been built.
    if not isinstance(module, linen.Module):
        raise InputError("module", f"must be a linen module such as MyNet(64), got {module!r:.60}.")
    if module.scope is not None:
        raise InputError(
            "module",
            f"must not be bound to variables; pass an unbound {type(module).__name__}(...).",
        )
    # Flax also builds modules that have only other methods.
    if not callable(module):
        raise InputError(
            "module", f"must have a method __call__, but {type(module).__name__} has none."
        )
    return module


def _examine(network: linen.Module, inputs: jax.ShapeDtypeStruct, given: Modes) -> _Call:
    """Traces a module to find how it must be called.

    Args:
        network: The module.
        inputs: Shape and dtype of its inputs.
        given: Arguments of `__call__` that the user passed for both modes.

    Returns:
        The mode arguments, the RNG streams that the module requests in training and in inference,
        and whether inference requires mutable collections.
    """
    requested: set[str] = set()
    key = jax.eval_shape(jax.random.key, 0)

    # An interceptor that notes the streams that a module requests. Linen modules are frozen outside
    # of setup, hence `object.__setattr__`.
    def note_streams(call, args, kwargs, context):
        module = context.module
        for name in ("make_rng", "has_rng"):

            def ask(
                stream: str = "params", method=getattr(type(module), name).__get__(module)
            ) -> Any:
                requested.add(stream)
                return method(stream)

            object.__setattr__(module, name, ask)
        return call(*args, **kwargs)

    # The effect of a call in training or inference, or None if it raises with these arguments.
    def trace(training: bool, arguments: Mapping[str, Any], writes: bool) -> Effect | None:
        module = _in_mode(network, training)

        def start(key: jax.Array, inputs: jax.Array) -> PyTree:
            rngs = {"params": key, "dropout": key} | dict.fromkeys(requested, key)
            return linen.meta.unbox(
                module.init(rngs, inputs, **{**arguments, **_random(module, key)})
            )

        def run(
            key: jax.Array, state: PyTree, inputs: jax.Array, params: PyTree
        ) -> tuple[PyTree, PyTree]:
            rngs = {
                name: _stream_key(key, name)
                for name in {*requested, *(["dropout"] if training else [])}
            }
            mutable = list(state) if writes else False
            arguments_and_key = {**arguments, **_random(module, key)}
            outputs = module.apply(
                {**state, **params}, inputs, **arguments_and_key, rngs=rngs, mutable=mutable
            )
            return outputs if writes else (outputs, {})

        with linen.intercept_methods(_sow_nothing), linen.intercept_methods(note_streams):
            try:
                state = dict(jax.eval_shape(start, key, inputs))
            except InputError:
                raise
            except Exception:
                return None
            params = {"params": state.pop("params", {})}
            # If a stream has no key, the call raises, unless it can be taken from `params`; by then
            # its name is noted, so try again until no new name appears.
            while True:
                before = len(requested)
                found = effect_of(run, state, inputs, params)
                if found is not None or len(requested) == before:
                    return found

    # Mode fields of the module are set by `_in_mode`, so arguments with such a name are not passed.
    fixed = tuple(name for name in MODES if isinstance(getattr(network, name, None), bool))
    effect = partial(trace, True, writes=True)
    modes = find_modes(network.__call__, type(network).__name__, effect, given, fixed)

    # Trace with the arguments found, so that only the streams that these calls request are noted.
    requested.clear()
    effect(modes.train)
    in_training = tuple(sorted(requested - {"params"} | {"dropout"})) + (
        ("params",) if "params" in requested else ()
    )

    # Inference has no `dropout` stream: if a layer requests it, the call fails with a hint.
    requested.clear()
    reads_only = trace(False, modes.infer, writes=False) is not None
    in_inference = tuple(sorted(requested - {"dropout"}))
    return _Call(modes, {True: in_training, False: in_inference}, not reads_only)


def _check_state(init: Callable[..., Any], shape: tuple[int, ...], dtype: Any) -> None:
    """Raises InputError if the shape of the state depends on the number of examples.

    A cache for decoding does. It also raises if the state contains a PRNG key.
    """
    key = jax.eval_shape(jax.random.key, 0)

    def leaves(examples: int) -> dict[Any, Any]:
        inputs = jax.ShapeDtypeStruct((examples, *shape), dtype)
        # A new function, as JAX refuses to trace `init` while it is traced for the same shapes.
        return dict(
            flatten_dict(jax.eval_shape(lambda key, inputs: init(key, inputs)[1], key, inputs))
        )

    one = leaves(1)
    two = leaves(2)
    for path, leaf in one.items():
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            raise InputError(
                "model",
                f"must not store random keys, but {'/'.join(map(str, path))} is one; use "
                "self.make_rng('dropout').",
            )
        if path not in two or leaf.shape != two[path].shape:
            raise InputError(
                "model",
                "must not have state whose shape depends on the number of examples, but that of "
                f"{'/'.join(map(str, path))} does; turn off the cache (decode=False), or return it "
                "as an output.",
            )


def _sow_nothing(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
    """Makes `sow` and `perturb` no-ops, so that every step leaves the same state structure."""
    object.__setattr__(context.module, "sow", lambda *args, **kwargs: False)
    object.__setattr__(
        context.module, "perturb", lambda name, value, collection="perturbations": value
    )
    return call(*args, **kwargs)


def _in_mode(module: linen.Module, training: bool) -> linen.Module:
    """Returns a clone with the mode fields set, or the module itself if it has none."""
    fields: dict[str, Any] = {
        name: value == training
        for name, value in MODES.items()
        if name in module.__dataclass_fields__ and isinstance(getattr(module, name, None), bool)
    }
    return module.clone(**fields) if fields else module


def _random(module: linen.Module, key: jax.Array) -> dict[str, Any]:
    """Returns a key for each argument of `__call__` with a name in `RANDOM`."""
    names = [name for name in signature(module.__call__).parameters if name in RANDOM]
    return {name: _stream_key(key, name) for name in names}


def _stream_key(key: jax.Array, name: str) -> jax.Array:
    # The hash of a string differs between processes; its checksum does not.
    return key if name == "dropout" else jax.random.fold_in(key, crc32(name.encode()))


def split_variables(variables: PyTree) -> tuple[PyTree, PyTree]:
    """Splits linen variables into `(params, model_state)`.

    Parameters without a floating-point dtype are part of the state, under "params".
    """
    # Parameters that cannot be differentiated stay under "params" in the state; see `_merged`.
    model_state = dict(variables)
    params = flatten_dict(model_state.pop("params", {}), keep_empty_nodes=True)
    constants = {path: leaf for path, leaf in params.items() if _is_constant(leaf)}
    if constants:
        model_state["params"] = unflatten_dict(constants)
    return unflatten_dict(
        {path: leaf for path, leaf in params.items() if path not in constants}
    ), model_state


def _merged(params: PyTree, model_state: PyTree) -> PyTree:
    if "params" not in model_state:
        return {"params": params, **model_state}
    constants = flatten_dict(model_state["params"])
    return {**model_state, "params": unflatten_dict({**flatten_dict(params), **constants})}


def _is_constant(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and not jnp.issubdtype(leaf.dtype, jnp.inexact)


def _like(before: PyTree, after: PyTree) -> PyTree:
    """Casts the state after a step to the dtypes of the state before it.

    Raises:
        InputError: If the step has created state.
    """
    if jax.tree.structure(before) != jax.tree.structure(after):
        new = sorted(
            "/".join(map(str, path)) for path in {*flatten_dict(after)} - {*flatten_dict(before)}
        )
        change = f"creates {', '.join(new)}" if new else "changes the structure of the state"
        raise InputError(
            "model", f"must create all of its state in init, but a training step {change}."
        )
    return jax.tree.map(lambda new, old: jnp.asarray(new, old.dtype), after, before)


def _norm_interceptor(settings: NormSettings) -> Callable[..., Any]:
    """Makes an interceptor that replaces the statistics of `linen.BatchNorm` in training."""

    def intercept(call, args, kwargs, context):
        layer = context.module
        # Replace only the method of flax; code of a subclass or lifted class around it still runs.
        if context.orig_method.func is not _NORMALIZE or layer.is_initializing():
            return call(*args, **kwargs)
        arguments = signature(_NORMALIZE).bind(layer, *args, **kwargs).arguments
        mode = layer.use_running_average
        modes = [each for each in (mode, arguments.get("use_running_average")) if each is not None]
        if modes != [False]:  # in inference, or an error that flax reports
            return call(*args, **kwargs)

        # Flax normalizes with the running averages in inference mode: write the statistics of the
        # batch in their place for this call, and the updated running averages after it.
        running = _running(layer, arguments["x"])
        batch, updated = compute(layer, arguments["x"], running, settings, arguments.get("mask"))
        _write(layer, batch)
        object.__setattr__(layer, "use_running_average", True)
        try:
            outputs = call(arguments["x"])
        finally:
            object.__setattr__(layer, "use_running_average", mode)
        _write(layer, updated)
        return outputs

    return intercept


_NORMALIZE = unwrap(linen.BatchNorm.__call__)


def _running(layer: linen.BatchNorm, inputs: jax.Array) -> Statistics:
    # The defaults are the initial values of flax.
    features = layer.axis if isinstance(layer.axis, tuple | list) else (layer.axis,)
    shape = [inputs.shape[axis] for axis in features]
    dtype = jnp.float32 if layer.force_float32_reductions else layer.param_dtype
    return Statistics(
        layer.get_variable("batch_stats", "mean", jnp.zeros(shape, dtype)),
        layer.get_variable("batch_stats", "var", jnp.ones(shape, dtype)),
    )


def _write(layer: linen.BatchNorm, statistics: Statistics) -> None:
    for name, value in statistics._asdict().items():
        layer.put_variable("batch_stats", name, value)
