"""Early stopping: the parameters with the lowest validation loss, and when to stop."""

from typing import Any

import jax
import numpy as np

from ctde_jax.checkpoint import BEST, Checkpoint, Tensors
from ctde_jax.devices import PyTree
from ctde_jax.rounds import state
from ctde_jax.trainer.history import Row


class Best:
    """Keeps the parameters with the lowest validation loss if early stopping is enabled.

    Args:
        patience: Number of evaluations without improvement after which the run stops; None never
            stops the run and keeps no parameters.
    """

    def __init__(self, patience: int | None):
        self._patience = patience
        self._loss = np.inf
        self._in_vain = 0  # evaluations since the last improvement
        self.center: tuple[PyTree, PyTree] | None = None
        """Best parameters and their model state, on the host; None if none are kept yet."""

        self.step = 0
        """Optimizer step of these parameters; 0 if none are kept yet."""

    @property
    def is_over(self) -> bool:
        """Whether the loss has not improved for `patience` evaluations."""
        return self._patience is not None and self._in_vain >= self._patience

    @property
    def facts(self) -> dict[str, Any] | None:
        """Loss, step and number of evaluations without improvement, for a checkpoint's manifest.

        None if no parameters are kept.
        """
        if self.center is None:
            return None
        return {"loss": self._loss, "step": self.step, "in_vain": self._in_vain}

    @property
    def tensors(self) -> Tensors:
        """Parameters and model state by name, for a checkpoint; empty if none are kept."""
        return {} if self.center is None else state.to_tensors({BEST: self.center})

    def restore(self, found: Checkpoint, like: tuple[PyTree, PyTree]) -> None:
        """Restores the best loss and parameters from a checkpoint of this run, if it has any.

        Args:
            found: The checkpoint.
            like: Parameters and model state; only their shapes and dtypes are read.
        """
        tensors = {name: tensor for name, tensor in found.tensors.items() if name.startswith(BEST)}
        # A checkpoint from before the first evaluation, or without patience, has none.
        if not tensors:
            return
        facts = found.facts["best"]
        self._loss = facts["loss"]
        self.step = facts["step"]
        self._in_vain = facts["in_vain"]
        _, self.center = state.tree_from_tensors(tensors, {BEST: like}, "run_dir").popitem()

    def update(self, validated: Row, params: PyTree, model_state: PyTree) -> None:
        """Keeps a copy of the parameters if their validation loss is lower than all before.

        Otherwise counts an evaluation without improvement. Does nothing without `patience`.

        Args:
            validated: History row of the evaluation on the validation split.
            params: The evaluated parameters.
            model_state: The evaluated model state.
        """
        if self._patience is None:
            return
        if validated["loss"] < self._loss:
            self._loss = validated["loss"]
            self.step = validated["step"]
            self._in_vain = 0
            # Copy to the host: the next dispatch donates the buffers of the training state.
            self.center = jax.device_get((params, model_state))
        else:
            self._in_vain += 1
