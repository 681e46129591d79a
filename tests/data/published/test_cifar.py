"""CIFAR-10 files become color images, from a folder or an archive; damaged files are refused."""

import gzip
import hashlib
import io
import tarfile
import threading
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from ctde_jax.data import cifar10
from ctde_jax.data.published import cifar
from ctde_jax.data.published.cifar import ARCHIVE, CIFAR10, RECORD, UNPACKED
from ctde_jax.errors import InputError

TRAIN = [f"data_batch_{i}.bin" for i in range(1, 6)]
RNG = np.random.default_rng(0)
IMAGES = {
    name: RNG.integers(0, 256, (2, 32, 32, 3), np.uint8) for name in [*TRAIN, "test_batch.bin"]
}
LABELS = {name: RNG.integers(0, 10, 2, np.uint8) for name in IMAGES}


def packed_records(name: str) -> bytes:
    """Encodes images in the published format: the label, then red, green and blue."""
    pairs = zip(LABELS[name], IMAGES[name], strict=True)
    return b"".join(
        bytes([label]) + b"".join(image[..., c].tobytes() for c in range(3))
        for label, image in pairs
    )


FILES = {name: packed_records(name) for name in IMAGES}


def write(folder: Path, files: Mapping[str, bytes]) -> None:
    """Puts files into a folder."""
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)


def packed(files: Mapping[str, bytes]) -> bytes:
    """Makes an archive like the published one, with one file that is not needed."""
    stored = io.BytesIO()
    with tarfile.open(fileobj=stored, mode="w:gz") as archive:
        folder = tarfile.TarInfo(UNPACKED)
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        for name, content in {"readme.html": b"<html>", **files}.items():
            member = tarfile.TarInfo(f"{UNPACKED}/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return stored.getvalue()


class Quiet(SimpleHTTPRequestHandler):
    """Serves a folder without logging."""

    def log_message(self, format, *args):
        """Logs nothing."""


@pytest.fixture
def mirror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Serves a tiny archive as the published one; returns the list of requests."""
    archive, requests = packed(FILES), []
    write(tmp_path / "mirror", {ARCHIVE: archive})

    class Recording(Quiet):
        def do_GET(self):
            requests.append(self.path)
            super().do_GET()

    server = ThreadingHTTPServer(
        ("127.0.0.1", 0), partial(Recording, directory=str(tmp_path / "mirror"))
    )
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    sha256 = {name: hashlib.sha256(content).hexdigest() for name, content in FILES.items()}
    tiny = replace(CIFAR10, mirrors=(f"http://127.0.0.1:{server.server_port}/",), sha256=sha256)
    monkeypatch.setattr(cifar, "CIFAR10", tiny)
    monkeypatch.setattr(cifar, "ARCHIVE_SHA256", hashlib.sha256(archive).hexdigest())
    yield requests
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Returns an empty folder."""
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


def error_message(folder: Path) -> str:
    """Returns the message of the error that loading raises."""
    with pytest.raises(InputError) as caught:
        cifar10(folder)
    assert caught.value.option == "data_dir"
    return str(caught.value)


@pytest.mark.parametrize("subfolder", [".", UNPACKED])
def test_local_files_are_used_unchanged(folder: Path, mirror: list[str], subfolder: str):
    """Nothing is downloaded if the files are in the folder, or in the folder of the archive."""
    write(folder / subfolder, FILES)

    dataset = cifar10(str(folder))

    np.testing.assert_array_equal(
        dataset.train.inputs, np.concatenate([IMAGES[name] for name in TRAIN])
    )
    np.testing.assert_array_equal(
        dataset.train.labels, np.concatenate([LABELS[name] for name in TRAIN])
    )
    np.testing.assert_array_equal(dataset.test.inputs, IMAGES["test_batch.bin"])
    np.testing.assert_array_equal(dataset.test.labels, LABELS["test_batch.bin"])
    assert [array.dtype for array in (*dataset.train, *dataset.test)] == [
        np.uint8,
        np.int32,
        np.uint8,
        np.int32,
    ]
    assert dataset.train.inputs.flags.c_contiguous
    assert (dataset.name, dataset.shift, dataset.scale, dataset.notes) == (
        "cifar10",
        0,
        np.float32(1 / 255),
        (),
    )
    assert mirror == []


def test_files_other_than_the_published_ones_are_noted(folder: Path):
    """Training on a subset is possible, but noted."""
    write(folder, FILES)
    (note,) = cifar10(folder).notes
    assert (
        note == f"{', '.join(FILES)} in {folder} differ from the published cifar10 (by checksum)."
    )


def test_absent_archive_is_downloaded_once(folder: Path, mirror: list[str]):
    """The archive is kept as downloaded and not unpacked, and contains the data."""
    first, second = cifar10(folder), cifar10(folder)

    assert mirror == [f"/{ARCHIVE}"]
    assert [path.name for path in folder.iterdir()] == [ARCHIVE]
    write(folder, FILES)
    local = cifar10(folder)
    for dataset in (first, second):
        assert dataset.notes == ()
        for array, same in zip(
            (*dataset.train, *dataset.test), (*local.train, *local.test), strict=True
        ):
            np.testing.assert_array_equal(array, same)


def test_only_missing_files_are_read_from_the_archive(folder: Path, mirror: list[str]):
    """The user's file is not replaced by the published one."""
    write(folder, {"test_batch.bin": FILES["data_batch_1.bin"]})
    dataset = cifar10(folder)
    np.testing.assert_array_equal(dataset.test.inputs, IMAGES["data_batch_1.bin"])
    assert dataset.notes == (
        f"test_batch.bin in {folder} differ from the published cifar10 (by checksum).",
    )
    assert mirror == [f"/{ARCHIVE}"]


def test_archive_with_a_wrong_checksum_is_refused(
    folder: Path, mirror: list[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(cifar, "ARCHIVE_SHA256", CIFAR10.sha256["test_batch.bin"])
    assert "sent a different file (the checksum differs)" in error_message(folder)
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"", "has 0 bytes{} instead of one or more records of 3,073"),
        (bytes(RECORD - 1), "has 3,072 bytes{} instead of one or more records of 3,073"),
        (bytes(2 * RECORD + 1), "has 6,147 bytes{} instead of one or more records of 3,073"),
        (
            bytes(RECORD) + b"\x0a" + bytes(RECORD - 1),
            "has the label 10{} in record 1, but labels are from 0 to 9",
        ),
    ],
)
def test_damaged_records_are_refused(folder: Path, content: bytes, fault: str):
    """The error names the file on the disk and, within an archive, the member."""
    broken = {**FILES, "data_batch_3.bin": content}
    way_out = "; replace it, or remove it to download the published file."

    write(folder, {ARCHIVE: packed(broken)})
    assert error_message(folder) == (
        f"data_dir contains {folder / ARCHIVE}, which "
        f"{fault.format(' in data_batch_3.bin')}{way_out}"
    )
    write(folder, broken)
    assert (
        error_message(folder)
        == f"data_dir contains {folder / 'data_batch_3.bin'}, which {fault.format('')}{way_out}"
    )


@pytest.mark.parametrize(
    ("archive", "fault"),
    [
        pytest.param(packed(FILES)[:-5000], "is not a complete .tar.gz archive (", id="truncated"),
        pytest.param(
            gzip.compress(b"no archive"), "is not a complete .tar.gz archive (", id="no tar"
        ),
        pytest.param(b"no gzip", "is not a complete .tar.gz archive (", id="no gzip"),
        pytest.param(b"", "is not a complete .tar.gz archive (", id="empty"),
        pytest.param(
            packed({name: FILES[name] for name in TRAIN[:4]}),
            "lacks data_batch_5.bin, test_batch.bin;",
            id="incomplete",
        ),
    ],
)
def test_damaged_archive_is_refused(folder: Path, archive: bytes, fault: str):
    write(folder, {ARCHIVE: archive})
    assert error_message(folder).startswith(f"data_dir contains {folder / ARCHIVE}, which {fault}")


def test_missing_folder_is_refused(tmp_path: Path):
    assert error_message(tmp_path / "nowhere").startswith(
        f"data_dir must be an existing folder, got {tmp_path / 'nowhere'}"
    )


def test_checksums_of_the_published_files_differ():
    """The files are in the order of the data set."""
    checksums = [*CIFAR10.sha256.values(), cifar.ARCHIVE_SHA256]
    assert list(CIFAR10.sha256) == list(FILES)
    assert {len(bytes.fromhex(sha256)) for sha256 in checksums} == {32}
    assert len(set(checksums)) == 7
    assert len(CIFAR10.classes) == 10
