"""Codecs encode float vectors as the bytes that replicas send, and decode them.

A codec does not depend on the replicas: `exchange.py` sends its payload. Side information, such as
scales and positions, is part of the payload. Payloads are uint8: XLA widens small floats and
integers if a collective sums them, but sends bytes unchanged.
"""

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

from jax import lax
from jax import numpy as jnp
from jaxtyping import Array, Float32, Key, UInt8

from ctde_jax.devices import PyTree
from ctde_jax.errors import InputError

Payload: TypeAlias = UInt8[Array, "... bytes"]
"""Encoded vectors."""


class Codec(NamedTuple):
    """Encodes and decodes vectors; rows are encoded independently.

    Examples:
        >>> codec = ctde.aggregate.exact()
        >>> values, key = np.array([1, 2, 3], np.float32), jax.random.key(0)
        >>> payload, decoded, state = codec.encode(values, codec.init(values.shape), key)
        >>> codec.decode(payload, 3, key)
        Array([1., 2., 3.], dtype=float32)
    """

    block: int
    """The size of a vector must be a multiple of this."""

    init: Callable[[tuple[int, ...]], PyTree]
    """`init(shape) -> state` for values of this shape.

    Every array in the state has the shape of the values, so that an exchange can update the state
    of some elements and keep that of others.
    """

    encode: Callable[
        [Float32[Array, "... size"], PyTree, Key[Array, ""]],
        tuple[UInt8[Array, "... bytes"], Float32[Array, "... size"], PyTree],
    ]
    """`encode(values, state, key) -> (payload, decoded, state)`

    `decoded` is what `decode` returns for the payload.
    """

    decode: Callable[[UInt8[Array, "... bytes"], int, Key[Array, ""]], Float32[Array, "... size"]]
    """`decode(payload, size, key) -> values`, with the key of `encode`."""


def exact() -> Codec:
    """Encodes numbers unchanged, as 4 bytes each: `float32[..., n]` as `uint8[..., 4 n]`.

    Examples:
        >>> codec = ctde.aggregate.exact()
        >>> strategy = ctde.Strategy(reduce=ctde.aggregate.two_phase(codec))
    """
    # The bits are copied, so the decoded values are the values themselves.
    return Codec(
        block=1,
        init=lambda shape: (),
        encode=lambda values, state, key: (to_bytes(values), values, state),
        decode=lambda payload, size, key: from_bytes(payload),
    )


class ErrorFeedbackState(NamedTuple):
    """The encoding error that is added to the next message, and the state of the wrapped codec."""

    residual: Float32[Array, "... size"]
    codec: PyTree


def error_feedback(codec: Codec, decay: float = 1.0) -> Codec:
    """Adds the encoding error of each round to the next message (Seide et al., 2014).

    The decoded message plus the new residual always equals the target, `values + decay * residual`
    (Karimireddy et al., 2019). In a two-phase exchange this holds for both senders and owners, as
    both encode.

    Args:
        codec: Codec to wrap.
        decay: Factor of the residual in the next round, from 0 to 1 (SparseLoCo uses 0.95).

    Raises:
        InputError: `decay` is not from 0 to 1.

    Examples:
        >>> codec = ctde.aggregate.error_feedback(ctde.aggregate.sign(), decay=0.95)
        >>> strategy = ctde.Strategy(inner_steps=16, reduce=ctde.aggregate.two_phase(codec))
    """
    if not 0 <= decay <= 1:
        raise InputError("decay", f"must be from 0 to 1, got {decay}.")

    def init(shape: tuple[int, ...]) -> ErrorFeedbackState:
        # The residual has the shape of the values, as `Codec.init` requires.
        return ErrorFeedbackState(jnp.zeros(shape), codec.init(shape))

    def encode(values, state: ErrorFeedbackState, key):
        target = values + decay * state.residual
        payload, decoded, codec_state = codec.encode(target, state.codec, key)
        return payload, decoded, ErrorFeedbackState(target - decoded, codec_state)

    return Codec(codec.block, init, encode, codec.decode)


def to_bytes(values: Float32[Array, "... n"]) -> UInt8[Array, "... 4*n"]:
    """Reinterprets each float32 as its 4 bytes."""
    # The bitcast appends an axis of 4 bytes, which is merged into the last axis.
    return lax.bitcast_convert_type(values, jnp.uint8).reshape(*values.shape[:-1], -1)


def from_bytes(payload: UInt8[Array, "... bytes"]) -> Float32[Array, "... bytes//4"]:
    """Inverts `to_bytes`."""
    return lax.bitcast_convert_type(payload.reshape(*payload.shape[:-1], -1, 4), jnp.float32)
