"""Messages with smooth kernels."""

import jax
import numpy as np
import pytest

import ctde_jax as ctde
from ctde_jax.devices import AXIS
from ctde_jax.errors import InputError

smooth, mean = ctde.aggregate.smooth, ctde.aggregate.mean()
PARAMS = {"kernel": np.zeros((48, 3), np.float32), "bias": np.zeros(3, np.float32)}


def draw(seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: rng.normal(size=(2, *x.shape)).astype(np.float32), PARAMS)


def reduced(reduce, messages):
    """Returns the result of two replicas."""

    def update(message):
        return reduce.update(message, reduce.init(PARAMS), weight=1.0, key=jax.random.key(0))[0]

    return jax.vmap(update, axis_name=AXIS, out_axes=None)(messages)


def test_all_components_are_the_message():
    messages = draw(0)
    everything = smooth(mean, image=(6, 4, 2), keep=(6, 4), length=0.5)
    expected = reduced(mean, messages)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, atol=1e-3),
        reduced(everything, messages),
        expected,
    )


def test_result_is_the_projection():
    """What is dropped is orthogonal to what is kept, and the kept part is kept again."""
    reduce = smooth(mean, image=(8, 6), keep=(4, 3), width=2.0)
    messages = draw(1)
    once = reduced(reduce, messages)
    twice = reduced(reduce, jax.tree.map(lambda x: np.stack([x, x]), once))
    np.testing.assert_allclose(once["kernel"], twice["kernel"], atol=1e-3)
    dropped = messages["kernel"].mean(axis=0) - once["kernel"]
    assert abs(np.vdot(dropped, once["kernel"])) < 1e-2
    np.testing.assert_allclose(once["bias"], messages["bias"].mean(axis=0), rtol=1e-6)


def test_smooth_kernels_lose_little():
    row, column = np.mgrid[:8, :6]
    blob = np.exp(-((row - 4) ** 2 + (column - 2) ** 2) / 8).reshape(48, 1).astype(np.float32)
    messages = {"kernel": np.stack([blob, blob]), "bias": np.zeros((2, 3), np.float32)}
    result = reduced(smooth(mean, image=(8, 6), keep=(5, 4)), messages)["kernel"]
    assert np.linalg.norm(result - blob) < 0.1 * np.linalg.norm(blob)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"keep": (9, 1)}, "keep must be from 1 to 8, got 9"),
        ({"keep": (8, 0)}, "keep must be from 1 to 6, got 0"),
        ({"image": (8,)}, "image must be height, width and maybe channels"),
        ({"length": 0}, "length must be greater than 0"),
        ({"width": -1.0}, "width must be greater than 0"),
        ({"image": (8, 7)}, "image must be the shape of the inputs of a dense layer"),
    ],
)
def test_wrong_arguments_are_refused(options, sentence):
    with pytest.raises(InputError, match=sentence):
        smooth(mean, **{"image": (8, 6), "keep": (4, 3), **options}).init(PARAMS)
