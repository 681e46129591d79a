"""A saved model is the trained one, bit for bit, and a folder of another model is refused."""

import json
import re

import jax
import numpy as np
import optax
import pytest
from flax import nnx
from jax import numpy as jnp
from user_modules import LinenNormed, Normed

import ctde_jax as ctde
from ctde_jax.errors import InputError

RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(40, 4)).astype(np.float32), np.arange(40) % 3


class Sized(nnx.Module):
    """A network of any width and activation."""

    def __init__(self, width: int, activation, *, rngs: nnx.Rngs):
        self.first = nnx.Linear(4, width, rngs=rngs)
        self.last = nnx.Linear(width, 3, rngs=rngs)
        self.activation = activation

    def __call__(self, x):
        return self.last(self.activation(self.first(x)))


def fit(model, data, **options):
    return ctde.fit(
        model,
        data,
        optax.sgd(0.1),
        **{"batch_size": 8, "steps": 2, "show": False, "devices": jax.devices()[:1], **options},
    )


def network(width=8, activation=jnp.tanh):
    return ctde.models.from_nnx(lambda rngs: Sized(width, activation, rngs=rngs))


@pytest.fixture(scope="module")
def trained():
    return fit(network(), ctde.data.from_arrays(X, Y))


@pytest.fixture
def folder(trained, tmp_path):
    return trained.save(tmp_path / "model")


MODELS = {
    "nnx": (Normed, X, {}),
    "linen": (LinenNormed(), X, {}),
    "bytes": (ctde.models.mlp([4, 3]), (50 + 20 * X).astype(np.uint8), {}),
    "weighted": (ctde.models.mlp([4, 3]), X, {"class_weights": "balanced"}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_loaded_model_is_the_saved_one(tmp_path, name):
    model, x, options = MODELS[name]
    data = ctde.data.from_arrays(x, np.array(["owl", "dog", "cat"])[Y])
    trained = fit(model, data, **options)
    loaded = ctde.load(trained.save(tmp_path / "models" / "mine"), model)

    # Bit for bit, in the same structure.
    for part in ("params", "model_state"):
        one, other = getattr(trained, part), getattr(loaded, part)
        assert jax.tree.structure(one) == jax.tree.structure(other)
        jax.tree.map(np.testing.assert_array_equal, one, other)
    x_test = data.test.inputs
    np.testing.assert_array_equal(loaded.predict(x_test), trained.predict(x_test))
    assert loaded.evaluate(data.test) == trained.evaluate(data.test)

    # All other fields, but those of the training alone.
    unsaved = {"model", "params", "model_state", "opt_state", "seconds", "traffic", "task"}
    for field in vars(trained).keys() - unsaved - {"devices"}:
        assert getattr(loaded, field) == getattr(trained, field), field
    assert loaded.task == trained.task._replace(objective=None)
    assert (loaded.opt_state, loaded.seconds, loaded.traffic) == ((), {}, None)
    assert repr(loaded).startswith("Trained(loaded, step 2, ")


@pytest.mark.slow
def test_text_model_is_loaded_with_its_task(tmp_path):
    tokens = RNG.integers(0, 5, (16, 9))
    data = ctde.data.from_arrays(tokens[:, :-1], tokens[:, 1:], classes=tuple("abcde"))
    model = ctde.models.from_nnx(
        lambda rngs: nnx.Sequential(nnx.Embed(5, 8, rngs=rngs), nnx.Linear(8, 5, rngs=rngs))
    )
    trained = fit(model, data, task=ctde.tasks.language_modeling)
    loaded = ctde.load(trained.save(tmp_path / "model"), model)
    assert loaded.task == ctde.tasks.language_modeling
    np.testing.assert_array_equal(loaded.predict(tokens[:, :8]), trained.predict(tokens[:, :8]))


@pytest.mark.parametrize("is_given", [False, True])
def test_regression_is_loaded_in_the_units_of_its_targets(tmp_path, is_given):
    data = ctde.data.from_arrays(X, 100 + 20 * X[:, 0])
    trained = fit(ctde.models.mlp([4, 1]), data, task="regression")
    task = ctde.tasks.regression(data.train.labels) if is_given else None
    loaded = ctde.load(trained.save(tmp_path / "model"), ctde.models.mlp([4, 1]), task)
    np.testing.assert_array_equal(loaded.predict(X), trained.predict(X))
    assert loaded.evaluate(data.test) == trained.evaluate(data.test)

    # The module computes standardized targets.
    mean, deviation = trained.task.units
    outputs = trained.module()((X - data.shift) * data.scale)
    np.testing.assert_allclose(outputs * deviation + mean, trained.predict(X), rtol=1e-6)


def test_custom_task_must_be_passed_again(tmp_path):
    def error(outputs, targets):
        return jnp.abs(outputs[:, 0] - targets)

    task = ctde.Task(error, {"error": error}, lower_is_better=["error"])
    model = ctde.models.mlp([4, 1])
    trained = fit(model, ctde.data.from_arrays(X, X[:, 0]), task=task)
    folder = trained.save(tmp_path / "model")
    assert ctde.load(folder, model, task).task == task
    with pytest.raises(InputError) as caught:
        ctde.load(folder, model)
    assert str(caught.value) == (
        "task must be given, because the model was trained with a custom task (loss, error); pass "
        "task=Task(...) as to fit."
    )
    with pytest.raises(InputError) as caught:
        ctde.load(folder, model, ctde.tasks.classification)
    assert str(caught.value) == (
        "task must report loss, error, as in training, got loss, accuracy."
    )


@pytest.mark.slow
def test_saved_model_gives_initial_parameters(trained, folder):
    """A folder of `save` is a source of `init_from`, as a checkpoint is."""
    data = ctde.data.from_arrays(X, Y)
    started = fit(network(), data, init_from=folder, steps=1)
    expected = fit(network(), data, init_from=trained, steps=1)
    jax.tree.map(np.testing.assert_array_equal, started.params, expected.params)


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        (
            network(width=9),
            "model must be the saved one, but it has params/first/bias of float32[9] instead of "
            "float32[8]; has params/first/kernel of float32[4, 9] instead of float32[4, 8]; has "
            "params/last/kernel of float32[9, 3] instead of float32[8, 3].",
        ),
        (
            ctde.models.mlp([4, 3]),
            "model must be the saved one, but it lacks params/first/bias; lacks "
            "params/first/kernel; lacks params/last/bias; lacks params/last/kernel; has another "
            "array params/layers/0/bias; has another array params/layers/0/kernel.",
        ),
        (
            network(activation=nnx.relu),
            "model must be the saved one, but its outputs for the saved inputs differ; pass the "
            "model with the options of the training, such as its activation.",
        ),
    ],
)
def test_another_model_is_refused(folder, model, sentence):
    with pytest.raises(InputError) as caught:
        ctde.load(folder, model)
    assert str(caught.value) == sentence


def test_outputs_of_another_platform_are_not_compared(folder):
    """Their precision may differ; simulated by another activation."""
    path = folder / "manifest.json"
    path.write_text(
        path.read_text().replace('"example_platform": "cpu"', '"example_platform": "tpu"')
    )
    (folder / "SHA256SUMS").write_text(ctde.checkpoint.format._sums(folder))
    assert ctde.load(folder, network(activation=nnx.relu)).step == 2


@pytest.mark.parametrize("name", ["tensors.safetensors", "manifest.json"])
def test_damaged_file_is_named(folder, name):
    path = folder / name
    content = bytearray(path.read_bytes())
    content[-20] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        ctde.load(folder, network())
    assert str(caught.value).startswith(f"folder must be intact, but {folder}: SHA-256 mismatch in")
    assert name in str(caught.value)


def test_missing_file_is_named(folder):
    (folder / "tensors.safetensors").unlink()
    with pytest.raises(InputError) as caught:
        ctde.load(folder, network())
    assert str(caught.value) == (
        f"folder must be intact, but {folder}: tensors.safetensors is missing."
    )


def test_folder_with_files_is_not_overwritten(trained, folder, tmp_path):
    before = {path: path.read_bytes() for path in folder.iterdir()}
    (tmp_path / "file").write_text("mine")
    for path in (folder, tmp_path / "file"):
        with pytest.raises(InputError) as caught:
            trained.save(path)
        assert str(caught.value) == (
            f"folder must be new or empty, but {str(path)!r} is not; choose another folder."
        )
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    (tmp_path / "empty").mkdir()
    assert (trained.save(tmp_path / "empty") / "manifest.json").is_file()


def test_folder_below_a_file_is_refused(trained, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match=r"^folder must be a writable folder with enough free "):
        trained.save(tmp_path / "file" / "model")


def test_other_folders_are_refused(trained, tmp_path):
    with pytest.raises(InputError) as caught:
        ctde.load(tmp_path, network())
    assert str(caught.value) == (
        f"folder must be a folder that Trained.save wrote, but {str(tmp_path)!r} has no "
        "manifest.json; load a run of the command line with load_run."
    )
    fit(network(), ctde.data.from_arrays(X, Y), run_dir=tmp_path / "run")
    path = ctde.checkpoint.newest(tmp_path / "run" / "checkpoints")
    with pytest.raises(InputError) as caught:
        ctde.load(path, network())
    assert re.fullmatch(
        r"folder must be a folder that Trained.save wrote, but '.*' is a checkpoint of a run; load "
        r"it with load_run, or call fit again with its run_dir\.",
        str(caught.value),
    )


def test_newer_format_is_refused(folder):
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({**manifest, "format": 99}))
    (folder / "SHA256SUMS").write_text(ctde.checkpoint.format._sums(folder))
    with pytest.raises(InputError, match=r"^folder contains the checkpoint .* of format 99, but "):
        ctde.load(folder, network())


def test_changed_model_is_not_saved(trained, tmp_path):
    changed = ctde.Trained(
        **{**vars(trained), "model": trained.model._replace(apply=lambda *of: (of[2], {}))}
    )
    with pytest.raises(InputError, match=r"^model must not be derived from the model of a Trained"):
        changed.save(tmp_path / "model")
    assert not (tmp_path / "model").exists()
