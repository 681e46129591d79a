"""The log of a run: a progress bar, the rows of the history as JSON lines, and curves.

A *row* is a flat dict with the averages over some training steps or over an evaluation: `split`
("train", "validation" or "test"), `step`, `epoch`, `loss`, the metrics of the task, and `examples`,
the number of examples. Rows of the training split also have:

- `examples_per_second`: the mean since the start or the last evaluation;
- `time`: when the row was computed, in seconds since 1970 (Unix time);
- `bytes_sent`: bytes that each device has sent since the start;
- `skipped`: rounds skipped since the start, if `on_nonfinite` is `skip`;
- `learning_rate`: the learning rate of the row's last step, if `optax.inject_hyperparams` made the
  optimizer, as it makes those of the command. If the optimizer contains several learning rates, as
  `optax.multi_transform` may, none applies to all parameters, and none is logged;
- `gradient_norm`: the norm of the gradient in the row's last step, if the optimizer contains
  `optax.snapshot("gradient_norm", optax.tree.norm)`, as that of the command does if it clips. In
  local steps, it is the mean over the devices.
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
from ctde_jax.checkpoint import CURVES, METRICS, writing_to
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
_NARROWEST = 40  # columns; in fewer, a table has no room for its numbers


class Log:
    """The rows of a run, each of which is written to the file immediately, and its progress.

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
        self._total_steps = total_steps
        self._folder = folder
        self._file = file
        self._progress = progress
        done = rows[-1]["step"] if rows else 0
        self._task = progress.add_task("training", total=total_steps, completed=done, summary="")
        self._latest: dict[str, Row] = {}  # by split
        self._lines = _Lines(progress.console)

    def add(self, row: Row) -> None:
        """Appends a row to the history and to the file, and shows it.

        Raises:
            InputError: The file cannot be written.
        """
        self.rows.append(row)
        if self._folder and self._file:
            # Flush each row: a checkpoint relies on all rows before it being in the file.
            with writing_to(self._folder):
                self._file.write(json.dumps(row) + "\n")
                self._file.flush()

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
    # Host 0 reads the rows that the checkpoint counts, and cuts off the rows after them.
    files: list[TextIO] = []  # empty on other hosts

    def read_kept() -> list[Row]:
        assert folder is not None
        path = folder / METRICS
        with writing_to(folder):
            rows, length = _read(path, kept) if kept else ([], 0)
            if path.exists():
                # Refuse a pipe first, because opening it for writing would wait for a reader.
                open_regular(path).close()
            file = path.open("a", encoding="utf-8")
            file.truncate(length)
        files.append(file)
        return rows

    rows = [] if folder is None else hosts.of_the_first(read_kept)
    log = Log(total_steps, rows, folder, files[0] if files else None, bar)

    # On exit, show the last row, close the file and draw the curves.
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
                failure := picture.save(partial(plot_curves, log.rows), folder / CURVES)
            ):
                screen.print(failure)


def read_rows(folder: Path, count: int) -> list[Row]:
    """Returns the first `count` rows of `metrics.jsonl`, even if the file is damaged after them.

    Args:
        folder: The folder of the run.
        count: Number of rows to read.

    Raises:
        InputError: The file cannot be read, or has fewer than `count` intact rows.
    """
    return _read(folder / METRICS, count)[0]


def _read(path: Path, count: int) -> tuple[list[Row], int]:
    """Returns the first `count` rows of a file, and the length of their lines in bytes.

    Raises:
        InputError: The file cannot be read, or has fewer than `count` intact rows.
    """
    rows: list[Row] = []
    length = 0
    # The intact rows end at the first line that is not UTF-8, JSON or a row, or has no line end.
    try:
        with (
            open_regular(path) as file,
            suppress(ValueError, RecursionError),
        ):
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
            f"must have the {count} rows in {path} that were there when its checkpoint was "
            f"written, got {len(rows)}; name another folder.",
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
