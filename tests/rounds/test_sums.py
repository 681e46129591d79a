"""Sums over the examples of a step."""

import pytest
from jax import numpy as jnp

from ctde_jax.rounds.sums import mean_objective


@pytest.mark.parametrize(
    ("sums", "mean"),
    [
        ({"loss": [3.0], "examples": [1.0]}, 3.0),
        ({"loss": [3.0, 1.0], "examples": [3.0, 5.0]}, 0.5),
        ({"loss": [3.0], "objective": [6.0], "examples": [4.0]}, 1.5),
        ({"loss": [0.0], "examples": [0.0]}, 0.0),
    ],
)
def test_mean_objective_is_the_sum_over_the_examples(sums, mean):
    assert mean_objective({name: jnp.asarray(values) for name, values in sums.items()}) == mean
