"""The walk from a model and data to a trained model: `fit`, and `train`, which takes every option."""

from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import jax
import optax

from ctde_jax.aggregate import Strategy, as_transformation
from ctde_jax.checkpoint import completed
from ctde_jax.cost import summary
from ctde_jax.data import Dataset, targets_or_classes
from ctde_jax.devices import check_backend, hosts, replica, start
from ctde_jax.errors import InputError, did_you_mean
from ctde_jax.models import (
    Model,
    Task,
    as_model,
    classification,
    count_params,
    language_modeling,
)
from ctde_jax.rounds import unfinished
from ctde_jax.trainer.beginning import begin
from ctde_jax.trainer.checks import check_devices, check_types
from ctde_jax.trainer.claim import claim
from ctde_jax.trainer.log import console
from ctde_jax.trainer.meter import Clock
from ctde_jax.trainer.programs import compile_programs
from ctde_jax.trainer.rollback import rolling_back
from ctde_jax.trainer.run import Describe, open_run, prepare_folder
from ctde_jax.trainer.trained import Trained
from ctde_jax.trainer.training import Saving, Training


def fit(
    model: Model | Callable[..., Any],
    data: Dataset,
    optimizer: optax.GradientTransformation | optax.MultiSteps,
    strategy: Strategy = Strategy(),
    *,
    task: Task | None = None,
    batch_size: int = 64,
    epochs: int | None = None,
    steps: int | None = None,
    devices: Sequence[jax.Device] | None = None,
    seed: int = 0,
    eval_every: int | None = None,
    run_dir: Path | str | None = None,
    resume: bool = True,
    show: bool = True,
    describe: Describe | None = None,
    **options: Any,
) -> Trained:
    """Trains one central model on many devices.

    Ctrl-C ends the training after the current dispatch and returns what has been trained; a second Ctrl-C raises
    KeyboardInterrupt. With a `run_dir`, the same call continues a run that was interrupted in any way, also on another
    number of devices; on the same number, the bits are those of an uninterrupted run.

    Args:
        model: A model such as `models.mlp(...)`, or any nnx or linen module: `Net`, `Net(64)`,
            `functools.partial(Net, 64)` or `lambda rngs: Net(64, rngs=rngs)`. An nnx module that is already built
            starts from its weights, whatever the seed, and is not changed. See `models.from_nnx` and
            `models.from_linen` for modules whose mode arguments cannot be recognized.
        data: Training and test examples.
        optimizer: Any optax transformation. Its `update` is also passed `grad`, and as `value` and `loss` the mean
            objective of the batch (in local steps, of the replica's part of it). Optimizers that train at one point
            and are evaluated at another, such as `optax.contrib.schedule_free`, are evaluated, returned and exported
            at the latter. For complex parameters it gets what `jax.grad` returns, the conjugate of the direction
            of steepest ascent, as in any optax loop.
        strategy: How the devices agree.
        task: The loss to minimize and the metrics to report; by default classification, or language modeling if the
            data are a text.
        batch_size: The global batch size, over all devices together.
        epochs: Passes over the training examples; give this or `steps`.
        steps: Optimizer steps.
        devices: One replica runs on each; by default those of `devices.start()`.
        seed: Random seed for initialization, data order, augmentation and dropout.
        eval_every: Steps between two evaluations, which come at the end of a round; by default an epoch.
        run_dir: Folder for `metrics.jsonl`, `curves.png` and checkpoints. None writes no files.
        resume: Whether to continue the run in the folder; if False, it moves into the subfolder `previous-1`, or the
            next number.
        show: Whether to show progress.
        describe: Returns a text to print at every evaluation, given parameters and model state (numpy arrays).
        **options: Any other field of `trainer.Training`, such as `augment`, `ema_decay`, `init_from`, `partition` or
            `patience`, and of `trainer.Saving`, such as `save_every`, `keep_best` or `branch_from`.

    Raises:
        InputError: An argument breaks a rule, or the folder holds another run; nothing has been trained yet.
        NonFiniteLoss: The loss became NaN or infinite; the metrics until then are in the folder.
        ReplicasDiverged: Devices differ in what they must share.
        Preempted: SIGTERM has ended the training, which is saved. Without a `run_dir` it ends the process.
        TypeError: An option is unknown.
    """
    of_training, of_saving = _split(options)
    check_types(data=data, optimizer=optimizer, strategy=strategy)
    training = Training(
        model=as_model(model),
        data=data,
        optimizer=as_transformation(optimizer),
        strategy=strategy,
        task=_default_task(data) if task is None else task,
        devices=_checked(devices),
        batch_size=batch_size,
        epochs=epochs,
        steps=steps,
        seed=seed,
        eval_every=eval_every,
        **of_training,
    )
    saving = Saving(run_dir, resume, **of_saving)
    return train(training, saving, show=show, describe=describe)


@rolling_back
def train(
    training: Training,
    saving: Saving = Saving(),
    *,
    show: bool = True,
    describe: Describe | None = None,
) -> Trained:
    """Trains as `fit` does, with every option in one of two values.

    Args:
        training: What determines the numbers.
        saving: Where the files are.
        show: Whether to show progress.
        describe: Returns a text to print at every evaluation, given parameters and model state (numpy arrays).

    Raises:
        Exception: As `fit`.
    """
    # Refuse settings of the environment that rule out training, such as a thread pool that is too small.
    clock, screen = Clock(), console(quiet=not show)
    check_backend(training.devices)

    # Resume: the newest intact checkpoint of this run, the one to branch from, or none.
    with claim(training, saving, screen.print) as found:
        row_steps = min(training.log_every, saving.save_every or training.log_every)
        phases = unfinished(training.phases(row_steps), found.position.gone_through)

        # Initialize at the center, and put state and data on the devices.
        beginning = begin(training, phases, found, screen.print)
        is_complete = found.position.gone_through == training.total_steps or beginning.best.is_over
        if is_complete and not found.is_new:
            screen.print(completed(found.position.step, found.decided))
        clock.lap("start-up")

        # Compile everything before the first step, so that a mistake costs seconds and not an epoch.
        programs = compile_programs(training, phases, beginning, found.position.gone_through)
        count = count_params(beginning.center[0])
        wire = summary(programs.phases[-1].traffic, count, len(training.devices))
        later = f", after {phases[1].start} synchronous steps" if len(phases) > 1 else ""
        screen.print(f"wire       {wire}{later}")
        clock.lap("compile")

        # Train: each phase in spans from one evaluation to the next.
        prepare_folder(saving, found, screen.print)
        with open_run(training, saving, found, beginning, programs, clock, show, describe) as run:
            for program in programs.phases:
                run.advance(program)
            return run.result()


def _split(options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Sorts options by the value that has a field of their name; raises TypeError for unknown ones."""
    training = {field.name for field in fields(Training)}
    saving = {field.name for field in fields(Saving)}
    for name in options:
        if name not in training | saving:
            suggestion = did_you_mean(name, training | saving)
            raise TypeError(f"fit() got an unexpected keyword argument {name!r}{suggestion}")
    of_training = {name: value for name, value in options.items() if name in training}
    return of_training, {name: value for name, value in options.items() if name in saving}


def _checked(devices: Sequence[jax.Device] | None) -> list[jax.Device]:
    """Returns the devices of a run; raises InputError unless all hosts have the same number of them."""
    check_devices(devices)
    chosen = list(devices or start())
    check_backend(chosen)
    if len(chosen) != len(replica.own(chosen)) * hosts.count():
        rule = f"must contain the same number of devices on each of the {hosts.count()} hosts"
        raise InputError("devices", f"{rule}; pass the result of devices.start().")
    return chosen


def _default_task(data: Dataset) -> Task:
    if data.vocabulary:
        return language_modeling
    if data.classes:
        return classification
    raise InputError(
        "task",
        f"must be given, as Task(loss), unless labels are classes or a text; {targets_or_classes(data.train.labels)}.",
    )
