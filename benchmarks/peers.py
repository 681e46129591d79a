"""This trainer beside what people would use instead, on a CPU: seconds an epoch, and from start to a target.

    python benchmarks/peers.py                 # seconds an epoch; runs what is missing, may be interrupted
    python benchmarks/peers.py --start-up      # whole processes to a target accuracy, cold and warm
    python benchmarks/peers.py --first-step    # the default command's second start, beside bare imports
    python benchmarks/peers.py --report        # tables and picture of what has been measured

The contestants are in `contestants.py`. Those of one network and one batch size run side by side, each in a process of
its own, and train an epoch in turn while all others wait; so whatever else the machine does meets them all. The first
epoch compiles and is not counted. A ratio is taken turn by turn, to this trainer on as many devices. In the end all
must have reached the same test accuracy.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import tyro
from contestants import LEARNING_RATE, TRAIN, Job
from matplotlib.figure import Figure
from points import as_markdown, machine
from rich.console import Console
from rich.table import Table

import ctde_jax as ctde
from ctde_jax.data.published.idx import MNIST

OURS = "this trainer"
ON_ONE = {*TRAIN} - {"PyTorch DDP, Gloo"}
ON_SEVERAL = {OURS, "JAX, one dispatch a step", "JAX, one scan an epoch", "PyTorch DDP, Gloo"}
LEFT_OUT = {
    ("cnn", "JAX, one scan an epoch"): "XLA's gradients of convolutions are some 20 times slower in a loop on a CPU",
}
"""What is not run, and why."""

SPREAD = 0.007
"""How far from the median of all the accuracy of a contestant may lie, where it has seen all examples."""

TARGET, MOST_EPOCHS = 0.97, 15
RESULTS = Path(__file__).parent / "results"
SCRIPT = str(Path(__file__).with_name("contestants.py"))

Row = dict[str, Any]
ModelName = Literal["mlp", "cnn", "lstm"]
console = Console(soft_wrap=True, highlight=False)


@dataclass(frozen=True)
class Options:
    """What to measure."""

    models: tuple[ModelName, ...] = ("mlp", "cnn", "lstm")
    """The networks."""

    batch_sizes: tuple[int, ...] = (64, 512)
    """Examples of a step, over all devices together."""

    devices: tuple[int, ...] = (1, 4)
    """Fake CPU devices, or processes."""

    turns: int = 5
    """Measurements of each contestant, after one that is not counted."""

    examples: int | None = None
    """Of the training pictures, the first so many; by default all 60,000. With fewer no accuracies are compared."""

    data_dir: Path | None = None
    """The folder of MNIST's files; by default the cache folder, into which they are downloaded."""

    results: Path = RESULTS
    """The folder for peers.jsonl, .md and .png."""

    again: bool = False
    """Whether to measure anew what has been measured."""

    start_up: bool = False
    """Measures whole processes, from their start to the target accuracy."""

    first_step: bool = False
    """Measures the second start of the default command until its first step."""

    report: bool = False
    """Only shows what has been measured."""


class Log:
    """What has been measured, a row for each contestant of each comparison, on disk after every turn."""

    def __init__(self, file: Path):
        self._file = file
        self.rows: list[Row] = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def find(self, **wanted: Any) -> list[Row]:
        """Returns the rows with these entries."""
        return [row for row in self.rows if wanted.items() <= row.items()]

    def put(self, what: Row, **measured: Any) -> None:
        """Replaces what has been measured of this."""
        self.rows = [row for row in self.rows if not what.items() <= row.items()] + [{**what, **measured}]
        self._file.parent.mkdir(parents=True, exist_ok=True)
        new = self._file.with_suffix(".new")
        new.write_text("".join(f"{json.dumps(row)}\n" for row in self.rows))
        new.replace(self._file)


class Failed(Exception):
    """A contestant has ended too early; says what its last words were."""


class Process:
    """A contestant's process, and those that it has started."""

    def __init__(self, command: Sequence[str], environment: dict[str, str] | None = None):
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (as long as the process)
        self._popen = subprocess.Popen(
            [sys.executable, *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env={**os.environ, "JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": "", **(environment or {})},
            start_new_session=True,
        )
        self.begin = time.perf_counter()

    def go(self, times: int = 1) -> None:
        """Lets a contestant train so many epochs."""
        try:
            print("go\n" * times, end="", file=self._popen.stdin, flush=True)
        except BrokenPipeError:
            raise Failed(self.last_words()) from None

    def hear(self, what: str) -> float:
        """Waits until a contestant says this, and returns its value."""
        for line in self._popen.stdout or ():
            said = json.loads(line)
            if what in said:
                return said[what]
        raise Failed(self.last_words())

    def wait(self) -> None:
        """Waits for the process's own end, with nobody listening."""
        self._popen.communicate()
        if self._popen.returncode:
            raise Failed(self.last_words())

    def wait_for_line(self, file: Path, wanted: Callable[[Row], bool]) -> None:
        """Waits until there is such a row in a file that the process writes."""
        while True:
            ended = self._popen.poll() is not None
            lines = file.read_text().splitlines(keepends=True) if file.exists() else []
            if any(wanted(json.loads(line)) for line in lines if line.endswith("\n")):
                return
            if ended:
                raise Failed(self.last_words())
            time.sleep(0.005)

    def last_words(self) -> str:
        """Returns the last line of the errors."""
        self.close()
        self._errors.seek(0)
        lines = [line for line in self._errors.read().splitlines() if line.strip()]
        return lines[-1].strip() if lines else f"ended with status {self._popen.returncode} and no word"

    def close(self) -> None:
        """Ends the process and all that it has started."""
        with suppress(ProcessLookupError):
            os.killpg(self._popen.pid, signal.SIGKILL)
        self._popen.communicate()


@contextmanager
def started(command: Sequence[str], environment: dict[str, str] | None = None) -> Iterator[Process]:
    """Starts a process, and ends it in any case."""
    process = Process(command, environment)
    try:
        yield process
    finally:
        process.close()


def compare_epochs(model: str, batch_size: int, options: Options, folder: Path, log: Log) -> bool:
    """Lets all contestants train side by side, an epoch in turn; says whether all have reached the same accuracy."""
    alike = {"part": "epoch", "model": model, "batch_size": batch_size, "examples": options.examples}
    field = [
        (name, count)
        for count in options.devices
        for name in TRAIN
        if name in (ON_ONE if count == 1 else ON_SEVERAL)
    ]  # fmt: skip
    rows = {each: {**alike, "contestant": each[0], "devices": each[1]} for each in field}
    known = {each: log.find(**row) for each, row in rows.items()}
    if not options.again and all(any("accuracy" in row or "failed" in row for row in known[each]) for each in field):
        return True
    seconds: dict[tuple[str, int], list[float]] = {each: [] for each in field}

    def attempt(each: tuple[str, int], act: Callable[[], Any]) -> Any:
        try:
            return act()
        except Failed as failure:
            if each[0] == OURS:
                raise
            del seconds[each]
            log.put(rows[each], failed=str(failure))
            console.print(f"{title(*each)} failed: {failure}")

    with ExitStack() as running:
        processes: dict[tuple[str, int], Process] = {}
        for each in field:
            name, count = each
            if (model, name) in LEFT_OUT:
                del seconds[each]
                log.put(rows[each], failed=f"left out: {LEFT_OUT[model, name]}")
                continue
            job = Job(name, model, batch_size, count, options.turns + 1, str(folder), options.examples)
            processes[each] = running.enter_context(started([SCRIPT, json.dumps(asdict(job))]))
            attempt(each, lambda each=each: processes[each].hear("ready"))

        def train(each: tuple[str, int]) -> float:
            processes[each].go()
            return processes[each].hear("seconds")

        for turn in range(options.turns + 1):
            for each in list(seconds):
                measured = attempt(each, lambda each=each: train(each))
                if measured is None:
                    continue
                says = f"turn {turn} of {options.turns}" if turn else "first epoch, not counted"
                console.print(f"{model}, batch {batch_size}, {says}: {title(*each)} {measured:.2f} s")
                if turn:
                    seconds[each].append(measured)
                    log.put(rows[each], seconds=seconds[each])
        for each in list(seconds):
            accuracy = attempt(each, lambda each=each: processes[each].hear("accuracy"))
            if accuracy is not None:
                log.put(rows[each], seconds=seconds[each], accuracy=accuracy)
    return options.examples is not None or accuracies_agree(log.find(**alike))


def accuracies_agree(rows: Sequence[Row]) -> bool:
    """Prints whose accuracy lies too far from the others'."""
    accuracies = {title(row["contestant"], row["devices"]): row["accuracy"] for row in rows if "accuracy" in row}
    median = float(np.median([*accuracies.values()]))
    apart = {name: accuracy for name, accuracy in accuracies.items() if abs(accuracy - median) > SPREAD}
    for name, accuracy in apart.items():
        model, batch_size = rows[0]["model"], rows[0]["batch_size"]
        console.print(f"NOT THE SAME TRAINING: {model}, batch {batch_size}: {name} {accuracy:.2%}, median {median:.2%}")
    return not apart


def race_to_target(options: Options, folder: Path, log: Log) -> None:
    """Takes the time of whole processes, from their start until an evaluation after an epoch gives the target."""

    def this_trainer(cache: dict[str, str], run_dir: Path) -> float:
        command = f"-m ctde_jax.train --dataset mnist --model mlp --widths 128 --activation relu --batch-size 64 \
            --learning-rate {LEARNING_RATE} --schedule constant --devices 1 --epochs {MOST_EPOCHS}".split()
        with started([*command, "--data-dir", str(folder), "--run-dir", str(run_dir)], cache) as process:
            process.wait_for_line(
                run_dir / "metrics.jsonl", lambda row: row["split"] == "test" and row["accuracy"] >= TARGET
            )
            return time.perf_counter() - process.begin

    def another(name: str) -> Callable[[dict[str, str], Path], float]:
        job = Job(name, "mlp", 64, 1, MOST_EPOCHS, str(folder), every_epoch=True)

        def run(cache: dict[str, str], run_dir: Path) -> float:
            with started([SCRIPT, json.dumps(asdict(job))], cache) as process:
                process.go(MOST_EPOCHS)
                while process.hear("accuracy") < TARGET:
                    pass
                return time.perf_counter() - process.begin

        return run

    plain, keras = another("JAX, one dispatch a step"), another("Keras on JAX")
    contestants = {
        f"{OURS}, cold cache": (this_trainer, "cold"),
        f"{OURS}, warm cache": (this_trainer, "warm"),
        "JAX, one dispatch a step, no cache": (plain, "none"),
        "JAX, one dispatch a step, warm cache": (plain, "warm"),
        "Keras on JAX, no cache": (keras, "none"),
        "Keras on JAX, warm cache": (keras, "warm"),
        "PyTorch": (another("PyTorch"), "none"),
        "PyTorch, fused Adam": (another("PyTorch, fused Adam"), "none"),
    }
    take_turns("start-up", contestants, options.turns, log)


def race_to_first_step(options: Options, log: Log) -> None:
    """Takes the time of the default command's second start until its first training row is on disk."""

    def default_command(cache: dict[str, str], run_dir: Path) -> float:
        with started(["-m", "ctde_jax.train", "--run-dir", str(run_dir)], cache) as process:
            process.wait_for_line(run_dir / "metrics.jsonl", lambda row: row["split"] == "train")
            seconds = time.perf_counter() - process.begin
            process.wait()  # so that all its programs are in the cache
            return seconds

    def bare(cache: dict[str, str], run_dir: Path) -> float:
        imports = "import jax, flax, optax, sklearn.datasets as d; d.load_digits(); print('{\"there\": 1}', flush=True)"
        with started(["-c", imports], cache) as process:
            process.hear("there")
            return time.perf_counter() - process.begin

    contestants = {
        "bare: import jax, flax, optax, and loading the digits": (bare, "none"),
        f"{OURS}, warm cache": (default_command, "warm"),
    }
    take_turns("first-step", contestants, options.turns, log)


def take_turns(part: str, contestants: dict[str, tuple[Callable[..., float], str]], turns: int, log: Log) -> None:
    """Runs whole processes one after the other, all once before the first one counts.

    A warm compilation cache is the folder of the runs before, a cold one is a new folder for each run.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(turns + 1):
            for number, (name, (run, cache)) in enumerate(contestants.items()):
                if name not in seconds:
                    continue
                cached = Path(folder) / f"cache-{number}"
                if cache == "cold":
                    shutil.rmtree(cached, ignore_errors=True)
                if cache == "none":
                    environment = {}
                elif OURS in name:
                    environment = {"XDG_CACHE_HOME": str(cached)}
                else:
                    environment = {"JAX_COMPILATION_CACHE_DIR": str(cached)}
                    environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"  # small programs, too
                try:
                    measured = run(environment, Path(folder) / f"run-{number}-{turn}")
                except Failed as failure:
                    if OURS in name:
                        raise
                    del seconds[name]
                    log.put({"part": part, "contestant": name}, failed=str(failure))
                    continue
                says = f"turn {turn} of {turns}" if turn else "not counted"
                console.print(f"{part}, {says}: {name} {measured:.2f} s")
                if turn:
                    seconds[name].append(measured)
                    log.put({"part": part, "contestant": name}, seconds=seconds[name])


def title(name: str, devices: int) -> str:
    """Says who on how many devices."""
    where = "processes" if "DDP" in name else "device" if devices == 1 else "devices"
    return f"{name}, {devices} {where}"


def spread(values: np.ndarray, digits: int = 2) -> str:
    """Says the median and the quartiles."""
    low, middle, high = np.percentile(values, [25, 50, 75])
    return f"{middle:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


def ratio(row: Row, to: Row | None) -> str:
    """Says how many times the other's seconds these are, turn by turn."""
    if to is None or "seconds" not in to:
        return "-"
    return spread(np.array([mine / other for mine, other in zip(row["seconds"], to["seconds"], strict=False)]))


def epoch_table(rows: Sequence[Row]) -> Table:
    """Makes the table of seconds an epoch."""
    table = Table(title="Seconds an epoch: median and quartiles")
    for column in ("network", "batch", "devices", "contestant"):
        table.add_column(column)
    for column in ("seconds", "times this trainer", "times itself on 1 device", "turns", "test accuracy"):
        table.add_column(column, justify="right")

    def find(row: Row, **other: Any) -> Row | None:
        wanted = {name: row[name] for name in ("model", "batch_size", "examples", "contestant", "devices")} | other
        return next((one for one in rows if wanted.items() <= one.items()), None)

    for row in rows:
        cells = [row["model"], str(row["batch_size"]), str(row["devices"]), row["contestant"]]
        if "failed" in row:
            table.add_row(*cells, row["failed"], *"----")
            continue
        accuracy = f"{row['accuracy']:.2%}" if "accuracy" in row else "interrupted"
        alone = "-" if row["devices"] == 1 else ratio(row, find(row, devices=1))
        measured = spread(np.array(row["seconds"]), 3), ratio(row, find(row, contestant=OURS)), alone
        table.add_row(*cells, *measured, str(len(row["seconds"])), accuracy)
    return table


def process_table(heading: str, rows: Sequence[Row], reference: str) -> Table:
    """Makes a table of the seconds of whole processes."""
    table = Table(title=heading)
    table.add_column("contestant")
    for column in ("seconds", f"times {reference}", "turns"):
        table.add_column(column, justify="right")
    to = next((row for row in rows if row["contestant"] == reference), None)
    for row in rows:
        if "failed" in row:
            table.add_row(row["contestant"], row["failed"], "-", "-")
        else:
            seconds = spread(np.array(row["seconds"]))
            table.add_row(row["contestant"], seconds, ratio(row, to), str(len(row["seconds"])))
    return table


def draw(rows: Sequence[Row]) -> Figure:
    """Draws the medians as bars, with their quartiles, a panel for each network and batch size."""
    rows = [row for row in rows if "seconds" in row]
    panels = list(dict.fromkeys((row["model"], row["batch_size"], row["examples"]) for row in rows))
    figure = Figure(figsize=(5.2 * min(2, len(panels)), 3.2 * -(-len(panels) // 2)), layout="constrained")
    shape = -(-len(panels) // 2), min(2, len(panels))
    for axes, panel in zip(figure.subplots(*shape, squeeze=False).flat, panels, strict=False):
        shown = [row for row in rows if (row["model"], row["batch_size"], row["examples"]) == panel][::-1]
        low, middle, high = np.array([np.percentile(row["seconds"], [25, 50, 75]) for row in shown]).T
        colors = ["tab:blue" if row["contestant"] == OURS else "tab:gray" for row in shown]
        names = [title(row["contestant"], row["devices"]) for row in shown]
        axes.barh(names, middle, xerr=(middle - low, high - middle), color=colors)
        axes.set(title=f"{panel[0]}, batch {panel[1]}", xlabel="seconds an epoch")
        axes.tick_params(axis="y", labelsize=7)
        axes.grid(alpha=0.3, axis="x")
    return figure


def report(log: Log, results: Path) -> None:
    """Prints the tables, and saves them as Markdown and the first as a picture."""
    models, names = get_args(ModelName), [*TRAIN]

    def place(row: Row) -> tuple[int, ...]:
        return models.index(row["model"]), row["batch_size"], row["devices"], names.index(row["contestant"])

    epochs = sorted(log.find(part="epoch"), key=place)
    tables = [epoch_table(epochs)] if epochs else []
    if rows := log.find(part="start-up"):
        heading = f"Seconds from the start of a process to {TARGET:.0%}: MLP, batch 64, 1 device"
        tables.append(process_table(heading, rows, f"{OURS}, warm cache"))
    if rows := log.find(part="first-step"):
        heading = "Seconds from the start of a process to the first step of the default command"
        tables.append(process_table(heading, rows, "bare: import jax, flax, optax, and loading the digits"))
    for table in tables:
        Console(width=180).print(table)
    measured_on = f"{machine('torch', 'keras')}."
    console.print(measured_on)
    (results / "peers.md").write_text("\n\n".join([*map(as_markdown, tables), measured_on]) + "\n")
    if any("seconds" in row for row in epochs):
        draw(epochs).savefig(results / "peers.png", dpi=120)


def main(options: Options) -> int:
    """Does what the options say; the exit status is 1 where contestants have not reached the same accuracy."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # and the contestants with it
    log = Log(options.results / "peers.jsonl")
    agree = True
    if not options.report:
        ctde.data.mnist(options.data_dir)  # is there, and downloaded if need be
        folder = MNIST.folder(options.data_dir)
        if options.start_up:
            race_to_target(options, folder, log)
        if options.first_step:
            race_to_first_step(options, log)
        if not (options.start_up or options.first_step):
            for model, batch_size in product(options.models, options.batch_sizes):
                agree = compare_epochs(model, batch_size, options, folder, log) and agree
    report(log, options.results)
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options, description=__doc__)))
