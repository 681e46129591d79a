"""Memory-mapped arrays give the same rows and data sets as arrays in memory."""

import numpy as np
import pytest

from ctde_jax import data
from ctde_jax.data import disk
from ctde_jax.data.disk import DiskArray, on_disk, slices, stays_on_disk
from ctde_jax.errors import InputError

ROWS = np.random.default_rng(0).integers(0, 256, (50, 3, 4), np.uint8)


@pytest.fixture
def mapped(tmp_path) -> np.memmap:
    np.save(tmp_path / "rows.npy", ROWS)
    return np.load(tmp_path / "rows.npy", mmap_mode="r")


INDICES = [np.array([7, 2, 7, 49, -50]), np.array([[3, 4], [5, 3]]), np.zeros(0, int)]


@pytest.mark.parametrize("rows", [3, -1, slice(None), slice(4, 20, 5), *INDICES], ids=str)
def test_rows_are_those_of_the_array(mapped, rows):
    array = on_disk("x", mapped)
    np.testing.assert_array_equal(array[rows], ROWS[rows])
    kept = np.array([40, 3, 3, 17])
    np.testing.assert_array_equal(array.select(np.arange(49, -1, -1))[rows], ROWS[::-1][rows])
    np.testing.assert_array_equal(
        array.select(kept).select(np.array([2, 0]))[:], ROWS[kept][[2, 0]]
    )


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[5:30],
        lambda x: x[::3],
        lambda x: x[::-1],
        lambda x: x[10:].reshape(40, 12),
        lambda x: x[4][:2],
        lambda x: x[:, 1:],
        np.asarray,
        lambda x: x.view(np.dtype(">u2")),
    ],
    ids=[
        "part",
        "every third",
        "backwards",
        "reshaped",
        "part of an example",
        "without first rows",
        "base array",
        "big-endian",
    ],
)
def test_view_of_a_memory_map_is_read_from_disk(mapped, view):
    assert stays_on_disk(view(mapped))
    np.testing.assert_array_equal(np.asarray(on_disk("x", view(mapped))), view(ROWS))


def test_copy_of_a_memory_map_is_in_memory(mapped):
    assert not any(map(stays_on_disk, (mapped.copy(), mapped[np.array([1, 2])], mapped + 1, ROWS)))


def test_memory_map_without_contiguous_examples_is_refused(mapped, tmp_path):
    np.save(tmp_path / "columns.npy", np.asfortranarray(ROWS))
    columns = np.load(tmp_path / "columns.npy", mmap_mode="r")
    for array in (mapped[:, :, :2], mapped.transpose(2, 1, 0), columns):
        with pytest.raises(
            InputError, match="x_train must store each example contiguously in its file"
        ):
            data.from_arrays(array, np.zeros(len(array), int))
    with pytest.raises(InputError, match="must be a memory map in the mode 'r', got the mode 'c'"):
        data.from_arrays(np.load(tmp_path / "rows.npy", mmap_mode="c"), np.zeros(50, int))


def test_slices_cover_the_array(mapped, monkeypatch):
    monkeypatch.setattr(disk, "PIECE_BYTES", 7 * 12)
    found = list(slices(on_disk("x", mapped)))
    assert [first for first, _ in found] == list(range(0, 50, 7))
    np.testing.assert_array_equal(np.concatenate([piece for _, piece in found]), ROWS)


@pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.float64, np.bool_, ">f4"])
def test_data_set_on_disk_equals_the_one_in_memory(tmp_path, dtype, monkeypatch):
    """Compares dtypes, splits, sequences and scaling."""
    monkeypatch.setattr(disk, "PIECE_BYTES", 1000)
    np.save(tmp_path / "x.npy", ROWS.astype(dtype))
    np.save(tmp_path / "y.npy", ROWS[:, 0, 0] % 3)
    names = [tmp_path / "x.npy", tmp_path / "y.npy"]
    stored, loaded = (
        data.from_arrays(*(np.load(name, mmap_mode=mode) for name in names)) for mode in ("r", None)
    )
    for change in (
        lambda x: x,
        lambda x: data.hold_out(x, 0.3),
        lambda x: data.as_sequence(x, "rows"),
    ):
        stored_set, loaded_set = change(stored), change(loaded)
        assert stored_set.classes == loaded_set.classes
        for split in ("train", "test", "validation"):
            for array, expected in zip(
                getattr(stored_set, split) or (), getattr(loaded_set, split) or (), strict=True
            ):
                assert isinstance(array, DiskArray) == (array.ndim > 1)
                assert array.dtype == expected.dtype
                np.testing.assert_array_equal(np.asarray(array), expected)
    np.testing.assert_allclose(
        data.standardized(stored).scale, data.standardized(loaded).scale, rtol=1e-6
    )
    np.testing.assert_allclose(
        data.standardized(stored).shift, data.standardized(loaded).shift, rtol=1e-6
    )


def test_error_on_disk_names_the_position(tmp_path, monkeypatch):
    monkeypatch.setattr(disk, "PIECE_BYTES", 1000)
    for value, dtype, sentence in [
        (
            np.nan,
            np.float32,
            r"x_train must be finite in float32, got NaN or infinity at \[41, 2, 1\]",
        ),
        (2**40, np.int64, "x_train must fit in int32, got 1099511627776"),
    ]:
        values = ROWS.astype(dtype)
        values[41, 2, 1] = value
        np.save(tmp_path / "x.npy", values)
        with pytest.raises(InputError, match=sentence):
            data.from_arrays(np.load(tmp_path / "x.npy", mmap_mode="r"), np.zeros(50, int))


def test_truncated_file_is_an_error(mapped):
    array = on_disk("x", mapped)
    with open(mapped.filename, "r+b") as file:
        file.truncate(500)
    with pytest.raises(
        InputError, match=r"during training \(the file was truncated\); restore the file"
    ):
        array[:]
