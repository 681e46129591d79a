"""Complex parameters equal those of a plain optax loop, on any devices and after resuming."""

import jax
import numpy as np
import optax
import pytest
from flax import nnx
from jax import numpy as jnp

import ctde_jax as ctde

STEPS, BATCH = 12, 24


class Network(nnx.Module):
    """Has a complex kernel and a real bias."""

    def __init__(self, rngs: nnx.Rngs):
        self.kernel = nnx.Param(0.3 * jax.random.normal(rngs.params(), (6, 3), jnp.complex64))
        self.bias = nnx.Param(jnp.zeros(3))

    def __call__(self, x):
        z = x @ self.kernel[...]
        return z.real + 2 * z.imag + jnp.abs(z) + self.bias[...][None]


MODEL = ctde.models.from_nnx(Network)
INPUTS = np.random.default_rng(0).normal(size=(BATCH * 5 // 4, 6)).astype(np.float32)
DATA = ctde.data.from_arrays(INPUTS, (INPUTS[:, 0] > 0).astype(int) + (INPUTS[:, 1] > 0))
"""One batch is the whole training split, so the order of the examples does not matter."""

CONJUGATED = optax.chain(
    optax.stateless(lambda updates, _: jax.tree.map(jnp.conj, updates)), optax.adam(0.05)
)


def plain_loop():
    """Returns the losses and parameters of a plain optax loop."""
    params, _ = MODEL.init(jax.random.split(jax.random.key(0))[0], DATA.train.inputs[:1])
    opt_state = CONJUGATED.init(params)

    def loss(params):
        outputs, _ = MODEL.apply(params, {}, jnp.asarray(DATA.train.inputs), None)
        return optax.softmax_cross_entropy_with_integer_labels(
            outputs, jnp.asarray(DATA.train.labels)
        ).mean()

    @jax.jit
    def step(params, opt_state):
        value, grads = jax.value_and_grad(loss)(params)
        updates, opt_state = CONJUGATED.update(grads, opt_state, params)
        return value, optax.apply_updates(params, updates), opt_state

    losses = []
    for _ in range(STEPS):
        value, params, opt_state = step(params, opt_state)
        losses.append(value)
    return np.asarray(losses), params


def train(strategy: ctde.Strategy, replicas: int, **options) -> ctde.Trained:
    devices = ctde.devices.start(replicas)
    fixed = {"batch_size": BATCH, "steps": STEPS, "log_every": 1, "devices": devices, "show": False}
    return ctde.fit(MODEL, DATA, CONJUGATED, strategy, **fixed, **options)


@pytest.mark.slow
@pytest.mark.parametrize("replicas", [1, 4])
def test_training_equals_a_plain_loop(replicas, tmp_path):
    """A second call restores the same parameters from the checkpoint."""
    assert len(DATA.train.inputs) == BATCH
    trained = train(ctde.Strategy(), replicas, run_dir=tmp_path)
    losses, params = plain_loop()
    measured = [row["loss"] for row in trained.history if row["split"] == "train"]
    np.testing.assert_allclose(measured, losses, atol=1e-5)
    assert losses[-1] < losses[0]
    assert trained.params["kernel"].dtype == np.complex64
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), trained.params, params)
    again = train(ctde.Strategy(), replicas, run_dir=tmp_path)
    jax.tree.map(np.testing.assert_array_equal, again.params, trained.params)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("preset", "options"),
    [
        ("ddp", {"reduce": "int8"}),
        ("gossip", {}),
        ("streaming-diloco", {"sync_every": 2, "reduce": "int8"}),
        ("iso-loco", {"sync_every": 2}),
    ],
)
def test_real_and_imaginary_parts_are_trained_by_every_strategy(preset, options):
    initial, _ = MODEL.init(jax.random.split(jax.random.key(0))[0], DATA.train.inputs[:1])
    trained = train(ctde.strategy(preset, **options), 4, ema_decay=0.5)
    moved = trained.params["kernel"] - initial["kernel"]
    assert np.abs(moved.real).max() > 0.01
    assert np.abs(moved.imag).max() > 0.01
    losses = [row["loss"] for row in trained.history if row["split"] == "train"]
    assert losses[-1] < losses[0]
