"""The combinations of values and the seeds of many runs."""

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import product
from numbers import Real
from typing import Any

from ctde_jax.errors import InputError, check_seed, check_whole

Sweeping = Mapping[str, Sequence[Any]] | Sequence[Mapping[str, Any]]
"""Values by name, of which all combinations are trained; or a mapping of values for each run."""

_COLUMNS = ("data", "seed", "step", "failure", "runs", "failed")
"""Columns of the table of the results, which values of a sweep cannot have as names."""


def combine(sweep: Sweeping) -> list[dict[str, Any]]:
    """Returns the values of each combination of a sweep, one without values if it is empty.

    Raises:
        InputError: The sweep has no values, other values than numbers, texts, None and lists of
            them, the same values twice, or the name of a column of the table.
    """
    if isinstance(sweep, Mapping):
        values_of = {name: listed(values) or [] for name, values in sweep.items()}
        for name, values in sweep.items():
            if not values_of[name]:
                raise InputError(
                    "sweep", f"must have a list of values for {name}, got {values!r:.60}."
                )
        combinations = [
            dict(zip(values_of, values, strict=True)) for values in product(*values_of.values())
        ]
    else:
        mappings = listed(sweep)
        if mappings is None or not all(isinstance(each, Mapping) for each in mappings):
            raise InputError(
                "sweep",
                f"must be lists of values by name, or a list of mappings, got {sweep!r:.60}.",
            )
        combinations = [dict(each) for each in mappings] or [{}]
    for each in combinations:
        for name, value in each.items():
            if name in _COLUMNS:
                rule = f"must not have the name {name}, which the table of the results uses"
                raise InputError("sweep", f"{rule}; rename the argument.")
            if not _is_plain(value):
                rule = "must have numbers, texts, None or lists of them as values"
                raise InputError("sweep", f"{rule}, got {value!r:.60} for {name}.")
    if any(each.keys() != combinations[0].keys() for each in combinations):
        raise InputError("sweep", "must have the same names for every combination of values.")
    for number, each in enumerate(combinations):
        if each in combinations[:number]:
            text = ", ".join(f"{name} {value}" for name, value in each.items())
            raise InputError("sweep", f"must have different values, got {text} twice.")
    return combinations


def listed(values: Any) -> list[Any] | None:
    """Returns values as a list; None if they are a text, or no list."""
    try:
        return None if isinstance(values, str) else [*values]
    except TypeError:  # also for an array without axes
        return None


def _is_plain(value: Any) -> bool:
    """Returns whether a text can represent a value, in a table and in the name of a folder."""
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, str | Real)


def check_seeds(seeds: Sequence[int]) -> list[int]:
    """Returns the seeds as a list.

    Raises:
        InputError: There is no seed, one is invalid, or occurs twice.
    """
    checked = listed(seeds)
    if not checked:
        raise InputError("seeds", f"must be a list of at least one seed, got {seeds!r:.60}.")
    for seed in checked:
        check_whole(seeds=seed)
        check_seed(seed)
    twice = [seed for seed, count in Counter(checked).items() if count > 1]
    if twice:
        raise InputError("seeds", f"must be different, got {twice[0]} twice.")
    return checked
