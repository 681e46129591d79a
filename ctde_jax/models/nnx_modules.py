"""Any nnx module as a model."""

from collections import OrderedDict
from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import optax
from flax import nnx
from jax import numpy as jnp

from ctde_jax.errors import InputError
from ctde_jax.models.base import KeyPath, Model, Stream
from ctde_jax.models.batch_statistics import BatchStatistics, Counted, Statistics, compute


def from_nnx(make: Callable[[nnx.Rngs], nnx.Module], batch_statistics: BatchStatistics = "synchronized") -> Model:
    """Makes a model of a function that builds an nnx module, such as `lambda rngs: MyNet(64, rngs=rngs)`.

    A module that has the methods `start(examples) -> carry` and `step(carry, inputs) -> (outputs, carry)` also reads a
    sequence place by place.

    Args:
        make: Is given the random streams that the module's parts draw from.
        batch_statistics: See `BatchStatistics`; a batch normalization with an `axis_name` of its own keeps that.

    Raises:
        InputError: It is given a module that is already built.
    """
    if isinstance(make, nnx.Module):
        raise InputError("make", f"must be a function that builds the module, got a built {type(make).__name__}.")

    def split(module: nnx.Module):
        return nnx.split(module, nnx.Param, nnx.RngState, ...)

    abstract: Any = nnx.eval_shape(lambda: make(nnx.Rngs(0)))
    graph, _, random_state, _ = split(abstract)

    def merge(params, model_state, key) -> Any:
        streams = _reseed(random_state, jax.random.key(0) if key is None else key)
        module = nnx.merge(graph, params, streams, model_state)
        module.eval() if key is None else module.train()
        return module

    def init(key, inputs):
        _, params, _, model_state = split(make(nnx.Rngs(key)))
        return nnx.to_pure_dict(params), nnx.to_pure_dict(model_state)

    def apply(params, model_state, inputs, key, mask=None):
        module = merge(params, model_state, key)
        if key is not None:
            _count(module, Counted(mask, batch_statistics))
        outputs = module(inputs)
        _, _, model_state = nnx.state(module, nnx.Param, nnx.RngState, ...)
        return jnp.asarray(outputs, jnp.float32), nnx.to_pure_dict(model_state)

    def layers(params, model_state, inputs):
        module = merge(params, model_state, None)
        heard = _listen(module)
        module(inputs)
        return heard

    def step(params, model_state, carry, inputs):
        outputs, carry = merge(params, model_state, None).step(carry, inputs)
        return jnp.asarray(outputs, jnp.float32), optax.tree.cast(carry, jnp.float32)

    if not (hasattr(abstract, "start") and hasattr(abstract, "step")):
        return Model(init, apply, layers)
    return Model(init, apply, layers, Stream(abstract.start, step))


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
    """Makes the layers of a module write down what they say; returns the dictionary into which they write."""
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
