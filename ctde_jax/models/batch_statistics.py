"""Mean and variance of batch normalization in training, without the padding of short batches.

Flax averages the means of devices with equal weights. Here, sums and counts are summed over
devices, so the result is also correct for unequal numbers of examples. `from_linen` and `from_nnx`
replace the statistics of flax's `BatchNorm` by these, and leave the normalization to flax.
"""

from typing import Literal, NamedTuple, Protocol

import jax
from jax import lax
from jax import numpy as jnp
from jaxtyping import Array, Bool, Float, Inexact

from ctde_jax.devices import AXIS, SHARD

BatchStatistics = Literal["averaged", "synchronized"]
"""Examples over which batch normalization computes its mean and variance in training.

`synchronized`: all examples whose losses contribute to one gradient. In synchronous training these
are the global batch, so the result is the same on any number of devices; each layer costs one small
all-reduce in the forward pass and one in the backward pass. In local steps (`inner_steps`,
`--sync-every`) they are one device's part of the batch, so no device waits for another within a
round; the running averages are averaged at the end of the round, weighted by examples.

Robust rules and differential privacy treat each device's gradient separately, so with `combine` and
`clip_norm` the examples are also one device's part of the batch.

`averaged`: the examples of one device. The running averages are averaged at every aggregation,
weighted by examples.

If a batch is computed in microbatches (`accumulation_steps`), each microbatch is normalized with
its statistics, and then updates the running averages after the previous microbatch. With `--exact`,
the statistics are those of a shard, one eighth of the batch.

This applies to `flax.nnx.BatchNorm`, `flax.linen.BatchNorm` and their subclasses. The first axis of
their input is the axis of examples, or has several consecutive entries per example;
`[time, examples, features]` is recognized by its second axis. Statistics over examples that a
module computes by other means are those of a shard, one of the equal parts into which a device cuts
its part of the batch (see `rounds/gradient.py`), and include the repeated examples of a short
batch. If replicas and shards write different values to other state, floats become the weighted
mean, and integers and Booleans the maximum; an element that none of them writes keeps its bits.
"""


class BatchNorm(Protocol):
    """The common attributes of `nnx.BatchNorm` and `linen.BatchNorm`."""

    axis: int
    momentum: float
    dtype: jax.typing.DTypeLike | None
    axis_name: str | None
    axis_index_groups: list[list[int]] | None
    use_fast_variance: bool


class NormSettings:
    """How batch normalization computes its statistics in one call of `Model.apply`.

    Args:
        mask: False for padding; None if no example is padding.
        batch_statistics: See `BatchStatistics`.
    """

    def __init__(self, mask: Bool[Array, " examples"] | None, batch_statistics: BatchStatistics):
        self.mask = mask
        self.batch_statistics: BatchStatistics = batch_statistics


class Statistics(NamedTuple):
    """Mean and variance of each feature."""

    mean: Inexact[Array, "*features"]
    var: Float[Array, "*features"]


def compute(
    layer: BatchNorm,
    inputs: Inexact[Array, "..."],
    running: Statistics,
    settings: NormSettings,
    mask: Bool[Array, "..."] | None,
) -> tuple[Statistics, Statistics]:
    """Computes the statistics of a batch, and the running averages after it.

    Masked elements are ignored. If the layer has an `axis_name`, the statistics are computed over
    that axis instead of the axes of replicas and shards. If all elements are masked, the running
    averages are returned as the statistics and stay unchanged.

    Args:
        layer: Batch normalization layer in training.
        inputs: Inputs of the layer; see `BatchStatistics` for their shape.
        running: Running averages before the batch.
        settings: Mask of the examples, and the examples to compute the statistics over.
        mask: Argument `mask` of the layer, broadcastable to the inputs, or None.

    Returns:
        The statistics of the batch, and the updated running averages.
    """
    # As in flax, reduce in float32 even if the layer computes in bfloat16.
    is_float32 = getattr(layer, "force_float32_reductions", True)
    dtype = layer.dtype or inputs.dtype
    x = jnp.asarray(inputs, jnp.promote_types(dtype, jnp.float32) if is_float32 else dtype)

    features = layer.axis if isinstance(layer.axis, tuple | list) else (layer.axis,)
    reduced = tuple(
        axis for axis in range(x.ndim) if axis not in {feature % x.ndim for feature in features}
    )
    mask, names, groups = _choose(layer, x, reduced, settings, mask)

    # Number of unmasked elements per feature: a scalar, unless the mask differs between features.
    # Integers are summed, as float32 counts exactly only up to 2**24.
    if mask is None:
        count = jnp.float32(x.size / max(1, _size(x, set(range(x.ndim)) - set(reduced))))
    # One count for all features, times the sizes of the axes along which the mask is broadcast.
    elif all(mask.shape[axis] == 1 for axis in range(x.ndim) if axis not in reduced):
        repeated = _size(x, {axis for axis in reduced if mask.shape[axis] == 1})
        count = jnp.sum(mask, dtype=jnp.int32).astype(jnp.float32) * repeated
    else:
        count = jnp.sum(jnp.broadcast_to(mask, x.shape), reduced, dtype=jnp.int32).astype(
            jnp.float32
        )

    # Sums and counts share one all-reduce, in which the count of complex inputs is complex as well.
    # Dividing by at least 1 avoids a NaN, and its gradient, if all elements are masked.
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

    # The fast variance, mean(x**2) - mean(x)**2, needs one pass but may be negative by rounding.
    if layer.use_fast_variance:
        (mean, square), total_count = mean_of(x, _squared(x))
        var = jnp.maximum(0.0, square.real - _squared(mean))
    else:
        (mean,), _ = mean_of(x)
        (var,), total_count = mean_of(_squared(x - jnp.expand_dims(mean, reduced)))
        var = var.real

    # If all elements are masked, the running averages replace the statistics.
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
    x: Inexact[Array, "..."],
    reduced: tuple[int, ...],
    settings: NormSettings,
    mask: Bool[Array, "..."] | None,
) -> tuple[Bool[Array, "..."] | None, tuple[str, ...] | str, list[list[int]] | None]:
    """Returns the mask, broadcastable to `x`, the mapped axes to sum over, and their groups."""
    # An element is unmasked if both the layer's mask and the mask of the examples include it.
    if mask is not None:
        mask = jnp.asarray(mask, bool)
        mask = mask.reshape((1,) * (x.ndim - mask.ndim) + mask.shape)
    if settings.mask is not None:
        of_examples = _spread(settings.mask, x, reduced)
        if of_examples is not None:
            mask = of_examples if mask is None else mask & of_examples

    # An axis of the layer replaces those of the trainer. If the first axis of the inputs is a
    # feature axis, the examples share no statistics.
    if layer.axis_name is not None:
        return mask, layer.axis_name, layer.axis_index_groups
    return mask, axes(settings.batch_statistics) if 0 in reduced else (), None


def _spread(
    mask: Bool[Array, " examples"], x: Inexact[Array, "..."], reduced: tuple[int, ...]
) -> Bool[Array, "..."] | None:
    """Reshapes a mask of examples so that it broadcasts to `x`.

    Returns None if `x` has no axis of examples, or it is not among the `reduced` axes.
    """
    # First `[time, examples, features]`; then inputs with consecutive entries per example.
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
    """Returns the mapped axes over which statistics are summed, of those bound in this trace."""

    def exists(axis: str) -> bool:
        try:
            lax.axis_size(axis)
        except NameError:
            return False
        return True

    # Outside of the trainer, a model may be applied without these axes.
    axes = (SHARD, AXIS) if batch_statistics == "synchronized" else (SHARD,)
    return tuple(filter(exists, axes))
