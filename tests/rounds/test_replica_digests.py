"""Replicas that differ but should be equal are detected at the next dispatch, and named."""

import jax
import ml_dtypes
import numpy as np
import optax
import pytest
from jax import lax
from jax import numpy as jnp

import ctde_jax as ctde
from ctde_jax import checkpoint, devices, models
from ctde_jax.devices import replica
from ctde_jax.errors import ReplicasDiverged
from ctde_jax.rounds import digests, round

MODEL = models.mlp([64, 8, 10])
ARRAYS = {
    "float32": np.random.default_rng(0).normal(size=(7, 5)).astype(np.float32),
    "bfloat16": np.random.default_rng(0).normal(size=(7, 5)).astype(ml_dtypes.bfloat16),
    "int32": np.arange(12, dtype=np.int32),
    "bool": np.array([True, False, True]),
    "scalar": np.float32(3),
    "complex64": np.random.default_rng(0).normal(size=(7, 2)).astype(np.float32).view(np.complex64),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_digest_depends_on_every_bit(name):
    array = np.atleast_1d(ARRAYS[name])
    raw = np.frombuffer(array.tobytes(), np.uint8)
    bits = range(8 * len(raw)) if array.dtype != bool else range(0, 8 * len(raw), 8)
    flipped = np.stack([raw] * len(bits))
    for row, bit in enumerate(bits):
        flipped[row, bit // 8] ^= 1 << bit % 8
    flipped = flipped.view(array.dtype).reshape(len(bits), *array.shape)
    found = np.asarray(jax.vmap(digests.digest)(jnp.asarray(flipped)))
    assert not (found == np.asarray(digests.digest(jnp.asarray(array)))).any()


def test_digest_depends_on_the_positions_of_numbers():
    a = np.arange(10, dtype=np.float32)
    b = a.copy()
    b[[2, 7]] = b[[7, 2]]
    assert digests.digest(jnp.asarray(a)) != digests.digest(jnp.asarray(b))


@pytest.mark.parametrize("shape", [(64,), (128, 10), (64, 128), (7, 3)])
@pytest.mark.parametrize(
    "change", [lambda x: -x, lambda x: 2 * x, lambda x: 4 * x, lambda x: x[::-1]]
)
def test_digest_depends_on_sign_scale_and_order(shape, change):
    x = jax.random.normal(jax.random.key(0), shape)
    assert digests.digest(x) != digests.digest(change(x))


def test_error_names_leaves_and_groups_of_devices():
    found = np.array([[1, 5], [1, 6], [1, 5], [1, 7]], np.uint32)
    sentence = (
        r"^b must be equal .* agreed after step 20, but devices \[0, 2\] and \[1\] and \[3\] "
        "differ after step 40"
    )
    with pytest.raises(ReplicasDiverged, match=sentence) as caught:
        digests.check(found, ["a", "b"], 20, 40)
    assert (caught.value.leaves, caught.value.groups) == (["b"], [[0, 2], [1], [3]])
    digests.check(found[:, :1], ["a"], 20, 40)


def fit(digits, folder=None, **more):
    arguments = {
        "batch_size": 64,
        "steps": 40,
        "log_every": 4,
        "save_every": 4,
        "run_dir": folder,
        "show": False,
    }
    return ctde.fit(
        MODEL, digits, optax.adam(0.01), **{"devices": devices.start(4), **arguments, **more}
    )


@pytest.mark.parametrize("inner_steps", [0, 4])
def test_missing_reduction_is_detected_at_the_first_row(digits, tmp_path, inner_steps):
    without_reduction = ctde.Strategy(inner_steps=inner_steps, reduce=optax.identity())
    with pytest.raises(
        ReplicasDiverged, match=r"^params/.* agreed after step 0, but .* differ after step 4,"
    ) as caught:
        fit(digits, tmp_path, strategy=without_reduction)
    assert len(caught.value.leaves) >= 4
    assert checkpoint.steps(tmp_path / "checkpoints") == [0], "a diverged state must not be saved"


@pytest.mark.slow
def test_error_names_statistics_that_are_not_averaged(digits, monkeypatch):
    """A round that does not average the model state is detected."""
    model = models.resnet((8, 8), 10, channels=(4,), norm="batch", batch_statistics="averaged")
    monkeypatch.setattr(round, "agreed_state", lambda after, before, weight: after)
    with pytest.raises(ReplicasDiverged, match=r"^model_state/") as caught:
        ctde.fit(
            model,
            digits,
            optax.sgd(0.01),
            devices=devices.start(2),
            batch_size=64,
            steps=8,
            show=False,
        )
    assert all(
        leaf.startswith("model_state/") for leaf in caught.value.leaves if "params" not in leaf
    )


@pytest.mark.slow
def test_error_names_the_device_with_a_wrong_sum(digits, monkeypatch):
    """Only replica 2 gets a wrong sum."""
    add_up = replica.add_up

    def wrong(tree, *axis):
        return jax.tree.map(
            lambda x: x + jnp.where(lax.axis_index(replica.AXIS) == 2, 1e-3, 0).astype(x.dtype),
            add_up(tree, *axis),
        )

    monkeypatch.setattr(replica, "add_up", wrong)
    with pytest.raises(ReplicasDiverged) as caught:
        fit(digits)
    assert caught.value.groups == [[0, 1, 3], [2]]
