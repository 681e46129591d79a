"""A user's file becomes a data set, or an error that locates the fault."""

import bz2
import gzip
import io
import lzma
import zipfile
from pathlib import Path

import numpy as np
import pytest

from ctde_jax import data
from ctde_jax.data import files, from_npz, from_table
from ctde_jax.errors import InputError

X = np.arange(24.0).reshape(6, 4) / 4
Y = np.array([0, 1, 2, 0, 1, 2])
IRIS = "length,width,species\n1,2.5,setosa\n2,3.5,virginica\n3,1.5,setosa\n4,0.5,virginica\n"


def save(folder: Path, stored: str | bytes) -> Path:
    """Writes a file of the user's."""
    path = folder / "mine.csv"
    path.write_bytes(stored.encode() if isinstance(stored, str) else stored)
    return path


def examples(dataset) -> dict[tuple[float, ...], str]:
    """Returns the label of each example of both splits by its inputs."""
    return {
        tuple(example.tolist()): dataset.classes[label]
        for split in (dataset.train, dataset.test)
        for example, label in zip(*split, strict=True)
    }


def error_message(read, *args) -> str:
    """Returns the message of the error that reading raises."""
    with pytest.raises(InputError) as caught:
        read(*args)
    return str(caught.value)


# .npz


def test_npz_with_a_test_split_is_used_unchanged(tmp_path: Path):
    """Other arrays in the file are ignored."""
    path = tmp_path / "mine.npz"
    np.savez_compressed(path, x_train=X, y_train=Y, x_test=X + 1, y_test=Y, unrelated=Y)

    dataset = from_npz(str(path))

    np.testing.assert_array_equal(dataset.train.inputs, X)
    np.testing.assert_array_equal(dataset.test.inputs, X + 1)
    np.testing.assert_array_equal(dataset.train.labels, Y)
    assert (dataset.name, dataset.classes, dataset.notes) == ("mine", ("0", "1", "2"), ())


def test_npz_without_a_test_split_gets_one_and_a_note(tmp_path: Path):
    """Bytes stay bytes."""
    path = tmp_path / "mine.npz"
    np.savez(path, x_train=X.astype(np.uint8), y_train=Y)

    dataset = from_npz(path)

    assert (len(dataset.train.inputs), len(dataset.test.inputs)) == (5, 1)
    assert dataset.train.inputs.dtype == np.uint8
    assert "held out at random" in dataset.notes[0]


@pytest.mark.parametrize(
    ("arrays", "fault"),
    [
        ({"X_train": X, "labels": Y}, " lacks x_train and y_train, but has X_train, labels; "),
        (
            {"x_train": X},
            " lacks y_train, but has x_train; save the arrays with numpy.savez(path, x_train=",
        ),
        (
            {"x_train": X, "y_train": Y / 2},
            " does not contain class indices in y_train (got labels of the dtype float64",
        ),
        (
            {"x_train": X, "y_train": np.eye(3)[Y]},
            (
                "(got one-hot labels of the shape [6, 3]; pass labels.argmax(1)); save them as "
                "integers from 0."
            ),
        ),
        (
            {"x_train": X, "y_train": Y, "x_test": X, "y_test": Y / 2},
            " does not contain class indices in y_test (got labels of the dtype float64",
        ),
        (
            {"x_train": X, "y_train": Y[:5]},
            " does not contain a valid data set: y_train must have one label for each",
        ),
        (
            {"x_train": X, "y_train": Y, "x_test": X},
            " does not contain a valid data set: y_test is missing",
        ),
        (
            {"x_train": X + np.inf, "y_train": Y},
            " does not contain a valid data set: x_train must be finite in float32",
        ),
        (
            {"x_train": X, "y_train": Y - 1},
            " does not contain a valid data set: y_train must be class indices from 0, got -1",
        ),
        (
            {"x_train": X.astype(str), "y_train": Y},
            " does not contain a valid data set: x_train must contain real numbers",
        ),
    ],
)
def test_npz_without_a_data_set_is_refused(tmp_path: Path, arrays: dict, fault: str):
    """The error names the file, the array and the rule."""
    path = tmp_path / "mine.npz"
    np.savez(path, **arrays)

    sentence = error_message(from_npz, path)

    assert sentence.startswith(f"data_file {path} ")
    assert fault in sentence


class Bomb:
    """Creates a file if it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def test_npz_is_never_unpickled(tmp_path: Path):
    """An untrusted file runs no code."""
    path = tmp_path / "mine.npz"
    np.savez(path, x_train=np.array([Bomb(tmp_path / "exploded")] * 6), y_train=Y)

    sentence = error_message(from_npz, path)

    assert not (tmp_path / "exploded").exists()
    assert sentence == (
        f"data_file {path} contains Python objects in x_train, which are not unpickled; save an "
        "array of numbers, with examples of the same shape."
    )


def npz_bytes(**members: bytes) -> bytes:
    """Packs members that need not be arrays."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)
    return buffer.getvalue()


def npy_bytes(array: np.ndarray) -> bytes:
    """Returns an array as numpy saves it."""
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


WHOLE = npz_bytes(x_train=npy_bytes(X), y_train=npy_bytes(Y))


@pytest.mark.parametrize(
    ("stored", "fault"),
    [
        pytest.param(b"", "is not a complete .npz file", id="empty"),
        pytest.param(b"1,2,a\n", "is not a complete .npz file", id="no zip"),
        pytest.param(npy_bytes(X), "is not a complete .npz file", id="npy"),
        pytest.param(WHOLE[:-30], "is not a complete .npz file", id="truncated file"),
        pytest.param(npz_bytes(), "lacks x_train and y_train, but has no array", id="no members"),
        pytest.param(
            WHOLE.replace(X.tobytes(), X[::-1].tobytes()),
            "has a damaged array x_train (",
            id="wrong CRC",
        ),
        pytest.param(
            npz_bytes(x_train=npy_bytes(X)[:-8], y_train=npy_bytes(Y)),
            "has a damaged array x_train (",
            id="truncated member",
        ),
        pytest.param(
            npz_bytes(x_train=b"", y_train=npy_bytes(Y)),
            "has a damaged array x_train (",
            id="empty member",
        ),
    ],
)
def test_damaged_npz_is_refused(tmp_path: Path, stored: bytes, fault: str):
    """The error contains no internals of zipfile or numpy."""
    path = save(tmp_path, stored)
    sentence = error_message(from_npz, path)
    assert sentence.startswith(f"data_file {path} {fault}")
    assert "); save " in sentence or "array; save " in sentence


@pytest.mark.parametrize("read", [from_npz, from_table])
def test_path_that_is_not_a_file_is_refused(tmp_path: Path, read):
    """The errors for an absent file and for a folder differ."""
    # `from_npz` reads a folder, too.
    folder = [(tmp_path, "it is a folder, not a regular file")] if read is from_table else []
    for path, reason in [(tmp_path / "absent", "No such file or directory"), *folder]:
        assert error_message(read, path) == (
            f"data_file {path} cannot be opened ({reason}); pass the path of a readable file."
        )


# .csv


@pytest.mark.parametrize(
    "stored",
    [
        pytest.param(IRIS, id="plain"),
        pytest.param("\ufeff" + IRIS, id="byte order mark"),
        pytest.param(IRIS.replace("\n", "\r\n"), id="Windows line ends"),
        pytest.param(IRIS + "\n\n", id="blank lines"),
        pytest.param(IRIS.replace(",", " , "), id="spaces"),
        pytest.param(IRIS.replace("setosa", '"setosa"').replace("1.5", '"1.5"'), id="quotes"),
        pytest.param(IRIS.partition("\n")[2], id="no header"),
    ],
)
def test_all_spellings_of_a_table_are_equivalent(tmp_path: Path, stored: str):
    """All these files contain the same table."""
    dataset = from_table(str(save(tmp_path, stored)))

    assert examples(dataset) == {
        (1, 2.5): "setosa",
        (2, 3.5): "virginica",
        (3, 1.5): "setosa",
        (4, 0.5): "virginica",
    }
    assert (dataset.name, dataset.classes) == ("mine", ("setosa", "virginica"))
    assert dataset.train.inputs.dtype == np.float32


def test_features_of_the_training_split_are_standardized(tmp_path: Path):
    """The model sees zero mean and unit variance."""
    dataset = from_table(save(tmp_path, IRIS))
    seen = (dataset.train.inputs - dataset.shift) * dataset.scale
    np.testing.assert_allclose(seen.mean(axis=0), 0, atol=1e-6)
    np.testing.assert_allclose(seen.std(axis=0), 1, atol=1e-6)


def test_decisions_are_noted(tmp_path: Path):
    """A first line taken for a header is noted, because it could be an example."""
    named, split, standardized = from_table(save(tmp_path, IRIS)).notes
    assert named == "Line 1 contains the column names; the labels are in the column 'species'."
    assert "held out at random" in split
    assert "standardized" in standardized

    without_header = from_table(save(tmp_path, IRIS.partition("\n")[2]))
    assert (
        without_header.notes[0] == "There is no header line; the labels are in the last column, 3."
    )


def test_label_column_is_chosen_by_name(tmp_path: Path):
    """It may be at any position."""
    path = save(tmp_path, "kind,a,b\nx,1,2\ny,3,4\nx,5,6\n")
    assert examples(from_table(path, "kind")) == {(1, 2): "x", (3, 4): "y", (5, 6): "x"}


def test_one_word_among_the_features_makes_a_header(tmp_path: Path):
    """The name of the label column may be a number."""
    path = save(tmp_path, "a,1\n1,0\n2,1\n")
    assert from_table(path).notes[0].startswith("Line 1 contains the column names")


def test_numbers_as_labels_are_sorted_as_numbers(tmp_path: Path):
    """Two spellings of one number are one class, named by the first spelling."""
    rows = "1,10\n2,9\n3,-1\n4,9.0\n"
    dataset = from_table(save(tmp_path, rows))
    assert dataset.classes == ("-1", "9", "10")
    assert examples(dataset) == {(1,): "10", (2,): "9", (3,): "-1", (4,): "9"}


def test_words_and_numbers_as_labels_are_sorted_as_words(tmp_path: Path):
    """If one label is a word, all are; nan is a word."""
    assert from_table(save(tmp_path, "1,10\n2,9\n3,none\n4,nan\n")).classes == (
        "10",
        "9",
        "nan",
        "none",
    )


def test_quoted_cell_may_hold_commas_quotes_and_lines(tmp_path: Path):
    """The usual rules of quoting hold."""
    path = save(tmp_path, '"a, b",label\n1,"x ""y"""\n2,"two\nlines"\n3,"x ""y"""\n')
    assert examples(from_table(path)) == {(1,): 'x "y"', (2,): "two\nlines", (3,): 'x "y"'}


@pytest.mark.parametrize(
    ("stored", "fault"),
    [
        pytest.param("", "is empty; pass a file with one line per example", id="empty"),
        pytest.param("\n\n", "is empty; pass a file with one line per example", id="blank"),
        pytest.param("a,b\n", "has a header line but no examples; add one line", id="header only"),
        pytest.param(
            "1,2,x\n3,y\n", "has 2 cells in line 2 and 3 in line 1; give every line", id="ragged"
        ),
        pytest.param(
            "1,2,x\n\n3,4,y,\n", "has 4 cells in line 3 and 3 in line 1; give every", id="too many"
        ),
        pytest.param(
            "w,h,l\n1,2,x\n3,tall,y\n" + "5,6,x\n" * 3,
            (
                "has 'tall' in line 3, column 'h', which is not a finite float32 number; correct "
                "the cell, or remove"
            ),
            id="word",
        ),
        pytest.param(
            "1,2,x\n3,,y\n",
            "has columns without names, although some contain words, dates or gaps; add a line",
            id="empty cell",
        ),
        pytest.param(
            "1,nan,x\n3,4,y\n",
            "has columns without names, although some contain words, dates or gaps; add a line",
            id="nan",
        ),
        pytest.param(
            "1,2,x\n-inf,4,y\n",
            "has '-inf' in line 2, column 1, which is not a finite",
            id="infinite",
        ),
        pytest.param(
            "1,2,x\n3,1e39,y\n",
            "has '1e39' in line 2, column 2, which is not a finite",
            id="too large",
        ),
        pytest.param(
            'a,"b\nc",l\n1,2,x\n3,4!,y\n' + "5,6,x\n" * 3,
            "has '4!' in line 4, column 'b\\nc', which is not",
            id="line number",
        ),
        pytest.param(
            "1,2,x\n3,4,\n",
            "has an empty label in line 2, column 3; fill in the cell",
            id="no label",
        ),
        pytest.param(
            "1,2,x\n3,4,x\n",
            "has only the label 'x' in column 3; provide at least two",
            id="one class",
        ),
        pytest.param(
            b"1,2,caf\xe9\n3,4,x\n",
            "has the byte 0xe9, which is not valid UTF-8; save it in",
            id="Latin-1",
        ),
        pytest.param(
            '1,2,x\n3,4,"y\n',
            "is not valid CSV in line 2 (unexpected end of data); correct",
            id="quote",
        ),
    ],
)
def test_error_names_the_invalid_cell(tmp_path: Path, stored: str | bytes, fault: str):
    """The error names the line, the column and the correction."""
    path = save(tmp_path, stored)
    assert error_message(from_table, path).startswith(f"data_file {path} {fault}")


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, lzma.compress])
@pytest.mark.parametrize("read", [from_table, data.from_text])
def test_compressed_file_is_refused(tmp_path: Path, compress, read):
    """The error names the compression, and not an encoding."""
    path = save(tmp_path, compress(IRIS.encode()))
    kind = {gzip.compress: "gzip", bz2.compress: "bzip2", lzma.compress: "xz"}[compress]
    way_out = "decompress it, or save it as plain text in UTF-8."
    assert error_message(read, path) == f"data_file {path} is compressed ({kind}); {way_out}"


def test_archive_is_refused(tmp_path: Path):
    """Spreadsheets are archives, too."""
    np.savez_compressed(tmp_path / "mine.npz", x_train=X)
    assert "is compressed (zip, as .npz and .xlsx files are); decompress" in error_message(
        from_table, tmp_path / "mine.npz"
    )


def test_misspelled_label_column_is_refused_with_a_suggestion(tmp_path: Path):
    """The error lists the columns and suggests one."""
    sentence = error_message(from_table, save(tmp_path, IRIS), "specie")
    assert sentence == (
        "label must be one of length, width, species, got 'specie'; did you mean 'species'?"
    )


def test_csv_with_measurements_for_labels_is_refused(tmp_path):
    (tmp_path / "t.csv").write_text("a,b\n1,0.5\n2,0.25\n3,0.75\n")
    with pytest.raises(
        InputError,
        match=r"labels such as '0.5' in column 'b', which are measurements, not classes",
    ):
        from_table(tmp_path / "t.csv")


def test_label_column_needs_a_header(tmp_path: Path):
    """Without a header, columns have no names."""
    path = save(tmp_path, "1,2,x\n3,4,y\n")
    assert error_message(from_table, path, "species") == (
        f"label must be the name of a column, got 'species', but {path} has no header line; "
        "add one, or move the labels to the last column and omit this option."
    )


@pytest.mark.parametrize("kind", ["npz", "folder"])
def test_large_arrays_stay_in_their_file(tmp_path, monkeypatch, kind):
    """A folder of `.npy` files and an `.npz` file give the same data set."""
    x, y = np.arange(600, dtype=np.int64).reshape(50, 3, 4) % 11, np.arange(50) % 3
    np.savez(tmp_path / "arrays.npz", first=x, x_train=x, y_train=y, x_test=x[:9], y_test=y[:9])
    path = tmp_path / "arrays.npz"
    if kind == "folder":
        with zipfile.ZipFile(path) as archive:
            archive.extractall(tmp_path / "arrays")
        path = tmp_path / "arrays"
    loaded = data.from_npz(path)
    monkeypatch.setattr(files, "STREAMED_FROM", x[:9].nbytes + 1)
    large = data.from_npz(path)

    assert isinstance(large.train.inputs, data.DiskArray)
    assert not isinstance(large.test.inputs, data.DiskArray)
    assert large.notes == (
        "x_train (4.8 kB) stays in its file, and is read from there during training.",
    )
    assert loaded.notes == ()
    for array, expected in zip(
        (*large.train, *large.test), (*loaded.train, *loaded.test), strict=True
    ):
        np.testing.assert_array_equal(np.asarray(array), expected)


@pytest.mark.parametrize("how", ["compressed", "column-major"])
def test_large_array_that_cannot_stay_in_its_file_is_loaded_and_noted(tmp_path, monkeypatch, how):
    x = np.arange(600).reshape(50, 3, 4)
    save, x = (np.savez_compressed, x) if how == "compressed" else (np.savez, np.asfortranarray(x))
    save(tmp_path / "arrays.npz", x_train=x, y_train=np.arange(50) % 3)
    monkeypatch.setattr(files, "STREAMED_FROM", 4000)
    dataset = data.from_npz(tmp_path / "arrays.npz")
    assert isinstance(dataset.train.inputs, np.ndarray)
    assert (
        "x_train (4.8 kB) was loaded into memory, as it is compressed or in column-major order"
        in dataset.notes[0]
    )


def test_folder_without_the_arrays_is_refused(tmp_path):
    np.save(tmp_path / "x_train.npy", np.zeros((3, 2)))
    with pytest.raises(
        InputError, match=r"is a folder without y_train.npy; save the arrays in it with numpy.save"
    ):
        data.from_npz(tmp_path)


def test_truncated_large_array_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "STREAMED_FROM", 1)
    np.save(tmp_path / "x_train.npy", np.zeros((50, 20)))
    np.save(tmp_path / "y_train.npy", np.zeros(50, int))
    with (tmp_path / "x_train.npy").open("r+b") as file:
        file.truncate(500)
    with pytest.raises(
        InputError, match=r"has a damaged array x_train .it is shorter than the shape in its header"
    ):
        data.from_npz(tmp_path)
