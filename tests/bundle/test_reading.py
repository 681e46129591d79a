"""A file that is not regular is refused by every option, without waiting or using memory."""

import os
import stat
from pathlib import Path

import numpy as np
import pytest

import ctde_jax as ctde
from ctde_jax import checkpoint, config
from ctde_jax.bundle import reading
from ctde_jax.errors import InputError
from ctde_jax.trainer import history

KINDS = {
    "pipe": "a pipe",
    "folder": "a folder",
    "socket": "a socket",
    "device": "a device",
    "link": "No such file",
}


def make(kind: str, path: Path) -> Path:
    match kind:
        case "pipe":
            os.mkfifo(path)
        case "folder":
            path.mkdir()
        case "socket":
            os.mknod(path, stat.S_IFSOCK | 0o600)
        case "device":
            path.symlink_to("/dev/zero")
        case "link":
            path.symlink_to("nowhere")
    return path


READERS = {
    "csv": ctde.data.from_table,
    "text": ctde.data.from_text,
    "configuration": lambda path: config.parse(["--config", str(path)]),
    "pictures": lambda path: ctde.data.mnist(
        path.rename(path.with_name("train-images-idx3-ubyte")).parent
    ),
    "records": lambda path: ctde.data.cifar10(
        path.rename(path.with_name("data_batch_1.bin")).parent
    ),
    "metrics": lambda path: history.read_rows(
        path.rename(path.with_name("metrics.jsonl")).parent, 1
    ),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("kind", KINDS)
def test_only_regular_files_are_read(tmp_path, kind, reader):
    (tmp_path / "in").mkdir()
    with pytest.raises(InputError, match=KINDS[kind]) as caught:
        READERS[reader](make(kind, tmp_path / "in" / "file"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["pipe", "socket", "device", "link"])
def test_only_regular_archives_are_read(tmp_path, kind):
    """A folder of .npy files is read instead of an archive."""
    with pytest.raises(InputError, match=f"cannot be opened .*{KINDS[kind]}"):
        ctde.data.from_npz(make(kind, tmp_path / "file"))


@pytest.mark.parametrize("name", [checkpoint.TENSORS, checkpoint.MANIFEST, "SHA256SUMS"])
def test_only_regular_files_of_a_checkpoint_are_read(tmp_path, name):
    path = checkpoint.path_of(tmp_path, 1)
    checkpoint.write(path, {"a": np.zeros(2)}, {})
    (path / name).unlink()
    make("pipe", path / name)
    with pytest.raises(InputError, match="that cannot be read: it is a pipe, not a regular file"):
        checkpoint.read(path)


@pytest.mark.parametrize("read", [ctde.data.from_table, ctde.data.from_text])
def test_read_error_within_a_file_is_reported_in_one_sentence(read):
    """Reading the first page of a process's memory fails like a bad disk block."""
    with pytest.raises(InputError, match=r"/proc/self/mem cannot be read \(Input/output error\)"):
        read("/proc/self/mem")


def test_configuration_over_the_size_limit_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "_SMALL", 10)
    (tmp_path / "config.json").write_text("{}" + " " * 9)
    with pytest.raises(InputError, match="it has more than 10 bytes"):
        config.parse(["--config", str(tmp_path / "config.json")])
