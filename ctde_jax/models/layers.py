"""Code that several networks use: image and token inputs, and dropout."""

from collections.abc import Sequence
from typing import TypeAlias

from flax import nnx
from jax import numpy as jnp
from jaxtyping import Array, Float, Int

from ctde_jax.data import is_channels_first
from ctde_jax.errors import InputError, check_at_least, check_fraction

Images: TypeAlias = Float[Array, "examples height width channels"]
"""Images, or the outputs of a convolution."""


def check_image_shape(image_shape: Sequence[int], halvings: int) -> None:
    """Raises InputError for the shape of an image that a convolutional network cannot process.

    Args:
        image_shape: `(height, width)` or `(height, width, channels)`.
        halvings: Number of layers that halve height and width, of which one pixel must remain.
    """
    if len(image_shape) not in (2, 3):
        raise InputError(
            "image_shape",
            f"must be (height, width) or (height, width, channels), got {tuple(image_shape)}; "
            "for other inputs, use an mlp.",
        )
    # The layout of PyTorch, such as (3, 32, 32), has a valid number of axes.
    if is_channels_first(image_shape):
        raise InputError(
            "image_shape",
            f"must be (height, width, channels), got {tuple(image_shape)}, which appears to have "
            "the channels first; transpose the images with inputs.transpose(0, 2, 3, 1).",
        )

    # Each halving must leave at least one pixel.
    height, width, least = *image_shape[:2], 2**halvings
    if min(height, width) < least:
        raise InputError(
            "image_shape",
            f"must have at least {least} x {least} pixels for {halvings} halvings, got {height} x "
            f"{width}.",
        )
    check_at_least(1, channels=count_channels(image_shape))


def count_channels(image_shape: Sequence[int]) -> int:
    """Returns the number of channels, which is 1 for an image without a channel axis."""
    return (*image_shape, 1)[2]


def as_images(inputs: Float[Array, " examples *image_shape"], image_shape: Sequence[int]) -> Images:
    """Reshapes inputs to images with an axis of channels.

    Raises:
        InputError: If the shape of an input differs from `image_shape`.
    """
    if inputs.shape[1:] != tuple(image_shape):
        raise InputError(
            "image_shape",
            f"must be the shape of an input, {inputs.shape[1:]}, got {tuple(image_shape)}.",
        )
    # An image without a channel axis receives one.
    return inputs.reshape(*inputs.shape[:3], count_channels(image_shape))


def embed(
    tokens: Int[Array, "examples length"], table: nnx.Embed
) -> Float[Array, "examples length features"]:
    """Embeds tokens as vectors.

    Raises:
        InputError: If the tokens are not integers, or not sequences.
    """
    if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise InputError(
            "inputs",
            f"must be tokens, integers [examples, length], got {tokens.dtype} of shape "
            f"{tokens.shape}.",
        )

    # Without the cast, `nnx.Embed` returns float32 even if its parameters are cast to bfloat16:
    # it stores a dtype when it is built.
    return table(tokens).astype(table.embedding.dtype)


class Dropout(nnx.Dropout):
    """Zeroes random elements in training and scales up the others (Srivastava et al., 2014)."""

    def __init__(self, rate: float, *, rngs: nnx.Rngs):
        check_fraction(dropout_rate=rate)
        super().__init__(rate, rngs=rngs)
