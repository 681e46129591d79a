"""PowerSGD: full-rank factors give the mean, and constant messages converge to their mean."""

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
    """Returns two kernels and two leaves that are not compressed, with a row for each replica."""
    shapes = {"conv": (3, 3, 4, 8), "kernel": (12, 10), "bias": (10,), "scale": ()}
    keys = jax.random.split(key, len(shapes))
    return {
        name: jax.random.normal(k, (REPLICAS, *shape))
        for (name, shape), k in zip(shapes.items(), keys, strict=True)
    }


def run_rounds(reduce, rows, rounds: int, key: jax.Array, weights: jax.Array = WEIGHTS):
    """Sends the same message in every round; returns the result of each, and the final states."""

    def send(message, weight):
        def one(state, round_key):
            reduced, state = reduce.update(message, state, weight=weight, key=round_key)
            return state, reduced

        return lax.scan(one, reduce.init(message), jax.random.split(key, rounds))[::-1]

    return jax.jit(jax.vmap(send, axis_name=AXIS, out_axes=(None, 0)))(rows, weights)


def average(rows, weights: jax.Array = WEIGHTS):
    return jax.tree.map(lambda x: np.average(x, axis=0, weights=weights), rows)


def matrix(x) -> np.ndarray:
    return np.asarray(x, np.float64).reshape(-1, x.shape[-1])


def test_rank_without_savings_gives_the_mean(key):
    rows = messages(key)
    reduced, state = run_rounds(power_sgd(rank=9), rows, 1, key)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x[0], y, rtol=1e-5, atol=1e-6),
        reduced,
        average(rows),
    )
    assert state.residual == []


def test_mean_of_low_rank_is_exact_after_one_round(key):
    """The mean of 4 messages has rank 8; 2 more columns keep the random start well conditioned."""
    left, right = (jax.random.normal(k, (REPLICAS, 40, 2)) for k in jax.random.split(key))
    rows = {"kernel": jnp.einsum("rik,rjk->rij", left, right)}
    reduced, state = run_rounds(power_sgd(rank=10), rows, 1, key)
    np.testing.assert_allclose(reduced["kernel"][0], average(rows)["kernel"], atol=2e-5)
    np.testing.assert_allclose(state.residual[0], 0, atol=2e-5)


@pytest.mark.parametrize("rank", [1, 3])
def test_result_has_the_rank(rank, key):
    reduced, _ = run_rounds(power_sgd(rank), messages(key), 1, key)
    for name in ("conv", "kernel"):
        assert np.linalg.matrix_rank(matrix(reduced[name][0]), tol=1e-4) == rank


def test_results_and_residuals_add_up_to_the_messages(key):
    """The results of all rounds and the average residual add up to the messages."""
    rows, rounds = messages(key), 7
    reduced, state = run_rounds(power_sgd(rank=1), rows, rounds, key)
    residuals = dict(zip(("conv", "kernel"), state.residual, strict=True))
    for name, expected in average(rows).items():
        total = np.sum(reduced[name], axis=0)
        if name in residuals:
            total = total + np.average(residuals[name], axis=0, weights=WEIGHTS).reshape(
                expected.shape
            )
        np.testing.assert_allclose(total, rounds * expected, rtol=1e-4, atol=1e-4)


def test_first_residual_is_orthogonal_to_the_basis(key):
    """A replica's residual is its message without its projection on the common basis."""
    rows = messages(key)
    reduced, state = run_rounds(power_sgd(rank=2), rows, 1, key)
    basis = np.linalg.svd(matrix(reduced["kernel"][0]))[0][:, :2]
    for message, residual in zip(rows["kernel"], state.residual[1], strict=True):
        np.testing.assert_allclose(
            residual, matrix(message) - basis @ basis.T @ matrix(message), atol=1e-4
        )


def test_constant_message_converges_to_the_mean(key):
    """The residual stays bounded, so the mean result tends to the mean of the messages."""
    rows, rounds = messages(key), 400
    reduced, _ = run_rounds(power_sgd(rank=2), rows, rounds, key)
    for name, expected in average(rows).items():
        error = np.linalg.norm(np.mean(reduced[name], axis=0) - expected) / np.linalg.norm(expected)
        assert error < 0.05


def test_warm_start_is_power_iteration(key):
    """Without error feedback, rounds on one matrix converge to its best low-rank approximation."""
    values = np.diag([8.0, 4.0, 1.0, 0.5, 0.2, 0.1])
    left, right = (
        np.linalg.qr(np.random.default_rng(i).normal(size=(n, 6)))[0]
        for i, n in enumerate((12, 10))
    )
    message = {"kernel": jnp.asarray(left @ values @ right.T, jnp.float32)}
    reduce = power_sgd(rank=2)

    def send(message):
        def one(state, round_key):
            reduced, after = reduce.update(message, state, weight=1.0, key=round_key)
            return after._replace(residual=state.residual), reduced

        return lax.scan(one, reduce.init(message), jax.random.split(key, 12))[1]

    under_vmap = jax.vmap(send, axis_name=AXIS, axis_size=REPLICAS, in_axes=None, out_axes=None)
    reduced = jax.jit(under_vmap)(message)["kernel"]
    best = left[:, :2] @ values[:2, :2] @ right[:, :2].T
    np.testing.assert_allclose(reduced[-1], best, atol=1e-3)
    assert np.linalg.norm(reduced[0] - best) > 0.1


def test_rank_recovers_after_a_message_of_zeros(key):
    """After a message of zeros, the result of the next message has the full rank."""
    rows = {"kernel": jnp.zeros((REPLICAS, 12, 10)).at[:, 5:].set(messages(key)["kernel"][:, 5:])}
    reduce = power_sgd(rank=2)
    zeros = jax.tree.map(jnp.zeros_like, rows)

    def send(zero, message):
        _, state = reduce.update(zero, reduce.init(zero), weight=1.0, key=key)
        return reduce.update(message, state, weight=1.0, key=key)[0]

    reduced = jax.jit(jax.vmap(send, axis_name=AXIS, out_axes=None))(zeros, rows)["kernel"]
    assert np.linalg.matrix_rank(reduced, tol=1e-4) == 2


def test_replica_with_weight_zero_is_ignored(key):
    rows = messages(key)
    with_nan = jax.tree.map(lambda x: x.at[1].set(jnp.nan), rows)
    weights = WEIGHTS.at[1].set(0.0)
    reduced, state = run_rounds(power_sgd(rank=2), with_nan, 3, key, weights)
    expected, _ = run_rounds(power_sgd(rank=2), rows, 3, key, weights)
    jax.tree.map(np.testing.assert_array_equal, reduced, expected)
    assert not any(np.any(residual[1]) for residual in state.residual)


def test_uncompressed_leaves_are_averaged_exactly(key):
    rows = messages(key)
    reduced, _ = run_rounds(power_sgd(rank=1), rows, 1, key)
    exact = jax.vmap(lambda m, w: mean().update(m, (), weight=w)[0], axis_name=AXIS, out_axes=None)(
        rows, WEIGHTS
    )
    for name in ("bias", "scale"):
        np.testing.assert_allclose(reduced[name][0], exact[name], rtol=1e-6)


def test_rank_below_one_is_refused():
    with pytest.raises(InputError, match="rank must be at least 1, got 0"):
        power_sgd(0)


@pytest.mark.parametrize("magnitude", [2.0**-80, 2.0**80])
def test_result_scales_with_the_message(magnitude, key):
    """Even if products of two messages leave the range of float32."""
    rows = messages(key)
    reduced, _ = run_rounds(power_sgd(rank=1), jax.tree.map(lambda x: x * magnitude, rows), 3, key)
    expected, _ = run_rounds(power_sgd(rank=1), rows, 3, key)
    for name in rows:
        np.testing.assert_allclose(reduced[name] / magnitude, expected[name], rtol=1e-4, atol=1e-4)
