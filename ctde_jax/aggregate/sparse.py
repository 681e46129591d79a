"""Few numbers instead of all: the largest of each chunk, or a random choice that needs no positions."""

from collections.abc import Callable

import jax
from jax import lax
from jax import numpy as jnp

from ctde_jax.aggregate.codec import Codec, exact
from ctde_jax.errors import InputError


def top_k(k: int, chunk: int = 4096, values: Codec = exact()) -> Codec:
    """Writes the k largest magnitudes of each chunk and their packed positions (SparseLoCo, Sarfi et al., 2025).

    The positions of c chunks take `ceil(c * k * bits / 8)` bytes, where `bits` is `log2(chunk)` rounded up, and their
    `c * k` numbers what `values` makes of them.

    Args:
        k: Numbers to keep in each chunk.
        chunk: Numbers in a chunk.
        values: Writes the numbers that are kept; it must have no state of its own.

    Raises:
        InputError: k is not from 1 to the chunk, or no multiple of the block of `values`.
    """
    bits = max(1, (chunk - 1).bit_length())

    def choose(chunks: jax.Array, key: jax.Array) -> jax.Array:
        return jnp.sort(lax.top_k(jnp.abs(chunks), k)[1], axis=-1)

    def write(positions: jax.Array) -> jax.Array:
        return pack_integers(positions.reshape(*positions.shape[:-2], -1), bits)

    def read(
        payload: jax.Array, shape: tuple[int, ...], key: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        count = shape[-2] * k
        border = -(-count * bits // 8)
        return unpack_integers(payload[..., :border], bits, count).reshape(shape), payload[
            ..., border:
        ]

    return _chunkwise(k, chunk, values, choose, write, read)


def random_k(k: int, chunk: int = 4096, values: Codec = exact()) -> Codec:
    """Writes k random numbers of each chunk, drawn anew in every round from the key that all replicas share.

    Nobody needs to be told the positions. (Konečný et al., 2016, call it a random mask.) What is not drawn is zero, so
    it is to be used with error feedback. The `c * k` numbers of c chunks become what `values` makes of them.

    Args:
        k: Numbers to keep in each chunk.
        chunk: Numbers in a chunk.
        values: Writes the numbers that are kept; it must have no state of its own.

    Raises:
        InputError: k is not from 1 to the chunk, or no multiple of the block of `values`.
    """

    def draw(shape: tuple[int, ...], key: jax.Array) -> jax.Array:
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
    choose: Callable[[jax.Array, jax.Array], jax.Array],
    write: Callable[[jax.Array], jax.Array],
    read: Callable[[jax.Array, tuple[int, ...], jax.Array], tuple[jax.Array, jax.Array]],
) -> Codec:
    """Makes a codec of k positions in each chunk.

    Args:
        k: Numbers to keep in each chunk.
        chunk: Numbers in a chunk.
        values: Writes the numbers that are kept.
        choose: `choose(chunks [..., c, chunk], key) -> positions int32[..., c, k]`
        write: `write(positions) -> uint8[..., bytes]`
        read: `read(payload, (..., c, k), key) -> (positions, the rest of the payload)`
    """
    if not 1 <= k <= chunk:
        raise InputError("k", f"must be from 1 to the {chunk} numbers of a chunk, got {k}.")
    if k % values.block:
        raise InputError(
            "k",
            f"must be a multiple of {values.block}, the block of the numbers that are kept, got {k}.",
        )

    def scatter(positions: jax.Array, kept: jax.Array) -> jax.Array:
        zeros = jnp.zeros((*positions.shape[:-1], chunk))
        placed = jnp.put_along_axis(
            zeros, positions, kept.reshape(positions.shape), axis=-1, inplace=False
        )
        return placed.reshape(*placed.shape[:-2], -1)

    def encode(numbers, state, key):
        chunks = numbers.reshape(*numbers.shape[:-1], -1, chunk)
        positions = choose(chunks, key)
        kept = jnp.take_along_axis(chunks, positions, axis=-1).reshape(*numbers.shape[:-1], -1)
        payload, said, _ = values.encode(kept, (), key)
        return (
            jnp.concatenate([write(positions), payload], axis=-1),
            scatter(positions, said),
            state,
        )

    def decode(payload, size, key):
        shape = (*payload.shape[:-1], size // chunk, k)
        positions, payload = read(payload, shape, key)
        return scatter(positions, values.decode(payload, shape[-2] * k, key))

    return Codec(chunk, lambda shape: (), encode, decode)


def pack_integers(integers: jax.Array, bits: int) -> jax.Array:
    """Packs `int[..., n]` of so many bits each into `uint8[..., ceil(n * bits / 8)]`."""
    shifts = jnp.arange(bits).reshape((1,) * integers.ndim + (bits,))
    return jnp.packbits(
        ((integers[..., None] >> shifts) & 1).reshape(*integers.shape[:-1], -1), axis=-1
    )


def unpack_integers(packed: jax.Array, bits: int, count: int) -> jax.Array:
    """Reads `int32[..., count]` of so many bits each."""
    ones = jnp.unpackbits(packed, axis=-1, count=count * bits).reshape(
        *packed.shape[:-1], count, bits
    )
    shifts = jnp.arange(bits).reshape((1,) * packed.ndim + (bits,))
    return jnp.sum(ones.astype(jnp.int32) << shifts, axis=-1)
