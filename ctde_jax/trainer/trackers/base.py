"""The base class of all trackers: names of the metrics, start and end of a tracked run."""

import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from importlib import import_module
from types import ModuleType, TracebackType
from typing import Any, Self

from ctde_jax.errors import InputError
from ctde_jax.trainer.callbacks import Callback
from ctde_jax.trainer.history import Row

PROJECT = "ctde_jax"
"""Project or experiment of runs for which none is given."""

_NO_METRICS = ("split", "step", "time")


class Tracker(Callback, ABC):
    """A callback that writes the metrics of each row as `split/name`, such as `test/accuracy`."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.finish(failed=error is not None)

    def on_start(self, options: Mapping[str, Any], rows: Sequence[Row]) -> None:
        """Starts a tracked run, and writes the rows up to the checkpoint of a resumed run."""
        self.start({name: str(value) for name, value in options.items()})
        for row in rows:
            self.on_row(row)

    def on_row(self, row: Row) -> None:
        """Writes the metrics of a row."""
        metrics = {
            f"{row['split']}/{name}": float(value)
            for name, value in row.items()
            if name not in _NO_METRICS
        }
        # Only rows of the training split have a time.
        self.write(metrics, row["step"], row.get("time") or time.time())

    @abstractmethod
    def start(self, options: Mapping[str, str]) -> None:
        """Starts a tracked run with these options."""

    @abstractmethod
    def write(self, metrics: Mapping[str, float], step: int, seconds: float) -> None:
        """Writes the metrics of one row.

        Args:
            metrics: Values by name, such as `test/accuracy`.
            step: Optimizer step of the row.
            seconds: Time of the row, in seconds since 1970.
        """

    @abstractmethod
    def finish(self, failed: bool) -> None:
        """Ends the tracked run; does nothing if `start` was not called.

        Args:
            failed: Whether the training raised an exception.
        """


def required(module: str, extra: str) -> ModuleType:
    """Imports a module that an extra of `ctde_jax` installs; raises InputError if it is missing."""
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise InputError(
            "track", f"{extra} requires its package; run pip install 'ctde_jax[{extra}]'."
        ) from error
