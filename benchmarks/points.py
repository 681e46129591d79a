"""A benchmark made of points: each is measured in a process of its own, and written down as soon as it is known.

A process of its own, because the number of devices is fixed when JAX starts, the peak of memory is one for a whole
process, and one point that fails or never ends must not take the others with it. What is in the file is not measured
again, nor what has failed; delete a line, or the file, to do so.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

RESULTS = Path(__file__).parent / "results"

Row = dict[str, Any]


def parse(parser: argparse.ArgumentParser, measure_point: Callable[[Row], Row]) -> argparse.Namespace:
    """Parses a benchmark's options and `--report`; in a process that `measure` has started, measures and ends."""
    parser.add_argument("--report", action="store_true", help="measure nothing")
    parser.add_argument("--point", type=json.loads, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.point:
        print(json.dumps(measure_point(chosen.point)))
        sys.exit()
    return chosen


def known(name: str) -> list[Row]:
    """Returns the rows of `results/name.jsonl`, in the order in which they were measured."""
    file = RESULTS / f"{name}.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def add(name: str, row: Row) -> None:
    """Writes down a row at the end of `results/name.jsonl`."""
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / f"{name}.jsonl").open("a", encoding="utf-8") as file:
        print(json.dumps(row), file=file)


def next_turn(name: str) -> int:
    """Returns the number of the first turn that is not in `results/name.jsonl` yet."""
    return 1 + max((row["turn"] for row in known(name)), default=-1)


def measure(
    name: str, script: str, points: Iterable[Row], limit: float, can: Callable[[Row], bool] = lambda point: True
) -> None:
    """Measures the points that are not in `results/name.jsonl` yet, and writes down each.

    Args:
        name: Of the file.
        script: Is run with `--point` and the point as JSON, and prints what it measures as its last line, in JSON.
        points: What a row of the file must say to be that point's.
        limit: Seconds, after which a process is ended.
        can: Is asked before each point whether it can be measured; else it is left out.
    """
    rows = known(name)
    missing = [point for point in points if not any(point.items() <= row.items() for row in rows)]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(elapsed_when_finished=True)) as progress:
        task = progress.add_task("measuring", total=len(missing))
        for point in missing:
            progress.update(task, description=" ".join(map(str, point.values())))
            if not can(point):
                progress.advance(task)
                continue
            row = {**point, **run(script, point, limit), "time": datetime.now(UTC).isoformat(timespec="seconds")}
            add(name, row)
            if "failed" in row:
                progress.console.print(f"{point} failed: {row['failed']}", markup=False)
            progress.advance(task)


def run(script: str, point: Row, limit: float) -> Row:
    """Measures one point in a new process; where that does not work out, `failed` says why."""
    command = [sys.executable, script, "--point", json.dumps(point)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return {"failed": f"took more than {limit:g} s"}
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        return {"failed": f"exit status {done.returncode}: {last[:200]}"}
    return json.loads(done.stdout.strip().splitlines()[-1])


def quartiles(values: Sequence[float], digits: str = ".2f") -> str:
    """Writes the median, and the first and third quartile in parentheses."""
    low, middle, high = np.percentile(values, [25, 50, 75])
    return f"{middle:{digits}} ({low:{digits}}-{high:{digits}})"


def publish(name: str, title: str, header: Sequence[str], rows: Sequence[Sequence[str]], note: str) -> None:
    """Prints a table, and writes it to `results/name.md`."""
    shown = Table(*header, title=title, caption=note, caption_justify="left")
    for cells in rows:
        shown.add_row(*cells)
    width = 20 + sum(max(map(len, column)) + 3 for column in zip(header, *rows, strict=True))
    screen = Console()
    Console(width=max(screen.width, min(width, 200))).print(shown)

    lines = [header, ["---"] * len(header), *rows]
    text = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.md").write_text(f"## {title}\n\n{text}\n\n{note}\n", encoding="utf-8")


def as_markdown(table: Table) -> str:
    """Writes a table with its title as Markdown."""
    columns = [[str(column.header), *map(str, column.cells)] for column in table.columns]
    header, *rows = [f"| {' | '.join(row)} |" for row in zip(*columns, strict=True)]
    return "\n".join([f"{table.title}\n", header, "|---" * len(columns) + "|", *rows])


def machine(*rivals: str) -> str:
    """Says what the figures were measured on, and with what; of other packages, those that are there."""
    processor = platform.processor() or platform.machine()
    if (info := Path("/proc/cpuinfo")).exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        processor = names[0].split(":")[1].strip() if names else processor
    names = ["jax", "flax", "optax", "numpy", *filter(find_spec, rivals)]
    packages = ", ".join(f"{package} {version(package)}" for package in names)
    return f"{cores()} cores of {processor}, Python {platform.python_version()}, {packages}"


def cores() -> int:
    """Returns how many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
