"""What a person sees of a run: a progress bar, a line of JSON for every measurement, and the curves.

A measurement is a row, a flat dict: `split` ("train", "validation" or "test"), `step`, `epoch`, `loss`, the task's
metrics, `examples`, and for training also `examples_per_second` and `bytes_sent`, what each device has sent since the
start, and where rounds that are not finite are left out, `skipped`, their number since the start.
"""

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

from ctde_jax import hosts
from ctde_jax.errors import InputError
from ctde_jax.run_folder import METRICS, writing_to
from ctde_jax.tasks import RESERVED

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Row = dict[str, Any]

_SECONDS_BETWEEN_LINES = 10.0


class Log:
    """Keeps the rows of a run, writes each as soon as it is known, and shows how far the run is.

    Made by `open_log`.
    """

    def __init__(self, total_steps: int, rows: list[Row], folder: Path | None, file: TextIO | None, progress: Progress):
        self.rows = rows
        self._total_steps, self._folder, self._file, self._progress = total_steps, folder, file, progress
        done = rows[-1]["step"] if rows else 0
        self._task = progress.add_task("training", total=total_steps, completed=done, summary="")
        self._last_line = time.perf_counter()
        self._latest: dict[str, str] = {}  # by split

    def add(self, row: Row) -> None:
        """Keeps, writes and shows one measurement."""
        self.rows.append(row)
        if self._folder and self._file:
            with writing_to(self._folder):
                self._file.write(json.dumps(row) + "\n")
                self._file.flush()

        self._latest[row["split"]] = _summary(row)
        summary = "  ".join(self._latest.values())
        self._progress.update(self._task, completed=row["step"], summary=summary)
        long_ago = time.perf_counter() - self._last_line > _SECONDS_BETWEEN_LINES
        if self._progress.disable and (row["split"] == "test" or long_ago):
            self._last_line = time.perf_counter()
            self._progress.console.print(f"step {row['step']:,} of {self._total_steps:,}  {summary}")

    def say(self, text: str) -> None:
        """Shows a text as it is."""
        self._progress.console.print(text)


def console(quiet: bool = False) -> Console:
    """Returns the screen on which a run is shown, of several hosts that of host 0; lines are never broken."""
    return Console(quiet=quiet or hosts.index() > 0, soft_wrap=True, highlight=False, markup=False)


@contextmanager
def open_log(total_steps: int, folder: Path | None = None, show: bool = True, kept: int = 0) -> Iterator[Log]:
    """Opens the log of a run, and closes it however the run ends, the curves drawn.

    Args:
        total_steps: Optimizer steps of the whole run.
        folder: Where host 0 writes `metrics.jsonl` and `curves.png`; None writes no files.
        show: Shows a bar in a terminal or notebook, and plain lines elsewhere.
        kept: The run goes on after so many of the rows that the folder has; those after them are taken out.

    Raises:
        InputError: The folder cannot be written to, or has fewer rows.
    """
    screen = console(quiet=not show)
    bar = Progress(
        BarColumn(bar_width=10),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[summary]}", table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis")),
        expand=True,
        refresh_per_second=4,  # each takes the CPU 2 ms, which may be the only one there is
        console=screen,
        disable=screen.quiet or not (screen.is_terminal or (screen.is_jupyter and find_spec("ipywidgets"))),
    )
    files: list[TextIO] = []  # of host 0

    def read_kept() -> list[Row]:
        assert folder is not None
        with writing_to(folder):
            file = (folder / METRICS).open("a+", encoding="utf-8")
            try:
                rows = _keep(kept, file)
            except InputError:
                file.close()
                raise
            files.append(file)
            return rows

    rows = [] if folder is None else hosts.of_the_first(read_kept)
    log = Log(total_steps, rows, folder, files[0] if files else None, bar)
    try:
        with bar:
            yield log
    finally:
        for file in files:
            assert folder is not None
            with writing_to(folder), file:
                if log.rows:
                    plot_curves(log.rows).savefig(folder / "curves.png", dpi=120)


def _keep(kept: int, file: TextIO) -> list[Row]:
    """Returns the first so many rows of a file, and cuts it off behind them."""
    file.seek(0)
    rows: list[Row] = []
    with suppress(ValueError):  # a line that is no JSON, or no text, is no row
        while len(rows) < kept and (line := file.readline()).endswith("\n") and _is_row(row := json.loads(line)):
            rows.append(row)
    if len(rows) < kept:
        raise InputError(
            "run_dir",
            f"must have the {kept} rows in {file.name} that were there when its checkpoint was written, got "
            f"{len(rows)}; name another folder.",
        )
    file.truncate(file.tell())
    return rows


def _is_row(said: object) -> bool:
    return isinstance(said, dict) and {"split", "step", "loss"} <= said.keys()


def plot_curves(rows: Sequence[Row]) -> "Figure":
    """Draws the loss and every metric over the steps, for training and test."""
    from matplotlib.figure import Figure

    names = list(_measured(rows[0]))
    figure = Figure(figsize=(4.8 * len(names), 3.6), layout="constrained")
    for name, axes in zip(names, figure.subplots(1, len(names), squeeze=False)[0], strict=True):
        for split, color in [("train", "tab:gray"), ("validation", "tab:orange"), ("test", "tab:blue")]:
            points = [(row["step"], row[name]) for row in rows if row["split"] == split]
            if points:
                marker = "." if len(points) <= 30 else ""
                axes.plot(*zip(*points, strict=True), label=split, color=color, marker=marker)
        axes.set(xlabel="optimizer step", title=name)
        axes.set_yscale("log" if name == "loss" and all(row["loss"] > 0 for row in rows) else "linear")
        axes.grid(alpha=0.3)
        axes.legend()
    return figure


def _measured(row: Row) -> dict[str, float]:
    """Picks the loss and the metrics out of a row."""
    return {name: value for name, value in row.items() if name not in RESERVED}


def _summary(row: Row) -> str:
    words = [f"{name} {value:.4f}" for name, value in _measured(row).items()]
    if row["split"] == "train":
        return " ".join([*words, f"{row['examples_per_second']:,.0f} examples/s"])
    return " ".join([row["split"], *words])
