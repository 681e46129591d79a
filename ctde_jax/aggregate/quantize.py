"""A few bits for each number: blocks of numbers share a scale, which travels in the same bytes."""

from collections.abc import Callable
from functools import reduce
from typing import Literal

import jax
import numpy as np
from jax import numpy as jnp
from scipy.stats import norm

from ctde_jax.aggregate.codec import Codec, from_bytes, to_bytes
from ctde_jax.errors import InputError, check_at_least, check_known

Levels = Literal["linear", "statistical"]


def quantize(bits: int, levels: Levels = "linear", block: int = 256) -> Codec:
    """Writes each number as the nearest of a few levels.

    Each block becomes `block * bits / 8 + 4` bytes.

    Args:
        bits: 8, 4 or 2 for each number.
        levels: `linear` ones are evenly spaced between plus and minus the block's largest magnitude, zero among them;
            `statistical` ones are the best for normally distributed numbers with the block's root mean square (Max,
            1960), and lose less where few bits are left.
        block: How many numbers share a scale, a multiple of 8.

    Raises:
        InputError: An argument is not among those named.
    """
    if bits not in (8, 4, 2):
        raise InputError("bits", f"must be 8, 4 or 2, got {bits}.")
    check_known("levels", levels, ("linear", "statistical"))
    _check_block(block)
    if levels == "linear":
        largest = 2 ** (bits - 1) - 1
        return _blockwise(
            bits=bits,
            block=block,
            scale=lambda blocks: jnp.max(jnp.abs(blocks), axis=-1) / largest,
            code=lambda scaled: jnp.floor(scaled + (largest + 0.5)),
            level=lambda code: code.astype(jnp.float32) - largest,
        )
    table = normal_levels(bits)
    return _blockwise(
        bits=bits,
        block=block,
        scale=lambda blocks: jnp.sqrt(jnp.mean(blocks**2, axis=-1)),
        code=lambda scaled: jnp.searchsorted((table[1:] + table[:-1]) / 2, scaled),
        level=lambda code: jnp.asarray(table)[code.astype(jnp.int32)],
    )


def sign(block: int = 256) -> Codec:
    """Writes the sign of each number, and each block's mean magnitude (Karimireddy et al., 2019).

    Each block becomes `block / 8 + 4` bytes.

    Raises:
        InputError: The block is not a multiple of 8.
    """
    _check_block(block)
    return _blockwise(
        bits=1,
        block=block,
        scale=lambda blocks: jnp.mean(jnp.abs(blocks), axis=-1),
        code=lambda scaled: (scaled > 0).astype(jnp.float32),
        level=lambda code: 2 * code.astype(jnp.float32) - 1,
    )


def normal_levels(bits: int) -> np.ndarray:
    """Returns the levels of least squared error for the normal distribution, float32[2**bits], rising (Max, 1960).

    Lloyd's iteration: each border lies midway between two levels, each level is the mean of what lies around it.
    """
    levels, moved = norm.ppf((np.arange(2**bits) + 0.5) / 2**bits), np.inf
    while moved > 1e-7:
        borders = np.concatenate([[-np.inf], (levels[1:] + levels[:-1]) / 2, [np.inf]])
        better = -np.diff(norm.pdf(borders)) / np.diff(norm.cdf(borders))
        levels, moved = better, np.abs(better - levels).max()
    return levels.astype(np.float32)


def _blockwise(
    bits: int,
    block: int,
    scale: Callable[[jax.Array], jax.Array],
    code: Callable[[jax.Array], jax.Array],
    level: Callable[[jax.Array], jax.Array],
) -> Codec:
    """Makes a codec of `scale(blocks)`, `code(numbers / scale)`, and `level(code)`, which undoes `code`."""

    def encode(values, state, key):
        blocks = values.reshape(*values.shape[:-1], -1, block)
        scales = scale(blocks)
        inverse = jnp.where(scales > 0, 1 / scales, 0)
        codes = code(blocks * inverse[..., None])
        packed = pack(codes.astype(jnp.uint8), bits).reshape(*values.shape[:-1], -1)
        said = level(codes) * scales[..., None]
        return jnp.concatenate([packed, to_bytes(scales)], axis=-1), said.reshape(values.shape), state

    def decode(payload, size, key):
        border = -4 * (size // block)
        packed, scales = payload[..., :border], from_bytes(payload[..., border:])
        codes = unpack(packed.reshape(*scales.shape, -1), bits)
        return (level(codes) * scales[..., None]).reshape(*payload.shape[:-1], size)

    return Codec(block, lambda shape: (), encode, decode)


def pack(codes: jax.Array, bits: int) -> jax.Array:
    """Packs `uint8[..., n]` of 1, 2, 4 or 8 bits each into `uint8[..., n * bits / 8]`."""
    parts = jnp.split(codes, 8 // bits, axis=-1)
    return reduce(jnp.bitwise_or, [part << jnp.uint8(bits * place) for place, part in enumerate(parts)])


def unpack(packed: jax.Array, bits: int) -> jax.Array:
    """Undoes `pack`."""
    places = [packed >> jnp.uint8(bits * place) for place in range(8 // bits)]
    return jnp.concatenate(places, axis=-1) & jnp.uint8(2**bits - 1)


def _check_block(block: int) -> None:
    check_at_least(8, block=block)
    if block % 8:
        raise InputError("block", f"must be a multiple of 8, got {block}.")
