"""The command `python -m ctde_jax.train`: options in; a trained model's numbers and curves out.

It does with options what a notebook does with calls, and reads the same.
"""

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

import ctde_jax as ctde
from ctde_jax import config as options
from ctde_jax.errors import (
    HostLost,
    InputError,
    NonFiniteLoss,
    Preempted,
    ReplicasDiverged,
    check_at_least,
    check_at_most,
    shortened,
)
from ctde_jax.files import streams
from ctde_jax.trainer import picture

if TYPE_CHECKING:
    from rich.table import Table


def main(arguments: Sequence[str]) -> int:
    """Trains as the options say; on one of several hosts, in a process of its own under this one.

    Returns:
        The exit status: 0, 2 for a mistake in options or data or a loss that is not finite, 69 where another host is
        lost, 70 where devices that must hold the same do not, 75 after SIGTERM, 130 after Ctrl-C, and on several hosts
        128 and its number for a signal that has ended the training at once.
    """
    started = time.perf_counter()
    try:
        config = options.parse(arguments)
        _import_jax()
        meeting = ctde.devices.hosts.find_meeting(**vars(config.hosts))
    except InputError as error:
        print(f"error: {options.flag(error.option)} {error.sentence}", file=sys.stderr)
        return 2
    if meeting is None:
        status, sentence = _outcome(config, started)
        if sentence:
            print(sentence if status == os.EX_TEMPFAIL else f"error: {sentence}", file=sys.stderr)
        return status
    if not ctde.devices.supervisor.is_child():
        return ctde.devices.supervisor.run("ctde_jax.train", arguments, meeting)
    ctde.devices.supervisor.follow_supervisor()
    status, sentence = _outcome(config, started, meeting)
    if sentence and status != os.EX_TEMPFAIL:
        ctde.devices.hosts.leave(status, sentence)
    if sentence:
        print(f"host {meeting.index}: {sentence}", file=sys.stderr)
    ctde.devices.hosts.part()
    return status


def _import_jax() -> None:
    """Raises InputError if JAX cannot be imported, such as for an unknown value of one of its environment variables."""
    try:
        import jax  # noqa: F401  # here, so that a mistake in the options costs no import of it
    except Exception as error:
        raise InputError("JAX", f"must be importable, got {type(error).__name__}: {shortened(str(error))}.") from error


def _outcome(
    config: options.Config, started: float, meeting: "ctde.devices.hosts.Meeting | None" = None
) -> tuple[int, str]:
    """Trains, and returns the exit status and what there is to say of it."""
    try:
        if meeting is not None:
            ctde.devices.hosts.join(meeting)
        return (130 if train(config, started).interrupted else 0), ""
    except InputError as error:
        return 2, f"{options.flag(error.option)} {error.sentence}"
    except NonFiniteLoss as error:
        return 2, str(error)
    except ReplicasDiverged as error:
        return os.EX_SOFTWARE, str(error)
    except Preempted as error:
        return os.EX_TEMPFAIL, str(error)
    except HostLost as error:
        return ctde.devices.hosts.LOST, str(error)
    except KeyboardInterrupt:
        return 130, "interrupted twice; what was measured is in the run's folder"
    except Exception as error:
        if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
            said = " ".join(str(error).split()[:12]) or "no more to be had"
            return 2, f"memory does not suffice ({said}): take a smaller model, or a lower --batch-size."
        if meeting is None:
            raise
        if ctde.devices.hosts.may_be_lost(error):
            ctde.devices.hosts.wait_for_verdict()
        traceback.print_exc()  # nobody was lost
        return 1, f"{type(error).__name__}: {error}"


def train(config: options.Config, started: float) -> "ctde.Trained":
    """Walks from the options to a trained model: prints the plan, trains, and prints what came of it.

    Args:
        config: The options.
        started: When the command began, by `time.perf_counter`.
    """
    from ctde_jax.config import build, report  # here, as they import JAX

    devices = ctde.devices.start(config.aggregation.devices, ctde.devices.FAKE_DEVICES)
    ctde.devices.hosts.compare(lambda: {**ctde.devices.hosts.platform(), **options.deciding(config)})
    data = build.load_data(config.data, config.optimization.seed)
    partition = build.make_partition(config.data, data.train.labels, len(devices), config.optimization.seed)
    model = build.build_model(config.model, data)
    strategy = build.build_strategy(config.aggregation)

    chosen = config.optimization
    epoch = ctde.data.steps_per_epoch(len(data.train.inputs), len(devices), chosen.batch_size, partition)
    steps = ctde.data.count_steps(epoch, chosen.epochs if chosen.steps is None else None, chosen.steps)
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
    ctde.trainer.check_run(model, data, optimizer, strategy, task, len(devices), **habits)
    deciding = ctde.checkpoint.Options(options.deciding(config), options.flag)
    here = len(ctde.devices.replica.own(devices))
    config = replace(config, aggregation=replace(config.aggregation, devices=here))
    console = ctde.trainer.console()
    with ExitStack() as at_end:

        def claim() -> str:
            chosen = config.run.run_dir
            folder = options.new_run_folder(config) if chosen is None else ctde.checkpoint.named("run_dir", chosen)
            at_end.enter_context(ctde.checkpoint.claimed(folder))
            _check_trunk(config.run, folder)
            return str(folder)

        def prepare(folder: Path) -> None:
            with ctde.checkpoint.writing_to(folder):
                options.save(config, folder / "config.json")
            if partition is not None and data.classes:
                draw = partial(ctde.data.partition.plot, np.asarray(data.train.labels), partition, data.classes)
                if failure := picture.save(draw, folder / "partition.png"):
                    console.print(failure)

        folder = Path(ctde.devices.hosts.of_the_first(claim))
        _show(report.plan(config, devices, data, partition, model, epoch, steps, folder))
        before = time.perf_counter() - started
        trained = ctde.fit(
            model,
            data,
            optimizer,
            strategy,
            task=task,
            devices=devices,
            steps=steps,
            partition=partition,
            run_dir=folder,
            resume=config.run.resume == "auto",
            init_from=config.run.init_from,
            init_only=config.run.init_only or None,
            branch_from=config.run.branch_from,
            on_nonfinite=chosen.on_nonfinite,
            options=deciding,
            describe=describe,
            prepare=prepare,
            **habits,
        )
    trained.seconds["start-up"] += before
    console.print(report.result(trained, folder))
    return trained


def _check_trunk(chosen: options.Run, folder: Path) -> None:
    """Raises InputError if the checkpoint to branch from is in the run that `--resume never` moves."""
    if chosen.branch_from is None or chosen.resume == "auto":
        return
    if chosen.branch_from.resolve().is_relative_to(folder.resolve() / ctde.checkpoint.CHECKPOINTS):
        rule = f"must be a checkpoint outside {folder}, whose run --resume never moves"
        raise InputError("branch_from", f"{rule}, got {chosen.branch_from}; name another --run-dir.")


def _show(plan: "Table") -> None:
    """Raises InputError if standard output cannot be written to; after this, training goes on without it."""
    try:
        ctde.trainer.console(lasting=False).print(plan)
    except OSError as error:
        raise InputError(
            "standard output", f"must be writable, got {error.strerror}; redirect it to a file with room."
        ) from error


_LONGEST_SAMPLE = 1_000_000
"""Characters are generated one after another at every evaluation."""


def _sampler(
    chosen: options.Run, model: "ctde.models.Model", data: "ctde.data.Dataset", seed: int
) -> Callable[["ctde.devices.replica.PyTree", "ctde.devices.replica.PyTree"], str] | None:
    """Makes the function that lets a language model write a text, or None for another model."""
    import jax  # here, so that a mistake in the options costs no import of it

    check_at_least(0, sample_length=chosen.sample_length)
    check_at_most(_LONGEST_SAMPLE, sample_length=chosen.sample_length)
    if not data.vocabulary or not chosen.sample_length:
        return None
    start = data.vocabulary[data.train.inputs[0][0]] if chosen.prompt is None else chosen.prompt
    if not start:
        raise InputError("prompt", "must be at least one character, got none.")
    try:
        prompt = ctde.data.encode(start, data.vocabulary)
    except InputError as error:
        raise InputError("prompt", error.sentence) from error

    def sample(params, model_state) -> str:
        tokens = ctde.generate(
            model,
            params,
            model_state,
            prompt,
            chosen.sample_length,
            jax.random.key(seed),
            window=data.train.inputs.shape[1],
        )
        return start + ctde.data.decode(tokens, data.vocabulary)

    return sample


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until training starts, Ctrl-C has nothing to save
    sys.exit(streams.run(main))
