"""A trained model predicts for valid inputs, at once or in parts, and refuses all others."""

import dataclasses
import pickle

import jax
import numpy as np
import optax
import pytest

import ctde_jax as ctde
from ctde_jax.data import Split
from ctde_jax.errors import InputError
from ctde_jax.export import write
from ctde_jax.trainer import trained as trained_module

RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(60, 4)).astype(np.float32), np.arange(60) % 3


def fit(model, data, **options):
    return ctde.fit(
        model,
        data,
        optax.adam(0.01),
        **{"batch_size": 12, "steps": 4, "show": False, "devices": jax.devices()[:1], **options},
    )


@pytest.fixture(scope="module")
def measured():
    """Trained on floats."""
    return fit(ctde.models.mlp([4, 8, 3]), ctde.data.from_arrays(X, Y))


@pytest.fixture(scope="module")
def pictured():
    """Trained on bytes from 0 to 16."""
    return fit(ctde.models.mlp([64, 8, 10]), ctde.data.digits())


def perceptron(trained, inputs: np.ndarray) -> np.ndarray:
    """The outputs by numpy alone, in float64."""
    first, last = trained.params["layers"][0], trained.params["layers"][1]
    x = np.asarray(inputs, np.float64).reshape(len(inputs), -1)
    return np.tanh(x @ first["kernel"] + first["bias"]) @ last["kernel"] + last["bias"]


ASKED = {
    "float32": X,
    "float64": X.astype(np.float64),
    "list": X.tolist(),
    "JAX": jax.numpy.asarray(X),
    "list of integers": [[1, -2, 3, 0]],
    "one": X[:1],
}


@pytest.mark.parametrize("name", ASKED)
def test_predict_is_numpys_for_floats_of_any_kind(measured, name):
    np.testing.assert_allclose(
        measured.predict(ASKED[name]), perceptron(measured, ASKED[name]), atol=1e-5
    )


def test_predict_takes_pixels_as_integers_that_fit(pictured, digits):
    pixels = digits.test.inputs
    right = perceptron(pictured, pixels / 16)
    for asked in (pixels, pixels.astype(np.int64), pixels.tolist()):
        np.testing.assert_allclose(pictured.predict(asked), right, atol=1e-5)


def test_predict_refuses_inputs_that_a_bundle_refuses(measured, pictured, digits, tmp_path):
    """In the same sentence."""
    pixels = digits.test.inputs
    asked = {
        "other dtype": pixels / np.float32(16),
        "whole floats": pixels.astype(np.float32),
        "other range": (pixels * 15).astype(np.uint8),
        "other shape": pixels.reshape(-1, 64),
        "no examples of another shape": pixels[:0, :4],
        "a picture alone": pixels[0],
    }
    bundle = ctde.write_bundle(pictured, digits, tmp_path / "bundle", ["numpy"], show=False).bundle
    of_the_bundle = ctde.bundle.load(bundle, "numpy")
    for inputs in asked.values():
        with pytest.raises(InputError) as ours:
            pictured.predict(inputs)
        with pytest.raises(InputError) as theirs:
            of_the_bundle(inputs)
        assert ours.value.sentence == theirs.value.sentence
    with pytest.raises(
        InputError, match="inputs must be from 0 to 16, as in training, got numbers from 0 to 240"
    ):
        pictured.predict(asked["other range"])


@pytest.mark.parametrize(
    ("inputs", "sentence"),
    [
        (
            np.zeros((2, 4), np.uint8),
            (
                "inputs must be floats, as the model was trained on float32, got uint8; scale "
                "them as in training"
            ),
        ),
        (
            np.zeros((2, 4), np.int64),
            (
                "inputs must be floats, as the model was trained on float32, got int64; scale "
                "them as in training"
            ),
        ),
        (X[:, :2], "inputs must be examples of the shape [4], got the shape [60, 2]."),
        (
            X[0],
            (
                "must be examples of the shape [4], got the shape [4]; pass a single example as "
                "x[None]."
            ),
        ),
        ([["a"] * 4], "inputs must be floats, as the model was trained on float32, got <U1"),
    ],
)
def test_predict_refuses_another_type_or_shape_in_a_sentence(measured, inputs, sentence):
    with pytest.raises(InputError) as caught:
        measured.predict(inputs)
    assert sentence in str(caught.value)


def test_predict_of_no_examples_gives_none(measured, pictured, digits):
    for outputs, shape in (
        (measured.predict(X[:0]), (0, 3)),
        (measured.predict([]), (0, 3)),
        (pictured.predict(digits.test.inputs[:0]), (0, 10)),
    ):
        assert (outputs.shape, outputs.dtype) == (shape, np.float32)


@pytest.mark.parametrize("examples", [7, 8, 9, 16, 23])
def test_predict_in_pieces_is_that_of_all_at_once_in_one_program(measured, monkeypatch, examples):
    at_once, traced = measured.predict(X[:examples]), []

    def apply(*arguments):
        traced.append(arguments[2].shape)
        return measured.model.apply(*arguments)

    monkeypatch.setattr(trained_module, "_MOST_AT_ONCE", 8)
    counted = ctde.Trained(**{**vars(measured), "model": measured.model._replace(apply=apply)})
    np.testing.assert_allclose(counted.predict(X[:examples]), at_once, atol=1e-6)
    assert traced == [(min(examples, 8), 4)]


def test_predict_bounds_the_bytes_of_a_piece(measured, monkeypatch):
    monkeypatch.setattr(trained_module, "_MOST_BYTES_AT_ONCE", 100)  # 6 examples of 16 bytes
    np.testing.assert_allclose(measured.predict(X), perceptron(measured, X), atol=1e-5)


def test_predict_returns_the_tree_that_a_model_returns(measured, monkeypatch):
    def apply(params, model_state, inputs, key):
        outputs, model_state = measured.model.apply(params, model_state, inputs, key)
        return {"logits": outputs, "inputs": (inputs,)}, model_state

    both = ctde.Trained(**{**vars(measured), "model": measured.model._replace(apply=apply)})
    monkeypatch.setattr(trained_module, "_MOST_AT_ONCE", 8)
    found = both.predict(X)
    np.testing.assert_allclose(found["logits"], measured.predict(X), atol=1e-6)
    np.testing.assert_array_equal(found["inputs"][0], X)
    assert both.predict(X[:0])["inputs"][0].shape == (0, 4)


def test_text_model_takes_sequences_of_any_length():
    tokens = RNG.integers(0, 5, (24, 9))
    data = ctde.data.from_arrays(tokens[:, :-1], tokens[:, 1:], classes=tuple("abcde"))
    task = ctde.tasks.language_modeling
    trained = fit(ctde.models.rnn_language_model(5, 8), data, task=task, batch_size=4)
    assert trained.predict(tokens[:, :3]).shape == (24, 3, 5)


def test_text_model_refuses_tokens_beyond_its_vocabulary(tmp_path):
    (tmp_path / "t.txt").write_text("abcde" * 40)
    trained = fit(
        ctde.models.rnn_language_model(5, 8),
        ctde.data.from_text(tmp_path / "t.txt", 4),
        batch_size=4,
    )
    assert trained.predict([[0, 4]]).shape == (1, 2, 5)
    with pytest.raises(
        InputError, match=r"inputs must be from 0 to 4, as in training, got numbers from 0 to 5"
    ):
        trained.predict([[0, 5]])


@pytest.mark.parametrize(
    ("split", "sentence"),
    [
        (
            ctde.data.from_arrays(X, Y),
            "must be a Split, such as data.test or data.Split(inputs, labels), got Dataset",
        ),
        (
            (X, Y),
            "split must be a Split, such as data.test or data.Split(inputs, labels), got tuple",
        ),
        (Split(X, Y + 1), "labels must be from 0 to 2, as in training, got numbers from 1 to 3."),
        (Split(X, Y - 1), "labels must be from 0 to 2, as in training, got numbers from -1 to 1."),
        (
            Split(X, Y / 2),
            "labels must be integers, as the model was trained on int32, got float64",
        ),
        (Split(X, Y[:, None]), "labels must be examples of the shape [], got the shape [60, 1]."),
        (Split(X, Y[:5]), "split must have one label for each example, got 5 for 60."),
        (Split(X[:0], Y[:0]), "split must have one label for each example, got 0 for 0."),
        (Split(X[:, :2], Y), "inputs must be examples of the shape [4], got the shape [60, 2]."),
        (
            Split(np.zeros((60, 4), np.uint8), Y),
            "inputs must be floats, as the model was trained on float32, got",
        ),
    ],
)
def test_evaluate_refuses_what_would_be_measured_wrongly(measured, split, sentence):
    with pytest.raises(InputError) as caught:
        measured.evaluate(split)
    assert sentence in str(caught.value)


def test_evaluate_takes_names_of_classes_as_training_does():
    words = np.array(["owl", "dog", "cat"])[Y]
    trained = fit(ctde.models.mlp([4, 8, 3]), ctde.data.from_arrays(X, words))
    numbers = 2 - Y  # sorted: cat, dog, owl
    assert trained.evaluate(Split(X, words)) == trained.evaluate(Split(X, numbers))
    assert trained.evaluate(Split(X, words))["accuracy"] == np.mean(
        trained.predict(X).argmax(-1) == numbers
    )
    with pytest.raises(
        InputError, match=r"^labels must be one of cat, dog, owl, got 'cow'; did you mean 'owl'\?$"
    ):
        trained.evaluate(Split(X[:1], ["cow"]))


def test_evaluate_is_numpys_for_labels_of_any_integer_type(measured):
    logits = perceptron(measured, X)
    right = (np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(60), Y]).mean()
    for labels in (Y, Y.astype(np.int8), Y.tolist()):
        assert measured.evaluate(Split(X, labels))["loss"] == pytest.approx(right, rel=1e-5)


def test_labels_of_a_task_of_ones_own_must_be_classes_too():
    """Its loss would clamp them."""
    task = ctde.Task(optax.softmax_cross_entropy_with_integer_labels)
    trained = fit(ctde.models.mlp([4, 8, 3]), ctde.data.from_arrays(X, Y), task=task)
    with pytest.raises(
        InputError, match="labels must be from 0 to 2, as in training, got numbers from 7 to 7"
    ):
        trained.evaluate(Split(X, np.full(60, 7)))


def test_pickling_names_what_can_be_saved(measured):
    with pytest.raises(
        InputError,
        match=r"cannot be pickled, .* write a bundle with ctde_jax.write_bundle, or pickle",
    ):
        pickle.dumps(measured)
    assert pickle.loads(pickle.dumps(measured.params))["layers"][0]["kernel"].shape == (4, 8)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"steps": None, "epochs": 1.5}, "epochs must be an integer, got 1.5."),
        ({"batch_size": 12.0}, "batch_size must be an integer, got 12.0."),
        ({"seed": "0"}, "seed must be an integer, got '0'."),
        ({"eval_every": 2.0}, "eval_every must be an integer, got 2.0."),
        ({"steps": True}, "steps must be an integer, got True."),
        ({"devices": 4}, "devices must be a list of JAX devices, got 4; pass devices.start(4)."),
        (
            {"devices": "cpu"},
            (
                "devices must be a list of JAX devices, got 'cpu'; pass the result of "
                "devices.start()."
            ),
        ),
    ],
)
def test_fit_refuses_counts_and_devices_of_another_type(options, sentence):
    with pytest.raises(InputError) as caught:
        fit(ctde.models.mlp([4, 8, 3]), ctde.data.from_arrays(X, Y), **options)
    assert str(caught.value) == sentence


@pytest.mark.parametrize(
    ("labels", "sentence"),
    [
        (np.eye(3)[Y], "got one-hot labels of the shape [48, 3]; pass labels.argmax(1)."),
        (
            np.eye(3, dtype=int)[Y],
            "got one-hot labels of the shape [48, 3]; pass labels.argmax(1).",
        ),
        (
            Y.astype(float),
            "got whole numbers of the dtype float32; pass labels.astype(int) if they are classes.",
        ),
        (X[:, 0], "got labels of the dtype float32 and the shape [48]."),
    ],
)
def test_labels_that_need_a_task_are_named(labels, sentence):
    with pytest.raises(InputError) as caught:
        fit(ctde.models.mlp([4, 8, 3]), ctde.data.from_arrays(X, labels))
    assert (
        str(caught.value)
        == f"task must be given, as Task(loss), unless labels are classes or a text; {sentence}"
    )


@pytest.mark.parametrize(
    ("largest", "shift", "scale", "accepted"),
    [
        (255, 127.5, 1 / 127.5, 255),
        (255, 0, 1 / 16, 255),
        (16, 0, 1 / 16, 16),
        (16, 0, -1 / 16, 255),
        (16, 0, 0, 255),
    ],
)
def test_bytes_of_the_training_are_accepted_however_they_are_scaled(
    largest, shift, scale, accepted
):
    pixels = np.resize(np.arange(largest + 1, dtype=np.uint8), (100, 4))
    data = ctde.data.from_arrays(pixels, np.arange(100) % 3)
    data = dataclasses.replace(data, shift=np.float32(shift), scale=np.float32(scale))
    inputs = trained_module.accepts(data).inputs
    np.testing.assert_array_equal(inputs.conform("inputs", pixels), pixels)
    assert (inputs.largest or 255) == write._highest(data) == accepted
