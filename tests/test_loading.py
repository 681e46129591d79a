"""A run's folder gives back the model that was trained, whatever decides which parameters that is."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

import ctde_jax as ctde
from ctde_jax import config, train
from ctde_jax.errors import InputError
from ctde_jax.export.__main__ import main

RUN = ("--devices", "2", "--steps", "30", "--eval-every", "10", "--save-every", "10", "--widths", "12")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def trained(*arguments: str, folder: str = "run") -> ctde.Trained:
    return train.train(config.parse([*RUN, "--run-dir", folder, *arguments]), 0.0)


WAYS = {
    "plain": (),
    "rolled back if need be": ("--on-nonfinite", "rollback"),
    "averaged over time": ("--ema-decay", "0.9"),
    "averaged over devices": ("--strategy", "gossip"),
    "local steps": ("--strategy", "diloco", "--sync-every", "5"),
    "fragments": ("--strategy", "streaming-diloco", "--sync-every", "5", "--fragments", "2"),
    "the best": ("--validation-share", "0.2", "--patience", "9"),
    "the best before patience ran out": ("--validation-share", "0.2", "--patience", "1", "--learning-rate", "3"),
    "statistics": ("--model", "resnet", "--widths", "8", "--norm", "batch"),
    "statistics anew": ("--model", "resnet", "--widths", "8", "--norm", "batch", "--reestimate-batches", "3"),
}


@pytest.mark.parametrize("way", WAYS)
def test_loaded_model_is_the_one_that_was_trained(way):
    right = trained(*WAYS[way])
    found, data, chosen = ctde.load_run("run")
    exact = {} if way in ("averaged over devices", "fragments") else {"rtol": 0, "atol": 0}  # a mean over devices
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, **{"rtol": 1e-6, "atol": 1e-7, **exact}),
        (found.params, found.model_state),
        (right.params, right.model_state),
    )
    jax.tree.map(np.testing.assert_array_equal, found.opt_state, right.opt_state)
    assert found.step == right.step
    assert found.history == right.history
    assert found.tested == right.tested
    assert (found.interrupted, found.stopped_early) == (right.interrupted, right.stopped_early)
    assert len(data.test.inputs) == right.tested["examples"]
    assert chosen.optimization.steps == 30


def test_named_checkpoint_gives_its_own_parameters():
    """As they were then; and what was not measured at that step is measured now."""
    whole = trained("--keep-checkpoints", "9", "--eval-every", "30")
    short = trained("--keep-checkpoints", "9", folder="other")
    found, data, _ = ctde.load_run("run/checkpoints/step-00000010")
    assert found.step == 10
    assert found.interrupted
    early = [row for row in short.history if row["split"] == "test" and row["step"] == 10]
    assert found.tested["accuracy"] == early[0]["accuracy"]
    assert found.evaluate(data.test)["accuracy"] == early[0]["accuracy"]
    assert [row["split"] for row in found.history].count("train") < [r["split"] for r in whole.history].count("train")


def test_data_that_have_moved_are_found(tmp_path):
    rng = np.random.default_rng(0)
    np.savez("mine.npz", x_train=rng.normal(size=(80, 4)), y_train=rng.integers(0, 3, 80))
    right = trained("--dataset", "npz", "--data-file", "mine.npz", "--batch-size", "20")
    Path("elsewhere").mkdir()
    shutil.move("mine.npz", "elsewhere/yours.npz")
    with pytest.raises(InputError, match=r"mine\.npz, which cannot be opened"):
        ctde.load_run("run")
    found, _, _ = ctde.load_run("run", ["--data-file", "elsewhere/yours.npz"])
    jax.tree.map(np.testing.assert_array_equal, found.params, right.params)
    assert main(["run", "--formats", "numpy", "--data-file", "elsewhere/yours.npz"]) == 0


def test_run_leaves_as_a_bundle(capsys):
    """By one command; its card says how it was trained, and how to insist on it."""
    right = trained()
    assert main(["run", "--formats", "numpy", "jax", "onnx-int8", "--examples", "3"]) == 0
    said = capsys.readouterr().out
    bundle = ctde.open_bundle("run/bundle")
    assert f"sha256     {bundle.sha256}" in said
    assert f"--expect {bundle.sha256[:12]}" in said
    assert bundle.card.facts["training"]["options"]["widths"] == [12]
    assert bundle.card.facts["training"]["step"] == 30
    found = ctde.bundle.load(bundle, "numpy")(ctde.data.digits().test.inputs[:9])
    np.testing.assert_allclose(found, right.predict(ctde.data.digits().test.inputs[:9]), atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["nowhere"], "RUN must be the folder of a run of python -m ctde_jax.train"),
        (["run", "--formats", "onyx"], "--formats must be one of numpy, onnx"),
        (["run", "--to", "mine"], "--to must be new or a bundle"),
        (["run", "--to", "/proc/none/bundle"], "--to must be a folder that can be written to and has room"),
        (["run", "--to", "run/config.json/bundle"], "--to must be a folder that can be written to and has room"),
        (["silent"], "RUN must have metrics.jsonl, which silent has not: No such file"),
        (["run", "--formats", "numpy", "--web", "page"], "--web needs the format onnx, and --formats are numpy"),
        (["run", "--web", "mine"], "--web must be new, empty, or a page that was written before, and mine"),
        (["run", "--examples", "-1"], "--examples must be at least 0, got -1"),
        (["empty"], "RUN must have a checkpoint, and empty has none yet"),
        (["other"], "RUN must lead to a checkpoint of the same model"),
        (["run/checkpoints/step-00000020"], "RUN must lead to an intact checkpoint"),
    ],
)
def test_mistake_is_a_sentence(arguments, sentence, capsys):
    trained()
    for name in ("empty", "other", "silent"):
        shutil.copytree("run", name)
    Path("silent/metrics.jsonl").unlink()
    shutil.rmtree("empty/checkpoints")
    saved = json.loads(Path("other/config.json").read_text())
    Path("other/config.json").write_text(json.dumps({**saved, "widths": [13]}))
    with Path("run/checkpoints/step-00000020/tensors.safetensors").open("ab") as file:
        file.write(b"0")
    Path("mine").mkdir()
    Path("mine/thesis.txt").touch()
    capsys.readouterr()
    assert main(arguments) == 2
    assert f"error: {sentence}" in capsys.readouterr().err


def test_bundle_of_a_checkpoint_is_not_written_into_it(capsys):
    """For there it would be gone with the checkpoint, and the checkpoint no longer as it was written."""
    trained()
    assert main(["run/checkpoints/step-00000020", "--formats", "numpy"]) == 0
    assert ctde.open_bundle("run/bundle").card.facts["training"]["step"] == 20
    assert "bundle" not in {path.name for path in Path("run/checkpoints/step-00000020").iterdir()}
