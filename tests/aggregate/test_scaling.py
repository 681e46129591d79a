"""Quotients and norms hold from the smallest to the largest normal float32."""

import numpy as np
import pytest
from jax import numpy as jnp

from ctde_jax.aggregate.scaling import norm, power_towards_one, relative

LIMITS = np.finfo(np.float32)
MAGNITUDES = [8 * LIMITS.tiny, 1e-30, 0.5, 1, 2, 1e30, LIMITS.max]


def test_powers_are_those_of_the_docstring():
    found = power_towards_one(jnp.array([0.0, 0.5, 1.0, 2.0, LIMITS.max]))
    np.testing.assert_array_equal(found, [2.0**64] * 3 + [2.0**-64] * 2)


@pytest.mark.parametrize("largest", MAGNITUDES)
def test_quotient_and_norm_equal_those_in_float64(largest):
    x = np.float32(largest) * np.array([1, -0.5, 0.25, 0], np.float32)
    np.testing.assert_allclose(relative(x, jnp.float32(largest)), [1, -0.5, 0.25, 0], rtol=1e-6)
    x /= 2
    np.testing.assert_allclose(norm(x), np.linalg.norm(x.astype(np.float64)), rtol=1e-6)


def test_zeros_have_quotients_and_a_norm_of_zero():
    zeros = jnp.zeros(3)
    np.testing.assert_array_equal(relative(zeros, jnp.float32(0)), np.zeros(3))
    assert norm(zeros) == 0


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_norm_of_a_number_that_is_not_finite_is_nan(value):
    assert np.isnan(norm(jnp.array([1.0, value])))
