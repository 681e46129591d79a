"""Federated averaging's own table, again: rounds to 97 % on MNIST (McMahan et al., 2017, Tables 1 and 2, the 2NN).

    python benchmarks/fedavg_table.py --cells iid-c10-b10 by_label-c10-b10

A perceptron 784-200-200-10 with ReLU; 100 clients of 600 pictures each, either at random or from two shards of the
pictures sorted by label; 10 or 20 clients in a round, each on a fake device of its own; each goes through its pictures
once (E = 1) by plain SGD, and the results are averaged. As in the paper, the learning rate is tuned for each cell, the
curve of test accuracy is made monotone by its best value so far, and the round at which it crosses the target is
interpolated.

The paper says neither how it draws the first weights, here flax's defaults, nor how it scales pixels, which matters
more: `--pixels unit` divides them by 255; `--pixels centered` brings them to [-0.5, 0.5], as TensorFlow's example for
MNIST did at the time. The dark background, most of every picture, is then -0.5 instead of 0, and training is slower.
"""

import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from math import ceil, inf, isfinite
from pathlib import Path
from typing import Literal

import jax
import numpy as np
import optax
import tyro
from rich.console import Console
from rich.table import Table

import ctde_jax as ctde
from ctde_jax.data import Dataset, partition
from ctde_jax.errors import NonFiniteLoss, check_known

CLIENTS = 100
CLIENT_EXAMPLES = 600
PARAMS = 199_210
TARGET = 0.97
RESULTS = Path(__file__).parent / "results"


Pixels = Literal["unit", "centered"]


@dataclass(frozen=True)
class Cell:
    """One number of the paper's tables."""

    split: Literal["iid", "by_label"]
    drawn: int
    """Clients in a round; the paper's C times 100."""

    batch_size: int
    """Of one client; the paper's B, its infinity being all 600 examples."""

    paper: int
    """Rounds to the target."""

    start: int
    """The learning rate that is tried first is 10 to this many thirds."""

    @property
    def name(self) -> str:
        """As `--cells` takes it."""
        return f"{self.split}-c{self.drawn}-b{self.batch_size}"


CELLS = {
    cell.name: cell
    for cell in (
        Cell("iid", drawn=10, batch_size=10, paper=87, start=-2),
        Cell("iid", drawn=20, batch_size=10, paper=77, start=-2),
        Cell("by_label", drawn=10, batch_size=10, paper=664, start=-3),
        Cell("by_label", drawn=20, batch_size=10, paper=619, start=-3),
        Cell("iid", drawn=10, batch_size=600, paper=1474, start=-1),
        Cell("by_label", drawn=10, batch_size=600, paper=1796, start=-1),
    )
}


@dataclass(frozen=True)
class Result:
    """What came of a cell."""

    cell: str
    pixels: str
    rounds: float | None
    """To the target, at the best learning rate; None where none has reached it."""

    learning_rate: float
    tried: dict[str, float | None]
    """Rounds by learning rate; None where a run was given up."""

    seconds: float
    seconds_a_round: float


def main(
    cells: tuple[str, ...] = tuple(CELLS),
    pixels: Pixels = "unit",
    data_dir: Path | None = None,
    results: Path = RESULTS,
    patience: float = 1.5,
    seed: int = 0,
) -> None:
    """Reproduces cells of the table, and keeps what came of each beside what is there already.

    Args:
        cells: Which ones, by name.
        pixels: In [0, 1] or in [-0.5, 0.5].
        data_dir: Folder with MNIST's files; by default the cache folder, into which they are downloaded.
        results: Folder for fedavg_table.json and fedavg_table.md.
        patience: A learning rate is given up after so many times the paper's rounds, or when it cannot be the best.
        seed: Of the split, the start, the clients drawn and their orders.
    """
    for name in cells:
        check_known("cells", name, CELLS)
    devices = ctde.devices.start(max(CELLS[name].drawn for name in cells))
    data = ctde.data.mnist(data_dir)
    if pixels == "centered":
        data = replace(data, shift=np.full((), 127.5, np.float32))
    results.mkdir(parents=True, exist_ok=True)
    found = _load(results / "fedavg_table.json")
    console = Console()
    for name in cells:
        result = reproduce(CELLS[name], pixels, data, devices, patience, seed, console)
        found = [other for other in found if (other.cell, other.pixels) != (name, pixels)] + [result]
        _save(results, found)
    console.print(as_table(found))
    console.print(_environment())


def reproduce(
    cell: Cell,
    pixels: Pixels,
    data: Dataset,
    devices: Sequence[jax.Device],
    patience: float,
    seed: int,
    console: Console,
) -> Result:
    """Tunes the learning rate of a cell."""
    began, rounds_run = time.perf_counter(), 0

    def run(exponent: int, limit: float) -> float:
        nonlocal rounds_run
        learning_rate, before = 10 ** (exponent / 3), time.perf_counter()
        accuracies = train(cell, data, devices, learning_rate, ceil(limit), seed)
        rounds = rounds_to(TARGET, accuracies)
        rounds_run += len(accuracies)
        console.print(
            f"{cell.name}, {pixels}: learning rate {learning_rate:.3g}: {rounds:.1f} rounds, best accuracy "
            f"{max(accuracies, default=0):.4f} after {len(accuracies)}, {time.perf_counter() - before:.0f} s"
        )
        return rounds

    start = cell.start if pixels == "unit" else cell.start - 1
    tried = tune(run, start, limit=patience * cell.paper)
    best, seconds = min(tried, key=tried.__getitem__), time.perf_counter() - began
    known = {exponent: rounds if isfinite(rounds) else None for exponent, rounds in sorted(tried.items())}
    by_rate = {f"{10 ** (exponent / 3):.3g}": rounds for exponent, rounds in known.items()}
    return Result(cell.name, pixels, known[best], 10 ** (best / 3), by_rate, seconds, seconds / max(1, rounds_run))


def train(
    cell: Cell, data: Dataset, devices: Sequence[jax.Device], learning_rate: float, rounds: int, seed: int
) -> list[float]:
    """Returns the test accuracy after each round, none where the training diverges."""
    inner_steps = CLIENT_EXAMPLES // cell.batch_size
    labels = data.train.labels
    clients = {
        "iid": lambda: partition.iid(labels, CLIENTS, seed),
        "by_label": lambda: partition.by_label(labels, CLIENTS, shards=2, seed=seed),
    }[cell.split]()
    try:
        trained = ctde.fit(
            ctde.models.mlp([784, 200, 200, 10], "relu"),
            data,
            optax.sgd(learning_rate),
            ctde.Strategy(inner_steps=inner_steps),
            batch_size=cell.drawn * cell.batch_size,
            steps=rounds * inner_steps,
            devices=devices[: cell.drawn],
            partition=clients,
            seed=seed,
            eval_every=inner_steps,
            show=False,
        )
    except NonFiniteLoss:
        return []
    assert ctde.models.count_params(trained.params) == PARAMS
    return [row["accuracy"] for row in trained.history if row["split"] == "test"]


def rounds_to(target: float, accuracies: Sequence[float]) -> float:
    """Returns where the best accuracy so far crosses the target, between two rounds; infinity where it never does."""
    curve = np.maximum.accumulate([0.0, *accuracies])
    if curve[-1] < target:
        return inf
    after = int(np.argmax(curve >= target))
    return after - 1 + float((target - curve[after - 1]) / (curve[after] - curve[after - 1]))


def tune(run: Callable[[int, float], float], start: int, limit: float) -> dict[int, float]:
    """Walks over learning rates by the paper's factor 10^(1/3), on to the better neighbor until there is none.

    Args:
        run: Returns the rounds for an exponent in thirds, at most so many; infinity where these do not suffice.
        start: The exponent to start from.
        limit: Of the rounds, as long as no learning rate is known to need fewer.

    Returns:
        The rounds by exponent.
    """
    tried: dict[int, float] = {}
    center, best = None, start
    while center != best:
        center = best
        for exponent in (center, center + 1, center - 1):
            if exponent not in tried:
                tried[exponent] = run(exponent, min([limit, *tried.values()]))
        best = min(tried, key=tried.__getitem__)
    return tried


def as_table(found: Sequence[Result]) -> Table:
    """Puts ours beside theirs, with what each device sent until the target: its share of a ring's float32 sums."""
    table = Table(title=f"Rounds to {TARGET:.0%} test accuracy on MNIST: 2NN, E = 1, {CLIENTS} clients")
    table.add_column("split")
    table.add_column("pixels")
    for column in ("C", "B", "rounds", "paper", "ratio", "learning rate", "MB sent a device", "s a round"):
        table.add_column(column, justify="right")
    for result in found:
        cell = CELLS[result.cell]
        ours = ("not reached", "-", "-")
        if result.rounds is not None:
            sent = 2 * (cell.drawn - 1) / cell.drawn * 4 * PARAMS * result.rounds
            ours = (f"{result.rounds:.0f}", f"{result.rounds / cell.paper:.2f}", f"{sent / 1e6:,.0f}")
        rounds, ratio, megabytes = ours
        table.add_row(
            {"iid": "IID", "by_label": "2 label shards"}[cell.split],
            result.pixels,
            f"{cell.drawn / CLIENTS:.1f}",
            str(cell.batch_size) if cell.batch_size < CLIENT_EXAMPLES else "all",
            rounds,
            str(cell.paper),
            ratio,
            f"{result.learning_rate:.3g}",
            megabytes,
            f"{result.seconds_a_round:.2f}",
        )
    table.caption = f"A client that is drawn uploads {4 * PARAMS:,} bytes a round."
    return table


def _environment() -> str:
    return (
        f"Python {platform.python_version()}, JAX {jax.__version__}, fake CPU devices on "
        f"{os.cpu_count()} cores of {platform.machine()}; seconds with evaluation and compilation."
    )


def _load(path: Path) -> list[Result]:
    if not path.exists():
        return []
    return [Result(**result) for result in json.loads(path.read_text(encoding="utf-8"))]


def _save(folder: Path, found: list[Result]) -> None:
    names = list(CELLS)
    found.sort(key=lambda result: (names.index(result.cell), result.pixels))
    content = json.dumps([asdict(result) for result in found], indent=2)
    (folder / "fedavg_table.json").write_text(content + "\n", encoding="utf-8")
    table = as_table(found)
    columns = [list(column.cells) for column in table.columns]
    lines = [
        [str(column.header) for column in table.columns],
        ["---"] * 2 + ["---:"] * (len(columns) - 2),
        *zip(*columns, strict=True),
    ]
    text = "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)
    (folder / "fedavg_table.md").write_text(
        f"{table.title}\n\n{text}\n\n{table.caption} {_environment()}\n", encoding="utf-8"
    )


if __name__ == "__main__":
    tyro.cli(main)
