"""Any linen module as a model."""

from collections import OrderedDict
from collections.abc import Callable
from inspect import signature, unwrap
from typing import Any

import jax
from flax import linen
from jax import numpy as jnp

from ctde_jax.errors import InputError
from ctde_jax.models.base import Model
from ctde_jax.models.batch_statistics import BatchStatistics, Counted, Statistics, compute


def from_linen(module: linen.Module, batch_statistics: BatchStatistics = "synchronized") -> Model:
    """Makes a model of a linen module.

    Whether it trains is passed as the argument that its `__call__` has for it: `train`, `training`, `is_training`,
    `deterministic` or `use_running_average`. Its random stream is `dropout`.

    Args:
        module: Such as `MyNet(64)`.
        batch_statistics: See `BatchStatistics`; a batch normalization with an `axis_name` of its own keeps that.

    Raises:
        InputError: It is given a class.
    """
    if not isinstance(module, linen.Module):
        raise InputError("module", f"must be a linen module such as MyNet(64), got {module!r:.60}.")
    arguments = signature(module.__call__).parameters

    def mode(train: bool) -> dict[str, Any]:
        says = {"train": train, "training": train, "is_training": train}
        says |= {"deterministic": not train, "use_running_average": not train}
        return {name: value for name, value in says.items() if name in arguments}

    def init(key, inputs):
        model_state = dict(module.init({"params": key, "dropout": key}, inputs, **mode(train=False)))
        params = model_state.pop("params", {})
        return params, model_state

    def apply(params, model_state, inputs, key, mask=None):
        variables = {"params": params, **model_state}
        if key is None:
            outputs = module.apply(variables, inputs, **mode(train=False))
        else:
            with linen.intercept_methods(_counting(Counted(mask, batch_statistics))):
                outputs, model_state = module.apply(
                    variables, inputs, **mode(train=True), rngs={"dropout": key}, mutable=list(model_state)
                )
        return jnp.asarray(outputs, jnp.float32), model_state

    def layers(params, model_state, inputs):
        heard = OrderedDict()

        def listen(call, args, kwargs, context):
            outputs, layer = call(*args, **kwargs), context.module
            in_cell = isinstance(layer.parent, linen.RNNCellBase)
            if context.method_name == "__call__" and layer.has_variable("params", "kernel") and not in_cell:
                heard.setdefault(layer.path, outputs)
            return outputs

        with linen.intercept_methods(listen):
            module.apply({"params": params, **model_state}, inputs, **mode(train=False))
        return heard

    return Model(init, apply, layers)


def _counting(counted: Counted) -> Callable[..., Any]:
    """Makes the interceptor that gives batch normalization in training the statistics of the examples that count."""

    def intercept(call, args, kwargs, context):
        layer = context.module
        # Only flax's own method: what a subclass or a transformed class does around it stays.
        if context.orig_method.func is not _NORMALIZE or layer.is_initializing():
            return call(*args, **kwargs)
        arguments = signature(_NORMALIZE).bind(layer, *args, **kwargs).arguments
        mode = layer.use_running_average
        modes = [each for each in (mode, arguments.get("use_running_average")) if each is not None]
        if modes != [False]:  # in inference, or an error that flax reports
            return call(*args, **kwargs)

        running = _running(layer, arguments["x"])
        batch, updated = compute(layer, arguments["x"], running, counted, arguments.get("mask"))
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
