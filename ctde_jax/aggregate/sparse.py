"""Sparse codecs: the elements of largest magnitude in each chunk, or randomly chosen elements."""

from collections.abc import Callable
from typing import TypeAlias

import jax
from jax import lax
from jax import numpy as jnp
from jaxtyping import Array, Float32, Int, Int32, Key, UInt8

from ctde_jax.aggregate.codec import Codec, Payload, exact
from ctde_jax.errors import InputError

Chunks: TypeAlias = Float32[Array, "... chunks chunk"]
"""Vectors, cut into chunks of equal size."""

Positions: TypeAlias = Int32[Array, "... chunks k"]
"""Positions in each chunk of the elements that are kept."""


def top_k(k: int, chunk: int = 4096, values: Codec = exact()) -> Codec:
    """Encodes the k largest magnitudes of each chunk and their packed positions.

    SparseLoCo (Sarfi et al., 2025) selects elements in this way. The positions of c chunks take
    `ceil(c * k * bits / 8)` bytes, with `bits` the logarithm `log2(chunk)` rounded up; they are
    followed by the `c * k` elements, as encoded by `values`. All other elements decode to zero.

    Args:
        k: Number of elements to keep in each chunk.
        chunk: Number of elements in a chunk.
        values: Stateless codec of the elements that are kept.

    Raises:
        InputError: `k` is not from 1 to `chunk`, or not a multiple of the block of `values`.

    Examples:
        >>> codec = ctde.aggregate.top_k(k=2, chunk=8)
        >>> values = np.array([3, 0, 1, 0, -5, 0, 2, 0], np.float32)
        >>> payload, decoded, _ = codec.encode(values, codec.init(values.shape), jax.random.key(0))
        >>> payload.nbytes, decoded
        (9, Array([ 3.,  0.,  0.,  0., -5.,  0.,  0.,  0.], dtype=float32))
    """
    bits = max(1, (chunk - 1).bit_length())

    def choose(chunks: Chunks, key: Key[Array, ""]) -> Positions:
        return jnp.sort(lax.top_k(jnp.abs(chunks), k)[1], axis=-1)

    def write(positions: Positions) -> Payload:
        return pack_integers(positions.reshape(*positions.shape[:-2], -1), bits)

    def read(
        payload: Payload, shape: tuple[int, ...], key: Key[Array, ""]
    ) -> tuple[Positions, Payload]:
        # The positions of all chunks come first.
        count = shape[-2] * k
        border = -(-count * bits // 8)
        return unpack_integers(payload[..., :border], bits, count).reshape(shape), payload[
            ..., border:
        ]

    return _chunkwise(k, chunk, values, choose, write, read)


def random_k(k: int, chunk: int = 4096, values: Codec = exact()) -> Codec:
    """Encodes k random elements of each chunk, whose positions follow from the key of the round.

    Positions are not sent, as every replica draws the same ones. (Konečný et al., 2016, call this a
    random mask.) All other elements decode to zero, so use it with error feedback. The `c * k`
    elements of c chunks are encoded by `values`.

    Args:
        k: Number of elements to keep in each chunk.
        chunk: Number of elements in a chunk.
        values: Stateless codec of the elements that are kept.

    Raises:
        InputError: `k` is not from 1 to `chunk`, or not a multiple of the block of `values`.

    Examples:
        >>> codec = ctde.aggregate.error_feedback(ctde.aggregate.random_k(k=128, chunk=4096))
        >>> strategy = ctde.Strategy(reduce=ctde.aggregate.two_phase(codec))
    """

    def draw(shape: tuple[int, ...], key: Key[Array, ""]) -> Positions:
        # The positions of the k largest of random numbers are a choice without replacement. All
        # rows share the choice.
        positions = lax.top_k(jax.random.bits(key, (shape[-2], chunk)), k)[1]
        return jnp.broadcast_to(positions, (*shape[:-1], k))

    return _chunkwise(
        k=k,
        chunk=chunk,
        values=values,
        choose=lambda chunks, key: draw(chunks.shape, key),
        write=lambda positions: jnp.zeros((*positions.shape[:-2], 0), jnp.uint8),
        read=lambda payload, shape, key: (draw(shape, key), payload),
    )


def _chunkwise(
    k: int,
    chunk: int,
    values: Codec,
    choose: Callable[[Chunks, Key[Array, ""]], Positions],
    write: Callable[[Positions], Payload],
    read: Callable[[Payload, tuple[int, ...], Key[Array, ""]], tuple[Positions, Payload]],
) -> Codec:
    """Makes a codec that keeps k elements of each chunk.

    Args:
        k: Number of elements to keep in each chunk.
        chunk: Number of elements in a chunk.
        values: Stateless codec of the elements that are kept.
        choose: `choose(chunks, key) -> positions`
        write: `write(positions) -> payload`
        read: `read(payload, shape of the positions, key) -> (positions, the rest of the payload)`
    """
    if not 1 <= k <= chunk:
        raise InputError("k", f"must be from 1 to {chunk}, the chunk size, got {k}.")
    if k % values.block:
        raise InputError(
            "k",
            f"must be a multiple of {values.block}, the block size of the values, got {k}.",
        )

    def scatter(
        positions: Positions, kept: Float32[Array, "... kept"]
    ) -> Float32[Array, "... size"]:
        # [..., c, k] -> [..., c, chunk], zeros elsewhere -> [..., size]
        zeros = jnp.zeros((*positions.shape[:-1], chunk))
        placed = jnp.put_along_axis(
            zeros, positions, kept.reshape(positions.shape), axis=-1, inplace=False
        )
        return placed.reshape(*placed.shape[:-2], -1)

    def encode(numbers, state, key):
        # [..., size] -> [..., c, chunk] -> kept numbers [..., c * k]
        chunks = numbers.reshape(*numbers.shape[:-1], -1, chunk)
        positions = choose(chunks, key)
        kept = jnp.take_along_axis(chunks, positions, axis=-1).reshape(*numbers.shape[:-1], -1)
        payload, decoded, _ = values.encode(kept, (), key)
        return (
            jnp.concatenate([write(positions), payload], axis=-1),
            scatter(positions, decoded),
            state,
        )

    def decode(payload, size, key):
        shape = (*payload.shape[:-1], size // chunk, k)
        positions, payload = read(payload, shape, key)
        return scatter(positions, values.decode(payload, shape[-2] * k, key))

    return Codec(chunk, lambda shape: (), encode, decode)


def pack_integers(integers: Int[Array, "... n"], bits: int) -> UInt8[Array, "... bytes"]:
    """Packs integers of `bits` bits each into `ceil(n * bits / 8)` bytes."""
    # Bits in a trailing axis, lowest first.
    shifts = jnp.arange(bits).reshape((1,) * integers.ndim + (bits,))
    return jnp.packbits(
        ((integers[..., None] >> shifts) & 1).reshape(*integers.shape[:-1], -1), axis=-1
    )


def unpack_integers(
    packed: UInt8[Array, "... bytes"], bits: int, count: int
) -> Int32[Array, "... count"]:
    """Inverts `pack_integers`."""
    ones = jnp.unpackbits(packed, axis=-1, count=count * bits).reshape(
        *packed.shape[:-1], count, bits
    )
    shifts = jnp.arange(bits).reshape((1,) * packed.ndim + (bits,))
    return jnp.sum(ones.astype(jnp.int32) << shifts, axis=-1)
