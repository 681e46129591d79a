"""Cost of callbacks: CPU time and wall time of an epoch without and with them.

    python benchmarks/callbacks.py            # three minutes on a quiet machine; Linux
    python benchmarks/callbacks.py --report

The MLP 784-128-10 trains on random images in the shape of MNIST at batch size 64 on one CPU device,
with a row every 20 steps. The contestants take turns in one process, in another order each turn.
Other load on the machine changes wall time and total CPU time by more than a callback does, so the
CPU time of the threads that Python started is measured, too: in these, callbacks run, and in
others the device computes.
"""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import optax
from harness import RESULTS, Log, Table, command_line, console, machine, publish, spread

import ctde_jax as ctde
from ctde_jax.trainer.run import Run

EXAMPLES = 60_000
NONE = "none"
HEADER = (
    "callbacks",
    "CPU of Python, ms",
    "more than none, of all CPU",
    "all CPU, ms",
    "to none",
    "wall time, ms",
    "to none",
)


class AllMethods(ctde.Callback):
    """Has every method, and keeps the last values that each receives."""

    def __init__(self):
        self.received: dict[str, tuple[Any, ...]] = {}

    def on_start(self, options, rows):
        self.received["start"] = options, rows

    def on_row(self, row):
        self.received["row"] = (row,)

    def on_evaluation(self, rows, params, model_state):
        self.received["evaluation"] = rows, params, model_state

    def on_checkpoint(self, path):
        self.received["checkpoint"] = (path,)

    def on_end(self, trained):
        self.received["end"] = (trained,)


CONTESTANTS: dict[str, Callable[[Path], list[Any]]] = {
    NONE: lambda _: [],
    "a function": lambda _: [[].append],
    "an object with all methods": lambda _: [AllMethods()],
    "TensorBoard": lambda folder: [ctde.trackers.TensorBoard(folder)],
}
"""Functions from a folder to the callbacks of a contestant, by name."""


def clocks() -> np.ndarray:
    """Returns the CPU time of Python's threads, that of the process, and the time, in seconds."""
    threads = [thread.native_id for thread in threading.enumerate()]
    texts = [Path(f"/proc/self/task/{thread}/schedstat").read_text() for thread in threads]
    of_python = sum(int(text.split()[0]) for text in texts) / 1e9
    return np.array([of_python, time.process_time(), time.perf_counter()])


def measure(log: Log, turns: int, epochs: int) -> None:
    """Lets the contestants take turns, and logs each; the first turn warms up."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (EXAMPLES, 28, 28), dtype=np.uint8)
    labels = (np.arange(EXAMPLES) % 10).astype(np.int32)
    data = ctde.data.from_arrays(images, labels, images[:1000], labels[:1000])
    devices = ctde.devices.start(1)

    # Only the training and its evaluations are timed, not compilation.
    advance = Run.advance
    spent = []

    def timed(run: Run, program: Any) -> None:
        begin = clocks()
        advance(run, program)
        spent.append(clocks() - begin)

    Run.advance = timed
    for turn in range(turns + 1):
        for name in map(str, rng.permutation(list(CONTESTANTS))):
            with TemporaryDirectory() as folder:
                ctde.fit(
                    ctde.models.mlp([784, 128, 10]),
                    data,
                    optax.adam(1e-3),
                    devices=devices,
                    batch_size=64,
                    epochs=epochs,
                    callbacks=CONTESTANTS[name](Path(folder)),
                    show=False,
                )
            seconds = [round(float(value), 6) for value in spent.pop() / epochs]
            console.print(f"turn {turn} of {turns}: {name}: {seconds}")
            if turn:
                log.put({"turn": turn, "callbacks": name}, seconds=seconds)


def main(turns: int = 9, epochs: int = 3, report: bool = False, results: Path = RESULTS) -> None:
    """Measures all contestants, and replaces earlier results.

    Args:
        turns: Number of turns of each contestant.
        epochs: Number of epochs of each turn.
        report: Show earlier results without measuring.
        results: Folder for callbacks.jsonl and .md.
    """
    log = Log(results / "callbacks.jsonl")
    if not report:
        log.file.unlink(missing_ok=True)
        measure(log, turns, epochs)

    # In ms, [turns, clocks].
    spent = {
        name: 1e3 * np.array([row["seconds"] for row in log.find(callbacks=name)])
        for name in CONTESTANTS
    }
    base = spent[NONE]
    rows = []
    for name, values in spent.items():
        more = (values[:, 0] - base[:, 0]) / base[:, 1]
        row = [name, spread(values[:, 0], ".1f"), spread(more, ".2%")]
        for clock in (1, 2):
            ratio = values[:, clock] / base[:, clock]
            row += [spread(values[:, clock], ".0f"), spread(ratio)]
        rows.append(row)
    title = "Cost of callbacks in an epoch of 938 steps"
    publish(
        results / "callbacks.md", [Table(title, HEADER, rows)], f"{len(base)} turns. {machine()}."
    )


if __name__ == "__main__":
    command_line(main)
