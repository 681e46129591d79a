"""The mean and variance of batch normalization in training: over which examples, and only over real ones.

Flax averages the means of devices, each with the same weight. Here sums and counts are added up instead, so unequal
numbers of examples are right. Both doors, `from_linen` and `from_nnx`, replace the statistics of flax's `BatchNorm` by
these, and leave the normalization to flax.
"""

from typing import Literal, NamedTuple, Protocol

import jax
from jax import lax
from jax import numpy as jnp

from ctde_jax.devices import AXIS, SHARD

BatchStatistics = Literal["averaged", "synchronized"]
"""Over which examples batch normalization takes its mean and variance in training.

`synchronized`: all examples whose losses make up one gradient. In synchronous training that is the whole batch, so the
result is the same on any number of devices; each layer costs one small all-reduce in each direction. In local steps
(`inner_steps`, `--sync-every`) it is the part of a batch that one device has, so no device waits for another within a
round; the running averages are averaged at the end of the round, weighted by examples.

Robust rules and differential privacy judge each device's gradient by itself, so with `combine` and `clip_norm` it is
the part of one device, too.

`averaged`: the examples of one device. The running averages are averaged at every aggregation, weighted by examples.

If a batch is computed in microbatches (`accumulate`), each microbatch is normalized with its own statistics, and its
running averages follow those of the microbatch before. With `--exact` the statistics are those of a shard.

This holds for `flax.nnx.BatchNorm`, `flax.linen.BatchNorm` and their subclasses. The first axis of their input is that
of the examples, or has several consecutive places for each example; `[time, examples, features]` is recognized by its
second axis. Statistics over examples that a module computes by other means are those of a shard, and count repeated
examples of a short batch. What replicas and shards write differently to other state becomes the weighted mean of
floats, and the largest of integers and booleans; a number that none of them writes keeps its bits.
"""


class BatchNorm(Protocol):
    """What `nnx.BatchNorm` and `linen.BatchNorm` have in common."""

    axis: int
    momentum: float
    dtype: jax.typing.DTypeLike | None
    axis_name: str | None
    axis_index_groups: list[list[int]] | None
    use_fast_variance: bool


class Counted:
    """The examples that count in one application of a model.

    Args:
        mask: `bool[examples]`, or None if all count.
        batch_statistics: See `BatchStatistics`.
    """

    def __init__(self, mask: jax.Array | None, batch_statistics: BatchStatistics):
        self.mask = mask
        self.batch_statistics: BatchStatistics = batch_statistics


class Statistics(NamedTuple):
    """The mean and variance of each feature."""

    mean: jax.Array
    var: jax.Array


def compute(
    layer: BatchNorm,
    inputs: jax.Array,
    running: Statistics,
    counted: Counted,
    mask: jax.Array | None,
) -> tuple[Statistics, Statistics]:
    """Computes the statistics of a batch, and the running averages after it.

    A layer with an `axis_name` takes its statistics over that axis instead. If no example counts, the running averages
    take the place of the statistics, and stay as they are.

    Args:
        layer: A batch normalization in training.
        inputs: Of the layer.
        running: The running averages before the batch.
        counted: The examples that count.
        mask: The argument `mask` of the layer: `bool`, broadcastable to the inputs.

    Returns:
        The statistics of the batch, and the updated running averages.
    """
    is_float32 = getattr(layer, "force_float32_reductions", True)
    dtype = layer.dtype or inputs.dtype
    x = jnp.asarray(inputs, jnp.promote_types(dtype, jnp.float32) if is_float32 else dtype)

    features = layer.axis if isinstance(layer.axis, tuple | list) else (layer.axis,)
    reduced = tuple(
        axis for axis in range(x.ndim) if axis not in {feature % x.ndim for feature in features}
    )
    mask, names, groups = _choose(layer, x, reduced, counted, mask)

    if mask is None:
        count = jnp.float32(x.size / max(1, _size(x, set(range(x.ndim)) - set(reduced))))
    elif all(mask.shape[axis] == 1 for axis in range(x.ndim) if axis not in reduced):
        repeated = _size(x, {axis for axis in reduced if mask.shape[axis] == 1})
        count = jnp.sum(mask, dtype=jnp.int32).astype(jnp.float32) * repeated
    else:
        count = jnp.sum(jnp.broadcast_to(mask, x.shape), reduced, dtype=jnp.int32).astype(
            jnp.float32
        )

    def mean_of(*values: jax.Array) -> tuple[list[jax.Array], jax.Array]:
        sums = [jnp.sum(value, reduced, where=mask) for value in values]
        if not names:
            return [total / jnp.maximum(count, 1) for total in sums], count
        together = lax.psum(
            jnp.stack([*sums, jnp.broadcast_to(count, sums[0].shape)]),
            names,
            axis_index_groups=groups,
        )
        total_count = together[-1].real
        return [total / jnp.maximum(total_count, 1) for total in together[:-1]], total_count

    if layer.use_fast_variance:
        (mean, square), total_count = mean_of(x, _squared(x))
        var = jnp.maximum(0.0, square.real - _squared(mean))
    else:
        (mean,), _ = mean_of(x)
        (var,), total_count = mean_of(_squared(x - jnp.expand_dims(mean, reduced)))
        var = var.real

    def updated(running: jax.Array, new: jax.Array) -> jax.Array:
        return jnp.where(
            total_count > 0, layer.momentum * running + (1 - layer.momentum) * new, running
        )

    batch = Statistics(
        *(
            jnp.where(total_count > 0, new, old)
            for new, old in zip((mean, var), running, strict=True)
        )
    )
    return batch, Statistics(*map(updated, running, batch))


def _choose(
    layer: BatchNorm,
    x: jax.Array,
    reduced: tuple[int, ...],
    counted: Counted,
    mask: jax.Array | None,
) -> tuple[jax.Array | None, tuple[str, ...] | str, list[list[int]] | None]:
    """Returns which numbers count, broadcastable to x, the axes over which to add up, and their groups."""
    if mask is not None:
        mask = jnp.asarray(mask, bool)
        mask = mask.reshape((1,) * (x.ndim - mask.ndim) + mask.shape)
    if counted.mask is not None:
        of_examples = _spread(counted.mask, x, reduced)
        if of_examples is not None:
            mask = of_examples if mask is None else mask & of_examples
    if layer.axis_name is not None:
        return mask, layer.axis_name, layer.axis_index_groups
    return mask, axes(counted.batch_statistics) if 0 in reduced else (), None


def _spread(mask: jax.Array, x: jax.Array, reduced: tuple[int, ...]) -> jax.Array | None:
    """Reshapes a mask of examples so that it broadcasts to x; None if x has no axis of examples to reduce."""
    examples = len(mask)
    if x.ndim == 3 and x.shape[0] != examples == x.shape[1] and 1 in reduced:
        return mask[None, :, None]
    if 0 not in reduced or x.shape[0] % examples:
        return None
    return jnp.repeat(mask, x.shape[0] // examples).reshape(-1, *(1,) * (x.ndim - 1))


def _size(x: jax.Array, axes: set[int]) -> int:
    size = 1
    for axis in axes:
        size *= x.shape[axis]
    return size


def _squared(x: jax.Array) -> jax.Array:
    return lax.square(x.real) + lax.square(x.imag) if jnp.iscomplexobj(x) else lax.square(x)


def axes(batch_statistics: BatchStatistics) -> tuple[str, ...]:
    """Names the axes over which examples lie that share statistics, of those that exist where a model is applied."""

    def exists(axis: str) -> bool:
        try:
            lax.axis_size(axis)
        except NameError:
            return False
        return True

    axes = (SHARD, AXIS) if batch_statistics == "synchronized" else (SHARD,)
    return tuple(filter(exists, axes))
