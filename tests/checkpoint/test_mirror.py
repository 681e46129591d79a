"""A run whose folder is lost continues from its mirror with the same bits."""

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import closing, suppress
from functools import partial
from pathlib import Path

import numpy as np
import optax
import pytest
from runs import killed_after, rows

import ctde_jax as ctde
from ctde_jax import checkpoint, devices, models
from ctde_jax.checkpoint import MANIFEST, METRICS, TENSORS, mirror, uploader
from ctde_jax.checkpoint.format import SUMS, open_saver, path_of, read, steps

fsspec = pytest.importorskip("fsspec")
from fsspec.implementations.memory import MemoryFileSystem  # noqa: E402

MODEL = models.mlp([64, 8, 10])
ADDRESS = "memory://bucket/run"
STORED = "/bucket/run/checkpoints"
WRITES = ("put_file", "pipe_file", "rm_file")
ARRAYS = {"params/kernel": np.arange(6, dtype=np.float32)}


@pytest.fixture(autouse=True)
def store(monkeypatch):
    """An empty store in memory, and tries without long waits."""
    monkeypatch.setattr(MemoryFileSystem, "store", {})
    monkeypatch.setattr(MemoryFileSystem, "pseudo_dirs", [""])
    monkeypatch.setattr(uploader, "_SECONDS_BETWEEN_TRIES", 0.01)
    return fsspec.filesystem("memory")


def fit(digits, folder: Path, address: str | None = ADDRESS, **more) -> ctde.Trained:
    arguments = {
        "optimizer": optax.adam(0.01),
        "batch_size": 64,
        "steps": 40,
        "log_every": 5,
        "save_every": 5,
        "eval_every": 20,
        "devices": devices.start(2),
        "show": False,
    }
    return ctde.fit(MODEL, digits, run_dir=folder, mirror=address, **arguments | more)


def tensors(folder: Path) -> dict[str, bytes]:
    """Returns the tensors of the newest checkpoint of a run."""
    found = read(checkpoint.newest(folder / "checkpoints"))
    return {name: tensor.tobytes() for name, tensor in found.tensors.items()}


def stored(store) -> list[int]:
    """Returns the steps that are complete in the mirror, newest first."""
    return sorted(
        (int(path.split("step-")[1][:8]) for path in store.find(STORED) if MANIFEST in path),
        reverse=True,
    )


def stop_at(step: int):
    return lambda row: row["step"] >= step


@pytest.fixture(scope="module")
def whole(digits, tmp_path_factory) -> Path:
    """The folder of an uninterrupted run without a mirror."""
    folder = tmp_path_factory.mktemp("whole")
    fit(digits, folder, None, keep_checkpoints=20)
    return folder


@pytest.mark.slow
def test_empty_folder_continues_from_the_mirror_with_the_same_bits(
    digits, whole, tmp_path, store, capsys
):
    mirrored(store).upload(path_of(whole / "checkpoints", 20), None, 2)
    fit(digits, tmp_path / "run", show=True)
    output = capsys.readouterr().out
    assert f"mirror     step-00000020 was fetched from {ADDRESS}" in output
    assert f"mirror     step-00000040 is in {ADDRESS}" in output
    assert stored(store)[0] == 40
    assert tensors(tmp_path / "run") == tensors(whole)
    assert rows(tmp_path / "run") == rows(whole)


@pytest.mark.slow
def test_lost_folder_continues_from_a_mirror_in_a_local_folder(digits, whole, tmp_path):
    address = f"file://{tmp_path}/bucket/run"
    fit(digits, tmp_path / "run", address, callbacks=[stop_at(20)])
    shutil.rmtree(tmp_path / "run")
    fit(digits, tmp_path / "run", address)
    assert tensors(tmp_path / "run") == tensors(whole)
    assert rows(tmp_path / "run") == rows(whole)


@pytest.mark.slow
def test_killed_run_continues_from_whatever_the_mirror_has(
    digits, whole, tmp_path, monkeypatch, store
):
    run = partial(fit, digits, tmp_path / "run")
    for lines in (3, 6, 9):
        killed_after(monkeypatch, lines, run)
        shutil.rmtree(tmp_path / "run")
    run()
    assert tensors(tmp_path / "run") == tensors(whole)
    assert rows(tmp_path / "run") == rows(whole)
    assert stored(store) == steps(tmp_path / "run" / "checkpoints")


@pytest.mark.slow
def test_newer_of_folder_and_mirror_is_continued(digits, tmp_path, capsys):
    fit(digits, tmp_path / "old", callbacks=[stop_at(10)])
    shutil.copytree(tmp_path / "old", tmp_path / "new")
    fit(digits, tmp_path / "new", callbacks=[stop_at(20)])

    fit(digits, tmp_path / "old", callbacks=[stop_at(30)], show=True)
    assert f"resume     {tmp_path / 'old' / 'checkpoints' / 'step-00000020'}" in (
        capsys.readouterr().out
    )
    fit(digits, tmp_path / "old", callbacks=[stop_at(35)], show=True)
    output = capsys.readouterr().out
    assert "fetched" not in output
    assert "step-00000030" in output


# Uploads.


class Interrupted:
    """A file system that fails in its `number`-th write, of which it does a part."""

    def __init__(self, filesystem, number: int):
        self._filesystem, self._left = filesystem, number

    def __getattr__(self, name: str):
        method = getattr(self._filesystem, name)
        if name not in WRITES:
            return method

        def write(*arguments, **options):
            if not self._left:
                if name in ("put_file", "pipe_file"):
                    path = arguments[1] if name == "put_file" else arguments[0]
                    self._filesystem.pipe_file(path, b"{")
                raise OSError(5, "Input/output error")
            self._left -= 1
            return method(*arguments, **options)

        return write


def write_step(run: Path, step: int, value: int = 0, **more) -> Path:
    path = path_of(run / "checkpoints", step)
    facts = {"rows": step, "position": {"gone_through": step}, **more}
    checkpoint.write(path, {name: array + value for name, array in ARRAYS.items()}, facts)
    (run / METRICS).write_text('{"split": "train"}\n' * (step + 1))
    return path


def mirrored(filesystem, damaged: tuple[int, ...] = ()) -> mirror.Mirror:
    opened = mirror.Mirror(filesystem, "/bucket/run", ADDRESS)
    opened._is_compared = True
    opened._damaged |= {*damaged}
    return opened


def fetched(store, folder: Path) -> checkpoint.Checkpoint | None:
    return mirrored(store).fetch(folder, None, lambda found: None, lambda line: None)


@pytest.mark.parametrize("replaced", [False, True])
def test_upload_interrupted_in_any_write_leaves_an_intact_checkpoint(store, tmp_path, replaced):
    """The new checkpoint is visible only after the write of its manifest."""
    (tmp_path / "run").mkdir()
    damaged = (3,) if replaced else ()
    for number in range(20):
        store.store.clear()
        for step in (1, 2, 3):
            mirrored(store).upload(write_step(tmp_path / "run", step), None, 2)
        newest = write_step(tmp_path / "run", 3 if replaced else 4, value=7)
        is_complete = True
        try:
            mirrored(Interrupted(store, number), damaged).upload(newest, None, 2)
        except mirror.Unavailable:
            is_complete = False

        # A folder that is lost now gets an intact checkpoint, the new one if it is complete.
        folder = tmp_path / f"fetched-{number}"
        folder.mkdir()
        found = fetched(store, folder)
        assert found is not None
        is_new = found.tensors["params/kernel"][0] == 7
        has_manifest = (
            store.exists(f"{STORED}/{newest.name}/{MANIFEST}")
            and store.cat_file(f"{STORED}/{newest.name}/{MANIFEST}")
            == (newest / MANIFEST).read_bytes()
        )
        assert is_new == has_manifest
        assert found.facts["rows"] >= (2 if replaced else 3)
        assert len((folder / METRICS).read_text().splitlines()) == found.facts["rows"]
        # The next try completes the upload, and removes all that is left of earlier ones.
        mirrored(store, damaged).upload(newest, None, 2)
        assert stored(store) == ([3, 2] if replaced else [4, 3])
        assert len(store.find(STORED)) == 8
        if is_complete:
            break
    assert is_complete
    assert number > 4


@pytest.mark.parametrize("root", ["/bucket/run?", "/bucket/run*", "/bucket/run[12]"])
def test_characters_of_patterns_in_an_address_are_literal(root, store, tmp_path):
    """Nothing of a run at another address is read, replaced or removed."""
    other = mirror.Mirror(store, "/bucket/run1", "memory://bucket/run1")
    other._is_compared = True
    for step in (1, 2, 3):
        other.upload(write_step(tmp_path, step), None, 3)
    before = {path: store.cat_file(path) for path in store.find("/bucket/run1")}

    opened = mirror.Mirror(store, root, "memory://bucket/other")
    opened.check_new()
    for step in (1, 2, 3, 4):
        opened.upload(write_step(tmp_path, step, value=7), None, 1)
    assert {path: store.cat_file(path) for path in store.find("/bucket/run1")} == before
    assert len(store.find(root)) == 4
    found = opened.fetch(tmp_path / "run", None, lambda found: None, print)
    assert found is not None
    assert found.tensors["params/kernel"][0] == 7


def test_only_files_of_the_mirror_are_listed(store, tmp_path):
    """Folders below it may contain checkpoints of other runs and other files."""
    opened = mirrored(store)
    newest = write_step(tmp_path, 5)
    nested = f"{STORED}/other/checkpoints/step-00000005/{MANIFEST}"
    other = f"{STORED}/step-00000004/notes/{MANIFEST}"
    for path in (nested, other):
        store.pipe_file(path, b"{}")
    opened.check_new()
    opened.upload(write_step(tmp_path, 4), None, 1)
    opened.upload(newest, None, 1)
    assert store.cat_file(f"{STORED}/{newest.name}/{MANIFEST}") == (newest / MANIFEST).read_bytes()
    assert {nested, other} < {*store.find(STORED)}
    assert len(store.find(STORED)) == 4 + 2


def largest(measured) -> int | None:
    return max(range(len(measured)), key=lambda index: measured[index]["x"], default=None)


def test_mirror_keeps_the_newest_and_the_best_checkpoint(store, tmp_path):
    folder = tmp_path / "checkpoints"
    (tmp_path / METRICS).write_text("{}\n" * 9)
    with (
        uploader.open_uploader(mirrored(store), 2, print) as uploading,
        open_saver(folder, 2, largest, tmp_path / METRICS, uploading.offer) as saver,
    ):
        for step, value in enumerate([0.3, 0.9, 0.5, 0.1, 0.2]):
            saver.save(step, ARRAYS, {"rows": step, "measured": {"x": value}})
    assert steps(folder)[0] == 4
    assert {1, 4} <= set(stored(store))
    assert len(stored(store)) <= 3
    for step in stored(store):
        for name in (TENSORS, SUMS, MANIFEST):
            remote = store.cat_file(f"{STORED}/step-{step:08d}/{name}")
            assert (
                step not in steps(folder) or remote == (path_of(folder, step) / name).read_bytes()
            )


@pytest.mark.parametrize(
    ("local", "damaged", "expected"),
    [
        ([], None, [2, 4]),
        ([1], None, [1, 2, 4]),
        ([4], None, [2, 4]),
        ([5], None, [2, 5]),  # rows of step 5 remain
        ([2], None, [2, 4]),
        ([], 2, [3, 4]),
        ([], 4, [2, 3]),
    ],
)
def test_best_checkpoint_is_fetched_with_the_newest(local, damaged, expected, store, tmp_path):
    (tmp_path / "run").mkdir()
    opened = mirrored(store)
    for step, value in {1: 0.1, 2: 0.9, 3: 0.5, 4: 0.1, 5: 0.1}.items():
        path = write_step(tmp_path / "run", step, measured={"x": value})
        if 1 < step < 5:
            opened.upload(path, None, 5)
        if step not in local:
            shutil.rmtree(path)
    if damaged is not None:
        damage_tensor(store, f"{STORED}/step-{damaged:08d}")
    opened = mirror.Mirror(store, "/bucket/run", ADDRESS, largest)
    newest = read(path_of(tmp_path / "run" / "checkpoints", local[0])) if local else None
    found = opened.fetch(tmp_path / "run", newest, lambda found: None, print) or newest
    assert steps(tmp_path / "run" / "checkpoints") == expected[::-1]
    assert found is not None
    assert found.facts["rows"] == expected[-1]
    assert len((tmp_path / "run" / METRICS).read_text().splitlines()) >= expected[-1]


@pytest.mark.slow
def test_run_whose_folder_is_lost_keeps_its_best_checkpoint(digits, tmp_path, store):
    # The loss falls for two steps, and then rises.
    rate = optax.join_schedules([lambda step: 0.5, lambda step: -0.5], [2])
    run = partial(
        fit,
        ctde.data.hold_out(digits, 0.1),
        optimizer=optax.sgd(rate),
        keep_best="loss",
        keep_checkpoints=1,
        steps=6,
        **dict.fromkeys(["eval_every", "save_every", "log_every"], 1),
    )
    run(tmp_path / "whole", None)
    run(tmp_path / "run", callbacks=[stop_at(4)])
    shutil.rmtree(tmp_path / "run")
    run(tmp_path / "run")
    best = [step for step in steps(tmp_path / "whole" / "checkpoints") if step < 4]
    assert len(best) == 1
    assert stored(store) == steps(tmp_path / "run" / "checkpoints") == [6, *best]
    assert rows(tmp_path / "run") == rows(tmp_path / "whole")


def test_slow_store_delays_no_save_and_loses_no_checkpoint_that_it_reads(
    store, tmp_path, monkeypatch
):
    """Checkpoints between the one being uploaded and the newest are left out."""
    put_file = MemoryFileSystem.put_file
    may_continue = threading.Event()
    has_begun = threading.Event()

    def put_slowly(self, source, target, **options):
        has_begun.set()
        may_continue.wait()
        put_file(self, source, target, **options)

    monkeypatch.setattr(MemoryFileSystem, "put_file", put_slowly)
    (tmp_path / METRICS).write_text("{}\n" * 9)
    with uploader.open_uploader(mirrored(store), 2, print) as uploading:
        with open_saver(
            tmp_path / "checkpoints", 1, None, tmp_path / METRICS, uploading.offer
        ) as saver:
            for step in range(1, 6):
                saver.save(step, ARRAYS, {"rows": 1})
                assert has_begun.wait(10)
        assert steps(tmp_path / "checkpoints") == [5, 1]
        may_continue.set()
    assert stored(store) == [5, 1]


# Stores that cannot be reached.


@pytest.fixture
def outage(monkeypatch):
    """Makes every contact with the store fail while the event is set."""
    is_out = threading.Event()
    for name in (*WRITES, "find", "cat_file", "get_file"):

        def contact(self, *arguments, method=getattr(MemoryFileSystem, name), **options):
            if is_out.is_set():
                raise OSError(101, "Network is unreachable")
            return method(self, *arguments, **options)

        monkeypatch.setattr(MemoryFileSystem, name, contact)
    return is_out


WARNING = f"warning: mirror {ADDRESS} failed with OSError: [Errno 101] Network is unreachable"


@pytest.mark.slow
def test_run_survives_an_outage_with_one_warning(digits, whole, tmp_path, outage, store, capsys):
    def on_row(row):
        outage.set() if 10 <= row["step"] < 30 else outage.clear()

    fit(digits, tmp_path / "run", callbacks=[on_row])
    assert stored(store)[0] == 40
    assert rows(tmp_path / "run") == rows(whole)
    assert capsys.readouterr().err.count(WARNING) <= 1


def test_outage_is_a_warning_that_repeats_until_the_last_checkpoint_is_uploaded(
    store, tmp_path, outage, monkeypatch, capsys
):
    monkeypatch.setattr(uploader, "_SECONDS_BETWEEN_WARNINGS", 0.0)
    paths = [write_step(tmp_path, step) for step in (1, 2, 3)]
    with uploader.open_uploader(mirrored(store), 2, print) as uploading:
        assert uploading is not None
        outage.set()
        for path in paths:
            uploading.offer(path, None)
            time.sleep(0.05)
        outage.clear()
    assert stored(store) == [3]
    captured = capsys.readouterr()
    assert captured.err.count(f"{WARNING}; training continues, and the upload is tried") > 1
    assert captured.out.endswith(f"mirror     step-00000003 is in {ADDRESS}\n")


def test_end_of_a_run_waits_for_a_limited_time(store, tmp_path, outage, monkeypatch, capsys):
    monkeypatch.setattr(uploader, "_SECONDS_AT_END", 0.1)
    path = write_step(tmp_path, 1)
    outage.set()
    with uploader.open_uploader(mirrored(store), 2, print) as uploading:
        assert uploading is not None
        uploading.offer(path, None)
    captured = capsys.readouterr()
    assert captured.err.count(f"{WARNING}; training continues") == 1
    assert (
        f"warning: mirror {ADDRESS} does not have step-00000001 of this run yet, as {ADDRESS} "
        "failed with OSError: [Errno 101] Network is unreachable; the same command uploads it."
    ) in captured.err

    # After a second Ctrl-C, the run does not wait.
    monkeypatch.setattr(uploader, "_SECONDS_AT_END", 100.0)
    with (
        suppress(KeyboardInterrupt),
        uploader.open_uploader(mirrored(store), 2, print) as uploading,
    ):
        assert uploading is not None
        uploading.offer(path, None)
        raise KeyboardInterrupt
    assert "waiting" not in capsys.readouterr().out


def test_checkpoints_that_a_mirror_got_during_an_outage_are_not_replaced(store, tmp_path, outage):
    """The run could not compare itself with the mirror at its start."""
    old, new, newest = (write_step(tmp_path, step) for step in (1, 2, 3))
    mirrored(store).upload(new, None, 2)
    before = dict(store.store)

    def check(found):
        if found.facts["rows"] == other:
            raise ctde.InputError("mirror", "contains a run with different options.")

    outage.set()
    opened = mirror.Mirror(store, "/bucket/run", ADDRESS)
    assert opened.fetch(tmp_path, read(old), check, print) is None
    outage.clear()
    other = 0
    with pytest.raises(mirror.Unavailable, match="step-00000002 is newer than this run"):
        opened.upload(old, None, 2)
    other = 2
    with pytest.raises(mirror.Unavailable, match="mirror contains a run with different options"):
        opened.upload(newest, None, 2)
    assert dict(store.store) == before
    other = 0
    opened.upload(newest, None, 2)
    assert stored(store) == [3, 2]


@pytest.mark.slow
def test_complete_run_is_uploaded_by_the_same_call_after_an_outage(
    digits, whole, tmp_path, outage, store, monkeypatch, capsys
):
    monkeypatch.setattr(uploader, "_SECONDS_AT_END", 0.1)
    fit(digits, tmp_path / "run", callbacks=[lambda row: outage.set()])
    assert (
        f"warning: mirror {ADDRESS} does not have step-00000040 of this run yet, as "
    ) in capsys.readouterr().err
    outage.clear()
    fit(digits, tmp_path / "run")
    assert stored(store)[0] == 40
    assert (
        fetched(store, tmp_path).tensors.keys()
        == read(path_of(whole / "checkpoints", 40)).tensors.keys()
    )


def test_run_without_a_checkpoint_requires_the_store(digits, tmp_path, outage):
    """The mirror may contain its checkpoints, which it would otherwise train again and replace."""
    outage.set()
    with pytest.raises(
        ctde.InputError,
        match=f"^mirror must be reachable while {tmp_path / 'run'} has no checkpoint, because it "
        f"may contain a checkpoint of this run, but {ADDRESS} failed with OSError",
    ):
        fit(digits, tmp_path / "run")
    assert not (tmp_path / "run").exists()


# Damage and other runs.


def damage_tensor(store, folder: str) -> None:
    content = bytearray(store.cat_file(f"{folder}/{TENSORS}"))
    content[-1] ^= 1
    store.pipe_file(f"{folder}/{TENSORS}", bytes(content))


DAMAGES = {
    "a bit of a tensor": (damage_tensor, "SHA-256 mismatch"),
    "no tensors": (lambda store, folder: store.rm_file(f"{folder}/{TENSORS}"), f"{TENSORS} is"),
    "no rows": (
        lambda store, folder: store.rm_file(f"{folder}/{METRICS}"),
        f"{METRICS} is missing",
    ),
    "half of the rows": (
        lambda store, folder: store.pipe_file(f"{folder}/{METRICS}", b"{}\n"),
        f"{METRICS} has 1 instead of",
    ),
    "a manifest that is cut off": (
        lambda store, folder: store.pipe_file(f"{folder}/{MANIFEST}", b"{"),
        MANIFEST,
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_checkpoint_of_the_mirror_is_named_and_the_previous_one_used(name, store, tmp_path):
    damage, sentence = DAMAGES[name]
    (tmp_path / "run").mkdir()
    for step in (4, 5):
        mirrored(store).upload(write_step(tmp_path / "run", step), None, 2)
    damage(store, f"{STORED}/step-00000005")
    lines: list[str] = []
    opened = mirrored(store)
    found = opened.fetch(tmp_path, None, lambda found: None, lines.append)
    assert found is not None
    assert found.path == path_of(tmp_path / "checkpoints", 4)
    assert lines[0].startswith(f"damaged    {ADDRESS}/checkpoints/step-00000005: ")
    assert sentence in lines[0]
    assert lines[1] == f"mirror     step-00000004 was fetched from {ADDRESS}"

    # The damaged checkpoint is replaced when the run reaches its step again.
    opened.upload(path_of(tmp_path / "run" / "checkpoints", 5), None, 2)
    (tmp_path / "again").mkdir()
    again = fetched(store, tmp_path / "again")
    assert again is not None
    assert again.facts["rows"] == 5


def test_mirror_without_an_intact_checkpoint_is_refused(store, tmp_path):
    (tmp_path / "run").mkdir()
    mirrored(store).upload(write_step(tmp_path / "run", 5), None, 2)
    damage_tensor(store, f"{STORED}/step-00000005")
    with pytest.raises(ctde.InputError, match=f"mirror has no intact checkpoint in {ADDRESS}"):
        fetched(store, tmp_path)


def test_mirror_of_another_run_is_refused_and_nothing_is_changed(digits, whole, tmp_path, store):
    """Also if the folder has a newer checkpoint of its own run."""
    found = read(path_of(whole / "checkpoints", 20))
    other = found.facts | {"options": found.facts["options"] | {"seed": 1}}
    (tmp_path / METRICS).write_bytes((whole / METRICS).read_bytes())
    path = path_of(tmp_path / "checkpoints", 20)
    checkpoint.write(path, found.tensors, other)
    mirrored(store).upload(path, None, 2)
    before = {path: store.cat_file(path) for path in store.find(STORED)}

    shutil.copytree(whole, tmp_path / "own")
    for folder in (tmp_path / "empty", tmp_path / "own"):
        with pytest.raises(
            ctde.InputError,
            match="^mirror contains a run with different options: seed 1 in the checkpoint and 0 "
            r"here\. Pass another address, or the options of that run\.$",
        ):
            fit(digits, folder)
    with pytest.raises(
        ctde.InputError, match="mirror must not have a checkpoint if the run starts"
    ):
        fit(digits, tmp_path / "empty", resume=False)
    assert not (tmp_path / "empty").exists()
    assert steps(tmp_path / "own" / "checkpoints") == steps(whole / "checkpoints")
    assert {path: store.cat_file(path) for path in store.find(STORED)} == before


@pytest.mark.parametrize(
    ("address", "sentence"),
    [
        ("bucket/run", "must be an address such as s3://bucket/run, got 'bucket/run'"),
        ("nowhere://bucket/run", "must be an address that fsspec can open, but nowhere://bucket"),
        ("file://{}/run/mirror", "must be outside of the run folder"),
        ("file://{}/link/mirror", "must be outside of the run folder"),
        ("file://{}/mirror", "must not contain the run folder .* in its folder .*/mirror/check"),
        ("file://{}/file", "must be a writable folder .*/file failed: Not a directory; choose"),
        ("file://{}/file/run", "must be a writable folder .*/file/run failed: Not a directory"),
        ("zip://run::file://{}/run.zip", "must be a single address, .* pass an address without ::"),
    ],
)
def test_invalid_address_is_refused(address, sentence, digits, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "run")
    (tmp_path / "mirror").mkdir()
    (tmp_path / "mirror" / "checkpoints").symlink_to(tmp_path)
    with pytest.raises(ctde.InputError, match=f"^mirror {sentence}"):
        fit(digits, tmp_path / "run", address.format(tmp_path))
    assert not (tmp_path / "run").exists()
    with pytest.raises(ctde.InputError, match="mirror requires run_dir"):
        ctde.Saving(mirror=ADDRESS)


@pytest.mark.parametrize(
    ("address", "module", "command"),
    [
        ("s3://bucket/run", "s3fs", r"pip install 'ctde_jax\[s3\]'\.$"),
        ("gs://bucket/run", "fsspec.core", r"pip install 'ctde_jax\[gcs\]'\.$"),
        ("memory://run", "fsspec.core", "pip install fsspec and the package of this protocol"),
    ],
)
def test_missing_package_is_named_with_its_command(address, module, command, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3", raising=False)
    with pytest.raises(
        ctde.InputError, match=f"^mirror {address} requires other packages; run {command}"
    ):
        mirror.open_mirror(address, tmp_path)


def test_password_in_an_address_is_not_shown(tmp_path):
    opened = mirror.open_mirror("memory://user:secret@host/run", tmp_path)
    assert opened.address == "memory://host/run"


# A real S3 API on loopback, and real processes.


class Proxy:
    """Forwards connections to a server until it is stopped, which cuts off those in progress."""

    def __init__(self, target: int):
        self._target = target
        self._listener: socket.socket | None = None
        self._open: list[socket.socket] = []
        self.port = free_port()
        self.start()

    def start(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", self.port))
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def stop(self) -> int:
        """Returns the number of connections that were cut off."""
        assert self._listener is not None
        cut = sum(each.fileno() >= 0 for each in self._open)
        for each in (self._listener, *self._open):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()
        self._open.clear()
        return cut // 2

    def _accept(self, listener: socket.socket) -> None:
        with suppress(OSError):
            while True:
                client, _ = listener.accept()
                server = socket.create_connection(("127.0.0.1", self._target))
                self._open += [client, server]
                for pair in ((client, server), (server, client)):
                    threading.Thread(target=self._forward, args=pair, daemon=True).start()

    def _forward(self, source: socket.socket, target: socket.socket) -> None:
        # Slow enough that `stop` comes in the middle of an upload.
        with suppress(OSError), closing(source), closing(target):
            while block := source.recv(2**14):
                time.sleep(0.002)
                target.sendall(block)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


@pytest.fixture
def s3(monkeypatch):
    """Starts an S3 server with an empty bucket, and yields a proxy in front of it."""
    pytest.importorskip("moto", reason="needs moto[server]")
    pytest.importorskip("s3fs", reason="needs s3fs")
    port = free_port()
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    proxy = None
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                break
            except OSError:
                assert time.monotonic() < deadline
                time.sleep(0.1)
        proxy = Proxy(port)
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
        yield proxy, Bucket(port)
    finally:
        if proxy is not None:
            proxy.stop()
        server.terminate()
        server.wait()


class Bucket:
    """The bucket as seen by a client without the proxy."""

    def __init__(self, port: int):
        import boto3

        self._client = boto3.client("s3", endpoint_url=f"http://127.0.0.1:{port}")
        self._client.create_bucket(Bucket="bucket")

    def steps(self) -> list[int]:
        listed = self._client.list_objects_v2(Bucket="bucket").get("Contents", [])
        keys = [each["Key"] for each in listed]
        return sorted(int(key.split("step-")[1][:8]) for key in keys if key.endswith(MANIFEST))


TRAIN = [
    *(sys.executable, "-m", "ctde_jax.train", "--devices", "1", "--hidden-sizes", "256"),
    *("--steps", "900", "--eval-every", "300", "--log-every", "10", "--save-every", "20"),
]


def train(folder: Path, *more: str, **options) -> subprocess.Popen:
    return subprocess.Popen(
        [*TRAIN, "--run-dir", str(folder), *more],
        env={**os.environ, "JAX_PLATFORMS": "cpu", "NO_COLOR": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **options,
    )


def end(process: subprocess.Popen) -> str:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


@pytest.mark.slow
def test_killed_processes_without_folders_end_with_the_same_bits(s3, tmp_path):
    _, there = s3
    end(train(tmp_path / "whole"))
    draw = random.Random(0)
    fetches = []
    for number in range(5):
        folder = tmp_path / f"killed-{number}"
        before = there.steps()
        process = train(folder, "--mirror", "s3://bucket/run")
        if number < 4:
            while process.poll() is None and there.steps() == before:
                time.sleep(0.02)
            with suppress(subprocess.TimeoutExpired):
                process.wait(draw.uniform(0, 0.5))
            process.send_signal(signal.SIGKILL)
        output, _ = process.communicate()
        fetches.append("was fetched from" in output)
        if number < 4:
            shutil.rmtree(folder)
    assert process.returncode == 0, output
    assert fetches[1:] == [True] * 4
    assert tensors(folder) == tensors(tmp_path / "whole")
    assert rows(folder) == rows(tmp_path / "whole")
    assert (folder / "config.json").exists()
    assert there.steps()[-1] == 900


@pytest.mark.slow
def test_uploads_that_break_off_delay_and_lose_nothing(s3, tmp_path):
    """The proxy is stopped in the middle of uploads, and started again."""
    proxy, there = s3
    end(train(tmp_path / "whole"))
    process = train(tmp_path / "run", "--mirror", "s3://bucket/run")
    draw = random.Random(0)
    broken = 0
    while process.poll() is None and not there.steps():
        time.sleep(0.02)
    while process.poll() is None and checkpoint.steps(tmp_path / "run" / "checkpoints")[0] < 900:
        time.sleep(draw.uniform(0, 0.3))
        broken += proxy.stop()
        time.sleep(draw.uniform(0, 0.3))
        proxy.start()
    end(process)
    assert broken > 0
    assert there.steps()[-1] == 900
    for folder in (tmp_path / "run", tmp_path / "fetched"):
        end(train(folder, "--mirror", "s3://bucket/run"))
        assert tensors(folder) == tensors(tmp_path / "whole")
        assert rows(folder) == rows(tmp_path / "whole")


@pytest.mark.slow
def test_unreachable_store_and_missing_bucket_are_one_sentence(s3, tmp_path):
    proxy, _ = s3
    for address, sentence in [
        (
            "s3://missing/run",
            "s3://missing/run failed with FileNotFoundError: The specified bucket",
        ),
        (
            "s3://bucket/run",
            "s3://bucket/run failed with EndpointConnectionError: Could not connect",
        ),
    ]:
        if address == "s3://bucket/run":
            proxy.stop()
        process = train(tmp_path / "run", "--mirror", address)
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 2
        last = output.splitlines()[-1]
        assert last.startswith("error: --mirror must be reachable while")
        assert sentence in last
        assert "Traceback" not in output
        assert not (tmp_path / "run").exists()
