"""Random augmentations of images, computed on the device during training.

An augmentation is a function of one example and a key. It sees pixels as they are stored, so the
area outside of the image and the area that is cut out are stored zeros, which is black in uint8.
"""

from collections.abc import Callable
from typing import TypeAlias

import jax
from jax import lax
from jax import numpy as jnp
from jaxtyping import Array, Int32, Key, Shaped

from ctde_jax.errors import InputError, check_at_least

Augment: TypeAlias = Callable[[Key[Array, ""], Shaped[Array, "..."]], Shaped[Array, "..."]]
"""`augment(key, example) -> example`, a random variant of the same shape and dtype."""


def apply_to(
    augment: Augment,
    key: Key[Array, ""],
    inputs: Shaped[Array, "examples ..."],
    examples: Int32[Array, " examples"],
) -> Shaped[Array, "examples ..."]:
    """Augments each example with a key derived from `key` and the index of the example.

    Args:
        augment: Augmentation of a single example.
        key: Key of the step.
        inputs: Examples.
        examples: Index of each example in the training split; for a stream, its index in the batch.

    Raises:
        InputError: If the augmentation changes the shape or the dtype of an example.
    """
    # A key depends on the step and the index of the example, and not on the replica.
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, examples)
    augmented = jax.vmap(augment)(keys, inputs)
    if (augmented.shape, augmented.dtype) != (inputs.shape, inputs.dtype):
        raise InputError(
            "augment",
            f"must preserve the shape {list(inputs.shape[1:])} and the dtype {inputs.dtype}, "
            f"got {list(augmented.shape[1:])} and {augmented.dtype}.",
        )
    return augmented


def chain(*augments: Augment) -> Augment:
    """Applies several augmentations in sequence, each with a separate key.

    Args:
        *augments: Augmentations of a single example; each receives the result of the previous one.

    Examples:
        >>> augment = ctde.augment.chain(ctde.augment.shift(1), ctde.augment.flip())
        >>> augment(jax.random.key(0), np.ones((8, 8, 3), np.uint8)).shape
        (8, 8, 3)
    """

    def augment(key, example):
        for own_key, each in zip(jax.random.split(key, len(augments)), augments, strict=True):
            example = each(own_key, example)
        return example

    return augment


def shift(pixels: int) -> Augment:
    """Moves an image by up to `pixels` vertically and horizontally, uniformly at random.

    Images are `[height, width]` or `[height, width, channels]`, of any dtype. Pixels that enter the
    image are 0.

    Args:
        pixels: Largest shift in each direction, in pixels.

    Raises:
        InputError: If `pixels` is less than 1, or, when applied, not less than the shorter side of
            the image, or if the example is not an image.

    Examples:
        >>> augment = ctde.augment.shift(pixels=2)
        >>> augment(jax.random.key(0), np.ones((8, 8), np.uint8)).shape
        (8, 8)
    """
    check_at_least(1, pixels=pixels)

    def augment(key, picture):
        sides = _sides(picture)
        if pixels >= min(sides):
            raise InputError(
                "pixels",
                f"must be less than the shorter side of an image of {sides[0]} x {sides[1]}, got "
                f"{pixels}.",
            )
        # Pad with zeros and crop at a random corner; the corner (pixels, pixels) moves nothing.
        others = (0,) * (picture.ndim - 2)
        padded = jnp.pad(picture, [(pixels, pixels)] * 2 + [(0, 0)] * len(others))
        top, left = jax.random.randint(key, (2,), 0, 2 * pixels + 1)
        return lax.dynamic_slice(padded, (top, left, *others), picture.shape)

    return augment


def flip() -> Augment:
    """Mirrors an image left to right with probability 1/2.

    Images are `[height, width]` or `[height, width, channels]`, of any dtype.

    Raises:
        InputError: When applied, if the example is not an image.

    Examples:
        >>> augment = ctde.augment.flip()
        >>> augment(jax.random.key(0), np.ones((8, 8, 3), np.uint8)).shape
        (8, 8, 3)
    """

    def augment(key, picture):
        # Only checks the shape.
        _sides(picture)
        return jnp.where(jax.random.bernoulli(key), picture[:, ::-1], picture)

    return augment


def cutout(size: int) -> Augment:
    """Sets a square with sides of `size` pixels around a random pixel to zero.

    The square is clipped at the border of the image (DeVries and Taylor, 2017). Images are
    `[height, width]` or `[height, width, channels]`, of any dtype.

    Args:
        size: Side of the square, in pixels.

    Raises:
        InputError: If `size` is less than 1, or, when applied, exceeds the shorter side of the
            image, or if the example is not an image.

    Examples:
        >>> augment = ctde.augment.cutout(size=4)
        >>> augment(jax.random.key(0), np.ones((8, 8), np.uint8)).dtype
        dtype('uint8')
    """
    check_at_least(1, size=size)

    def augment(key, picture):
        sides = _sides(picture)
        if size > min(sides):
            raise InputError(
                "size",
                f"must be at most the shorter side of an image of {sides[0]} x {sides[1]}, got "
                f"{size}.",
            )
        # Masks of the square's rows and columns, clipped at the border; broadcast over channels.
        center = jax.random.randint(key, (2,), 0, jnp.array(sides))
        rows, columns = (
            (first <= jnp.arange(side)) & (jnp.arange(side) < first + size)
            for first, side in zip(center - size // 2, sides, strict=True)
        )
        square = rows[:, None] & columns[None]
        return jnp.where(
            jnp.expand_dims(square, range(2, picture.ndim)), jnp.zeros((), picture.dtype), picture
        )

    return augment


def _sides(picture: Shaped[Array, "height width ..."]) -> tuple[int, int]:
    if picture.ndim not in (2, 3):
        raise InputError(
            "augment",
            "requires images of the shape [height, width] or [height, width, channels], "
            f"got an example of the shape {list(picture.shape)}.",
        )
    return picture.shape[0], picture.shape[1]
