"""The progress of a run on the screen, and its curves."""

import math
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.measure import Measurement
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TimeRemainingColumn,
)
from rich.table import Column
from rich.text import Text

from ctde_jax.bundle import Screen
from ctde_jax.checkpoint import CURVES
from ctde_jax.devices import hosts
from ctde_jax.models import RESERVED
from ctde_jax.trainer import picture
from ctde_jax.trainer.history import History, Row, open_history

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SECONDS_BETWEEN_LINES = 10.0
_SECONDS_BETWEEN_UPDATES = 1.0  # of the line in a notebook
_BURST = 12  # lines
_NARROWEST = 40  # columns; in fewer, a table has no room for its numbers


class Log:
    """The history of a run, and its progress on the screen.

    Made by `open_log`.
    """

    def __init__(self, total_steps: int, history: History, progress: Progress):
        self.rows = history.rows
        self._history = history
        self._total_steps = total_steps
        self._progress = progress
        done = self.rows[-1]["step"] if self.rows else 0
        self._task = progress.add_task("training", total=total_steps, completed=done, summary="")
        self._latest: dict[str, Row] = {}  # by split
        self._lines = _Lines(progress.console)

    def add(self, row: Row) -> None:
        """Appends a row to the history, and shows it.

        Raises:
            InputError: The file cannot be written.
        """
        self._history.add(row)
        self._latest[row["split"]] = row
        # Outside a terminal the bar is disabled, and lines are printed instead.
        if self._progress.disable:
            rows = list(self._latest.values())
            self._lines.show(
                f"step {row['step']:,} of {self._total_steps:,}  {_summary(rows)}",
                row["split"] == "test",
            )
        else:
            self._progress.update(
                self._task, completed=row["step"], summary=_Fitted(list(self._latest.values()))
            )

    def close(self) -> None:
        """Shows the last row if progress is shown in lines and the row has not been shown yet."""
        self._lines.finish()

    def say(self, text: str) -> None:
        """Prints a text as it is."""
        self._progress.console.print(text)


class _Lines:
    """Progress without a bar: printed lines, or in a notebook one line that is replaced.

    Since the start, at most `_BURST` lines are printed, plus one for every
    `_SECONDS_BETWEEN_LINES` seconds. Between evaluations, lines are at least this time apart.
    """

    def __init__(self, console: Console):
        self._console = console
        self._started = time.perf_counter()
        self._shown = 0
        self._waiting = ""
        # A notebook shows its first line immediately, a terminal or a file only after the interval.
        self._last = self._started if not console.is_jupyter else -math.inf
        self._handle: Any = None  # of IPython's display, once there is one

    def show(self, text: str, is_evaluation: bool) -> None:
        """Shows a line, or, if none is due yet, keeps it for `finish` until the next one comes."""
        self._waiting = text
        now = time.perf_counter()
        # In a notebook a new line replaces the old one, so only the rate of updates is limited.
        allowed = _BURST + (now - self._started) / _SECONDS_BETWEEN_LINES
        if self._console.is_jupyter:
            is_due = now - self._last > _SECONDS_BETWEEN_UPDATES
        else:
            is_due = self._shown < allowed and (
                is_evaluation or now - self._last > _SECONDS_BETWEEN_LINES
            )
        if is_due:
            self._last = now
            self.finish()

    def finish(self) -> None:
        """Shows the line that `show` has kept, if there is one."""
        if not self._waiting:
            return
        if self._console.is_jupyter and not self._console.quiet:
            self._replace(self._waiting)
        else:
            self._console.print(self._waiting)
        self._waiting = ""
        self._shown = self._shown + 1

    def _replace(self, text: str) -> None:
        # A notebook always has IPython; other programs need not.
        from IPython.display import display

        content = {"text/plain": text}
        if self._handle is None:
            self._handle = display(content, raw=True, display_id=True)
        else:
            self._handle.update(content, raw=True)


class _Fitted:
    """The latest row of each split as one line of text that fits the width of the terminal."""

    def __init__(self, rows: Sequence[Row]):
        trained = [row for row in rows if row["split"] == "train"]
        others = [row for row in rows if row["split"] != "train"]
        without_metrics = [{name: row[name] for name in ("split", "loss")} for row in trained]
        # From the longest to the shortest, which contains the test split alone.
        self._texts = [
            _summary([*trained, *others]),
            _summary([*trained, *others], speed=False),
            _summary([*without_metrics, *others], speed=False),
            _summary([row for row in others if row["split"] == "test"] or trained, speed=False),
        ]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        fitting = [text for text in self._texts if cell_len(text) <= options.max_width]
        yield Text(fitting[0] if fitting else self._texts[-1], no_wrap=True, overflow="ellipsis")

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        # The column may shrink to 10 columns, and takes all the width that the others leave.
        return Measurement(min(10, options.max_width), options.max_width)


class _SummaryColumn(ProgressColumn):
    def render(self, task: Task) -> RenderableType:
        return task.fields["summary"]


def console(quiet: bool = False, ignore_failures: bool = True) -> Console:
    """Returns a console for progress and results, which prints only on host 0 and wraps no lines.

    Args:
        quiet: Whether to print nothing.
        ignore_failures: If True, a failed write to standard output, such as to a closed pipe or a
            full disk, is reported once on standard error, and later output is dropped, so that
            training continues. If False, the write raises OSError.
    """
    # Standard output is None in a process that was started with it closed.
    file = cast(IO[str], Screen(sys.stdout)) if ignore_failures and sys.stdout is not None else None
    screen = Console(
        quiet=quiet or hosts.index() > 0, soft_wrap=True, highlight=False, markup=False, file=file
    )
    screen.width = max(screen.width, _NARROWEST)
    return screen


@contextmanager
def open_log(
    total_steps: int, folder: Path | None = None, show: bool = True, kept: int = 0
) -> Iterator[Log]:
    """Opens the log of a run; on exit, also after an exception, closes it and draws the curves.

    Args:
        total_steps: Number of optimizer steps of the whole run.
        folder: Folder for `metrics.jsonl` and `curves.png`, which host 0 writes; None for no files.
        show: Whether to show a bar in a terminal, one line that is replaced in a notebook, and
            plain lines elsewhere.
        kept: Number of rows in the folder that belong to the checkpoint from which the run
            continues; later rows are removed.

    Raises:
        InputError: The folder cannot be written to, or has fewer than `kept` intact rows.
    """
    # A bar in a terminal alone; everywhere else it is disabled, and `Log` prints lines.
    screen = console(quiet=not show)
    bar = Progress(
        BarColumn(bar_width=10 if screen.width >= 100 else 4),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        _SummaryColumn(table_column=Column(ratio=1, no_wrap=True)),
        expand=True,
        refresh_per_second=4,  # each takes 2 ms of CPU time, and there may be only one CPU
        console=screen,
        disable=screen.quiet or screen.is_jupyter or not screen.is_terminal,
    )
    with open_history(folder, kept) as history:
        log = Log(total_steps, history, bar)
        # On exit, also after an exception, show the last row and draw the curves.
        try:
            with bar:
                yield log
        finally:
            log.close()
            if folder is not None and hosts.index() == 0 and history.rows:
                draw = partial(plot_curves, history.rows)
                if failure := picture.save(draw, folder / CURVES):
                    screen.print(failure)


def plot_curves(rows: Sequence[Row]) -> "Figure":
    """Draws the loss and every metric over the optimizer steps, with one curve for each split.

    Args:
        rows: The rows of a run, such as `Trained.history`; the first one determines the metrics.

    Returns:
        The matplotlib figure, which is not shown, with one panel for the loss and each metric.

    Examples:
        >>> model, data = ctde.models.mlp([64, 10]), ctde.data.digits()
        >>> trained = ctde.fit(model, data, optax.sgd(0.1), steps=1, show=False)
        >>> ctde.plot_curves(trained.history).savefig("curves.png")
    """
    # Imported here, as only runs with a folder need matplotlib.
    from matplotlib.figure import Figure

    names = list(_measured(rows[0]))
    figure = Figure(figsize=(4.8 * len(names), 3.6), layout="constrained")
    # One panel each for the loss and every metric; the test split is drawn last, on top.
    for name, axes in zip(names, figure.subplots(1, len(names), squeeze=False)[0], strict=True):
        for split, color in [
            ("train", "tab:gray"),
            ("validation", "tab:orange"),
            ("test", "tab:blue"),
        ]:
            points = [(row["step"], row[name]) for row in rows if row["split"] == split]
            # A line does not show a single point; markers on many points hide the curve.
            if points:
                marker = "." if len(points) <= 30 else ""
                axes.plot(*zip(*points, strict=True), label=split, color=color, marker=marker)
        axes.set(xlabel="optimizer step", title=name)
        # A logarithmic axis needs positive values; the loss of a density model may be negative.
        axes.set_yscale(
            "log" if name == "loss" and all(row["loss"] > 0 for row in rows) else "linear"
        )
        axes.grid(alpha=0.3)
        axes.legend()
    return figure


def _measured(row: Row) -> dict[str, float]:
    """Returns the loss and the metrics of a row."""
    return {name: value for name, value in row.items() if name not in RESERVED}


def _summary(rows: Iterable[Row], speed: bool = True) -> str:
    """Returns the loss and the metrics of rows as text; `speed` adds the training speed."""
    words = []
    for row in rows:
        measured = [f"{name} {value:.4f}" for name, value in _measured(row).items()]
        if row["split"] != "train":
            measured = [row["split"], *measured]
        elif speed:
            measured.append(f"{row['examples_per_second']:,.0f} examples/s")
        words.append(" ".join(measured))
    return "  ".join(words)
