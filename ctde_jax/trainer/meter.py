"""How far a run is, what it has measured, and how fast: the rows of its history, and the pace of its dispatches."""

import time
from collections.abc import Iterator
from math import ceil

import jax
import numpy as np

from ctde_jax.checkpoint import Position
from ctde_jax.devices import hosts
from ctde_jax.errors import NonFiniteLoss
from ctde_jax.models import Task
from ctde_jax.rounds import Averages, Span, Sums, rows_a_dispatch
from ctde_jax.trainer.log import Row

_SAVE_SECONDS = 60.0
"""What lies between two checkpoints, about, where no number of steps is given."""


MOST_SKIPPED = 10
"""So many rounds in a row that were left out end a run all the same."""


class Clock:
    """Splits the wall time into named parts."""

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, part: str) -> None:
        """Counts the time since the last lap towards this part."""
        now = time.perf_counter()
        self.seconds[part] = self.seconds.get(part, 0.0) + now - self._last
        self._last = now


class Meter:
    """Turns the sums of dispatches into rows of the history, and says how long dispatches should be."""

    def __init__(
        self,
        steps_per_epoch: int,
        task: Task,
        save_every: int | None,
        skips: bool,
        position: Position,
    ):
        self._steps_per_epoch = steps_per_epoch
        self._task = task
        self._skips = skips
        self.position = position
        """How far the run is; steps gone through count when they are dispatched, all else when rows are made."""

        self._save_every = save_every
        self._saved = position.gone_through
        self._saved_at = self._last = time.perf_counter()
        self._rows_a_dispatch = 1
        self.start(Span(position.gone_through, position.gone_through, round_steps=1), sent=0)

    def start(self, span: Span, sent: float) -> None:
        """Begins a span, in whose rounds each device sends so many bytes."""
        self._span = span
        self._sent_a_round = sent
        self._dispatches = 0
        self._last = time.perf_counter()

    def pace(self) -> int:
        """Returns how many rounds the next dispatch should have, lest a checkpoint is late."""
        rows = self._rows_a_dispatch
        if self._save_every is not None:
            rows = max(1, min(rows, self._steps_until(self._save_every) // self._row_steps))
        return rows * self._span.row_rounds

    def dispatched(self, rounds: int) -> None:
        """Takes note of a dispatch."""
        gone_through = min(
            self.position.gone_through + rounds * self._span.round_steps, self._span.stop
        )
        self.position = self.position._replace(gone_through=gone_through)

    @property
    def is_at_end(self) -> bool:
        """Whether the span is whole."""
        return self.position.gone_through == self._span.stop

    def is_save_due(self) -> bool:
        """Says whether a minute has gone by, or another row would make too many steps without a checkpoint."""
        if self._save_every is None:
            return _of_the_first_host(time.perf_counter() - self._saved_at) > _SAVE_SECONDS
        next_row = min(
            self._row_steps, (self._span.stop - self.position.gone_through) or self._row_steps
        )
        return self._steps_until(self._save_every) < next_row

    def saved(self) -> None:
        """Takes note of a checkpoint."""
        self._saved, self._saved_at = self.position.gone_through, time.perf_counter()

    def row(self, split: str, averages: Averages) -> Row:
        """Raises NonFiniteLoss where the last step, whose loss was finite, has spoilt the parameters."""
        if not np.isfinite(averages["loss"]):
            raise NonFiniteLoss(self.position.step)
        return {"split": split, **self._where(), **averages}

    def rows(self, sums: Sums, first: int, last: int) -> Iterator[Row]:
        """Waits for the dispatch that computes these rounds of a piece, and yields its rows, all of the same speed.

        Raises:
            NonFiniteLoss: The loss of one of its steps is NaN or infinite.
        """
        round_steps, row_rounds = self._span.round_steps, self._span.row_rounds
        sums = {
            name: all_sums[first * round_steps :] for name, all_sums in jax.device_get(sums).items()
        }
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        self._dispatches += 1
        if self._dispatches == 2:  # the first one waited for an evaluation, or for threads to start
            self._rows_a_dispatch = rows_a_dispatch(
                _of_the_first_host(seconds / ceil((last - first) / row_rounds))
            )

        speed = round(float(sums["examples"].sum(dtype=np.float64)) / seconds, 1)
        for start in range(0, last - first, row_rounds):
            row = self._row(sums, round_steps * start, min(row_rounds, last - first - start), speed)
            if row["examples"]:
                yield row

    @property
    def _row_steps(self) -> int:
        return self._span.row_rounds * self._span.round_steps

    def _steps_until(self, period: int) -> int:
        """Returns how many are left of so many after the last checkpoint."""
        return self._saved + period - self.position.gone_through

    def _row(self, sums: Sums, start: int, rounds: int, speed: float) -> Row:
        """Makes a row of so many rounds, whose sums begin at this place; of no examples where all were left out."""
        sums = {
            name: all_sums[start : start + rounds * self._span.round_steps]
            for name, all_sums in sums.items()
        }
        step, skipped, in_a_row = (
            self.position.step,
            self.position.skipped,
            self.position.skipped_in_a_row,
        )
        bad = ~np.isfinite(sums["loss"])
        if bad.any():
            raise NonFiniteLoss(step + int(np.argmax(bad)) + 1)

        for examples in sums["examples"][
            :: self._span.round_steps
        ]:  # a round begins with a step that has some
            skipped, in_a_row = (skipped, 0) if examples else (skipped + 1, in_a_row + 1)
            if in_a_row == MOST_SKIPPED:
                raise NonFiniteLoss(step + 1)
        self.position = self.position._replace(
            step=step + int((sums["examples"] > 0).sum()),
            sent=self.position.sent + rounds * self._sent_a_round,
            skipped=skipped,
            skipped_in_a_row=in_a_row,
        )
        totals = {name: float(values.sum(dtype=np.float64)) for name, values in sums.items()}
        means = self._task.averages(totals, totals["examples"] or 1)
        counts = {"examples": int(totals["examples"]), "examples_per_second": speed}
        counts["bytes_sent"] = round(self.position.sent)
        if self._skips:
            counts["skipped"] = skipped
        if "learning_rate" in sums and totals["examples"]:
            last = np.flatnonzero(sums["examples"])[-1]
            counts["learning_rate"] = float(sums["learning_rate"][last] / sums["examples"][last])
        return {"split": "train", **self._where(), **means, **counts}

    def _where(self) -> Row:
        return {
            "step": self.position.step,
            "epoch": round(self.position.step / self._steps_per_epoch, 4),
        }


def _of_the_first_host(seconds: float) -> float:
    """Returns the same number on all hosts, so that all cut their dispatches alike."""
    return float(hosts.arrays_of_the_first(np.float32(seconds)))
