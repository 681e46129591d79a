"""A table like that of a census, with words, gaps, dates and booleans, made from a seed."""

import csv
from datetime import date, timedelta
from pathlib import Path

import numpy as np

JOBS = ["clerk", "cook", "farmer", "nurse", "pilot", "teacher"]
COLUMNS = ["id", "age", "job", "zip", "hired", "married", "hours", "wealth"]


def census(rows: int, seed: int = 0) -> list[list[str]]:
    """Returns rows of text in the order of `COLUMNS`; 3 % of them have the label "rich"."""
    rng = np.random.default_rng(seed)
    age = rng.integers(18, 80, rows)
    job = rng.integers(0, len(JOBS), rows)
    area = rng.integers(0, 8, rows)
    hired = rng.integers(0, 7000, rows)
    is_married = rng.random(rows) < 0.5
    hours = rng.normal(38, 8, rows).round(1)

    # The label depends on every column but the identifier, also through their interactions.
    score = 0.04 * age + 0.8 * (job == 4) + 0.5 * (area % 3 == 0) - hired / 4000
    score += 0.5 * is_married + np.maximum(hours - 40, 0) * 0.1 + 0.02 * age * (job == 3)
    score += rng.logistic(scale=0.4, size=rows)
    is_rich = score > np.quantile(score, 0.97)

    def gaps(cells, share: float, spelling: str = "") -> list[str]:
        missing = rng.random(rows) < share
        return [spelling if gap else str(cell) for gap, cell in zip(missing, cells, strict=True)]

    columns = [
        [f"p{number:05d}" for number in rng.permutation(rows)],
        gaps(age, 0.1),
        gaps(np.array(JOBS)[job], 0.05, "?"),
        [str(10_000 + place) for place in area],
        gaps([date(2005, 1, 1) + timedelta(days=int(days)) for days in hired], 0.02),
        gaps(["yes" if each else "no" for each in is_married], 0.03, "NA"),
        [str(number) for number in hours],
        ["rich" if each else "poor" for each in is_rich],
    ]
    return [list(row) for row in zip(*columns, strict=True)]


def write(path: Path, rows: list[list[str]], names: list[str] = COLUMNS) -> Path:
    """Writes rows as a csv file with a header."""
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([names, *rows])
    return path
