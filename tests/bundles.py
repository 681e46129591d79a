"""Small trained models and their bundles, created once per process for all tests that use them."""

from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import jax
import numpy as np
import optax
from flax import linen

import ctde_jax as ctde
from ctde_jax.export import Format, Written

TEXT = "To be, or not to be, that is the question: whether 'tis nobler in the mind to suffer. " * 12
WINDOW = 16


class LinenMLP(linen.Module):
    """Uses the number of examples in Python, as many modules do."""

    @linen.compact
    def __call__(self, x):
        x = linen.tanh(linen.Dense(16)(x.reshape(len(x), -1)))
        return linen.Dense(10)(x)


class Noisy(linen.Module):
    """Has batch statistics, which inference must not update, and dropout, which it must omit."""

    @linen.compact
    def __call__(self, x, train: bool):
        x = linen.Dense(16)(x.reshape(x.shape[0], -1))
        x = linen.BatchNorm(use_running_average=not train, momentum=0.9)(x)
        return linen.Dense(10)(linen.Dropout(0.5, deterministic=not train)(linen.gelu(x)))


PICTURES = {
    "mlp": lambda: ctde.models.mlp([64, 16, 10]),
    "linen": lambda: ctde.models.from_linen(LinenMLP()),
    "noisy": lambda: ctde.models.from_linen(Noisy()),
    "cnn": lambda: ctde.models.cnn((8, 8), 10, 0.4),
    "resnet": lambda: ctde.models.resnet((8, 8), 10, (8, 16)),
    "batch-norm": lambda: ctde.models.resnet((8, 8), 10, (8, 16), norm="batch"),
    "lstm": lambda: ctde.models.rnn_classifier(8, 10, 16, 2),
    "gru": lambda: ctde.models.rnn_classifier(8, 10, 16, cell="gru", dropout_rate=0.2),
}
TEXTS = {
    "lstm-text": lambda tokens: ctde.models.rnn_language_model(tokens, 16, 2),
    "gru-text": lambda tokens: ctde.models.rnn_language_model(tokens, 16, 1, "gru"),
    "transformer": lambda tokens: ctde.models.transformer(tokens, WINDOW, 16, 2, 2, 0.1),
}
MODELS = [*PICTURES, *TEXTS]


@cache
def trained(name: str) -> tuple[ctde.Trained, ctde.data.Dataset]:
    """Trains a model for 60 steps on the digits or on a text."""
    if name in PICTURES:
        data = ctde.data.digits()
        model = PICTURES[name]()
    else:
        path = folder() / "text.txt"
        path.write_text(TEXT)
        data = ctde.data.from_text(path, WINDOW, stride=3)
        model = TEXTS[name](len(data.vocabulary))
    options = {"devices": ctde.devices.start(1), "batch_size": 32, "steps": 60, "show": False}
    return ctde.fit(model, data, optax.adam(0.01), **options), data


@cache
def written(name: str, *formats: Format) -> Written:
    """Writes the bundle of a model in these formats, by default those of float32."""
    model, data = trained(name)
    return ctde.write_bundle(
        model, data, folder() / "bundle", *([formats] if formats else []), show=False
    )


def folder() -> Path:
    """Creates a temporary folder that outlives the test."""
    return Path(mkdtemp(prefix="ctde_jax-test-"))


def probabilities(logits: np.ndarray) -> np.ndarray:
    return np.asarray(jax.nn.softmax(logits))
