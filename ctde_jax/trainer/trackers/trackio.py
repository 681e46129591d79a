"""Tracking with Trackio: a local database, or a Hugging Face Space."""

from collections.abc import Mapping
from typing import Any

from ctde_jax.trainer.trackers.base import PROJECT, Tracker, required


class Trackio(Tracker):
    """Writes a run to Trackio; `trackio show` shows it.

    Args:
        project: Name of the project.
        name: Name of the run; by default Trackio chooses one.
        **settings: Further arguments of `trackio.init`, such as `space_id`.

    Raises:
        InputError: trackio is not installed.
    """

    def __init__(self, project: str = PROJECT, name: str | None = None, **settings: Any):
        self._trackio = required("trackio", "trackio")
        self._settings = {"project": project, "name": name, **settings}
        self._run: Any = None

    def start(self, options: Mapping[str, str]) -> None:
        """Starts a run with the options as its configuration."""
        self._run = self._trackio.init(config=dict(options), **self._settings)

    def write(self, metrics: Mapping[str, float], step: int, seconds: float) -> None:
        """Queues the metrics of a step; a thread of the library writes them."""
        self._run.log(dict(metrics), step=step)

    def finish(self, failed: bool) -> None:
        """Waits until all rows are written."""
        if self._run is not None:
            self._run.finish()
