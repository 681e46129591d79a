"""A malformed file is refused in one sentence: no other exception, excess memory or execution.

A mutation may be harmless; then the result must be well formed. Hypothesis mutates whole files;
malicious files are written by hand.
"""

import gzip
import io
import json
import os
import pickle
import struct
import subprocess
import sys
import tarfile
import tracemalloc
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ctde_jax import checkpoint, config, data, train
from ctde_jax.checkpoint.format import MANIFEST, SUMS, TENSORS, Checkpoint, Damaged, _sums
from ctde_jax.config.options import Config
from ctde_jax.data import Dataset, from_npz, from_table
from ctde_jax.data.published.cifar import ARCHIVE, RECORD, _members, cifar10
from ctde_jax.data.published.idx import mnist
from ctde_jax.data.text import from_text
from ctde_jax.errors import InputError
from ctde_jax.trainer.log import open_log

MUTATIONS = settings(
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
MEMORY = 2**24
"""Bytes of memory for reading a file of some kilobytes; a malformed file may claim more."""

GIGABYTES = 2**32 - 2**16

X = np.arange(24.0, dtype=np.float32).reshape(6, 4)
Y = np.array([0, 1, 2, 0, 1, 2])


class Payload:
    """Creates the file `mark` when it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def idx_bytes(array: np.ndarray, *lengths: int) -> bytes:
    """Returns an array in the IDX format, with other lengths in the header if any are given."""
    header = bytes((0, 0, 8, array.ndim)) + struct.pack(
        f">{array.ndim}I", *(lengths or array.shape)
    )
    return header + array.astype(np.uint8).tobytes()


def npy_bytes(array: np.ndarray, **save) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, **save)
    return buffer.getvalue()


def npy_of(header: str | bytes, content: bytes = b"", version: tuple[int, int] = (1, 0)) -> bytes:
    """Returns an .npy file with an arbitrary header."""
    text = header.encode() if isinstance(header, str) else header
    length = struct.pack("<H" if version == (1, 0) else "<I", len(text))
    return b"\x93NUMPY" + bytes(version) + length + text + content


def header_of(shape: object, descr: object = "<f4", fortran_order: object = False) -> str:
    return f"{{'descr': {descr!r}, 'fortran_order': {fortran_order!r}, 'shape': {shape!r}, }}\n"


def npz_bytes(
    x_train: bytes,
    y_train: bytes | None = None,
    method: int = zipfile.ZIP_DEFLATED,
    **others: bytes,
):
    buffer = io.BytesIO()
    members = {
        "x_train": x_train,
        "y_train": npy_bytes(Y) if y_train is None else y_train,
        **others,
    }
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)
    return buffer.getvalue()


def safetensors_bytes(header: object, content: bytes = b"") -> bytes:
    """Returns a .safetensors file with an arbitrary header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + content


def read_checkpoint(folder: Path) -> Checkpoint:
    """Reads a checkpoint with updated checksums, so that only the readers can detect the damage."""
    (folder / SUMS).write_text(_sums(folder), encoding="utf-8")
    return checkpoint.read(folder)


@dataclass(frozen=True)
class Kind:
    """A kind of file: a function that writes a valid one, the file to mutate, and a reader."""

    make: Callable[[Path], Path]
    read: Callable[[Path], object]
    traces: bool = True  # whether memory is traced; parsing options would take seconds


def make_idx(folder: Path, mutated: str, packed: bool = False) -> Path:
    rng = np.random.default_rng(0)
    for part, examples in (("train", 5), ("t10k", 2)):
        files = {
            f"{part}-images-idx3-ubyte": idx_bytes(rng.integers(0, 256, (examples, 28, 28))),
            f"{part}-labels-idx1-ubyte": idx_bytes(np.arange(examples)),
        }
        for name, content in files.items():
            path = folder / (f"{name}.gz" if packed else name)
            path.write_bytes(gzip.compress(content, mtime=0) if packed else content)
    return folder / mutated


def make_npz(folder: Path, method: int) -> Path:
    path = folder / "mine.npz"
    path.write_bytes(
        npz_bytes(npy_bytes(X), x_test=npy_bytes(X), y_test=npy_bytes(Y), method=method)
    )
    return path


def make_npy(folder: Path, mutated: str) -> Path:
    for name, array in {"x_train": X, "y_train": Y}.items():
        np.save(folder / f"{name}.npy", array)
    return folder / mutated


def make_csv(folder: Path) -> Path:
    path = folder / "mine.csv"
    path.write_text(
        'length,width,"the\nkind"\n'
        '1,2.5,setosa\n2,3.5,"virginica"\n3,-1.5e3,setosa\n4,0.5,virginica\n'
    )
    return path


def make_text(folder: Path) -> Path:
    path = folder / "mine.txt"
    path.write_text(
        "Wer reitet so spät durch Nacht und Wind? — Es ist der Vater mit seinem Kind; 𝄞\n" * 3
    )
    return path


def make_config(folder: Path) -> Path:
    config.save(config.parse(["--steps", "7", "--hidden-sizes", "8", "9"]), folder / "config.json")
    return folder / "config.json"


def make_checkpoint(folder: Path, mutated: str) -> Path:
    checkpoint.write(
        folder / "step",
        {"kernel": X, "bias": Y.astype(np.int32)},
        {"rows": 3, "options": {"seed": 0}},
    )
    return folder / "step" / mutated


def parse_config(path: Path) -> Config:
    return config.parse(["--config", str(path)])


KINDS = {
    "idx images": Kind(
        lambda f: make_idx(f, "train-images-idx3-ubyte"), lambda path: mnist(path.parent)
    ),
    "idx labels": Kind(
        lambda f: make_idx(f, "train-labels-idx1-ubyte"), lambda path: mnist(path.parent)
    ),
    "idx gz": Kind(
        lambda f: make_idx(f, "train-images-idx3-ubyte.gz", True), lambda path: mnist(path.parent)
    ),
    "npz": Kind(lambda f: make_npz(f, zipfile.ZIP_STORED), from_npz),
    "npz compressed": Kind(lambda f: make_npz(f, zipfile.ZIP_DEFLATED), from_npz),
    "npy inputs": Kind(lambda f: make_npy(f, "x_train.npy"), lambda path: from_npz(path.parent)),
    "npy labels": Kind(lambda f: make_npy(f, "y_train.npy"), lambda path: from_npz(path.parent)),
    "csv": Kind(make_csv, from_table),
    "text": Kind(make_text, lambda path: from_text(path, length=8)),
    "config": Kind(make_config, parse_config, traces=False),
    "tensors": Kind(
        lambda f: make_checkpoint(f, TENSORS), lambda path: read_checkpoint(path.parent)
    ),
    "manifest": Kind(
        lambda f: make_checkpoint(f, MANIFEST), lambda path: read_checkpoint(path.parent)
    ),
    # This kind is never intact, and must be the last.
    "manifest of damaged tensors": Kind(
        lambda f: make_checkpoint(f, MANIFEST), lambda path: read_with_damaged_tensors(path.parent)
    ),
}


def read_with_damaged_tensors(folder: Path) -> Checkpoint:
    """Reads a checkpoint whose manifest matches its checksum and whose tensors do not."""
    (folder / SUMS).write_text(_sums(folder).replace("a", "b", 1), encoding="utf-8")
    return checkpoint.read(folder)


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    return KINDS[request.param]


def check_well_formed(found: object) -> None:
    """Asserts the invariants that the rest of the library assumes."""
    if isinstance(found, Dataset):
        for inputs, labels in (found.train, found.test):
            assert len(inputs) == len(labels) > 0
            assert inputs.dtype in (np.uint8, np.int32, np.float32)
            assert np.isfinite(inputs).all()
            assert labels.dtype in (np.int32, np.uint8)
            names = found.vocabulary or found.classes
            assert not names or 0 <= np.min(labels) <= np.max(labels) < len(names)
        assert np.isfinite(found.scale).all()
        assert np.isfinite(found.shift).all()
    elif isinstance(found, Checkpoint):
        assert all(isinstance(tensor, np.ndarray) for tensor in found.tensors.values())
    else:
        assert isinstance(found, Config)


def sentence_of(read: Callable[[Path], object], path: Path, traces: bool = True) -> str:
    """Reads a file; returns the error message, or an empty string if the file is valid."""
    if traces:
        tracemalloc.start()
    try:
        check_well_formed(read(path))
        return ""
    except (InputError, Damaged) as error:
        sentence = str(error)
        assert len(sentence.splitlines()) == 1
        assert sentence.isprintable()
        assert len(sentence) < 1500
        return sentence
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < MEMORY + 100 * path.stat().st_size


def mutations(content: bytes) -> st.SearchStrategy[bytes]:
    """Truncates a file, flips bytes, and inserts, removes, repeats and overwrites parts."""
    position = st.integers(0, len(content))
    part = st.tuples(position, position).map(sorted)
    extra = st.one_of(
        st.binary(max_size=20),
        st.sampled_from([b"\xff" * 8, b"\0" * 8, b"\n", b'"', b"[" * 3000, b"-" * 3000, b"1e999"]),
    )
    flips = st.lists(
        st.tuples(st.integers(0, len(content) - 1), st.integers(1, 255)), min_size=1, max_size=4
    )

    def flip(positions: list[tuple[int, int]]) -> bytes:
        flipped = bytearray(content)
        for index, bits in positions:
            flipped[index] ^= bits
        return bytes(flipped)

    return st.one_of(
        position.map(lambda index: content[:index]),
        flips.map(flip),
        st.tuples(position, extra).map(lambda m: content[: m[0]] + m[1] + content[m[0] :]),
        st.tuples(position, extra).map(
            lambda m: content[: m[0]] + m[1] + content[m[0] + len(m[1]) :]
        ),
        part.map(lambda ends: content[: ends[0]] + content[ends[1] :]),
        part.map(lambda ends: content[: ends[1]] + content[ends[0] :]),
    )


@pytest.mark.parametrize("kind", list(KINDS.values())[:-1], ids=list(KINDS)[:-1])
def test_valid_file_of_each_kind_is_read(kind: Kind, tmp_path: Path):
    assert sentence_of(kind.read, kind.make(tmp_path), kind.traces) == ""


def test_mutated_file_is_read_or_refused_in_one_sentence(kind: Kind, tmp_path: Path):
    path = kind.make(tmp_path)

    @settings(MUTATIONS, max_examples=100 if kind.traces else 30)
    @given(mutations(path.read_bytes()))
    def check(content: bytes) -> None:
        path.write_bytes(content)
        sentence_of(kind.read, path, kind.traces)

    check()


def gzipped(content: bytes) -> bytes:
    return gzip.compress(content, 1, mtime=0)


ZEROS = gzipped(bytes(2**24))
"""Concatenated gzip files are one file, so copies of this one unpack to any size."""

IMAGES = idx_bytes(np.zeros((5, 28, 28)))
BAD_IDX = {
    "empty": b"",
    "magic only": IMAGES[:4],
    "half a header": IMAGES[:9],
    "header only": IMAGES[:16],
    "a byte short": IMAGES[:-1],
    "a byte more": IMAGES + b"\0",
    "no magic": b"\x01" + IMAGES[1:],
    "floats": b"\0\0\x0d\x03" + IMAGES[4:],
    "no dimensions": b"\0\0\x08\0" + IMAGES[4:],
    "255 dimensions": b"\0\0\x08\xff" + IMAGES[4:],
    "labels": idx_bytes(np.zeros(5)),
    "no pictures": idx_bytes(np.zeros((0, 28, 28))),
    "pictures without pixels": idx_bytes(np.zeros((5, 0, 28))),
    "another number of pictures": idx_bytes(np.zeros((4, 28, 28))),
    "another size of pictures": idx_bytes(np.zeros((5, 14, 56))),
    "2**31 pictures": idx_bytes(np.zeros((5, 28, 28)), 2**31, 28, 28),
    "2**96 bytes": idx_bytes(np.zeros((5, 28, 28)), 2**32 - 1, 2**32 - 1, 2**32 - 1),
    "2**32 bytes, 0 modulo 2**32": idx_bytes(np.zeros((5, 28, 28)), 2**16, 2**16, 1),
}


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gz"])
@pytest.mark.parametrize("content", BAD_IDX.values(), ids=BAD_IDX)
def test_malformed_idx_is_refused(tmp_path: Path, content: bytes, packed: bool):
    path = make_idx(tmp_path, f"train-images-idx3-ubyte{'.gz' if packed else ''}", packed)
    path.write_bytes(gzipped(content) if packed else content)
    assert sentence_of(lambda _: mnist(tmp_path), path).startswith(
        (
            f"data_dir contains {path}",
            f"data_dir {tmp_path} does not contain a valid mnist data set",
        )
    )


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(IMAGES, id="not compressed"),
        pytest.param(b"", id="empty"),
        pytest.param(gzipped(gzipped(IMAGES)), id="compressed twice"),
        pytest.param(gzipped(IMAGES) + b"more", id="trailing bytes"),
        pytest.param(b"\x1f\x8b\x08\x08" + bytes(6) + b"n" * 2**16, id="endless name"),
        pytest.param(b"\x1f\x8b\x08\x04" + bytes(6) + b"\xff\xff", id="missing extra field"),
        pytest.param(b"\x1f\x8b\x07" + gzipped(IMAGES)[3:], id="unknown method"),
        pytest.param(gzipped(IMAGES)[:-8] + bytes(8), id="wrong checksum"),
        pytest.param(ZEROS * 64, id="bomb of zeros"),
        pytest.param(gzipped(IMAGES) + ZEROS * 64, id="bomb after the pictures"),
        pytest.param(
            gzipped(idx_bytes(np.zeros((5, 28, 28)), 2**24, 28, 28)) + ZEROS * 64,
            id="bomb of pictures",
        ),
    ],
)
def test_malformed_gz_is_refused(tmp_path: Path, content: bytes):
    path = make_idx(tmp_path, "train-images-idx3-ubyte.gz", packed=True)
    path.write_bytes(content)
    assert sentence_of(lambda _: mnist(tmp_path), path).startswith("data_dir contains ")


def test_label_outside_the_classes_is_refused(tmp_path: Path):
    path = make_idx(tmp_path, "train-labels-idx1-ubyte")
    path.write_bytes(idx_bytes(np.array([0, 1, 2, 255, 4])))
    assert "got 255 for example 3" in sentence_of(lambda _: mnist(tmp_path), path)


def test_cifar_archive_with_an_oversized_member_is_refused(tmp_path: Path):
    """A sparse member takes no space in the archive, but unpacks to any size."""
    member = tarfile.TarInfo("data_batch_1.bin")
    member.size = RECORD * 2**24
    (tmp_path / ARCHIVE).write_bytes(gzipped(member.tobuf(tarfile.GNU_FORMAT) + bytes(2**14)))
    assert "lists data_batch_1.bin with 51.6 GB, more than it can contain" in sentence_of(
        lambda _: cifar10(tmp_path), tmp_path / ARCHIVE
    )


DEEP = {
    "parentheses": "(" * 9000,
    "lists": "[" * 9000 + "]" * 9000,
    "minus signs": "-" * 9000 + "1",
    "dictionaries": "{1:" * 3000 + "1" + "}" * 3000,
    "attributes": "a" + ".a" * 4000,
    "call": "__import__('os').system('false')",
    "comprehension": "[x for x in range(10 ** 9)]",
    "power": "9 ** 9 ** 9",
    "set": "{1, 2}",
    "empty": "",
    "NUL": "{'descr': '<f4'\0}",
    "newlines": "{'a\\n': 1,\n\n 'b': 2}",
    "invalid escape": r"{'descr': '\d'}",
    "no shape": "{'descr': '<f4', 'fortran_order': False}",
    "more": "{'descr': '<f4', 'fortran_order': False, 'shape': (6, 4), 'more': 1}",
    "unfinished": "{'descr': '<f4'",
    "Python 2": "{'descr': '<f4', 'fortran_order': False, 'shape': (6L, 4L",
    "unhashable": "{[]: 1}",
}
SHAPES = [
    (2**31, 4),
    (2**62, 4),
    (2**64, 4),
    (10**300,),
    (-6, -4),
    (6, -4),
    (-(2**70), 4),
    (6, 2**61),
    (6.0, 4),
    ("6", 4),
    (None,),
    [6, 4],
    6,
    (1,) * 65,
    (6,) * 24,
    (7, 4),
    (0, 4),
    (24,),
    (),
    (0,) * 64,
    (2**63, 0),
]
DTYPES = [
    "|O",
    "O",
    "<U4",
    "|S4",
    "|V4",
    "<c8",
    "<M8[s]",
    "<m8[s]",
    "<f3",
    "<f4096",
    "f4,,",
    "i4," * 99,
    "nonsense",
    "",
    "\n",
    "S" + "9" * 30,
    f"V{2**31 - 1}",
    "<U536870911",
    [("a", "<f4")],
    [("a", "<f4"), ("a", "<f4")],
    [("a", "<f4", (2**31,))],
    [("a", "|O")],
    ("<f4", (2,)),
    ("<f4", (2**40,)),
    [],
    (),
    None,
    0,
    {"names": ["a"], "formats": ["<f4"], "itemsize": 2**31},
    [["a", "<f4"]],
    [("a\nb", "<f4x")],
    [[[[[]]]]],
]
CONTENT = X.tobytes()
BAD_NPY = {
    **{f"header of {name}": npy_of(text, CONTENT) for name, text in DEEP.items()},
    **{f"shape {shape}"[:60]: npy_of(header_of(shape), CONTENT) for shape in SHAPES},
    **{f"type {descr}"[:60]: npy_of(header_of((6, 4), descr), CONTENT) for descr in DTYPES},
    "invalid order": npy_of(header_of((6, 4), fortran_order="no"), CONTENT),
    "header that is not UTF-8": npy_of(b"\xff\xfe" * 50, CONTENT),
    "header of bytes": npy_of(b"{b'descr': b'<f4'}", CONTENT),
    "header longer than the file": npy_of(header_of((6, 4)), CONTENT)[:40],
    "long header": npy_of(header_of((6, 4)) + " " * 2**17, CONTENT, version=(2, 0)),
    "header of 2**32 bytes": b"\x93NUMPY\x02\x00\xff\xff\xff\xff",
    "version 3": npy_of(header_of((6, 4)), CONTENT, version=(3, 0)),
    "version 9": npy_of(header_of((6, 4)), CONTENT, version=(9, 9)),
    "no magic": b"\x93NUMPX" + npy_bytes(X)[6:],
    "magic only": b"\x93NUMPY",
    "a pickle": pickle.dumps(X),
    "an .npz file": npz_bytes(npy_bytes(X)),
    "NaN": npy_bytes(np.where(X == 5, np.nan, X)),
    "infinity": npy_bytes(np.where(X == 5, -np.inf, X)),
    "beyond float32": npy_bytes(X.astype(np.float64) * 1e300),
    "beyond int32": npy_bytes(X.astype(np.int64) + 2**40),
}


@pytest.mark.parametrize("stored", ["npy", "npz", "npz compressed"])
@pytest.mark.parametrize("content", BAD_NPY.values(), ids=BAD_NPY)
def test_malformed_npy_is_refused(tmp_path: Path, content: bytes, stored: str):
    path = make_npy(tmp_path, "x_train.npy")
    if stored == "npy":
        path.write_bytes(content)
        sentence = sentence_of(lambda _: from_npz(tmp_path), path)
    else:
        path = tmp_path / "mine.npz"
        path.write_bytes(
            npz_bytes(
                content, method=zipfile.ZIP_STORED if stored == "npz" else zipfile.ZIP_DEFLATED
            )
        )
        sentence = sentence_of(from_npz, path)
    assert sentence.startswith((f"data_file {path} ", f"data_file {tmp_path} "))


BAD_LABELS = {
    "negative": Y - 1,
    "huge": np.where(Y == 2, 2**31 - 1, Y),
    "beyond int32": np.where(Y == 2, 2**40, Y).astype(np.uint64),
    "floats": Y / 1,
    "NaN": Y * np.nan,
    "words in a column": Y.astype(str)[:, None],
    "dates": Y.astype("M8[s]"),
    "too few": Y[:5],
    "none": Y[:0],
    "a column": Y[:, None],
    "a number": np.array(3),
}


@pytest.mark.parametrize("labels", BAD_LABELS.values(), ids=BAD_LABELS)
def test_labels_that_are_not_classes_are_refused(tmp_path: Path, labels: np.ndarray):
    path = tmp_path / "mine.npz"
    path.write_bytes(npz_bytes(npy_bytes(X), npy_bytes(labels)))
    assert sentence_of(from_npz, path).startswith(f"data_file {path} ")


@pytest.mark.parametrize("name", ["x_train", "y_train", "x_test", "y_test"])
@pytest.mark.parametrize("stored", ["npy", "npz"])
def test_pickle_is_never_executed(tmp_path: Path, name: str, stored: str):
    mark = tmp_path / "executed"
    payload = npy_bytes(np.array([Payload(mark)] * 6, object), allow_pickle=True)
    contents = {
        "x_train": npy_bytes(X),
        "y_train": npy_bytes(Y),
        "x_test": npy_bytes(X),
        "y_test": npy_bytes(Y),
    }
    contents[name] = payload
    if stored == "npy":
        for each, content in contents.items():
            (tmp_path / f"{each}.npy").write_bytes(content)
        sentence = sentence_of(lambda path: from_npz(path.parent), tmp_path / "x_train.npy")
    else:
        path = tmp_path / "mine.npz"
        path.write_bytes(npz_bytes(**contents))
        sentence = sentence_of(from_npz, path)
    assert f"contains Python objects in {name}, which are not unpickled" in sentence
    assert not mark.exists()
    np.load(io.BytesIO(payload), allow_pickle=True)
    assert mark.exists(), "the payload must create the file when it is unpickled"


VALID_NPZ = npz_bytes(npy_bytes(X))


def directory_with(offset: int, field: bytes) -> bytes:
    """Overwrites a field of the first entry in the directory of a zip file."""
    start = VALID_NPZ.index(b"PK\x01\x02") + offset
    return VALID_NPZ[:start] + field + VALID_NPZ[start + len(field) :]


BAD_ZIPS = {
    "empty": b"",
    "end record only": VALID_NPZ[-22:],
    "no end": VALID_NPZ[:-22],
    "a pickle": pickle.dumps({"x_train": X}),
    "invalid UTF-8 in a name": directory_with(8, b"\x00\x08").replace(
        b"x_train.npy", b"\xff_train.npy"
    ),
    "newlines in a name": VALID_NPZ.replace(b"x_train.npy", b"x\n\x1b[2Jn.npy"),
    "encrypted": directory_with(8, b"\x01\x00"),
    "needs version 99": directory_with(6, b"\x63\x00"),
    "method 12 in the directory": directory_with(10, b"\x0c\x00"),
    "method 14 in the directory": directory_with(10, b"\x0e\x00"),
    "unknown method in the directory": directory_with(10, b"\x63\x00"),
    "starts after the end": directory_with(42, b"\xfe\xff\xff\xff"),
    "missing extra field": directory_with(30, b"\xff\xff"),
    "wrong checksum": directory_with(16, b"\0\0\0\0"),
    "directory of 4 GB": VALID_NPZ[:-10] + b"\xfe\xff\xff\xff" + VALID_NPZ[-6:],
    "name without .npy": VALID_NPZ.replace(b"x_train.npy", b"/x_train.np"),
    "thousands of other members": npz_bytes(
        npy_bytes(X), **{f"a{i}": b"" for i in range(3000)}
    ).replace(b"x_train.npy", b"z_train.npy"),
}

HARMLESS_ZIPS = {
    "size of 4 GB in the directory": directory_with(24, b"\xfe\xff\xff\xff"),
    "compressed size of 4 GB in the directory": directory_with(20, b"\xfe\xff\xff\xff"),
    "more than 64 bits": directory_with(24, b"\xff\xff\xff\xff"),
    "65,535 members": VALID_NPZ[:-14] + b"\xff\xff\xff\xff" + VALID_NPZ[-10:],
}


@pytest.mark.parametrize("content", HARMLESS_ZIPS.values(), ids=HARMLESS_ZIPS)
def test_zip_with_harmless_damage_is_read(tmp_path: Path, content: bytes):
    """The length of an array is read from its header instead."""
    path = tmp_path / "mine.npz"
    path.write_bytes(content)
    assert sentence_of(from_npz, path) == ""


@pytest.mark.parametrize("content", BAD_ZIPS.values(), ids=BAD_ZIPS)
def test_malformed_zip_is_refused(tmp_path: Path, content: bytes):
    path = tmp_path / "mine.npz"
    path.write_bytes(content)
    assert sentence_of(from_npz, path).startswith(f"data_file {path} ")


ROWS = "a,b,kind\n1,2,x\n3,4,y\n"
BAD_CSV = {
    "empty": "",
    "blank lines": "\n\n\n",
    "byte order mark only": "\ufeff",
    "header only": "a,b,kind\n",
    "one column": "1\n2\n",
    "ragged": ROWS + "5,6\n",
    "ragged to the right": ROWS + "5,6,x,7\n",
    "unbalanced quote": ROWS + '5,"6,x\n' * 3,
    "quote in a cell": ROWS + '5,"6"7,x\n',
    "quote to the end": ROWS + '"' + "5,6,x\n" * 1000,
    "field of 200,000 characters": ROWS + "5" * 200_000 + ",6,x\n",
    "feature of 100,000 characters": ROWS + "e" * 100_000 + ",6,x\n",
    "100,000 commas": ROWS + "," * 100_000,
    "NUL": ROWS + "5,\0,x\n",
    "infinity": ROWS + "5,-inf,x\n",
    "beyond float32": ROWS + "5,1e39,x\n",
    "beyond float64": ROWS + "5,1e999,x\n",
    "underscore": ROWS + "5,1_0,x\n",
    "hexadecimal": ROWS + "5,0x10,x\n",
    "escape sequence": ROWS + "5,\x1b[2J\x1b]0;title\x07,x\n",
    "empty label": ROWS + "5,6,\n",
    "one class": "a,b,kind\n1,2,x\n3,4,x\n",
    "measurements as labels": "a,b,kind\n1,2,0.5\n3,4,1\n",
    "invalid UTF-8": ROWS.encode() + b"5,\xff,x\n",
    "UTF-16": ROWS.encode("utf-16"),
    "half a character at the end": ROWS.encode() + "5,6,ß".encode()[:-1],
    "surrogate": ROWS.encode() + b"5,\xed\xa0\x80,x\n",
    "a pickle": pickle.dumps({"x": [1, 2]}),
    "an .npz file": VALID_NPZ,
}


UNUSUAL_CSV = {
    "NaN": ROWS + "5,nan,x\n",
    "empty cell": ROWS + "5,,x\n",
    "carriage returns in quotes": ROWS + '5,"\r\r\n",x\n',
    "semicolons": ROWS.replace(",", ";"),
}


@pytest.mark.parametrize("content", UNUSUAL_CSV.values(), ids=UNUSUAL_CSV)
def test_csv_with_gaps_or_another_separator_is_read(tmp_path: Path, content: str):
    path = tmp_path / "mine.csv"
    path.write_text(content, newline="")
    assert sentence_of(from_table, path) == ""


@pytest.mark.parametrize("content", BAD_CSV.values(), ids=BAD_CSV)
def test_malformed_csv_is_refused(tmp_path: Path, content: str | bytes):
    path = tmp_path / "mine.csv"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    assert sentence_of(from_table, path).startswith(f"data_file {path} ")


def test_memory_of_labels_does_not_scale_with_the_longest(tmp_path: Path):
    """A numpy array of strings allocates the size of the longest label for each."""
    path = tmp_path / "mine.csv"
    path.write_text(ROWS + "5,6," + "z" * 100_000 + "\n" + "1,2,x\n3,4,y\n" * 4000)
    assert sentence_of(from_table, path) == ""


def test_feature_with_a_tiny_deviation_is_standardized(tmp_path: Path):
    """The reciprocal of its standard deviation exceeds float32."""
    path = tmp_path / "mine.csv"
    path.write_text("1e-45,1,x\n0,2,y\n" * 4)
    assert sentence_of(from_table, path) == ""


BAD_TEXT = {
    "empty": b"",
    "byte order mark only": b"\xef\xbb\xbf",
    "short": b"short",
    "invalid UTF-8": b"abc \xff" * 40,
    "overlong": b"abc \xc0\x80" * 40,
    "surrogates": b"abc \xed\xa0\x80" * 40,
    "beyond Unicode": b"abc \xf4\x90\x80\x80" * 40,
    "UTF-16": ("abc " * 40).encode("utf-16"),
    "half a character at the end": b"abc " * 40 + b"\xe2\x82",
    "packed": gzipped(b"abc " * 40),
}


@pytest.mark.parametrize("content", BAD_TEXT.values(), ids=BAD_TEXT)
def test_malformed_text_is_refused(tmp_path: Path, content: bytes):
    path = tmp_path / "mine.txt"
    path.write_bytes(content)
    sentence = sentence_of(lambda path: from_text(path, length=8), path)
    assert sentence.startswith(f"data_file {path} ")


BAD_CONFIGS = {
    "empty": "",
    "null": "null",
    "number": "3",
    "text": '"--steps 3"',
    "list": '["--steps", "3"]',
    "unfinished": '{"steps": 3',
    "more": '{"steps": 3} {"steps": 4}',
    "comment": '{"steps": 3} // of a few',
    "byte order mark": '\ufeff{"steps": 3}',
    "invalid UTF-8": b'{"prompt": "\xff"}',
    "UTF-16": '{"steps": 3}'.encode("utf-16"),
    "NUL": b'{"steps": 3}\0',
    "deep lists": "[" * 100_000,
    "deep objects": '{"a":' * 100_000,
    "deep value": '{"steps": ' + "[" * 900 + "]" * 900 + "}",
    "digits": '{"steps": ' + "9" * 5000 + "}",
    "many digits": '{"steps": 1' + "0" * 400 + "}",
    "infinite steps": '{"steps": 1e999}',
    "NaN": '{"steps": NaN}',
    "fraction": '{"steps": 2.5}',
    "negative": '{"window": -1e99}',
    "true for a number": '{"steps": true}',
    "text for a number": '{"steps": "three"}',
    "text for a flag": '{"flip": "yes"}',
    "number for a flag": '{"flip": 1}',
    "null for a flag": '{"flip": null}',
    "null for a number": '{"seed": null}',
    "null for a model": '{"model": null}',
    "list for a model": '{"model": ["mlp"]}',
    "object for a model": '{"model": {"name": "mlp"}}',
    "null for a strategy": '{"strategy": null}',
    "list for a strategy": '{"strategy": ["ddp"]}',
    "list for a number": '{"steps": [3]}',
    "number for a list": '{"hidden_sizes": 8}',
    "list in a list": '{"hidden_sizes": [[8]]}',
    "text in a list": '{"hidden_sizes": ["8"]}',
    "option in a list": '{"hidden_sizes": ["8", "--run-dir", "elsewhere"]}',
    "NaN in a list": '{"hidden_sizes": [NaN]}',
    "huge number in a list": '{"hidden_sizes": [1' + "0" * 300 + "]}",
    "object for a file": '{"data_file": {"a": 1}}',
    "NUL in a file": '{"data_file": "a\\u0000b"}',
    "NUL in a folder": '{"run_dir": "a\\u0000b"}',
    "surrogate in a folder": '{"run_dir": "\\ud800"}',
    "help": '{"help": "me"}',
    "h": '{"h": null}',
    "unknown": '{"stepz": 3}',
    "unknown of null": '{"stepz": null}',
    "dashes": '{"--steps": 3}',
    "option with a value": '{"steps=3 --seed": 3}',
    "newline in a name": '{"steps\\n\\u001b[2J": 3}',
    "long name": '{"' + "x" * 100_000 + '": 3}',
    "long value": '{"model": "' + "x" * 100_000 + '"}',
    "empty name": '{"": 3}',
}


@pytest.mark.parametrize("content", BAD_CONFIGS.values(), ids=BAD_CONFIGS)
def test_malformed_configuration_is_refused(tmp_path: Path, content: str | bytes):
    path = tmp_path / "config.json"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    assert sentence_of(parse_config, path, traces=False)


@pytest.mark.parametrize("prompt", ["--help", "--steps=3", "-h", "a = b", "--", "@file", ""])
def test_saved_value_is_not_parsed_as_an_option(tmp_path: Path, prompt: str):
    config.save(config.parse(["--dataset", "text", f"--prompt={prompt}"]), tmp_path / "config.json")
    assert parse_config(tmp_path / "config.json").run.prompt == prompt


FOUR = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
BAD_TENSORS = {
    "empty": b"",
    "length only": bytes(8),
    "header of 2**60 bytes": struct.pack("<Q", 2**60) + b"{}",
    "header of 2**64 bytes": b"\xff" * 8 + b"{}",
    "header of 90 MB": struct.pack("<Q", 90_000_000) + b"{}",
    "invalid JSON": safetensors_bytes(b"{"),
    "invalid UTF-8": safetensors_bytes(b'{"\xff": 1}'),
    "deep": safetensors_bytes(b"[" * 100_000),
    "deep objects": safetensors_bytes(b'{"a":' * 100_000),
    "list": safetensors_bytes([1]),
    "metadata of numbers": safetensors_bytes({"__metadata__": {"a": 3}}),
    "unknown type": safetensors_bytes({"a": {**FOUR, "dtype": "OBJECT"}}, bytes(4)),
    "type that numpy lacks": safetensors_bytes(
        {"a": {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}}, bytes(4)
    ),
    "type of half a byte": safetensors_bytes(
        {"a": {"dtype": "F4", "shape": [8], "data_offsets": [0, 4]}}, bytes(4)
    ),
    "shape too large": safetensors_bytes({"a": {**FOUR, "shape": [2**31]}}, bytes(4)),
    "shape beyond 64 bits": safetensors_bytes({"a": {**FOUR, "shape": [2**62, 2**62]}}, bytes(4)),
    "empty shape beyond 64 bits": safetensors_bytes(
        {"a": {"dtype": "F32", "shape": [0, 2**62], "data_offsets": [0, 0]}}
    ),
    "shape with a dimension of 2**63": safetensors_bytes(
        {"a": {"dtype": "F32", "shape": [0, 2**63], "data_offsets": [0, 0]}}
    ),
    "negative shape": safetensors_bytes({"a": {**FOUR, "shape": [-1]}}, bytes(4)),
    "100 dimensions": safetensors_bytes({"a": {**FOUR, "shape": [1] * 100}}, bytes(4)),
    "offsets after the end": safetensors_bytes({"a": {**FOUR, "data_offsets": [4, 8]}}, bytes(4)),
    "offsets of 2**63": safetensors_bytes(
        {"a": {**FOUR, "data_offsets": [2**63, 2**63 + 4]}}, bytes(4)
    ),
    "offsets backwards": safetensors_bytes({"a": {**FOUR, "data_offsets": [4, 0]}}, bytes(4)),
    "overlap": safetensors_bytes({"a": FOUR, "b": FOUR}, bytes(4)),
    "gap": safetensors_bytes({"a": FOUR}, bytes(8)),
    "a pickle": pickle.dumps({"a": X}),
}


@pytest.mark.parametrize("content", BAD_TENSORS.values(), ids=BAD_TENSORS)
def test_malformed_tensors_are_refused(tmp_path: Path, content: bytes):
    path = make_checkpoint(tmp_path, TENSORS)
    path.write_bytes(content)
    sentence = sentence_of(lambda path: read_checkpoint(path.parent), path)
    assert TENSORS in sentence
    assert TENSORS in sentence_of(lambda path: read_with_damaged_tensors(path.parent), path)


BAD_MANIFESTS = {
    "empty": "",
    "null": "null",
    "list": "[1]",
    "text": '"format"',
    "no format": "{}",
    "format of text": '{"format": "1"}',
    "format of null": '{"format": null}',
    "format of a fraction": '{"format": 1.5}',
    "newer format": '{"format": 2}',
    "format of digits": '{"format": ' + "9" * 5000 + "}",
    "huge format": '{"format": ' + "9" * 400 + "}",
    "deep": "[" * 100_000,
    "deep objects": '{"format": ' * 100_000,
    "invalid UTF-8": b'{"format": "\xff"}',
    "NUL": b"\0\0\0",
    "newlines": "\n\n{\n\n",
}


@pytest.mark.parametrize("content", BAD_MANIFESTS.values(), ids=BAD_MANIFESTS)
def test_malformed_manifest_is_refused(tmp_path: Path, content: str | bytes):
    path = make_checkpoint(tmp_path, MANIFEST)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    assert sentence_of(lambda path: read_checkpoint(path.parent), path)
    assert sentence_of(lambda path: read_with_damaged_tensors(path.parent), path)


@pytest.mark.parametrize(
    "tensors",
    [
        "null",
        "3",
        "[]",
        '["kernel"]',
        '{"\\n": 1}',
        '{"kernel": null}',
        '{"kernel": [1]}',
        '{"bias": 1e999}',
    ],
)
def test_damage_is_named_even_if_the_manifest_is_malformed(tmp_path: Path, tensors: str):
    path = make_checkpoint(tmp_path, MANIFEST)
    path.write_text(f'{{"format": 1, "tensors": {tensors}}}')
    sentence = sentence_of(lambda path: read_with_damaged_tensors(path.parent), path)
    assert TENSORS in sentence or MANIFEST in sentence


# In a separate process, whose memory is limited by the system

READ_WITH_LIMITED_MEMORY = """
import resource
import sys
from pathlib import Path
from ctde_jax.data.files import from_npz
from ctde_jax.data.published.idx import mnist
from ctde_jax.errors import InputError
path = Path(sys.argv[1])
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**28,) * 2)
try:
    from_npz(path) if path.suffix == ".npz" else mnist(path.parent)
except InputError as error:
    sys.exit(str(error))
"""


def write_bomb(path: Path) -> None:
    """Writes an .npz file of some kilobytes whose header and directory claim 4 GB of content."""
    header = npy_of(header_of((GIGABYTES // 4, 1)))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("y_train.npy", npy_bytes(Y))
        archive.writestr("x_train.npy", header + bytes(2**24))
    content = path.read_bytes()
    size = struct.pack("<I", len(header) + 2**24)
    directory = content.rindex(b"PK\x01\x02")
    assert size in content[directory:]
    path.write_bytes(
        content[:directory] + content[directory:].replace(size, b"\xfe\xff\xff\xff", 1)
    )


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux to limit the memory")
@pytest.mark.parametrize("name", ["mine.npz", "train-images-idx3-ubyte.gz"])
def test_bomb_is_refused_within_limited_memory(tmp_path: Path, name: str):
    path = make_idx(tmp_path, name, packed=True)
    if path.suffix == ".npz":
        write_bomb(path)
    else:
        path.write_bytes(gzipped(idx_bytes(np.zeros((1, 28, 28)), 2**25, 28, 28)) + ZEROS * 1024)
    done = subprocess.run(
        [sys.executable, "-c", READ_WITH_LIMITED_MEMORY, str(path)],
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
    )
    assert done.returncode == 1
    assert len(done.stderr.decode().splitlines()) == 1
    assert (
        f"{path} has a damaged array x_train (" in done.stderr.decode()
        or f"{path}, which has only " in done.stderr.decode()
    )
    assert "4.3 GB of memory" in done.stderr.decode() or "26.3 GB" in done.stderr.decode()


# The command


def check_command(arguments: list[str], capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    """Asserts that the command ends with one sentence, and leaves the folder unchanged."""
    before = sorted(folder.rglob("*"))
    assert train.main([*arguments, "--devices", "1", "--run-dir", str(folder / "run")]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: --")
    assert captured.err.count("\n") == 1
    assert captured.err.endswith("\n")
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize(
    ("dataset", "name", "content"),
    [
        ("npz", "mine.npz", b"PK"),
        ("npz", "mine.npz", npz_bytes(npy_of(header_of((2**62, 4)), CONTENT))),
        ("npz", "mine.npz", npz_bytes(npy_of(DEEP["minus signs"]))),
        ("npz", "mine.npz", npz_bytes(npy_bytes(X), npy_bytes(BAD_LABELS["huge"]))),
        ("npz", "mine.npz", BAD_ZIPS["newlines in a name"]),
        ("csv", "mine.csv", (ROWS + "5,\x1b[2J\n\r,x\n").encode()),
        ("csv", "mine.csv", b"\xff\xfe"),
        ("csv", "mine.csv", ("\n" + ROWS + '"5\n\n,6,x').encode()),
        ("text", "mine.txt", b"\x80" * 300),
        ("text", "mine.txt", b""),
    ],
)
def test_command_refuses_a_malformed_data_file(
    tmp_path: Path, capsys, dataset: str, name: str, content: bytes
):
    (tmp_path / name).write_bytes(content)
    check_command(["--dataset", dataset, "--data-file", str(tmp_path / name)], capsys, tmp_path)


@pytest.mark.parametrize("content", [BAD_IDX["2**96 bytes"], b"\n\n", gzipped(IMAGES)])
def test_command_refuses_a_malformed_idx_file(tmp_path: Path, capsys, content: bytes):
    make_idx(tmp_path, "train-images-idx3-ubyte").write_bytes(content)
    check_command(["--dataset", "mnist", "--data-dir", str(tmp_path)], capsys, tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        *map(
            BAD_CONFIGS.get,
            ["deep objects", "help", "newline in a name", "NUL in a folder", "null for a model"],
        ),
        '{"validation_fraction": NaN}',
        '{"learning_rate": 1e999}',
    ],
)
def test_command_refuses_a_malformed_configuration(tmp_path: Path, capsys, content: str):
    (tmp_path / "config.json").write_text(content)
    check_command(["--config", str(tmp_path / "config.json")], capsys, tmp_path)


@pytest.mark.parametrize("name", ["header of 2**60 bytes", "type that numpy lacks"])
def test_command_refuses_a_malformed_checkpoint(tmp_path: Path, capsys, name: str):
    path = make_checkpoint(tmp_path / "trunk" / "checkpoints", TENSORS)
    (tmp_path / "trunk" / "config.json").write_text("{}")
    path.write_bytes(BAD_TENSORS[name])
    (path.parent / SUMS).write_text(_sums(path.parent), encoding="utf-8")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").touch()
    arguments = ["--branch-from", str(path.parent), "--steps", "1", "--devices", "1"]
    assert train.main([*arguments, "--run-dir", str(tmp_path / "run")]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(
        "error: --branch-from must be the folder of an intact checkpoint, but "
    )
    assert captured.err.count("\n") == 1
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


# Arrays without usable numbers


@pytest.mark.parametrize(
    "arrays",
    [
        {"x_train": np.zeros((6, 0), np.float32)},
        {"y_train": np.zeros((6, 0), np.int64)},
        {"x_train": np.zeros((6, 4), "m8[s]")},
        {"y_train": np.zeros(6, "m8[s]")},
        {"x_train": np.frombuffer(b"\1\0\0\0\0\0\xf0\x7f" * 24).reshape(6, 4)},
    ],
    ids=[
        "empty inputs",
        "empty labels",
        "inputs of timedelta",
        "labels of timedelta",
        "signaling NaN",
    ],
)
def test_arrays_without_usable_numbers_are_refused(tmp_path: Path, arrays: dict[str, np.ndarray]):
    path = tmp_path / "mine.npz"
    valid = {"x_train": np.eye(6, 4, dtype=np.float32), "y_train": np.array([0, 1, 2, 0, 1, 2])}
    np.savez(path, **{**valid, **arrays})
    assert sentence_of(data.from_npz, path)


def test_rows_without_columns_are_refused_without_iteration(tmp_path: Path):
    header = repr({"descr": "<f4", "fortran_order": False, "shape": (2**59, 0)}).encode()
    with zipfile.ZipFile(tmp_path / "mine.npz", "w") as archive:
        archive.writestr("x_train.npy", b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header)
        archive.writestr("y_train.npy", b"")
    assert sentence_of(data.from_npz, tmp_path / "mine.npz")


@pytest.mark.parametrize("path", ["~nobody-of-this-name/mine.npz", "x" * 5000])
def test_impossible_path_is_refused(path: str):
    for read in (data.from_npz, data.mnist, lambda path: data.from_text(path, 8, None)):
        with pytest.raises(InputError):
            read(path)
    with pytest.raises(Damaged):
        checkpoint.read(Path(path))


@pytest.mark.parametrize("line", ["{", "[]", "3", "{}", "\x00", '{"split": "test"}'])
def test_run_with_a_malformed_row_is_not_resumed(tmp_path: Path, line: str):
    (tmp_path / "metrics.jsonl").write_text(
        '{"split": "train", "step": 1, "loss": 1.0}\n' + line + "\n"
    )
    with (
        pytest.raises(InputError, match=r"must have the 2 rows .*, got 1; name"),
        open_log(9, tmp_path, False, 2),
    ):
        pass


def test_archive_whose_header_claims_gigabytes_is_refused(tmp_path: Path):
    member = tarfile.TarInfo("x")
    member.type, member.size = tarfile.XHDTYPE, 2**32
    path = tmp_path / "cifar-10-binary.tar.gz"
    path.write_bytes(gzip.compress(member.tobuf() + bytes(2**20)))
    with pytest.raises(InputError, match="is not a complete"):
        _members(path, ["test_batch.bin"])
