"""Tracking with TensorBoard: event files, written by tensorboardX."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ctde_jax.trainer.trackers.base import Tracker, required


class TensorBoard(Tracker):
    """Writes event files; `tensorboard --logdir FOLDER` shows them.

    Args:
        folder: Folder of the event files.

    Raises:
        InputError: tensorboardX is not installed.
    """

    def __init__(self, folder: Path | str):
        self._tensorboard = required("tensorboardX", "tensorboard")
        self._summaries = required("tensorboardX.proto.summary_pb2", "tensorboard")
        self._folder = Path(folder).expanduser()
        self._writer: Any = None

    def start(self, options: Mapping[str, str]) -> None:
        """Opens a new file, which replaces earlier ones: TensorBoard purges their steps."""
        self._writer = self._tensorboard.SummaryWriter(str(self._folder), purge_step=0)
        self._writer.add_text("options", f"```json\n{json.dumps(options, indent=2)}\n```")

    def write(self, metrics: Mapping[str, float], step: int, seconds: float) -> None:
        """Appends scalars to the file."""
        # One event for all of them takes a fifth of the time of one for each.
        make = self._summaries.Summary
        scalars = [make.Value(tag=name, simple_value=value) for name, value in metrics.items()]
        self._writer.file_writer.add_summary(make(value=scalars), step, walltime=seconds)

    def finish(self, failed: bool) -> None:
        """Closes the file."""
        if self._writer is not None:
            self._writer.close()
