"""The command `python -m ctde_jax.train`: options in; a trained model's numbers and curves out.

It does with options what a notebook does with calls, and reads the same.
"""

import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import ctde_jax as ctde
from ctde_jax import config as options
from ctde_jax.errors import InputError, NonFiniteLoss, check_at_least, check_seed

if TYPE_CHECKING:
    import numpy as np


def main(arguments: Sequence[str]) -> int:
    """Trains as the options say.

    Returns:
        The exit status: 0, 2 for a mistake in options or data or a loss that is not finite, 130 after Ctrl-C.
    """
    started = time.perf_counter()
    try:
        return 130 if train(options.parse(arguments), started).interrupted else 0
    except InputError as error:
        print(f"error: {options.flag(error.option)} {error.sentence}", file=sys.stderr)
        return 2
    except NonFiniteLoss as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted twice; what was measured is in the run's folder", file=sys.stderr)
        return 130


def train(config: options.Config, started: float) -> "ctde.Trained":
    """Walks from the options to a trained model: prints the plan, trains, and prints what came of it.

    Args:
        config: The options.
        started: When the command began, by `time.perf_counter`.
    """
    devices = ctde.devices.start(config.aggregation.devices)
    data = load_data(config.data)
    partition = make_partition(config, data, len(devices))
    model = build_model(config.model, data)
    strategy = ctde.Strategy(inner_steps=config.aggregation.sync_every)

    chosen = config.optimization
    epoch = ctde.data.steps_per_epoch(len(data.train.inputs), len(devices), chosen.batch_size, partition)
    steps = ctde.data.count_steps(epoch, chosen.epochs if chosen.steps is None else None, chosen.steps)
    optimizer = ctde.optimizers.build(
        chosen.optimizer, chosen.learning_rate, chosen.schedule, chosen.warmup_steps, steps
    )

    check_at_least(1, eval_every=config.run.eval_every, log_every=config.run.log_every)
    check_seed(chosen.seed)
    folder = ctde.log.make_run_folder(config.run.run_dir or _new_folder(config))
    config = replace(config, aggregation=replace(config.aggregation, devices=len(devices)))
    with ctde.log.writing_to(folder):
        options.save(config, folder / "config.json")
        if partition is not None:
            picture = ctde.data.partition.plot(data.train.labels, partition, data.classes)
            picture.savefig(folder / "partition.png", dpi=120)

    console = ctde.log.console()
    console.print(ctde.report.plan(config, devices, data, partition, model, epoch, steps, folder))
    before = time.perf_counter() - started
    trained = ctde.fit(
        model,
        data,
        optimizer,
        strategy,
        devices=devices,
        batch_size=chosen.batch_size,
        steps=steps,
        partition=partition,
        seed=chosen.seed,
        eval_every=config.run.eval_every,
        log_every=config.run.log_every,
        run_dir=folder,
    )
    trained.seconds["start-up"] += before
    console.print(ctde.report.result(trained, folder))
    return trained


def load_data(chosen: options.Data) -> "ctde.data.Dataset":
    """Loads the data set that the options name."""
    goes_with = {"data_dir": ("mnist", "fashion_mnist"), "data_file": ("npz", "csv"), "label_column": ("csv",)}
    for option, datasets in goes_with.items():
        if getattr(chosen, option) is not None and chosen.dataset not in datasets:
            raise InputError(option, f"goes with --dataset {' or '.join(datasets)}, got --dataset {chosen.dataset}.")
    match chosen.dataset:
        case "digits":
            return ctde.data.digits()
        case "mnist":
            return ctde.data.mnist(chosen.data_dir)
        case "fashion_mnist":
            return ctde.data.fashion_mnist(chosen.data_dir)
        case "npz":
            return ctde.data.from_npz(_data_file(chosen))
        case "csv":
            return ctde.data.from_csv(_data_file(chosen), chosen.label_column)


def make_partition(config: options.Config, data: "ctde.data.Dataset", replicas: int) -> "list[np.ndarray] | None":
    """Shares the training examples out to the devices for good, or not at all."""
    labels, chosen, seed = data.train.labels, config.data, config.optimization.seed
    match chosen.partition:
        case "reshuffled":
            return None
        case "iid":
            return ctde.data.partition.iid(labels, replicas, seed)
        case "by_label":
            return ctde.data.partition.by_label(labels, replicas, chosen.label_shards, seed)
        case "dirichlet":
            return ctde.data.partition.dirichlet(labels, replicas, chosen.dirichlet_alpha, seed)


def build_model(chosen: options.Model, data: "ctde.data.Dataset") -> "ctde.models.Model":
    """Builds the network between the data's inputs and its classes."""
    widths = [prod(data.train.inputs.shape[1:]), *chosen.widths, len(data.classes)]
    model = ctde.models.mlp(widths, chosen.activation)
    return ctde.models.in_bfloat16(model) if chosen.precision == "bf16" else model


def _data_file(chosen: options.Data) -> Path:
    if chosen.data_file is None:
        raise InputError("data_file", f"must name your file for --dataset {chosen.dataset}, got none.")
    return chosen.data_file


def _new_folder(config: options.Config) -> Path:
    now = f"{datetime.now():%Y%m%d-%H%M%S}-{os.getpid()}"  # the process, as two may start in one second
    return Path("runs") / f"{config.data.dataset}-{config.model.model}-{now}"


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until training starts, Ctrl-C has nothing to save
    sys.exit(main(sys.argv[1:]))
