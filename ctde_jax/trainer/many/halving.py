"""Successive halving (Jamieson and Talwalkar, 2016): only the best runs are trained to the end.

After a fraction of the steps, the combinations of values are compared, and only the best of them
continue from their checkpoints, to the next comparison or to the end. The choice
depends on the rows of the runs alone, so an interrupted search is resumed as it was.
"""

from collections.abc import Sequence
from dataclasses import replace
from math import ceil, inf
from statistics import mean
from typing import Any

import jax

from ctde_jax.errors import InputError, check_at_least, check_whole
from ctde_jax.trainer.many.family import Family, Outcome
from ctde_jax.trainer.many.train_many import is_interrupted, train_many
from ctde_jax.trainer.training import Training


def train_best(
    families: Sequence[Family], devices: Sequence[jax.Device], factor: int, *, show: bool = True
) -> list[Outcome]:
    """Trains the runs of all families, of which one of `factor` continues after each comparison.

    The validation losses are compared, as means over the seeds of a combination of values.

    Args:
        families: Runs; each family has a separate program.
        devices: Devices over which the runs of a family are divided.
        factor: Ratio of the numbers of combinations before and after a comparison, and of the steps
            of two comparisons.
        show: Whether to show progress.

    Returns:
        The result of each run, in order, at its last step.

    Raises:
        InputError: The factor is invalid, there is one combination only, the runs have no
            validation split or no folder, or cannot be trained by one program for each family.
        Exception: The exceptions of `fit_many`.
    """
    variants = [variant for family in families for variant in family.variants]
    steps = _compared_steps(families, factor)
    results: dict[str, Outcome] = {}
    for until in (*steps, None):
        outcomes = train_many(families, devices, show=show, until=until)
        results |= {repr((each.values, each.seed)): each for each in outcomes}
        if until is None or is_interrupted(outcomes):
            break
        best = _best(outcomes, until, factor)
        kept = [
            replace(
                family,
                variants=[each for each in family.variants if each.combination in best],
            )
            for family in families
        ]
        families = [family for family in kept if family.variants]
    names = [repr((variant.values, variant.training.seed)) for variant in variants]
    return [results[name] for name in names if name in results]


def _compared_steps(families: Sequence[Family], factor: int) -> list[int]:
    """Returns the steps after which runs are compared, each the end of an evaluation interval."""
    check_whole(halving=factor)
    check_at_least(2, halving=factor)
    first = families[0].variants[0]
    combinations = len({repr(each.combination) for family in families for each in family.variants})
    if combinations < 2:
        raise InputError("halving", "requires a sweep of at least two combinations of values.")
    if first.saving.folder is None:
        raise InputError("halving", "requires run_dir, the folder of the checkpoints.")
    if first.training.data.validation is None:
        raise InputError(
            "halving",
            "requires a validation split, by which runs are compared; use data.hold_out(...) or "
            "--validation-fraction.",
        )
    if not all(family.is_joint for family in families):
        raise InputError(
            "halving",
            "requires runs that one program trains: they may differ in seeds and numbers alone, "
            "and must not be exact, re-estimate batch statistics, roll back, or read data from a "
            "disk or a stream.",
        )
    return _steps_of(first.training, factor, combinations)


def _steps_of(training: Training, factor: int, combinations: int) -> list[int]:
    """Returns the steps of the comparisons for a number of combinations, in order."""
    fraction = 1.0
    steps: set[int] = set()
    while combinations >= factor:
        combinations = ceil(combinations / factor)
        fraction /= factor
        intervals = ceil(training.total_steps * fraction / training.interval)
        steps.add(intervals * training.interval)
    return sorted(step for step in steps if step < training.total_steps)


def _best(outcomes: Sequence[Outcome], until: int, factor: int) -> list[dict[str, Any]]:
    """Returns the values of the best combinations by the mean validation loss."""
    losses: dict[str, list[float]] = {}
    values: dict[str, dict[str, Any]] = {}
    for each in outcomes:
        name = repr(each.combination)
        values[name] = each.combination
        losses.setdefault(name, []).append(_loss_at(each, until))
    order = sorted(losses, key=lambda name: mean(losses[name]))
    return [values[name] for name in order[: ceil(len(order) / factor)]]


def _loss_at(outcome: Outcome, until: int) -> float:
    """Returns the validation loss of the last evaluation until a step; infinite after a failure."""
    if outcome.trained is None:
        return inf
    validated = [row for row in outcome.trained.history if row["split"] == "validation"]
    return [row["loss"] for row in validated if row["step"] <= until][-1]
