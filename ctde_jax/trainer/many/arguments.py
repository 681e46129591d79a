"""From the arguments of `fit_many` to the families of its runs."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from inspect import Parameter, signature
from numbers import Real
from typing import Any, NamedTuple, cast

import jax
import optax

from ctde_jax.aggregate import Strategy, as_transformation
from ctde_jax.data import Dataset
from ctde_jax.errors import InputError, did_you_mean
from ctde_jax.models import Model, Task, tasks
from ctde_jax.rounds import many
from ctde_jax.trainer.checks import check_types
from ctde_jax.trainer.many.family import Family, Variant
from ctde_jax.trainer.training import Saving, Training

EXCLUDED = ("model", "data", "optimizer", "seed", "branch_from", "mirror", "prepare", "options")
"""Fields of `Training` and `Saving` that `fit_many` sets, or that many runs cannot have."""


class Arguments(NamedTuple):
    """The arguments of `fit_many` that all runs share."""

    model: Model
    datasets: Sequence[Dataset]
    parts: Mapping[str, Any]
    """Optimizer, strategy and task, or the functions that make them."""

    devices: Sequence[jax.Device]
    options: Mapping[str, Any]
    """Other fields of `Training`."""

    saving: Saving

    @property
    def names(self) -> list[str]:
        """Names of the numbers that the functions take."""
        return [name for part in self.parts.values() if is_function(part) for name in _taken(part)]


def is_function(part: Any) -> bool:
    """Returns whether an optimizer, strategy or task is given as a function of numbers."""
    known = optax.GradientTransformation | optax.MultiSteps | Strategy | Task | str
    return callable(part) and not isinstance(part, known)


def _required(function: Callable[..., Any]) -> list[str]:
    kinds = (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)
    return [
        name
        for name, parameter in signature(function).parameters.items()
        if parameter.default is Parameter.empty and parameter.kind in kinds
    ]


def _taken(function: Callable[..., Any]) -> list[str]:
    return [*signature(function).parameters]


def make_families(
    chosen: Arguments, combinations: Sequence[Mapping[str, Any]], seeds: Sequence[int]
) -> list[Family]:
    """Makes the families: the combinations of values other than numbers of the functions.

    Raises:
        InputError: A name is unknown, or a value is invalid.
    """
    # A name is an argument of a function, or an option.
    known = {field.name for field in fields(Training)} - {*EXCLUDED, *chosen.parts, "devices"}
    names = [name for name in combinations[0] if name in chosen.names]
    for name in set(combinations[0]) - {*names}:
        if name not in known or name in chosen.options:
            suggestion = did_you_mean(name, known | {*chosen.names})
            raise InputError(
                "sweep",
                "must name arguments of the function that makes the optimizer, strategy or task, "
                f"or options that are not given otherwise, got {name}{suggestion}",
            )
    for part, function in chosen.parts.items():
        for name in _required(function) if is_function(function) else ():
            if name not in names:
                rule = f"must have values for {name}, an argument of the function {part}"
                raise InputError("sweep", f"{rule}; or pass what the function returns.")
    for each in combinations:
        for name in names:
            if isinstance(each[name], bool) or not isinstance(each[name], Real):
                raise InputError("sweep", f"must have numbers for {name}, got {each[name]!r:.60}.")

    # Runs are one family if all but these numbers, the seed and the examples is equal.
    by_options: dict[Any, Family] = {}
    for each in combinations:
        numbers = {name: each[name] for name in names}
        others = {name: value for name, value in each.items() if name not in names}
        for fold, data in enumerate(chosen.datasets):
            key = (repr(sorted(others.items())), _shapes_of(data))
            before = by_options[key].variants if key in by_options else []
            first = before[0].training if before else None
            training = _make_training(chosen, data, numbers, others, seeds[0], first)
            values = each if len(chosen.datasets) == 1 else {**each, "data": fold}
            variants = [
                Variant(
                    values,
                    training.changed(seed=seed),
                    _saving_of(chosen.saving, values, seed),
                )
                for seed in seeds
            ]
            make = partial(_make_parts, chosen, data)
            by_options[key] = Family([*before, *variants], make, names)
    return [*by_options.values()]


def _make_training(
    chosen: Arguments,
    data: Dataset,
    numbers: Mapping[str, Any],
    others: Mapping[str, Any],
    seed: int,
    first: Training | None,
) -> Training:
    """Makes the training of a combination; only the first of a family is checked as a whole."""
    parts = _make_parts(chosen, data, numbers)._asdict()
    check_types(data=data, optimizer=parts["optimizer"], strategy=parts["strategy"])
    if first is not None and first.data is data:
        return first.changed(**parts)
    return Training(
        model=chosen.model,
        data=data,
        devices=chosen.devices,
        seed=seed,
        **parts,
        **chosen.options,
        **others,
    )


def _make_parts(chosen: Arguments, data: Dataset, numbers: many.Numbers) -> many.Parts:
    made = {
        name: part(**{each: numbers[each] for each in _taken(part) if each in numbers})
        if is_function(part)
        else part
        for name, part in chosen.parts.items()
    }
    task: Any = made["task"]
    return many.Parts(
        as_transformation(made["optimizer"]),
        made["strategy"],
        tasks.for_data(data, cast(tasks.Name, task)) if isinstance(task, str) else task,
    )


def _shapes_of(data: Dataset) -> tuple[Any, ...]:
    """Returns what must be equal in data sets that one program uses."""
    splits = [split for split in (data.train, data.validation, data.test) if split is not None]
    return (
        len(data.train.labels),
        data.shift.tobytes(),
        data.scale.tobytes(),
        len(data.classes),
        tuple((array.shape[1:], str(array.dtype)) for split in splits for array in split[:2]),
    )


def _saving_of(saving: Saving, values: Mapping[str, Any], seed: int) -> Saving:
    """Returns the options of the files of one run."""
    if saving.folder is None:
        return saving
    return replace(saving, run_dir=saving.folder / name_of(values, seed))


def name_of(values: Mapping[str, Any], seed: int) -> str:
    """Returns the name of the folder of a run, such as `learning_rate-0.01-seed-3`."""
    words = [f"{name}-{value}" for name, value in {**values, "seed": seed}.items()]
    return re.sub(r"[^\w.+-]", "_", "-".join(words))
