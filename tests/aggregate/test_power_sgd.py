"""PowerSGD: full-rank factors give the mean, nothing is lost, and constant messages are learned."""

import jax
import numpy as np
import pytest
from jax import lax
from jax import numpy as jnp

from ctde_jax.aggregate.mean import mean
from ctde_jax.aggregate.power_sgd import power_sgd
from ctde_jax.devices.replica import AXIS
from ctde_jax.errors import InputError

REPLICAS = 4
WEIGHTS = jnp.asarray([3.0, 1.0, 2.0, 4.0])


def messages(key: jax.Array) -> dict[str, jax.Array]:
    """A convolution's kernel, a dense one, and what travels whole; a row for each replica."""
    shapes = {"conv": (3, 3, 4, 8), "kernel": (12, 10), "bias": (10,), "scale": ()}
    keys = jax.random.split(key, len(shapes))
    return {
        name: jax.random.normal(k, (REPLICAS, *shape))
        for (name, shape), k in zip(shapes.items(), keys, strict=True)
    }


def agree(reduce, rows, rounds: int, key: jax.Array, weights: jax.Array = WEIGHTS):
    """Sends the same message in every round; returns the result of each, and the final states."""

    def send(message, weight):
        def one(state, round_key):
            agreed, state = reduce.update(message, state, weight=weight, key=round_key)
            return state, agreed

        return lax.scan(one, reduce.init(message), jax.random.split(key, rounds))[::-1]

    return jax.jit(jax.vmap(send, axis_name=AXIS, out_axes=(None, 0)))(rows, weights)


def average(rows, weights: jax.Array = WEIGHTS):
    return jax.tree.map(lambda x: np.average(x, axis=0, weights=weights), rows)


def matrix(x) -> np.ndarray:
    return np.asarray(x, np.float64).reshape(-1, x.shape[-1])


def test_rank_that_saves_nothing_is_the_mean(key):
    rows = messages(key)
    agreed, state = agree(power_sgd(rank=9), rows, 1, key)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x[0], y, rtol=1e-5, atol=1e-6),
        agreed,
        average(rows),
    )
    assert state.residual == []


def test_factors_that_hold_the_whole_mean_say_it_at_once(key):
    """The mean of 4 messages has rank 8; 2 more columns keep the random start well conditioned."""
    left, right = (jax.random.normal(k, (REPLICAS, 40, 2)) for k in jax.random.split(key))
    rows = {"kernel": jnp.einsum("rik,rjk->rij", left, right)}
    agreed, state = agree(power_sgd(rank=10), rows, 1, key)
    np.testing.assert_allclose(agreed["kernel"][0], average(rows)["kernel"], atol=2e-5)
    np.testing.assert_allclose(state.residual[0], 0, atol=2e-5)


@pytest.mark.parametrize("rank", [1, 3])
def test_what_is_agreed_has_the_rank(rank, key):
    agreed, _ = agree(power_sgd(rank), messages(key), 1, key)
    for name in ("conv", "kernel"):
        assert np.linalg.matrix_rank(matrix(agreed[name][0]), tol=1e-4) == rank


def test_agreed_and_kept_are_what_was_wanted(key):
    """The results of all rounds and the average residual add up to the messages."""
    rows, rounds = messages(key), 7
    agreed, state = agree(power_sgd(rank=1), rows, rounds, key)
    left_over = dict(zip(("conv", "kernel"), state.residual, strict=True))
    for name, wanted in average(rows).items():
        total = np.sum(agreed[name], axis=0)
        if name in left_over:
            total = total + np.average(left_over[name], axis=0, weights=WEIGHTS).reshape(
                wanted.shape
            )
        np.testing.assert_allclose(total, rounds * wanted, rtol=1e-4, atol=1e-4)


def test_first_round_keeps_what_the_own_factors_do_not_say(key):
    """A replica's residual is its message without its projection on the common basis."""
    rows = messages(key)
    agreed, state = agree(power_sgd(rank=2), rows, 1, key)
    basis = np.linalg.svd(matrix(agreed["kernel"][0]))[0][:, :2]
    for own, residual in zip(rows["kernel"], state.residual[1], strict=True):
        np.testing.assert_allclose(residual, matrix(own) - basis @ basis.T @ matrix(own), atol=1e-4)


def test_constant_message_gets_through(key):
    """The residual stays bounded, so the mean result tends to the mean of the messages."""
    rows, rounds = messages(key), 400
    agreed, _ = agree(power_sgd(rank=2), rows, rounds, key)
    for name, wanted in average(rows).items():
        error = np.linalg.norm(np.mean(agreed[name], axis=0) - wanted) / np.linalg.norm(wanted)
        assert error < 0.05


def test_warm_start_is_power_iteration(key):
    """Without feedback, the rounds on one matrix tend to its best approximation of the rank."""
    values = np.diag([8.0, 4.0, 1.0, 0.5, 0.2, 0.1])
    left, right = (
        np.linalg.qr(np.random.default_rng(i).normal(size=(n, 6)))[0]
        for i, n in enumerate((12, 10))
    )
    message = {"kernel": jnp.asarray(left @ values @ right.T, jnp.float32)}
    reduce = power_sgd(rank=2)

    def send(message):
        def one(state, round_key):
            agreed, after = reduce.update(message, state, weight=1.0, key=round_key)
            return after._replace(residual=state.residual), agreed

        return lax.scan(one, reduce.init(message), jax.random.split(key, 12))[1]

    under_vmap = jax.vmap(send, axis_name=AXIS, axis_size=REPLICAS, in_axes=None, out_axes=None)
    agreed = jax.jit(under_vmap)(message)["kernel"]
    best = left[:, :2] @ values[:2, :2] @ right[:, :2].T
    np.testing.assert_allclose(agreed[-1], best, atol=1e-3)
    assert np.linalg.norm(agreed[0] - best) > 0.1


def test_direction_that_was_lost_is_found_again(key):
    """After a message of zeros, or of a lower rank, the next one gets through with full rank."""
    rows = {"kernel": jnp.zeros((REPLICAS, 12, 10)).at[:, 5:].set(messages(key)["kernel"][:, 5:])}
    reduce = power_sgd(rank=2)
    zeros = jax.tree.map(jnp.zeros_like, rows)

    def send(zero, message):
        _, state = reduce.update(zero, reduce.init(zero), weight=1.0, key=key)
        return reduce.update(message, state, weight=1.0, key=key)[0]

    agreed = jax.jit(jax.vmap(send, axis_name=AXIS, out_axes=None))(zeros, rows)["kernel"]
    assert np.linalg.matrix_rank(agreed, tol=1e-4) == 2


def test_nobody_hears_who_has_no_weight(key):
    rows = messages(key)
    spoilt = jax.tree.map(lambda x: x.at[1].set(jnp.nan), rows)
    weights = WEIGHTS.at[1].set(0.0)
    agreed, state = agree(power_sgd(rank=2), spoilt, 3, key, weights)
    expected, _ = agree(power_sgd(rank=2), rows, 3, key, weights)
    jax.tree.map(np.testing.assert_array_equal, agreed, expected)
    assert not any(np.any(residual[1]) for residual in state.residual)


def test_whole_leaves_are_averaged_at_once(key):
    rows = messages(key)
    agreed, _ = agree(power_sgd(rank=1), rows, 1, key)
    exact = jax.vmap(lambda m, w: mean().update(m, (), weight=w)[0], axis_name=AXIS, out_axes=None)(
        rows, WEIGHTS
    )
    for name in ("bias", "scale"):
        np.testing.assert_allclose(agreed[name][0], exact[name], rtol=1e-6)


def test_rank_below_one_is_refused():
    with pytest.raises(InputError, match="rank must be at least 1, got 0"):
        power_sgd(0)


@pytest.mark.parametrize("magnitude", [2.0**-80, 2.0**80])
def test_magnitude_of_the_message_changes_nothing_else(magnitude, key):
    """Even if products of two messages leave the range of float32."""
    rows = messages(key)
    agreed, _ = agree(power_sgd(rank=1), jax.tree.map(lambda x: x * magnitude, rows), 3, key)
    expected, _ = agree(power_sgd(rank=1), rows, 3, key)
    for name in rows:
        np.testing.assert_allclose(agreed[name] / magnitude, expected[name], rtol=1e-4, atol=1e-4)
