"""Outer gradients with equal singular values."""

import numpy as np
import pytest

from ctde_jax.aggregate import isotropic


def flattened(leaf):
    transformation = isotropic()
    changed, _ = transformation.update({"x": leaf}, transformation.init({"x": leaf}))
    return np.asarray(changed["x"])


@pytest.mark.parametrize("shape", [(4, 3), (3, 4), (1, 1), (2, 3, 4), (2, 1, 2, 3)])
def test_singular_values_become_their_mean_and_directions_stay(shape):
    leaf = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    u, values, v = np.linalg.svd(
        leaf.reshape(-1, shape[-1]).astype(np.float64), full_matrices=False
    )
    expected = values.mean() * u @ v
    assert flattened(leaf).dtype == np.float32
    np.testing.assert_allclose(flattened(leaf), expected.reshape(shape), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(), (5,), (0, 3), (2, 0)])
def test_vectors_and_empty_leaves_are_unchanged(shape):
    leaf = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    np.testing.assert_array_equal(flattened(leaf), leaf)


def test_zeros_keep_their_bits():
    assert np.signbit(flattened(np.full((2, 3), -0.0, np.float32))).all()
