"""The progress of a run, the rows of its history, and the length of its dispatches."""

import time
from collections.abc import Iterator, Mapping
from math import ceil

import jax
import numpy as np

from ctde_jax.checkpoint import Position
from ctde_jax.devices import hosts
from ctde_jax.errors import NonFiniteLoss
from ctde_jax.models import Task
from ctde_jax.rounds import OF_THE_OPTIMIZER, Averages, Span, Sums, rows_per_dispatch
from ctde_jax.trainer.history import Row

_SAVE_SECONDS = 60.0
"""Approximate time between two checkpoints if `save_every` is not given."""


MOST_SKIPPED = 10
"""Number of consecutive skipped rounds after which a run ends with NonFiniteLoss."""


class Clock:
    """Splits the wall time into named parts."""

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, part: str) -> None:
        """Adds the time since the last lap to this part."""
        now = time.perf_counter()
        self.seconds[part] = self.seconds.get(part, 0.0) + now - self._last
        self._last = now


class Meter:
    """Converts the sums of dispatches to rows of the history, and sets the length of dispatches.

    Args:
        steps_per_epoch: Number of steps per epoch.
        task: Task whose loss and metrics are averaged.
        save_every: Maximum number of steps between two checkpoints; None for about a minute.
        skips: Whether rounds with NaN or infinity are skipped, and their number is logged.
        position: Progress of the run at its start.
    """

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
        """Progress; `gone_through` is ahead of the other entries, as it includes all dispatches."""

        self._save_every = save_every
        self._saved = position.gone_through
        self._saved_at = time.perf_counter()
        # One row in each dispatch until the time of a row has been measured.
        self._rows_per_dispatch = 1
        self.start(Span(position.gone_through, position.gone_through, round_steps=1), sent=0)

    def start(self, span: Span, sent: float) -> None:
        """Begins a span.

        Args:
            span: The span.
            sent: Bytes that each device sends per round.
        """
        self._span = span
        self._sent_per_round = sent
        self._dispatches = 0
        self._examples = 0.0
        self._started = self._last = time.perf_counter()

    def pace(self) -> int:
        """Returns the number of rounds of the next dispatch.

        They form at least one row. Further rows must end before a checkpoint by `save_every` is
        due.
        """
        rows = self._rows_per_dispatch
        if self._save_every is not None:
            # At least one row, as a row has at least one round, and that may exceed `save_every`.
            rows = max(1, min(rows, self._steps_until(self._save_every) // self._row_steps))
        return rows * self._span.row_rounds

    def dispatched(self, rounds: int) -> None:
        """Records that this many rounds have been dispatched."""
        # The last round of a span may be padded with empty steps, which are not counted.
        gone_through = min(
            self.position.gone_through + rounds * self._span.round_steps, self._span.stop
        )
        self.position = self.position._replace(gone_through=gone_through)

    @property
    def is_at_end(self) -> bool:
        """Whether the whole span has been dispatched."""
        return self.position.gone_through == self._span.stop

    def is_save_due(self) -> bool:
        """Returns whether to write a checkpoint before the next row.

        With `save_every`, it is due if the next row would end more than `save_every` steps after
        the last checkpoint; otherwise a minute after the last checkpoint.
        """
        # Hosts must agree on the answer, as all of them take part in a checkpoint.
        if self._save_every is None:
            return _of_the_first_host(time.perf_counter() - self._saved_at) > _SAVE_SECONDS
        # The last row of a span may be shorter; after it, the next span begins with a whole row.
        next_row = min(
            self._row_steps, (self._span.stop - self.position.gone_through) or self._row_steps
        )
        return self._steps_until(self._save_every) < next_row

    def saved(self) -> None:
        """Records that a checkpoint has been written."""
        self._saved = self.position.gone_through
        self._saved_at = time.perf_counter()

    def row(self, split: str, averages: Averages) -> Row:
        """Returns the history row of an evaluation on `split`.

        Raises:
            NonFiniteLoss: The averaged loss is NaN or infinite, for example because the last update
                made the parameters non-finite.
        """
        if not np.isfinite(averages["loss"]):
            raise NonFiniteLoss(self.position.step)
        return {"split": split, **self._where(), **averages}

    def rows(self, sums: Sums, first: int, last: int) -> Iterator[Row]:
        """Waits for a dispatch, and yields the rows of its rounds.

        `examples_per_second` is the mean since the start of the span. The time between two reads
        would be too short if the next dispatch is ready when this one is read. A row whose rounds
        were all skipped is left out.

        Args:
            sums: Sums of the steps of a piece over all replicas, by name, each float32[steps].
            first: First round of the dispatch within the piece.
            last: End of these rounds, exclusive.

        Raises:
            NonFiniteLoss: The loss of a step is NaN or infinite, or `MOST_SKIPPED` consecutive
                rounds were skipped.
        """
        round_steps = self._span.round_steps
        row_rounds = self._span.row_rounds
        # The device_get waits for the dispatch, so the clock is read after it.
        sums = {
            name: all_sums[first * round_steps :] for name, all_sums in jax.device_get(sums).items()
        }
        now = time.perf_counter()
        seconds = now - self._last
        self._last = now

        # The first dispatch also waited for an evaluation or for threads, so time the second.
        self._dispatches += 1
        if self._dispatches == 2:
            self._rows_per_dispatch = rows_per_dispatch(
                _of_the_first_host(seconds / ceil((last - first) / row_rounds))
            )

        of_dispatch = sums["examples"][: (last - first) * round_steps]
        self._examples += float(of_dispatch.sum(dtype=np.float64))
        speed = round(self._examples / (now - self._started), 1)
        for start in range(0, last - first, row_rounds):
            row = self._row(sums, round_steps * start, min(row_rounds, last - first - start), speed)
            # Without examples, because all rounds were skipped, there are no averages.
            if row["examples"]:
                yield row

    def row_of_round(self, totals: Mapping[str, float], steps: int, sent: float) -> Row:
        """Advances by a round of nodes, and returns its history row.

        Args:
            totals: Sums over the examples of all nodes, by name.
            steps: Number of steps of the round.
            sent: Bytes that each node has sent.

        Raises:
            NonFiniteLoss: The averaged loss is NaN or infinite.
        """
        now = time.perf_counter()
        speed = round(totals["examples"] / (now - self._last), 1)
        self._last = now
        position = self.position
        self.position = position._replace(
            gone_through=position.gone_through + steps,
            step=position.step + steps,
            sent=position.sent + sent,
        )
        means = self._task.averages(totals, totals["examples"] or 1)
        counts = {"examples": int(totals["examples"]), "examples_per_second": speed}
        counts |= {"time": round(time.time(), 3), "bytes_sent": round(self.position.sent)}
        return {**self.row("train", means), **counts}

    @property
    def _row_steps(self) -> int:
        return self._span.row_rounds * self._span.round_steps

    def _steps_until(self, period: int) -> int:
        """Returns the number of steps until `period` steps after the last checkpoint."""
        return self._saved + period - self.position.gone_through

    def _row(self, sums: Sums, start: int, rounds: int, speed: float) -> Row:
        """Returns the history row of consecutive rounds; `examples` is 0 if all were skipped.

        Args:
            sums: Sums of the steps of the dispatch, by name, each float32[steps].
            start: First step of the row within these sums.
            rounds: Number of rounds in the row.
            speed: Number of examples per second.

        Raises:
            NonFiniteLoss: As for `rows`.
        """
        # The sums of these rounds, each float32[rounds * round_steps].
        sums = {
            name: all_sums[start : start + rounds * self._span.round_steps]
            for name, all_sums in sums.items()
        }
        step = self.position.step
        skipped = self.position.skipped
        in_a_row = self.position.skipped_in_a_row

        # Name the first step whose loss is not finite, counted from 1. The sums of a skipped round
        # are zero, so a run that skips such rounds does not fail here.
        bad = ~np.isfinite(sums["loss"])
        if bad.any():
            first = int(np.argmax(bad))
            raise NonFiniteLoss(step + int((sums["examples"][: first + 1] > 0).sum()))

        # The first step of a round has examples, unless the round was skipped.
        for examples in sums["examples"][:: self._span.round_steps]:
            skipped, in_a_row = (skipped, 0) if examples else (skipped + 1, in_a_row + 1)
            if in_a_row == MOST_SKIPPED:
                raise NonFiniteLoss(step + 1)

        # A step in which no replica has examples is not an optimizer step.
        self.position = self.position._replace(
            step=step + int((sums["examples"] > 0).sum()),
            sent=self.position.sent + rounds * self._sent_per_round,
            skipped=skipped,
            skipped_in_a_row=in_a_row,
        )

        # Average in float64: a row may have more examples than float32 counts exactly.
        totals = {name: float(values.sum(dtype=np.float64)) for name, values in sums.items()}
        means = self._task.averages(totals, totals["examples"] or 1)
        counts: Row = {"examples": int(totals["examples"]), "examples_per_second": speed}
        counts["time"] = round(time.time(), 3)
        counts["bytes_sent"] = round(self.position.sent)
        if self._skips:
            counts["skipped"] = skipped
        # These sums are values of the step times its examples; see `with_measurements`.
        for name in OF_THE_OPTIMIZER:
            if name in sums and totals["examples"]:
                last = np.flatnonzero(sums["examples"])[-1]
                counts[name] = float(sums[name][last] / sums["examples"][last])
        return {"split": "train", **self._where(), **means, **counts}

    def _where(self) -> Row:
        return {
            "step": self.position.step,
            "epoch": round(self.position.step / self._steps_per_epoch, 4),
        }


def _of_the_first_host(seconds: float) -> float:
    """Returns the value of host 0 on all hosts, so that all of them choose the same dispatches."""
    return float(hosts.arrays_of_the_first(np.float32(seconds)))
