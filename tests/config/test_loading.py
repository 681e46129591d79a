"""Loading a run returns the trained model, for every selection of its parameters."""

import errno
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from cases import some

import ctde_jax as ctde
from ctde_jax import checkpoint, config, train
from ctde_jax.config import walk
from ctde_jax.errors import InputError
from ctde_jax.export.__main__ import main

RUN = (
    "--devices",
    "2",
    "--steps",
    "30",
    "--eval-every",
    "10",
    "--save-every",
    "10",
)
MLP = ("--hidden-sizes", "12")


@pytest.fixture(autouse=True)
def working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def trained(*arguments: str, folder: str = "run") -> ctde.Trained:
    size = () if "--model" in arguments else MLP
    return walk.train(config.parse([*RUN, *size, "--run-dir", folder, *arguments]), 0.0)


OPTIONS = {
    "plain": (),
    "rollback": ("--on-nonfinite", "rollback"),
    "average of the parameters": ("--ema-decay", "0.9"),
    "gossip, averaged over devices": ("--strategy", "gossip"),
    "local steps": ("--strategy", "diloco", "--sync-every", "5"),
    "fragments": ("--strategy", "streaming-diloco", "--sync-every", "5", "--fragments", "2"),
    "best validation loss": ("--validation-fraction", "0.2", "--patience", "9"),
    "best validation loss, stopped early": (
        "--validation-fraction",
        "0.2",
        "--patience",
        "1",
        "--learning-rate",
        "3",
    ),
    "batch statistics": ("--model", "resnet", "--channels", "8", "--norm", "batch"),
    "reestimated batch statistics": (
        "--model",
        "resnet",
        "--channels",
        "8",
        "--norm",
        "batch",
        "--reestimate-batches",
        "3",
    ),
}


@pytest.mark.parametrize("name", some(OPTIONS, "plain"))
def test_loaded_model_equals_the_trained_one(name):
    expected = trained(*OPTIONS[name])
    found, data, chosen = ctde.load_run("run")
    # These two are means over devices, which may round differently.
    exact = {} if name in ("gossip, averaged over devices", "fragments") else {"rtol": 0, "atol": 0}
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, **{"rtol": 1e-6, "atol": 1e-7, **exact}),
        (found.params, found.model_state),
        (expected.params, expected.model_state),
    )
    jax.tree.map(np.testing.assert_array_equal, found.opt_state, expected.opt_state)
    assert found.step == expected.step
    assert found.history == expected.history
    assert found.tested == expected.tested
    assert (found.interrupted, found.stopped_early) == (
        expected.interrupted,
        expected.stopped_early,
    )
    assert len(data.test.inputs) == expected.tested["examples"]
    assert chosen.optimization.steps == 30


@pytest.mark.slow
def test_checkpoint_is_loaded_with_its_parameters_and_metrics():
    """Metrics that were not computed at that step are computed after loading."""
    whole = trained("--keep-checkpoints", "9", "--eval-every", "30")
    short = trained("--keep-checkpoints", "9", folder="other")
    found, data, _ = ctde.load_run("run/checkpoints/step-00000010")
    assert found.step == 10
    assert found.interrupted
    early = [row for row in short.history if row["split"] == "test" and row["step"] == 10]
    assert found.tested["accuracy"] == early[0]["accuracy"]
    assert found.evaluate(data.test)["accuracy"] == early[0]["accuracy"]
    assert [row["split"] for row in found.history].count("train") < [
        r["split"] for r in whole.history
    ].count("train")


@pytest.mark.slow
def test_moved_data_file_is_loaded_from_its_new_path(tmp_path):
    rng = np.random.default_rng(0)
    np.savez("mine.npz", x_train=rng.normal(size=(80, 4)), y_train=rng.integers(0, 3, 80))
    expected = trained("--dataset", "npz", "--data-file", "mine.npz", "--batch-size", "20")
    Path("elsewhere").mkdir()
    shutil.move("mine.npz", "elsewhere/yours.npz")
    with pytest.raises(InputError, match=r"mine\.npz cannot be opened"):
        ctde.load_run("run")
    found, _, _ = ctde.load_run("run", ["--data-file", "elsewhere/yours.npz"])
    jax.tree.map(np.testing.assert_array_equal, found.params, expected.params)
    assert main(["run", "--formats", "numpy", "--data-file", "elsewhere/yours.npz"]) == 0


COLUMNS = ["a,b,label"] + [
    f"{3 * (i % 3) + i % 7 / 9:.3f},{i % 5},{['ant', 'bee', 'cat'][i % 3]}" for i in range(60)
]
CSV_CHANGES = {
    "a class is renamed": (
        lambda lines: [line.replace("ant", "wasp") for line in lines],
        "the class names",
    ),
    "rows are appended": (lambda lines: [*lines, *["3000,1,bee"] * 12], "the shift of the inputs"),
    "one label is changed": (
        lambda lines: [*lines[:-1], lines[-1].replace("cat", "bee")],
        "the labels of the t",
    ),
    "a unit is changed": (
        lambda lines: [lines[0], *("1" + line for line in lines[1:])],
        "the inputs of the test split",
    ),
}


@pytest.fixture(scope="module")
def csv_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("csv")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        (folder / "d.csv").write_text("\n".join(COLUMNS))
        trained("--dataset", "csv", "--data-file", "d.csv", "--batch-size", "12")
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a finished run, and its result."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        result = trained()
    return folder / "run", result


@pytest.fixture
def expected(finished) -> ctde.Trained:
    """Copies the finished run to the working folder, as `run`, and returns its result."""
    shutil.copytree(finished[0], "run")
    return finished[1]


@pytest.mark.parametrize("name", CSV_CHANGES)
def test_changed_data_is_refused_by_every_command(name, csv_run, capsys):
    shutil.copytree(csv_run, ".", dirs_exist_ok=True)
    change, part = CSV_CHANGES[name]
    Path("d.csv").write_text("\n".join(change(COLUMNS)))
    command = [
        *RUN,
        *MLP,
        "--run-dir",
        "run",
        "--dataset",
        "csv",
        "--data-file",
        "d.csv",
        "--batch-size",
        "12",
    ]
    assert main(["run", "--formats", "numpy", "--data-file", "d.csv"]) == 2
    errors = capsys.readouterr().err
    assert ("error: --data-file must contain the data of the run, but d differs in ") in errors
    assert part in errors
    assert not Path("run/bundle").exists()
    assert train.main(command) == 2
    errors = capsys.readouterr().err
    assert "error: --run-dir contains a run with different " in errors
    assert part in errors or "training examples" in errors
    assert (
        "Pass another --run-dir, --resume never to train from the start, or --branch-from "
        "run/checkpoints"
    ) in errors


@pytest.mark.slow
def test_command_names_different_options_as_flags(csv_run, capsys):
    shutil.copytree(csv_run, ".", dirs_exist_ok=True)
    command = [
        *RUN,
        *MLP,
        "--run-dir",
        "run",
        "--dataset",
        "csv",
        "--data-file",
        "d.csv",
        "--batch-size",
        "12",
    ]
    assert train.main([*command, "--learning-rate", "0.01", "--steps", "40"]) == 2
    sentence = (
        "with different options: --learning-rate 0.008 in the checkpoint and 0.01 here; the "
        "number of steps 30 in the checkpoint and 40 here. Pass"
    )
    assert sentence in capsys.readouterr().err
    assert train.main(command) == 0
    output = capsys.readouterr().out
    assert (
        "this run is complete at step 30; to train it from the start, pass --resume never or "
        "another --run-dir"
    ) in output
    assert "after 30 steps; this run was complete, so nothing was trained" in " ".join(
        output.split()
    )
    assert (
        train.main(
            [*command, "--resume", "never", "--branch-from", "run/checkpoints/step-00000030"]
        )
        == 2
    )
    assert (
        "--branch-from must be outside of run, as --resume never moves the run there"
        in capsys.readouterr().err
    )
    assert train.main([*command, "--learning-rate", "0.01", "--resume", "never"]) == 0
    assert ctde.load_run("run").config.optimization.learning_rate == 0.01
    assert ctde.load_run("run/previous-1").config.optimization.learning_rate == 0.008


def test_checkpoint_has_scaling_classes_and_options(csv_run):
    found = checkpoint.read(checkpoint.newest(csv_run / "run" / "checkpoints"))
    rows = np.array([line.split(",")[:2] for line in COLUMNS[1:]], float)
    test = np.sort(np.random.default_rng(0).permutation(60)[:12])
    kept = np.delete(rows, test, axis=0)
    np.testing.assert_allclose(found.tensors["inputs/shift"][0], kept.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(found.tensors["inputs/scale"][0], 1 / kept.std(axis=0), rtol=1e-6)
    assert found.facts["classes"] == ["ant", "bee", "cat"]
    assert found.facts["given_options"]["learning_rate"] == 0.008


def test_bundle_with_other_test_examples_is_refused(csv_run, monkeypatch):
    monkeypatch.chdir(csv_run)
    found, data, _ = ctde.load_run("run")
    labels = data.test.labels.copy()
    labels[0] = (labels[0] + 1) % 3
    with pytest.raises(
        InputError,
        match="data must be those of the training, but the test loss on them is",
    ):
        ctde.write_bundle(
            found,
            replace(data, test=data.test._replace(labels=labels)),
            "other",
            ["numpy"],
            show=False,
        )
    assert not Path("other").exists()


def test_run_is_exported_as_a_bundle(expected, capsys):
    """The card has the training options, and the output has the argument of `--expect`."""
    assert main(["run", "--formats", "numpy", "jax", "onnx-int8", "--examples", "3"]) == 0
    output = capsys.readouterr().out
    bundle = ctde.open_bundle("run/bundle")
    assert f"sha256     {bundle.sha256}" in output
    assert f"--expect {bundle.sha256[:12]}" in output
    assert bundle.card.facts["training"]["options"]["hidden_sizes"] == [12]
    assert bundle.card.facts["training"]["step"] == 30
    found = ctde.bundle.load(bundle, "numpy")(ctde.data.digits().test.inputs[:9])
    np.testing.assert_allclose(
        found, expected.predict(ctde.data.digits().test.inputs[:9]), atol=1e-5
    )


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["nowhere"], "RUN must be the folder of a run of python -m ctde_jax.train"),
        (["run", "--formats", "onyx"], "--formats must be one of numpy, onnx"),
        (["run", "--to", "mine"], "--to must be new or an existing bundle"),
        (
            ["run", "--to", "/proc/none/bundle"],
            "--to must be a writable folder with enough free space, but",
        ),
        (
            ["run", "--to", "run/config.json/bundle"],
            "--to must be a writable folder with enough free space, but",
        ),
        (
            ["silent"],
            "RUN must have metrics.jsonl, and silent/metrics.jsonl cannot be read: No such file",
        ),
        (
            ["run", "--formats", "numpy", "--web", "page"],
            "--web requires the format onnx, but --formats are numpy",
        ),
        (
            ["run", "--web", "mine"],
            "--web must be a new folder, an empty one, or an existing page, got mine",
        ),
        (["run", "--examples", "-1"], "--examples must be at least 0, got -1"),
        (["empty"], "RUN must contain a checkpoint, but empty has none yet"),
        (
            ["other"],
            (
                "RUN must be loaded with the options of its checkpoint "
                "other/checkpoints/step-00000030, but these differ: --hidden-sizes [12] in the "
                "checkpoint and [13] here; correct config.json"
            ),
        ),
        (["run/checkpoints/step-00000020"], "RUN must contain an intact checkpoint"),
    ],
)
@pytest.mark.usefixtures("expected")
def test_mistake_is_reported_in_one_sentence(arguments, sentence, capsys):
    for name in ("empty", "other", "silent"):
        shutil.copytree("run", name)
    Path("silent/metrics.jsonl").unlink()
    shutil.rmtree("empty/checkpoints")
    saved = json.loads(Path("other/config.json").read_text())
    Path("other/config.json").write_text(json.dumps({**saved, "hidden_sizes": [13]}))
    with Path("run/checkpoints/step-00000020/tensors.safetensors").open("ab") as file:
        file.write(b"0")
    Path("mine").mkdir()
    Path("mine/thesis.txt").touch()
    capsys.readouterr()
    assert main(arguments) == 2
    assert f"error: {sentence}" in capsys.readouterr().err


@pytest.mark.parametrize("position", ["after", "within"])
@pytest.mark.parametrize(
    "damage", [b'{"split": "te', b"\xff\xfe\0\n", b"[1]\n", b'{"split": "test", "step": "x"}\n']
)
def test_damaged_log_is_refused_only_within_the_rows_of_the_checkpoint(position, damage, expected):
    path = Path("run/metrics.jsonl")
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(
        b"".join([*lines, damage] if position == "after" else [*lines[:2], damage, *lines[3:]])
    )
    if position == "after":
        assert ctde.load_run("run").trained.history == expected.history
    else:
        with pytest.raises(
            InputError,
            match=rf"the {len(lines)} rows in .*metrics.jsonl .* got 2; name another folder",
        ):
            ctde.load_run("run")


def test_run_in_a_read_only_folder_is_loaded_and_exported(expected, monkeypatch):
    """Simulated, because the tests may run as root, which ignores permissions."""
    open_file, make = os.open, os.mkdir

    def is_in_run(path) -> bool:
        return Path(os.fsdecode(path)).absolute().is_relative_to(Path("run").absolute())

    def refuse_writing(path, flags, *rest, **more):
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and is_in_run(path):
            raise OSError(errno.EROFS, "Read-only file system", path)
        return open_file(path, flags, *rest, **more)

    def refuse_folder(path, *rest, **more):
        if is_in_run(path):
            raise OSError(errno.EROFS, "Read-only file system", path)
        return make(path, *rest, **more)

    monkeypatch.setattr(os, "open", refuse_writing)
    monkeypatch.setattr(os, "mkdir", refuse_folder)
    jax.tree.map(
        np.testing.assert_array_equal, ctde.load_run("run").trained.params, expected.params
    )
    assert main(["run", "--formats", "numpy", "--to", "elsewhere"]) == 0
    assert main(["run", "--formats", "numpy"]) == 2


@pytest.mark.slow
@pytest.mark.usefixtures("expected")
def test_bundle_of_a_checkpoint_is_written_outside_of_it():
    """A bundle in the checkpoint would change its contents and would be deleted with it."""
    assert main(["run/checkpoints/step-00000020", "--formats", "numpy"]) == 0
    assert ctde.open_bundle("run/bundle").card.facts["training"]["step"] == 20
    assert "bundle" not in {path.name for path in Path("run/checkpoints/step-00000020").iterdir()}
