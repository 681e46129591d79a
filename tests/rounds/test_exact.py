"""Exact strategies give the same bits on any number of devices."""

import os
import subprocess
import sys
from functools import partial
from hashlib import sha256
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from flax import nnx
from jax import numpy as jnp
from runs import DropoutNet, killed_after, rows

import ctde_jax as ctde
from ctde_jax import aggregate, checkpoint, config, data, devices, models, profile, wire
from ctde_jax.config import build
from ctde_jax.errors import InputError

EXACT = ctde.Strategy(exact=True)
COUNTS = (1, 2, 4, 8)


@pytest.fixture
def small(digits) -> data.Dataset:
    """Returns 300 examples, so that the last batch of an epoch is not full."""
    return data.from_arrays(
        digits.train.inputs[:300],
        digits.train.labels[:300],
        digits.test.inputs[:40],
        digits.test.labels[:40],
    )


def sequences(small: data.Dataset) -> data.Dataset:
    return data.as_sequence(small, "rows")


def text(small: data.Dataset, folder: Path) -> data.Dataset:
    (folder / "text.txt").write_text(
        "the quick brown fox jumps over the lazy dog, and so on. " * 100
    )
    return data.from_text(folder / "text.txt", 16, None)


def fit(dataset: data.Dataset, folder: Path, count: int, **more) -> ctde.Trained:
    arguments = {
        "model": models.mlp([64, 16, 10]),
        "optimizer": optax.adam(0.01),
        "batch_size": 32,
        "steps": 20,
    }
    arguments |= {
        "strategy": EXACT,
        "devices": devices.start(count),
        "log_every": 4,
        "run_dir": folder,
        "show": False,
    }
    return ctde.fit(data=dataset, **arguments | more)


def digest(folder: Path) -> str:
    """Returns the digest of parameters, model state and optimizer state."""
    tensors = checkpoint.read(checkpoint.newest(folder / "checkpoints")).tensors
    return sha256(b"".join(tensors[name].tobytes() for name in sorted(tensors))).hexdigest()


def trained_rows(folder: Path) -> list[dict]:
    """Returns the training rows without the sent bytes, which depend on the number of devices."""
    return [
        {k: v for k, v in row.items() if k != "bytes_sent"}
        for row in rows(folder)
        if row["split"] == "train"
    ]


RUNS: dict[str, dict] = {
    "mlp": {},
    "random numbers and batch statistics": {"model": models.from_nnx(DropoutNet, "averaged")},
    "EMA, clipping, skipped rounds": {
        "ema_decay": 0.9,
        "optimizer": optax.chain(optax.clip_by_global_norm(0.1), optax.adamw(0.01)),
        "on_nonfinite": "skip",
    },
    "sample weights": {
        "dataset": lambda dataset: data.weighted(dataset, 0.5 + dataset.train.labels % 3)
    },
    "random shifts": {"augment": ctde.augment.shift(1)},
    "residual network": {
        "model": models.resnet((8, 8), 10, (4, 8), 1, "batch", "averaged"),
        "steps": 6,
    },
    "lstm": {"model": models.rnn_classifier(8, 10, 16, 1, "lstm", 0.1), "dataset": sequences},
    "transformer": {"dataset": text},
    "data-dependent initialization": {
        "model": ctde.initializers.initialize(models.mlp([64, 16, 10]), "lsuv")
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_bits_are_the_same_on_any_number_of_devices(name, small, tmp_path):
    more = dict(RUNS[name])
    make = more.pop("dataset", lambda dataset: dataset)
    dataset = text(small, tmp_path) if make is text else make(small)
    if name == "transformer":
        more["model"] = models.transformer(len(dataset.vocabulary), 16, 16, 2, 2, 0.1)
    for count in COUNTS:
        fit(dataset, tmp_path / str(count), count, **more)
    assert len({digest(tmp_path / str(count)) for count in COUNTS}) == 1
    assert all(
        trained_rows(tmp_path / str(count)) == trained_rows(tmp_path / "1") for count in COUNTS
    )


@pytest.mark.slow
def test_bits_differ_without_exact(small, tmp_path):
    """Otherwise the test above would not prove anything."""
    for count in COUNTS:
        fit(small, tmp_path / str(count), count, strategy=ctde.Strategy())
    assert len({digest(tmp_path / str(count)) for count in COUNTS}) == len(COUNTS)


@pytest.mark.slow
def test_bits_are_the_same_if_a_run_resumes_on_another_number_of_devices(
    small, tmp_path, monkeypatch
):
    """8, then 2, then 4 devices."""
    run = partial(fit, small, model=models.from_nnx(DropoutNet, "averaged"), save_every=4)
    killed_after(monkeypatch, 2, partial(run, tmp_path / "run", 8))
    killed_after(monkeypatch, 4, partial(run, tmp_path / "run", 2))
    run(tmp_path / "run", 4)
    run(tmp_path / "whole", 1)
    assert digest(tmp_path / "run") == digest(tmp_path / "whole")
    assert trained_rows(tmp_path / "run") == trained_rows(tmp_path / "whole")


def test_exact_gradient_equals_the_gradient(small, tmp_path):
    """Up to rounding, the mean over the batch; the last batch has 12 examples."""
    exact = fit(small, tmp_path / "exact", 4, optimizer=optax.sgd(0.1))
    plain = fit(small, tmp_path / "plain", 4, optimizer=optax.sgd(0.1), strategy=ctde.Strategy())
    for one, other in zip(
        jax.tree.leaves(exact.params), jax.tree.leaves(plain.params), strict=True
    ):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)
    assert [row["examples"] for row in exact.history] == [row["examples"] for row in plain.history]


class Synchronized(nnx.Module):
    """Has batch normalization."""

    def __init__(self, rngs: nnx.Rngs):
        self.last, self.norm = nnx.Linear(64, 10, rngs=rngs), nnx.BatchNorm(64, rngs=rngs)

    def __call__(self, x):
        return self.last(self.norm(x.reshape(len(x), -1)))


@pytest.mark.parametrize("count", [1, 4])
def test_synchronized_statistics_are_refused_on_any_number_of_devices(small, tmp_path, count):
    with pytest.raises(InputError, match=r"exact requires --batch-statistics averaged"):
        fit(small, tmp_path / "run", count, model=models.from_nnx(Synchronized))
    assert not (tmp_path / "run").exists()


def test_command_line_refuses_synchronized_statistics(capsys):
    assert wire.main(["--exact", "--model", "resnet", "--channels", "8", "--norm", "batch"]) == 2
    assert "--exact requires --batch-statistics averaged, or" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ({"batch_size": 36, "devices": 4}, "batch_size must be a multiple of the 8 shards"),
        ({"devices": 3, "batch_size": 24}, "devices must divide the 8 shards"),
        ({"accumulation_steps": 2}, "accumulation_steps must be 1"),
        ({"partition": np.split(np.arange(300), 4)}, "partition must be reshuffled"),
    ],
)
def test_incompatible_arguments_are_refused(more, sentence, small, tmp_path):
    more = {**more, "devices": devices.start(more.get("devices", 4))}
    with pytest.raises(InputError, match=sentence):
        fit(small, tmp_path / "run", 4, **more)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "other", [["--sync-every", "4"], ["--reduce", "int8"], ["--combine", "median"]]
)
def test_option_without_effect_is_refused(other):
    with pytest.raises(InputError, match="must not be set with exact"):
        build.build_strategy(config.parse(["--exact", *other]).aggregation)


@pytest.mark.slow
def test_wire_counts_the_bytes_of_a_run(capsys):
    """Each of 4 devices sends 2 gradients of 9,610 parameters, and 3 sums, to the 3 others."""
    assert wire.main(["--exact", "--devices", "4"]) == 0
    assert f"{2 * 3 * 4 * (9610 + 3):,}" in capsys.readouterr().out


def test_profile_refuses_exact(capsys):
    assert profile.main(["--exact"]) == 2
    assert "error: --exact must be left out" in capsys.readouterr().err


def test_exact_requires_synchronous_steps_and_the_default_reducer():
    with pytest.raises(InputError, match="exact requires inner_steps=0, got 4"):
        ctde.Strategy(inner_steps=4, exact=True)
    with pytest.raises(InputError, match="exact requires the default reducer"):
        ctde.Strategy(reduce=aggregate.median(), exact=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    "model",
    [
        ["mlp"],
        ["mlp", "--init", "lsuv"],
        ["mlp", "--ema-decay", "0.9", "--on-nonfinite", "skip", "--clip-grad-norm", "1"],
        ["resnet", "--norm", "batch", "--batch-statistics", "averaged"],
        ["lstm", "--sequence", "rows"],
    ],
)
def test_command_gives_the_same_bits_on_one_and_eight_devices(model, tmp_path):
    """As users run it, with the default optimizations of XLA; an epoch ends with a short batch."""
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    for count in (1, 8):
        folder = ["--run-dir", str(tmp_path / str(count))]
        command = [
            sys.executable,
            "-m",
            "ctde_jax.train",
            "--exact",
            "--steps",
            "26",
            "--devices",
            str(count),
        ]
        subprocess.run(
            [*command, *folder, "--model", *model],
            env={**environment, "JAX_PLATFORMS": "cpu"},
            check=True,
            capture_output=True,
        )
    assert digest(tmp_path / "8") == digest(tmp_path / "1")


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 4])
def test_integer_state_becomes_the_maximum_over_the_shards(small, count):
    """Of the shards that have examples: the last batch of an epoch has less than 8 shards."""
    mlp = models.mlp([64, 10])

    def init(key, inputs):
        return mlp.init(key, inputs)[0], {"largest": jnp.int32(0)}

    def apply(params, state, inputs, key, mask=None):
        outputs, _ = mlp.apply(params, mlp.init(jax.random.key(0), inputs)[1], inputs, key)
        if key is None:
            return outputs, state
        sums = jnp.round(255 * inputs.reshape(len(inputs), -1).sum(axis=1)).astype(jnp.int32)
        # Without examples, a shard has a larger value, which must not count.
        largest = jnp.max(jnp.where(mask, sums, 0)) if mask is not None else jnp.max(sums)
        largest = jnp.where(jnp.any(mask), largest, 10**6) if mask is not None else largest
        return outputs, {"largest": jnp.maximum(state["largest"], largest)}

    trained = ctde.fit(
        models.Model(init, apply),
        data.from_arrays(*[np.asarray(x)[:36] for x in small.train], *small.test),
        optax.sgd(0.1),
        EXACT,
        devices=devices.start(count),
        batch_size=32,
        epochs=1,
        show=False,
    )
    inputs = np.asarray(small.train.inputs[:36], np.int64).reshape(36, -1)
    assert trained.model_state["largest"] == inputs.sum(axis=1).max()


@pytest.mark.slow
def test_float_state_becomes_the_mean_over_the_shards(small):
    """Also if each of the 8 shards has one example."""
    mlp = models.mlp([64, 2])

    def init(key, inputs):
        return mlp.init(key, inputs)[0], {"ink": jnp.float32(0)}

    def apply(params, state, inputs, key, mask=None):
        outputs, _ = mlp.apply(params, mlp.init(jax.random.key(0), inputs)[1], inputs, key)
        return outputs, state if key is None else {"ink": 255 * jnp.mean(inputs)}

    inputs = np.asarray(small.train.inputs[:8])
    trained = ctde.fit(
        models.Model(init, apply),
        data.from_arrays(inputs, np.arange(8) % 2, inputs[:2], np.arange(2)),
        optax.sgd(0.1),
        EXACT,
        devices=devices.start(2),
        batch_size=8,
        steps=1,
        show=False,
    )
    np.testing.assert_allclose(trained.model_state["ink"], inputs.mean(), rtol=1e-5)
