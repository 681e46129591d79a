"""Reproduces the table of federated averaging: rounds to 97 % on MNIST with the 2NN.

    python benchmarks/fedavg_table.py --cells iid-c10-b10 by_label-c10-b10

The source is McMahan et al., 2017, Tables 1 and 2. The model is a perceptron 784-200-200-10 with
ReLU. There are 100 clients of 600 images each, either at random or from two shards of the images
sorted by label. 10 or 20 clients take part in a round, each on one fake device; each trains for one
epoch (E = 1) by plain SGD, and the results are averaged. As in the paper, the learning rate is
tuned for each cell, the curve of test accuracy is replaced by its running maximum, and the round at
which it crosses the target is interpolated.

The paper specifies neither the initialization (here the defaults of flax) nor the scale of pixels,
which matters more: `--pixels unit` divides them by 255; `--pixels centered` maps them to
[-0.5, 0.5], as TensorFlow's example for MNIST did at the time. The dark background, most of every
image, is then -0.5 instead of 0, and training is slower.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from math import ceil, inf, isfinite
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import numpy as np
import optax
from harness import RESULTS, Log, Row, Table, command_line, console, machine, publish

import ctde_jax as ctde
from ctde_jax.data import Dataset, partition
from ctde_jax.errors import NonFiniteLoss, check_known

CLIENTS = 100
CLIENT_EXAMPLES = 600
PARAMS = 199_210
TARGET = 0.97
SPLITS = {"iid": "IID", "by_label": "2 label shards"}


class Cell(NamedTuple):
    """One number of the paper's tables."""

    split: str
    drawn: int  # clients in a round; 100 times the paper's C
    batch_size: int  # of one client; the paper's B, whose infinity is all 600 examples
    paper: int  # rounds to the target in the paper
    start: int  # the first learning rate is 10^(start / 3)


CELLS = {
    f"{cell.split}-c{cell.drawn}-b{cell.batch_size}": cell
    for cell in (
        Cell("iid", drawn=10, batch_size=10, paper=87, start=-2),
        Cell("iid", drawn=20, batch_size=10, paper=77, start=-2),
        Cell("by_label", drawn=10, batch_size=10, paper=664, start=-3),
        Cell("by_label", drawn=20, batch_size=10, paper=619, start=-3),
        Cell("iid", drawn=10, batch_size=600, paper=1474, start=-1),
        Cell("by_label", drawn=10, batch_size=600, paper=1796, start=-1),
    )
}


def reproduce(
    name: str, pixels: str, data: Dataset, devices: Sequence[jax.Device], patience: float, seed: int
) -> Row:
    """Tunes the learning rate of a cell; returns the row of the best one."""
    began = time.perf_counter()
    rounds_run = 0
    cell = CELLS[name]

    def run(exponent: int, limit: float) -> float:
        nonlocal rounds_run
        learning_rate = 10 ** (exponent / 3)
        before = time.perf_counter()
        accuracies = train(cell, data, devices, learning_rate, ceil(limit), seed)
        # A training that diverges has no accuracies, and its rounds are infinity.
        rounds = rounds_to(TARGET, accuracies)
        rounds_run += len(accuracies)
        console.print(
            f"{name}, {pixels}: learning rate {learning_rate:.3g}: {rounds:.1f} rounds, "
            f"best accuracy {max(accuracies, default=0):.4f} after {len(accuracies)}, "
            f"{time.perf_counter() - before:.0f} s"
        )
        return rounds

    # For centered pixels, the search starts at the next smaller learning rate.
    tried = tune(run, cell.start - (pixels == "centered"), limit=patience * cell.paper)
    best = min(tried, key=tried.__getitem__)
    seconds = time.perf_counter() - began
    # JSON has no infinity, so learning rates that miss the target have None.
    known = {
        exponent: rounds if isfinite(rounds) else None for exponent, rounds in sorted(tried.items())
    }
    return {
        "rounds": known[best],
        "learning_rate": 10 ** (best / 3),
        "tried": {f"{10 ** (exponent / 3):.3g}": rounds for exponent, rounds in known.items()},
        "seconds": seconds,
        "seconds_a_round": seconds / max(1, rounds_run),
    }


def train(
    cell: Cell,
    data: Dataset,
    devices: Sequence[jax.Device],
    learning_rate: float,
    rounds: int,
    seed: int,
) -> list[float]:
    """Returns the test accuracy after each round, or an empty list if training diverges."""
    # A round is one epoch of a client: E = 1.
    inner_steps = CLIENT_EXAMPLES // cell.batch_size
    labels = data.train.labels
    shards = partial(partition.by_label, shards=2) if cell.split == "by_label" else partition.iid
    # The defaults of a strategy average parameters, and each drawn client has a device.
    try:
        trained = ctde.fit(
            ctde.models.mlp([784, 200, 200, 10], "relu"),
            data,
            optax.sgd(learning_rate),
            ctde.Strategy(inner_steps=inner_steps),
            batch_size=cell.drawn * cell.batch_size,
            steps=rounds * inner_steps,
            devices=devices[: cell.drawn],
            partition=shards(labels, CLIENTS, seed=seed),
            seed=seed,
            eval_every=inner_steps,
            show=False,
        )
    except NonFiniteLoss:
        return []
    assert ctde.models.count_params(trained.params) == PARAMS
    return [row["accuracy"] for row in trained.history if row["split"] == "test"]


def rounds_to(target: float, accuracies: Sequence[float]) -> float:
    """Returns the interpolated round at which the running maximum reaches the target, or inf."""
    # The curve starts at round 0 with accuracy 0.
    curve = np.maximum.accumulate([0.0, *accuracies])
    if curve[-1] < target:
        return inf
    after = int(np.argmax(curve >= target))
    return after - 1 + float((target - curve[after - 1]) / (curve[after] - curve[after - 1]))


def tune(run: Callable[[int, float], float], start: int, limit: float) -> dict[int, float]:
    """Tunes the learning rate in the paper's factors of 10^(1/3), by hill climbing.

    Args:
        run: Function of an exponent in thirds and a limit of rounds, which returns the rounds to
            the target, or infinity if the limit does not suffice.
        start: First exponent.
        limit: Limit of rounds, until a learning rate is known that needs fewer.

    Returns:
        Rounds by exponent.
    """
    tried: dict[int, float] = {}
    center = None
    best = start
    # Ends when neither neighbor of the center is better.
    while center != best:
        center = best
        for exponent in (center, center + 1, center - 1):
            if exponent not in tried:
                # A learning rate that needs more rounds than the best one cannot be the best.
                tried[exponent] = run(exponent, min([limit, *tried.values()]))
        best = min(tried, key=tried.__getitem__)
    return tried


def as_table(found: Sequence[Row]) -> Table:
    """Compares our rounds with the paper's, and adds the MB that each device sends until then."""
    rows = []
    for row in sorted(found, key=lambda row: ([*CELLS].index(row["cell"]), row["pixels"])):
        cell = CELLS[row["cell"]]
        rounds = row["rounds"]
        ours = ("not reached", "-", "-")
        if rounds is not None:
            # A ring all-reduce of float32 sends 2 (n - 1) / n of the parameters per device.
            sent = 2 * (cell.drawn - 1) / cell.drawn * 4 * PARAMS * rounds
            ours = (f"{rounds:.0f}", f"{rounds / cell.paper:.2f}", f"{sent / 1e6:,.0f}")
        batch = str(cell.batch_size) if cell.batch_size < CLIENT_EXAMPLES else "all"
        cells = [
            SPLITS[cell.split],
            row["pixels"],
            f"{cell.drawn / CLIENTS:.1f}",
            batch,
            ours[0],
            str(cell.paper),
        ]
        rows.append(
            [
                *cells,
                ours[1],
                f"{row['learning_rate']:.3g}",
                ours[2],
                f"{row['seconds_a_round']:.2f}",
            ]
        )
    header = (
        "split",
        "pixels",
        "C",
        "B",
        "rounds",
        "paper",
        "ratio",
        "learning rate",
        "MB sent a device",
        "s a round",
    )
    return Table(
        f"Rounds to {TARGET:.0%} test accuracy on MNIST: 2NN, E = 1, {CLIENTS} clients",
        header,
        rows,
    )


def main(
    cells: tuple[str, ...] = tuple(CELLS),
    pixels: Literal["unit", "centered"] = "unit",
    data_dir: Path | None = None,
    results: Path = RESULTS,
    patience: float = 1.5,
    seed: int = 0,
) -> None:
    """Reproduces cells of the table, and replaces their earlier results.

    Args:
        cells: Names of the cells.
        pixels: Scale of the pixels: [0, 1] for unit, [-0.5, 0.5] for centered.
        data_dir: Folder with MNIST's files; by default the cache folder, into which they are
            downloaded.
        results: Folder for fedavg_table.jsonl and fedavg_table.md.
        patience: Give up a learning rate after this multiple of the paper's rounds, or when it
            cannot be the best any more.
        seed: Random seed for the split, initialization, the clients drawn and the data order.
    """
    # Check all names before the first cell, which takes minutes.
    for name in cells:
        check_known("cells", name, CELLS)
    log = Log(results / "fedavg_table.jsonl")
    data = ctde.data.mnist(data_dir)
    devices = ctde.devices.start(max(CELLS[name].drawn for name in cells))
    if pixels == "centered":
        # The model reads (x - shift) / 255.
        data = replace(data, shift=np.full((), 127.5, np.float32))
    for name in cells:
        log.put(
            {"cell": name, "pixels": pixels},
            **reproduce(name, pixels, data, devices, patience, seed),
        )
    note = (
        f"A client that is drawn uploads {4 * PARAMS:,} bytes a round. "
        f"Fake CPU devices on {machine()}; seconds with evaluation and compilation."
    )
    publish(results / "fedavg_table.md", [as_table(log.find())], note)


if __name__ == "__main__":
    command_line(main)
