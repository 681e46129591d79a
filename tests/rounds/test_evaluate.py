"""Averages over a split count every example once."""

import jax
import numpy as np
import pytest
from cases import some

from ctde_jax import models
from ctde_jax.data import Split
from ctde_jax.devices import replica
from ctde_jax.errors import InputError
from ctde_jax.models.tasks import classification
from ctde_jax.rounds.evaluate import make_evaluate

MODEL = models.mlp([64, 12, 10])


@pytest.mark.parametrize("examples", some([1797, 500, 3], 500))
@pytest.mark.parametrize(
    ("replicas", "batch_size"), [(8, 1024), (8, 7), (8, 64), (1, 1000), (3, 2000)]
)
def test_averages_equal_numpy_for_any_number_of_devices_and_batch_size(
    key, examples, replicas, batch_size
):
    rng = np.random.default_rng(examples)
    split = Split(
        rng.normal(size=(examples, 64)).astype(np.float32),
        rng.integers(0, 10, examples, dtype=np.int32),
    )
    devices = jax.devices()[:replicas]
    params, model_state = replica.replicate(MODEL.init(key, split.inputs[:1]), devices)
    layers = jax.device_get(params)["layers"]

    measured = make_evaluate(
        MODEL, classification, split, devices, params, model_state, batch_size
    )(params, model_state)

    hidden = np.tanh(split.inputs.astype(np.float64) @ layers[0]["kernel"] + layers[0]["bias"])
    outputs = hidden @ layers[1]["kernel"] + layers[1]["bias"]
    log_probabilities = outputs - np.log(np.exp(outputs).sum(axis=1, keepdims=True))
    assert measured["examples"] == examples
    assert measured["accuracy"] * examples == pytest.approx(
        (outputs.argmax(axis=1) == split.labels).sum(), abs=1e-6
    )
    expected = -log_probabilities[np.arange(examples), split.labels].mean()
    assert measured["loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("label_shape", "at_once"), [((1000,), 65), ((10,), 1024), ((99_999,), 1)])
def test_default_batch_has_at_most_65536_labels_and_1024_examples(key, label_shape, at_once):
    seen = []

    def loss(outputs, labels):
        seen.append(labels.shape)
        return outputs[:, 0]

    split = Split(np.zeros((1100, 64), np.float32), np.zeros((1100, *label_shape), np.int8))
    params, model_state = replica.replicate(MODEL.init(key, split.inputs[:1]), jax.devices()[:1])

    make_evaluate(MODEL, models.Task(loss), split, jax.devices()[:1], params, model_state)

    assert set(seen) == {(at_once, *label_shape)}


@pytest.mark.parametrize(("examples", "labels"), [(0, 0), (5, 4), (5, 0)])
def test_split_without_a_label_for_each_example_is_refused(key, examples, labels):
    split = Split(np.zeros((examples, 64), np.float32), np.zeros(labels, np.int32))
    params, model_state = MODEL.init(key, np.zeros((1, 64), np.float32))
    with pytest.raises(InputError, match=f"got {labels} for {examples}"):
        make_evaluate(MODEL, classification, split, jax.devices()[:2], params, model_state)
