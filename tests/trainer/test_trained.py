"""A trained model predicts for valid inputs, at once or in parts, and refuses all others."""

import dataclasses
import pickle

import jax
import numpy as np
import optax
import pytest
from flax import nnx
from jax import numpy as jnp
from user_modules import LinenNormed, Normed

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
def float_model():
    """A model trained on floats."""
    return fit(ctde.models.mlp([4, 8, 3]), ctde.data.from_arrays(X, Y))


@pytest.fixture(scope="module")
def pixel_model():
    """A model trained on bytes from 0 to 16."""
    return fit(ctde.models.mlp([64, 8, 10]), ctde.data.digits())


def perceptron(trained, inputs: np.ndarray) -> np.ndarray:
    """The outputs computed by numpy in float64."""
    first, last = trained.params["layers"][0], trained.params["layers"][1]
    x = np.asarray(inputs, np.float64).reshape(len(inputs), -1)
    return np.tanh(x @ first["kernel"] + first["bias"]) @ last["kernel"] + last["bias"]


INPUTS = {
    "float32": X,
    "float64": X.astype(np.float64),
    "list": X.tolist(),
    "JAX": jax.numpy.asarray(X),
    "list of integers": [[1, -2, 3, 0]],
    "one example": X[:1],
}


@pytest.mark.parametrize("name", INPUTS)
def test_predict_equals_numpy_for_any_float_inputs(float_model, name):
    np.testing.assert_allclose(
        float_model.predict(INPUTS[name]), perceptron(float_model, INPUTS[name]), atol=1e-5
    )


@pytest.mark.slow
def test_predict_accepts_pixels_of_any_integer_type(pixel_model, digits):
    pixels = digits.test.inputs
    expected = perceptron(pixel_model, pixels / 16)
    for inputs in (pixels, pixels.astype(np.int64), pixels.tolist()):
        np.testing.assert_allclose(pixel_model.predict(inputs), expected, atol=1e-5)


def test_predict_refuses_inputs_that_a_bundle_refuses(float_model, pixel_model, digits, tmp_path):
    """With the same error message."""
    pixels = digits.test.inputs
    refused = {
        "other dtype": pixels / np.float32(16),
        "whole floats": pixels.astype(np.float32),
        "other range": (pixels * 15).astype(np.uint8),
        "other shape": pixels.reshape(-1, 64),
        "no examples of another shape": pixels[:0, :4],
        "a single picture": pixels[0],
    }
    bundle = ctde.write_bundle(
        pixel_model, digits, tmp_path / "bundle", ["numpy"], show=False
    ).bundle
    bundle_predict = ctde.bundle.load(bundle, "numpy")
    for inputs in refused.values():
        with pytest.raises(InputError) as of_trained:
            pixel_model.predict(inputs)
        with pytest.raises(InputError) as of_bundle:
            bundle_predict(inputs)
        assert of_trained.value.sentence == of_bundle.value.sentence
    with pytest.raises(
        InputError, match="inputs must be from 0 to 16, as in training, got numbers from 0 to 240"
    ):
        pixel_model.predict(refused["other range"])


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
def test_predict_refuses_another_dtype_or_shape(float_model, inputs, sentence):
    with pytest.raises(InputError) as caught:
        float_model.predict(inputs)
    assert sentence in str(caught.value)


def test_predict_of_no_examples_returns_an_empty_array(float_model, pixel_model, digits):
    for outputs, shape in (
        (float_model.predict(X[:0]), (0, 3)),
        (float_model.predict([]), (0, 3)),
        (pixel_model.predict(digits.test.inputs[:0]), (0, 10)),
    ):
        assert (outputs.shape, outputs.dtype) == (shape, np.float32)


@pytest.mark.parametrize("examples", [7, 8, 9, 16, 23])
def test_predict_in_pieces_is_traced_once_and_changes_no_output(float_model, monkeypatch, examples):
    at_once, traced = float_model.predict(X[:examples]), []

    def apply(*arguments):
        traced.append(arguments[2].shape)
        return float_model.model.apply(*arguments)

    monkeypatch.setattr(trained_module, "_MOST_AT_ONCE", 8)
    counted = ctde.Trained(
        **{**vars(float_model), "model": float_model.model._replace(apply=apply)}
    )
    np.testing.assert_allclose(counted.predict(X[:examples]), at_once, atol=1e-6)
    assert traced == [(min(examples, 8), 4)]


def test_predict_bounds_the_bytes_of_a_piece(float_model, monkeypatch):
    monkeypatch.setattr(trained_module, "_MOST_BYTES_AT_ONCE", 100)  # 6 examples of 16 bytes
    np.testing.assert_allclose(float_model.predict(X), perceptron(float_model, X), atol=1e-5)


def test_predict_keeps_the_output_structure_of_the_model(float_model, monkeypatch):
    def apply(params, model_state, inputs, key):
        outputs, model_state = float_model.model.apply(params, model_state, inputs, key)
        return {"logits": outputs, "inputs": (inputs,)}, model_state

    tree_model = ctde.Trained(
        **{**vars(float_model), "model": float_model.model._replace(apply=apply)}
    )
    monkeypatch.setattr(trained_module, "_MOST_AT_ONCE", 8)
    found = tree_model.predict(X)
    np.testing.assert_allclose(found["logits"], float_model.predict(X), atol=1e-6)
    np.testing.assert_array_equal(found["inputs"][0], X)
    assert tree_model.predict(X[:0])["inputs"][0].shape == (0, 4)


@pytest.mark.slow
def test_text_model_takes_sequences_of_any_length():
    tokens = RNG.integers(0, 5, (24, 9))
    data = ctde.data.from_arrays(tokens[:, :-1], tokens[:, 1:], classes=tuple("abcde"))
    task = ctde.tasks.language_modeling
    trained = fit(ctde.models.rnn_language_model(5, 8), data, task=task, batch_size=4)
    assert trained.predict(tokens[:, :3]).shape == (24, 3, 5)


@pytest.mark.slow
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
def test_evaluate_refuses_an_invalid_split(float_model, split, sentence):
    with pytest.raises(InputError) as caught:
        float_model.evaluate(split)
    assert sentence in str(caught.value)


def test_evaluate_accepts_class_names():
    names = np.array(["owl", "dog", "cat"])[Y]
    trained = fit(ctde.models.mlp([4, 8, 3]), ctde.data.from_arrays(X, names))
    numbers = 2 - Y  # sorted: cat, dog, owl
    assert trained.evaluate(Split(X, names)) == trained.evaluate(Split(X, numbers))
    assert trained.evaluate(Split(X, names))["accuracy"] == np.mean(
        trained.predict(X).argmax(-1) == numbers
    )
    with pytest.raises(
        InputError, match=r"^labels must be one of cat, dog, owl, got 'cow'; did you mean 'owl'\?$"
    ):
        trained.evaluate(Split(X[:1], ["cow"]))


def test_evaluate_equals_numpy_for_any_integer_labels(float_model):
    logits = perceptron(float_model, X)
    expected = (np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(60), Y]).mean()
    for labels in (Y, Y.astype(np.int8), Y.tolist()):
        assert float_model.evaluate(Split(X, labels))["loss"] == pytest.approx(expected, rel=1e-5)


def test_labels_of_a_user_task_must_be_classes():
    """The loss would clamp other labels."""
    task = ctde.Task(optax.softmax_cross_entropy_with_integer_labels)
    trained = fit(ctde.models.mlp([4, 8, 3]), ctde.data.from_arrays(X, Y), task=task)
    with pytest.raises(
        InputError, match="labels must be from 0 to 2, as in training, got numbers from 7 to 7"
    ):
        trained.evaluate(Split(X, np.full(60, 7)))


def test_error_of_pickling_names_the_alternatives(float_model):
    with pytest.raises(
        InputError,
        match=r"cannot be pickled, .* with trained.save, export it with ctde_jax.write_bundle, or ",
    ):
        pickle.dumps(float_model)
    assert pickle.loads(pickle.dumps(float_model.params))["layers"][0]["kernel"].shape == (4, 8)


@pytest.fixture(scope="module")
def bytes_of_x():
    """Inputs that are scaled by the data set."""
    return ctde.data.from_arrays((50 + 20 * X).astype(np.uint8), Y)


@pytest.mark.slow
@pytest.mark.parametrize("module", [Normed, Normed(rngs=nnx.Rngs(1))], ids=["class", "instance"])
def test_nnx_module_computes_the_outputs_of_predict(bytes_of_x, module):
    trained = fit(module, bytes_of_x)
    found = trained.module()
    assert type(found) is Normed
    inputs = bytes_of_x.test.inputs
    scaled = (inputs - bytes_of_x.shift) * bytes_of_x.scale
    np.testing.assert_allclose(found(scaled), trained.predict(inputs), rtol=1e-5, atol=1e-6)

    # It is an ordinary module: it can be trained, which does not change the result.
    found.train()
    assert np.abs(found(scaled) - trained.predict(inputs)).max() > 1e-3
    np.testing.assert_array_equal(trained.module().norm.mean, trained.model_state["norm"]["mean"])


def test_linen_module_computes_the_outputs_of_predict(bytes_of_x):
    trained = fit(LinenNormed(), bytes_of_x)
    module, variables = trained.module()
    assert isinstance(module, LinenNormed)
    assert variables.keys() == {"params", "batch_stats"}
    inputs = bytes_of_x.test.inputs
    scaled = (inputs - bytes_of_x.shift) * bytes_of_x.scale
    outputs = module.apply(variables, scaled, train=False)
    np.testing.assert_allclose(outputs, trained.predict(inputs), rtol=1e-5, atol=1e-6)


def test_initialized_model_is_returned_as_its_module(float_model):
    model = ctde.initializers.he(ctde.models.mlp([4, 8, 3]))
    module = ctde.models.module_of(model, float_model.params, {})
    np.testing.assert_allclose(module(X), float_model.predict(X), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "model",
    [
        ctde.models.in_bfloat16(ctde.models.mlp([4, 3])),
        ctde.models.mlp([4, 3])._replace(apply=lambda params, state, x, key: (x @ jnp.ones(3), {})),
    ],
    ids=["bfloat16", "function"],
)
def test_model_that_is_not_its_module_is_refused(float_model, model):
    """A module would compute other outputs than `predict`."""
    wrapped = ctde.models.with_raw_inputs(model, 0.0, 1.0)
    with pytest.raises(InputError) as caught:
        ctde.Trained(**{**vars(float_model), "model": wrapped}).module()
    assert str(caught.value) == (
        "model must be made from an nnx or linen module, without in_bfloat16 or another apply, to "
        "be returned as a module; call predict instead."
    )


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
def test_fit_refuses_counts_and_devices_of_the_wrong_type(options, sentence):
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
def test_labels_that_require_a_task_are_named(labels, sentence):
    with pytest.raises(InputError) as caught:
        fit(ctde.models.mlp([4, 8, 3]), ctde.data.from_arrays(X, labels))
    assert (
        str(caught.value)
        == "task must be given, as 'regression' or Task(loss), unless labels are classes or a "
        f"text; {sentence}"
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
def test_bytes_of_the_training_are_accepted_for_any_scaling(largest, shift, scale, accepted):
    pixels = np.resize(np.arange(largest + 1, dtype=np.uint8), (100, 4))
    data = ctde.data.from_arrays(pixels, np.arange(100) % 3)
    data = dataclasses.replace(data, shift=np.float32(shift), scale=np.float32(scale))
    inputs = trained_module.accepts(data).inputs
    np.testing.assert_array_equal(inputs.conform("inputs", pixels), pixels)
    assert (inputs.largest or 255) == write._highest(data) == accepted
