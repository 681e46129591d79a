"""Any linen module as a model."""

from collections import OrderedDict
from inspect import signature
from typing import Any

from flax import linen
from jax import numpy as jnp

from ctde_jax.errors import InputError
from ctde_jax.models.base import Model
from ctde_jax.models.batch_statistics import BatchStatistics, axes


def from_linen(module: linen.Module, batch_statistics: BatchStatistics = "averaged") -> Model:
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

    def share_statistics(call, args, kwargs, context):
        if isinstance(context.module, linen.BatchNorm) and context.module.axis_name is None:
            object.__setattr__(context.module, "axis_name", axes(batch_statistics))
        return call(*args, **kwargs)

    def apply(params, model_state, inputs, key):
        variables = {"params": params, **model_state}
        if key is None:
            outputs = module.apply(variables, inputs, **mode(train=False))
        else:
            with linen.intercept_methods(share_statistics):
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
