"""A folder is claimed by one trainer at a time, and a refused start leaves it unchanged."""

import errno
import os
from pathlib import Path

import optax
import pytest

import ctde_jax as ctde
from ctde_jax.checkpoint import run_folder
from ctde_jax.errors import InputError


def contents(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


def refuse_in(folder: Path, *written: str) -> None:
    """Claims a folder twice, as the command and `fit` do, writes files, and refuses."""
    with run_folder.claimed(folder), run_folder.claimed(folder):
        for name in written:
            (folder / name).write_text("")
        raise InputError("anything", "is refused.")


@pytest.mark.parametrize("written", [(), ("config.json", "partition.png", "metrics.jsonl")])
@pytest.mark.parametrize(
    "existing", [(), ("run",), ("run", "run/config.json"), ("run", "run/notes.txt")]
)
def test_refusal_removes_only_what_it_created(tmp_path, existing, written):
    for name in existing:
        (tmp_path / name).mkdir() if name == "run" else (tmp_path / name).write_text("mine")
    before = contents(tmp_path)
    with pytest.raises(InputError, match="anything is refused"):
        refuse_in(tmp_path / "run", *written)
    assert contents(tmp_path) == before


def test_refusal_removes_the_parents_that_it_created(tmp_path):
    with pytest.raises(InputError, match="anything is refused"):
        refuse_in(tmp_path / "a" / "b" / "c")
    with pytest.raises(InputError, match="File name too long"):
        refuse_in(tmp_path / "a" / "b" / ("c" * 300) / "d")
    assert not contents(tmp_path)


def test_files_of_others_are_kept(tmp_path):
    with pytest.raises(InputError, match="anything is refused"):
        refuse_in(tmp_path / "a" / "run", "notes.txt")
    assert contents(tmp_path) == {
        tmp_path / "a",
        tmp_path / "a" / "run",
        tmp_path / "a" / "run" / "notes.txt",
    }


def test_started_run_is_kept(tmp_path):
    def fail() -> None:
        with run_folder.claimed(tmp_path / "run"):
            (tmp_path / "run" / "metrics.jsonl").write_text("{}\n")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert (tmp_path / "run" / "metrics.jsonl").exists()


def test_read_only_disk_is_reported_in_one_sentence(tmp_path, monkeypatch):
    def refuse(*arguments, **options):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "mkdir", refuse)
    with pytest.raises(
        InputError,
        match=r"run_dir must be a writable folder .*: Read-only file system",
    ):
        refuse_in(tmp_path / "run")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"branch_from": "nowhere"}, "branch_from must be the folder of an intact checkpoint"),
        ({"run_dir": ""}, "run_dir must be the path of a folder, got an empty string"),
        (
            {"resume": False, "branch_from": ""},
            "branch_from must be the path of a folder, got an empty string",
        ),
    ],
)
def test_refused_fit_leaves_nothing_behind(digits, tmp_path, monkeypatch, arguments, sentence):
    monkeypatch.chdir(tmp_path)
    fit = {"run_dir": "runs/mine", "batch_size": 64, "steps": 1, "show": False, **arguments}
    with pytest.raises(InputError, match=sentence):
        ctde.fit(
            ctde.models.mlp([64, 10]), digits, optax.sgd(0.1), devices=ctde.devices.start(1), **fit
        )
    assert not contents(tmp_path)


def test_home_is_expanded(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert run_folder.named("run_dir", "~/run") == tmp_path / "run"
