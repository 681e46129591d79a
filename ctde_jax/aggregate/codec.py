"""Codecs encode float vectors as the bytes that replicas send, and decode them.

A codec does not depend on the replicas: `exchange.py` sends its payload. Side information, such as
scales and positions, is part of the payload. Payloads are uint8: XLA widens small floats and
integers if a collective sums them, but sends bytes unchanged.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
from jax import lax
from jax import numpy as jnp

from ctde_jax.devices import PyTree
from ctde_jax.errors import InputError


class Codec(NamedTuple):
    """Encodes and decodes vectors, each row of `[..., size]` by itself."""

    block: int
    """`size` must be a multiple of this."""

    init: Callable[[tuple[int, ...]], PyTree]
    """`init(shape) -> state` for values of this shape.

    Every array in the state has the shape of the values too, so that an exchange can update the
    state of some numbers and keep that of others.
    """

    encode: Callable[[jax.Array, PyTree, jax.Array], tuple[jax.Array, jax.Array, PyTree]]
    """`encode(values, state, key) -> (payload, decoded, state)`

    `values` and `decoded` are `float32[..., size]`, and `payload` is `uint8[..., bytes]`. `decoded`
    is what `decode` returns for the payload.
    """

    decode: Callable[[jax.Array, int, jax.Array], jax.Array]
    """`decode(payload, size, key) -> values`, with the shapes and the key of `encode`."""


def exact() -> Codec:
    """Encodes numbers unchanged, as 4 bytes each."""
    # The bits are copied, so the decoded values are the values themselves.
    return Codec(
        block=1,
        init=lambda shape: (),
        encode=lambda values, state, key: (to_bytes(values), values, state),
        decode=lambda payload, size, key: from_bytes(payload),
    )


class ErrorFeedbackState(NamedTuple):
    """The encoding error that is still to be sent, and the state of the wrapped codec."""

    residual: jax.Array  # float32, shaped like the values
    codec: PyTree


def error_feedback(codec: Codec, decay: float = 1.0) -> Codec:
    """Adds the encoding error of each round to the next message (Seide et al., 2014).

    The decoded message plus the new residual always equals the target, `values + decay * residual`
    (Karimireddy et al., 2019). In a two-phase exchange this holds for both senders and owners, as
    both encode.

    Args:
        codec: Codec to wrap.
        decay: Factor of the last residual, from 0 to 1; below 1 it is gradually forgotten
            (SparseLoCo uses 0.95).

    Raises:
        InputError: `decay` is not from 0 to 1.
    """
    if not 0 <= decay <= 1:
        raise InputError("decay", f"must be from 0 to 1, got {decay}.")

    def init(shape: tuple[int, ...]) -> ErrorFeedbackState:
        # The residual has the shape of the values, as `Codec.init` requires.
        return ErrorFeedbackState(jnp.zeros(shape), codec.init(shape))

    def encode(values, state: ErrorFeedbackState, key):
        wanted = values + decay * state.residual
        payload, said, codec_state = codec.encode(wanted, state.codec, key)
        return payload, said, ErrorFeedbackState(wanted - said, codec_state)

    return Codec(codec.block, init, encode, codec.decode)


def to_bytes(values: jax.Array) -> jax.Array:
    """Reinterprets `float32[..., n]` as `uint8[..., 4 n]`."""
    # The bitcast appends an axis of 4 bytes, which is merged into the last axis.
    return lax.bitcast_convert_type(values, jnp.uint8).reshape(*values.shape[:-1], -1)


def from_bytes(payload: jax.Array) -> jax.Array:
    """Reinterprets `uint8[..., 4 n]` as `float32[..., n]`."""
    return lax.bitcast_convert_type(payload.reshape(*payload.shape[:-1], -1, 4), jnp.float32)
