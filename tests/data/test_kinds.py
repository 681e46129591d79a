"""Columns of words, gaps and dates are converted as by scikit-learn, fit on the training split."""

import json
import subprocess
import sys
from dataclasses import replace
from datetime import datetime

import numpy as np
import pytest
import tables
from sklearn.compose import ColumnTransformer
from sklearn.datasets import load_wine
from sklearn.impute import SimpleImputer
from sklearn.metrics import roc_auc_score
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler

import ctde_jax as ctde
from ctde_jax import train
from ctde_jax.bundle.tables import cells_of, read_table
from ctde_jax.data import from_table
from ctde_jax.data.dataset import split_rows
from ctde_jax.data.digests import digests_of
from ctde_jax.errors import InputError

ROWS = tables.census(300)
OPTIONS = {"label": "wealth", "drop": ["id"], "categorical": ["zip"]}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tables.write(tmp_path_factory.mktemp("census") / "t.csv", ROWS)


@pytest.fixture(scope="module")
def data(path):
    return from_table(path, **OPTIONS)


def numbers(name: str) -> np.ndarray:
    """Returns a column as float64, with NaN for gaps; dates are days since 1970."""
    cells = [row[tables.COLUMNS.index(name)] for row in ROWS]
    if name == "hired":
        days = [cell and np.datetime64(cell).astype("datetime64[D]").astype(int) for cell in cells]
        cells = [str(day) for day in days]
    return np.array([float(cell) if cell else np.nan for cell in cells])


def features_of_scikit_learn() -> np.ndarray:
    """Returns hand-made features of all rows, fit on the training rows, in the order of ours."""
    names = tables.COLUMNS
    fit_on, _ = split_rows(len(ROWS))
    plain = make_pipeline(SimpleImputer(strategy="median"), StandardScaler())
    columns = {name: numbers(name)[:, None] for name in ("age", "hired", "hours")}
    words = np.array(ROWS)[:, [names.index("job"), names.index("zip")]].astype(object)
    words[words == "?"] = None
    married = np.array([row[names.index("married")] for row in ROWS])
    parts = []
    for name in names[1:-1]:
        if name in columns:
            parts.append(plain.fit(columns[name][fit_on]).transform(columns[name]))
            if np.isnan(columns[name][fit_on]).any():
                parts.append(np.isnan(columns[name]))
        elif name == "married":
            parts += [(married == "yes")[:, None], (married == "NA")[:, None]]
        else:
            cells = words[:, [0 if name == "job" else 1]]
            present = cells[fit_on][[cell is not None for cell in cells[fit_on, 0]]]
            encoder = OneHotEncoder(handle_unknown="ignore", sparse_output=False).fit(present)
            one_hot = encoder.transform(cells)
            parts += [one_hot, 1 - one_hot.sum(axis=1, keepdims=True)]
    return np.concatenate(parts, axis=1)


def test_inputs_equal_those_of_scikit_learn(data):
    train_rows, test_rows = split_rows(len(ROWS))
    expected = features_of_scikit_learn()
    np.testing.assert_allclose(data.train.inputs, expected[train_rows], atol=1e-5)
    np.testing.assert_allclose(data.test.inputs, expected[test_rows], atol=1e-5)
    assert data.train.inputs.dtype == np.float32
    assert (data.shift, data.scale) == (0, 1)


def test_kinds_and_gaps_are_those_of_the_training_split(data):
    train_rows, _ = split_rows(len(ROWS))
    assert {column.name: column.kind for column in data.recipe.columns} == {
        "age": "number",
        "job": "category",
        "zip": "category",
        "hired": "date",
        "married": "boolean",
        "hours": "number",
    }
    age = data.recipe.columns[0]
    assert age.missing == np.isnan(numbers("age")[train_rows]).sum()
    assert age.median == np.nanmedian(numbers("age")[train_rows])


def test_category_of_the_test_split_alone_is_unknown(path, data, tmp_path):
    _, test_rows = split_rows(len(ROWS))
    rows = [list(row) for row in ROWS]
    rows[test_rows[0]][tables.COLUMNS.index("job")] = "astronaut"
    other = from_table(tables.write(tmp_path / "t.csv", rows), **OPTIONS)
    assert other.recipe == data.recipe
    assert other.test.inputs[0, other.columns.index("job is other")] == 1


def test_renamed_category_changes_the_digest_of_the_recipe(data):
    """The inputs are the same, but a node would not know the old name."""
    columns = tuple(
        column._replace(values=("accountant", *column.values[1:]))
        if column.name == "job"
        else column
        for column in data.recipe.columns
    )
    renamed = replace(data, recipe=data.recipe._replace(columns=columns))
    differing = {
        name for name, digest in digests_of(renamed).items() if digest != digests_of(data)[name]
    }
    assert differing == {"the recipe of the columns"}


def test_single_name_is_a_column(path, data):
    assert from_table(path, "wealth", drop="id", categorical="zip").recipe == data.recipe


def test_table_of_numbers_has_no_recipe(tmp_path):
    rows = [[str(number), str(number % 7), "xy"[number % 2]] for number in range(20)]
    data = from_table(tables.write(tmp_path / "t.csv", rows, ["a", "b", "y"]), drop=["b"])
    assert data.recipe is None
    assert data.columns == ("a",)


def test_typo_does_not_make_numbers_categories(tmp_path):
    rows = [[f"{number}.5", "xy"[number % 2]] for number in range(20)]
    rows[3][0] = "3,5"
    with pytest.raises(InputError, match="has '3,5' in line 5, column 'a', which is not a finite"):
        from_table(tables.write(tmp_path / "t.csv", rows, ["a", "y"]))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            {"task": "regresion"},
            "task must be one of auto, classification, regression, got 'regresion'; did you mean "
            "'regression'?",
        ),
        (
            {"drop": ["ages"]},
            "drop must be one of id, age, job, zip, hired, married, hours, wealth, got 'ages'; did "
            "you mean 'age'?",
        ),
        (
            {"categorical": ["zipcode"]},
            "categorical must be one of id, age, job, zip, hired, married, hours, wealth, got "
            "'zipcode'; did you mean 'zip'?",
        ),
        ({"drop": "ids"}, "drop must be one of id, age"),
        ({"drop": ["wealth"]}, "drop must not contain the label 'wealth'; pass another column."),
        (
            {"categorical": ["wealth"]},
            "categorical must not contain the label 'wealth'; pass another column.",
        ),
        ({"drop": tables.COLUMNS[:-1]}, "has no column of features"),
        ({}, "has 300 distinct words in the 300 cells of column 'id', which look like names or"),
    ],
)
def test_unsuitable_columns_are_refused(path, options, sentence):
    with pytest.raises(InputError) as caught:
        from_table(path, "wealth", **options)
    assert str(caught.value).startswith((sentence, f"data_file {path} {sentence}"))


def test_names_of_columns_require_a_header(tmp_path):
    (tmp_path / "t.csv").write_text("1.5,2,x\n2.5,3,y\n3.5,4,x\n")
    with pytest.raises(InputError) as caught:
        from_table(tmp_path / "t.csv", drop=["1"])
    assert str(caught.value) == (
        f"drop must be names of columns, got '1', but {tmp_path / 't.csv'} has no header line; add "
        "one."
    )


def frames(rows, names):
    import pandas
    import polars

    def value(name: str, cell: str):
        if cell in ("", "?", "NA"):
            return None
        if name in ("age", "zip", "hours"):
            return float(cell) if name == "hours" else int(cell)
        if name == "hired":
            return np.datetime64(cell).item()
        return cell == "yes" if name == "married" else cell

    columns = {
        name: [value(name, cell) for cell in cells]
        for name, cells in zip(names, zip(*rows, strict=True), strict=True)
    }
    return {"pandas": pandas.DataFrame(columns), "polars": polars.DataFrame(columns)}


@pytest.mark.parametrize("kind", ["pandas", "polars", "parquet"])
def test_frames_equal_the_csv_file(data, tmp_path, kind):
    """Pandas stores integers with gaps as floats."""
    source = frames(ROWS, tables.COLUMNS)["polars" if kind == "parquet" else kind]
    if kind == "parquet":
        source.write_parquet(tmp_path / "t.parquet")
        source = tmp_path / "t.parquet"
    other = from_table(source, **OPTIONS)
    assert other.recipe == data.recipe
    np.testing.assert_array_equal(other.train.inputs, data.train.inputs)
    np.testing.assert_array_equal(other.test.labels, data.test.labels)


def test_missing_values_of_pandas_are_gaps():
    import pandas

    frame = pandas.DataFrame(
        {
            "integer": pandas.array([1, None, 3] * 10, dtype="Int64"),
            "word": pandas.array(["u", None, "v"] * 10, dtype="string"),
            "day": pandas.to_datetime(["2024-01-01", None, "2024-01-03"] * 10),
            "category": pandas.Categorical(["p", "q", None] * 10),
            "label": [0, 1, 1] * 10,
        }
    )
    data = from_table(frame)
    train_rows, _ = split_rows(30)
    assert [(column.kind, column.missing) for column in data.recipe.columns] == [
        ("number", sum(train_rows % 3 == 1)),
        ("category", sum(train_rows % 3 == 1)),
        ("date", sum(train_rows % 3 == 1)),
        ("category", sum(train_rows % 3 == 2)),
    ]


@pytest.mark.parametrize("library", ["pandas", "polars"])
def test_times_of_frame_are_those_of_its_csv_file(library, tmp_path):
    """If all times are 0:00, pandas writes dates; polars writes `T` between date and time."""
    times = [datetime(2024, 1, day, hour) for day in range(1, 11) for hour in (0, 6, 12)]
    columns = {
        "day": [time.replace(hour=0) for time in times],
        "time": [None, *times[1:]],
        "label": [0, 1, 1] * 10,
    }
    frame = pytest.importorskip(library).DataFrame(columns)
    path = tmp_path / "t.csv"
    frame.to_csv(path, index=False) if library == "pandas" else frame.write_csv(path)

    data = from_table(frame)
    assert [column.pattern for column in data.recipe.columns] == [
        "0000-00-00",
        "0000-00-00T00:00:00",
    ]
    rows = read_table(path)
    cells = {name: cells_of(path, rows, name) for name in rows.names}
    encoded = data.recipe.encode(cells)
    for split, places in zip((data.train, data.test), split_rows(30), strict=True):
        np.testing.assert_array_equal(split.inputs, encoded[places])


@pytest.mark.parametrize("as_frame", [False, True])
def test_bunch_of_scikit_learn_is_a_table(as_frame):
    data = from_table(load_wine(as_frame=as_frame))
    assert data.columns == tuple(load_wine().feature_names)
    assert len(data.classes) == 3
    both = np.concatenate([data.train.inputs, data.test.inputs])
    np.testing.assert_array_equal(
        np.sort(both, axis=0), np.sort(load_wine().data.astype(np.float32), axis=0)
    )


@pytest.mark.parametrize("source", [3, [[1, 2]], np.ones((3, 2))])
def test_source_that_is_no_table_is_refused(source):
    with pytest.raises(InputError) as caught:
        from_table(source)
    assert str(caught.value) == (
        "source must be the path of a csv or parquet file, a data frame or a sklearn Bunch, got "
        f"{type(source).__name__}."
    )


def test_damaged_parquet_file_is_refused(tmp_path):
    (tmp_path / "t.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(InputError, match=r"t\.parquet is not a complete parquet file .*; write or"):
        from_table(tmp_path / "t.parquet")


@pytest.mark.slow
def test_plan_of_the_command_lists_the_columns(path, tmp_path, capsys):
    arguments = ["--dataset", "csv", "--data-file", str(path), "--label-column", "wealth"]
    arguments += ["--drop", "id", "--categorical", "zip", "--steps", "2", "--devices", "1"]
    assert train.main([*arguments, "--run-dir", str(tmp_path / "run")]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "columns column kind missing inputs" in lines
    assert "zip category 0 one-hot, 8 and others" in lines
    found = ctde.load_run(tmp_path / "run")
    assert found.data.recipe == from_table(path, **OPTIONS).recipe

    assert train.main([*arguments[:4], "--drop", "wealth", "--devices", "1"]) == 2
    assert capsys.readouterr().err == (
        "error: --drop must not contain the label 'wealth'; pass another column.\n"
    )


@pytest.mark.slow
def test_auroc_equals_that_of_scikit_learn(tmp_path):
    """40,000 rows, of which 3 % are positive, on 1 and 4 devices; a node has numpy alone."""
    rows = tables.census(40_000)
    path = tables.write(tmp_path / "t.csv", rows)
    arguments = ["--dataset", "csv", "--data-file", str(path), "--drop", "id", "--epochs", "15"]
    arguments += ["--categorical", "zip", "--activation", "relu", "--hidden-sizes", "32", "16"]
    arguments += ["--learning-rate", "0.001", "--schedule", "constant", "--batch-size", "200"]

    # Hand-made features for scikit-learn, in the same split.
    frame = frames(rows, tables.COLUMNS)["pandas"]
    frame["hired"] = (frame["hired"].astype("datetime64[s]") - np.datetime64("1970-01-01")).dt.days
    frame["married"] = frame["married"].astype("float64")
    quantities = ["age", "hired", "married", "hours"]
    features = ColumnTransformer(
        [
            (
                "numbers",
                make_pipeline(
                    SimpleImputer(strategy="median", add_indicator=True), StandardScaler()
                ),
                quantities,
            ),
            ("words", OneHotEncoder(handle_unknown="ignore"), ["job", "zip"]),
        ]
    )
    fit_on, test_on = split_rows(len(rows))
    x = features.fit(frame.iloc[fit_on]).transform(frame)
    y = (frame["wealth"] == "rich").to_numpy()
    peers = []
    for seed in range(2):
        peer = MLPClassifier(
            (32, 16), batch_size=200, alpha=0.0, max_iter=15, n_iter_no_change=15, random_state=seed
        )
        with pytest.warns(match="Maximum iterations"):
            peer.fit(x[fit_on], y[fit_on])
        peers.append(roc_auc_score(y[test_on], peer.predict_proba(x[test_on])[:, 1]))

    for replicas in ("1", "4"):
        folder = tmp_path / replicas
        assert train.main([*arguments, "--devices", replicas, "--run-dir", str(folder)]) == 0
        trained, data, _ = ctde.load_run(folder)
        outputs = trained.predict(data.test.inputs)
        area = roc_auc_score(data.test.labels, outputs[:, 1] - outputs[:, 0])
        print(replicas, area, peers)
        assert area == pytest.approx(np.mean(peers), abs=0.005)
        ctde.write_bundle(trained, data, folder / "bundle", ["numpy"], show=False)

    # Raw rows, in a process that cannot import the packages of the trainer.
    few = tables.write(tmp_path / "few.csv", [rows[place] for place in test_on[:50]])
    blocked = "import sys; sys.modules.update(dict.fromkeys(['jax', 'flax', 'rich', 'sklearn']))"
    code = f"{blocked}; from ctde_jax.execute import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, str(tmp_path / "4" / "bundle")]
    command += ["--input", str(few), "--json"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    labels = [json.loads(line)["label"] for line in lines]
    assert labels == [data.classes[place] for place in outputs[:50].argmax(axis=1)]
