"""Every network trains under every strategy, and alike on any number of devices."""

import flax.linen
import jax
import numpy as np
import optax
import pytest
from flax import nnx

import ctde_jax as ctde
from ctde_jax import data, models
from ctde_jax.config.presets import PRESETS

TOKENS = np.tile(np.arange(8), 200)[: 80 * 17].reshape(80, 17)
PICTURES, TEXT = "pictures", "text"


class OwnNnx(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.first, self.last = nnx.Linear(64, 16, rngs=rngs), nnx.Linear(16, 10, rngs=rngs)
        self.dropout = nnx.Dropout(0.2, rngs=rngs)

    def __call__(self, x):
        return self.last(self.dropout(nnx.relu(self.first(x.reshape(len(x), -1)))))


class OwnLinen(flax.linen.Module):
    @flax.linen.compact
    def __call__(self, x, train: bool):
        x = flax.linen.Dense(16)(x.reshape(len(x), -1))
        x = flax.linen.BatchNorm(use_running_average=not train)(x)
        x = flax.linen.Dropout(0.2, deterministic=not train)(flax.linen.relu(x))
        return flax.linen.Dense(10)(x)


MODELS = {
    "mlp": (models.mlp([64, 16, 10]), PICTURES),
    "cnn": (models.cnn((8, 8), 10, dropout=0.2), PICTURES),
    "resnet": (models.resnet((8, 8), 10, widths=(8, 8)), PICTURES),
    "resnet with batch norm": (
        models.resnet((8, 8), 10, widths=(8, 8), norm="batch", batch_statistics="synchronized"),
        PICTURES,
    ),
    "lstm": (models.rnn_classifier(8, 10, width=16, cell="lstm", dropout=0.2), PICTURES),
    "gru": (models.rnn_classifier(8, 10, width=16, cell="gru", dropout=0.2), PICTURES),
    "lstm on text": (models.rnn_language_model(8, width=16, layers=1, dropout=0.2), TEXT),
    "transformer": (models.transformer(8, 16, width=16, blocks=1, heads=2, dropout=0.2), TEXT),
    "own nnx": (models.from_nnx(OwnNnx), PICTURES),
    "own linen": (models.from_linen(OwnLinen(), batch_statistics="synchronized"), PICTURES),
}


@pytest.fixture(autouse=True)
def forget_programs():
    """Every training compiles programs of its own, and a process can map only so many of them into memory."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="module")
def data_sets(digits) -> dict[str, data.Dataset]:
    few = data.Split(digits.train.inputs[:160], digits.train.labels[:160])
    pictures = data.from_arrays(*few, *few, name=PICTURES, classes=digits.classes)
    text = data.from_arrays(TOKENS[:, :-1], TOKENS[:, 1:], TOKENS[:, :-1], TOKENS[:, 1:], name=TEXT)
    return {PICTURES: pictures, TEXT: ctde.data.dataset.replace(text, vocabulary=tuple("abcdefgh"))}


def losses(name: str, data_sets: dict[str, data.Dataset], strategy: ctde.Strategy, devices: int, steps: int):
    """Trains, and returns the mean losses of every four steps."""
    model, kind = MODELS[name]
    devices = ctde.devices.start(devices)
    trained = ctde.fit(
        model,
        data_sets[kind],
        optax.adam(0.01),
        strategy,
        devices=devices,
        batch_size=16,
        steps=steps,
        eval_every=steps,
        log_every=4,
        show=False,
    )
    return [row["loss"] for row in trained.history if row["split"] == "train"]


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow) if name in ("cnn", "resnet", "gru") else name for name in MODELS],
)
def test_losses_are_those_of_one_device(name, data_sets):
    """With dropout, and with batch statistics over the whole batch."""
    alone, together = (losses(name, data_sets, ctde.Strategy(), devices, steps=16) for devices in (1, 4))
    np.testing.assert_allclose(together, alone, rtol=1e-3)
    assert alone[-1] < alone[0]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", PRESETS)
@pytest.mark.parametrize("name", MODELS)
def test_every_model_learns_under_every_strategy(name, strategy, data_sets):
    composed = ctde.strategy(
        strategy, sync_every=0 if strategy == "ddp" else 4, synchronous_steps=8 * (strategy == "post-local-sgd")
    )
    found = losses(name, data_sets, composed, devices=4, steps=40)
    assert np.isfinite(found).all()
    assert np.mean(found[-2:]) < found[0]
