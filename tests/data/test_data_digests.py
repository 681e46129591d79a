"""The digest of an array depends on its content only, in memory and on disk."""

from dataclasses import replace
from hashlib import sha256

import numpy as np
import pytest

from ctde_jax import data
from ctde_jax.data import digests

RNG = np.random.default_rng(0)


def test_digest_is_that_of_shape_dtype_and_all_bytes():
    x = RNG.normal(size=(50, 3)).astype(np.float32)
    assert data.digest(x) == sha256(b"float32[50, 3]" + x.tobytes()).hexdigest()
    assert data.digest(np.asfortranarray(x)) == data.digest(x) != data.digest(x.reshape(3, 50))
    assert data.digest(x.view(np.int32)) != data.digest(x)


@pytest.mark.parametrize("whole", [2**28, 100])
def test_array_on_disk_has_the_digest_of_the_array_in_memory(tmp_path, monkeypatch, whole):
    """With the digest of the whole array, and with that of samples."""
    monkeypatch.setattr(digests, "WHOLE_BYTES", whole)
    x = RNG.normal(size=(5000, 3)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    labels = np.zeros(5000, np.int32)
    mapped = data.from_arrays(np.load(tmp_path / "x.npy", mmap_mode="r"), labels, x, labels)
    assert isinstance(mapped.train.inputs, data.DiskArray)
    assert data.digests_of(mapped) == data.digests_of(data.from_arrays(x, labels, x, labels))


@pytest.mark.parametrize("row", [0, 4999])
def test_samples_of_a_large_array_include_both_ends(monkeypatch, row):
    monkeypatch.setattr(digests, "WHOLE_BYTES", 100)
    x = RNG.normal(size=(5000, 3)).astype(np.float32)
    other = x.copy()
    other[row, 2] += 1
    assert data.digest(x) != data.digest(other)


def test_digest_names_the_changed_part_of_a_data_set():
    x, y = RNG.normal(size=(40, 3)).astype(np.float32), RNG.integers(0, 3, 40)
    small = data.hold_out(data.from_arrays(x, y, x[:10], y[:10]), 0.25)
    parts = [np.arange(15), np.arange(15, 30)]
    before = data.digests_of(small, parts)
    changes = {
        "the inputs of the validation split": {
            "validation": small.validation._replace(inputs=x[:10])
        },
        "the labels of the training split": {
            "train": small.train._replace(labels=1 - small.train.labels)
        },
        "the inputs of the test split": {"test": small.test._replace(inputs=x[10:20])},
        "the class names": {"classes": ("a", "b", "c")},
        "the scale of the inputs": {"scale": np.float32(2)},
        "the shift of the inputs": {"shift": np.float32(2)},
        "the vocabulary": {"vocabulary": ("a", "b")},
    }
    for name, change in changes.items():
        after = data.digests_of(replace(small, **change), parts)
        assert [part for part in before if before[part] != after[part]] == [name]
    assert data.digests_of(small, tuple(map(list, parts))) == before
    assert data.digests_of(small, parts[::-1])["the partition"] != before["the partition"]
