"""Tracking with Weights & Biases; `WANDB_MODE=offline` writes files instead of sending."""

from collections.abc import Mapping
from typing import Any

from ctde_jax.trainer.trackers.base import PROJECT, Tracker, required


class WandB(Tracker):
    """Sends a run to Weights & Biases.

    Args:
        project: Name of the project.
        name: Name of the run; by default Weights & Biases chooses one.
        **settings: Further arguments of `wandb.init`, such as `dir`, `mode` or `tags`.

    Raises:
        InputError: wandb is not installed.
    """

    def __init__(self, project: str = PROJECT, name: str | None = None, **settings: Any):
        self._wandb = required("wandb", "wandb")
        self._settings = {"project": project, "name": name, **settings}
        self._run: Any = None

    def start(self, options: Mapping[str, str]) -> None:
        """Starts a run with the options as its configuration."""
        self._run = self._wandb.init(config=dict(options), **self._settings)

    def write(self, metrics: Mapping[str, float], step: int, seconds: float) -> None:
        """Queues the metrics of a step; a thread of the library sends them."""
        self._run.log({**metrics, "time": seconds}, step=step)

    def finish(self, failed: bool) -> None:
        """Waits until all rows are sent or written."""
        if self._run is not None:
            self._run.finish(exit_code=int(failed))
