"""Rewrites primitives that jax2onnx or ONNX Runtime lack to primitives that both support.

Pooling is an example: jax2onnx writes a MaxPool over all axes, including batch and channels, and
ONNX Runtime accepts at most three. Strided slices and their elementwise maximum are as fast in ONNX
Runtime, and support any number of axes, any dtype and any reducer.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from typing import Any

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp
from jax.extend.core import (
    ClosedJaxpr,  # pyright: ignore[reportPrivateImportUsage]
    Primitive,  # pyright: ignore[reportPrivateImportUsage]
    jaxpr_as_fun,  # pyright: ignore[reportPrivateImportUsage]
)

from ctde_jax.export.program import Rule

Combine = Callable[[jax.Array, jax.Array], jax.Array]
OverAxis = Callable[[jax.Array, int], jax.Array]
Padding = Sequence[tuple[int, int]]


def _pool(combine: Combine, over_axis: OverAxis, identity: Callable[[Any], Any]) -> Rule:
    """Returns the rule of a reduction over windows.

    Args:
        combine: Elementwise reducer of two arrays; associative and commutative.
        over_axis: Reduction of an array over one axis with the same reducer.
        identity: Function from a dtype to the identity element of the reducer.
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
    """Reduces windows axis by axis: pads, then combines one strided slice per window position.

    Args:
        combine: Elementwise reducer of two arrays; associative and commutative.
        over_axis: Reduction of an array over one axis with the same reducer; None if there is none.
        initial: Value of the padding.
        x: Array to reduce.
        window_dimensions: Parameters of `lax.reduce_window_p`, as all following.
        window_strides: See `window_dimensions`.
        padding: See `window_dimensions`.
        base_dilation: See `window_dimensions`.
        window_dilation: See `window_dimensions`.
    """
    # Pad with the identity; base dilation is interior padding.
    config = [
        (low, high, base - 1) for (low, high), base in zip(padding, base_dilation, strict=True)
    ]
    x = _pad(x, jnp.asarray(initial, x.dtype), padding_config=config)

    # A window over several axes is separable, as the reducer is associative and commutative.
    for axis, (window, stride, dilation) in enumerate(
        zip(window_dimensions, window_strides, window_dilation, strict=True)
    ):
        if window == stride == 1:
            continue
        length = x.shape[axis]
        span = (window - 1) * dilation + 1

        # A window as long as the axis, as in global pooling, is a single reduction.
        if over_axis is not None and dilation == 1 and window == length:
            x = jnp.expand_dims(over_axis(x, axis), axis)
            continue

        # One slice per position in the window, each with one element per window.
        covered = (length - span) // stride * stride + 1
        starts = range(0, window * dilation, dilation)
        parts = [lax.slice_in_dim(x, start, start + covered, stride, axis) for start in starts]
        x = reduce(combine, parts)
    return x


def _pool_by_program(
    x: jax.Array, initial: jax.Array, *, jaxpr: Any, consts: Sequence[Any], **windows: Any
):
    """Reduces windows with a user-defined reducer, given as a jaxpr."""
    program = jaxpr_as_fun(ClosedJaxpr(jaxpr, consts))

    def combine(left: jax.Array, right: jax.Array) -> jax.Array:
        (result,) = program(left, right)
        return result

    # As in `lax.reduce_window`, each window is combined with the initial value, identity or not.
    return [combine(_over_windows(combine, None, initial, x, **windows), initial)]


def _pad(
    x: jax.Array, value: jax.Array, *, padding_config: Sequence[tuple[int, int, int]]
) -> jax.Array:
    """Pads as `lax.pad`: interior padding by a reshape, negative padding by a slice."""
    for axis, (low, high, interior) in enumerate(padding_config):
        # Interior: [..., n, ...] -> [..., n, 1 + interior, ...] -> flat, less the last gap.
        if interior and x.shape[axis] > 1:
            length = x.shape[axis]
            apart = jnp.expand_dims(x, axis + 1)
            gaps = [(0, 0, 0)] * apart.ndim
            gaps[axis + 1] = (0, interior, 0)
            joined = lax.pad(apart, value, gaps)
            x = joined.reshape(*x.shape[:axis], length * (interior + 1), *x.shape[axis + 1 :])
            x = lax.slice_in_dim(x, 0, length * (interior + 1) - interior, axis=axis)
        if low < 0 or high < 0:
            x = lax.slice_in_dim(x, max(0, -low), x.shape[axis] + min(0, high), axis=axis)

    # The rest is nonnegative padding at the edges, which the Pad operator supports.
    outside = [(max(0, low), max(0, high), 0) for low, high, _ in padding_config]
    return lax.pad(x, value, outside) if any(low or high for low, high, _ in outside) else x


def _cumulative_product(x: jax.Array, *, axis: int, reverse: bool) -> jax.Array:
    """Computes cumulative products, for which ONNX has no operator.

    Recursive doubling (Hillis and Steele, 1986) needs a logarithmic number of products.
    """
    # Each element of x is the product of `distance` elements of the original array, or fewer at
    # the edge.
    distance = 1
    length = x.shape[axis]
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
        x = x * shifted
        distance = 2 * distance
    return x


def _concatenate(*parts: jax.Array, dimension: int) -> jax.Array:
    """Concatenates without empty arrays, which jax2onnx writes as if they had elements."""
    parts = tuple(part for part in parts if 0 not in part.shape) or parts[:1]
    return parts[0] if len(parts) == 1 else lax.concatenate_p.bind(*parts, dimension=dimension)


def _stack(*parts: jax.Array, axis: int, **_: Any) -> jax.Array:
    return _concatenate(*(jnp.expand_dims(part, axis) for part in parts), dimension=axis)


def _tile(x: jax.Array, *, reps: Sequence[int], **_: Any) -> jax.Array:
    for axis, times in enumerate(reps):
        x = x if times == 1 else _concatenate(*[x] * times, dimension=axis)
    return x


def _gather(x: jax.Array, indices: jax.Array, *, mode: Any, **params: Any) -> jax.Array:
    """Gathers with clipped indices if the mode is CLIP, as in `lax.dynamic_slice` under `vmap`.

    ONNX Runtime refuses indices out of bounds.
    """
    if mode == lax.GatherScatterMode.CLIP:
        # The last valid start of a slice along each indexed axis.
        axes = params["dimension_numbers"].start_index_map
        last = [x.shape[axis] - params["slice_sizes"][axis] for axis in axes]

        # A symbolic length is not a number to clip to, so such a gather stays as it is.
        if all(isinstance(length, int) for length in last):
            last = np.array(last, indices.dtype).reshape((1,) * (indices.ndim - 1) + (-1,))
            indices = jnp.clip(indices, 0, last)
            mode = lax.GatherScatterMode.PROMISE_IN_BOUNDS
    return lax.gather_p.bind(x, indices, mode=mode, **params)


def _lowest(dtype: Any) -> Any:
    """Returns the identity element of the maximum: the lowest value of a dtype."""
    return -np.inf if jnp.issubdtype(dtype, jnp.inexact) else jnp.iinfo(dtype).min


def _highest(dtype: Any) -> Any:
    """Returns the identity element of the minimum: the highest value of a dtype."""
    return np.inf if jnp.issubdtype(dtype, jnp.inexact) else jnp.iinfo(dtype).max


def _compare(primitive: Primitive) -> Rule:
    """Returns the rule that replaces a comparison in total order by `primitive`.

    In the total order, which `sort` uses, NaN is the largest number. ONNX has only the ordinary
    comparison.
    """
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
"""Rules by primitive name; see `program.with_rules`."""
