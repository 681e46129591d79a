"""From the options of a command line to a trained model: what a notebook does with calls, and in the same order."""

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import numpy as np
from rich.table import Table

from ctde_jax import checkpoint
from ctde_jax.checkpoint import Options
from ctde_jax.config import build, report
from ctde_jax.config.options import Config, Run, deciding, flag, new_run_folder, save
from ctde_jax.data import Dataset, count_steps, decode, encode, partition, steps_per_epoch
from ctde_jax.devices import FAKE_DEVICES, PyTree, hosts, replica, start
from ctde_jax.errors import InputError, check_at_least, check_at_most
from ctde_jax.models import Model, generate
from ctde_jax.trainer import Trained, check_run, console, fit, picture


def train(config: Config, started: float) -> Trained:
    """Walks from the options to a trained model: prints the plan, trains, and prints what came of it.

    Args:
        config: The options.
        started: When the command began, by `time.perf_counter`.
    """
    devices = start(config.aggregation.devices, FAKE_DEVICES)
    hosts.compare(lambda: {**hosts.platform(), **deciding(config)})
    data = build.load_data(config.data, config.optimization.seed)
    parts = build.make_partition(config.data, data.train.labels, len(devices), config.optimization.seed)
    model = build.build_model(config.model, data)
    strategy = build.build_strategy(config.aggregation)

    chosen = config.optimization
    epoch = steps_per_epoch(len(data.train.inputs), len(devices), chosen.batch_size, parts)
    steps = count_steps(epoch, chosen.epochs if chosen.steps is None else None, chosen.steps)
    optimizer = build.build_optimizer(config, data, steps)
    task = build.build_task(chosen, data)
    augment = build.build_augment(config.data)
    describe = _sampler(config.run, model, data, chosen.seed)

    habits = {
        "batch_size": chosen.batch_size,
        "seed": chosen.seed,
        "augment": augment,
        "accumulate": chosen.accumulate,
        "ema_decay": chosen.ema_decay,
        "reestimate_batches": config.run.reestimate_batches,
        "patience": chosen.patience,
        "eval_every": config.run.eval_every,
        "log_every": config.run.log_every,
        "save_every": config.run.save_every,
        "keep_best": config.run.keep_best,
        "keep_checkpoints": config.run.keep_checkpoints,
    }
    check_run(model, data, optimizer, strategy, task, len(devices), **habits)
    options = Options(deciding(config), flag)
    here = len(replica.own(devices))
    config = replace(config, aggregation=replace(config.aggregation, devices=here))
    screen = console()
    with ExitStack() as at_end:

        def claim() -> str:
            chosen = config.run.run_dir
            folder = new_run_folder(config) if chosen is None else checkpoint.named("run_dir", chosen)
            at_end.enter_context(checkpoint.claimed(folder))
            _check_trunk(config.run, folder)
            return str(folder)

        def prepare(folder: Path) -> None:
            with checkpoint.writing_to(folder):
                save(config, folder / "config.json")
            if parts is not None and data.classes:
                draw = partial(partition.plot, np.asarray(data.train.labels), parts, data.classes)
                if failure := picture.save(draw, folder / "partition.png"):
                    screen.print(failure)

        folder = Path(hosts.of_the_first(claim))
        _show(report.plan(config, devices, data, parts, model, epoch, steps, folder))
        before = time.perf_counter() - started
        trained = fit(
            model,
            data,
            optimizer,
            strategy,
            task=task,
            devices=devices,
            steps=steps,
            partition=parts,
            run_dir=folder,
            resume=config.run.resume == "auto",
            init_from=config.run.init_from,
            init_only=config.run.init_only or None,
            branch_from=config.run.branch_from,
            on_nonfinite=chosen.on_nonfinite,
            options=options,
            describe=describe,
            prepare=prepare,
            **habits,
        )
    trained.seconds["start-up"] += before
    screen.print(report.result(trained, folder))
    return trained


def _check_trunk(chosen: Run, folder: Path) -> None:
    """Raises InputError if the checkpoint to branch from is in the run that `--resume never` moves."""
    if chosen.branch_from is None or chosen.resume == "auto":
        return
    if chosen.branch_from.resolve().is_relative_to(folder.resolve() / checkpoint.CHECKPOINTS):
        rule = f"must be a checkpoint outside {folder}, whose run --resume never moves"
        raise InputError("branch_from", f"{rule}, got {chosen.branch_from}; name another --run-dir.")


def _show(plan: Table) -> None:
    """Raises InputError if standard output cannot be written to; after this, training goes on without it."""
    try:
        console(lasting=False).print(plan)
    except OSError as error:
        raise InputError(
            "standard output", f"must be writable, got {error.strerror}; redirect it to a file with room."
        ) from error


_LONGEST_SAMPLE = 1_000_000
"""Characters are generated one after another at every evaluation."""


def _sampler(chosen: Run, model: Model, data: Dataset, seed: int) -> Callable[[PyTree, PyTree], str] | None:
    """Makes the function that lets a language model write a text, or None for another model."""
    check_at_least(0, sample_length=chosen.sample_length)
    check_at_most(_LONGEST_SAMPLE, sample_length=chosen.sample_length)
    if not data.vocabulary or not chosen.sample_length:
        return None
    beginning = data.vocabulary[data.train.inputs[0][0]] if chosen.prompt is None else chosen.prompt
    if not beginning:
        raise InputError("prompt", "must be at least one character, got none.")
    try:
        prompt = encode(beginning, data.vocabulary)
    except InputError as error:
        raise InputError("prompt", error.sentence) from error

    def sample(params, model_state) -> str:
        tokens = generate(
            model,
            params,
            model_state,
            prompt,
            chosen.sample_length,
            jax.random.key(seed),
            window=data.train.inputs.shape[1],
        )
        return beginning + decode(tokens, data.vocabulary)

    return sample
