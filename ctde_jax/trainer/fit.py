"""Training of a model on data: `fit`, and `train`, which takes all options in two values."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import jax
import optax

from ctde_jax.aggregate import Strategy, as_transformation
from ctde_jax.checkpoint import completed
from ctde_jax.data import Dataset
from ctde_jax.devices import check_backend, hosts, replica, start
from ctde_jax.errors import InputError, did_you_mean
from ctde_jax.models import Model, Task, as_model, tasks
from ctde_jax.rounds import unfinished
from ctde_jax.trainer.beginning import begin
from ctde_jax.trainer.callbacks import AnyCallback, check_callbacks
from ctde_jax.trainer.checks import check_devices, check_types
from ctde_jax.trainer.claim import claim
from ctde_jax.trainer.log import console
from ctde_jax.trainer.meter import Clock
from ctde_jax.trainer.plan import line, plan, plan_rows, wire_rows
from ctde_jax.trainer.programs import compile_programs
from ctde_jax.trainer.rollback import rolling_back
from ctde_jax.trainer.run import open_run, prepare_folder
from ctde_jax.trainer.trained import Trained
from ctde_jax.trainer.training import Saving, Training


def fit(
    model: Model | Callable[..., Any],
    data: Dataset,
    optimizer: optax.GradientTransformation | optax.MultiSteps,
    strategy: Strategy = Strategy(),
    *,
    task: Task | tasks.Name = "auto",
    batch_size: int = 64,
    epochs: int | None = None,
    steps: int | None = None,
    devices: Sequence[jax.Device] | None = None,
    seed: int = 0,
    eval_every: int | None = None,
    run_dir: Path | str | None = None,
    resume: bool = True,
    show: bool = True,
    callbacks: Sequence[AnyCallback] = (),
    **options: Any,
) -> Trained:
    """Trains one central model on many devices.

    Ctrl-C ends the training after the current dispatch and returns the model as it is then; a
    second Ctrl-C raises KeyboardInterrupt. With a `run_dir`, the same call resumes a run after any
    interruption, also on another number of devices; on the same number, the bits are those of an
    uninterrupted run.

    Args:
        model: A model such as `models.mlp(...)`, or any nnx or linen module: `Net`, `Net(64)`,
            `functools.partial(Net, 64)` or `lambda rngs: Net(64, rngs=rngs)`. A built nnx module
            starts from its weights, whatever the seed, and is not changed. `models.from_nnx` and
            `models.from_linen` adapt modules whose mode arguments cannot be recognized.
        data: Training and test examples.
        optimizer: Any optax transformation. Its `update` also receives `grad`, and as `value` and
            `loss` the mean objective of the batch (in local steps, of the replica's part). If it is
            evaluated at other parameters than it trains, as `optax.contrib.schedule_free` is, these
            are evaluated, returned and exported. As in any optax loop, complex gradients are those
            of `jax.grad`, the conjugate of the direction of steepest ascent.
        strategy: When the replicas communicate, what they send, and how the result is applied.
        task: The loss to minimize and the metrics to report: a `Task`, or `classification`,
            `language_modeling`, `multilabel` or `regression`; by default (`auto`) classification,
            or language modeling if the data are a text.
        batch_size: The global batch size, over all devices together.
        epochs: Passes over the training examples; give this or `steps`.
        steps: Optimizer steps.
        devices: The device of each replica; by default the result of `devices.start()`.
        seed: Random seed for initialization, data order, augmentation and dropout.
        eval_every: Steps between evaluations, rounded up to whole rounds; by default an epoch.
        run_dir: Folder for `metrics.jsonl`, `curves.png` and checkpoints. None writes no files.
        resume: Whether to continue the run in the folder; if False, it moves into the subfolder
            `previous-1`, or the next number.
        show: Whether to print the plan and the progress.
        callbacks: Functions that receive every row, or objects with methods of `Callback`, such as
            a tracker. They may stop the run.
        **options: Other fields of `trainer.Training`, such as `augment`, `class_weights`,
            `ema_decay`, `init_from`, `partition` or `patience`, and of `trainer.Saving`, such as
            `save_every` or `keep_best`.

    Raises:
        InputError: An argument is invalid, or the folder holds another run; nothing was trained. Or
            a batch of a stream is invalid, or a file of the run cannot be written.
        NonFiniteLoss: The loss became NaN or infinite; the folder has the metrics until then.
        ReplicasDiverged: Values that must be equal on all devices differ.
        HostLost: Another host failed.
        Preempted: SIGTERM or SIGHUP ended the training, and a checkpoint is written. Without a
            `run_dir`, these signals end the process.
        TypeError: An option is unknown.

    Examples:
        >>> data = ctde.data.digits()
        >>> model = ctde.models.mlp([64, 32, 10])
        >>> trained = ctde.fit(model, data, optax.adam(0.01), epochs=2, show=False)
        >>> trained.tested["accuracy"] > 0.8
        True
    """
    start_of_call = time.perf_counter()
    of_training, of_saving = split_options(options, "fit")
    check_types(data=data, optimizer=optimizer, strategy=strategy)
    training = Training(
        model=as_model(model),
        data=data,
        optimizer=as_transformation(optimizer),
        strategy=strategy,
        task=tasks.for_data(data, task) if isinstance(task, str) else task,
        devices=started(devices),
        batch_size=batch_size,
        epochs=epochs,
        steps=steps,
        seed=seed,
        eval_every=eval_every,
        **of_training,
    )
    saving = Saving(run_dir, resume, **of_saving)
    if show:
        console().print(plan(training, saving.folder))
    before = time.perf_counter() - start_of_call
    trained = train(training, saving, show=show, callbacks=callbacks)
    trained.seconds["start-up"] += before
    if trained.interrupted and show:
        way_on = "" if saving.folder is None else "; the same call continues this run"
        console().print(line("stopped", f"at step {trained.history[-1]['step']:,}{way_on}"))
    return trained


@rolling_back
def train(
    training: Training,
    saving: Saving = Saving(),
    *,
    show: bool = True,
    callbacks: Sequence[AnyCallback] = (),
    plan: Sequence[tuple[str, str]] | None = None,
) -> Trained:
    """Trains as `fit` does, with all options in two values.

    Args:
        training: Model, data and all options that determine the result of the run.
        saving: Options of the files of the run.
        show: Whether to show progress.
        callbacks: Functions that receive every row, or objects with methods of `Callback`.
        plan: Rows of the plan, for reports; by default those of `plan_rows`.

    Raises:
        Exception: The exceptions of `fit`.

    Examples:
        >>> network, digits = ctde.models.mlp([64, 10]), ctde.data.digits()
        >>> sgd, strategy, task = optax.sgd(0.1), ctde.Strategy(), ctde.tasks.classification
        >>> devices = ctde.devices.start()
        >>> training = ctde.Training(network, digits, sgd, strategy, task, devices, steps=1)
        >>> ctde.trainer.train(training, show=False).step
        1
    """
    # Refuse settings of the environment that rule out training, such as too small a thread pool.
    clock = Clock()
    screen = console(quiet=not show)
    _check_ready(training.devices)
    check_callbacks(callbacks)

    # Resume: the newest intact checkpoint of this run, the one to branch from, or none.
    with claim(training, saving, screen.print) as found:
        row_steps = saving.row_steps(training)
        phases = unfinished(training.phases(row_steps), found.position.gone_through)

        # Initialize or restore the state, and put state and data on the devices.
        beginning = begin(training, phases, found, screen.print)
        is_complete = found.position.gone_through == training.total_steps or beginning.best.is_over
        if is_complete and not found.is_new:
            screen.print(completed(found.position.step, found.decided))
        clock.lap("start-up")

        # Compile everything before the first step, so that an error costs seconds and not an epoch.
        programs = compile_programs(training, phases, beginning, found.position.gone_through)

        # Show the bytes that a round of each phase sends, counted in the compiled programs.
        for row in wire_rows(training, programs, found.position.sent):
            screen.print(line(*row))
        clock.lap("compile")

        # Train: each phase in spans from one evaluation to the next. Files are written only now.
        prepare_folder(saving, found, screen.print)
        with open_run(training, saving, found, beginning, programs, clock, show, callbacks) as run:
            for program in programs.phases:
                run.advance(program)
            return run.result(plan_rows(training) if plan is None else plan)


def split_options(
    options: Mapping[str, Any], function: str, excluded: Sequence[str] = ()
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Splits options into fields of `Training` and of `Saving`.

    Args:
        options: Options by name.
        function: Name of the function that was called with them, for the error message.
        excluded: Names of fields that it does not take.

    Raises:
        TypeError: An option is unknown or excluded.
    """
    training = {field.name for field in fields(Training)}
    saving = {field.name for field in fields(Saving)}
    known = (training | saving) - {*excluded}
    # Report unknown names as Python does, with a suggestion.
    for name in options:
        if name not in known:
            suggestion = did_you_mean(name, known)
            raise TypeError(f"{function}() got an unexpected keyword argument {name!r}{suggestion}")
    of_training = {name: value for name, value in options.items() if name in training}
    return of_training, {name: value for name, value in options.items() if name in saving}


def started(devices: Sequence[jax.Device] | None) -> list[jax.Device]:
    """Returns the devices of a run, by default those of `devices.start()`.

    Raises:
        InputError: If `devices` is not a list of devices, or training cannot run on them.
    """
    if devices is not None:
        check_devices(devices)
    chosen = list(devices or start())
    # Before anything is traced, which fails under some settings.
    _check_ready(chosen)
    return chosen


def _check_ready(devices: Sequence[jax.Device]) -> None:
    """Checks the settings of JAX, and that every host has the same number of devices.

    Raises:
        InputError: If a setting rules out training (see `check_backend`), or the numbers differ.
    """
    check_backend(devices)
    # Every host must have an equal part of all devices.
    if len(devices) != len(replica.local_replicas(devices)) * hosts.count():
        rule = f"must contain the same number of devices on each of the {hosts.count()} hosts"
        raise InputError("devices", f"{rule}; pass the result of devices.start().")
