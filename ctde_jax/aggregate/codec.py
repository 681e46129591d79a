"""Codecs turn numbers into the bytes that travel, and back.

A codec knows nothing of replicas: `exchange.py` sends what it writes. Whatever must travel with the numbers (scales,
positions) stands in the same bytes. XLA widens small floats and integers that it adds up on the way, but it leaves
bytes as they are; so every payload here is uint8.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
from jax import lax
from jax import numpy as jnp

from ctde_jax.devices import PyTree
from ctde_jax.errors import InputError


class Codec(NamedTuple):
    """A way of writing vectors; every row of `[..., size]` is written on its own."""

    block: int
    """The size of what is written must be a multiple of this."""

    init: Callable[[tuple[int, ...]], PyTree]
    """`init(shape) -> state`, for values of this shape; every array of the state has that shape, too."""

    encode: Callable[[jax.Array, PyTree, jax.Array], tuple[jax.Array, jax.Array, PyTree]]
    """`encode(values float32[..., size], state, key) -> (payload uint8[..., bytes], said, state)`

    `said`, float32[..., size], is what will be read.
    """

    decode: Callable[[jax.Array, int, jax.Array], jax.Array]
    """`decode(payload uint8[..., bytes], size, key) -> float32[..., size]`; the key is the one of `encode`."""


def exact() -> Codec:
    """Writes numbers as they are, in 4 bytes each."""
    return Codec(
        block=1,
        init=lambda shape: (),
        encode=lambda values, state, key: (to_bytes(values), values, state),
        decode=lambda payload, size, key: from_bytes(payload),
    )


class ErrorFeedbackState(NamedTuple):
    """What the codec could not say so far."""

    residual: jax.Array  # float32, shaped like the values
    codec: PyTree


def error_feedback(codec: Codec, decay: float = 1.0) -> Codec:
    """Says next time what the codec could not say this time (Seide et al., 2014; Karimireddy et al., 2019).

    What is sent and what is kept are always what was wanted: `sent + residual = values + decay * last residual`. In a
    two-phase exchange this holds on the sender's side and on the owner's, as both write with the codec.

    Args:
        codec: What writes the numbers.
        decay: The part of the last residual that is still wanted; less than 1 forgets (SparseLoCo uses 0.95).

    Raises:
        InputError: The decay is not from 0 to 1.
    """
    if not 0 <= decay <= 1:
        raise InputError("decay", f"must be from 0 to 1, got {decay}.")

    def init(shape: tuple[int, ...]) -> ErrorFeedbackState:
        return ErrorFeedbackState(jnp.zeros(shape), codec.init(shape))

    def encode(values, state: ErrorFeedbackState, key):
        wanted = values + decay * state.residual
        payload, said, codec_state = codec.encode(wanted, state.codec, key)
        return payload, said, ErrorFeedbackState(wanted - said, codec_state)

    return Codec(codec.block, init, encode, codec.decode)


def to_bytes(values: jax.Array) -> jax.Array:
    """Writes `float32[..., n]` as `uint8[..., 4 n]`."""
    return lax.bitcast_convert_type(values, jnp.uint8).reshape(*values.shape[:-1], -1)


def from_bytes(payload: jax.Array) -> jax.Array:
    """Reads `uint8[..., 4 n]` as `float32[..., n]`."""
    return lax.bitcast_convert_type(payload.reshape(*payload.shape[:-1], -1, 4), jnp.float32)
