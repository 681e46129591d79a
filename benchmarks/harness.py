"""Shared parts of the benchmarks: processes that take turns, a log, tables, and the command line.

Each contestant is a separate process: JAX fixes the number of devices when it starts, peak memory
is that of a whole process, and a contestant that fails or hangs must not end the others. Each
result is written to disk at once, and is not measured again; to repeat a measurement, delete its
line in `results/NAME.jsonl`, or the file.
"""

import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import rich.table
import tyro
from rich.console import Console
from rich.progress import track

RESULTS = Path(__file__).parent / "results"

Row = dict[str, Any]
console = Console(soft_wrap=True, highlight=False, markup=False)


def command_line(
    main: Callable[..., int | None], measure_point: Callable[[Row], Any] | None = None
) -> None:
    """Runs `main` with the options of the command line; with `--point`, measures that point."""
    # SIGTERM raises SystemExit, so that `started` still ends the contestants.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))
    if measure_point and sys.argv[1:2] == ["--point"]:
        print(json.dumps({"measured": measure_point(json.loads(sys.argv[2]))}))
    else:
        sys.exit(tyro.cli(main, description=sys.modules["__main__"].__doc__))


class Log:
    """Log of measurements in a JSON Lines file, one row for each measurement."""

    def __init__(self, file: Path):
        self.file = file

    def find(self, **wanted: Any) -> list[Row]:
        """Returns the rows that contain these entries, in the order of measurement."""
        lines = self.file.read_text(encoding="utf-8").splitlines() if self.file.exists() else []
        return [row for row in map(json.loads, lines) if wanted.items() <= row.items()]

    def put(self, what: Row, **measured: Any) -> None:
        """Appends a row, and removes an earlier row of the same measurement."""
        rows = [row for row in self.find() if not what.items() <= row.items()] + [
            {**what, **measured}
        ]
        # Write a second file and rename it, so that an interruption cannot damage the log.
        self.file.parent.mkdir(parents=True, exist_ok=True)
        new = self.file.with_suffix(".new")
        new.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
        new.replace(self.file)

    def append(self, row: Row) -> None:
        """Appends a row; several processes may append to the same log, but not call `put`."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        # One write in append mode, so that rows of two processes do not mix.
        with self.file.open("a", encoding="utf-8") as file:
            file.write(f"{json.dumps(row)}\n")

    def make(self, run: Callable[[], Row], **what: Any) -> None:
        """Runs a measurement and logs its row, unless the log has one."""
        if not self.find(**what):
            begin = time.perf_counter()
            row = run()
            self.put(what, **{"seconds": round(time.perf_counter() - begin, 1), **row})
            console.print(json.dumps(self.find(**what)[-1]))


class Failed(Exception):
    """Raised if a process ends too early or takes too long; the message gives the reason."""


class Process:
    """A process that prints JSON lines and may wait for lines on its stdin; see `started`."""

    def __init__(self, command: Sequence[str | Path], environment: Mapping[str, str]):
        # A file, because a pipe that is not read until the end would fill up and block the process.
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (`close` closes it)
        self._begin = time.perf_counter()
        # The new session makes the process the leader of a group, which `_kill` ends as a whole.
        self._popen = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env={**os.environ, "JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": "", **environment},
            start_new_session=True,
        )

    @property
    def seconds(self) -> float:
        """Seconds since the process started."""
        return time.perf_counter() - self._begin

    def go(self, times: int = 1) -> None:
        """Writes lines to the stdin of the process; each line lets it continue once."""
        with suppress(BrokenPipeError):  # the process has ended, so `hear` raises `Failed`
            print("go\n" * times, end="", file=self._popen.stdin, flush=True)

    def hear(self, what: str, limit: float = threading.TIMEOUT_MAX) -> Any:
        """Returns the entry `what` of the next JSON line that has it; fails after `limit` s."""
        # The timer kills the process, which closes its stdout and so ends the loop.
        end = time.perf_counter() + limit
        timer = threading.Timer(limit, self._kill)
        timer.start()
        for line in self._popen.stdout or ():
            found = json.loads(line) if line.startswith("{") else {}
            if what in found:
                timer.cancel()
                return found[what]
        timer.cancel()
        raise Failed(
            self.last_words() if time.perf_counter() < end else f"took more than {limit:g} s"
        )

    def wait_for_row(self, file: Path, wanted: Callable[[Row], bool]) -> None:
        """Waits until a file that the process writes has a row for which `wanted` is true."""
        while True:
            # Poll before the file is read: the process may write its last rows in between.
            ended = self._popen.poll() is not None
            lines = file.read_text().splitlines(keepends=True) if file.exists() else []
            if any(wanted(json.loads(line)) for line in lines if line.endswith("\n")):
                return
            if ended:
                raise Failed(self.last_words())
            time.sleep(0.005)

    def wait(self) -> float:
        """Waits for the process to end, and returns its run time in seconds."""
        self._popen.communicate()
        if self._popen.returncode:
            raise Failed(self.last_words())
        return self.seconds

    def last_words(self) -> str:
        """Ends the process, and returns the last line of its stderr."""
        self._kill()
        self._popen.communicate()
        self._errors.seek(0)
        lines = [line.strip() for line in self._errors if line.strip()]
        return (
            lines[-1][:200]
            if lines
            else f"ended with status {self._popen.returncode} and no message"
        )

    def close(self) -> None:
        """Ends the process and all processes that it started."""
        self._kill()
        self._popen.communicate()
        self._errors.close()

    def _kill(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._popen.pid, signal.SIGKILL)


@contextmanager
def started(
    command: Sequence[str | Path], environment: Mapping[str, str] = {}
) -> Iterator[Process]:
    """Starts a process, and ends it and its children on exit."""
    process = Process(command, environment)
    try:
        yield process
    finally:
        process.close()


def point_command(script: str, point: Row) -> list[str]:
    """Returns the command of a process that measures a point; see `command_line`."""
    return [sys.executable, script, "--point", json.dumps(point)]


def measure(
    log: Log, script: str, points: Iterable[Row], limit: float, can: Callable[[Row], bool] = bool
) -> None:
    """Measures the points that are not in the log, each in a separate process.

    Each process ends after at most `limit` seconds. A point is skipped if `can` returns false
    when its turn comes.
    """
    # A failure is logged like a result, so that the next run does not wait for it again.
    for point in track([point for point in points if not log.find(**point)], "measuring"):
        if can(point):
            try:
                with started(point_command(script, point)) as process:
                    measured = process.hear("measured", limit)
            except Failed as failure:
                measured = {"failed": str(failure)}
                console.print(f"{point} failed: {failure}")
            log.put(point, **measured, time=datetime.now(UTC).isoformat(timespec="seconds"))


def take_turns(
    log: Log, contestants: Iterable[tuple[Row, Callable[[], float]]], turns: int
) -> None:
    """Runs contestants in turns, so that other load on the machine affects all of them alike.

    The first turn warms up and is not counted. A contestant that fails drops out.

    Args:
        log: Log to which a row for each contestant is written, with the `seconds` of each turn, or
            the reason in `failed`.
        contestants: Pairs of the first entries of a row and a function that returns the seconds of
            a turn.
        turns: Number of counted turns.
    """
    running = [(what, run, []) for what, run in contestants]
    for turn in range(turns + 1):
        # A copy, because a contestant that fails is removed from the list.
        for each in list(running):
            what, run, seconds = each
            name = ", ".join(map(str, what.values()))
            try:
                seconds.append(run())
            except Failed as failure:
                running.remove(each)
                log.put(what, failed=str(failure))
                console.print(f"{name} failed: {failure}")
                continue
            console.print(f"turn {turn} of {turns}: {name}: {seconds[-1]:.3f} s")
            # Log every turn at once, so that an interruption loses only the current one.
            if turn:
                log.put(what, seconds=seconds[1:])


def spread(values: Sequence[float] | np.ndarray, digits: str = ".2f") -> str:
    """Formats the median, followed by the first and third quartile in parentheses."""
    low, middle, high = np.percentile(values, [25, 50, 75])
    return f"{middle:{digits}} ({low:{digits}}-{high:{digits}})"


class Table(NamedTuple):
    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


def print_table(table: Table) -> None:
    shown = rich.table.Table(*table.header, title=table.title)
    for cells in table.rows:
        shown.add_row(*cells)
    # A fixed width, because rich wraps at 80 columns if the output is a file or a pipe.
    Console(width=200).print(shown)


def publish(file: Path, tables: Iterable[Table], note: str = "") -> None:
    """Prints tables and a note, and writes them to a Markdown file."""
    text = []
    for table in tables:
        print_table(table)
        title, header, rows = table
        lines = [header, ["---"] * len(header), *rows]
        text += [f"## {title}", "\n".join(f"| {' | '.join(cells)} |" for cells in lines)]
    console.print(note)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n\n".join([*text, note]).rstrip() + "\n", encoding="utf-8")


def machine(*rivals: str) -> str:
    """Describes the processor, Python and packages, including `rivals` if they are installed."""
    # Only Linux has this file; on other systems `platform.processor()` returns the name.
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text() if info.exists() else "")
    processor = names[0] if names else platform.processor() or platform.machine()
    packages = ", ".join(
        f"{name} {version(name)}"
        for name in ("jax", "flax", "optax", "numpy", *filter(find_spec, rivals))
    )
    return f"{cores()} cores of {processor}, Python {platform.python_version()}, {packages}"


def cores() -> int:
    """Returns the number of cores that this process may use."""
    # The affinity mask respects taskset and cpusets; macOS and Windows do not have it.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
