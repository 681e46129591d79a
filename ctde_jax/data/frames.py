"""Rows of data frames, of parquet files and of the tables of scikit-learn, as text."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sklearn.utils import Bunch

from ctde_jax.bundle import Row, cell_of
from ctde_jax.data.files import faulty, opened
from ctde_jax.errors import InputError, shortened


def read_frame(source: Any) -> tuple[list[str], list[Row]]:
    """Returns the names of the columns and the rows, which are numbered from 1.

    Args:
        source: Data frame of any library that narwhals supports, or a `sklearn.utils.Bunch`, whose
            last column is the target.

    Raises:
        InputError: If the source is no table, or narwhals is not installed.
    """
    if isinstance(source, Bunch):
        return _of_bunch(source)
    _require("narwhals")
    import narwhals

    try:
        frame = narwhals.from_native(source, eager_only=True)
    except TypeError as error:
        raise InputError(
            "source",
            "must be the path of a csv or parquet file, a data frame or a sklearn Bunch, got "
            f"{type(source).__name__}.",
        ) from error

    # pandas stores dates as times. If all times of a column are 0:00, its csv files contain dates.
    for name, kind in frame.schema.items():
        if kind == narwhals.Datetime and kind.time_zone is None:
            times = frame[name].drop_nulls()
            if (times == times.dt.truncate("1d")).all():
                frame = frame.with_columns(frame[name].dt.to_string("%Y-%m-%d"))
    return _checked(frame.columns, frame.iter_rows())


def read_parquet(path: Path) -> tuple[list[str], list[Row]]:
    """Reads a parquet file as `read_frame` reads a data frame.

    Raises:
        InputError: If the file cannot be read, or pyarrow or narwhals is not installed.
    """
    _require("pyarrow")
    from pyarrow import parquet

    with opened(path) as file:
        try:
            table = parquet.read_table(file)
        # A malformed file raises many kinds of exceptions.
        except Exception as error:
            raise faulty(
                path,
                f"is not a complete parquet file ({shortened(str(error))})",
                "write or copy it again",
            ) from error
    return read_frame(table)


def _of_bunch(bunch: Bunch) -> tuple[list[str], list[Row]]:
    if bunch.get("frame") is not None:
        return read_frame(bunch.frame)
    targets = bunch.target
    if bunch.get("target_names") is not None and targets.dtype.kind in "iu":
        targets = bunch.target_names[targets]
    rows = (
        [*features, target]
        for features, target in zip(bunch.data.tolist(), targets.tolist(), strict=True)
    )
    return _checked([*map(str, bunch.feature_names), "target"], rows)


def _checked(names: list[str], rows: Any) -> tuple[list[str], list[Row]]:
    found = [Row(line, [cell_of(value) for value in row]) for line, row in enumerate(rows, 1)]
    if not found or len(names) < 2:
        raise InputError(
            "source",
            "must have at least one row and two columns, features and the label, got "
            f"{len(found)} rows of {len(names)} columns.",
        )
    return names, found


def _require(package: str) -> None:
    if find_spec(package) is None:
        raise InputError("source", f"requires {package}; run `pip install 'ctde_jax[tables]'`.")
