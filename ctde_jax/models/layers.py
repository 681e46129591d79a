"""What several networks have in common: how pictures and tokens come in, and dropout."""

from collections.abc import Sequence

import jax
from flax import nnx
from jax import numpy as jnp

from ctde_jax.data import is_channels_first
from ctde_jax.errors import InputError, check_at_least


def check_image_shape(image_shape: Sequence[int], halvings: int) -> None:
    """Raises InputError for what is no picture, or is too small to be halved so often."""
    if len(image_shape) not in (2, 3):
        raise InputError(
            "image_shape",
            f"must be (height, width) or (height, width, channels), got {tuple(image_shape)}; "
            "what is no picture goes into an mlp.",
        )
    if is_channels_first(image_shape):
        raise InputError(
            "image_shape",
            f"must be (height, width, channels), got {tuple(image_shape)}, which seems to have the channels first; "
            "transpose the pictures with inputs.transpose(0, 2, 3, 1).",
        )
    height, width, least = *image_shape[:2], 2**halvings
    if min(height, width) < least:
        raise InputError(
            "image_shape",
            f"must have at least {least} x {least} pixels for {halvings} halvings, got {height} x {width}.",
        )
    check_at_least(1, channels=count_channels(image_shape))


def count_channels(image_shape: Sequence[int]) -> int:
    """Returns the channels of a picture, of which one without a channel axis has 1."""
    return (*image_shape, 1)[2]


def as_images(inputs: jax.Array, image_shape: Sequence[int]) -> jax.Array:
    """Returns the inputs as `[examples, height, width, channels]`.

    Raises:
        InputError: They have another shape than the network was built for.
    """
    if inputs.shape[1:] != tuple(image_shape):
        raise InputError(
            "image_shape",
            f"must be that of an input, {inputs.shape[1:]}, got {tuple(image_shape)}.",
        )
    return inputs.reshape(*inputs.shape[:3], count_channels(image_shape))


def embed(tokens: jax.Array, table: nnx.Embed) -> jax.Array:
    """Looks up the vectors of tokens, `int32[examples, length]` to `[examples, length, width]`.

    Raises:
        InputError: They are not integers, or not sequences.
    """
    if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise InputError(
            "inputs",
            f"must be tokens, integers [examples, length], got {tokens.dtype} of the shape {tokens.shape}.",
        )
    return table(tokens).astype(
        table.embedding.dtype
    )  # float32 otherwise, though parameters may be bfloat16


class Dropout(nnx.Dropout):
    """Sets a share of the numbers to zero in training, and scales up the others (Srivastava et al., 2014)."""

    def __init__(self, rate: float, *, rngs: nnx.Rngs):
        if not 0 <= rate < 1:
            raise InputError("dropout", f"must be at least 0 and less than 1, got {rate}.")
        super().__init__(rate, rngs=rngs)
