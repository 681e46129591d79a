"""Training of many runs: `fit_many`, and `train_many`, which takes the runs in families."""

import re
import resource
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import fields, replace
from functools import partial
from inspect import Parameter, signature
from itertools import product
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import optax

from ctde_jax.aggregate import Strategy, as_transformation
from ctde_jax.checkpoint import check_no_run
from ctde_jax.data import Dataset
from ctde_jax.devices import hosts
from ctde_jax.errors import (
    InputError,
    NonFiniteLoss,
    Preempted,
    check_at_least,
    check_seed,
    check_whole,
    did_you_mean,
)
from ctde_jax.models import Model, Task, as_model, tasks
from ctde_jax.rounds import many
from ctde_jax.trainer.checks import check_types
from ctde_jax.trainer.claim import claim
from ctde_jax.trainer.fit import split_options, started, train
from ctde_jax.trainer.log import console
from ctde_jax.trainer.many.family import Family, Outcome, Variant, describe
from ctde_jax.trainer.many.preparing import Say
from ctde_jax.trainer.many.sweep import Sweep
from ctde_jax.trainer.many.together import train_together
from ctde_jax.trainer.plan import line, plan
from ctde_jax.trainer.training import Saving, Training

Sweeping = Mapping[str, Sequence[Any]] | Sequence[Mapping[str, Any]]
"""Values by name, of which all combinations are trained; or a mapping of values for each run."""


def fit_many(
    model: Model | Callable[..., Any],
    data: Dataset | Sequence[Dataset],
    optimizer: optax.GradientTransformation | optax.MultiSteps | Callable[..., Any],
    strategy: Strategy | Callable[..., Strategy] = Strategy(),
    *,
    seeds: Sequence[int] = (0,),
    sweep: Sweeping = (),
    task: Task | tasks.Name | Callable[..., Task] = "auto",
    devices: Sequence[jax.Device] | None = None,
    replicas: int | None = None,
    run_dir: Path | str | None = None,
    resume: bool = True,
    show: bool = True,
    **options: Any,
) -> Sweep:
    """Trains one run for each combination of seeds, values of a sweep, and data sets.

    Runs that differ in seeds and numbers alone are computed by one program, which is compiled once
    and divides them over the devices. Each run has the rows, checkpoints and result that it would
    have alone, up to the rounding of another program; a single run has the same bits. A run whose
    loss becomes NaN or infinite fails alone. The outcomes are in the order of combinations, then
    data sets, then seeds.

    A name in `sweep` is an argument of `optimizer`, `strategy` or `task`, which then are functions,
    such as `optax.adam`; within the program they are called with traced numbers, as in `jax.vmap`.
    Or it is an option of `fit`, such as `batch_size`; its values are numbers, texts, None or lists
    of them, and are trained by separate programs, one after another.

    Args:
        model: As for `fit`.
        data: A data set, or several with inputs and labels of equal shapes and dtypes, such as
            `data.folds` returns.
        optimizer: An optimizer, or a function of swept numbers that returns one.
        strategy: A strategy, or a function of swept numbers that returns one.
        seeds: Random seeds, as `seed` of `fit`.
        sweep: Values by name, of which all combinations are trained, such as
            `{"learning_rate": [0.001, 0.01]}`; or one mapping for each combination to train.
        task: A task or its name, or a function of swept numbers that returns a task.
        devices: Devices over which the runs are divided, and the default for `replicas`; by default
            the result of `devices.start()`.
        replicas: Number of replicas of each run; by default the length of `devices`.
        run_dir: Folder with one run folder for each run, the table `runs.csv` and `curves.png`;
            None writes no files.
        resume: Whether to continue the runs in the folder, as for `fit`.
        show: Whether to print the plan and the progress.
        **options: Other arguments of `fit` except `seed` and `callbacks`, and other fields of
            `Training` and `Saving` except `branch_from` and `mirror`.

    Raises:
        InputError: An argument is invalid, or a folder holds another run; nothing was trained.
        NonFiniteLoss: The loss of every run became NaN or infinite.
        Preempted: SIGTERM or SIGHUP ended the training, and checkpoints are written.
        TypeError: An option is unknown.

    Examples:
        >>> model, data = ctde.models.mlp([64, 10]), ctde.data.digits()
        >>> rates = {"learning_rate": [0.01, 0.1]}
        >>> args = {"seeds": range(2), "sweep": rates, "steps": 20, "show": False}
        >>> sweep = ctde.fit_many(model, data, optax.sgd, **args)
        >>> len(sweep.outcomes)
        4
    """
    of_training, of_saving = split_options(options, "fit_many", _EXCLUDED)
    check_whole(replicas=replicas)
    check_at_least(1, replicas=replicas)
    datasets = [data] if isinstance(data, Dataset) else _listed(data)
    if not datasets or not all(isinstance(each, Dataset) for each in datasets):
        rule = "must be a Dataset of ctde_jax.data, or a list of them"
        raise InputError("data", f"{rule}, got {data!r:.60}.")
    present = started(devices)
    chosen = _Chosen(
        as_model(model),
        datasets,
        {"optimizer": optimizer, "strategy": strategy, "task": task},
        present if replicas in (None, len(present)) else [present[0]] * replicas,
        of_training,
        Saving(run_dir, resume, **of_saving),
    )
    combinations = combine(sweep)
    checked = check_seeds(seeds)
    families = _make_families(chosen, combinations, checked)
    screen = console(quiet=not show)
    first = families[0].variants[0].training
    screen.print(plan(first, chosen.saving.folder))
    screen.print(line("runs", describe(families, present)))
    outcomes = train_many(families, present, show=show)
    swept = Sweep(_in_order(outcomes, combinations, checked))
    folder = chosen.saving.folder
    if folder is not None and (failure := swept.save(folder)):
        screen.print(failure)
    screen.print(swept.table())
    return swept


def train_many(
    families: Sequence[Family], devices: Sequence[jax.Device], *, show: bool = True
) -> list[Outcome]:
    """Trains the runs of all families.

    Args:
        families: Runs; each family has a separate program.
        devices: Devices over which the runs of a family are divided.
        show: Whether to show progress.

    Returns:
        The result of each run, in order.

    Raises:
        Exception: The exceptions of `fit_many`.
    """
    if hosts.count() > 1:
        raise InputError("seeds", "must be left out on several hosts; train each run on one host.")
    _check_folders([variant for family in families for variant in family.variants])
    say = console(quiet=not show).print
    outcomes: list[Outcome] = []
    for family in families:
        if family.is_joint:
            outcomes += _train_joint(family, devices, show, say)
        else:
            outcomes += _train_in_turn(family, show)
        if _is_interrupted(outcomes):
            has_folder = families[0].variants[0].saving.folder is not None
            way_on = "; the same call continues them" if has_folder else ""
            say(line("stopped", f"before all runs were complete{way_on}"))
            break
    if not any(each.trained for each in outcomes):
        raise NonFiniteLoss(outcomes[0].step)
    return outcomes


def _train_joint(
    family: Family, devices: Sequence[jax.Device], show: bool, say: Say
) -> list[Outcome]:
    """Trains a family by one program; runs that continue from another step by one more."""
    with ExitStack() as stack:
        # A line for each run would hide those on damaged checkpoints.
        def say_once(text: str) -> None:
            if not text.startswith("resume"):
                say(text)

        found = [
            stack.enter_context(claim(variant.training, variant.saving, say_once))
            for variant in family.variants
        ]
        resumed = sum(not each.is_new for each in found)
        if resumed:
            say(line("resume", f"{resumed} of {len(found)} runs"))

        # After an interruption while checkpoints were written, some runs are behind others.
        groups: dict[int, list[int]] = {}
        for place, each in enumerate(found):
            groups.setdefault(each.position.gone_through, []).append(place)
        outcomes: dict[int, Outcome] = {}
        for _, places in sorted(groups.items()):
            part = replace(family, variants=[family.variants[place] for place in places])
            of_part = train_together(part, [found[place] for place in places], devices, show, say)
            outcomes |= dict(zip(places, of_part, strict=True))
            if _is_interrupted(of_part):
                break
    return [outcomes[place] for place in sorted(outcomes)]


def _train_in_turn(family: Family, show: bool) -> list[Outcome]:
    """Trains the runs of a family one after another, each by a separate program."""
    outcomes: list[Outcome] = []
    for values, training, saving in family.variants:
        try:
            trained = train(training, saving, show=show)
        except NonFiniteLoss as error:
            outcomes.append(Outcome(values, training.seed, None, error.step, str(error)))
            continue
        # The same command continues all runs, so it has their common folder.
        except Preempted as error:
            raise Preempted(error.step, error.folder.parent, error.by) from error
        outcomes.append(Outcome(values, training.seed, trained, trained.step))
        if trained.interrupted:
            break
    return outcomes


def _is_interrupted(outcomes: Sequence[Outcome]) -> bool:
    """Returns whether Ctrl-C has ended a run, and so the training of all runs."""
    return any(each.trained is not None and each.trained.interrupted for each in outcomes)


def _check_folders(variants: Sequence[Variant]) -> None:
    """Checks the folders of the runs, and raises the limit of open files if it is too low.

    Raises:
        InputError: Two runs have the same folder, the folder of all runs is that of a single run,
            or this process cannot open the files of all runs.
    """
    folders = [variant.saving.folder for variant in variants if variant.saving.folder is not None]
    if not folders:
        return
    twice = [folder.name for folder, count in Counter(folders).items() if count > 1]
    if twice:
        raise InputError("sweep", f"must have different values, got {twice[0]} twice.")
    check_no_run(folders[0].parent)

    # A run holds its lock, its rows and the files of a checkpoint; JAX needs some hundred.
    needed = 4 * len(folders) + 300
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise InputError(
            "seeds",
            f"must be fewer, as {len(folders):,} runs with files need {needed:,} open files, but "
            f"this process may have {hard:,}; raise the limit by ulimit -n.",
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def _in_order(
    outcomes: Sequence[Outcome], combinations: Sequence[Mapping[str, Any]], seeds: Sequence[int]
) -> tuple[Outcome, ...]:
    """Returns the outcomes in the order of the arguments; families are trained in turn."""
    of_values = {repr(values): place for place, values in enumerate(combinations)}
    of_seed = {seed: place for place, seed in enumerate(seeds)}

    def place(outcome: Outcome) -> tuple[int, int, int]:
        values = {name: outcome.values[name] for name in combinations[0]}
        return of_values[repr(values)], outcome.values.get("data", 0), of_seed[outcome.seed]

    return tuple(sorted(outcomes, key=place))


_COLUMNS = ("data", "seed", "step", "failure", "runs", "failed")
"""Columns of the table of the results, which values of a sweep cannot have as names."""

_EXCLUDED = ("model", "data", "optimizer", "seed", "branch_from", "mirror", "prepare", "options")
"""Fields of `Training` and `Saving` that `fit_many` sets, or that many runs cannot have."""


class _Chosen(NamedTuple):
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


def combine(sweep: Sweeping) -> list[dict[str, Any]]:
    """Returns the values of each combination of a sweep, one without values if it is empty.

    Raises:
        InputError: The sweep has no values, other values than numbers, texts, None and lists of
            them, the same values twice, or the name of a column of the table.
    """
    if isinstance(sweep, Mapping):
        listed = {name: _listed(values) or [] for name, values in sweep.items()}
        for name, values in sweep.items():
            if not listed[name]:
                raise InputError(
                    "sweep", f"must have a list of values for {name}, got {values!r:.60}."
                )
        combinations = [
            dict(zip(listed, values, strict=True)) for values in product(*listed.values())
        ]
    else:
        mappings = _listed(sweep)
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


def _listed(values: Any) -> list[Any] | None:
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
    checked = _listed(seeds)
    if not checked:
        raise InputError("seeds", f"must be a list of at least one seed, got {seeds!r:.60}.")
    for seed in checked:
        check_whole(seeds=seed)
        check_seed(seed)
    twice = [seed for seed, count in Counter(checked).items() if count > 1]
    if twice:
        raise InputError("seeds", f"must be different, got {twice[0]} twice.")
    return checked


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


def _make_families(
    chosen: _Chosen, combinations: Sequence[Mapping[str, Any]], seeds: Sequence[int]
) -> list[Family]:
    """Makes the families: the combinations of values other than numbers of the functions.

    Raises:
        InputError: A name is unknown, or a value is invalid.
    """
    # A name is an argument of a function, or an option.
    known = {field.name for field in fields(Training)} - {*_EXCLUDED, *chosen.parts, "devices"}
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
            first = by_options[key].variants[0].training if key in by_options else None
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
            before = by_options[key].variants if key in by_options else []
            make = partial(_make_parts, chosen, data)
            by_options[key] = Family([*before, *variants], make, names)
    return [*by_options.values()]


def _make_training(
    chosen: _Chosen,
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


def _make_parts(chosen: _Chosen, data: Dataset, numbers: many.Numbers) -> many.Parts:
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
