"""Virtual replicas and `shard_map` compute what as many devices do under `pmap`."""

import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest
from cases import STRATEGY_NAMES, some
from flax import nnx
from runs import DropoutNet

import ctde_jax as ctde
from ctde_jax import aggregate, data, train, wire
from ctde_jax.devices import backend
from ctde_jax.errors import InputError

MODEL = ctde.models.mlp([64, 8, 10])


@pytest.fixture(scope="module")
def few(digits) -> data.Dataset:
    """Not a multiple of the batch size, so the last batch is padded."""
    split = data.Split(digits.train.inputs[:130], digits.train.labels[:130])
    return data.from_arrays(*split, *split, name="few", classes=digits.classes)


def fit(dataset, devices, strategy=ctde.Strategy(), model: Any = MODEL, **options) -> ctde.Trained:
    options = {"optimizer": optax.sgd(0.1, momentum=0.9), "steps": 6, **options}
    return ctde.fit(
        model,
        dataset,
        strategy=strategy,
        devices=devices,
        batch_size=32,
        eval_every=6,
        log_every=2,
        show=False,
        **options,
    )


def assert_equal(one: ctde.Trained, other: ctde.Trained, bytes_too: bool = True) -> None:
    """Parameters, states and metrics are equal to 1e-6, and bytes are equal."""
    for a, b in zip(
        jax.tree.leaves((one.params, one.model_state)),
        jax.tree.leaves((other.params, other.model_state)),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, atol=1e-6, rtol=1e-6)
    assert [row["step"] for row in one.history] == [row["step"] for row in other.history]
    for a, b in zip(one.history, other.history, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-6, abs=1e-6)
        assert not bytes_too or a.get("bytes_sent") == b.get("bytes_sent")


def preset(name: str) -> ctde.Strategy:
    return ctde.strategy(
        name,
        sync_every=0 if name == "ddp" else 2,
        synchronous_steps=4 * (name == "post-local-sgd"),
    )


local = partial(ctde.strategy, "local-sgd", sync_every=2)
STRATEGIES = {
    **{name: partial(preset, name) for name in STRATEGY_NAMES},
    "exponential": partial(ctde.strategy, "gossip", sync_every=2, graph="exponential"),
    "growing": lambda: ctde.Strategy(1, later={2: ctde.Strategy(2), 4: ctde.Strategy(4)}),
    "shared batches": lambda: ctde.Strategy(shared_batches=True, later={4: ctde.Strategy(2)}),
    "hierarchical": lambda: ctde.Strategy(reduce=aggregate.hierarchical_mean(4)),
    "across hosts": partial(ctde.strategy, "ddp", reduce="int4", error_feedback=True, per_host=4),
    "by host": partial(local, reduce="int8", error_feedback=True, per_host=4),
    "by host, mean": partial(local, per_host=2),
    "gathered": partial(local, reduce="int4", exchange="gathered", error_feedback=True),
    "private": partial(local, dp_clip_norm=1.0, dp_noise_multiplier=0.1),
    **{name: partial(local, reduce=name) for name in ("int8", "sign", "random_k", "power_sgd")},
    **{
        name: partial(local, combine=name)
        for name in ("trimmed_mean", "median", "geometric_median", "centered_clipping", "krum")
    },
}


@pytest.mark.parametrize("name", some(STRATEGIES, "ddp"))
def test_virtual_replicas_equal_fake_devices(name, few):
    """Eight on one device, or four on each of two."""
    strategy = STRATEGIES[name]()
    count = 2 if name in ("local-sgd", "by host") else 1
    virtual = fit(few, ctde.devices.start(count, replicas=8), strategy)
    assert_equal(virtual, fit(few, ctde.devices.start(8), strategy))


class Dropout(nnx.Module):
    """Without batch statistics, so that the replicas of one device compute one gradient."""

    def __init__(self, rngs: nnx.Rngs):
        self.linear, self.dropout = nnx.Linear(64, 10, rngs=rngs), nnx.Dropout(0.2, rngs=rngs)

    def __call__(self, x):
        return self.linear(self.dropout(x.reshape(len(x), -1)))


@pytest.mark.slow
def test_merged_gradient_has_the_masks_of_each_replica(few):
    """In microbatches, with augmentation; in the last batch, some replicas have no examples."""
    one, other = (
        fit(
            few,
            devices,
            model=Dropout,
            accumulation_steps=2,
            augment=ctde.augment.shift(1),
        )
        for devices in (ctde.devices.start(1, replicas=8), ctde.devices.start(8))
    )
    assert_equal(one, other)


@pytest.mark.slow
@pytest.mark.parametrize("name", STRATEGIES)
def test_shard_map_computes_the_bits_of_pmap(name, few, monkeypatch):
    strategy = STRATEGIES[name]()
    by_pmap = fit(few, ctde.devices.start(8), strategy)
    monkeypatch.setenv("CTDE_JAX_ENGINE", "shard_map")
    by_shard_map = fit(few, ctde.devices.start(8), strategy)
    for one, other in zip(
        *map(jax.tree.leaves, (by_pmap.params, by_shard_map.params)), strict=True
    ):
        np.testing.assert_array_equal(one, other)
    assert by_pmap.traffic == by_shard_map.traffic


@pytest.mark.slow
def test_suite_passes_with_shard_map():
    """A choice of files; `docs/pmap.md` has the command for the whole suite."""
    tests = Path(__file__).parents[1]
    files = [
        tests / "aggregate" / "test_gossip.py",
        tests / "rounds" / "test_replica_digests.py",
    ]
    finished = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n", "0", *files],
        cwd=tests.parent,
        env={**os.environ, "CTDE_JAX_ENGINE": "shard_map"},
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stdout[-5000:]


def test_unknown_engine_is_refused(few, monkeypatch):
    monkeypatch.setenv("CTDE_JAX_ENGINE", "gpu")
    with pytest.raises(InputError, match="CTDE_JAX_ENGINE must be one of pmap, shard_map"):
        fit(few, ctde.devices.start(2))


@pytest.mark.slow
def test_networks_with_state_and_dropout_on_sampled_clients(few):
    """Batch statistics, dropout masks and the draw of clients do not depend on the devices."""
    clients = [np.arange(start, 130, 13) for start in range(13)]
    train_on = partial(
        fit, few, strategy=local(), model=DropoutNet, partition=clients, ema_decay=0.9
    )
    assert_equal(
        train_on(ctde.devices.start(1, replicas=4), reestimate_batches=2),
        train_on(ctde.devices.start(4), reestimate_batches=2),
    )


@pytest.mark.slow
def test_skipped_rounds_are_equal(few):
    """One replica has an example with NaN, so all of them skip the round that contains it."""
    inputs = few.train.inputs.astype(np.float32)
    labels = few.train.labels
    broken = data.from_arrays(inputs, labels, inputs, labels, classes=few.classes)
    np.asarray(broken.train.inputs)[7] = np.nan
    one, other = (
        fit(broken, devices, local(), on_nonfinite="skip")
        for devices in (ctde.devices.start(1, replicas=4), ctde.devices.start(4))
    )
    assert_equal(one, other)
    assert max(row.get("skipped", 0) for row in one.history) > 0


@pytest.mark.slow
@pytest.mark.parametrize("after", [(4, 4), (2, 4), (1, 8)], ids=str)
def test_run_resumes_on_other_devices_and_replicas(after, few, tmp_path):
    """Four virtual replicas on one device, then other numbers of devices and replicas."""
    count, replicas = after
    first = ctde.devices.start(1, replicas=4)
    stopped = fit(few, first, run_dir=tmp_path, save_every=2, callbacks=[lambda row: True])
    assert stopped.step < 6
    resumed = fit(few, ctde.devices.start(count, replicas=replicas), run_dir=tmp_path)
    assert_equal(resumed, fit(few, first), bytes_too=replicas == 4)


def test_command_trains_virtual_replicas(tmp_path, capsys):
    """The plan has both numbers; the saved options repeat the run, and `wire` counts its bytes."""
    command = ["--hidden-sizes", "8", "--steps", "2", "--replicas", "4"]
    assert train.main([*command, "--devices", "2", "--run-dir", str(tmp_path / "run")]) == 0
    first = capsys.readouterr().out
    assert re.search("^devices +4 replicas on 2 fake CPU devices *$", first, re.MULTILINE)
    assert re.search("^batch +64 examples, 16 per replica *$", first, re.MULTILINE)

    repeated = ["--config", str(tmp_path / "run" / "config.json")]
    assert train.main([*repeated, "--run-dir", str(tmp_path / "again")]) == 0
    sent = "each device sends .* per step in 1 collective"
    (wire_of_second,) = re.findall(sent, capsys.readouterr().out)
    assert wire_of_second in first
    assert wire.main(repeated) == 0
    assert wire_of_second in " ".join(capsys.readouterr().out.split())


def test_replicas_have_fake_devices_by_default():
    devices = ctde.devices.start(replicas=3)
    assert len(set(devices)) == len(devices) == 3


def test_bytes_are_counted_on_separate_fake_devices():
    """XLA starts a thread for each CPU device, so virtual replicas do not add devices to JAX's."""
    counted = backend.one_for_each(ctde.devices.start(1, replicas=32))
    assert len(set(counted)) == 32
    assert not set(counted) & set(jax.devices())


@pytest.mark.parametrize(
    ("count", "replicas", "sentence"),
    [
        (3, 8, "replicas must be a multiple of the 3 CPU devices, got 8; use 6 or 9"),
        (4, 2, "replicas must be a multiple of the 4 CPU devices, got 2; use 4"),
        (1, 0, "replicas must be at least 1"),
    ],
)
def test_wrong_number_of_replicas_is_refused(count, replicas, sentence):
    with pytest.raises(InputError, match=sentence):
        ctde.devices.start(count, replicas=replicas)


def test_devices_are_refused_unless_each_has_as_many_replicas(few):
    one, two = ctde.devices.start(2)
    for uneven in ([one, one, two], [one, two, one, two]):
        with pytest.raises(InputError, match="devices must contain every device equally often"):
            fit(few, uneven)


def test_exact_training_needs_no_virtual_replicas(few):
    with pytest.raises(InputError, match="devices must have one replica each if the strategy is"):
        fit(few, ctde.devices.start(1, replicas=4), ctde.Strategy(exact=True))
