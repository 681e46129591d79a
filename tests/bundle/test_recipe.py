"""A recipe converts cells to inputs by closed forms, and a node reads raw rows by it."""

import io
import json
import sys
from datetime import date, datetime

import numpy as np
import optax
import pytest
import tables

import ctde_jax as ctde
from ctde_jax.bundle import Recipe, cell_of, inputs
from ctde_jax.bundle.recipe import Column, Unreadable, days_of, parse_recipe
from ctde_jax.data import from_table
from ctde_jax.errors import InputError
from ctde_jax.execute import main

AGE = Column("age", "number", missing=2, median=40.0, mean=38.0, deviation=4.0)
JOB = Column("job", "category", values=("cook", "nurse"))
DAY = Column("day", "date", median=10.0, mean=10.0, deviation=2.0, pattern="0000-00-00")
PAID = Column("paid", "boolean", missing=1)
RECIPE = Recipe("label", (AGE, JOB, DAY, PAID))


def test_inputs_are_standardized_one_hot_and_marked():
    table = {
        "age": ["42", "", "3.6e1"],
        "job": ["nurse", "?", "pilot"],
        "day": ["1970-01-05", "1970-01-11", ""],
        "paid": ["yes", "False", "NA"],
        "more": ["x", "y", "z"],
    }
    np.testing.assert_array_equal(
        RECIPE.encode(table),
        [
            [1, 0, 0, 1, 0, -3, 1, 0],
            [0.5, 1, 0, 0, 1, 0, 0, 0],
            [-0.5, 0, 0, 0, 1, 0, 0, 1],
        ],
    )
    assert RECIPE.features == (
        *("age", "age is missing", "job is cook", "job is nurse", "job is other"),
        *("day", "paid", "paid is missing"),
    )


def test_large_numbers_are_standardized_in_float64():
    """Seconds since 1970 are equal in float32 within two minutes."""
    column = Column("time", "number", mean=1.7e9, deviation=8.0)
    np.testing.assert_array_equal(8 * column.encode(["1700000001", "1700000002"])[:, 0], [1, 2])


@pytest.mark.parametrize(
    ("column", "cell", "wanted"),
    [
        (AGE, "old", "a finite number"),
        (AGE, "inf", "a finite number"),
        (AGE, "1e39", "a finite number"),
        (PAID, "maybe", "true or false"),
        (DAY, "1970-02-30", "a valid date of the form YYYY-MM-DD"),
        (DAY, "1970-01-01T12:00", "a valid date of the form YYYY-MM-DD"),
    ],
)
def test_cell_of_another_kind_is_not_read(column, cell, wanted):
    with pytest.raises(Unreadable) as caught:
        column.encode(["", cell])
    assert (caught.value.row, caught.value.cell, caught.value.wanted) == (1, cell, wanted)


@pytest.mark.parametrize(
    ("cell", "days"),
    [
        ("1970-01-03", 2.0),
        ("1970-01-01T06:00", 0.25),
        ("1970-01-01 12:00:00.5", 0.5 + 0.5 / 86400),
        ("1970-01-01T02:00+02:00", 0.0),
        ("1969-12-31", -1.0),
        ("1/3/1970", None),
    ],
)
def test_dates_are_days_since_1970(cell, days):
    assert days_of(cell) == days


@pytest.mark.parametrize(
    "cell", ["1970-01-05T00:00", "1970-01-05 00:00:00", "1970-01-05T00:00:00.000"]
)
def test_time_of_midnight_in_a_column_of_dates_is_the_date(cell):
    np.testing.assert_array_equal(DAY.encode([cell]), DAY.encode(["1970-01-05"]))


def test_space_between_date_and_time_is_read_as_a_t():
    column = DAY._replace(pattern="0000-00-00T00:00")
    np.testing.assert_array_equal(
        column.encode(["1970-01-05 06:00"]), column.encode(["1970-01-05T06:00"])
    )


def test_values_of_frames_and_json_are_written_as_in_csv():
    values = [None, float("nan"), True, np.bool_(False), 3, 3.0, 2.5, " a ", date(2024, 1, 31)]
    values += [datetime(2024, 1, 31, 12), np.int64(7), np.float32(0.5)]
    assert [cell_of(value) for value in values] == [
        *("", "", "True", "False", "3", "3", "2.5", "a", "2024-01-31"),
        *("2024-01-31T12:00:00", "7", "0.5"),
    ]


def test_recipe_is_restored_from_json():
    assert parse_recipe(json.loads(json.dumps(RECIPE.facts))) == RECIPE


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"kind": "text"}, "has an invalid column 'age'"),
        ({"deviation": 0.0}, "has an invalid column 'age'"),
        ({"mean": float("nan")}, "has an invalid column 'age'"),
        ({"mean": "0"}, "has an invalid column 'age'"),
        ({"values": [1]}, "has an invalid column 'age'"),
        ({"values": None}, "is not a recipe"),
        ({"more": 1}, "is not a recipe"),
    ],
)
def test_invalid_recipe_is_refused(change, sentence):
    facts = {"label": "y", "columns": [{**AGE._asdict(), **change}]}
    with pytest.raises(ValueError, match=f"^{sentence}"):
        parse_recipe(facts)


@pytest.fixture(scope="module")
def census(tmp_path_factory):
    """Returns the folder of a table and of a bundle, and the trained model."""
    folder = tmp_path_factory.mktemp("census")
    path = tables.write(folder / "t.csv", tables.census(300))
    data = from_table(path, "wealth", drop=["id"], categorical=["zip"])
    model = ctde.models.mlp([len(data.columns), 8, 2])
    options = {"devices": ctde.devices.start(1), "steps": 5, "show": False}
    trained = ctde.fit(model, data, optax.adam(0.01), **options)
    ctde.write_bundle(trained, data, folder / "bundle", ["numpy"], show=False)
    return folder, trained, data


def rows_of(path) -> dict[str, list[str]]:
    return dict(zip(tables.COLUMNS, zip(*tables.census(300), strict=True), strict=True))


def outputs_of(folder, path) -> np.ndarray:
    bundle = ctde.open_bundle(folder / "bundle")
    read = inputs.read([path], bundle.card)
    return ctde.bundle.load(bundle, "numpy")(read.inputs)


def test_node_returns_the_outputs_of_the_trained_model_for_raw_rows(census, tmp_path):
    """In any order of the columns and with any separator, or as JSON lines."""
    folder, trained, data = census
    table = rows_of(folder)
    expected = trained.predict(data.recipe.encode(table))
    np.testing.assert_allclose(outputs_of(folder, folder / "t.csv"), expected, rtol=0, atol=1e-6)

    names = ["hours", "zip", "age", "job", "married", "hired"]
    rows = [list(row) for row in zip(*(table[name] for name in names), strict=True)]
    shuffled = tables.write(tmp_path / "t.csv", rows, names)
    shuffled.write_text(shuffled.read_text().replace(",", ";"))
    np.testing.assert_allclose(outputs_of(folder, shuffled), expected, rtol=0, atol=1e-6)

    def value(name: str, cell: str):
        if cell in ("", "?", "NA"):
            return None
        if name == "married":
            return cell == "yes"
        return float(cell) if name in ("hours", "zip", "age") else cell

    objects = [
        {name: value(name, cell) for name, cell in zip(names, row, strict=True)} for row in rows
    ]
    lines = tmp_path / "t.jsonl"
    lines.write_text("".join(json.dumps(each) + "\n" for each in objects))
    np.testing.assert_allclose(outputs_of(folder, lines), expected, rtol=0, atol=1e-6)


def test_unknown_category_has_the_place_of_a_missing_one(census, tmp_path):
    folder, *_ = census
    row = tables.census(1)[0]
    paths = []
    for number, job in enumerate(["astronaut", "", "clerk"]):
        row[tables.COLUMNS.index("job")] = job
        paths.append(tables.write(tmp_path / f"{number}.csv", [row]))
    unknown, missing, known = (outputs_of(folder, path) for path in paths)
    np.testing.assert_array_equal(unknown, missing)
    assert np.abs(known - missing).max() > 0


def test_score_reads_the_label_by_its_name(census, capsys):
    folder, trained, data = census
    assert main([str(folder / "bundle"), "--input", str(folder / "t.csv"), "--score"]) == 0
    outputs = trained.predict(data.recipe.encode(rows_of(folder)))
    labels = np.array([data.classes.index(name) for name in rows_of(folder)["wealth"]])
    assert f"accuracy {(outputs.argmax(1) == labels).mean():.2%}" in capsys.readouterr().out


def test_objects_are_read_from_standard_input(census, monkeypatch, capsys):
    folder, *_ = census
    row = dict(zip(tables.COLUMNS, tables.census(1)[0], strict=True))
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{json.dumps(row)}\n\n{json.dumps(row)}\n"))
    assert main([str(folder / "bundle"), "--input", "-", "--json"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2


ROW = '"age": 30, "job": "cook", "zip": 1, "hired": "2020-01-01", "married": true'
BAD = {
    "missing column": (
        "t.csv",
        "age,job,zip,hired,married\n1,cook,1,2020-01-01,yes\n",
        "has no column 'hours'; name its columns like those of the training table.",
    ),
    "column twice": (
        "t.csv",
        "age,age,job,zip,hired,married,hours\n1,1,cook,1,2020-01-01,yes,2\n",
        "has more than one column 'age'; name its columns like those of the training table.",
    ),
    "no number": (
        "t.csv",
        "age,job,zip,hired,married,hours\n1,cook,1,2020-01-01,yes,2\nold,cook,1,,no,3\n",
        "has 'old' in line 3, column 'age', which is not a finite number; correct the cell, or "
        "leave it empty.",
    ),
    "no date": (
        "t.csv",
        'age,job,zip,hired,married,hours\n1,"co\nok",1,2020-01-01,yes,2\n1,cook,1,2020-13-01,no,3',
        "has '2020-13-01' in line 4, column 'hired', which is not a valid date of the form "
        "YYYY-MM-DD; correct the cell, or leave it empty.",
    ),
    "no rows": (
        "t.csv",
        "age,job,zip,hired,married,hours\n",
        "has no rows; add one line per example, after a header in a csv file.",
    ),
    "no JSON": (
        "t.jsonl",
        f"{{{ROW}}}\n{{",
        "has no valid JSON in line 2; write one object per line.",
    ),
    "a list": (
        "t.jsonl",
        "[1, 2]",
        "has no object of text and numbers in line 1; write one object per line, with the names of "
        "the columns as keys.",
    ),
    "other keys": (
        "t.jsonl",
        f'{{{ROW}}}\n{{{ROW}, "hours": 1}}',
        "has other keys in line 2 than before, such as 'hours'; give every object the same keys, "
        "with null for a missing value.",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_unreadable_rows_are_refused(census, tmp_path, name):
    file, content, sentence = BAD[name]
    path = tmp_path / file
    path.write_text(content)
    with pytest.raises(InputError) as caught:
        outputs_of(census[0], path)
    assert str(caught.value) == f"input {path} {sentence}"


def test_arrays_are_refused_if_the_model_reads_a_table(census, tmp_path):
    folder, _, data = census
    np.save(tmp_path / "x.npy", data.test.inputs)
    with pytest.raises(InputError) as caught:
        outputs_of(folder, tmp_path / "x.npy")
    assert str(caught.value) == (
        "input must be a .csv or .jsonl file of rows, or - for JSON lines from standard input, as "
        f"the model reads a table, got '{tmp_path / 'x.npy'}'."
    )


def test_card_whose_recipe_makes_other_inputs_is_refused(census, tmp_path):
    from ctde_jax.bundle.card import _Odd, _parse

    facts = json.loads((census[0] / "bundle" / "card.json").read_text())
    facts["recipe"]["columns"].pop()
    with pytest.raises(_Odd, match=r"has a recipe of \d+ inputs for inputs of the shape"):
        _parse(facts)
    facts["recipe"] = {}
    with pytest.raises(_Odd, match="has a recipe that is not a recipe"):
        _parse(facts)


def test_values_of_python_and_of_pandas_are_encoded_like_cells():
    frame = pytest.importorskip("pandas").DataFrame
    columns = (
        Column("age", "number", missing=1, median=3.0),
        Column("member", "boolean", missing=1),
        DAY,
        Column("job", "category", values=("cook", "nurse")),
    )
    recipe = Recipe("y", columns)
    cells = {
        "age": [" 4 ", "", "2.5"],
        "member": ["yes", "no ", "NA"],
        "day": ["1970-01-02", " 1970-02-01", "1970-01-02"],
        "job": [" nurse", "cook", "pilot"],
    }
    values = {
        "age": [4, None, 2.5],
        "member": [True, False, None],
        "day": [date(1970, 1, 2), date(1970, 2, 1), date(1970, 1, 2)],
        "job": ["nurse", "cook", "pilot"],
    }
    expected = recipe.encode(
        {name: [cell.strip() for cell in each] for name, each in cells.items()}
    )
    for table in (cells, values, frame(values)):
        np.testing.assert_array_equal(recipe.encode(table), expected)
    with pytest.raises(InputError, match="must have the columns of the training table, but lacks"):
        recipe.encode({"age": [1]})
