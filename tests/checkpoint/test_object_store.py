"""A copy in another place is the checkpoint itself: same bits, same rows, and no damaged bit of it is ever loaded."""

import gc
import shutil
import sys
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import ctde_jax as ctde
from ctde_jax import checkpoint, devices, models, object_store
from ctde_jax.checkpoint.format import MANIFEST, SUMS, Damaged
from ctde_jax.checkpoint.position import Position

pytest.importorskip("orbax.checkpoint")
pytestmark = pytest.mark.filterwarnings(  # Orbax leaves callbacks behind where TensorStore finds something damaged
    "ignore::pytest.PytestUnraisableExceptionWarning"
)
RNG = np.random.default_rng(0)
ARRAYS = {
    "params/kernel": RNG.normal(size=(64, 40)).astype(np.float32),
    "params/bias": RNG.normal(size=12).astype(jax.numpy.bfloat16),
    "params": np.arange(3.0),
    "step": np.array(7, np.int32),
    "seen": np.array([True, False]),
    "nothing": np.zeros((0, 4), np.float32),
}
FACTS = {"position": Position(gone_through=7)._asdict(), "rows": 2, "replicas": 1, "options": {}}


@pytest.fixture(autouse=True)
def forget_futures():
    """What Orbax leaves behind where something is damaged complains when it is collected, which is not to be later."""
    yield
    gc.collect()


@pytest.fixture
def run_folder(tmp_path) -> Path:
    """A run with one checkpoint, after which another row was written."""
    folder = tmp_path / "run"
    checkpoint.write(checkpoint.path_of(folder / "checkpoints", 7), ARRAYS, FACTS)
    (folder / "metrics.jsonl").write_text('{"step": 3}\n{"step": 7}\n{"step": 9}\n')
    (folder / "config.json").write_text("{}\n")
    return folder


@pytest.fixture
def place(run_folder, tmp_path) -> Path:
    place = tmp_path / "bucket" / "mine"
    object_store.put(run_folder, str(place))
    return place


def bits(tensors) -> dict[str, tuple]:
    return {name: (x.shape, str(x.dtype), np.asarray(x).tobytes()) for name, x in tensors.items()}


def test_what_comes_back_is_what_was_put(place, run_folder, tmp_path):
    path = object_store.get(str(place), tmp_path / "fresh")
    found = checkpoint.read(path)
    assert path == tmp_path / "fresh" / "checkpoints" / "step-00000007"
    assert bits(found.tensors) == bits(ARRAYS)
    assert found.facts == FACTS
    assert (tmp_path / "fresh" / "metrics.jsonl").read_text() == '{"step": 3}\n{"step": 7}\n'
    assert (tmp_path / "fresh" / "config.json").read_text() == "{}\n"
    assert (place / MANIFEST).read_bytes() == (run_folder / "checkpoints" / "step-00000007" / MANIFEST).read_bytes()


def test_run_goes_on_elsewhere_with_the_same_bits(digits, tmp_path):
    def fit(folder: Path) -> ctde.Trained:
        options = {"batch_size": 32, "steps": 40, "log_every": 4, "save_every": 4, "show": False}
        options |= {"devices": devices.start(2), "run_dir": folder, "keep_checkpoints": 20}
        return ctde.fit(models.mlp([64, 8, 10]), digits, optax.adam(0.01), **options)

    whole = fit(tmp_path / "whole")
    at_20 = checkpoint.path_of(tmp_path / "whole" / "checkpoints", 20)
    object_store.put(at_20, str(tmp_path / "place"))
    object_store.get(str(tmp_path / "place"), tmp_path / "fresh")
    again = fit(tmp_path / "fresh")

    last = [checkpoint.newest(tmp_path / name / "checkpoints") for name in ("whole", "fresh")]
    assert bits(checkpoint.read(last[0]).tensors) == bits(checkpoint.read(last[1]).tensors)
    assert again.tested == whole.tested
    assert [row["loss"] for row in again.history] == [row["loss"] for row in whole.history]


def flip(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def files(place: Path) -> list[Path]:
    """The largest one, in which Orbax has most of the arrays, comes last."""
    return sorted((path for path in place.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def said_of_flips(place: Path, path: Path, count: int) -> list[str]:
    """Flips so many bits of a file, one at a time; nothing but the true arrays is read."""
    said = []
    for bit in map(int, RNG.choice(8 * path.stat().st_size, size=count, replace=False)):
        flip(path, bit)
        try:
            assert bits(object_store.read(str(place)).tensors) == bits(ARRAYS)
        except Damaged as error:
            said.append(str(error))
        flip(path, bit)
    return said


def test_no_flipped_bit_is_loaded(place):
    """There are some that nobody reads, among Orbax's own files only."""
    for path in files(place):
        said = said_of_flips(place, path, 20)
        assert len(said) == 20 or path.parent != place
    assert bits(object_store.read(str(place)).tensors) == bits(ARRAYS)


def test_damaged_tensor_is_named_of_which_orbax_has_no_checksum(place):
    said = said_of_flips(place, files(place)[-1], 60)
    assert len(said) > 40
    assert all("params/kernel" in sentence for sentence in said)


@pytest.mark.parametrize("name", [MANIFEST, SUMS, "metrics.jsonl", "config.json", "tensors"])
def test_copy_that_was_broken_off_is_refused(place, tmp_path, name):
    (place / name).rename(place / f".{name}")
    with pytest.raises(ctde.InputError, match="place must hold an intact copy, but"):
        object_store.get(str(place), tmp_path / "fresh")
    assert ctde.checkpoint.run_folder.is_new(tmp_path / "fresh")
    (place / f".{name}").rename(place / name)
    object_store.get(str(place), tmp_path / "fresh")


def test_each_device_reads_its_part(place):
    halves = NamedSharding(Mesh(np.array(devices.start(4)), ("x",)), PartitionSpec("x"))
    tensors = object_store.read(str(place), {"params/kernel": halves}).tensors
    assert bits(tensors) == bits(ARRAYS)
    assert isinstance(tensors["params/kernel"], jax.Array)
    assert [shard.data.shape for shard in tensors["params/kernel"].addressable_shards] == [(16, 40)] * 4
    assert isinstance(tensors["params/bias"], np.ndarray)
    with pytest.raises(ctde.InputError, match="shardings must be one of"):
        object_store.read(str(place), {"params/kernal": halves})


def test_copy_without_orbax_is_a_sentence(run_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "orbax.checkpoint", None)
    assert object_store.main(["put", str(run_folder), str(tmp_path / "place")]) == 2
    assert "needs Orbax; pip install 'ctde_jax[orbax]'" in capsys.readouterr().err


def test_commands_put_and_get(run_folder, tmp_path, capsys):
    place, fresh = tmp_path / "place", tmp_path / "fresh"
    assert object_store.main(["put", str(run_folder), str(place)]) == 0
    assert object_store.main(["get", str(place), str(fresh)]) == 0
    said = capsys.readouterr().out
    assert f"put        {run_folder / 'checkpoints' / 'step-00000007'} to {place}" in said
    assert f"got        {fresh / 'checkpoints' / 'step-00000007'}" in said

    assert object_store.main(["put", str(run_folder), str(place)]) == 2
    assert f"error: place must be one where nothing is yet, but there is {place}" in capsys.readouterr().err
    assert object_store.main(["get", str(place), str(fresh)]) == 2
    assert "error: --run-dir must not hold a run already" in capsys.readouterr().err


def test_newest_is_put_and_a_damaged_one_passed_over(run_folder, tmp_path, capsys):
    checkpoint.write(checkpoint.path_of(run_folder / "checkpoints", 9), ARRAYS, FACTS | {"rows": 3})
    damaged = run_folder / "checkpoints" / "step-00000009" / checkpoint.TENSORS
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    assert object_store.put(run_folder, str(tmp_path / "place")).name == "step-00000007"
    assert "damaged    " in capsys.readouterr().out
    with pytest.raises(ctde.InputError, match="run_dir must be the folder of an intact checkpoint"):
        object_store.put(damaged.parent, str(tmp_path / "other"))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["putt"], "object_store must be one of put, get, got 'putt'; did you mean 'put'?"),
        (["put", "x"], "object_store put wants a folder and a place, got 1 arguments."),
        (["put", "nowhere", "x"], "--run-dir must be the folder of a run or of one of its checkpoints, and nowhere is"),
        (["get", "nowhere", "x"], "place must hold an intact copy, but nowhere: it cannot be read (FileNotFoundError"),
        (["get", "gs://nowhere/x", "x"], "place must be one that Orbax can read, but gs://nowhere/x failed: Please"),
    ],
)
def test_mistakes_are_sentences(arguments, sentence, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    assert object_store.main(arguments) == 2
    assert f"error: {sentence}" in capsys.readouterr().err


def test_run_without_its_rows_or_checkpoints_is_refused(run_folder, tmp_path):
    (run_folder / "metrics.jsonl").write_text('{"step": 3}\n')
    with pytest.raises(ctde.InputError, match=r"run_dir must have the 2 rows of its checkpoint in .*, got 1"):
        object_store.put(run_folder, str(tmp_path / "place"))
    shutil.rmtree(run_folder / "checkpoints" / "step-00000007")
    with pytest.raises(ctde.InputError, match="run_dir must hold a checkpoint, but"):
        object_store.put(run_folder, str(tmp_path / "place"))
    assert not (tmp_path / "place").exists()


def test_place_that_cannot_be_written_to_is_a_sentence(run_folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    (tmp_path / "file").write_text("in the way")
    for place in (str(tmp_path / "file" / "place"), "gs://nowhere/place"):
        with pytest.raises(ctde.InputError, match="place must be one that Orbax can write to, but"):
            object_store.put(run_folder, place)


def test_checkpoint_that_is_in_no_run_is_refused(run_folder, tmp_path):
    alone = (run_folder / "checkpoints" / "step-00000007").rename(tmp_path / "step-00000007")
    with pytest.raises(ctde.InputError, match="run_dir must be the folder of a run or of one of its checkpoints"):
        object_store.put(alone, str(tmp_path / "place"))
