"""An exchange across hosts is the same exchange between replicas with the means of the hosts."""

import jax
import numpy as np
import optax
import pytest
from cases import some
from jax import numpy as jnp

from ctde_jax import aggregate
from ctde_jax.aggregate import (
    error_feedback,
    exact,
    gathered,
    hierarchical_mean,
    quantize,
    random_k,
    sign,
    two_phase,
)
from ctde_jax.aggregate.across_hosts import AcrossHostsState
from ctde_jax.devices import replica
from ctde_jax.errors import InputError

REPLICAS = 8
WEIGHTS = np.float32([3, 0, 1, 4, 0, 0, 2, 2])

REDUCERS = {
    "exact": lambda per_host: two_phase(per_host=per_host),
    "gathered": lambda per_host: gathered(error_feedback(sign(8)), per_host),
    "int4": lambda per_host: two_phase(error_feedback(quantize(4, block=8)), per_host=per_host),
    "random-k": lambda per_host: two_phase(error_feedback(random_k(4, 8)), per_host=per_host),
    "median": lambda per_host: two_phase(combine=aggregate.median(), per_host=per_host),
    "krum": lambda per_host: two_phase(combine=aggregate.krum(0), per_host=per_host),
    "centered clipping": lambda per_host: two_phase(
        combine=aggregate.centered_clipping(1.0, 2), per_host=per_host
    ),
    "hierarchical mean": hierarchical_mean,
}


def messages(key, replicas: int = REPLICAS):
    return {
        "w": jax.random.normal(key, (replicas, 3, 5)),
        "b": jax.random.normal(jax.random.fold_in(key, 1), (replicas, 7)),
        "frozen": jnp.zeros((replicas, 2)),
    }


def two_rounds(reduce, key):
    """Returns a function of messages and weights, with the results and the last state."""
    reduce = optax.with_extra_args_support(reduce)

    def run(message, weight):
        state = reduce.init(message)
        first, state = reduce.update(message, state, weight=weight, key=key)
        later = jax.random.fold_in(key, 1)
        second, state = reduce.update(message, state, weight=weight, key=later)
        return (first, second), state

    return run


def on_virtual_replicas(reduce, key, rows, weights):
    run = jax.vmap(two_rounds(reduce, key), axis_name=replica.AXIS, out_axes=(None, 0))
    return jax.jit(run)(rows, weights)


def host_means(rows, per_host: int, weights=WEIGHTS):
    """Returns the weighted mean of each host, in numpy, and the weights of the hosts."""
    shares = weights.reshape(-1, per_host)
    totals = shares.sum(axis=1)
    shares = shares / np.maximum(totals, 1)[:, None]

    def mean(x):
        x = np.nan_to_num(np.asarray(x)).reshape(-1, per_host, *x.shape[1:])
        return np.einsum("hl,hl...->h...", shares, x).astype(np.float32)

    return jax.tree.map(mean, rows), totals


def require_hosts(name: str, per_host: int) -> None:
    if name == "krum" and REPLICAS // per_host < 3:
        pytest.skip("Krum needs three messages")


def assert_close(tree, other, atol=1e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=atol), tree, other)


@pytest.mark.parametrize("name", some(REDUCERS, "gathered", "int4"))
@pytest.mark.parametrize("per_host", some([2, 4, 8], 2))
def test_virtual_replicas_equal_fake_devices(name, per_host, key):
    """Results and states of two rounds; one replica has weight 0 and NaN."""
    require_hosts(name, per_host)
    reduce = REDUCERS[name](per_host)
    rows = jax.tree.map(lambda x: x.at[1].set(jnp.nan), messages(key))
    on_devices = replica.parallel(two_rounds(reduce, key), jax.devices(), (0, 0), (None, 0))
    assert_close(
        on_virtual_replicas(reduce, key, rows, WEIGHTS), jax.device_get(on_devices(rows, WEIGHTS))
    )


# Blocks and chunks do not have the same elements in parts of a message.
@pytest.mark.parametrize("name", ["exact", "median", "krum", "centered clipping"])
@pytest.mark.parametrize("per_host", [2, 4])
def test_result_is_that_of_replicas_with_the_means_of_hosts(name, per_host, key):
    require_hosts(name, per_host)
    rows = jax.tree.map(lambda x: x.at[1].set(jnp.nan), messages(key))
    means, totals = host_means(rows, per_host)
    results, _ = on_virtual_replicas(REDUCERS[name](per_host), key, rows, WEIGHTS)
    expected, _ = on_virtual_replicas(REDUCERS[name](1), key, means, totals)
    assert_close(results, expected)
    assert not any(result["frozen"].any() for result in results)


@pytest.mark.parametrize("name", ["exact", "int4", "gathered"])
def test_one_host_computes_the_mean_in_float32(name, key):
    rows = messages(key)
    expected = jax.tree.map(lambda x: np.average(x, axis=0, weights=WEIGHTS), rows)
    for result in on_virtual_replicas(REDUCERS[name](REPLICAS), key, rows, WEIGHTS)[0]:
        assert_close(result, expected)


@pytest.mark.parametrize("name", ["int4", "gathered"])
def test_host_without_weight_is_ignored_and_keeps_its_residuals(name, key):
    rows, weights = messages(key), np.float32([1, 2, 3, 4, 0, 0, 0, 0])
    with_nan = jax.tree.map(lambda x: x.at[4:].set(jnp.nan), rows)
    reduce = REDUCERS[name](4)
    results, states = on_virtual_replicas(reduce, key, with_nan, weights)
    expected, _ = on_virtual_replicas(reduce, key, rows, weights)
    jax.tree.map(np.testing.assert_array_equal, results, expected)
    exchange = states.exchange
    sender = exchange.sender if name == "int4" else exchange
    assert not sender.residual[4:].any()
    assert sender.residual[:4].any()


def shapes_of(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype), tree)


@pytest.mark.parametrize("hosts", [2, 3, 4, 8])
@pytest.mark.parametrize("name", ["int4", "gathered", "centered clipping", "exact"])
def test_state_is_recut_to_another_number_of_hosts(name, hosts, key):
    """The mean of the residuals of all senders, and the elements of all owners, are kept."""
    per_host = 2
    reduce = REDUCERS[name](per_host)
    rows = messages(key)
    _, states = on_virtual_replicas(reduce, key, rows, WEIGHTS)
    like = jax.eval_shape(
        jax.vmap(reduce.init, axis_name=replica.AXIS), messages(key, hosts * per_host)
    )

    recut = jax.device_get(states).recut(like)

    assert isinstance(recut, AcrossHostsState)
    assert shapes_of(recut) == shapes_of(like)
    part = 8 + 4 + 1  # elements of the parts of leaves with 15, 7 and 2 elements
    for position in range(per_host):
        before = jax.tree.map(lambda x, p=position: np.asarray(x)[p::per_host], states.exchange)
        after = jax.tree.map(lambda x, p=position: x[p::per_host], recut.exchange)
        if name == "gathered":
            for each in after.residual:
                np.testing.assert_allclose(each, before.residual.mean(axis=0), rtol=1e-6)
            continue
        for old, new in zip(
            jax.tree.leaves((before.owner, before.combine)),
            jax.tree.leaves((after.owner, after.combine)),
            strict=True,
        ):
            np.testing.assert_array_equal(old.ravel()[:part], new.ravel()[:part])
        if name == "int4":
            senders = [
                x.sender.residual.reshape(len(x.owner.residual), -1) for x in (before, after)
            ]
            old, new = (residual[:, :part].mean(axis=0) for residual in senders)
            np.testing.assert_allclose(old, new, atol=1e-6)


def test_rule_counts_hosts():
    """Eight devices, but two messages."""
    reduce = two_phase(combine=aggregate.krum(0), per_host=4)
    with pytest.raises(
        InputError, match=r"must be at least 3 .* got 2; .*with per_host, more hosts"
    ):
        jax.eval_shape(jax.vmap(reduce.init, axis_name=replica.AXIS), jnp.zeros((REPLICAS, 8)))


def test_exact_codec_is_the_hierarchical_mean(key):
    rows = messages(key)
    both = [
        on_virtual_replicas(reduce, key, rows, WEIGHTS)[0]
        for reduce in (two_phase(per_host=4), gathered(exact(), per_host=4), hierarchical_mean(4))
    ]
    assert_close(both[0], both[2])
    assert_close(both[1], both[2])
