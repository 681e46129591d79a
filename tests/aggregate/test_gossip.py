"""Gossip preserves the mean, and the spread shrinks at the rate of the graph."""

import jax
import numpy as np
import optax
import pytest
from jax import numpy as jnp

from ctde_jax.aggregate import gossip
from ctde_jax.aggregate.gossip import tournament
from ctde_jax.devices import replica


def mix(reduce: optax.GradientTransformation, params: jax.Array, rounds: int) -> np.ndarray:
    """Returns the parameters `[round, replica, size]` of replicas that only mix."""

    def on_replica(params):
        def one(carry, key):
            params, state = carry
            outer_grads, state = reduce.update(jnp.zeros_like(params), state, params, key=key)
            params = params - outer_grads
            return (params, state), params

        keys = jax.random.split(jax.random.key(5), rounds)
        return jax.lax.scan(one, (params, reduce.init(params)), keys)[1]

    return np.asarray(jax.jit(jax.vmap(on_replica, axis_name=replica.AXIS, out_axes=1))(params))


@pytest.mark.parametrize("graph", ["ring", "exponential", "pairs"])
@pytest.mark.parametrize("replicas", [2, 3, 4, 7, 8])
def test_mixing_preserves_the_mean(graph, replicas, key):
    params = jax.random.normal(key, (replicas, 5))
    for mixed in mix(gossip(graph), params, 6):
        np.testing.assert_allclose(mixed.mean(axis=0), params.mean(axis=0), atol=1e-6)


@pytest.mark.parametrize("replicas", [3, 5, 8])
def test_spread_in_a_ring_shrinks_by_the_second_eigenvalue(replicas):
    """The slowest wave around the ring is an eigenvector, so it shrinks by exactly that factor."""
    wave = jnp.cos(2 * jnp.pi * jnp.arange(replicas) / replicas)[:, None]
    rate = (1 + 2 * np.cos(2 * np.pi / replicas)) / 3
    after = mix(gossip("ring"), wave, 4)
    for number, mixed in enumerate(after, start=1):
        np.testing.assert_allclose(mixed, rate**number * wave, atol=1e-6)


@pytest.mark.parametrize("replicas", [2, 4, 8])
def test_exponential_graph_reaches_the_mean_after_log2_rounds(replicas, key):
    params = jax.random.normal(key, (replicas, 5))
    rounds = replicas.bit_length() - 1
    after = mix(gossip("exponential"), params, rounds)
    np.testing.assert_allclose(after[-1], np.tile(params.mean(axis=0), (replicas, 1)), atol=1e-6)
    if rounds > 1:
        assert np.ptp(after[-2], axis=0).min() > 1e-3


def test_random_pairs_shrink_the_squared_spread_as_expected(key):
    """In expectation by (1 - 1 / (R - 1)) / 2 in every round."""
    replicas, size = 8, 20_000
    params = jax.random.normal(key, (replicas, size))
    spread = [
        np.var(params, axis=0).mean(),
        *(np.var(mixed, axis=0).mean() for mixed in mix(gossip("pairs"), params, 2)),
    ]
    np.testing.assert_allclose(spread[1] / spread[0], (1 - 1 / 7) / 2, rtol=0.02)


@pytest.mark.parametrize("replicas", [3, 4, 8])
def test_every_round_of_pairs_is_drawn_equally_often(replicas):
    """One-hot parameters show the partner of each replica."""
    reduce, draws = gossip("pairs"), 400 * len(tournament(replicas))

    def on_replica(params, key):
        outer_grads, _ = reduce.update(jnp.zeros_like(params), reduce.init(params), params, key=key)
        return params - outer_grads

    on_replicas = jax.vmap(on_replica, (0, None), axis_name=replica.AXIS)
    mixed = jax.jit(jax.vmap(on_replicas, (None, 0)))(
        jnp.eye(replicas), jax.random.split(jax.random.key(5), draws)
    )
    # Subtract a quarter on the diagonal, so that the maximum is at the partner, or at the replica
    # itself if it has none.
    diagonal = np.where(np.arange(replicas)[:, None] == np.arange(replicas), 0.25, 0)
    partners = np.argmax(np.asarray(mixed) - diagonal, axis=-1)
    drawn, counts = np.unique(partners, axis=0, return_counts=True)

    assert sorted(map(list, drawn)) == sorted(tournament(replicas))
    assert np.abs(counts - 400).max() < 100  # five standard deviations


@pytest.mark.parametrize("replicas", [2, 3, 6, 9])
def test_every_pair_of_replicas_meets_once(replicas):
    rounds = np.array(tournament(replicas))
    indices = np.arange(replicas)
    for partners in rounds:
        np.testing.assert_array_equal(partners[partners], indices)
    met = [set(rounds[:, i]) - {i} for i in indices]
    assert met == [set(indices) - {i} for i in indices]


def test_local_steps_are_mixed_with_the_parameters(key):
    """Each replica ends at the mix of `params - outer_grads` of all replicas."""
    params, steps = jax.random.normal(key, (2, 4, 3))
    reduce = gossip("exponential")

    def on_replica(step, params):
        return params - reduce.update(step, reduce.init(params), params, key=key)[0]

    moved = np.asarray(jax.vmap(on_replica, axis_name=replica.AXIS)(steps, params))
    np.testing.assert_allclose(
        moved, (params - steps + jnp.roll(params - steps, -1, axis=0)) / 2, atol=1e-6
    )
