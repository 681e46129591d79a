"""What every reducer promises, and what makes each one special."""

from typing import NamedTuple

import jax
import numpy as np
import optax
import pytest
from jax import numpy as jnp

from ctde_jax import replica
from ctde_jax.aggregate import Strategy, mean
from ctde_jax.errors import InputError

REPLICAS = 4
WEIGHTS = jnp.asarray([3.0, 0.0, 1.0, 4.0])


class Contract(NamedTuple):
    """A reducer, and how closely it must keep what all replicas already agree on."""

    reduce: optax.GradientTransformation
    tolerance: float


REDUCERS = {"mean": Contract(mean(), 1e-6)}


def messages(key: jax.Array) -> dict[str, jax.Array]:
    """One message for each replica, as rows."""
    return {"w": jax.random.normal(key, (REPLICAS, 3, 2)), "b": jnp.arange(4.0 * REPLICAS).reshape(REPLICAS, 4)}


def agree(reduce: optax.GradientTransformation, rows, weights: jax.Array = WEIGHTS):
    def update(message, weight):
        return optax.with_extra_args_support(reduce).update(message, reduce.init(message), weight=weight)[0]

    return jax.vmap(update, axis_name=replica.AXIS, out_axes=None)(rows, weights)


@pytest.mark.parametrize("name", REDUCERS)
def test_agreement_is_a_fixed_point(name, key):
    """Replicas that send the same message get that message back."""
    message = jax.tree.map(lambda rows: rows[0], messages(key))
    same = jax.tree.map(lambda x: jnp.stack([x] * REPLICAS), message)
    agreed = agree(REDUCERS[name].reduce, same)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=REDUCERS[name].tolerance), agreed, message)


@pytest.mark.parametrize("name", REDUCERS)
def test_agreement_keeps_shapes_and_dtypes(name, key):
    rows = jax.tree.map(lambda x: x.astype(jnp.bfloat16), messages(key))
    agreed = agree(REDUCERS[name].reduce, rows)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), agreed) == jax.tree.map(lambda x: (x.shape[1:], x.dtype), rows)


@pytest.mark.parametrize("name", REDUCERS)
def test_agreement_is_the_same_on_real_devices(name, key):
    reduce = REDUCERS[name].reduce
    on_devices = replica.parallel(
        lambda message, weight: reduce.update(message, reduce.init(message), weight=weight)[0],
        jax.devices()[:REPLICAS],
        in_axes=(0, 0),
        out_axes=None,
    )
    rows = messages(key)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6),
        agree(reduce, rows),
        on_devices(rows, WEIGHTS),
    )


def test_mean_counts_every_replica_by_its_examples(key):
    rows = messages(key)
    expected = jax.tree.map(lambda x: np.average(x, axis=0, weights=WEIGHTS), rows)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), agree(mean(), rows), expected)


def test_mean_does_not_see_whoever_has_no_weight(key):
    rows = messages(key)
    spoilt = jax.tree.map(lambda x: x.at[1].set(jnp.nan), rows)
    jax.tree.map(np.testing.assert_array_equal, agree(mean(), spoilt), agree(mean(), rows))


def test_mean_leaves_counters_whole():
    counters = jnp.full(REPLICAS, 16_777_217)  # not a float32
    mean_of = jax.vmap(replica.weighted_mean, axis_name=replica.AXIS, out_axes=None)
    assert mean_of(counters, WEIGHTS) == 16_777_217


def test_mean_of_nobodys_examples_is_zero(key):
    agreed = agree(mean(), messages(key), jnp.zeros(REPLICAS))
    assert not any(leaf.any() for leaf in jax.tree.leaves(agreed))


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        (lambda: Strategy(inner_steps=-1), "inner_steps must be at least 0, got -1"),
        (lambda: Strategy(outer=optax.sgd(0.7)), "outer needs inner_steps of at least 1, got 0"),
    ],
)
def test_strategy_that_makes_no_sense_is_refused(build, sentence):
    with pytest.raises(InputError, match=sentence):
        build()
