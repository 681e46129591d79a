"""Trackers: each library reads the values of `metrics.jsonl` back."""

import json
import struct
from pathlib import Path

import optax
import pytest

import ctde_jax as ctde
from ctde_jax import train
from ctde_jax.errors import InputError
from ctde_jax.trainer import trackers
from ctde_jax.trainer.trackers import base

MODEL = ctde.models.mlp([64, 8, 10])


def fit(folder: Path, *callbacks, steps: int = 40, **options):
    return ctde.fit(
        MODEL,
        ctde.data.digits(),
        optax.adam(0.01),
        batch_size=64,
        steps=steps,
        eval_every=20,
        log_every=10,
        run_dir=folder,
        callbacks=callbacks,
        show=False,
        **options,
    )


def expected(folder: Path) -> dict[tuple[str, int], float]:
    """The numbers of `metrics.jsonl` by name and step."""
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return {
        (f"{row['split']}/{name}", row["step"]): value
        for row in rows
        for name, value in row.items()
        if name not in ("split", "step", "time")
    }


def from_tensorboard(folder: Path) -> dict[tuple[str, int], float]:
    """Reads event files in order; a start event removes the steps from its step on."""
    event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")
    found = {}
    for path in sorted(folder.glob("events.*"), key=lambda path: path.stat().st_mtime_ns):
        content = path.read_bytes()
        while content:
            # A record is its length, a checksum of that, the event and a checksum of it.
            (length,) = struct.unpack("<Q", content[:8])
            event = event_pb2.Event.FromString(content[12 : 12 + length])
            content = content[16 + length :]
            if event.HasField("session_log"):
                found = {key: value for key, value in found.items() if key[1] < event.step}
            for value in event.summary.value:
                if value.HasField("simple_value"):
                    found[value.tag, event.step] = value.simple_value
    return found


def test_tensorboard_has_every_number_also_of_a_resumed_run(tmp_path):
    folder, events = tmp_path / "run", tmp_path / "run" / "tensorboard"
    fit(folder, trackers.TensorBoard(events), lambda row: row["step"] >= 20)
    fit(folder, trackers.TensorBoard(events))

    numbers = expected(folder)
    assert {step for _, step in numbers} == {10, 20, 30, 40}
    assert {"train/loss", "train/examples_per_second", "test/accuracy"} <= {n for n, _ in numbers}
    assert from_tensorboard(events) == pytest.approx(numbers, rel=1e-6)


def test_failed_run_closes_its_events(tmp_path):
    def fail(row):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fit(tmp_path / "run", trackers.TensorBoard(tmp_path / "events"), fail)
    assert ("train/loss", 10) in from_tensorboard(tmp_path / "events")


def test_command_tracks_in_the_run_folder(tmp_path):
    options = ["--devices", "2", "--steps", "4", "--log-every", "2", "--track", "tensorboard"]
    assert train.main([*options, "--run-dir", str(tmp_path / "run")]) == 0
    numbers = from_tensorboard(tmp_path / "run" / "tensorboard")
    assert numbers == pytest.approx(expected(tmp_path / "run"), rel=1e-6)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--track", "tensorbord"], "--track must be one of tensorboard, mlflow, wandb, trackio"),
        (["--track", "tensorboard", "x"], "got 'x'"),
    ],
)
def test_unknown_tracker_is_refused(tmp_path, arguments, sentence, capsys):
    assert train.main([*arguments, "--run-dir", str(tmp_path / "run")]) == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_tracker_without_its_package_is_refused(tmp_path, monkeypatch, capsys):
    def missing(name):
        raise ModuleNotFoundError

    monkeypatch.setattr(base, "import_module", missing)
    with pytest.raises(InputError, match=r"requires its package; run pip install 'ctde_jax\[wandb"):
        trackers.WandB()
    command = ["--track", "mlflow", "--devices", "2", "--run-dir", str(tmp_path / "run")]
    assert train.main(command) == 2
    assert capsys.readouterr().err == (
        "error: --track mlflow requires its package; run pip install 'ctde_jax[mlflow]'.\n"
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the libraries
def test_mlflow_has_every_number(tmp_path):
    mlflow = pytest.importorskip("mlflow")
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    fit(tmp_path / "run", trackers.MLflow("mine", "first", uri))

    client = mlflow.MlflowClient(uri)
    experiment = client.get_experiment_by_name("mine").experiment_id
    (run,) = client.search_runs([experiment])
    assert (run.info.run_name, run.info.status) == ("first", "FINISHED")
    assert run.data.params["batch_size"] == "64"
    numbers = expected(tmp_path / "run")
    found = {
        (name, metric.step): metric.value
        for name in {name for name, _ in numbers}
        for metric in client.get_metric_history(run.info.run_id, name)
    }
    assert found == numbers


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the libraries
def test_wandb_has_every_number(tmp_path):
    """Offline, in the file that `wandb sync` would send."""
    wandb = pytest.importorskip("wandb")
    from wandb.proto.wandb_internal_pb2 import Record

    fit(tmp_path / "run", trackers.WandB(dir=str(tmp_path), mode="offline"))
    wandb.teardown()
    (path,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    content, found, payload = path.read_bytes(), {}, b""
    # A LevelDB log: 7 bytes of header, then blocks of 32 KiB of records (checksum, length, kind).
    at = 7
    while at + 7 <= len(content):
        _, length, kind = struct.unpack("<IHB", content[at : at + 7])
        payload += content[at + 7 : at + 7 + length]
        at += 7 + length
        at += -at % 2**15 if -at % 2**15 < 7 else 0
        if kind in (1, 4):  # whole, or the last part
            record, payload = Record.FromString(payload), b""
            items = {
                item.key or item.nested_key[0]: json.loads(item.value_json)
                for item in record.history.item
            }
            step = record.history.step.num
            found |= {(name, step): value for name, value in items.items() if "/" in name}
    assert found == expected(tmp_path / "run")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the libraries
def test_trackio_has_every_number(tmp_path, monkeypatch):
    trackio = pytest.importorskip("trackio")
    monkeypatch.setattr(trackio.utils, "TRACKIO_DIR", tmp_path / "trackio")
    monkeypatch.setattr(trackio.sqlite_storage, "TRACKIO_DIR", tmp_path / "trackio")
    fit(tmp_path / "run", trackers.Trackio("mine", "first"))
    rows = trackio.SQLiteStorage.get_logs("mine", "first")
    found = {
        (name, row["step"]): value for row in rows for name, value in row.items() if "/" in name
    }
    assert found == expected(tmp_path / "run")
