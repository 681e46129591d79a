"""The record of a run on the host: its rows, position, best parameters and checkpoints."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from ctde_jax.checkpoint import INPUTS, MEASURED, OTHER_POINT, Saver, Tensors, plain
from ctde_jax.cost import Traffic
from ctde_jax.devices import PyTree
from ctde_jax.errors import NonFiniteLoss
from ctde_jax.rounds import Averages, Sums, state
from ctde_jax.trainer.best import Best
from ctde_jax.trainer.callbacks import Callbacks
from ctde_jax.trainer.claim import Found
from ctde_jax.trainer.history import Row
from ctde_jax.trainer.meter import Meter
from ctde_jax.trainer.trained import Trained, accepts
from ctde_jax.trainer.training import Saving, Training


class Rows(Protocol):
    """The rows of a run, such as a `History`, or a `Log`, which also shows them."""

    rows: list[Row]

    def add(self, row: Row) -> None:
        """Appends a row."""
        ...


class Record:
    """The rows, the position, the best parameters and the checkpoints of a run.

    Args:
        training: Model, data and all options that determine the result of the run.
        saving: Options of the files of the run.
        found: The checkpoint from which the run continues, if there is one.
        best: Early stopping, with its progress if the run is resumed.
        log: The rows.
        saver: The writer of checkpoints; None without a folder, and on all hosts but host 0.
        callbacks: The callbacks of the user.
    """

    def __init__(
        self,
        training: Training,
        saving: Saving,
        found: Found,
        best: Best,
        log: Rows,
        saver: Saver | None,
        callbacks: Callbacks,
    ):
        self.training = training
        self.folder = saving.folder
        self.best = best
        self.log = log
        self.saver = saver
        self.callbacks = callbacks
        self.meter = Meter(
            training.source.steps_per_epoch,
            training.task,
            saving.save_every,
            training.on_nonfinite == "skip",
            found.position,
        )
        self.keep_best = saving.keep_best
        self._facts = _facts(training, saving, found)

    def read(self, sums: Sums, first: int, last: int) -> None:
        """Adds the rows of a dispatch; see `Meter.rows`.

        Raises:
            InputError: The file of the rows cannot be written.
            NonFiniteLoss: A loss is NaN or infinite.
        """
        for row in self.meter.rows(sums, first, last):
            self.add(row)

    def add(self, row: Row) -> None:
        """Adds a row, and passes it to the callbacks.

        Raises:
            InputError: The file of the rows cannot be written.
        """
        self.log.add(row)
        self.callbacks("on_row", row)

    def evaluated(
        self, averages: Mapping[str, Averages], params: PyTree, model_state: PyTree
    ) -> dict[str, Row]:
        """Adds the rows of an evaluation, and returns them by split.

        Args:
            averages: Averages by split: validation if there is one, then test.
            params: The evaluated parameters.
            model_state: The evaluated model state.

        Raises:
            InputError: The file of the rows cannot be written.
            NonFiniteLoss: A loss is NaN or infinite; no row is added.
        """
        # Compute all rows before any is logged: a loss that is not finite must leave none of them.
        rows = {name: self.meter.row(name, values) for name, values in averages.items()}
        for row in rows.values():
            self.add(row)
        self.best.update(rows[self._judge], params, model_state)
        return rows

    def save(self, tensors: Tensors, diverges: bool, other_point: bool) -> None:
        """Starts to write a checkpoint on host 0; all rows up to the step must have been added.

        Args:
            tensors: The state of training by name, from `state.to_tensors`.
            diverges: Whether the parameters differ between replicas.
            other_point: Whether the evaluated parameters are other numbers than those in the state.

        Raises:
            InputError: The previous checkpoint could not be written.
            NonFiniteLoss: A parameter is NaN or infinite.
        """
        params = state.merged_params(tensors, "params")
        if not all(np.isfinite(tensor).all() for tensor in params.values()):
            raise NonFiniteLoss(self.meter.position.step)

        # Host 0 writes the state, the best parameters and the scaling of the inputs.
        if self.saver is not None:
            data = self.training.data
            facts = {
                "position": self.meter.position._asdict(),
                "rows": len(self.log.rows),
                "best": self.best.facts,
                MEASURED: self.measured,
                **self._facts,
                # If replicas diverge, the center is the mean of the saved parameters.
                OTHER_POINT: other_point and not diverges,
            }
            inputs = {f"{INPUTS}shift": data.shift, f"{INPUTS}scale": data.scale}
            tensors = {**tensors, **self.best.tensors, **inputs}
            self.saver.save(self.meter.position.gone_through, tensors, facts)
        self.meter.saved()

    def report_checkpoints(self) -> None:
        """Passes the checkpoints that the thread has completed to the callbacks."""
        while self.saver is not None and self.saver.completed:
            self.callbacks("on_checkpoint", self.saver.completed.popleft())

    def result(
        self,
        center: tuple[PyTree, PyTree],
        opt_state: PyTree,
        traffic: Traffic | None,
        seconds: dict[str, float],
        is_stopped: bool,
        plan: Sequence[tuple[str, str]],
    ) -> Trained:
        """Returns the trained model.

        Args:
            center: The last evaluated parameters and model state, on the host. With early stopping,
                those of the lowest validation loss are returned instead.
            opt_state: The state of the optimizer, on the host.
            traffic: The collectives of a round; None if nodes have sent messages instead.
            seconds: Wall time by part.
            is_stopped: Whether a signal or a callback has asked the run to stop.
            plan: The rows of the plan, for reports.
        """
        params, model_state = self.best.center or center
        training = self.training
        return Trained(
            model=training.raw_model,
            params=params,
            model_state=model_state,
            opt_state=opt_state,
            step=self.best.step or self.log.rows[-1]["step"],
            history=self.log.rows,
            seconds=seconds,
            interrupted=is_stopped and not self.is_whole,
            stopped_early=self.best.is_over,
            task=training.task,
            devices=training.devices,
            traffic=traffic,
            accepts=accepts(training.data),
            platform=training.devices[0].platform,
            plan=tuple(plan),
        )

    @property
    def is_whole(self) -> bool:
        """Whether the run has reached its last step, or early stopping has ended it."""
        return self.meter.position.gone_through == self.training.total_steps or self.best.is_over

    @property
    def measured(self) -> Row | None:
        """The row of the split `_judge` for the current step; None if the log does not have it."""
        rows = reversed(self.log.rows)
        last = next((row for row in rows if row["split"] == self._judge), None)
        return None if last is None or last["step"] != self.meter.position.step else last

    @property
    def is_new_best(self) -> bool:
        """Whether `keep_best` is set and the last evaluation is better than all earlier ones."""
        if self.keep_best is None:
            return False
        # `best` returns the first of equal ones, so a tie is not a new best.
        judged = [row for row in self.log.rows if row["split"] == self._judge]
        return self.training.task.best(self.keep_best, judged) == len(judged) - 1

    @property
    def _judge(self) -> str:
        """The split that determines the best parameters: validation if there is one, else test."""
        return "test" if self.training.data.validation is None else "validation"


def _facts(training: Training, saving: Saving, found: Found) -> dict[str, Any]:
    """Returns the facts that are equal in all checkpoints of a run."""
    facts = {
        "replicas": len(training.devices),
        "options": found.decided,
        "given_options": plain(saving.options),
        "classes": training.data.classes,
        "vocabulary": training.data.vocabulary,
        "platform": training.devices[0].platform,
    }
    # Digests require a trace of the program, so they are computed only for runs with checkpoints.
    if saving.folder is not None:
        facts["identity"] = training.identity.facts
    return facts
