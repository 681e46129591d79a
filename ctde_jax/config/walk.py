"""From command-line options to a trained model, by the same calls as in a notebook."""

import time
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from shlex import quote

import jax
import numpy as np
from rich.table import Table

from ctde_jax import checkpoint, trainer
from ctde_jax.checkpoint import PARTITION, REPORT, Options
from ctde_jax.config import build, output
from ctde_jax.config.command_line import CONFIG, deciding, flag, new_run_folder, save
from ctde_jax.config.options import Config, RunOptions
from ctde_jax.data import Dataset, Split, decode, encode, partition
from ctde_jax.devices import FAKE_DEVICES, PyTree, hosts, start
from ctde_jax.errors import InputError, check_at_least, check_at_most, writing_to
from ctde_jax.models import Model, generate
from ctde_jax.trainer import Saving, Trained, Training, console, picture


def train(config: Config, started: float) -> Trained:
    """Trains a model as configured: prints the plan, trains, and prints the result.

    Args:
        config: Options of the run.
        started: Start of the command, by `time.perf_counter`.

    Returns:
        The result of the training.

    Raises:
        Exception: The exceptions of `fit`.
    """
    # Start the devices. Hosts must agree on the options before any of them can wait for another.
    devices = start(config.aggregation.devices, FAKE_DEVICES, config.aggregation.replicas)
    hosts.compare(lambda: {**hosts.platform(), **deciding(config)})

    # Build the data and the training, which checks itself.
    data = build.load_data(config.data, config.optimization.seed)
    training = build.build_training(config, data, devices)
    samplers = _samplers(config.run, training)

    options = Options(deciding(config), flag)

    # Record the number of devices, so that the run can be repeated on another machine.
    count = len({device for device in devices if device.process_index == jax.process_index()})
    config = replace(config, aggregation=replace(config.aggregation, devices=count))
    screen = console()
    with ExitStack() as at_end:
        # The claim lasts until the end of the run.
        def claim() -> str:
            chosen = config.run.run_dir
            folder = (
                new_run_folder(config) if chosen is None else checkpoint.named("run_dir", chosen)
            )
            at_end.enter_context(checkpoint.claimed(folder))
            _check_branch_from(config.run, folder)
            return str(folder)

        # Called before the first checkpoint of a new run.
        def prepare(folder: Path) -> None:
            with writing_to(folder):
                save(config, folder / CONFIG)
            parts = training.partition
            if parts is not None and data.classes:
                draw = partial(partition.plot, np.asarray(data.train.labels), parts, data.classes)
                if failure := picture.save(draw, folder / PARTITION):
                    screen.print(failure)

        # Host 0 claims the folder; all hosts must pass the same name.
        folder = Path(hosts.of_the_first(claim))
        saving = Saving(
            run_dir=folder,
            resume=config.run.resume == "auto",
            branch_from=config.run.branch_from,
            save_every=config.run.save_every,
            keep_checkpoints=config.run.keep_checkpoints,
            keep_best=config.run.keep_best,
            mirror=config.run.mirror,
            options=options,
            prepare=prepare,
        )

        # Trackers require packages that may be missing, so make them before anything is printed.
        callbacks = [*samplers, *build.build_trackers(config.run.track, folder)]

        # Print the plan, then train. The time before counts as start-up.
        saving.check(training)
        names = output.names(config, data)
        _show(trainer.plan(training, folder, names))
        before = time.perf_counter() - started
        repetition = f"python -m ctde_jax.train --config {quote(str(folder / CONFIG))}"
        rows = [*trainer.plan_rows(training, names), ("to repeat it", repetition)]
        trained = trainer.train(training, saving, callbacks=callbacks, plan=rows)
        trained.seconds["start-up"] += before
        screen.print(output.result(trained, folder))

        # The run is complete, so a report that cannot be written does not change its status.
        if config.run.report:
            screen.print(hosts.of_the_first(partial(_write_report, trained, data.test, folder)))
    return trained


def _write_report(trained: Trained, split: Split, folder: Path) -> str:
    """Writes the report to the folder; returns its text, or the reason for a failure."""
    path = folder / REPORT
    texts: list[str] = []

    def write() -> None:
        report = trained.report(split)
        report.save(path)
        texts.append(f"{report}\nreport     {path}")

    return picture.attempt(write, path) or texts[0]


def _check_branch_from(chosen: RunOptions, folder: Path) -> None:
    """Raises InputError if `--resume never` would move the checkpoint `--branch-from`."""
    if chosen.branch_from is None or chosen.resume == "auto":
        return
    if chosen.branch_from.resolve().is_relative_to(folder.resolve() / checkpoint.CHECKPOINTS):
        rule = f"must be outside of {folder}, as --resume never moves the run there"
        raise InputError(
            "branch_from", f"{rule}, got {chosen.branch_from}; pass another --run-dir."
        )


def _show(plan: Table) -> None:
    """Prints the plan; raises InputError if standard output cannot be written to.

    Errors of standard output after this point do not stop the training.
    """
    try:
        console(ignore_failures=False).print(plan)
    except OSError as error:
        raise InputError(
            "standard output",
            f"must be writable, got {error.strerror}; redirect it to a writable file.",
        ) from error


_LONGEST_SAMPLE = 1_000_000
"""Maximum number of characters, as they are generated one by one at every evaluation."""


class _Sampler:
    """Callback that prints a text that a language model generates at every evaluation.

    Args:
        chosen: Options of the run, with the prompt and the length of the text.
        model: Model to generate with.
        data: Data set whose vocabulary and context length are used.
        seed: Random seed of the sampling, equal at every evaluation.

    Raises:
        InputError: If the prompt is empty or has a character that the vocabulary lacks.
    """

    def __init__(self, chosen: RunOptions, model: Model, data: Dataset, seed: int):
        # By default, prompt with the first character of the training text.
        prompt = chosen.prompt
        self._prompt = data.vocabulary[data.train.inputs[0][0]] if prompt is None else prompt
        if not self._prompt:
            raise InputError("prompt", "must be at least one character, got none.")
        try:
            tokens = encode(self._prompt, data.vocabulary)
        except InputError as error:
            raise InputError("prompt", error.sentence) from error

        def generate_tokens(params: PyTree, model_state: PyTree) -> jax.Array:
            return generate(
                model,
                params,
                model_state,
                tokens,
                chosen.sample_length,
                jax.random.key(seed),
                window=data.train.inputs.shape[1],
            )

        self._generate = generate_tokens
        self._vocabulary = data.vocabulary

    def on_evaluation(self, rows: object, params: PyTree, model_state: PyTree) -> None:
        tokens = self._generate(params, model_state)
        console().print(self._prompt + decode(tokens, self._vocabulary))


def _samplers(chosen: RunOptions, training: Training) -> list[_Sampler]:
    """Returns the sampler of a language model; an empty list for other models or length 0."""
    check_at_least(0, sample_length=chosen.sample_length)
    check_at_most(_LONGEST_SAMPLE, sample_length=chosen.sample_length)
    if not training.data.vocabulary or not chosen.sample_length:
        return []
    return [_Sampler(chosen, training.model, training.data, training.seed)]
