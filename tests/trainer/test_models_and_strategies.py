"""Every network trains with every strategy, with equal losses on any number of devices."""

from functools import partial

import flax.linen
import jax
import numpy as np
import optax
import pytest
from cases import STRATEGY_NAMES, some
from flax import nnx

import ctde_jax as ctde
from ctde_jax import data, models, rounds
from ctde_jax.devices import AXIS

TOKENS = np.tile(np.arange(8), 200)[: 80 * 17].reshape(80, 17)
PICTURES, TEXT = "pictures", "text"


class UserNnx(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.first, self.last = nnx.Linear(64, 16, rngs=rngs), nnx.Linear(16, 10, rngs=rngs)
        self.dropout = nnx.Dropout(0.2, rngs=rngs)

    def __call__(self, x):
        return self.last(self.dropout(nnx.relu(self.first(x.reshape(len(x), -1)))))


class UserLinen(flax.linen.Module):
    @flax.linen.compact
    def __call__(self, x, train: bool):
        x = flax.linen.Dense(16)(x.reshape(len(x), -1))
        x = flax.linen.BatchNorm(use_running_average=not train)(x)
        x = flax.linen.Dropout(0.2, deterministic=not train)(flax.linen.relu(x))
        return flax.linen.Dense(10)(x)


MODELS = {
    "mlp": (models.mlp([64, 16, 10]), PICTURES),
    "cnn": (models.cnn((8, 8), 10, dropout_rate=0.2), PICTURES),
    "resnet": (models.resnet((8, 8), 10, channels=(8, 8)), PICTURES),
    "resnet with batch norm": (
        models.resnet((8, 8), 10, channels=(8, 8), norm="batch", batch_statistics="synchronized"),
        PICTURES,
    ),
    "lstm": (models.rnn_classifier(8, 10, hidden_size=16, cell="lstm", dropout_rate=0.2), PICTURES),
    "gru": (models.rnn_classifier(8, 10, hidden_size=16, cell="gru", dropout_rate=0.2), PICTURES),
    "lstm on text": (
        models.rnn_language_model(8, hidden_size=16, layers=1, dropout_rate=0.2),
        TEXT,
    ),
    "transformer": (
        models.transformer(8, 16, hidden_size=16, blocks=1, heads=2, dropout_rate=0.2),
        TEXT,
    ),
    "nnx module": (models.from_nnx(UserNnx), PICTURES),
    "linen module": (models.from_linen(UserLinen(), batch_statistics="synchronized"), PICTURES),
}


@pytest.fixture(autouse=True)
def clear_programs():
    """Every training compiles new programs, and a process can map only a limited number of them."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="module")
def data_sets(digits) -> dict[str, data.Dataset]:
    few = data.Split(digits.train.inputs[:160], digits.train.labels[:160])
    pictures = data.from_arrays(*few, *few, name=PICTURES, classes=digits.classes)
    text = data.from_arrays(TOKENS[:, :-1], TOKENS[:, 1:], TOKENS[:, :-1], TOKENS[:, 1:], name=TEXT)
    return {PICTURES: pictures, TEXT: ctde.data.dataset.replace(text, vocabulary=tuple("abcdefgh"))}


def losses(
    name: str, data_sets: dict[str, data.Dataset], strategy: ctde.Strategy, devices: int, steps: int
):
    """Trains and returns the mean loss of every four steps."""
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


@pytest.mark.parametrize("name", some(MODELS, "mlp", "nnx module"))
def test_losses_equal_those_of_one_device(name, data_sets):
    """With dropout, and with batch statistics over the whole batch."""
    one, four = (losses(name, data_sets, ctde.Strategy(), devices, steps=16) for devices in (1, 4))
    np.testing.assert_allclose(four, one, rtol=1e-3)
    assert one[-1] < one[0]


def composed(strategy: str) -> ctde.Strategy:
    sync_every = 0 if strategy == "ddp" else 4
    return ctde.strategy(
        strategy, sync_every=sync_every, synchronous_steps=8 * (strategy == "post-local-sgd")
    )


LEARNING = [
    (name, strategy)
    for i, name in enumerate(MODELS)
    for j, strategy in enumerate(STRATEGY_NAMES)
    if (i + j) % 4 == 0
]
"""Each model trains with a quarter of the strategies, each strategy with two or three models."""


@pytest.mark.slow
@pytest.mark.parametrize("pair", LEARNING, ids=str)
def test_every_model_and_every_strategy_learn(pair, data_sets):
    name, strategy = pair
    found = losses(name, data_sets, composed(strategy), devices=4, steps=40)
    assert np.isfinite(found).all()
    assert np.mean(found[-2:]) < found[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_round_keeps_shapes_and_dtypes_of_every_model_and_strategy(name, data_sets):
    """The models have parameters of every kind of layer."""
    model, kind = MODELS[name]
    dataset, task = (
        data_sets[kind],
        ctde.tasks.language_modeling if kind == TEXT else ctde.tasks.classification,
    )
    for strategy in map(composed, STRATEGY_NAMES):
        training = ctde.Training(
            model,
            dataset,
            optax.adam(0.01),
            strategy,
            task,
            ctde.devices.start(4),
            batch_size=16,
            steps=40,
        )
        create = jax.vmap(
            partial(rounds.state.create, optimizer=training.optimizer, strategy=strategy),
            in_axes=None,
            out_axes=rounds.state.axes(strategy),
            axis_name=AXIS,
            axis_size=4,
        )
        before = jax.eval_shape(create, *training.shapes)
        train_rounds = rounds.parallel_rounds(
            rounds.make_gradient(training.raw_model, task),
            training.optimizer,
            strategy,
            training.devices,
            None,
        )
        round_steps = max(1, strategy.inner_steps)
        piece = training.source.shapes(rounds.Span(0, round_steps, round_steps))
        key, number = jax.eval_shape(jax.random.key, 0), jax.ShapeDtypeStruct((), np.int32)
        after, _ = jax.eval_shape(train_rounds, before, *piece, number, number, key)
        assert jax.tree.map(shape_and_dtype, after) == jax.tree.map(shape_and_dtype, before)


def shape_and_dtype(leaf) -> str:
    return f"{leaf.dtype}{leaf.shape}"
