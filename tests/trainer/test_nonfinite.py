"""A loss that is not finite stops a run, is skipped by all devices, or rolls the run back."""

import json

import jax
import numpy as np
import optax
import pytest
from jax import numpy as jnp

import ctde_jax as ctde
from ctde_jax import data, devices, models
from ctde_jax.trainer.log import Log

MODEL = models.mlp([64, 8, 10])


@pytest.fixture
def with_a_nan_example(digits) -> data.Dataset:
    """One training example contains NaN, so the loss of one batch per epoch is not finite."""
    inputs = digits.train.inputs[:320].astype(np.float32) / 16
    tested = digits.test.inputs[:64].astype(np.float32) / 16
    dataset = data.from_arrays(inputs, digits.train.labels[:320], tested, digits.test.labels[:64])
    dataset.train.inputs[7, 3, 3] = np.nan
    return dataset


def fit(dataset, count=4, **more) -> ctde.Trained:
    arguments = {
        "model": MODEL,
        "optimizer": optax.adam(0.01),
        "batch_size": 32,
        "epochs": 3,
        "log_every": 5,
    }
    return ctde.fit(
        data=dataset, **{**arguments, "devices": devices.start(count), "show": False, **more}
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddp", "local-sgd", "gossip"])
def test_nonfinite_batch_is_skipped_on_all_devices(name, with_a_nan_example):
    """It occurs once per epoch; all state stays finite, including error-feedback residuals."""
    options = {
        "ddp": {"reduce": "int8", "error_feedback": True},
        "local-sgd": {"sync_every": 2},
        "gossip": {},
    }[name]
    trained = fit(with_a_nan_example, strategy=ctde.strategy(name, **options), on_nonfinite="skip")
    rows = [row for row in trained.history if row["split"] == "train"]
    assert rows[-1]["skipped"] == 3
    skipped = 32 * max(1, options.get("sync_every", 1))
    assert sum(row["examples"] for row in rows) == 3 * (320 - skipped)
    assert trained.tested["loss"] < trained.history[0]["loss"]


@pytest.mark.slow
def test_skipped_step_has_no_effect(with_a_nan_example):
    """The result is equal on 1 and 4 devices, and in a plain loop over all other batches."""
    four, one = (fit(with_a_nan_example, count, on_nonfinite="skip") for count in (4, 1))
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6), four.params, one.params
    )

    batches = data.deal(with_a_nan_example.train, 1, 32, seed=0)
    model, optimizer = (
        models.with_raw_inputs(MODEL, with_a_nan_example.shift, with_a_nan_example.scale),
        optax.adam(0.01),
    )
    params, state = model.init(jax.random.split(jax.random.key(0))[0], batches.inputs(0))
    opt_state = optimizer.init(params)

    @jax.jit
    def step(params, opt_state, inputs, labels):
        def loss(params):
            outputs, _ = model.apply(params, state, inputs, jax.random.key(0))
            return optax.softmax_cross_entropy_with_integer_labels(outputs, labels).mean()

        updates, opt_state = optimizer.update(jax.grad(loss)(params), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    for (indices,) in batches.steps(0, 30):
        if 7 not in indices:
            params, opt_state = step(
                params,
                opt_state,
                with_a_nan_example.train.inputs[indices],
                with_a_nan_example.train.labels[indices],
            )
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6), one.params, params
    )


@pytest.mark.slow
def test_ten_consecutive_nonfinite_batches_stop_the_run(digits, tmp_path):
    """Also if the run is resumed."""
    optimizer = optax.sgd(lambda count: jnp.where(count >= 12, jnp.inf, 0.01))
    for _ in range(3):
        with pytest.raises(ctde.NonFiniteLoss, match="step 13"):
            fit(
                digits,
                optimizer=optimizer,
                on_nonfinite="skip",
                log_every=4,
                save_every=4,
                run_dir=tmp_path,
            )


LINE = data.from_arrays(np.ones((64, 1), np.float32), np.ones(64, np.float32))


def descend(folder, learning_rate: float, **more) -> ctde.Trained:
    """Fits w to 1; each step multiplies the distance by 1 - 2 * learning_rate."""
    task = ctde.Task(lambda outputs, targets: jnp.square(outputs[:, 0] - targets))
    arguments = {
        "model": models.mlp([1, 1]),
        "optimizer": optax.sgd(learning_rate),
        "task": task,
        "epochs": None,
    }
    arguments |= {
        "batch_size": 32,
        "steps": 400,
        "save_every": 20,
        "eval_every": 100,
        "run_dir": folder,
    }
    return fit(LINE, 2, on_nonfinite="rollback", **{**arguments, **more})


@pytest.mark.slow
def test_diverging_run_rolls_back_and_halves_the_updates(tmp_path, capsys):
    trained = descend(tmp_path, 1.2, show=True)
    assert "rollback   loss not finite at step" in capsys.readouterr().out
    assert trained.tested["loss"] < 1e-6
    steps = [row["step"] for row in trained.history if row["split"] == "train"]
    assert steps == sorted(set(steps))
    assert [
        json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()
    ] == trained.history


@pytest.mark.slow
def test_killed_rollback_resumes(tmp_path, monkeypatch):
    whole = descend(tmp_path / "whole", 1.2)
    add = Log.add

    def kill(log, row):
        if row["step"] == 300 and row["split"] == "train":
            raise ZeroDivisionError
        add(log, row)

    with monkeypatch.context() as patch:
        patch.setattr(Log, "add", kill)
        with pytest.raises(ZeroDivisionError):
            descend(tmp_path / "killed", 1.2)
    again = descend(tmp_path / "killed", 1.2)
    assert [row["loss"] for row in again.history] == [row["loss"] for row in whole.history]
    jax.tree.map(np.testing.assert_array_equal, again.params, whole.params)


def test_run_stops_after_three_rollbacks(tmp_path, capsys):
    with pytest.raises(ctde.NonFiniteLoss):
        descend(tmp_path, 100.0, show=True)
    assert capsys.readouterr().out.count("rollback   loss not finite") == 3


def test_rollback_requires_run_dir():
    with pytest.raises(ctde.InputError, match="on_nonfinite must not be rollback without run_dir"):
        descend(None, 1.0)
