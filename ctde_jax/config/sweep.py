"""Many runs from one command line: seeds, and the values of `--sweep`."""

import math
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from ctde_jax import checkpoint, trainer
from ctde_jax.checkpoint import Options
from ctde_jax.config import build, output
from ctde_jax.config.command_line import (
    CONFIG,
    deciding,
    flag,
    new_run_folder,
    save,
    with_words,
)
from ctde_jax.config.options import (
    AggregationOptions,
    Config,
    ModelOptions,
    OptimizationOptions,
)
from ctde_jax.data import Dataset, hold_out
from ctde_jax.devices import FAKE_DEVICES, hosts, start
from ctde_jax.errors import InputError, check_at_least, check_known, check_seed, quoted, writing_to
from ctde_jax.rounds import many
from ctde_jax.trainer import Family, Saving, Sweep, Training, Variant, console

_NUMBERS = (
    "learning_rate",
    "weight_decay",
    "clip_grad_norm",
    "label_smoothing",
    "outer_learning_rate",
    "outer_momentum",
)
"""Options whose values one program can have; all others are trained by programs in turn."""

_EXCLUDED = ("branch_from", "mirror", "prompt", "report", "track")
"""Options that only a single run can have."""

_MOST_RUNS = 10_000


class Chosen(NamedTuple):
    """The options of a run, and the values of the sweep among them, as on the command line."""

    values: Mapping[str, str]
    config: Config


def train_many(config: Config, started: float) -> Sweep:
    """Trains the runs of `--seeds` and `--sweep`: prints the plan, trains, and prints a table.

    Args:
        config: Options of the runs.
        started: Start of the command, by `time.perf_counter`.

    Raises:
        Exception: The exceptions of `fit_many`.
    """
    chosen = config.run
    for option in _EXCLUDED:
        if getattr(chosen, option):
            raise InputError(option, "must be left out with --seeds and --sweep.")
    if hosts.count() > 1:
        raise InputError("seeds", "must be left out on several hosts; train each run on one host.")
    check_at_least(1, seeds=chosen.seeds)

    # Each run has a replica on every device, or as many as `replicas`; runs share the devices.
    devices = start(config.aggregation.devices, FAKE_DEVICES)
    replicas = config.aggregation.replicas or len(devices)
    of_a_run = devices if replicas == len(devices) else [devices[0]] * replicas
    configs = _configs(config)

    screen = console()
    with ExitStack() as at_end:
        folder = (
            new_run_folder(config)
            if chosen.run_dir is None
            else checkpoint.named("run_dir", chosen.run_dir)
        )
        at_end.enter_context(checkpoint.claimed(folder))
        count = len(devices)
        config = replace(config, aggregation=replace(config.aggregation, devices=count))
        families = make_families(config, configs, of_a_run, folder)

        first = families[0].variants[0].training
        screen.print(trainer.plan(first, folder, output.names(configs[0].config, first.data)))
        screen.print(trainer.line("runs", trainer.describe(families, devices)))
        if chosen.halving is None:
            outcomes = trainer.train_many(families, devices)
        else:
            outcomes = trainer.train_best(families, devices, chosen.halving)
        sweep = Sweep(tuple(outcomes))
        if failure := sweep.save(folder):
            screen.print(failure)
        screen.print(sweep.table())
        seconds = time.perf_counter() - started
        screen.print(f"wall time  {seconds:.1f} s; {folder / trainer.RUNS} has a row for each run")
    return sweep


def _configs(config: Config) -> list[Chosen]:
    """Returns the options of each run.

    Raises:
        InputError: The sweep is malformed, or has too many runs.
    """
    sweep = _parse(config.run.sweep)
    seeds = range(config.optimization.seed, config.optimization.seed + (config.run.seeds or 1))
    check_seed(seeds[-1])
    count = len(seeds) * math.prod(map(len, sweep.values()))
    if count > _MOST_RUNS:
        raise InputError("sweep", f"must have at most {_MOST_RUNS:,} runs, got {count:,}.")
    if "epochs" in sweep and ("steps" in sweep or config.optimization.steps is not None):
        raise InputError("epochs", "and --steps are mutually exclusive; pass only one of them.")
    alone = replace(config, run=replace(config.run, seeds=None, sweep=(), halving=None))
    return [
        with_values(replace(alone, optimization=replace(alone.optimization, seed=seed)), values)
        for words in product(*sweep.values())
        for values in [dict(zip(sweep, words, strict=True))]
        for seed in seeds
    ]


def with_values(config: Config, values: Mapping[str, str]) -> Chosen:
    """Returns the options of a run with values of a sweep, and these values.

    Raises:
        InputError: A value is invalid, or would have no effect.
    """
    return Chosen(values, with_words(config, values))


def _parse(words: Sequence[str]) -> dict[str, list[str]]:
    """Converts the words of `--sweep`, such as `learning-rate=0.01,0.1`, to values by name.

    Raises:
        InputError: A word is malformed, or an option is unknown or occurs twice.
    """
    groups = (OptimizationOptions(), ModelOptions(), AggregationOptions())
    known = [name for group in groups for name in vars(group)]
    known = [name for name in known if name not in ("seed", "devices", "replicas")]
    sweep: dict[str, list[str]] = {}
    for word in words:
        name, _, text = word.partition("=")
        name = name.removeprefix("--").replace("-", "_")
        check_known("sweep", name, known)
        if name in sweep:
            raise InputError("sweep", f"must not contain {name} twice; separate values by commas.")
        sweep[name] = _values_of(text)
        if not all(sweep[name]):
            raise InputError(
                "sweep", f"must have values, such as {name}=1,2 or {name}=log:1:10:3, got {word}."
            )
        if len({*sweep[name]}) < len(sweep[name]):
            raise InputError("sweep", f"must have different values, got {quoted(word)}.")
    return sweep


def _values_of(text: str) -> list[str]:
    """Returns the values of a list such as `1,2`, or of a range such as `log:0.001:1:4`."""
    kind, *ends = text.split(":")
    if kind not in ("log", "linear"):
        return text.split(",")
    try:
        start, stop, count = float(ends[0]), float(ends[1]), int(ends[2])
        # Checked here, as a list of all values may not fit in memory.
        if not 1 <= count <= _MOST_RUNS:
            raise ValueError(f"must have from 1 to {_MOST_RUNS:,} values")
        space = np.geomspace if kind == "log" else np.linspace
        with np.errstate(all="raise"):
            values = space(start, stop, count)
    except (ValueError, IndexError, FloatingPointError) as error:
        raise InputError(
            "sweep",
            f"must have ranges such as {kind}:0.001:1:4 (from, to, number of values), got {text}.",
        ) from error
    # Four digits are enough for hyperparameters, and keep the names of folders short.
    return [f"{value:.4g}" for value in values]


def make_families(
    whole_config: Config,
    configs: Sequence[Chosen],
    devices: Sequence[jax.Device],
    folder: Path | None,
) -> list[Family]:
    """Makes the families of the runs: those that are equal but for their seed and `_NUMBERS`.

    Args:
        whole_config: Options of the command.
        configs: Options of each run.
        devices: The device of each replica of a run.
        folder: Folder of all runs; None writes no files.

    Raises:
        InputError: An option of a run is invalid.
    """
    whole = build.load_data(replace(configs[0].config.data, validation_fraction=0.0))
    families: dict[str, Family] = {}
    for words, config in configs:
        numbers = {name: float(word) for name, word in words.items() if name in _NUMBERS}
        others = {name: word for name, word in words.items() if name not in _NUMBERS}
        family = families.get(repr(others))
        data = _held_out(config, whole)
        # Only the first run of a family is checked as a whole; the others have the same shapes.
        if family is None:
            training = build.build_training(config, data, devices)
            make = partial(_make_parts, config, data, training.total_steps)
            family = Family([], make, [*numbers])
        else:
            training = _like(family.variants, words, config, data)
        values = {**others, **numbers}
        variant = Variant(values, training, _saving_of(whole_config, config, folder, values))
        families[repr(others)] = replace(family, variants=[*family.variants, variant])
    return [*families.values()]


def _held_out(config: Config, whole: Dataset) -> Dataset:
    """Returns the data set with the validation split of a run, which depends on its seed."""
    fraction = config.data.validation_fraction
    return hold_out(whole, fraction, config.optimization.seed) if fraction else whole


def _like(
    variants: Sequence[Variant], words: Mapping[str, str], config: Config, data: Dataset
) -> Training:
    """Returns the training of a run that differs from others in its seed and `_NUMBERS` alone.

    Args:
        variants: The other runs.
        words: The values of the sweep that are this run's own.
        config: Options of this run.
        data: Data set of this run.
    """
    last = variants[-1]
    training = last.training.changed(seed=config.optimization.seed)
    # The partition and the validation split depend on the seed.
    is_other_data = training.partition is not None or data is not training.data
    if is_other_data:
        labels = data.train.labels
        replicas = len(training.devices)
        partition = build.make_partition(config.data, labels, replicas, training.seed)
        steps = build.count_total_steps(config, data, replicas, partition)
        training = training.changed(data=data, partition=partition, steps=steps)
    # Runs that differ in their seed alone share optimizer, strategy and task.
    values = {name: float(word) for name, word in words.items() if name in _NUMBERS}
    if is_other_data or any(last.values[name] != value for name, value in values.items()):
        parts = _make_parts(config, data, training.total_steps, {})
        training = training.changed(**parts._asdict())
    return training


def _make_parts(config: Config, data: Dataset, steps: int, numbers: many.Numbers) -> many.Parts:
    """Builds optimizer, strategy and task with other numbers, which may be traced.

    Args:
        config: Options of the run.
        data: Data set of the run.
        steps: Number of optimizer steps of the run.
        numbers: Values of `_NUMBERS` by name, instead of those in `config`.
    """
    optimization, aggregation = (
        replace(group, **{name: number for name, number in numbers.items() if hasattr(group, name)})
        for group in (config.optimization, config.aggregation)
    )
    config = replace(config, optimization=optimization, aggregation=aggregation)
    return many.Parts(
        build.build_optimizer(config, data, steps),
        build.build_phases(config, steps),
        build.build_task(config, data),
    )


def _saving_of(
    whole_config: Config, config: Config, folder: Path | None, values: Mapping[str, Any]
) -> Saving:
    """Returns the options of the files of one run, with which those of the command are saved."""
    if folder is None:
        return Saving()
    run = config.run

    # Called before the first checkpoint of a new run, so that a refused command changes no file.
    def prepare(own: Path) -> None:
        with writing_to(own):
            save(config, own / CONFIG)
        with writing_to(folder):
            save(whole_config, folder / CONFIG)

    return Saving(
        run_dir=folder / trainer.name_of(values, config.optimization.seed),
        resume=run.resume == "auto",
        save_every=run.save_every,
        keep_checkpoints=run.keep_checkpoints,
        keep_best=run.keep_best,
        options=Options(deciding(config), flag),
        prepare=prepare,
    )
