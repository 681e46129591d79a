"""What a person sees of a run: a progress bar, a line of JSON for every measurement, and the curves.

A measurement is a row, a flat dict: `split` ("train", "validation" or "test"), `step`, `epoch`, `loss`, the task's
metrics, `examples`, and for training also `examples_per_second` and `bytes_sent`, what each device has sent since the
start, and where rounds that are not finite are left out, `skipped`, their number since the start. If the optimizer was
made by `optax.inject_hyperparams`, as those of the command are, `learning_rate` is that of the row's last step. If it
contains several of them, such as in `optax.multi_transform`, no learning rate is that of all parameters, and none is
logged.
"""

import json
import math
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TextIO, cast

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

from ctde_jax.bundle import Screen, open_regular
from ctde_jax.checkpoint import METRICS, writing_to
from ctde_jax.devices import hosts
from ctde_jax.errors import InputError
from ctde_jax.models import RESERVED
from ctde_jax.trainer import picture

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Row = dict[str, Any]

_SECONDS_BETWEEN_LINES = 10.0
_SECONDS_BETWEEN_UPDATES = 1.0  # of the line in a notebook
_BURST = 12  # lines
_LONGEST_ROW = 2**20  # bytes
_NARROWEST = 40  # columns; a table has no room for its numbers in fewer


class Log:
    """Keeps the rows of a run, writes each as soon as it is known, and shows how far the run is.

    Made by `open_log`.
    """

    def __init__(
        self,
        total_steps: int,
        rows: list[Row],
        folder: Path | None,
        file: TextIO | None,
        progress: Progress,
    ):
        self.rows = rows
        self._total_steps, self._folder, self._file, self._progress = (
            total_steps,
            folder,
            file,
            progress,
        )
        done = rows[-1]["step"] if rows else 0
        self._task = progress.add_task("training", total=total_steps, completed=done, summary="")
        self._latest: dict[str, Row] = {}  # by split
        self._lines = _Lines(progress.console)

    def add(self, row: Row) -> None:
        """Keeps, writes and shows one measurement."""
        self.rows.append(row)
        if self._folder and self._file:
            with writing_to(self._folder):
                self._file.write(json.dumps(row) + "\n")
                self._file.flush()

        self._latest[row["split"]] = row
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
        """Shows the last measurement if it has not been shown."""
        self._lines.finish()

    def say(self, text: str) -> None:
        """Shows a text as it is."""
        self._progress.console.print(text)


class _Lines:
    """Progress where no bar can move: lines, as few as a person wants to read, or in a notebook one that is replaced.

    Evaluations may come in bursts of `_BURST` lines; in the long run there is a line every `_SECONDS_BETWEEN_LINES`.
    """

    def __init__(self, console: Console):
        self._console, self._started, self._shown, self._waiting = (
            console,
            time.perf_counter(),
            0,
            "",
        )
        self._last = self._started if not console.is_jupyter else -math.inf
        self._handle: Any = None  # of IPython's display, once there is one

    def show(self, text: str, is_evaluation: bool) -> None:
        """Shows a line now, or keeps it until one is due."""
        self._waiting = text
        now = time.perf_counter()
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
        """Shows the line that is kept."""
        if not self._waiting:
            return
        if self._console.is_jupyter and not self._console.quiet:
            self._replace(self._waiting)
        else:
            self._console.print(self._waiting)
        self._waiting, self._shown = "", self._shown + 1

    def _replace(self, text: str) -> None:
        from IPython.display import display  # there in a notebook

        content = {"text/plain": text}
        if self._handle is None:
            self._handle = display(content, raw=True, display_id=True)
        else:
            self._handle.update(content, raw=True)


class _Fitted:
    """The latest measurements in as many words as the terminal has room for."""

    def __init__(self, rows: Sequence[Row]):
        trained = [row for row in rows if row["split"] == "train"]
        others = [row for row in rows if row["split"] != "train"]
        without_metrics = [{name: row[name] for name in ("split", "loss")} for row in trained]
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
        return Measurement(min(10, options.max_width), options.max_width)


class _SummaryColumn(ProgressColumn):
    def render(self, task: Task) -> RenderableType:
        return task.fields["summary"]


def console(quiet: bool = False, lasting: bool = True) -> Console:
    """Returns the screen on which a run is shown, on several hosts that of host 0; lines are never broken.

    Args:
        quiet: Shows nothing.
        lasting: Drops what standard output does not take any more, so that training goes on; else that is an OSError.
    """
    file = cast(IO[str], Screen(sys.stdout)) if lasting and sys.stdout is not None else None
    screen = Console(
        quiet=quiet or hosts.index() > 0, soft_wrap=True, highlight=False, markup=False, file=file
    )
    screen.width = max(screen.width, _NARROWEST)
    return screen


@contextmanager
def open_log(
    total_steps: int, folder: Path | None = None, show: bool = True, kept: int = 0
) -> Iterator[Log]:
    """Opens the log of a run, and closes it however the run ends, the curves drawn.

    Args:
        total_steps: Optimizer steps of the whole run.
        folder: Where host 0 writes `metrics.jsonl` and `curves.png`; None writes no files.
        show: Shows a bar in a terminal, one line that is replaced in a notebook, and plain lines elsewhere.
        kept: The run goes on after so many of the rows that the folder has; those after them are taken out.

    Raises:
        InputError: The folder cannot be written to, or has fewer rows.
    """
    screen = console(quiet=not show)
    bar = Progress(
        BarColumn(bar_width=10 if screen.width >= 100 else 4),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        _SummaryColumn(table_column=Column(ratio=1, no_wrap=True)),
        expand=True,
        refresh_per_second=4,  # each takes the CPU 2 ms, which may be the only one there is
        console=screen,
        disable=screen.quiet or screen.is_jupyter or not screen.is_terminal,
    )
    files: list[TextIO] = []  # of host 0

    def read_kept() -> list[Row]:
        assert folder is not None
        path = folder / METRICS
        with writing_to(folder):
            rows, length = _read(path, kept) if kept else ([], 0)
            if path.exists():
                open_regular(path).close()  # a pipe would wait for a reader
            file = path.open("a", encoding="utf-8")
            file.truncate(length)
        files.append(file)
        return rows

    rows = [] if folder is None else hosts.of_the_first(read_kept)
    log = Log(total_steps, rows, folder, files[0] if files else None, bar)
    try:
        with bar:
            yield log
    finally:
        log.close()
        for file in files:
            assert folder is not None
            with writing_to(folder):
                file.close()
            if log.rows and (
                failure := picture.save(partial(plot_curves, log.rows), folder / "curves.png")
            ):
                screen.print(failure)


def read_rows(folder: Path, count: int) -> list[Row]:
    """Returns the first rows of the metrics of a run, however damaged the file is after them.

    Raises:
        InputError: The file cannot be read, or has fewer intact rows.
    """
    return _read(folder / METRICS, count)[0]


def _read(path: Path, count: int) -> tuple[list[Row], int]:
    """Returns so many rows of a file, and the number of bytes that they take."""
    rows: list[Row] = []
    length = 0
    try:
        with (
            open_regular(path) as file,
            suppress(ValueError, RecursionError),
        ):  # a line is not JSON, or not text
            while len(rows) < count and (line := file.readline(_LONGEST_ROW)).endswith(b"\n"):
                row = json.loads(line)
                if not _is_row(row):
                    break
                rows.append(row)
                length += len(line)
    except OSError as error:
        raise InputError(
            "run_dir", f"must have {METRICS}, and {path} cannot be read: {error.strerror}."
        ) from error
    if len(rows) < count:
        raise InputError(
            "run_dir",
            f"must have the {count} rows in {path} that were there when its checkpoint was written, got {len(rows)}; "
            "name another folder.",
        )
    return rows, length


def _is_row(value: object) -> bool:
    if not isinstance(value, dict):
        return False
    numbers = value.get("step"), value.get("loss")
    return isinstance(value.get("split"), str) and all(
        isinstance(number, int | float) for number in numbers
    )


def plot_curves(rows: Sequence[Row]) -> "Figure":
    """Draws the loss and every metric over the steps, for training and test."""
    from matplotlib.figure import Figure

    names = list(_measured(rows[0]))
    figure = Figure(figsize=(4.8 * len(names), 3.6), layout="constrained")
    for name, axes in zip(names, figure.subplots(1, len(names), squeeze=False)[0], strict=True):
        for split, color in [
            ("train", "tab:gray"),
            ("validation", "tab:orange"),
            ("test", "tab:blue"),
        ]:
            points = [(row["step"], row[name]) for row in rows if row["split"] == split]
            if points:
                marker = "." if len(points) <= 30 else ""
                axes.plot(*zip(*points, strict=True), label=split, color=color, marker=marker)
        axes.set(xlabel="optimizer step", title=name)
        axes.set_yscale(
            "log" if name == "loss" and all(row["loss"] > 0 for row in rows) else "linear"
        )
        axes.grid(alpha=0.3)
        axes.legend()
    return figure


def _measured(row: Row) -> dict[str, float]:
    """Picks the loss and the metrics out of a row."""
    return {name: value for name, value in row.items() if name not in RESERVED}


def _summary(rows: Iterable[Row], speed: bool = True) -> str:
    """Writes the loss and the metrics of the latest row of each split."""
    words = []
    for row in rows:
        measured = [f"{name} {value:.4f}" for name, value in _measured(row).items()]
        if row["split"] != "train":
            measured = [row["split"], *measured]
        elif speed:
            measured.append(f"{row['examples_per_second']:,.0f} examples/s")
        words.append(" ".join(measured))
    return "  ".join(words)
