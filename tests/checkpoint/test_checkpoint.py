"""A checkpoint is complete or absent, and a damaged one is never loaded."""

import json
import os
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest

from ctde_jax.checkpoint import atomic
from ctde_jax.checkpoint import format as checkpoint
from ctde_jax.checkpoint.format import (
    FORMAT,
    MANIFEST,
    SUMS,
    TENSORS,
    Damaged,
    newest_intact,
    open_saver,
    path_of,
    read,
)
from ctde_jax.errors import InputError

RNG = np.random.default_rng(0)
ARRAYS = {
    "params/layers/0/kernel": RNG.normal(size=(5, 3)).astype(np.float32),
    "params/layers/0/bias": RNG.normal(size=3).astype(ml_dtypes.bfloat16),
    "step": np.array(7, np.int32),
    "seen": np.array([True, False]),
    "nothing": np.zeros((0, 4), np.float32),
    "transposed": np.arange(6, dtype=np.float32).reshape(2, 3).T,
}


@pytest.fixture
def saved(tmp_path):
    path = path_of(tmp_path, 7)
    checkpoint.write(path, ARRAYS, {"rows": 3})
    return path


def names(folder) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_read_returns_the_written_tensors(saved):
    found = read(saved)
    assert found.facts["rows"] == 3
    assert found.tensors.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        assert found.tensors[name].dtype == array.dtype
        np.testing.assert_array_equal(found.tensors[name], array)


def test_sha256sum_verifies_the_checksums(saved):
    subprocess.run(
        ["sha256sum", "--check", "--strict", SUMS], cwd=saved, check=True, capture_output=True
    )


def test_manifest_names_versions_and_tensors(saved):
    manifest = json.loads((saved / MANIFEST).read_text())
    assert manifest["format"] == FORMAT
    assert manifest["versions"].keys() == {"ctde_jax", "jax", "flax", "optax", "numpy"}
    assert manifest["tensors"]["params/layers/0/bias"]["dtype"] == "bfloat16"


@pytest.mark.parametrize("name", [TENSORS, MANIFEST, SUMS])
def test_every_flipped_bit_is_detected(saved, name):
    whole = (saved / name).read_bytes()
    for bit in RNG.choice(8 * len(whole), size=140, replace=False):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        (saved / name).write_bytes(flipped)
        with pytest.raises(Damaged, match=rf"{name}|{SUMS}"):
            read(saved)
    (saved / name).write_bytes(whole)
    read(saved)


def test_damaged_tensor_is_named(saved):
    whole = bytearray((saved / TENSORS).read_bytes())
    offset = whole.index(ARRAYS["params/layers/0/kernel"].tobytes())
    whole[offset + 9] ^= 4
    (saved / TENSORS).write_bytes(whole)
    with pytest.raises(Damaged, match=f"SHA-256 mismatch in params/layers/0/kernel in {TENSORS}"):
        read(saved)


@pytest.mark.parametrize("name", [TENSORS, MANIFEST, SUMS])
def test_truncated_or_missing_file_is_named(saved, name):
    whole = (saved / name).read_bytes()
    for length in (0, 1, 7, 8, len(whole) // 2, len(whole) - 1):
        (saved / name).write_bytes(whole[:length])
        with pytest.raises(Damaged, match=rf"{name}|{SUMS}"):
            read(saved)
    (saved / name).unlink()
    with pytest.raises(Damaged, match=f"{name} is missing"):
        read(saved)


HEADER = b'{"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
MALFORMED = {
    "empty": b"",
    "shorter than its length": (8).to_bytes(8, "little"),
    "a header of exabytes": (2**62).to_bytes(8, "little") + HEADER,
    "a header that is not JSON": (4).to_bytes(8, "little") + b"nope",
    "a header that is a list": (2).to_bytes(8, "little") + b"[]",
    "no data": len(HEADER).to_bytes(8, "little") + HEADER,
    "too much data": len(HEADER).to_bytes(8, "little") + HEADER + bytes(9),
    "offsets outside": (54).to_bytes(8, "little") + HEADER.replace(b"[0,8]", b"[8,0]") + bytes(8),
    "an unknown type": (54).to_bytes(8, "little") + HEADER.replace(b"F32", b"X32") + bytes(8),
    "a negative shape": (55).to_bytes(8, "little") + HEADER.replace(b"[2]", b"[-2]") + bytes(8),
    "a shape larger than the data": (63).to_bytes(8, "little")
    + HEADER.replace(b"[2]", b"[999999999]")
    + bytes(8),
}


@pytest.mark.parametrize("content", MALFORMED.values(), ids=MALFORMED)
def test_malformed_tensors_with_valid_checksums_are_refused(saved, content):
    """The checksums are updated as well; nothing is loaded, and no large array is allocated."""
    (saved / TENSORS).write_bytes(content)
    (saved / SUMS).write_text(checkpoint._sums(saved))
    with pytest.raises(Damaged, match=f"{TENSORS} is malformed"):
        read(saved)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}", '{"format": "1"}', "[" * 100_000])
def test_malformed_manifest_with_valid_checksums_is_refused(saved, text):
    (saved / MANIFEST).write_text(text)
    (saved / SUMS).write_text(checkpoint._sums(saved))
    with pytest.raises(
        Damaged, match=f"{MANIFEST} is not (valid JSON|the manifest of a checkpoint)"
    ):
        read(saved)


def test_newest_intact_checkpoint_is_loaded_and_the_damaged_one_is_named(tmp_path):
    for step in (5, 10, 15):
        checkpoint.write(path_of(tmp_path, step), ARRAYS, {"at": step})
    (path_of(tmp_path, 15) / TENSORS).write_bytes(b"")
    messages = []
    found = newest_intact(tmp_path, messages.append)
    assert found is not None
    assert found.facts["at"] == 10
    assert len(messages) == 1
    assert "step-00000015" in messages[0]
    assert TENSORS in messages[0]


def test_run_without_an_intact_checkpoint_is_refused(tmp_path):
    checkpoint.write(path_of(tmp_path, 5), ARRAYS, {})
    (path_of(tmp_path, 5) / MANIFEST).unlink()
    with pytest.raises(InputError, match="has no intact checkpoint in"):
        newest_intact(tmp_path, print)


def test_newer_format_is_refused(saved, monkeypatch):
    with monkeypatch.context() as later:
        later.setattr(checkpoint, "FORMAT", FORMAT + 1)
        checkpoint.write(saved, ARRAYS, {})
    with pytest.raises(
        InputError, match=f"format {FORMAT + 1}, but this version reads formats up to {FORMAT}"
    ):
        read(saved)


def test_checkpoint_of_the_same_step_is_replaced(saved):
    checkpoint.write(saved, ARRAYS, {"rows": 4})
    assert read(saved).facts["rows"] == 4
    assert names(saved.parent) == {saved.name}


@pytest.mark.parametrize(
    ("module", "part"),
    [(checkpoint, "save_file"), (atomic, "bring_to_disk"), (checkpoint, "_sums")],
)
def test_failed_write_leaves_the_folder_unchanged(saved, monkeypatch, module, part):
    def fail(*arguments, **more):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, part, fail)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.write(path_of(saved.parent, 8), ARRAYS, {})
    monkeypatch.undo()
    assert names(saved.parent) == {saved.name}
    read(saved)


def test_free_space_is_checked_first(saved, monkeypatch):
    usage = checkpoint.shutil.disk_usage(saved)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda folder: usage._replace(free=1000))
    with pytest.raises(OSError, match="1,000 are free"):
        checkpoint.write(path_of(saved.parent, 8), ARRAYS, {})
    assert names(saved.parent) == {saved.name}


def test_interrupted_replacement_is_undone(saved):
    """The process was killed between the two renames."""
    saved.rename(saved.with_name(f".{saved.name}.replaced"))
    saved.with_name(f".{saved.name}.partial").mkdir()
    found = newest_intact(saved.parent, print)
    assert found is not None
    assert found.facts["rows"] == 3


def test_failed_replacement_keeps_the_previous_checkpoint(saved, monkeypatch):
    rename = checkpoint.Path.rename

    def fail_second(path, target):
        if path.name.endswith(".partial"):
            raise OSError(5, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(checkpoint.Path, "rename", fail_second)
    with pytest.raises(OSError, match="Input/output"):
        checkpoint.write(saved, ARRAYS, {"rows": 4})
    monkeypatch.undo()
    assert names(saved.parent) == {saved.name}
    assert read(saved).facts["rows"] == 3


def test_abandoned_checkpoints_are_removed(tmp_path):
    """A run that was rolled back to step 3 saves step 4; step 9 is no longer part of the run."""
    checkpoint.write(path_of(tmp_path, 9), ARRAYS, {})
    checkpoint.write(path_of(tmp_path, 3), ARRAYS, {})
    with open_saver(tmp_path, 2, None, tmp_path / "metrics.jsonl") as saver:
        saver.save(4, ARRAYS, {})
    assert names(tmp_path) == {"step-00000003", "step-00000004"}


def test_saver_keeps_the_newest_and_removes_partial_checkpoints(tmp_path):
    (tmp_path / ".step-00000003.partial").mkdir()
    with open_saver(tmp_path, 2, None, tmp_path / "metrics.jsonl") as saver:
        for step in (1, 2, 3, 4):
            saver.save(step, ARRAYS, {})
    assert names(tmp_path) == {"step-00000003", "step-00000004"}


def largest(measured) -> int | None:
    return max(range(len(measured)), key=lambda index: measured[index]["x"], default=None)


def save(folder, values: dict[int, float | None], keep: int = 2):
    """Saves a checkpoint of each step with its measured value."""
    with open_saver(folder, keep, largest, folder / "metrics.jsonl") as saver:
        for step, value in values.items():
            saver.save(step, ARRAYS, {"measured": None if value is None else {"x": value}})
        return saver.best


def test_best_checkpoint_is_kept_with_the_newest(tmp_path):
    best = save(tmp_path, {1: 0.3, 2: 0.9, 3: 0.5, 4: None, 5: 0.9, 6: 0.1, 7: None})
    assert best == path_of(tmp_path, 2)
    assert names(tmp_path) == {"step-00000002", "step-00000006", "step-00000007"}
    assert save(tmp_path, {8: 0.91, 9: 0.2}) == path_of(tmp_path, 8)
    assert names(tmp_path) == {"step-00000008", "step-00000009"}


def test_run_without_measurements_has_no_best_checkpoint(tmp_path):
    assert save(tmp_path, {1: None, 2: None, 3: None}) is None
    assert names(tmp_path) == {"step-00000002", "step-00000003"}


def test_abandoned_checkpoint_is_not_the_best(tmp_path):
    save(tmp_path, {3: 0.3, 9: 0.9})
    assert save(tmp_path, {4: 0.4}) == path_of(tmp_path, 4)
    assert names(tmp_path) == {"step-00000003", "step-00000004"}


@pytest.mark.parametrize("loss", [MANIFEST, SUMS, "all"])
def test_best_of_the_others_is_kept_if_the_best_is_lost(tmp_path, loss):
    best = save(tmp_path, {1: 0.9, 2: 0.3, 3: 0.2})
    assert best == path_of(tmp_path, 1)
    if loss == "all":
        checkpoint.shutil.rmtree(best)
    else:
        (best / loss).write_bytes(b"\xff" + (best / loss).read_bytes()[1:])
    assert save(tmp_path, {4: 0.1, 5: 0.1}) == path_of(tmp_path, 2)
    assert names(tmp_path) == {"step-00000002", "step-00000004", "step-00000005"}


@pytest.mark.parametrize("fault", ["blocked", "vanished"])
def test_error_of_the_thread_is_raised_at_the_next_step(tmp_path, fault):
    folder = tmp_path / "run" / "checkpoints"
    with open_saver(folder, 2, None, tmp_path / "metrics.jsonl") as saver:
        saver.save(1, ARRAYS, {})
        saver.wait()
        if fault == "vanished":
            folder.rename(tmp_path / "gone")
            folder.parent.rmdir()
            (tmp_path / "run").write_text("no folder any more")
        else:
            (folder / ".step-00000002.partial").write_text("in the way")
        saver.save(2, ARRAYS, {})
        with pytest.raises(
            InputError, match="run_dir must be a writable folder with enough free space"
        ):
            check_until_it_raises(saver)


def check_until_it_raises(saver):
    while True:
        saver.check()


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a POSIX system")
def test_checkpoint_of_a_killed_process_is_complete_or_absent(tmp_path):
    script = (
        "import sys, numpy as np; from pathlib import Path; from ctde_jax import checkpoint as c\n"
        "a = {'x': np.arange(300_000, dtype=np.float32)}\n"
        "print('ready', flush=True)\n"
        "for step in range(10**6): c.write(c.path_of(Path(sys.argv[1]), step), a, {})"
    )
    for moment in range(8):
        folder = tmp_path / str(moment)
        process = subprocess.Popen(
            [sys.executable, "-c", script, str(folder)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        process.stdout.readline()
        try:
            process.wait(timeout=0.02 + 0.013 * moment)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()
        for step in checkpoint.steps(folder):
            read(path_of(folder, step))
