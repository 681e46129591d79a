"""IDX files become a data set; damaged files are refused."""

import gzip
import hashlib
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ctde_jax.data import DiskArray
from ctde_jax.data.published import idx
from ctde_jax.data.published.idx import FASHION_MNIST, MNIST, fashion_mnist, mnist, read_idx
from ctde_jax.errors import InputError

REAL = Path(__file__).parents[4] / "shared" / "data" / "mnist"
LOADERS = {"mnist": mnist, "fashion_mnist": fashion_mnist}


def packed_idx(array: np.ndarray) -> bytes:
    """Writes an array in the IDX format."""
    header = bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape)
    return header + array.astype(np.uint8).tobytes()


def tiny(train: int = 3, test: int = 2) -> dict[str, np.ndarray]:
    """Returns four arrays under the names of the published files."""
    rng = np.random.default_rng(0)
    return {
        "train-images-idx3-ubyte": rng.integers(0, 256, (train, 28, 28)),
        "train-labels-idx1-ubyte": np.arange(train) % 10,
        "t10k-images-idx3-ubyte": rng.integers(0, 256, (test, 28, 28)),
        "t10k-labels-idx1-ubyte": 9 - np.arange(test) % 10,
    }


def write(
    folder: Path, arrays: dict[str, np.ndarray], spelling: Callable[[str], str] = str
) -> None:
    """Puts arrays into a folder as IDX files."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in arrays.items():
        content = packed_idx(array)
        path = folder / spelling(name)
        path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[str], Path, str]]:
    """Replaces the downloads by tiny files; returns the list of requests."""
    requests = []

    def fetch(urls: list[str], target: Path, sha256: str) -> Path:
        requests.append((urls, target, sha256))
        write(target.parent, {target.stem: tiny()[target.stem]}, "{}.gz".format)
        return target

    monkeypatch.setattr(idx, "fetch", fetch)
    return requests


@pytest.mark.parametrize("name", ["file", "file.gz"])
@pytest.mark.parametrize("shape", [(5,), (2, 3, 4), (0, 28, 28)])
def test_reading_inverts_writing(tmp_path: Path, name: str, shape: tuple[int, ...]):
    """An array written in the format is read back equal, compressed or not."""
    array = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    write(tmp_path, {name: array})

    read = read_idx(tmp_path / name, len(shape))

    assert read.dtype == np.uint8
    np.testing.assert_array_equal(read, array)


GOOD = packed_idx(np.arange(6).reshape(1, 2, 3))


@pytest.mark.parametrize(
    ("name", "stored", "fault"),
    [
        ("f", b"", "is empty"),
        ("f.gz", b"", "is empty"),
        ("f", b"\x89PNG" + GOOD, "starts with 89 50 4e 47 instead of the magic number 00 00 08 03"),
        (
            "f",
            b"\0\0\x0d\3" + GOOD[4:],
            "starts with 00 00 0d 03 instead of the magic number 00 00 08 03",
        ),
        ("f", packed_idx(np.arange(3)), "has 1 dimensions instead of 3"),
        ("f", GOOD[:3], "is truncated in its header of 16 bytes"),
        ("f", GOOD[:15], "is truncated in its header of 16 bytes"),
        ("f", GOOD[:-1], "is truncated: its shape (1, 2, 3) takes 6 bytes, but it has 5"),
        (
            "f",
            GOOD + b"\0\0",
            "has trailing bytes: its shape (1, 2, 3) takes 6 bytes, but it has at least 8",
        ),
        ("f.gz", gzip.compress(GOOD, mtime=0)[:-4], "is a truncated gzip file"),
        ("f.gz", GOOD, "is a corrupt gzip file"),
        ("f.gz", gzip.compress(GOOD, mtime=0) + b"more", "is a corrupt gzip file"),
    ],
)
def test_damaged_file_is_refused(tmp_path: Path, name: str, stored: bytes, fault: str):
    """The error names the file, its fault, and the solution."""
    path = tmp_path / name
    path.write_bytes(stored)

    with pytest.raises(InputError) as caught:
        read_idx(path, 3)

    assert str(caught.value).startswith(f"data_dir contains {path}, which {fault}")
    assert "replace it, or remove it" in str(caught.value)
    assert caught.value.option == "data_dir"


@pytest.mark.parametrize(
    "spelling",
    [
        pytest.param(str, id="plain"),
        pytest.param("{}.gz".format, id="gz"),
        pytest.param(lambda name: name.replace("-idx", ".idx"), id="dotted"),
        pytest.param(lambda name: f"{name.replace('-idx', '.idx')}.gz", id="dotted gz"),
    ],
)
@pytest.mark.parametrize("name", LOADERS)
def test_local_files_are_used_unchanged(tmp_path: Path, name: str, spelling: Callable[[str], str]):
    """Every usual spelling of the names is found, and nothing is downloaded."""
    arrays = tiny()
    write(tmp_path, arrays, spelling)

    dataset = LOADERS[name](tmp_path)

    loaded = (*dataset.train, *dataset.test)
    for array, stored in zip(loaded, arrays.values(), strict=True):
        np.testing.assert_array_equal(array, stored)
    assert [array.dtype for array in loaded] == [np.uint8, np.int32, np.uint8, np.int32]
    assert dataset.name == name
    assert (dataset.shift, dataset.scale) == (0, np.float32(1 / 255))


def test_files_other_than_the_published_ones_are_noted(tmp_path: Path):
    """Training on a subset is possible, but noted."""
    write(tmp_path, tiny())
    (note,) = mnist(str(tmp_path)).notes
    assert (
        note
        == f"{', '.join(MNIST.sha256)} in {tmp_path} differ from the published mnist (by checksum)."
    )


def test_classes_are_digits_or_garments():
    """They are in the order of the labels."""
    assert MNIST.classes == tuple("0123456789")
    assert len(FASHION_MNIST.classes) == 10
    assert (FASHION_MNIST.classes[0], FASHION_MNIST.classes[9]) == ("T-shirt/top", "Ankle boot")


@pytest.mark.parametrize("source", [MNIST, FASHION_MNIST], ids=lambda source: source.name)
def test_checksums_of_the_files_differ(source: idx.Published):
    """The four files are in the order of the data set."""
    assert list(source.sha256) == list(tiny())
    assert len({*source.sha256.values()}) == 4
    assert all(len(bytes.fromhex(sha256)) == 32 for sha256 in source.sha256.values())


@pytest.mark.parametrize("source", [MNIST, FASHION_MNIST], ids=lambda source: source.name)
def test_absent_file_is_downloaded_into_the_given_folder(
    tmp_path: Path, published, source: idx.Published
):
    """Existing files are kept, and only the missing one is requested."""
    arrays = tiny()
    absent = "t10k-labels-idx1-ubyte"
    write(tmp_path, {name: array for name, array in arrays.items() if name != absent})

    dataset = LOADERS[source.name](tmp_path)

    np.testing.assert_array_equal(dataset.test.labels, arrays[absent])
    urls = [f"{mirror}{absent}.gz" for mirror in source.mirrors]
    assert published == [(urls, tmp_path / f"{absent}.gz", source.sha256[absent])]


@pytest.mark.parametrize("name", LOADERS)
def test_files_are_kept_in_the_cache_folder_by_default(
    tmp_path: Path, published, monkeypatch: pytest.MonkeyPatch, name: str
):
    """They are downloaded by the first call only."""
    monkeypatch.setattr("ctde_jax.data.published.registry.user_cache_path", tmp_path.joinpath)
    LOADERS[name]()
    LOADERS[name]()

    assert [target for _, target, _ in published] == [
        tmp_path / "ctde_jax" / name / f"{f}.gz" for f in tiny()
    ]


def test_downloaded_file_is_the_published_one(
    tmp_path: Path, published, monkeypatch: pytest.MonkeyPatch
):
    """Its checksum is right, so there is no note."""
    sha256 = {name: hashlib.sha256(packed_idx(array)).hexdigest() for name, array in tiny().items()}
    monkeypatch.setattr(idx, "MNIST", idx.Published("mnist", MNIST.classes, MNIST.mirrors, sha256))
    assert mnist(tmp_path).notes == ()


def test_missing_folder_is_refused(tmp_path: Path):
    """A misspelled folder is not created."""
    with pytest.raises(InputError) as caught:
        mnist(tmp_path / "nowhere")

    assert str(caught.value).startswith(
        f"data_dir must be an existing folder, got {tmp_path / 'nowhere'}"
    )
    assert "create it to download mnist into it, or omit this option" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "array", "fault"),
    [
        (
            "train-labels-idx1-ubyte",
            np.array([0, 10, 2]),
            "y_train must be from 0 to 9, one for each of the 10 classes, got 10 for example 1.",
        ),
        (
            "t10k-labels-idx1-ubyte",
            np.arange(5),
            "y_test must have one label for each of the 2 examples, got 5 labels.",
        ),
        (
            "train-images-idx3-ubyte",
            np.zeros((0, 28, 28)),
            "x_train must contain at least one example",
        ),
        (
            "t10k-images-idx3-ubyte",
            np.zeros((2, 32, 32)),
            (
                "t10k-images-idx3-ubyte, which contains images of the size (32, 32) instead of "
                "(28, 28)"
            ),
        ),
    ],
)
def test_error_of_inconsistent_files_names_the_folder(
    tmp_path: Path, name: str, array: np.ndarray, fault: str
):
    """The user passed data_dir, so the error is about data_dir."""
    write(tmp_path, {**tiny(), name: array})

    with pytest.raises(InputError) as caught:
        mnist(tmp_path)

    assert str(caught.value).startswith(
        (f"data_dir contains {tmp_path}", f"data_dir {tmp_path} does not contain a valid mnist")
    )
    assert fault in str(caught.value)
    assert "download th" in str(caught.value)


@pytest.mark.skipif(not REAL.is_dir(), reason="the real MNIST is not in ../shared/data/mnist")
def test_real_mnist_is_the_published_one():
    """Checksums, sizes and label counts are the published ones."""
    dataset = mnist(REAL)

    assert dataset.train.inputs.shape == (60_000, 28, 28)
    assert dataset.test.inputs.shape == (10_000, 28, 28)
    assert np.bincount(dataset.test.labels).tolist() == [
        980,
        1135,
        1032,
        1010,
        982,
        892,
        958,
        1028,
        974,
        1009,
    ]
    assert dataset.notes == ()


def test_large_file_is_read_during_training(tmp_path, monkeypatch):
    """The data set is the same; a compressed file is loaded."""
    write(tmp_path, tiny(40, 30))
    write(tmp_path / "packed", tiny(40, 30), "{}.gz".format)
    loaded = mnist(tmp_path)
    monkeypatch.setattr(idx, "STREAMED_FROM", 25_000)
    large = mnist(tmp_path)
    assert isinstance(large.train.inputs, DiskArray)
    assert not isinstance(large.test.inputs, DiskArray)
    assert "stays on disk, and is read from there during training" in large.notes[0]
    np.testing.assert_array_equal(large.train.inputs[:], loaded.train.inputs)
    np.testing.assert_array_equal(large.train.labels, loaded.train.labels)
    assert isinstance(mnist(tmp_path / "packed").train.inputs, np.ndarray)

    with (tmp_path / "train-images-idx3-ubyte").open("ab") as file:
        file.write(b"more")
    with pytest.raises(InputError, match="has trailing bytes"):
        mnist(tmp_path)
