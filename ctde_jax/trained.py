"""What a training returns: the aggregated model, and what was measured on the way."""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np

from ctde_jax import replica
from ctde_jax.data import Split
from ctde_jax.evaluate import Averages, make_evaluate
from ctde_jax.log import Row
from ctde_jax.models import Model
from ctde_jax.replica import PyTree
from ctde_jax.tasks import Task
from ctde_jax.traffic import Traffic


@dataclass(frozen=True, repr=False)
class Trained:
    """The aggregated model, and what was measured while it was trained."""

    model: Model
    """Takes inputs as the data set stores them."""

    params: PyTree  # numpy arrays
    model_state: PyTree  # numpy arrays
    step: int  # optimizer steps that these parameters have seen
    history: list[Row]
    """One row for each measurement, as `log.py` describes it."""

    seconds: dict[str, float]
    """Wall time by part: `start-up`, `compile`, `train`, `evaluate`."""

    interrupted: bool
    """Whether Ctrl-C ended the training before its last step."""

    stopped_early: bool
    """Whether its patience ended the training; with patience the parameters are those of the lowest validation loss."""

    task: Task
    devices: Sequence[jax.Device]
    traffic: Traffic | None
    """What each device sends in a round, counted in the compiled program; None where it was loaded from a folder."""

    def __repr__(self) -> str:
        says = ", ".join(f"{name} {value:.4g}" for name, value in self.tested.items() if name != "split")
        return f"Trained({'interrupted, ' if self.interrupted else ''}{says})"

    @property
    def tested(self) -> Row:
        """The row of the history with the test averages of these parameters."""
        return next(row for row in self.history if row["split"] == "test" and row["step"] == self.step)

    def predict(self, inputs: np.ndarray) -> PyTree:
        """Runs the model alone on one device: `[examples, ...]` to its outputs, numpy arrays as in `Model.apply`."""
        outputs, _ = jax.jit(self.model.apply)(self.params, self.model_state, np.asarray(inputs), None)
        return jax.tree.map(np.asarray, outputs)

    def evaluate(self, split: Split) -> Averages:
        """Averages loss and metrics over all examples of a split, on all devices of the training."""
        params, model_state = replica.replicate((self.params, self.model_state), self.devices)
        return make_evaluate(self.model, self.task, split, self.devices, params, model_state)(params, model_state)
