"""What it costs to watch a training: progress, files and metrics beside the same training that says nothing.

    python benchmarks/overhead.py              # a quarter of an hour; interrupted, it keeps what it has measured
    python benchmarks/overhead.py --report

The MLP 784-128-10 on random pictures in the shape of MNIST, one device. The contestants take turns in one process, in
another order in every turn: a task without metrics in one dispatch an epoch that writes and shows nothing, and step by
step more of what `fit` does by default, up to a run folder and a progress bar in a pseudo-terminal that somebody reads.
Measured is what `fit` calls training: all from the first dispatch of an epoch to its last row, evaluation left out.
What happens once, after the last step, such as drawing the curves, is a column of its own.

Such ratios of times show nothing below the noise of the machine, so the CPU time is counted, too, that Python's threads
take from one evaluation to the next, and the whole process: where the devices are the CPU, what the one takes is not
there for the other. By how much that of Python's threads is more than where nothing is watched is what watching costs.
"""

import argparse
import itertools
import json
import os
import pty
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import NamedTuple

import numpy as np
import optax
import points

import ctde_jax as ctde

NAME = "overhead"
EXAMPLES, EPOCHS = 60_000, 6
SOMEBODY = "who reads the terminal"


class Contestant(NamedTuple):
    """What is done beside training."""

    metrics: bool = True
    log_every: int = 20
    files: bool = False
    shows: bool = False


CONTESTANTS = {
    "loss only, one row an epoch": Contestant(metrics=False, log_every=EXAMPLES),
    "and accuracy": Contestant(log_every=EXAMPLES),
    "and a row every 20 steps": Contestant(),
    "and a run folder": Contestant(files=True),
    "and a progress bar": Contestant(files=True, shows=True),
}
BARE, ALONE, *_ = CONTESTANTS


@contextmanager
def terminal() -> Iterator[None]:
    """Lets what is printed go to a pseudo-terminal of the usual size, where it is read and thrown away."""
    reader, writer = pty.openpty()

    def drain() -> None:
        try:
            while os.read(reader, 2**16):
                pass
        except OSError:  # so Linux says that the other end is closed
            pass

    draining = threading.Thread(target=drain, name=SOMEBODY)
    draining.start()
    before = {name: os.environ.get(name) for name in ("TERM", "COLUMNS", "LINES")}
    os.environ |= {"TERM": "xterm-256color", "COLUMNS": "120", "LINES": "40"}
    try:
        with os.fdopen(writer, "w") as screen, redirect_stdout(screen):
            yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        draining.join()
        os.close(reader)


def cpu_of_python() -> float:
    """Returns the CPU seconds of the threads of this process that Python has started, and of the first one."""
    threads = [thread.native_id for thread in threading.enumerate() if thread.name != SOMEBODY]
    return sum(int(Path(f"/proc/self/task/{thread}/schedstat").read_text().split()[0]) for thread in threads) / 1e9


def time_fit(contestant: Contestant, data: ctde.data.Dataset, batch_size: int, devices: list) -> dict[str, float]:
    """Trains, and returns the seconds of training and those after it, and CPU seconds of an epoch."""
    cpu = []  # at every evaluation

    def note_cpu(*center: ctde.devices.PyTree) -> str:
        cpu.append((cpu_of_python(), time.process_time()))
        return ""

    task = ctde.tasks.classification if contestant.metrics else ctde.Task(ctde.tasks.cross_entropy)
    with tempfile.TemporaryDirectory() as folder:
        before = time.perf_counter()
        trained = ctde.fit(
            ctde.models.mlp([784, 128, 10]),
            data,
            optax.adam(1e-3),
            task=task,
            devices=devices,
            batch_size=batch_size,
            epochs=EPOCHS,
            log_every=contestant.log_every,
            run_dir=Path(folder) / "run" if contestant.files else None,
            show=contestant.shows,
            describe=note_cpu,
        )
        whole = time.perf_counter() - before
    of_python, of_all = np.median(np.diff(cpu, axis=0), axis=0)
    seconds = {"train": trained.seconds["train"], "after": whole - sum(trained.seconds.values())}
    return seconds | {"cpu_of_python": float(of_python), "cpu": float(of_all)}


def measure(turns: int, batch_sizes: list[int]) -> None:
    """Lets all contestants take turns and writes down each."""
    devices = ctde.devices.start(1)
    rng = np.random.default_rng(0)
    inputs = rng.integers(0, 256, (EXAMPLES, 28, 28), dtype=np.uint8)
    labels = (np.arange(EXAMPLES) % 10).astype(np.int32)
    data = ctde.data.from_arrays(inputs, labels, inputs[:1000], labels[:1000])
    first = points.next_turn(NAME)
    for turn, batch_size in itertools.product([None, *range(first, first + turns)], batch_sizes):
        for name in np.random.default_rng(turn).permutation(list(CONTESTANTS)):
            with terminal():
                seconds = time_fit(CONTESTANTS[str(name)], data, batch_size, devices)
            row = {"batch_size": batch_size, "turn": turn, "contestant": str(name), **seconds}
            if turn is not None:  # the first ones only warm up
                points.add(NAME, row)
            print(json.dumps(row), flush=True)  # no bar here, which would run beside those that are measured


HEADER = (
    "batch size",
    "contestant",
    "an epoch, s",
    "to loss only",
    "to accuracy alone",
    "CPU time of Python an epoch, ms",
    "more than for loss only, of all CPU time",
    "once, at the end, s",
    "turns",
)


def report() -> None:
    """Prints and writes the ratios, turn by turn."""
    rows, lines = points.known(NAME), []
    for batch_size in sorted({row["batch_size"] for row in rows}):
        of = {(row["turn"], row["contestant"]): row for row in rows if row["batch_size"] == batch_size}
        turns = [turn for turn in {turn for turn, _ in of} if all((turn, name) in of for name in CONTESTANTS)]
        for name in CONTESTANTS if turns else []:
            train, python, cpu = (
                {other: np.array([of[turn, other][what] for turn in turns]) for other in CONTESTANTS}
                for what in ("train", "cpu_of_python", "cpu")
            )
            more = (python[name] - python[BARE]) / cpu[name]
            lines.append(
                [
                    f"{batch_size}",
                    name,
                    points.quartiles(train[name] / EPOCHS, ".3f"),
                    *(points.quartiles(train[name] / train[base], ".3f") for base in (BARE, ALONE)),
                    points.quartiles(1e3 * python[name], ".1f"),
                    points.quartiles(more, ".2%"),
                    points.quartiles([of[turn, name]["after"] for turn in turns]),
                    f"{len(turns)}",
                ]
            )
    points.publish(NAME, "What watching a training costs", HEADER, lines, f"{points.machine()}.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=15, help="turns of each contestant")
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[64, 512])
    parser.add_argument("--report", action="store_true", help="measure nothing")
    chosen = parser.parse_args()
    if not chosen.report:
        measure(chosen.turns, chosen.batch_sizes)
    report()


if __name__ == "__main__":
    main()
