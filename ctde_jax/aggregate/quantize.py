"""Quantization to a few bits: a block of elements has one scale, which is part of the payload."""

from collections.abc import Callable
from statistics import NormalDist
from typing import Literal

import numpy as np
from jax import numpy as jnp
from jaxtyping import Array, Float32, Num, UInt8

from ctde_jax.aggregate.codec import Codec, from_bytes, to_bytes
from ctde_jax.aggregate.scaling import power_towards_one, relative
from ctde_jax.errors import InputError, check_at_least, check_known

Levels = Literal["linear", "statistical"]


def quantize(bits: int, levels: Levels = "linear", block: int = 256) -> Codec:
    """Encodes each element as the nearest of a few levels.

    A block is encoded in `block * bits / 8 + 4` bytes: an index per element, and the scale.

    Args:
        bits: Bits per element: 8, 4 or 2.
        levels: `linear` levels are evenly spaced between plus and minus the block's largest
            magnitude and include zero; `statistical` levels are optimal for normally distributed
            numbers with the block's root mean square (Max, 1960), and have a smaller error at few
            bits.
        block: Number of elements with one scale, a multiple of 8.

    Raises:
        InputError: An argument is not one of these values.

    Examples:
        >>> codec = ctde.aggregate.quantize(bits=4, block=256)
        >>> values = np.linspace(-1, 1, 256, dtype=np.float32)
        >>> payload, decoded, _ = codec.encode(values, codec.init(values.shape), jax.random.key(0))
        >>> payload.nbytes
        132
    """
    if bits not in (8, 4, 2):
        raise InputError("bits", f"must be 8, 4 or 2, got {bits}.")
    check_known("levels", levels, ("linear", "statistical"))
    _check_block(block)

    # `2 * steps + 1` levels, so that zero is one of them; one of the `2**bits` codes is not used.
    if levels == "linear":
        steps = 2 ** (bits - 1) - 1
        return _blockwise(
            bits=bits,
            block=block,
            scale=lambda parts: jnp.ones(parts.shape[:-1]),
            code=lambda scaled: jnp.floor(scaled * steps + (steps + 0.5)),
            level=lambda code: (code.astype(jnp.float32) - steps) / steps,
        )

    # The border between two levels is midway between them.
    table = normal_levels(bits)
    return _blockwise(
        bits=bits,
        block=block,
        scale=lambda parts: jnp.sqrt(jnp.mean(parts**2, axis=-1)),
        code=lambda scaled: jnp.searchsorted((table[1:] + table[:-1]) / 2, scaled),
        level=lambda code: jnp.asarray(table)[code.astype(jnp.int32)],
    )


def sign(block: int = 256) -> Codec:
    """Encodes the sign of each element and the mean magnitude of each block of elements.

    A block is encoded in `block / 8 + 4` bytes (Karimireddy et al., 2019). Zeros are encoded as
    negative.

    Args:
        block: Number of elements in a block, a multiple of 8.

    Raises:
        InputError: `block` is not a positive multiple of 8.

    Examples:
        >>> codec = ctde.aggregate.sign(block=8)
        >>> values = np.array([1, -2, 3, -4, 5, -6, 7, -8], np.float32)
        >>> payload, decoded, _ = codec.encode(values, codec.init(values.shape), jax.random.key(0))
        >>> payload.nbytes, decoded[:2]
        (5, Array([ 4.5, -4.5], dtype=float32))
    """
    _check_block(block)
    return _blockwise(
        bits=1,
        block=block,
        scale=lambda parts: jnp.mean(jnp.abs(parts), axis=-1),
        code=lambda scaled: (scaled > 0).astype(jnp.float32),
        level=lambda code: 2 * code.astype(jnp.float32) - 1,
    )


def normal_levels(bits: int) -> Float32[np.ndarray, " levels"]:
    """Returns the `2**bits` levels with the least squared error for the normal distribution.

    The levels ascend. They are found by Lloyd's iteration (Max, 1960): each border is midway
    between two levels, and each level is the mean of the distribution between its borders.
    """
    quantile, density, below = map(
        np.vectorize, (NormalDist().inv_cdf, NormalDist().pdf, NormalDist().cdf)
    )
    levels = quantile((np.arange(2**bits) + 0.5) / 2**bits)
    moved = np.inf
    while moved > 1e-7:
        borders = np.concatenate([[-np.inf], (levels[1:] + levels[:-1]) / 2, [np.inf]])
        # E[x | a < x < b] = -(pdf(b) - pdf(a)) / (cdf(b) - cdf(a)) for normally distributed x.
        better = -np.diff(density(borders)) / np.diff(below(borders))
        levels, moved = better, np.abs(better - levels).max()
    return levels.astype(np.float32)


def _blockwise(
    bits: int,
    block: int,
    scale: Callable[[Float32[Array, "... block"]], Float32[Array, "..."]],
    code: Callable[[Float32[Array, "... block"]], Num[Array, "... block"]],
    level: Callable[[Num[Array, "... block"]], Float32[Array, "... block"]],
) -> Codec:
    """Makes a blockwise codec from three functions; the scale of each block is part of its payload.

    The functions receive `parts`, the elements divided by the largest magnitude of their block,
    because the squares and sums of large numbers would overflow and those of small ones would be
    zero.

    Args:
        bits: Bits per element.
        block: Number of elements with one scale.
        scale: `scale(parts)`, in units of the largest magnitude.
        code: `code(parts / scale)`, an integer from 0 to `2**bits - 1`.
        level: Inverse of `code`, up to rounding.
    """

    def encode(values, state, key):
        # Codes of each block, [..., blocks, block]. In a block of zeros the scale may be 0; divide
        # by 1.
        blocks = values.reshape(*values.shape[:-1], -1, block)
        largest = _largest(jnp.abs(blocks))[..., None]
        parts = relative(blocks, largest)
        scales = scale(parts)[..., None]
        codes = code(parts / jnp.where(largest > 0, scales, 1))

        # The payload of a block is its codes, followed by its scale in float32.
        written = jnp.concatenate([pack(codes, bits), to_bytes(scales * largest)], axis=-1)
        decoded = read(codes, scales * largest)
        return written.reshape(*values.shape[:-1], -1), decoded.reshape(values.shape), state

    def decode(payload, size, key):
        written = payload.reshape(*payload.shape[:-1], size // block, -1)
        numbers = read(unpack(written[..., :-4], bits), from_bytes(written[..., -4:]))
        return numbers.reshape(*payload.shape[:-1], size)

    def read(
        codes: Num[Array, "... block"], scales: Float32[Array, "... 1"]
    ) -> Float32[Array, "... block"]:
        # The scale is brought nearer to 1: partial products of `level * scale` could be subnormal,
        # which a CPU flushes to zero.
        power = power_towards_one(scales)
        numbers = level(codes) * (scales * power) / power

        # An element at the outermost level may exceed the largest float32 and is clipped to it. If
        # the scale is not finite, the elements are not clipped.
        bound = jnp.finfo(jnp.float32).max
        return jnp.where(jnp.isfinite(scales), jnp.clip(numbers, -bound, bound), numbers)

    return Codec(block, lambda shape: (), encode, decode)


def pack(codes: Num[Array, "... n"], bits: int) -> UInt8[Array, "... bytes"]:
    """Packs integers into `n * bits / 8` bytes.

    Args:
        codes: Integers from 0 to `2**bits - 1`, of any dtype.
        bits: 1, 2, 4 or 8 bits for each number.
    """
    # Byte i holds the i-th number of each of `8 / bits` contiguous parts; neighbors would need
    # strided slices.
    packed, *parts = jnp.split(codes, 8 // bits, axis=-1)
    for place, part in enumerate(parts, start=1):
        packed = packed + part * 2 ** (bits * place)
    return packed.astype(jnp.uint8)


def unpack(packed: UInt8[Array, "... bytes"], bits: int) -> UInt8[Array, "... n"]:
    """Inverts `pack`."""
    places = [packed >> jnp.uint8(bits * place) for place in range(8 // bits)]
    return jnp.concatenate(places, axis=-1) & jnp.uint8(2**bits - 1)


def _largest(blocks: Float32[Array, "... block"]) -> Float32[Array, "..."]:
    """Returns the maximum of each row.

    Rows are halved first, which a CPU computes with vector instructions instead of element by
    element.
    """
    while blocks.shape[-1] > 16 and blocks.shape[-1] % 2 == 0:
        blocks = jnp.maximum(*jnp.split(blocks, 2, axis=-1))
    return jnp.max(blocks, axis=-1)


def _check_block(block: int) -> None:
    check_at_least(8, block=block)
    if block % 8:
        raise InputError("block", f"must be a multiple of 8, got {block}.")
