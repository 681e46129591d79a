"""The options of a run in two values: `Training` determines its result, `Saving` its files.

The result of a run is its parameters and metrics. Each value checks itself when it is created.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import optax

from ctde_jax.aggregate import Strategy
from ctde_jax.checkpoint import Choose, Identity, Options, check_outside, named, parts_of, plain
from ctde_jax.data import Augment, Dataset, count_steps
from ctde_jax.devices import replica
from ctde_jax.errors import (
    InputError,
    check_at_least,
    check_at_most,
    check_fraction,
    check_known,
    check_seed,
    check_whole,
    quoted,
)
from ctde_jax.models import (
    Model,
    Task,
    fine_tuning,
    in_units,
    unscaled,
    weighted,
    with_raw_inputs,
)
from ctde_jax.rounds import OnDisk, Phase, Resident, Streamed, exact, make_phases, make_source
from ctde_jax.trainer import checks
from ctde_jax.trainer.warm_start import Given, Source, read_source

_MOST_REESTIMATED = 2**16
"""Limit of `reestimate_batches`, as the indices of all these batches are in memory at once."""


@dataclass(frozen=True)
class Training:
    """Model, data and all options that determine the result of a run.

    Args:
        model: A model such as `models.mlp(...)`; it receives the inputs after the shift and scale
            of the data set.
        data: Training and test examples.
        optimizer: Any optax transformation.
        strategy: When the replicas communicate, what they send, and how the result is applied.
        task: The loss to minimize and the metrics to report.
        devices: The device of each replica, as `devices.start` returns them.
        batch_size: The global batch size, over all devices together.
        epochs: Passes over the training examples; give exactly one of this and `steps`.
        steps: Optimizer steps.
        partition: For each device, the indices of the examples that it trains on. If there are more
            parts than devices, each part is a client, and each round samples one client for every
            device. By default, all examples are shuffled and distributed over the devices in every
            epoch.
        seed: Random seed for initialization, data order, augmentation and dropout.
        init_from: Initial parameters: a `Trained`, the path of a run, checkpoint, bundle or
            safetensors file, or a tree of parameters; see `warm_start.Source`. By default, the
            model's random initialization. Every host must be able to read it. A resumed run must be
            given the same parameters again, so name a checkpoint of a run that is still training.
        init_only: Patterns of the parameters to take from `init_from`, such as `["encoder/*"]`; the
            others are initialized as usual. By default, all parameters must match.
        freeze: Patterns of the parameters that are not trained, such as `["encoder/*"]`. They have
            no gradients and no optimizer state, and are never sent. Batch statistics of frozen
            layers are still updated. By default, all parameters are trained; with a `lora_rank`,
            all are frozen.
        lora_rank: Rank of low-rank changes (LoRA; Hu et al., 2022), one for each frozen parameter
            with two or more axes, unless it would have as many numbers as the parameter. They are
            trained instead of the parameters, and added to them for evaluation and in the result.
            By default, there are none.
        class_weights: Weight of each class in the minimized objective, in the order of
            `data.classes`, or "balanced"; see `tasks.weighted`. By default, all are 1.
        augment: Changes every training example before the model receives it; see `data.augment`.
        accumulation_steps: Number of microbatches for gradient accumulation on each device.
        ema_decay: Decay of an exponential moving average of the parameters, updated at every
            aggregation; if given, the average is evaluated and returned. It starts at the initial
            parameters, so it needs several times `1 / (1 - ema_decay)` aggregations to forget them.
            Batch statistics are those of the parameters themselves, unless `reestimate_batches` is
            positive.
        reestimate_batches: Number of training batches from which batch statistics are estimated
            again before every evaluation; 0 uses the running averages.
        patience: Early stopping: stop after this many evaluations without improvement of the
            validation loss, and return the parameters with the lowest one. Requires data with a
            validation split.
        on_nonfinite: Action if the loss or the parameters become NaN or infinite: `stop`; `skip`
            the round on all devices, but stop after ten skipped rounds in a row; or `rollback` to
            the newest checkpoint and continue with updates half as large, at most three times.
        eval_every: Steps between evaluations, rounded up to whole rounds; by default an epoch.
        log_every: Maximum number of steps in a row of the history; a row has at least one round. A
            dispatch computes as many rows as take 0.1 seconds, and at least one.

    Raises:
        InputError: An argument is invalid, alone or in combination with others.

    Examples:
        >>> network, digits = ctde.models.mlp([64, 10]), ctde.data.digits()
        >>> sgd, strategy, task = optax.sgd(0.1), ctde.Strategy(), ctde.tasks.classification
        >>> devices = ctde.devices.start()
        >>> training = ctde.Training(network, digits, sgd, strategy, task, devices, epochs=2)
        >>> training.total_steps
        46
    """

    model: Model
    data: Dataset
    optimizer: optax.GradientTransformation
    strategy: Strategy
    task: Task
    devices: Sequence[jax.Device]
    batch_size: int = 64
    epochs: int | None = None
    steps: int | None = None
    partition: Sequence[np.ndarray] | None = None
    seed: int = 0
    init_from: Source | None = None
    init_only: Sequence[str] | str | None = None
    freeze: Sequence[str] | str | None = None
    lora_rank: int | None = None
    class_weights: Sequence[float] | Literal["balanced"] | None = None
    augment: Augment | None = None
    accumulation_steps: int = 1
    ema_decay: float | None = None
    reestimate_batches: int = 0
    patience: int | None = None
    on_nonfinite: Literal["stop", "skip", "rollback"] = "stop"
    eval_every: int | None = None
    log_every: int = 20

    def __post_init__(self) -> None:
        # The cheap rules come first: the checks below trace model, task and optimizers.
        self._check_values()
        self._check_combinations()
        model = self.raw_model
        center = self.shapes
        trained, _ = self.shapes_of_parts
        replicas = len(self.devices)
        checks.check_network(
            model,
            center,
            self.data,
            self.weighted_task,
            takes_mask=checks.takes_mask(unscaled(self.model)),
            reestimates=self.reestimate_batches > 0,
        )
        checks.check_strategy(model, center, trained, self.data, self.strategy, replicas)
        checks.check_optimizer(
            self.optimizer,
            self.strategy,
            trained,
            replicas,
            averages=self.ema_decay is not None,
            rolls_back=self.on_nonfinite == "rollback",
        )
        if self.augment is not None:
            checks.check_augment(self.augment, self.data)

    @cached_property
    def raw_model(self) -> Model:
        """The model from inputs as the data set stores them to outputs in units of the targets."""
        # `unscaled` undoes an earlier wrapping, so that inputs are scaled only once.
        return in_stored_units(unscaled(self.model), self.data, self.task)

    @cached_property
    def weighted_task(self) -> Task:
        """The task to minimize: `task` with the `class_weights` in its objective."""
        return self.weigh(self.task)

    def weigh(self, task: Task) -> Task:
        """Returns a task with the `class_weights` in its objective."""
        if self.class_weights is None:
            return task
        return weighted(task, self.class_weights, self.data)

    @cached_property
    def shapes(self) -> tuple[Any, Any]:
        """Shapes and dtypes of parameters and model state, without initialized values."""
        # A key[] and one example, `[1, ...]`, determine all shapes.
        key = jax.eval_shape(jax.random.key, 0)
        return jax.eval_shape(self.raw_model.init, key, self.data.train.inputs[:1])

    @cached_property
    def shapes_of_parts(self) -> tuple[Any, Any]:
        """Shapes and dtypes of the trained and the frozen parameters; see `divide`."""
        return jax.eval_shape(self.divide, self.shapes[0])

    def divide(self, params: Any) -> tuple[Any, Any]:
        """Divides parameters into the trained and the frozen ones; the latter may be empty.

        Raises:
            InputError: A pattern of `freeze` matches nothing, or no parameter would be trained.
        """
        return fine_tuning.split(params, _as_patterns(self.freeze), self.lora_rank, self.seed)

    @cached_property
    def source(self) -> Resident | OnDisk | Streamed:
        """The source of the training examples, which also determines their order."""
        # The steps of a round matter only if clients are sampled, as each round draws new ones.
        round_steps = max(each.inner_steps for each in self.strategy.phases.values())
        return make_source(
            self.data,
            len(self.devices),
            self.batch_size,
            self.seed,
            self.partition,
            max(1, round_steps),
        )

    @cached_property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return count_steps(self.source.steps_per_epoch, self.epochs, self.steps)

    @property
    def interval(self) -> int:
        """Number of steps between two evaluations, before it is rounded up to whole rounds."""
        return self.source.steps_per_epoch if self.eval_every is None else self.eval_every

    @cached_property
    def given(self) -> Given | None:
        """The parameters of `init_from`, read once; None without it."""
        return None if self.init_from is None else read_source(self.init_from)

    @property
    def patterns(self) -> tuple[str, ...] | None:
        """The patterns of `init_only` as a tuple; None without it."""
        return _as_patterns(self.init_only)

    @cached_property
    def identity(self) -> Identity:
        """Digests of the data and the program, computed on first use."""
        # Traced only if a checkpoint or another host needs the digests.
        trace = partial(
            parts_of,
            unscaled(self.model),
            self.data,
            self.weighted_task,
            self.optimizer,
            self.strategy,
            self.augment,
        )
        return Identity(self.data, self.partition, trace, len(self.devices))

    def changed(self, **fields: Any) -> "Training":
        """Returns the same training with other fields, without checks.

        The new fields must have the structure of the old ones, such as an optimizer with another
        learning rate, so that the shapes of all states stay the same.
        """
        _ = self.identity  # shared by the copies; computed later, on its first use
        copied = copy(self)
        for name, value in fields.items():
            object.__setattr__(copied, name, value)
        # The seed is no part of data and program; all other fields may be.
        outdated = {"weighted_task", "source", "total_steps"}
        if set(fields) != {"seed"}:
            outdated.add("identity")
        if {"data", "task"} & set(fields):
            outdated.add("raw_model")
        for name in outdated:
            copied.__dict__.pop(name, None)
        return copied

    def phases(self, row_steps: int) -> list[Phase]:
        """Returns all phases of the run; a row has at most `row_steps` steps, or one round."""
        return make_phases(
            self.strategy, self.total_steps, self.interval, row_steps, self.source.piece_steps
        )

    def deciding(self, saving: "Saving") -> Options:
        """Returns the options that determine the result of the run, by name, in types of JSON."""
        # A run is resumed only if all of these are equal, so names must not change.
        is_shared = self.partition is not None and len(self.partition) > len(self.devices)
        parts = "clients" if is_shared else "on their devices"
        rolls_back = self.on_nonfinite == "rollback"
        values = {
            **saving.options,
            "data": f"{self.data.name}, {len(self.data.test.inputs):,} test examples",
            "training examples": None if self.data.stream else len(self.data.train.inputs),
            "partition": None
            if self.partition is None
            else f"{len(self.partition)} parts, {parts}",
            "steps": self.total_steps,
            "sync_every": self.strategy.inner_steps,
            "phases": [
                [start, each.inner_steps, each.shared_batches, each.per_host]
                for start, each in self.strategy.phases.items()
            ],
            "exact": self.strategy.exact,
            "batch_size": self.batch_size,
            "seed": self.seed,
            "init_from": None if self.given is None else self.given.digest,
            "init_only": self.patterns,
            "freeze": _as_patterns(self.freeze),
            "lora_rank": self.lora_rank,
            "accumulation_steps": self.accumulation_steps,
            "ema_decay": self.ema_decay,
            "reestimate_batches": self.reestimate_batches,
            "patience": self.patience,
            "on_nonfinite": self.on_nonfinite,
            "eval_every": self.interval,
            # A rollback continues from the newest checkpoint, so the steps of checkpoints matter.
            "save_every": saving.save_every if rolls_back else None,
            "keep_best": saving.keep_best if rolls_back else None,
        }
        flag = saving.options.flag if isinstance(saving.options, Options) else None
        return Options(plain(values), flag)

    def _check_values(self) -> None:
        """Checks each value alone."""
        # A wrong type would make the comparisons below fail with an error that names no argument.
        checks.check_devices(self.devices)
        checks.check_types(
            data=self.data, optimizer=self.optimizer, strategy=self.strategy, task=self.task
        )
        check_whole(
            batch_size=self.batch_size, epochs=self.epochs, steps=self.steps, seed=self.seed
        )
        check_whole(
            accumulation_steps=self.accumulation_steps,
            eval_every=self.eval_every,
            log_every=self.log_every,
        )
        check_whole(patience=self.patience, reestimate_batches=self.reestimate_batches)
        check_whole(lora_rank=self.lora_rank)
        for name in ("init_only", "freeze"):
            patterns = _as_patterns(getattr(self, name)) or ()
            if not all(isinstance(pattern, str) for pattern in patterns):
                raise InputError(
                    name,
                    "must be a pattern of names or a list of them, such as ['encoder/*'], got "
                    f"{getattr(self, name)!r:.60}.",
                )
        # The ranges of batch size, epochs and steps depend on the data; see `_check_combinations`.
        check_seed(self.seed)
        check_at_least(1, accumulation_steps=self.accumulation_steps, patience=self.patience)
        check_at_least(1, eval_every=self.eval_every, log_every=self.log_every)
        check_at_least(0, reestimate_batches=self.reestimate_batches)
        check_at_least(1, lora_rank=self.lora_rank)
        check_at_most(_MOST_REESTIMATED, reestimate_batches=self.reestimate_batches)
        check_known("on_nonfinite", self.on_nonfinite, ("stop", "skip", "rollback"))
        check_fraction(ema_decay=self.ema_decay)

    def _check_combinations(self) -> None:
        """Checks the rules between values."""
        # Options that need another option, or exclude one.
        replicas = len(self.devices)
        if self.patience is not None and self.data.validation is None:
            raise InputError(
                "patience",
                "requires a validation split; use data.hold_out(...) or --validation-fraction.",
            )
        if self.init_only is not None and self.init_from is None:
            raise InputError("init_only", "requires init_from.")
        if self.strategy.exact and self.partition is not None:
            raise InputError(
                "partition",
                "must be reshuffled (None in Python) if the strategy is exact, because with a "
                "fixed partition the batches depend on the number of devices.",
            )
        self._check_phases()
        # These properties raise for the batch size and the partition, and for the epochs or steps.
        _ = self.source, self.total_steps

        # Each device has the same number of examples in every microbatch.
        if self.batch_size % (replicas * self.accumulation_steps):
            raise InputError(
                "accumulation_steps",
                f"must divide the {self.batch_size // replicas} examples of a device's batch, got "
                f"{self.accumulation_steps}.",
            )
        if self.strategy.exact and replica.is_virtual(self.devices):
            raise InputError(
                "devices",
                "must have one replica each if the strategy is exact, whose bits are the same for "
                "any number of replicas; leave out replicas.",
            )
        if self.strategy.exact:
            exact.check_sizes(replicas, self.batch_size, self.accumulation_steps)

    def _check_phases(self) -> None:
        """Checks that every phase of the strategy can use the partition."""
        if self.partition is None:
            return
        phases = self.strategy.phases.values()
        if any(each.shared_batches for each in phases):
            raise InputError(
                "partition",
                "must be reshuffled (None in Python) with shared batches, because a replica has "
                "only its part of the examples.",
            )
        lengths = {each.inner_steps for each in phases} - {0}
        if len(self.partition) > len(self.devices) and len(lengths) > 1:
            raise InputError(
                "partition",
                "must have one part for each device if the number of inner steps changes, because "
                "each round draws its clients.",
            )


def _as_patterns(patterns: Any) -> tuple[str, ...] | None:
    """Returns patterns as a tuple; a string is one pattern, not a sequence of characters."""
    if patterns is None:
        return None
    # Anything else that is no sequence is one pattern, and is refused as such.
    is_one = isinstance(patterns, str) or not isinstance(patterns, Iterable)
    names: list[Any] = [patterns] if is_one else [*patterns]
    return tuple(names)


def in_stored_units(model: Model, data: Dataset, task: Task) -> Model:
    """Wraps a model, so that inputs and regression targets are in the units of the data set."""
    raw = with_raw_inputs(model, data.shift, data.scale)
    return raw if task.units is None else in_units(raw, *task.units)


@dataclass(frozen=True)
class Saving:
    """Options of the files of a run: its folder, checkpoints and resuming.

    Args:
        run_dir: Folder for `metrics.jsonl`, `curves.png` and checkpoints; it is created if
            necessary. None writes no files.
        resume: Whether to continue the run in the folder. Its data, program (model, loss, metrics,
            optimizer, augmentation, strategy) and options must be equal to those of the training;
            if it is complete, its result is returned without training. If False, an earlier run
            moves into the subfolder `previous-1`, or the next number.
        branch_from: Checkpoint of another run, from which a new run continues with other arguments.
        save_every: Maximum number of steps between two checkpoints, or a round if that is longer;
            by default the steps of about a minute. The last step is always saved.
        keep_checkpoints: Number of newest checkpoints to keep.
        keep_best: `loss`, or the name of a metric: also keeps the checkpoint with its best value on
            the validation split, or on the test split if there is none. If an evaluation improves
            it, a checkpoint is written immediately.
        mirror: Address such as `s3://bucket/run` of a folder to which every checkpoint is uploaded
            in the background; see `docs/checkpoints.md`. If it has a newer checkpoint than
            `run_dir`, the run continues from there. Each run needs a separate address.
        options: Further options that determine the result of the run, by name; a run is resumed
            only if they are equal.
        prepare: Function of the folder that writes files of a new run; called on host 0 before the
            first checkpoint.

    Raises:
        InputError: A number is out of range, or an option requires `run_dir`.

    Examples:
        >>> saving = ctde.Saving("runs/digits", save_every=100, keep_best="accuracy")
        >>> saving.folder.name
        'digits'
    """

    run_dir: Path | str | None = None
    resume: bool = True
    branch_from: Path | str | None = None
    save_every: int | None = None
    keep_checkpoints: int = 2
    keep_best: str | None = None
    mirror: str | None = None
    options: Mapping[str, Any] = field(default_factory=Options)
    prepare: Callable[[Path], None] | None = None

    def __post_init__(self) -> None:
        check_whole(save_every=self.save_every, keep_checkpoints=self.keep_checkpoints)
        check_at_least(1, save_every=self.save_every, keep_checkpoints=self.keep_checkpoints)
        if self.mirror is not None and not re.match(r"[\w+]+://.", str(self.mirror)):
            raise InputError(
                "mirror", f"must be an address such as s3://bucket/run, got {quoted(self.mirror)}."
            )
        # These options need a folder for checkpoints.
        if self.run_dir is not None:
            return
        if self.branch_from is not None:
            raise InputError("branch_from", "requires run_dir, the folder of the new run.")
        if self.keep_best is not None:
            raise InputError("keep_best", "requires run_dir, the folder of the checkpoints.")
        if self.mirror is not None:
            raise InputError("mirror", "requires run_dir, the folder of the checkpoints.")

    @property
    def folder(self) -> Path | None:
        """The folder of the run, with `~` expanded; None if no files are written."""
        return None if self.run_dir is None else named("run_dir", self.run_dir)

    @property
    def parent(self) -> Path | None:
        """The checkpoint `branch_from`, with `~` expanded; None if the run is not a branch."""
        return None if self.branch_from is None else named("branch_from", self.branch_from)

    def row_steps(self, training: Training) -> int:
        """Returns the maximum number of steps in a row of the history."""
        # Checkpoints come after whole rows, so a row is at most as long as their interval.
        return min(training.log_every, self.save_every or training.log_every)

    def choose(self, training: Training) -> Choose | None:
        """Returns the function that selects the best evaluation; None without `keep_best`."""
        return None if self.keep_best is None else partial(training.task.best, self.keep_best)

    def check(self, training: Training) -> None:
        """Raises InputError if these options conflict with those of the training."""
        folder = self.folder
        if self.keep_best is not None:
            check_known("keep_best", self.keep_best, training.task.names)

        # A rollback needs checkpoints, and a run has one source of initial parameters.
        if training.on_nonfinite == "rollback" and folder is None:
            raise InputError(
                "on_nonfinite",
                "must not be rollback without run_dir, because a rollback restores a checkpoint; "
                "set run_dir, or use skip.",
            )
        if training.init_from is not None and self.branch_from is not None:
            raise InputError(
                "init_from",
                "cannot be combined with branch_from, which restores a complete training state; "
                "pass only one of them.",
            )
        # The files of this run change while it trains, so it cannot start from one of them.
        if isinstance(training.init_from, Path | str) and folder is not None:
            check_outside(Path(training.init_from), folder)
