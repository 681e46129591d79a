"""Training of many runs: seeds, sweeps and folds."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import optax

from ctde_jax.aggregate import Strategy
from ctde_jax.data import Dataset
from ctde_jax.errors import InputError, check_at_least, check_whole
from ctde_jax.models import Model, Task, as_model, tasks
from ctde_jax.trainer.fit import split_options, started
from ctde_jax.trainer.log import console
from ctde_jax.trainer.many.arguments import EXCLUDED, Arguments, make_families
from ctde_jax.trainer.many.combinations import Sweeping, check_seeds, combine, listed
from ctde_jax.trainer.many.family import Outcome, describe
from ctde_jax.trainer.many.halving import train_best
from ctde_jax.trainer.many.sweep import Sweep
from ctde_jax.trainer.many.train_many import train_many
from ctde_jax.trainer.plan import line, plan
from ctde_jax.trainer.training import Saving


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
    halving: int | None = None,
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
        halving: Factor of successive halving, such as 3: the combinations are compared by their
            validation loss after fractions of the steps, such as 1/9 and 1/3, and each time only
            the best third continues. Requires a sweep, a validation split and `run_dir`.
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
    of_training, of_saving = split_options(options, "fit_many", EXCLUDED)
    check_whole(replicas=replicas)
    check_at_least(1, replicas=replicas)
    datasets = [data] if isinstance(data, Dataset) else listed(data)
    if not datasets or not all(isinstance(each, Dataset) for each in datasets):
        rule = "must be a Dataset of ctde_jax.data, or a list of them"
        raise InputError("data", f"{rule}, got {data!r:.60}.")
    present = started(devices)
    chosen = Arguments(
        as_model(model),
        datasets,
        {"optimizer": optimizer, "strategy": strategy, "task": task},
        present if replicas in (None, len(present)) else [present[0]] * replicas,
        of_training,
        Saving(run_dir, resume, **of_saving),
    )
    combinations = combine(sweep)
    checked = check_seeds(seeds)
    families = make_families(chosen, combinations, checked)
    screen = console(quiet=not show)
    first = families[0].variants[0].training
    screen.print(plan(first, chosen.saving.folder))
    screen.print(line("runs", describe(families, present)))
    if halving is None:
        outcomes = train_many(families, present, show=show)
    else:
        outcomes = train_best(families, present, halving, show=show)
    swept = Sweep(_in_order(outcomes, combinations, checked))
    folder = chosen.saving.folder
    if folder is not None and (failure := swept.save(folder)):
        screen.print(failure)
    screen.print(swept.table())
    return swept


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
