"""Frozen parameters keep their bits, with every reducer and every way of freezing."""

import jax
import numpy as np
import optax
import pytest
from cases import some
from flax import nnx
from jax import lax
from jax import numpy as jnp
from test_aggregate import LOSSY, REDUCERS

import ctde_jax as ctde
from ctde_jax import aggregate
from ctde_jax.aggregate import (
    error_feedback,
    gathered,
    gossip,
    power_sgd,
    quantize,
    sign,
    streaming,
    two_phase,
)
from ctde_jax.devices import replica

REPLICAS, ROUNDS = 4, 4
QUICK = (
    *("mean", "two-phase f32", "int8", "median", "centered clipping", "power-sgd"),
    *("ring", "streaming", "top-k, two-phase", "random-k, gathered", "sign, feedback"),
    "int2, gathered feedback",
)
SHAPES = {"live": (7, 3), "frozen": (5, 4), "later": (3, 5), "scalar": (), "nothing": (0, 2)}
ALL_REDUCERS = {
    **{name: contract.reduce for name, contract in REDUCERS.items()},
    **{f"{name}, two-phase": two_phase(codec) for name, codec in LOSSY.items()},
    **{f"{name}, gathered": gathered(codec) for name, codec in LOSSY.items()},
    **{f"{name}, feedback": two_phase(error_feedback(codec)) for name, codec in LOSSY.items()},
    **{
        f"{name}, gathered feedback": gathered(error_feedback(codec))
        for name, codec in LOSSY.items()
    },
    "median of signs": two_phase(sign(8), aggregate.median()),
    "clipping of signs": two_phase(error_feedback(sign(8)), aggregate.centered_clipping(1.0)),
    "power-sgd": power_sgd(1),
    "ring": gossip("ring", pull=0.7),
    "exponential": gossip("exponential", pull=0.7),
    "pairs": gossip("pairs", pull=0.7),
    "streaming": streaming(2, two_phase(error_feedback(sign(8))), mix=0.3),
    "streaming without feedback": streaming(2, two_phase(quantize(2, "statistical", 8)), mix=0.3),
}
MIXING = ["ring", "exponential", "pairs", "streaming", "streaming without feedback"]
"""Reducers that mix the parameters of replicas, which differ."""


def rounds(reduce: optax.GradientTransformation, messages, weights, initial):
    """Runs all rounds; returns the parameters `[replica, round, ...]` and the last state."""
    reduce = optax.with_extra_args_support(reduce)

    def on_replica(params, state, message, weight, key):
        reduced, state = reduce.update(message, state, params, weight=weight, key=key)
        return optax.tree.sub(params, reduced), state

    one_round = jax.jit(jax.vmap(on_replica, in_axes=(0, 0, 0, 0, None), axis_name=replica.AXIS))
    params = jax.tree.map(lambda x: np.stack([x] * REPLICAS), initial)
    state, after = jax.vmap(reduce.init, axis_name=replica.AXIS)(params), []
    for number, key in enumerate(jax.random.split(jax.random.key(2), ROUNDS)):
        params, state = one_round(
            params, state, jax.tree.map(lambda x, n=number: x[:, n], messages), weights, key
        )
        after.append(jax.device_get(params))
    return jax.tree.map(lambda *each: np.stack(each, axis=1), *after), state


@pytest.mark.parametrize("name", some(ALL_REDUCERS, *QUICK))
def test_leaf_with_zero_messages_is_unchanged(name, key):
    """One leaf is frozen in all rounds, another one only in the last rounds."""
    keys = jax.random.split(key, len(SHAPES))
    initial = {
        leaf: np.asarray(jax.random.normal(k, SHAPES[leaf]))
        for leaf, k in zip(SHAPES, keys, strict=True)
    }
    messages = jax.tree.map(
        lambda x: 1 + jax.random.normal(key, (REPLICAS, ROUNDS, *x.shape)), initial
    )
    messages["frozen"] = jnp.zeros_like(messages["frozen"])
    messages["later"] = messages["later"].at[:, ROUNDS // 2 :].set(0)
    if name in MIXING:  # parameters differ between replicas after the first rounds
        messages["later"] = jnp.zeros_like(messages["later"])

    params, _ = rounds(ALL_REDUCERS[name], messages, jnp.asarray([2.0, 0.0, 1.0, 1.0]), initial)
    assert (params["live"] != initial["live"]).any()
    for index in range(REPLICAS):
        for number in range(ROUNDS):
            np.testing.assert_array_equal(params["frozen"][index, number], initial["frozen"])
        np.testing.assert_array_equal(
            params["later"][index, -1], params["later"][index, ROUNDS // 2 - 1]
        )
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize("exchange", [two_phase, gathered])
@pytest.mark.parametrize("name", ["sign", "int2, statistical", "random-k"])
def test_leaf_with_zero_messages_has_no_residual(exchange, name):
    """Only leaves that change keep the error of the codec as a residual."""
    reduce = exchange(error_feedback(LOSSY[name]))
    messages = {
        "a": jnp.zeros((REPLICAS, ROUNDS, 20)),
        "b": jnp.ones((REPLICAS, ROUNDS, 21)).at[..., ::2].set(-3),
    }
    _, state = rounds(reduce, messages, jnp.ones(REPLICAS), {"a": jnp.ones(20), "b": jnp.ones(21)})
    residual = (state.sender if exchange is two_phase else state).residual
    vectors = residual.reshape(REPLICAS, -1)
    assert not vectors[:, :20].any()
    assert vectors[:, 20:].any()


def test_replica_with_weight_zero_unfreezes_no_leaf():
    """Not even with a message of NaN."""
    messages = {
        "a": jnp.zeros((REPLICAS, ROUNDS, 9)).at[1].set(jnp.nan),
        "b": jnp.ones((REPLICAS, ROUNDS, 9)),
    }
    initial = {"a": jnp.ones(9), "b": jnp.ones(9)}
    weights = jnp.asarray([1.0, 0.0, 1.0, 1.0])
    for exchange in (two_phase, gathered):
        params, _ = rounds(exchange(sign(8)), messages, weights, initial)
        np.testing.assert_array_equal(params["a"], np.ones((REPLICAS, ROUNDS, 9)))


def test_isotropic_keeps_zeros():
    zeros, update = jnp.zeros((4, 3)), aggregate.isotropic()
    assert not update.update({"w": zeros}, update.init(zeros))[0]["w"].any()


class PartlyFrozen(nnx.Module):
    """Layers that are frozen in different ways, and a head that is trained."""

    def __init__(self, rngs: nnx.Rngs):
        self.base, self.slow, self.stopped = (nnx.Linear(6, 6, rngs=rngs) for _ in range(3))
        self.late = nnx.Linear(6, 6, rngs=rngs)
        self.unused = nnx.Linear(5, 3, rngs=rngs)
        self.head = nnx.Linear(6, 3, rngs=rngs)

    def __call__(self, x):
        x = x @ lax.stop_gradient(self.stopped.kernel[...])
        return self.head(nnx.relu(self.late(self.slow(self.base(x)))))


INPUTS = np.random.default_rng(0).normal(size=(120, 6)).astype(np.float32)
DATA = ctde.data.from_arrays(INPUTS, (INPUTS[:, 0] > 0).astype(int) + (INPUTS[:, 1] > 0))
OPTIMIZER = optax.multi_transform(
    {
        "base": optax.set_to_zero(),
        "slow": optax.adam(0.0),
        "late": optax.sgd(
            optax.join_schedules(
                [optax.constant_schedule(0.0), optax.constant_schedule(0.1)], [10_000]
            )
        ),
        "other": optax.adam(0.01),
    },
    lambda params: {name: name if name in ("base", "slow", "late") else "other" for name in params},
)
STRATEGIES = {
    "ddp sign": ("ddp", {"reduce": "sign"}),
    "local SGD sign": ("local-sgd", {"sync_every": 2, "reduce": "sign", "error_feedback": True}),
    "sparse-loco": ("sparse-loco", {"sync_every": 2}),
    "iso-loco": ("iso-loco", {"sync_every": 2, "reduce": "power_sgd", "rank": 1}),
    "streaming-diloco": (
        "streaming-diloco",
        {"sync_every": 2, "reduce": "sign", "error_feedback": True},
    ),
    "no-loco": ("no-loco", {"sync_every": 2}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", STRATEGIES)
def test_frozen_layers_keep_their_bits_in_training(name):
    """On 3 devices, where sums of three equal numbers round, and with an EMA of the parameters."""
    preset, options = STRATEGIES[name]
    model = ctde.models.from_nnx(PartlyFrozen)
    trained = ctde.fit(
        model,
        DATA,
        OPTIMIZER,
        ctde.strategy(preset, **options),
        batch_size=24,
        steps=8,
        devices=ctde.devices.start(3),
        ema_decay=0.9,
        show=False,
    )
    initial, _ = model.init(jax.random.split(jax.random.key(0))[0], INPUTS[:1])
    for layer in ("base", "slow", "stopped", "late", "unused"):
        jax.tree.map(np.testing.assert_array_equal, trained.params[layer], initial[layer])
    assert (trained.params["head"]["kernel"] != initial["head"]["kernel"]).any()
