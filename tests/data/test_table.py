"""Decisions about a user's table are right, and are noted."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from sklearn.preprocessing import StandardScaler

import ctde_jax as ctde
from ctde_jax.bundle import inputs as node_inputs
from ctde_jax.data import from_table
from ctde_jax.errors import InputError

RNG = np.random.default_rng(0)
LINES = 60
X = RNG.normal(size=(LINES, 4)).round(4)
WORDS = [["setosa", "versicolor", "virginica"][line % 3] for line in range(LINES)]
MIXED = [line * 7 % LINES for line in range(LINES)]
"""Line numbers, shuffled."""


def write(folder: Path, header: str | None, *columns) -> Path:
    path = folder / "t.csv"
    lines = [",".join(map(str, cells)) for cells in zip(*columns, strict=True)]
    path.write_text("\n".join([*([] if header is None else [header]), *lines]) + "\n")
    return path


def error_message(*arguments) -> str:
    with pytest.raises(InputError) as caught:
        from_table(*arguments)
    return str(caught.value)


def all_inputs(dataset: ctde.data.Dataset) -> np.ndarray:
    """Returns the inputs of both splits, in a fixed order."""
    both = np.concatenate([dataset.train.inputs, dataset.test.inputs])
    return both[np.lexsort(both.T)]


PIXELS = [RNG.permutation(LINES) % 17 for _ in range(64)]
"""Columns that contain every number from 0 to 16."""

CYCLE = [line % 3 for line in range(LINES)]
SOME_WHOLE = [
    [f"{line % 11 / 5 * (column + 1) + column / 10:g}" for line in range(1, LINES + 1)]
    for column in range(4)
]

HEADERS = {
    "numbered, as pandas writes an array": ("0,1,2,3,label", [*X.T, WORDS]),
    "numbered, labels are numbers": ("0,1,2,3,label", [*X.T, [line % 3 for line in range(LINES)]]),
    "numbered to the label": ("0,1,2,3,4", [*X.T, [line % 3 for line in range(LINES)]]),
    "numbered to a label that occurs": ("0,1,2,3,4", [*X.T, [line % 5 for line in range(LINES)]]),
    "two columns, numbered to a label that occurs": (
        "0,1,2",
        [*X.T[:2], [line % 3 for line in range(LINES)]],
    ),
    "one column": ("0,label", [X[:, 0], WORDS]),
    "index and numbers": (",0,1,2,3,label", [range(LINES), *X.T, WORDS]),
    "index and numbers to the label": (
        ",0,1,2",
        [range(LINES), *X.T[:2], [line % 3 for line in range(LINES)]],
    ),
    "years above decimals": ("2018,2019,2020,2021,label", [*X.T, WORDS]),
    "years above integers": (
        "2019,2020,2021,label",
        [MIXED, [line % 11 for line in range(LINES)], [line % 5 for line in range(LINES)], WORDS],
    ),
    "years above numbers as labels": (
        "2019,2020,label",
        [MIXED, MIXED[::-1], [line % 2 for line in range(LINES)]],
    ),
    "words": ("a,b,c,d,species", [*X.T, WORDS]),
    "the label's number first": ("64," + ",".join(map(str, range(64))), [CYCLE, *PIXELS]),
    "some numbers of pixels": ("64,10,20,30,21", [CYCLE, *PIXELS[:3], PIXELS[3]]),
    "a label's number below the others": ("10,20,30,9", [*PIXELS[:3], CYCLE]),
    "a label's number that occurs": ("2,3,4,5,9", [*X.T, [line % 10 for line in range(LINES)]]),
    "some decimals that are whole": (
        "2,3,4,5,9",
        [*SOME_WHOLE, [line % 10 for line in range(LINES)]],
    ),
    "a decimal column among whole ones": ("30,7,21,9", [PIXELS[0], X[:, 0], X[:, 1], CYCLE]),
    "names as labels, each twice": (
        "3,5,7,name",
        [*X.T[:3], [f"name {line // 2}" for line in range(LINES)]],
    ),
}


@pytest.mark.parametrize("name", HEADERS)
def test_header_is_not_an_example(tmp_path, name):
    header, columns = HEADERS[name]
    dataset = from_table(write(tmp_path, header, *columns))
    assert len(dataset.train.inputs) + len(dataset.test.inputs) == LINES
    assert len(dataset.classes) == len(set(columns[-1]))
    assert dataset.notes[0].startswith(
        "Line 1 contains the column names; the labels are in the column "
    )
    assert dataset.columns == tuple(header.strip(",").split(",")[:-1])


NO_HEADERS = {
    "decimals": [*X.T, WORDS],
    "first label occurs once": [*X.T, ["rare", *WORDS[1:]]],
    "truth table": [[0, 0, 1, 1], [1, 0, 0, 1], ["odd", "even", "odd", "even"]],
    "truth table of numbers": [[0, 0, 1, 1], [1, 0, 0, 1], [1, 0, 1, 0]],
    "integers": [MIXED, MIXED[::-1], WORDS],
    "rankings": [*np.array([np.roll([3, 1, 0, 4, 2], line % 5) for line in range(LINES)]).T],
    "counts, the largest first": [
        *[[900 // line + column for line in range(1, LINES + 1)] for column in (7, 55)],
        CYCLE,
    ],
    "an outlier first": [[500, *PIXELS[0][1:]], [900, *PIXELS[1][1:]], CYCLE],
    "one more label first": [[11, *PIXELS[0][1:]], [9, *PIXELS[1][1:]], [3, *CYCLE[1:]]],
    "rounded lines": [[5, *X[1:-1, 0], 4], [3, *X[1:-1, 1], 2], [1, *X[1:-1, 2], 7], WORDS],
    "a multiplication table": [
        *[[line * column for line in range(1, LINES + 1)] for column in range(1, 5)],
        CYCLE,
    ],
}


@pytest.mark.parametrize("name", NO_HEADERS)
def test_first_example_is_not_a_header(tmp_path, name):
    columns = NO_HEADERS[name]
    dataset = from_table(write(tmp_path, None, *columns))
    assert len(dataset.train.inputs) + len(dataset.test.inputs) == len(columns[-1])
    assert dataset.notes[0].startswith("There is no header line")


@pytest.mark.parametrize(
    ("columns", "sentence"),
    [
        (
            [[4, 1, 2], [5, 2, 3], [9, 1, 1]],
            "no other line has its label, '9', and its other cells are distinct integers",
        ),
        (
            [[2, *PIXELS[0]], [3, *PIXELS[1]], [5, *PIXELS[2]], [1, *CYCLE]],
            "its cells are increasing integers; ",
        ),
        (
            [[3, 1, 2], [5, 2, 3], [7, 1, 1], ["name", "ann", "bob"]],
            "no other line has its label, 'name', and its",
        ),
        (
            [[4, *PIXELS[0]], [2, *PIXELS[1]], [0, *PIXELS[2]], [3, *PIXELS[3]], [1, *CYCLE]],
            "are all numbers from 0",
        ),
    ],
)
def test_first_example_that_may_be_a_header_is_noted(tmp_path, columns, sentence):
    notes = from_table(write(tmp_path, None, *columns)).notes
    assert notes[0].startswith("There is no header line")
    assert notes[1].startswith("Line 1 is used as an example, although ")
    assert sentence in notes[1]
    assert notes[1].endswith(
        "; if it contains the column names, pass the name of the label column, or add a letter "
        "to each name."
    )


def test_named_label_column_makes_the_first_line_a_header(tmp_path):
    """Even if the line looks like an example."""
    dataset = from_table(write(tmp_path, "0,1,5", MIXED, MIXED[::-1], [5, *[0, 1] * 29, 1]), "5")
    assert len(dataset.train.inputs) + len(dataset.test.inputs) == LINES
    numbered = write(tmp_path, "0,1,2,3,label", *X.T, WORDS)
    assert from_table(numbered, "label").classes == ("setosa", "versicolor", "virginica")


def test_missing_cell_does_not_make_an_example_a_header(tmp_path):
    for missing in ("", "NA", "?"):
        path = write(tmp_path, None, [missing, *X[1:, 0]], X[:, 1], WORDS)
        assert error_message(path) == (
            f"data_file {path} has columns without names, although some contain words, dates or "
            "gaps; add a line with the names of all columns."
        )


@pytest.mark.parametrize("name", ["", "Unnamed: 0", "Unnamed: 0.1"])
@pytest.mark.parametrize("values", [range(LINES), MIXED, [f"row {line}" for line in range(LINES)]])
def test_index_of_pandas_is_left_out(tmp_path, name, values):
    """In file order, shuffled, or words; in sorted files, the index reveals the label."""
    dataset = from_table(write(tmp_path, f"{name},a,b,c,d,species", values, *X.T, sorted(WORDS)))
    plain = from_table(write(tmp_path, "a,b,c,d,species", *X.T, sorted(WORDS)))
    np.testing.assert_array_equal(all_inputs(dataset), all_inputs(plain))
    assert dataset.columns == ("a", "b", "c", "d")
    assert (
        "The first column has no name, like the index that pandas writes, and is not used."
        in dataset.notes
    )


def test_all_levels_of_an_index_are_left_out(tmp_path):
    dataset = from_table(write(tmp_path, ",,a,b,c,d,y", MIXED, range(LINES), *X.T, WORDS))
    assert dataset.train.inputs.shape[1] == 4
    assert (
        "The first 2 columns have no names, like the index that pandas writes, and are not used."
        in dataset.notes
    )


@pytest.mark.parametrize("start", [0, 1])
def test_column_that_numbers_the_lines_is_left_out(tmp_path, start):
    dataset = from_table(write(tmp_path, "id,a,y", range(start, LINES + start), X[:, 0], WORDS))
    assert dataset.columns == ("a",)
    assert "The column 'id' numbers the lines and is not used." in dataset.notes


@pytest.mark.parametrize(
    ("header", "column"),
    [
        ("n,a,y", range(100, 100 + 3 * LINES, 3)),
        ("customer_id,a,y", MIXED),
        (None, range(LINES)),
    ],
)
def test_column_like_an_identifier_is_kept_and_noted(tmp_path, header, column):
    dataset = from_table(write(tmp_path, header, column, X[:, 0], WORDS))
    assert dataset.train.inputs.shape[1] == 2
    name = "1" if header is None else repr(header.split(",")[0])
    assert any(
        note.startswith(f"The column {name} has a different integer in every")
        for note in dataset.notes
    )


def test_column_that_determines_the_label_is_noted(tmp_path):
    lengths = [len(word) for word in WORDS]
    for code, is_named in (
        (lengths, True),
        (np.minimum(lengths, 9), False),
        ([*lengths[:-1], 8], False),
    ):
        notes = from_table(write(tmp_path, "code,a,y", code, X[:, 0], WORDS)).notes
        assert (
            any(
                note.startswith("The column 'code' has one distinct number per class")
                for note in notes
            )
            is is_named
        )


@pytest.mark.parametrize("value", [0, 0.1, 1e30])
def test_constant_column_is_noted_and_stays_finite(tmp_path, value):
    dataset = from_table(write(tmp_path, "a,b,y", [value] * LINES, X[:, 0], WORDS))
    assert f"The column 'a' is '{value}' in every line, so it has no effect." in dataset.notes
    seen = (dataset.train.inputs - dataset.shift) * dataset.scale
    np.testing.assert_array_equal(seen[:, 0], 0)


def test_feature_that_is_constant_in_training_has_a_scale_of_0():
    """The rounded mean of equal numbers differs from them, so their deviation is not 0."""
    inputs = np.full((12, 1), 0.1, np.float32)
    test = inputs + 0.1
    dataset = ctde.data.standardized(ctde.data.from_arrays(inputs, [0, 1] * 6, test, [0, 1] * 6))
    np.testing.assert_array_equal((test - dataset.shift) * dataset.scale, 0)


MERGED = {
    "timestamps of a minute": [1_700_000_000 + line for line in MIXED],
    "timestamps of an hour": [1_700_000_000 + 60 * line for line in MIXED],
    "identifiers above 2^53": [2**53 + line for line in MIXED],
    "identifiers above 2^60": [2**60 + line for line in MIXED],
    "money": [f"{12345678 + line}.50" for line in MIXED],
    "tiny differences": [f"1.{'0' * 20}{line:02d}" for line in MIXED],
}


@pytest.mark.parametrize("name", MERGED)
def test_column_that_float32_merges_is_refused(tmp_path, name):
    sentence = error_message(write(tmp_path, "a,time,y", X[:, 0], MERGED[name], WORDS))
    assert "in column 'time', which are equal in float32; subtract the minimum, " in sentence
    assert f"{MERGED[name][0]!s}" in sentence, "the error must contain the number of the first line"


def test_numbers_without_their_minimum_stay_distinct(tmp_path):
    dataset = from_table(write(tmp_path, "a,time,y", X[:, 0], MIXED, WORDS))
    assert len(np.unique(all_inputs(dataset)[:, 1])) == LINES


def test_negligible_rounding_to_float32_is_noted(tmp_path):
    """Timestamps of a year, two of which are equal in float32."""
    timestamps = [1_700_000_000 + 500_000 * line for line in MIXED]
    timestamps[1] = timestamps[0] + 1
    dataset = from_table(write(tmp_path, "time,y", timestamps, WORDS))
    (note,) = (
        note
        for note in dataset.notes
        if "become equal in float32 in the column 'time'; the rounding error" in note
    )
    rounded = np.array(timestamps, np.float32).astype(float)
    right = np.abs(rounded - timestamps).max() / np.std(timestamps)
    assert f"is at most {right:.0e} of the standard deviation." in note


def test_columns_are_standardized_as_by_scikit_learn(tmp_path):
    columns = [1e6 + 1000 * X[:, 0], 1e-6 * X[:, 1], X[:, 2]]
    dataset = from_table(write(tmp_path, "a,b,c,y", *columns, WORDS))
    seen = (dataset.train.inputs - dataset.shift) * dataset.scale
    right = StandardScaler().fit_transform(dataset.train.inputs.astype(np.float64))
    np.testing.assert_allclose(seen, right, atol=1e-3)


MEASURED = {
    "prices": RNG.integers(100_000, 900_000, LINES),
    "a few equal prices": [line // 2 * 37 for line in range(LINES)],
    "ranks": range(LINES),
}


@pytest.mark.parametrize("name", MEASURED)
def test_integer_measurements_are_refused_as_classes(tmp_path, name):
    sentence = error_message(write(tmp_path, "a,price", X[:, 0], MEASURED[name]))
    assert (
        "distinct integers in 60 lines, which look like measurements, not classes; pass "
        "task='regression' (--task regression) to predict them, pass task='classification' (--task "
        "classification) if they are classes, or pass the column "
    ) in sentence


@pytest.mark.parametrize("name", MEASURED)
def test_named_task_determines_the_use_of_integer_labels(tmp_path, name):
    path = write(tmp_path, "a,price", X[:, 0], MEASURED[name])
    of_classes = from_table(path, task="classification")
    assert len(of_classes.classes) == len({*MEASURED[name]})
    of_targets = from_table(path, task="regression")
    labels = np.concatenate([of_targets.train.labels, of_targets.test.labels])
    assert (of_targets.classes, labels.dtype) == ((), np.float32)
    assert sorted(labels) == sorted(np.float32(MEASURED[name]))
    assert not any("used as classes" in note for note in of_classes.notes + of_targets.notes)


def test_words_as_targets_are_refused(tmp_path):
    path = write(tmp_path, "a,kind", X[:, 0], WORDS)
    with pytest.raises(InputError) as caught:
        from_table(path, task="regression")
    assert str(caught.value) == (
        f"data_file {path} has labels such as 'setosa' in column 'kind', which are not numbers; "
        "pass task='classification' (--task classification), or the column of the targets as label "
        "(--label-column)."
    )


def test_mostly_distinct_words_are_refused_as_classes(tmp_path):
    """Dates are refused; the column of words before them has the classes."""
    # The last day has one line, and the others have two.
    days = [f"2024-01-{line // 2 + 1:02d}" for line in range(31)]
    path = write(tmp_path, "a,kind,day", X[:31, 0], WORDS[:31], days)
    assert error_message(path) == (
        f"data_file {path} has labels such as '2024-01-01' in column 'day', 16 distinct ones in 31 "
        "lines, which look like dates or names, not classes; pass the column that contains the "
        "classes as label (--label-column), or group the labels into fewer classes."
    )
    assert len(from_table(write(tmp_path, "a,day", X[:30, 0], days[:30])).classes) == 15


@pytest.mark.parametrize(
    "labels", [[0, 10, 20, 30, 40] * 2, [3, 5] * 5, [7] * 9 + [8], list("abcde") * 2, range(1, 6)]
)
def test_few_labels_of_few_examples_are_classes(tmp_path, labels):
    assert len(from_table(write(tmp_path, "a,y", X[: len(labels), 0], labels)).classes) == len(
        set(labels)
    )


def test_numbered_classes_of_two_examples_each_are_classes(tmp_path):
    assert (
        len(
            from_table(
                write(tmp_path, "a,y", X[:, 0], [line % 30 for line in range(LINES)])
            ).classes
        )
        == 30
    )


@pytest.mark.parametrize("different", [20, 21])
def test_many_distinct_integers_used_as_classes_are_noted(tmp_path, different):
    dataset = from_table(
        write(tmp_path, "a,age", X[:, 0], [line % different for line in range(LINES)])
    )
    sentence = (
        "The 21 distinct integers in the column 'age' are used as classes; if they are "
        "measurements, "
    )
    assert any(note.startswith(sentence) for note in dataset.notes) == (different > 20)
    assert sum("are used as classes" in note for note in dataset.notes) == (different > 20)


def test_codes_with_leading_zeros_are_words(tmp_path):
    assert from_table(write(tmp_path, "a,zip", X[:, 0], ["01", "1", "001"] * 20)).classes == (
        "001",
        "01",
        "1",
    )


def test_class_without_training_examples_is_noted(tmp_path):
    labels = ["usual"] * 9 + ["rare"]
    # Two of the ten lines are test examples, so the rare class is one of them in two of ten files.
    notes = [
        from_table(write(tmp_path, "a,y", X[:10, 0], labels[k:] + labels[:k])).notes
        for k in range(10)
    ]
    expected = "The test split has examples of the classes rare, but the training split has none."
    assert sum(expected in each for each in notes) == 2


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (
            "id,a,y\n" + "".join(f"C{i},{i}.5,{'xy'[i % 2]}\n" for i in range(20)),
            "has 20 distinct words in the 20 cells of column 'id', which look like names or texts, "
            "not categories; name it in drop (--drop 'id'), or in categorical "
            "(--categorical 'id') to use it.",
        ),
        (
            "day,y\n" + "".join(f"1/{i + 1:02d}/2024,{'xy'[i % 2]}\n" for i in range(20)),
            "write dates as 2024-01-31, or name it in categorical "
            "(--categorical 'day') if these are categories.",
        ),
        (
            "a,y\n" + "1,x\n2,y\n" * 9 + "12a,x\n",
            "has '12a' in line 20, column 'a', which is not a finite float32 number; correct the "
            "cell, or remove the line, or name it in categorical "
            "(--categorical 'a') if these are categories.",
        ),
        (
            "a,day,y\n" + "u,2024-01-01,x\nv,2024-02-01,y\n" * 9 + "u,2024-02-30,x\n",
            "has '2024-02-30' in line 20, column 'day', which is not a valid date of the form "
            "YYYY-MM-DD; write all dates of the column in this format, or "
            "name it in categorical (--categorical 'day').",
        ),
        (
            "a,day,y\n" + "u,2024-01-01,x\nv,2024-02-01T12:00,y\n" * 9,
            "has '2024-02-01T12:00' in line 3, column 'day', which is not a valid date of the form "
            "YYYY-MM-DD",
        ),
        ("a,b,y\n" + "NA,1,x\n?,2,y\n" * 9, "has no value in column 'a'; remove the column"),
        (
            "a,y\n" + '"1,200",x\n"1,5",y\n' * 9,
            "write numbers with decimal points, without thousands separators",
        ),
        (
            "a,y\n1,200,x\n1,300,y\n",
            "has 3 cells in line 2 and 2 in line 1; give every line the same number of",
        ),
        (
            "a;b;y\n1,5;2,5;x\n1,7;2,7;y\n",
            "write numbers with decimal points, without thousands separators or decimal commas",
        ),
        ("1,5;2,5;x\n1,7;2,7;y\n", "write numbers with decimal points, without thousands"),
        (
            "a,b,y,\n1,2,x,\n3,4,y,\n",
            "has an empty last column; remove the comma at the end of each line.",
        ),
        ("a,b,y\n1,,x\n3,,y\n", "has no value in column 'b'; remove the column, or the comma at"),
        ("a,b,y\n1,2,x\na,b,y\n3,4,y\n", "repeats the column names in line 3; remove this line."),
        ("# measured in May\na,b,y\n1,2,x\n3,4,y\n", "has a comment in line 1; remove the line."),
        ("a,a,y\n1,2,x\n3,4,y\n", "has several columns named 'a'; give each a different name."),
        (",y\n1,x\n2,z\n", "has no column of features"),
    ],
)
def test_unusable_table_is_refused(tmp_path, content, sentence):
    (tmp_path / "t.csv").write_text(content)
    assert sentence in error_message(tmp_path / "t.csv")


@pytest.mark.parametrize("separator", [";", "\t", "|"])
def test_separator_does_not_matter(tmp_path, separator):
    path = write(tmp_path, "a,b,c,d,species", *X.T, WORDS)
    expected = from_table(path)
    path.write_text(path.read_text().replace(",", separator))
    dataset = from_table(path)
    np.testing.assert_array_equal(dataset.train.inputs, expected.train.inputs)
    assert (dataset.columns, dataset.classes) == (expected.columns, expected.classes)


@pytest.fixture(scope="module")
def trained_and_bundle(tmp_path_factory):
    """Returns a model of a table with an index, and its bundle."""
    folder = tmp_path_factory.mktemp("table")
    data = from_table(write(folder, ",a,b,c,d,species", range(LINES), *X.T, WORDS))
    options = {"devices": jax.devices()[:1], "batch_size": 24, "epochs": 1, "show": False}
    trained = ctde.fit(ctde.models.mlp([4, 8, 3]), data, optax.adam(0.01), **options)
    return trained, ctde.write_bundle(
        trained, data, folder / "bundle", ["numpy"], show=False
    ).bundle


FILES = {
    "as in training": (",a,b,c,d,species", [range(LINES), *X.T, WORDS]),
    "without the index": ("a,b,c,d,species", [*X.T, WORDS]),
    "without the label": (",a,b,c,d", [range(LINES), *X.T]),
    "features alone": ("a,b,c,d", [*X.T]),
    "in another order, with more": (
        "d,species,c,more,b,a",
        [X[:, 3], WORDS, X[:, 2], WORDS, X[:, 1], X[:, 0]],
    ),
    "without names": (None, [*X.T]),
}


@pytest.mark.parametrize("name", FILES)
def test_node_finds_the_features_by_their_names(trained_and_bundle, tmp_path, name):
    trained, bundle = trained_and_bundle
    header, columns = FILES[name]
    read = node_inputs.read([write(tmp_path, header, *columns)], bundle.card)
    predict = ctde.bundle.load(bundle, "numpy")
    np.testing.assert_allclose(predict(read.inputs), trained.predict(X), atol=1e-5)


def test_node_refuses_a_table_without_a_feature(trained_and_bundle, tmp_path):
    with pytest.raises(
        InputError, match=r"has no column 'd'; name its columns like those of the training table"
    ):
        node_inputs.read([write(tmp_path, "a,b,c,e", *X.T)], trained_and_bundle[1].card)


@pytest.fixture(scope="module")
def numbered(tmp_path_factory):
    """Returns the card of a model of a table whose column names are numbers."""
    folder = tmp_path_factory.mktemp("numbered")
    data = from_table(write(folder, "0,1,2,3,label", *PIXELS[:4], WORDS))
    options = {"devices": jax.devices()[:1], "batch_size": 24, "epochs": 1, "show": False}
    trained = ctde.fit(ctde.models.mlp([4, 8, 3]), data, optax.adam(0.01), **options)
    return ctde.write_bundle(trained, data, folder / "bundle", ["numpy"], show=False).bundle.card


@pytest.mark.parametrize("header", ["1,2,3,4", "7,8,9,10", "0,2,3,9", "1,2,3,4,label", "0,1,2,4"])
@pytest.mark.parametrize("decimals", [False, True])
def test_node_refuses_other_column_numbers(numbered, tmp_path, header, decimals):
    columns = [*(X.T if decimals else PIXELS[:4]), WORDS][: len(header.split(","))]
    with pytest.raises(
        InputError, match=r"has no column '\d'.*; name its columns like those of the training table"
    ):
        node_inputs.read([write(tmp_path, header, *columns)], numbered)


def test_node_skips_column_numbers_if_the_model_has_no_names(numbered, tmp_path):
    path = write(tmp_path, "1,2,3,4", *PIXELS[:4])
    read = node_inputs.read([path], dataclasses.replace(numbered, columns=()))
    np.testing.assert_array_equal(read.inputs, np.array(PIXELS[:4]).T)


@pytest.mark.parametrize("first", [[3, 1, 4, 2], [1, 2, 3, 5], [1, 2, 3, 4]])
def test_node_reads_integers_as_an_example(numbered, tmp_path, first):
    rows = np.array([first, [5, 2, 7, 1], [2, 3, 4, 5]])
    read = node_inputs.read(
        [write(tmp_path, None, *rows.T)], dataclasses.replace(numbered, columns=())
    )
    np.testing.assert_array_equal(read.inputs, rows)


@pytest.mark.parametrize("header", [None, ",w,x,y,z"])
@pytest.mark.parametrize("lines", [1, 2, LINES])
@pytest.mark.parametrize("start", [0, 1])
def test_node_refuses_an_index_instead_of_a_feature(numbered, tmp_path, lines, start, header):
    path = write(tmp_path, header, range(start, lines + start), *X[:lines].T)
    with pytest.raises(
        InputError,
        match=r"numbers its lines in the first column.*; remove the index, or add a header",
    ):
        node_inputs.read([path], dataclasses.replace(numbered, columns=()))


@pytest.mark.parametrize("lines", [1, 2, LINES])
def test_node_accepts_a_feature_that_numbers_the_lines_if_labels_follow(numbered, tmp_path, lines):
    path = write(tmp_path, None, range(lines), *X[:lines, :3].T, WORDS[:lines])
    read = node_inputs.read([path], numbered, labeled=True)
    np.testing.assert_array_equal(read.inputs[:, 0], range(lines))
    assert read.labels is not None
    assert [numbered.classes[label] for label in read.labels] == WORDS[:lines]


def test_table_is_converted_like_another(tmp_path):
    """The second table has fewer categories and classes, no gaps, and other numbers."""
    first, second = tmp_path / "first.csv", tmp_path / "second.csv"
    rows = [f"{age},{job},{label}" for age in (20, 40, "") for job in "xyz" for label in "bac"]
    first.write_text("\n".join(["age,job,y", *rows * 3]))
    second.write_text("\n".join(["y,job,age", *["c,z,90", "a,y,1"] * 10]))
    like = from_table(first, label="y")
    found = from_table(second, like=like)

    assert (found.classes, found.columns, found.recipe) == (like.classes, like.columns, like.recipe)
    expected = like.recipe.encode({"age": ["90", "1"], "job": ["z", "y"]})
    for inputs, label in zip(*found.test, strict=True):
        np.testing.assert_array_equal(inputs, expected[0 if label == 2 else 1])


def test_table_of_numbers_is_scaled_like_another(tmp_path):
    first, second = tmp_path / "first.csv", tmp_path / "second.csv"
    first.write_text("\n".join(["a,b,y", *[f"{i % 7}.5,{i % 5},{'uv'[i % 2]}" for i in range(40)]]))
    second.write_text("\n".join(["b,y,a", *[f"{i % 3},{'vu'[i % 2]},{i % 4}" for i in range(40)]]))
    like = from_table(first)
    found = from_table(second, "y", like=like)
    np.testing.assert_array_equal(found.scale, like.scale)
    np.testing.assert_array_equal(found.shift, like.shift)
    assert found.train.inputs[:, 0].max() == 3


@pytest.mark.parametrize(
    ("content", "options", "sentence"),
    [
        ("a,y\n1,u\n2,v", {}, "like must be one of a, y, got 'b'"),
        ("a,b,y\n1,1,u\n2,1,w", {}, "like must be one of u, v, got 'w'"),
        ("a,b,y\n1,1,u\n2,1,v", {"drop": "b"}, "drop must not be set with like"),
    ],
)
def test_unlike_tables_are_refused(tmp_path, content, options, sentence):
    first, second = tmp_path / "first.csv", tmp_path / "second.csv"
    first.write_text("\n".join(["a,b,y", *[f"{i % 7},{i % 5}.5,{'uv'[i % 2]}" for i in range(40)]]))
    second.write_text(content)
    with pytest.raises(InputError, match=sentence.replace("?", r"\?")):
        from_table(second, "y", like=from_table(first), **options)
