"""Evidence on whether the first line of a csv file contains column names or an example."""

import math
import re
from collections import Counter
from itertools import pairwise

from ctde_jax.bundle import Row, are_numbers, days_of, is_missing, number_of
from ctde_jax.data.columns import MANY_LINES, NUMBER_LIKE
from ctde_jax.errors import quoted

_CHANCE = 1e-3
"""The first line is a header if the probability of such an example is at most this."""

_JUDGED = 2000
"""Maximum number of lines that the first line is compared with."""


def is_header(rows: list[Row], label: int) -> bool:
    """Returns whether the first line holds column names rather than an example."""
    first = rows[0].cells
    others = [row.cells for row in rows[1:]]

    # A word above numbers or dates is a name. A word above words is one unless it occurs again.
    features = [cell for place, cell in enumerate(first) if place != label]
    words = [place for place, cell in enumerate(first) if place != label and _is_word(cell)]
    judged = others[:_JUDGED]
    if any(_is_name(first[place], [cells[place] for cells in judged]) for place in words):
        return True
    if words:
        return all(first[place] != cells[place] for cells in judged for place in words)
    if not others:
        return False

    # Names that pandas generates: numbers from 0, including the label; the name of an index, which
    # comes first, is empty.
    has_index = first[0] == "" and label != 0
    names = features[has_index:]
    places = [place for place in range(len(first)) if place != label][has_index:]
    is_whole = all(re.fullmatch(r"\d+", name) for name in names)
    is_above_decimals = is_whole and not any(
        re.fullmatch(r"[-+]?\d+", cells[i]) for cells in others for i in places
    )
    if [*names, first[label]] == _counted(len(names) + 1) and (
        has_index or len(names) > 2 or is_above_decimals
    ):
        return True

    # Feature cells that are improbable for an example.
    if _chance(rows, label) <= _CHANCE:
        return True

    # A label that other lines have, too, is not a name.
    labels = Counter(cells[label] for cells in others)
    if first[label] in labels:
        return False

    # Names that are 0, 1, 2, ... or integers above decimals, or a label that is text above numbers.
    if names == _counted(len(names)) or is_above_decimals:
        return True
    if (
        number_of(first[label]) is None
        and not is_missing(first[label])
        and are_numbers(list(labels))
    ):
        return True

    # Increasing whole numbers, such as years, if no other line has a unique label.
    is_increasing = is_whole and _increases(names)
    return is_increasing and len(names) > 2 and min(labels.values()) > 1


def _is_word(cell: str) -> bool:
    """Returns whether a cell is text, and no number in whatever notation."""
    return not (is_missing(cell) or number_of(cell) is not None or re.fullmatch(NUMBER_LIKE, cell))


def _is_name(word: str, others: list[str]) -> bool:
    """Returns whether the cells below a word are mostly numbers, or dates unlike the word."""
    present = [cell for cell in others if not is_missing(cell)]
    numbers = sum(not _is_word(cell) for cell in present)
    dates = sum(days_of(cell) is not None for cell in present)
    return 2 * numbers > len(present) or (days_of(word) is None and 2 * dates > len(present))


def _are_column_numbers(names: list[str]) -> bool:
    """Returns whether these are distinct integers from 0 to 9999, such as column numbers."""
    return len({*names}) == len(names) and all(
        re.fullmatch(r"0|[1-9]\d{0,3}", name) for name in names
    )


def _increases(names: list[str]) -> bool:
    return sorted({int(name) for name in names}) == [int(name) for name in names]


def _chance(rows: list[Row], label: int) -> float:
    """Estimates the probability of an example like the first line, given the other lines.

    It is low if the first line probably holds column numbers. The evidence is: integers above
    columns of decimals, integers far outside the columns of integers, a label that no other line
    has, and all numbers from 0 in some order. The probability is the product of the fractions of
    the other lines that have each property. If another line has the label, or it is a number that
    is not far outside its column, only the decimals are evidence, because the largest example of a
    table may come first.

    Returns:
        The probability; 1 if the first line holds no column numbers, or there are fewer than
        `MANY_LINES` other lines.
    """
    # Column numbers are different whole numbers; fewer than `MANY_LINES` lines are no evidence.
    first = rows[0].cells
    others = [row.cells for row in rows[1 : _JUDGED + 1]]
    places = [place for place in range(len(first)) if place != label]
    names = [first[place] for place in places]
    if len(others) < MANY_LINES or not _are_column_numbers(names) or first[label] in names:
        return 1.0

    # Fraction of integers in each column. If another line has integers only, the first may be
    # rounded, too, so integers above decimals are no evidence.
    whole = [
        [re.fullmatch(r"[-+]?\d+", cells[place]) is not None for place in places]
        for cells in others
    ]
    shares = [(sum(column) + 1) / (len(others) + 1) for column in zip(*whole, strict=True)]
    is_rounded = not all(map(all, zip(*whole, strict=True))) and any(map(all, whole))
    chance = 1.0 if is_rounded else math.prod(shares)

    # If the label is not new, only decimals are evidence.
    labels = Counter(row.cells[label] for row in rows[1:])
    if first[label] in labels or _may_follow(first[label], list(labels)):
        return chance

    # A new label, and integers far outside their columns; counts plus 1, so that no fraction is 0.
    single = sum(count == 1 for count in labels.values())
    chance *= (single + 1) / len(rows)
    for place, share in zip(places, shares, strict=True):
        if share == 1 and _is_far_outside(
            int(first[place]), {int(cells[place]) for cells in others}
        ):
            chance *= 2 / (len(others) + 1)

    # All numbers from 0 in some order.
    ordered = sorted(_counted(len(first)))
    is_permuted = len(first) > 4 and sorted(first) == ordered
    return 0.0 if is_permuted and not any(sorted(cells) == ordered for cells in others) else chance


def _may_follow(label: str, others: list[str]) -> bool:
    """Returns whether a numeric label may continue the others, as the largest in a sorted table."""
    if not are_numbers([label, *others]):
        return False
    whole = [number_of(other) or 0.0 for other in others]
    # Among decimals, any number may follow.
    return not all(map(float.is_integer, whole)) or not _is_far_outside(
        int(float(label)), {int(each) for each in whole}
    )


def _is_far_outside(number: int, others: set[int]) -> bool:
    """Returns whether `number` is outside the range of `others` by over twice their largest gap."""
    ordered = sorted(others)
    largest_gap = max((after - before for before, after in pairwise(ordered)), default=1)
    return max(ordered[0] - number, number - ordered[-1]) > 2 * largest_gap


def doubt(rows: list[Row], label: int) -> list[str]:
    """Returns a note if the first line, used as an example, may hold column numbers; else []."""
    first = rows[0].cells
    others = [row.cells for row in rows[1:]]
    names = [cell for place, cell in enumerate(first) if place != label]
    if not others or not _are_column_numbers(names):
        return []
    way_out = (
        "if it contains the column names, pass the name of the label column, or add a letter to "
        "each name"
    )
    if all(cells[label] != first[label] for cells in others):
        return [
            "Line 1 is used as an example, although no other line has its label, "
            f"{quoted(first[label])}, and its other cells are distinct integers; {way_out}."
        ]
    is_permuted = len(first) > 4 and sorted(first) == sorted(_counted(len(first)))
    if len(names) > 2 and (_increases(names) or is_permuted):
        which = "all numbers from 0" if is_permuted else "increasing integers"
        return [f"Line 1 is used as an example, although its cells are {which}; {way_out}."]
    return []


def _counted(count: int) -> list[str]:
    return [str(number) for number in range(count)]
