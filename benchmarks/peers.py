"""Compares this trainer with alternatives on a CPU: time per epoch, and time to a test accuracy.

    python benchmarks/peers.py                 # seconds per epoch; resumes if interrupted
    python benchmarks/peers.py --start-up      # whole processes to a test accuracy, cold and warm
    python benchmarks/peers.py --first-step    # second start of the default command, bare imports
    python benchmarks/peers.py --report        # tables and figure of earlier measurements

The contestants are in `contestants.py`. All contestants of one network and batch size run side by
side in separate processes, and train an epoch in turn while the others wait, so that other load on
the machine affects all of them alike. The first epoch compiles and is not counted. Ratios are
computed turn by turn, relative to this trainer on the same number of devices. At the end, all
contestants must have reached the same test accuracy.
"""

import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from itertools import product
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from contestants import LEARNING_RATE, TRAIN, Job
from harness import (
    RESULTS,
    Failed,
    Log,
    Process,
    Row,
    Table,
    command_line,
    console,
    machine,
    publish,
    spread,
    started,
    take_turns,
)
from matplotlib.figure import Figure

import ctde_jax as ctde
from ctde_jax.data.published.idx import MNIST

OURS = "this trainer"
ON_ONE = {*TRAIN} - {"PyTorch DDP, Gloo"}
ON_SEVERAL = {OURS, "JAX, one dispatch a step", "JAX, one scan an epoch", "PyTorch DDP, Gloo"}
LEFT_OUT = {
    ("cnn", "JAX, one scan an epoch"): (
        "XLA's gradients of convolutions are some 20 times slower in a loop on a CPU"
    ),
}
# Largest distance to the median accuracy, for contestants that train on all examples.
SPREAD = 0.007
TARGET = 0.97
MOST_EPOCHS = 15
BARE = "bare: import jax, flax, optax, and loading the digits"
SCRIPT = Path(__file__).with_name("contestants.py")

ModelName = Literal["mlp", "cnn", "lstm"]
# Takes environment variables and a run folder, and returns seconds.
Run = Callable[[dict[str, str], Path], float]


def command(job: Job) -> list[str | Path]:
    return [sys.executable, SCRIPT, json.dumps(asdict(job))]


def compare_epochs(alike: Row, devices: Sequence[int], turns: int, folder: Path, log: Log) -> bool:
    """Measures contestants in turns of an epoch; returns whether their accuracies agree."""
    # The contestants on each number of devices. If the log has all of them, nothing is left to do.
    rows = [
        {**alike, "contestant": name, "devices": count}
        for count in devices
        for name in TRAIN
        if name in (ON_ONE if count == 1 else ON_SEVERAL)
    ]
    if all(
        any("accuracy" in known or "failed" in known for known in log.find(**row)) for row in rows
    ):
        return True

    with ExitStack() as at_end:
        # A process starts in the first turn of its contestant, and is kept until the last one.
        processes: dict[int, Process] = {}

        def train(place: int, row: Row) -> float:
            if reason := LEFT_OUT.get((row["model"], row["contestant"])):
                raise Failed(f"left out: {reason}")
            if place not in processes:
                what = {
                    name: row[name]
                    for name in ("contestant", "model", "batch_size", "devices", "examples")
                }
                job = Job(**what, epochs=turns + 1, data_dir=str(folder))
                processes[place] = at_end.enter_context(started(command(job)))
            processes[place].go()
            return processes[place].hear("seconds")

        contestants = [(row, partial(train, place, row)) for place, row in enumerate(rows)]
        take_turns(log, contestants, turns)

        # Each contestant evaluates after its last epoch.
        for place, row in enumerate(rows):
            (known,) = log.find(**row)
            if "failed" not in known:
                log.put(row, seconds=known["seconds"], accuracy=processes[place].hear("accuracy"))
    return trained_alike(log.find(**alike))


def trained_alike(rows: Sequence[Row]) -> bool:
    """Returns whether this trainer has finished, and all accuracies are close to the median."""
    accuracies = {title(row): row["accuracy"] for row in rows if "accuracy" in row}
    median = float(np.median([*accuracies.values()]))
    # SPREAD holds for training on all examples; `examples` is None then.
    apart = {
        name: each
        for name, each in accuracies.items()
        if abs(each - median) > SPREAD and not rows[0]["examples"]
    }
    for name, accuracy in apart.items():
        where = f"{rows[0]['model']}, batch {rows[0]['batch_size']}"
        console.print(f"NOT THE SAME TRAINING: {where}: {name} {accuracy:.2%}, median {median:.2%}")
    return not apart and all("accuracy" in row for row in rows if row["contestant"] == OURS)


def race_to_target(turns: int, folder: Path, log: Log) -> None:
    """Times whole processes from their start until an evaluation after an epoch gives TARGET."""

    def this_trainer(cache: dict[str, str], run_dir: Path) -> float:
        # The command prints text for people, so its rows are read from the run folder.
        options = (
            "-m ctde_jax.train --dataset mnist --model mlp --hidden-sizes 128 --activation relu "
            f"--batch-size 64 \
            --learning-rate {LEARNING_RATE} --schedule constant --devices 1 --epochs {MOST_EPOCHS}"
        ).split()
        with started(
            [sys.executable, *options, "--data-dir", folder, "--run-dir", run_dir], cache
        ) as process:
            process.wait_for_row(
                run_dir / "metrics.jsonl",
                lambda row: row["split"] == "test" and row["accuracy"] >= TARGET,
            )
            return process.seconds

    def another(name: str) -> Run:
        job = Job(name, "mlp", 64, 1, MOST_EPOCHS, str(folder), every_epoch=True)

        def run(cache: dict[str, str], run_dir: Path) -> float:
            with started(command(job), cache) as process:
                # Permit all epochs at once, so that the process never waits.
                process.go(MOST_EPOCHS)
                while process.hear("accuracy") < TARGET:
                    pass
                return process.seconds

        return run

    # Frameworks that compile run with and without a warm compilation cache; PyTorch is eager.
    plain = another("JAX, one dispatch a step")
    keras = another("Keras on JAX")
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
    race("start-up", contestants, turns, log)


def race_to_first_step(turns: int, log: Log) -> None:
    """Times the second start of the default command until its first training row is on disk."""

    def default_command(cache: dict[str, str], run_dir: Path) -> float:
        with started(
            [sys.executable, "-m", "ctde_jax.train", "--run-dir", run_dir], cache
        ) as process:
            process.wait_for_row(run_dir / "metrics.jsonl", lambda row: row["split"] == "train")
            seconds = process.seconds
            process.wait()  # until all its programs are in the cache
            return seconds

    def bare(cache: dict[str, str], run_dir: Path) -> float:
        # The minimum for any program with these imports.
        imports = (
            "import jax, flax, optax, sklearn.datasets as d; d.load_digits(); "
            "print('{\"there\": 1}', flush=True)"
        )
        with started([sys.executable, "-c", imports], cache) as process:
            process.hear("there")
            return process.seconds

    # Turn 0 fills the cache, so that every counted turn measures a later start.
    race(
        "first-step",
        {BARE: (bare, "none"), f"{OURS}, warm cache": (default_command, "warm")},
        turns,
        log,
    )


def race(part: str, contestants: dict[str, tuple[Run, str]], turns: int, log: Log) -> None:
    """Runs whole processes in turns.

    A warm compilation cache is the folder of the preceding turns; a cold one is emptied before
    each turn.
    """
    with tempfile.TemporaryDirectory() as folder:

        def timed(name: str, run: Run, cache: str) -> float:
            cached = Path(folder, name)
            run_dir = Path(tempfile.mkdtemp(dir=folder), "run")
            if cache == "cold":
                shutil.rmtree(cached, ignore_errors=True)
            # JAX by default caches only programs that take a second to compile.
            small = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
            by_jax = {"JAX_COMPILATION_CACHE_DIR": str(cached), **small}
            # This trainer chooses a folder below XDG_CACHE_HOME by itself.
            environment = {"XDG_CACHE_HOME": str(cached)} if OURS in name else by_jax
            return run({} if cache == "none" else environment, run_dir)

        rows = [
            ({"part": part, "contestant": name}, partial(timed, name, *how))
            for name, how in contestants.items()
        ]
        take_turns(log, rows, turns)


def title(row: Row) -> str:
    where = (
        "processes"
        if "DDP" in row["contestant"]
        else "device"
        if row["devices"] == 1
        else "devices"
    )
    return f"{row['contestant']}, {row['devices']} {where}"


def ratio(row: Row, to: Iterable[Row]) -> str:
    """Formats the ratio of the seconds of a row to those of the first finished row in `to`."""
    others = [other["seconds"] for other in to if "seconds" in other]
    if not others:
        return "-"
    # Divide turn by turn: both have run under the same load.
    return spread([mine / other for mine, other in zip(row["seconds"], others[0], strict=False)])


def epoch_table(log: Log) -> Table:
    def figures(row: Row) -> list[str]:
        if "failed" in row:
            return [row["failed"], *"----"]
        alike = {
            name: row[name]
            for name in ("part", "model", "batch_size", "examples", "contestant", "devices")
        }
        return [
            spread(row["seconds"], ".3f"),
            ratio(row, log.find(**alike | {"contestant": OURS})),
            "-" if row["devices"] == 1 else ratio(row, log.find(**alike | {"devices": 1})),
            str(len(row["seconds"])),
            f"{row['accuracy']:.2%}" if "accuracy" in row else "interrupted",
        ]

    named = ("model", "batch_size", "devices", "contestant")
    lines = [[*(str(row[name]) for name in named), *figures(row)] for row in epoch_rows(log)]
    columns = (
        "seconds",
        "times this trainer",
        "times itself on 1 device",
        "turns",
        "test accuracy",
    )
    header = ("network", "batch", "devices", "contestant", *columns)
    return Table("Seconds an epoch: median and quartiles", header, lines)


def process_table(heading: str, rows: Sequence[Row], reference: str) -> Table:
    to = [row for row in rows if row["contestant"] == reference]
    lines = [
        [row["contestant"], row["failed"], "-", "-"]
        if "failed" in row
        else [row["contestant"], spread(row["seconds"]), ratio(row, to), str(len(row["seconds"]))]
        for row in rows
    ]
    return Table(heading, ("contestant", "seconds", f"times {reference}", "turns"), lines)


def draw(rows: Sequence[Row]) -> Figure:
    """Draws medians as bars with quartiles, in one panel for each network and batch size."""
    panels = list(dict.fromkeys((row["model"], row["batch_size"], row["examples"]) for row in rows))
    shape = -(-len(panels) // 2), min(2, len(panels))
    figure = Figure(figsize=(5.2 * shape[1], 3.2 * shape[0]), layout="constrained")
    for axes, panel in zip(figure.subplots(*shape, squeeze=False).flat, panels, strict=False):
        # Reversed, because `barh` draws the first bar at the bottom.
        shown = [
            row for row in rows if (row["model"], row["batch_size"], row["examples"]) == panel
        ][::-1]
        low, middle, high = np.array(
            [np.percentile(row["seconds"], [25, 50, 75]) for row in shown]
        ).T
        colors = ["tab:blue" if row["contestant"] == OURS else "tab:gray" for row in shown]
        axes.barh(
            [title(row) for row in shown], middle, xerr=(middle - low, high - middle), color=colors
        )
        axes.set(title=f"{panel[0]}, batch {panel[1]}", xlabel="seconds an epoch")
        axes.tick_params(axis="y", labelsize=7)
        axes.grid(alpha=0.3, axis="x")
    return figure


def epoch_rows(log: Log) -> list[Row]:
    models = get_args(ModelName)
    names = [*TRAIN]

    def place(row: Row) -> tuple[int, ...]:
        return (
            models.index(row["model"]),
            row["batch_size"],
            row["devices"],
            names.index(row["contestant"]),
        )

    return sorted(log.find(part="epoch"), key=place)


def publish_all(log: Log) -> None:
    """Prints the tables, writes them as Markdown, and draws the first one."""
    tables = [epoch_table(log)] if log.find(part="epoch") else []
    if rows := log.find(part="start-up"):
        heading = f"Seconds from the start of a process to {TARGET:.0%}: MLP, batch 64, 1 device"
        tables.append(process_table(heading, rows, f"{OURS}, warm cache"))
    if rows := log.find(part="first-step"):
        heading = "Seconds from the start of a process to the first step of the default command"
        tables.append(process_table(heading, rows, BARE))
    publish(log.file.with_suffix(".md"), tables, f"{machine('torch', 'keras')}.")
    if rows := [row for row in epoch_rows(log) if "seconds" in row]:
        draw(rows).savefig(log.file.with_suffix(".png"), dpi=120)


def main(
    models: tuple[ModelName, ...] = ("mlp", "cnn", "lstm"),
    batch_sizes: tuple[int, ...] = (64, 512),
    devices: tuple[int, ...] = (1, 4),
    turns: int = 5,
    examples: int | None = None,
    data_dir: Path | None = None,
    results: Path = RESULTS,
    start_up: bool = False,
    first_step: bool = False,
    report: bool = False,
) -> int:
    """Measures what is missing; the exit status is 1 if the accuracies of contestants differ.

    Args:
        models: Networks.
        batch_sizes: Global batch sizes.
        devices: Numbers of fake CPU devices, or of processes for DDP.
        turns: Measurements of each contestant, after one that is not counted.
        examples: Number of training examples, by default all 60,000. If there are fewer,
            accuracies are not compared.
        data_dir: Folder of MNIST's files; by default the cache folder, into which they are
            downloaded.
        results: Folder for peers.jsonl, .md and .png.
        start_up: Measure whole processes, from their start to the target accuracy.
        first_step: Measure the second start of the default command until its first step.
        report: Show earlier results without measuring.
    """
    log = Log(results / "peers.jsonl")
    agree = True
    if not report:
        ctde.data.mnist(data_dir)  # downloads the files if they are missing
        folder = MNIST.folder(data_dir)
        if start_up:
            race_to_target(turns, folder, log)
        if first_step:
            race_to_first_step(turns, log)
        # The measurements of whole processes replace those of epochs.
        for model, batch_size in (
            product(models, batch_sizes) if not (start_up or first_step) else ()
        ):
            alike = {
                "part": "epoch",
                "model": model,
                "batch_size": batch_size,
                "examples": examples,
            }
            agree = compare_epochs(alike, devices, turns, folder, log) and agree
    publish_all(log)
    return 0 if agree else 1


if __name__ == "__main__":
    command_line(main)
