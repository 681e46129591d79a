"""Pictures that are a little different in every epoch, made on the device while it trains.

An augmentation sees one example and a key. It works on pixels as they are stored, so what comes in from outside the
picture or is cut out of it is a stored zero, which is black in bytes.
"""

from collections.abc import Callable
from typing import TypeAlias

import jax
from jax import lax
from jax import numpy as jnp

from ctde_jax.errors import InputError, check_at_least

Augment: TypeAlias = Callable[[jax.Array, jax.Array], jax.Array]
"""`augment(key, example) -> example`, of the same shape and type."""


def apply_to(augment: Augment, key: jax.Array, inputs: jax.Array, examples: jax.Array) -> jax.Array:
    """Augments each example by the key and its number, wherever it stands in a batch.

    Args:
        augment: For a single example.
        key: Of the step.
        inputs: `[examples, ...]`
        examples: The number of each example in the training split, `int32[examples]`; in its batch, where batches come
            one after another.

    Raises:
        InputError: The augmentation changes the shape or the type of an example.
    """
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, examples)
    augmented = jax.vmap(augment)(keys, inputs)
    if (augmented.shape, augmented.dtype) != (inputs.shape, inputs.dtype):
        raise InputError(
            "augment",
            f"must leave an example in its shape {list(inputs.shape[1:])} and type {inputs.dtype}, "
            f"got {list(augmented.shape[1:])} and {augmented.dtype}.",
        )
    return augmented


def chain(*augments: Augment) -> Augment:
    """Applies one after the other, each with a key of its own."""

    def augment(key, example):
        for own_key, each in zip(jax.random.split(key, len(augments)), augments, strict=True):
            example = each(own_key, example)
        return example

    return augment


def shift(pixels: int) -> Augment:
    """Moves a picture by up to so many pixels up or down, and left or right; each move is equally likely.

    Raises:
        InputError: It is less than 1 pixel, or, when it is used, as far as the picture is high or wide.
    """
    check_at_least(1, pixels=pixels)

    def augment(key, picture):
        sides = _sides(picture)
        if pixels >= min(sides):
            raise InputError(
                "pixels",
                f"must be less than the shorter side of a picture of {sides[0]} x {sides[1]}, got {pixels}.",
            )
        others = (0,) * (picture.ndim - 2)
        padded = jnp.pad(picture, [(pixels, pixels)] * 2 + [(0, 0)] * len(others))
        top, left = jax.random.randint(key, (2,), 0, 2 * pixels + 1)
        return lax.dynamic_slice(padded, (top, left, *others), picture.shape)

    return augment


def flip() -> Augment:
    """Mirrors every second picture, left to right."""

    def augment(key, picture):
        _sides(picture)
        return jnp.where(jax.random.bernoulli(key), picture[:, ::-1], picture)

    return augment


def cutout(size: int) -> Augment:
    """Sets a square of so many pixels a side to zero, around any pixel of the picture (DeVries and Taylor, 2017).

    Near the border a part of the square lies outside.

    Raises:
        InputError: The size is less than 1, or, when it is used, larger than the picture is high or wide.
    """
    check_at_least(1, size=size)

    def augment(key, picture):
        sides = _sides(picture)
        if size > min(sides):
            raise InputError(
                "size",
                f"must be at most the shorter side of a picture of {sides[0]} x {sides[1]}, got {size}.",
            )
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


def _sides(picture: jax.Array) -> tuple[int, int]:
    if picture.ndim not in (2, 3):
        raise InputError(
            "augment",
            "needs pictures of the shape [height, width] or [height, width, channels], "
            f"got an example of the shape {list(picture.shape)}.",
        )
    return picture.shape[0], picture.shape[1]
