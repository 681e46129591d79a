"""Convolutions that are fast in a loop on a CPU, on which fake devices train.

XLA converts a convolution to the form that its CPU library supports only outside of loops. Training
is a loop, in which the gradient of a kernel takes 30 times as long
(https://github.com/jax-ml/jax/issues/12868). On a CPU, the gradients are therefore computed here:
that of the inputs by a convolution already in this form, that of the kernel by one matrix product
per tap, over as many images at a time as fit into the cache.

Virtual replicas have different kernels in local steps. `vmap` over kernels makes a grouped
convolution, which is slow on a CPU, so there the kernels are taken one after another.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from math import ceil
from typing import Any, TypeAlias

import jax
from flax import nnx
from jax import lax
from jax import numpy as jnp
from jaxtyping import Array, Float

from ctde_jax.models.layers import Images

_CACHE = 2**23  # bytes, of inputs and gradients together
LAYOUT = ("NHWC", "HWIO", "NHWC")
"""The layout that the CPU library supports: examples, height, width, channels."""

ConvKernel: TypeAlias = Float[Array, "height width in_channels out_channels"]
"""Kernel of a convolution; `height` and `width` count its taps."""


class Conv(nnx.Conv):
    """An `nnx.Conv` over `[examples, height, width, channels]`, without groups or dilation."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: tuple[int, int],
        strides: int = 1,
        use_bias: bool = True,
        *,
        rngs: nnx.Rngs,
    ):
        options = {"strides": strides, "use_bias": use_bias, "conv_general_dilated": convolve}
        super().__init__(in_features, out_features, kernel_size, **options, rngs=rngs)


def convolve(
    inputs: Images, kernel: ConvKernel, strides: Sequence[int], padding: str, **layout: Any
) -> Images:
    """Convolves images with a kernel, as `lax.conv_general_dilated` does.

    Args:
        inputs: Images.
        kernel: Kernel of the same dtype.
        strides: Strides for height and width.
        padding: Either "SAME" or "VALID".
        **layout: Other arguments from flax, ignored because they are always the same here.
    """
    # The gradients need the padding as numbers.
    sides = lax.padtype_to_pads(inputs.shape[1:3], kernel.shape[:2], strides, padding)
    return _convolve(inputs, kernel, tuple(strides), tuple(sides))


Sides = tuple[tuple[int, int], ...]
"""Padding: the numbers of zeros before and after the height, and the width."""


def _plain(inputs: Images, kernel: ConvKernel, strides: tuple[int, ...], sides: Sides) -> Images:
    return lax.conv_general_dilated(inputs, kernel, strides, sides, dimension_numbers=LAYOUT)


_convolve = jax.custom_vjp(_plain, nondiff_argnums=(2, 3))


def _forward(inputs, kernel, strides, sides):
    convolution = _one_kernel_at_a_time(partial(_plain, strides=strides, sides=sides))
    return convolution(inputs, kernel), (inputs, kernel)


def _backward(strides, sides, seen, grads):
    # On other platforms the gradients are those of JAX.
    def on_cpu(inputs: Images, kernel: ConvKernel, grads: Images) -> tuple[Images, ConvKernel]:
        to_inputs = _grads_of_inputs(inputs.shape, kernel, strides, sides, grads)
        return to_inputs, _grads_of_kernel(inputs, kernel, strides, sides, grads)

    def elsewhere(inputs: Images, kernel: ConvKernel, grads: Images) -> tuple[Images, ConvKernel]:
        _, pull_back = jax.vjp(partial(_plain, strides=strides, sides=sides), inputs, kernel)
        return pull_back(grads)

    return lax.platform_dependent(*seen, grads, cpu=on_cpu, default=elsewhere)


_convolve.defvjp(_forward, _backward)


def _one_kernel_at_a_time(
    convolution: Callable[[Images, ConvKernel], Images],
) -> Callable[[Images, ConvKernel], Images]:
    """Makes `vmap` over kernels a loop on a CPU; elsewhere, it is a grouped convolution."""
    mapped = jax.custom_batching.custom_vmap(convolution)

    @mapped.def_vmap
    def over_kernels(size, is_mapped, inputs, kernels):
        if not is_mapped[1]:
            # More images of one kernel, over which an outer `vmap` may map.
            outputs = mapped(inputs.reshape(-1, *inputs.shape[2:]), kernels)
            return outputs.reshape(size, -1, *outputs.shape[1:]), True
        axes = [0 if each else None for each in is_mapped]
        in_a_loop = jax.vmap(jax.custom_batching.sequential_vmap(convolution), axes)
        grouped = jax.vmap(convolution, axes)
        return lax.platform_dependent(inputs, kernels, cpu=in_a_loop, default=grouped), True

    return mapped


def _grads_of_inputs(
    shape: tuple[int, ...],
    kernel: ConvKernel,
    strides: tuple[int, ...],
    sides: Sides,
    grads: Images,
) -> Images:
    # The transposed convolution: `grads`, dilated by the strides, with the mirrored kernel.
    before = [taps - 1 - zeros for taps, (zeros, _) in zip(kernel.shape[:2], sides, strict=True)]
    reach = [
        stride * (places - 1) + 1 for stride, places in zip(strides, grads.shape[1:3], strict=True)
    ]
    # `reach` is the extent of the dilated gradients. The padding after them also covers inputs that
    # no tap reaches, so that the result has the size of the inputs.
    after = [
        length + taps - 1 - spread - zeros
        for length, taps, spread, zeros in zip(
            shape[1:3], kernel.shape[:2], reach, before, strict=True
        )
    ]
    mirrored = lax.rev(kernel, (0, 1)).transpose(0, 1, 3, 2)
    around = tuple(zip(before, after, strict=True))
    transposed = partial(
        lax.conv_general_dilated,
        window_strides=(1, 1),
        padding=around,
        lhs_dilation=strides,
        dimension_numbers=LAYOUT,
    )
    return _one_kernel_at_a_time(transposed)(grads, mirrored)


def _grads_of_kernel(
    inputs: Images, kernel: ConvKernel, strides: tuple[int, ...], sides: Sides, grads: Images
) -> ConvKernel:
    """Returns the gradient of the kernel.

    A few images are processed at a time, so that they stay in the cache while all taps read them.
    """
    # Equal groups, as few as fit; the zeros that fill the last one add nothing to the sum.
    pictures = len(inputs)
    groups = ceil(pictures / max(1, _CACHE // ((inputs.nbytes + grads.nbytes) // pictures)))
    size = ceil(pictures / groups)

    # Sum over groups in float32, even if the inputs are bfloat16.
    def add_group(total: ConvKernel, group: tuple[Images, Images]) -> tuple[ConvKernel, None]:
        return total + _grads_of_taps(*group, kernel.shape, strides, sides).astype(
            jnp.float32
        ), None

    def cut(array: Images) -> Float[Array, "groups size height width channels"]:
        filled = jnp.pad(array, [(0, groups * size - pictures), (0, 0), (0, 0), (0, 0)])
        return filled.reshape(groups, size, *array.shape[1:])

    total, _ = lax.scan(add_group, jnp.zeros(kernel.shape), (cut(inputs), cut(grads)))
    return total.astype(kernel.dtype)


def _grads_of_taps(
    inputs: Images,
    grads: Images,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    sides: Sides,
) -> ConvKernel:
    # A tap multiplies every `stride`-th pixel from its position, as many as there are outputs.
    padded = jnp.pad(inputs, [(0, 0), *sides, (0, 0)])

    def at_tap(tap: tuple[int, ...]) -> Float[Array, "in_channels out_channels"]:
        rows, columns = (
            slice(first, first + stride * (places - 1) + 1, stride)
            for first, stride, places in zip(tap, strides, grads.shape[1:3], strict=True)
        )
        return jnp.einsum("nhwi,nhwo->io", padded[:, rows, columns], grads)

    taps = product(*map(range, shape[:2]))
    return jnp.stack([at_tap(tap) for tap in taps]).reshape(shape)
