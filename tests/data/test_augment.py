"""Augmented images are exact shifts, flips or cuts that depend only on the example."""

from collections.abc import Callable
from functools import partial

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from ctde_jax.data.augment import Augment, apply_to, chain, cutout, flip, shift
from ctde_jax.errors import InputError

HEIGHT, WIDTH = 7, 5
MANY = np.arange(400)
AUGMENTS: dict[str, Augment] = {
    "shift": shift(2),
    "flip": flip(),
    "cutout": cutout(3),
    "chain": chain(shift(2), flip(), cutout(3)),
    "empty chain": chain(),
}


def image(*channels: int, dtype: str = "uint8") -> np.ndarray:
    """Returns an image with distinct pixels, none of which is zero."""
    shape = (HEIGHT, WIDTH, *channels)
    return (1 + np.arange(np.prod(shape))).reshape(shape).astype(dtype)


def augmented(augment: Augment, example: np.ndarray, key: jax.Array) -> np.ndarray:
    """Augments copies of the image as different examples."""
    return np.asarray(
        jax.jit(partial(apply_to, augment))(key, np.stack([example] * len(MANY)), MANY)
    )


def count_results(results: np.ndarray, possible: list[np.ndarray]) -> list[int]:
    """Returns the number of results equal to each possible one; there are no others."""
    counts = [int((results == one).reshape(len(results), -1).all(axis=1).sum()) for one in possible]
    assert sum(counts) == len(results)
    return counts


@pytest.mark.parametrize("channels", [(), (1,), (3,)])
def test_shift_uses_every_offset_and_pads_with_zeros(key: jax.Array, channels: tuple[int, ...]):
    example = image(*channels)
    padded = np.pad(example, [(2, 2), (2, 2), *[(0, 0)] * len(channels)])
    shifted = [
        padded[top : top + HEIGHT, left : left + WIDTH] for top in range(5) for left in range(5)
    ]

    counts = count_results(augmented(shift(2), example, key), shifted)

    assert min(counts) > 0
    assert max(counts) < 3 * len(MANY) / 25


@pytest.mark.parametrize("channels", [(), (3,)])
def test_flip_mirrors_half_of_the_images(key: jax.Array, channels: tuple[int, ...]):
    example = image(*channels)
    kept, mirrored = count_results(augmented(flip(), example, key), [example, example[:, ::-1]])
    assert kept == pytest.approx(mirrored, rel=0.3)


def test_flip_with_the_same_key_is_an_involution(key: jax.Array):
    example = jnp.asarray(image(3))
    for number in range(4):
        flip_key = jax.random.fold_in(key, number)
        np.testing.assert_array_equal(flip()(flip_key, flip()(flip_key, example)), example)


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("channels", [(), (3,)])
def test_cutout_zeroes_a_square_around_every_pixel(
    key: jax.Array, size: int, channels: tuple[int, ...]
):
    """Near the border the square is clipped."""
    example, squares = image(*channels), []
    for row in range(HEIGHT):
        for column in range(WIDTH):
            cut = example.copy()
            top, left = row - size // 2, column - size // 2
            cut[max(0, top) : top + size, max(0, left) : left + size] = 0
            squares.append(cut)

    results = augmented(cutout(size), example, key)

    seen = {result.tobytes() for result in results}
    assert seen == {square.tobytes() for square in squares}


@pytest.mark.parametrize("name", AUGMENTS)
@pytest.mark.parametrize("dtype", ["uint8", "int32", "float32", "bool"])
def test_shape_and_dtype_are_preserved(key: jax.Array, name: str, dtype: str):
    for channels in [(), (2,)]:
        inputs = jnp.asarray(image(*channels, dtype=dtype))[None]
        outputs = jax.eval_shape(
            lambda inputs: apply_to(AUGMENTS[name], key, inputs, jnp.arange(1)), inputs
        )
        assert (outputs.shape, outputs.dtype) == (inputs.shape, dtype)


@pytest.mark.parametrize("name", AUGMENTS)
def test_augmentation_does_not_depend_on_batch_and_position(key: jax.Array, name: str):
    """The key of an example derives from its number, not from its position."""
    rng, apply = np.random.default_rng(0), jax.jit(partial(apply_to, AUGMENTS[name], key))
    inputs, order = rng.integers(1, 256, (40, HEIGHT, WIDTH), np.uint8), rng.permutation(40)[:13]

    whole, part = apply(inputs, np.arange(40)), apply(inputs[order], order)

    np.testing.assert_array_equal(part, whole[order])


@pytest.mark.parametrize("name", [name for name in AUGMENTS if name != "empty chain"])
def test_augmentation_depends_on_the_key(key: jax.Array, name: str):
    first, second = (
        augmented(AUGMENTS[name], image(), augment_key) for augment_key in jax.random.split(key)
    )
    assert (first != second).any()


def test_chain_applies_augmentations_in_order_with_different_keys(key: jax.Array):
    example = jnp.asarray(image())
    first, second = jax.random.split(key)
    np.testing.assert_array_equal(
        chain(shift(2), shift(2))(key, example), shift(2)(second, shift(2)(first, example))
    )


@pytest.mark.parametrize(
    ("make", "shape", "fault"),
    [
        (lambda: shift(0), (7, 5), "pixels must be at least 1, got 0."),
        (lambda: cutout(0), (7, 5), "size must be at least 1, got 0."),
        (
            lambda: shift(5),
            (7, 5),
            "pixels must be less than the shorter side of an image of 7 x 5, got 5.",
        ),
        (
            lambda: cutout(6),
            (7, 5, 1),
            "size must be at most the shorter side of an image of 7 x 5, got 6.",
        ),
        *(
            (
                lambda make=make: make,
                shape,
                "augment requires images of the shape [height, width] or [height, width, "
                f"channels], got an example of the shape {list(shape)}.",
            )
            for make in (shift(2), flip(), cutout(2))
            for shape in [(7,), (7, 5, 3, 2)]
        ),
        (
            lambda: lambda key, example: example.astype(float)[1:],
            (7, 5),
            ("augment must preserve the shape [7, 5] and the dtype uint8, got [6, 5] and float32."),
        ),
    ],
)
def test_invalid_augmentation_is_refused(
    key: jax.Array, make: Callable[[], Augment], shape: tuple[int, ...], fault: str
):
    with pytest.raises(InputError) as caught:
        jax.eval_shape(
            lambda: apply_to(make(), key, jnp.zeros((2, *shape), jnp.uint8), jnp.arange(2))
        )
    assert str(caught.value) == fault
