"""Training from disk beside training on what the devices hold: speed, and the memory of the process.

    python benchmarks/streaming.py                         # writes 10 GB here, and deletes them at the end
    python benchmarks/streaming.py --gigabytes 0.5 --models mlp

A file of random uint8 pictures, 28 x 28, with labels. Two contestants train the same model in dispatches of 20 steps:
one from the file, with rows drawn at random from all of it, the other on 60,000 pictures that the devices hold. They
take turns in one process; before each turn the system is made to forget what it keeps of the file in memory, so that
the disk is read. A turn from disk ends when it has drawn as many dispatches as it has computed. The table has medians
over the turns, the ratios turn by turn with quartiles, and the largest memory of the process in the turns of each: its
own (anonymous), and what it has mapped of files. The CNN is the package's; the MLP is the hard case: its arithmetic is
less work than its input.
"""

import argparse
import json
import os
import platform
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from rich.console import Console
from rich.progress import track
from rich.table import Table

import ctde_jax as ctde
from ctde_jax.data import Split, deal
from ctde_jax.devices import replica
from ctde_jax.models.tasks import classification
from ctde_jax.rounds import state
from ctde_jax.rounds.feed import Span, make_feed, shapes
from ctde_jax.rounds.gradient import make_gradient
from ctde_jax.rounds.round import parallel_rounds

RESULTS = Path(__file__).parent / "results"
PICTURE, RESIDENT, STEPS = (28, 28), 60_000, 20
BAR = 0.8
"""Of the resident speed, for the CNN."""


class Case(NamedTuple):
    """What is trained."""

    model: ctde.models.Model
    batch_size: int
    dispatches: int
    """In a turn."""


CASES = {
    "cnn": lambda: Case(ctde.models.cnn(PICTURE, 10), 64, 6),
    "mlp": lambda: Case(ctde.models.mlp([784, 128, 10]), 512, 20),
}


def write(path: Path, size: int) -> None:
    """Writes a .npy file of so many bytes, block by block."""
    rng, examples, block = np.random.default_rng(0), size // 784, 2**16
    with path.open("wb") as file:
        header = {"descr": "|u1", "fortran_order": False, "shape": (examples, *PICTURE)}
        np.lib.format.write_array_header_1_0(file, header)
        for first in track(range(0, examples, block), description="writing"):
            file.write(rng.bytes(784 * min(block, examples - first)))
        file.flush()
        os.fsync(file.fileno())


def forget(path: Path) -> None:
    """Makes the system forget what it keeps of a file in memory."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@contextmanager
def watched_memory() -> Iterator[dict[str, int]]:
    """Keeps the largest memory of this process, looked at every 10 ms: its own, and what it has mapped of files."""
    largest, over = {"RssAnon": 0, "RssFile": 0}, threading.Event()

    def watch() -> None:
        while not over.wait(0.01):
            for line in Path("/proc/self/status").read_text().splitlines():
                name, _, value = line.partition(":")
                if name in largest:
                    largest[name] = max(largest[name], 1024 * int(value.split()[0]))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield largest
    finally:
        over.set()
        thread.join()


def make_turn(case: Case, split: Split, devices: list[jax.Device]) -> Callable[[], float]:
    """Returns a function that goes on training, and says how many examples a second it has trained on."""
    batches = deal(split, len(devices), case.batch_size, seed=0)
    optimizer, a_turn = optax.adam(0.001), STEPS * case.dispatches
    here = state.place(
        *jax.jit(case.model.init)(jax.random.key(0), split.inputs[:1]), optimizer, ctde.Strategy(), devices
    )
    model = ctde.models.with_raw_inputs(case.model, np.float32(0), np.float32(1 / 255))
    feed, key = make_feed(batches, devices), replica.replicate(jax.random.key(1), devices)
    rounds = parallel_rounds(make_gradient(model, classification), optimizer, ctde.Strategy(), devices, batches.axis)
    arguments = (*shapes(batches, Span(0, a_turn, 1, STEPS, STEPS)), np.int32(0), np.int32(STEPS), key)
    run = replica.compiled(rounds.lower(here, *arguments), devices)
    start = 0

    def turn() -> float:
        nonlocal here, start
        span = Span(start, start + a_turn + STEPS, 1, STEPS, STEPS)
        start += a_turn
        with feed([span]) as pieces:
            examples, indices, rounds = next(pieces)
            before = time.perf_counter()
            for _ in range(case.dispatches):
                here, sums = run(here, examples, indices, np.int32(0), np.int32(rounds), key)
                examples, indices, rounds = next(pieces)  # while it computes
                jax.block_until_ready(sums)
            return a_turn * case.batch_size / (time.perf_counter() - before)

    return turn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=10.0, help="size of the file")
    parser.add_argument("--folder", type=Path, default=Path(), help="where it is written; on a disk, not in memory")
    parser.add_argument("--models", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--turns", type=int, default=9, help="turns of each contestant")
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--results", type=Path, default=RESULTS, help="the folder for streaming.jsonl and .md")
    chosen = parser.parse_args()

    size = round(chosen.gigabytes * 1e9)
    free = shutil.disk_usage(chosen.folder).free
    if free < 1.05 * size:
        parser.error(f"{chosen.folder.resolve()} has {free / 1e9:.1f} GB free, and the file takes {size / 1e9:.1f}.")
    if size // 784 < RESIDENT:
        parser.error(f"--gigabytes must be at least {RESIDENT * 784 / 1e9:.2f}, got {chosen.gigabytes}.")
    devices = ctde.devices.start(chosen.devices)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=chosen.folder) as folder:
        path = Path(folder) / "x_train.npy"
        write(path, size)
        try:
            for name in chosen.models:
                measure(name, path, devices, chosen.turns, rows, chosen.results)
        finally:
            report(rows, path.stat().st_size, devices, chosen.results)


def measure(
    name: str, path: Path, devices: list[jax.Device], turns: int, rows: list[dict[str, Any]], results: Path
) -> None:
    """Adds a row for every pair of turns, and writes it at once."""
    pictures = np.load(path, mmap_mode="r")
    labels = np.random.default_rng(1).integers(0, 10, len(pictures))
    resident = np.array(pictures[:RESIDENT])
    on_disk = ctde.data.from_arrays(pictures, labels, resident, labels[:RESIDENT])
    case = CASES[name]()
    contestants = {
        "resident": make_turn(case, on_disk.test, devices),
        "disk": make_turn(case, on_disk.train, devices),
    }
    for turn in contestants.values():
        turn()  # warm

    for _ in track(range(turns), description=name):
        row: dict[str, Any] = {"model": name, "batch_size": case.batch_size}
        for contestant, turn in contestants.items():
            forget(path)
            with watched_memory() as memory:
                row[contestant] = turn()
            row |= {f"{contestant} {kind}": largest for kind, largest in memory.items()}
        rows.append(row)
        with (results / "streaming.jsonl").open("w" if len(rows) == 1 else "a") as file:
            file.write(json.dumps(rows[-1]) + "\n")


def report(rows: list[dict[str, Any]], size: int, devices: list[jax.Device], results: Path) -> None:
    """Prints the table, and saves it as Markdown."""
    title = (
        f"{size / 1e9:.2f} GB on disk, {len(devices)} {devices[0].device_kind} device, jax {jax.__version__}, "
        f"numpy {np.__version__}, Python {platform.python_version()}, {os.cpu_count()} cores"
    )
    header = [
        *("model", "batch", "from disk, examples/s", "resident, examples/s", "ratio, median and quartiles"),
        *("own memory, resident", "from disk", "mapped of files, resident", "from disk"),
    ]
    table = Table(*header, title=title)
    lines = [f"{title}.", "", f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for name in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == name]
        disk, resident = (np.array([row[contestant] for row in own]) for contestant in ("disk", "resident"))
        low, middle, high = np.percentile(disk / resident, [25, 50, 75])
        kinds = [f"{contestant} {kind}" for kind in ("RssAnon", "RssFile") for contestant in ("resident", "disk")]
        memory = [max(row[kind] for row in own) / 1e6 for kind in kinds]
        cells = [
            *(name, str(own[0]["batch_size"]), f"{np.median(disk):,.0f}", f"{np.median(resident):,.0f}"),
            *(f"{middle:.2f} ({low:.2f}-{high:.2f})", *(f"{megabytes:,.0f} MB" for megabytes in memory)),
        ]
        table.add_row(*cells)
        lines.append(f"| {' | '.join(cells)} |")
        if name == "cnn":
            verdict = "holds" if middle >= BAR else "is missed"
            Console().print(f"the bar of {BAR} for the CNN {verdict}: {middle:.2f}")
    if rows:
        Console(width=160).print(table)
        (results / "streaming.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
