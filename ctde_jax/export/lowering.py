"""Primitives that jax2onnx or ONNX Runtime lack, in terms of primitives that both have.

Pooling, for example: jax2onnx writes a MaxPool over all axes, batch and channels included, and ONNX Runtime accepts at
most three. Strided slices and their elementwise maximum are as fast there, and work for any number of axes, any dtype
and any reducer.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from typing import Any

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp
from jax.extend.core import ClosedJaxpr, Primitive, jaxpr_as_fun  # pyright: ignore[reportPrivateImportUsage]

from ctde_jax.export.program import Rule

Combine = Callable[[jax.Array, jax.Array], jax.Array]
OverAxis = Callable[[jax.Array, int], jax.Array]
Padding = Sequence[tuple[int, int]]


def _pool(combine: Combine, over_axis: OverAxis, identity: Callable[[Any], Any]) -> Rule:
    """Returns the rule of a reduction over windows.

    Args:
        combine: Reducer of two arrays; associative and commutative.
        over_axis: Reduction over one whole axis by the same reducer.
        identity: Identity of the reducer, by dtype.
    """

    def rule(x: jax.Array, **windows: Any) -> jax.Array:
        return _over_windows(combine, over_axis, identity(x.dtype), x, **windows)

    return rule


def _over_windows(
    combine: Combine,
    over_axis: OverAxis | None,
    initial: Any,
    x: jax.Array,
    *,
    window_dimensions: Sequence[int],
    window_strides: Sequence[int],
    padding: Padding,
    base_dilation: Sequence[int],
    window_dilation: Sequence[int],
) -> jax.Array:
    """Reduces windows axis by axis: first pads, then combines one strided slice for each place of a window."""
    config = [
        (low, high, base - 1) for (low, high), base in zip(padding, base_dilation, strict=True)
    ]
    x = _pad(x, jnp.asarray(initial, x.dtype), padding_config=config)
    for axis, (window, stride, dilation) in enumerate(
        zip(window_dimensions, window_strides, window_dilation, strict=True)
    ):
        if window == stride == 1:
            continue
        length, span = x.shape[axis], (window - 1) * dilation + 1
        if over_axis is not None and dilation == 1 and window == length:
            x = jnp.expand_dims(over_axis(x, axis), axis)
            continue
        places = (length - span) // stride * stride + 1
        starts = range(0, window * dilation, dilation)
        parts = [lax.slice_in_dim(x, start, start + places, stride, axis) for start in starts]
        x = reduce(combine, parts)
    return x


def _pool_by_program(
    x: jax.Array, initial: jax.Array, *, jaxpr: Any, consts: Sequence[Any], **windows: Any
):
    """Reduces windows by a reducer of the user's."""
    program = jaxpr_as_fun(ClosedJaxpr(jaxpr, consts))

    def combine(left: jax.Array, right: jax.Array) -> jax.Array:
        (result,) = program(left, right)
        return result

    return [combine(_over_windows(combine, None, initial, x, **windows), initial)]


def _pad(
    x: jax.Array, value: jax.Array, *, padding_config: Sequence[tuple[int, int, int]]
) -> jax.Array:
    """Pads with plain ONNX operators: interior padding by a reshape, negative padding by a slice."""
    for axis, (low, high, interior) in enumerate(padding_config):
        if interior and x.shape[axis] > 1:
            length, apart = x.shape[axis], jnp.expand_dims(x, axis + 1)
            gaps = [(0, 0, 0)] * apart.ndim
            gaps[axis + 1] = (0, interior, 0)
            joined = lax.pad(apart, value, gaps)
            x = joined.reshape(*x.shape[:axis], length * (interior + 1), *x.shape[axis + 1 :])
            x = lax.slice_in_dim(x, 0, length * (interior + 1) - interior, axis=axis)
        if low < 0 or high < 0:
            x = lax.slice_in_dim(x, max(0, -low), x.shape[axis] + min(0, high), axis=axis)
    outside = [(max(0, low), max(0, high), 0) for low, high, _ in padding_config]
    return lax.pad(x, value, outside) if any(low or high for low, high, _ in outside) else x


def _cumulative_product(x: jax.Array, *, axis: int, reverse: bool) -> jax.Array:
    """Doubles the length of the products in every step (Hillis and Steele, 1986): ONNX has no such operator."""
    distance, length = 1, x.shape[axis]
    while distance < length:
        ones = jnp.ones_like(lax.slice_in_dim(x, 0, distance, axis=axis))
        if reverse:
            shifted = lax.concatenate(
                [lax.slice_in_dim(x, distance, length, axis=axis), ones], axis
            )
        else:
            shifted = lax.concatenate(
                [ones, lax.slice_in_dim(x, 0, length - distance, axis=axis)], axis
            )
        x, distance = x * shifted, 2 * distance
    return x


def _concatenate(*parts: jax.Array, dimension: int) -> jax.Array:
    """Leaves out empty arrays, which jax2onnx writes as if they had elements."""
    parts = tuple(part for part in parts if 0 not in part.shape) or parts[:1]
    return parts[0] if len(parts) == 1 else lax.concatenate_p.bind(*parts, dimension=dimension)


def _stack(*parts: jax.Array, axis: int, **_: Any) -> jax.Array:
    return _concatenate(*(jnp.expand_dims(part, axis) for part in parts), dimension=axis)


def _tile(x: jax.Array, *, reps: Sequence[int], **_: Any) -> jax.Array:
    for axis, times in enumerate(reps):
        x = x if times == 1 else _concatenate(*[x] * times, dimension=axis)
    return x


def _gather(x: jax.Array, indices: jax.Array, *, mode: Any, **params: Any) -> jax.Array:
    """Clips indices out of bounds, as `lax.dynamic_slice` has them under `vmap`; ONNX Runtime refuses them."""
    if mode == lax.GatherScatterMode.CLIP:
        axes = params["dimension_numbers"].start_index_map
        last = [x.shape[axis] - params["slice_sizes"][axis] for axis in axes]
        if all(isinstance(length, int) for length in last):
            last = np.array(last, indices.dtype).reshape((1,) * (indices.ndim - 1) + (-1,))
            indices = jnp.clip(indices, 0, last)
            mode = lax.GatherScatterMode.PROMISE_IN_BOUNDS
    return lax.gather_p.bind(x, indices, mode=mode, **params)


def _lowest(dtype: Any) -> Any:
    return -np.inf if jnp.issubdtype(dtype, jnp.inexact) else jnp.iinfo(dtype).min


def _highest(dtype: Any) -> Any:
    return np.inf if jnp.issubdtype(dtype, jnp.inexact) else jnp.iinfo(dtype).max


def _compare(primitive: Primitive) -> Rule:
    """Compares as ONNX does: unlike the total order of `sort`, NaN is not larger than any number."""
    return lambda left, right, **_: primitive.bind(left, right)


RULES: Mapping[str, Rule] = {
    "reduce_window_max": _pool(lax.max, jnp.max, _lowest),
    "reduce_window_min": _pool(lax.min, jnp.min, _highest),
    "reduce_window_sum": _pool(lax.add, jnp.sum, lambda dtype: 0),
    "reduce_window": _pool_by_program,
    "pad": _pad,
    "cumprod": _cumulative_product,
    "concatenate": _concatenate,
    "stack": _stack,
    "tile": _tile,
    "gather": _gather,
    "le_to": _compare(lax.le_p),
    "lt_to": _compare(lax.lt_p),
}
"""Rules by the name of the primitive; see `program.with_rules`."""
