"""Private aggregation: sensitivity to one replica, noise, and the resulting privacy guarantee."""

import sys
from math import exp, sqrt
from statistics import NormalDist

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from ctde_jax.aggregate.private import epsilon, private
from ctde_jax.devices.replica import AXIS
from ctde_jax.errors import InputError

REPLICAS = 4


def run_reducer(reduce, rows, key, weights=None):
    def update(message, weight):
        return reduce.update(message, reduce.init(message), weight=weight, key=key)[0]

    weights = jnp.ones(REPLICAS) if weights is None else weights
    return jax.jit(jax.vmap(update, axis_name=AXIS, out_axes=None))(rows, weights)


def messages(key: jax.Array) -> dict[str, jax.Array]:
    """Returns messages with the norms 1, 2, 3 and 4, one row for each replica."""
    rows = {"w": jax.random.normal(key, (REPLICAS, 30, 20)), "b": jnp.ones((REPLICAS, 20))}
    norms = jnp.sqrt(sum(jnp.sum(x**2, axis=tuple(range(1, x.ndim))) for x in rows.values()))
    factors = jnp.arange(1.0, 1.0 + REPLICAS) / norms
    return jax.tree.map(lambda x: x * factors.reshape(-1, *[1] * (x.ndim - 1)), rows)


def test_messages_are_clipped_over_the_whole_tree(key):
    """Norms of 1, 2, 3 and 4 become 1, 2, 2 and 2."""
    rows = messages(key)
    reduced = run_reducer(private(clip_norm=2.0, noise_multiplier=0.0), rows, key)
    expected = jax.tree.map(lambda x: (x[0] + x[1] + x[2] * 2 / 3 + x[3] * 2 / 4) / REPLICAS, rows)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7), reduced, expected
    )


@pytest.mark.parametrize("message", [1e6, 1e30, np.nan, -np.inf])
def test_one_replica_changes_the_result_by_at_most_the_sensitivity(message, key):
    rows = messages(key)
    reduce = private(clip_norm=2.0, noise_multiplier=0.5)
    without = run_reducer(reduce, jax.tree.map(lambda x: x.at[2].set(0.0), rows), key)
    with_message = run_reducer(reduce, jax.tree.map(lambda x: x.at[2].set(message), rows), key)
    moved = np.sqrt(sum(np.sum((with_message[name] - without[name]) ** 2) for name in rows))
    assert moved <= 2.0 / REPLICAS * 1.0001


def test_weights_are_ignored(key):
    """A weight would reveal the number of examples of a replica without noise."""
    rows, reduce = messages(key), private(clip_norm=2.0, noise_multiplier=0.5)
    weighted = run_reducer(reduce, rows, key, jnp.asarray([5.0, 0.0, 1.0, 100.0]))
    jax.tree.map(np.testing.assert_array_equal, weighted, run_reducer(reduce, rows, key))


def test_noise_is_gaussian_with_the_configured_deviation(key):
    zeros = {"w": jnp.zeros((REPLICAS, 300, 200)), "b": jnp.zeros((REPLICAS, 20_000))}
    noise = run_reducer(private(clip_norm=3.0, noise_multiplier=2.0), zeros, key)
    deviation = 2.0 * 3.0 / REPLICAS
    values = np.concatenate([np.ravel(x) for x in jax.tree.leaves(noise)]) / deviation
    assert len(values) == 80_000
    assert abs(values.mean()) < 5 / sqrt(80_000)
    np.testing.assert_allclose(values.std(), 1.0, atol=5 / sqrt(2 * 80_000))
    for bound in (0.5, 1.0, 2.0):
        np.testing.assert_allclose((values < bound).mean(), NormalDist().cdf(bound), atol=0.01)
    assert abs(np.corrcoef(np.ravel(noise["w"])[:20_000], np.ravel(noise["b"]))[0, 1]) < 0.05, (
        "the noise of different leaves must be independent"
    )


def test_noise_differs_between_rounds(key):
    zeros, reduce = {"b": jnp.zeros((REPLICAS, 100))}, private(1.0, 1.0)
    first, again, second = (
        run_reducer(reduce, zeros, k)["b"] for k in (key, key, jax.random.key(1))
    )
    np.testing.assert_array_equal(first, again)
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.5


def gaussian_delta(epsilon: float, noise_multiplier: float, rounds: int) -> float:
    """The exact delta of composed Gaussian mechanisms (Balle and Wang, 2018, theorem 8)."""
    mu, phi = sqrt(rounds) / noise_multiplier, NormalDist().cdf
    return phi(mu / 2 - epsilon / mu) - exp(epsilon) * phi(-mu / 2 - epsilon / mu)


@pytest.mark.parametrize(("noise_multiplier", "rounds"), [(1.0, 1), (20.0, 100), (5.0, 100)])
def test_epsilon_without_sampling_is_that_of_the_gaussian_mechanism(noise_multiplier, rounds):
    pytest.importorskip("dp_accounting")
    computed = epsilon(noise_multiplier, rounds, delta=1e-5)
    assert gaussian_delta(computed, noise_multiplier, rounds) <= 1e-5
    assert gaussian_delta(computed * 0.995, noise_multiplier, rounds) > 1e-5


@pytest.mark.slow
def test_epsilon_falls_with_noise_and_sampling_and_grows_with_rounds():
    pytest.importorskip("dp_accounting")
    base = epsilon(1.0, 100, sampling_rate=0.1)
    assert epsilon(2.0, 100, sampling_rate=0.1) < base < epsilon(1.0, 200, sampling_rate=0.1)
    assert epsilon(1.0, 100, sampling_rate=0.05) < base < epsilon(1.0, 100)
    assert base < epsilon(1.0, 100, sampling_rate=0.1, delta=1e-7)


def test_missing_accountant_is_an_input_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    sentence = (
        r"the package dp-accounting, which is not installed; run pip install "
        r"'ctde_jax\[privacy\]'"
    )
    with pytest.raises(InputError, match=sentence):
        epsilon(1.0, 10)


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        (lambda: private(0.0, 1.0), "clip_norm must be greater than 0 and finite, got 0.0"),
        (lambda: private(1.0, -1.0), "noise_multiplier must be at least 0 and finite, got -1.0"),
        (
            lambda: epsilon(0.01, 10),
            "noise_multiplier must be at least 0.1 and finite for the accountant, got 0.01",
        ),
        (lambda: epsilon(1.0, 0), "rounds must be at least 1, got 0"),
        (
            lambda: epsilon(1.0, 10, sampling_rate=0.0),
            "sampling_rate must be greater than 0 and at most 1, got 0.0",
        ),
        (lambda: epsilon(1.0, 10, delta=1.0), "delta must be between 0 and 1, got 1.0"),
    ],
)
def test_invalid_privacy_parameters_are_refused(build, sentence):
    with pytest.raises(InputError, match=sentence):
        build()


def test_message_whose_squared_norm_overflows_float32_is_clipped(key):
    """All replicas send the same message; the expected direction is computed in float64."""
    rows = jax.tree.map(lambda x: jnp.stack([x[1]] * REPLICAS), messages(key))
    reduced = run_reducer(
        private(clip_norm=2.0, noise_multiplier=0.0), jax.tree.map(lambda x: x * 1e36, rows), key
    )
    norm = sqrt(sum(np.sum(np.asarray(x[0], np.float64) ** 2) for x in jax.tree.leaves(rows)))
    for name, rows_of_leaf in rows.items():
        np.testing.assert_allclose(reduced[name], rows_of_leaf[0] * 2.0 / norm, rtol=1e-4)
