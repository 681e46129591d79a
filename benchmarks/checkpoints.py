"""What a checkpoint costs: how long training waits for it, how long the disk takes, and how long reading does.

    python benchmarks/checkpoints.py                  # two minutes; results/checkpoints.md
    python benchmarks/checkpoints.py --folder FOLDER  # where the checkpoints go, to measure that disk

The state is that of a perceptron under Adam on four fake devices, so three numbers for each parameter. Training waits
for the copy to the host; the rest is done in a thread, which shares the cores with it. By default a run saves about
once a minute: the last column says what share of a minute both take together.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import optax
from points import machine, publish

import ctde_jax as ctde
from ctde_jax import checkpoint
from ctde_jax.rounds import state

WIDTHS = (128, 1000, 3000, 6500)
TURNS, MINUTE = 5, 60.0
HEADER = ("parameters", "size", "training waits", "written in the thread", "read and verified", "share of a minute")


def seconds(act: Callable[[], object]) -> float:
    before = time.perf_counter()
    act()
    return time.perf_counter() - before


def measure(width: int, folder: Path) -> list[str]:
    """Returns the row of a table."""
    devices = ctde.devices.start(4)
    model = ctde.models.mlp([784, width, width, 10])
    params, model_state = jax.jit(model.init)(jax.random.key(0), jax.numpy.zeros((1, 784)))
    made = state.place(params, model_state, optax.adam(1e-3), ctde.Strategy(), devices)
    tensors, path = state.to_tensors(made), folder / "step-00000001"
    waits, writes, reads = [], [], []
    for _ in range(TURNS):
        waits.append(seconds(lambda: state.to_tensors(made)))
        writes.append(seconds(lambda: checkpoint.write(path, tensors, {})))
        reads.append(seconds(lambda: checkpoint.read(path)))
    wait, write, read = map(statistics.median, (waits, writes, reads))
    size = sum(tensor.nbytes for tensor in tensors.values())
    number = sum(leaf.size for leaf in jax.tree.leaves(params))
    return [
        f"{number / 1e6:.1f} M",
        f"{size / 1e6:,.1f} MB",
        f"{1e3 * wait:,.1f} ms",
        f"{1e3 * write:,.0f} ms ({1e3 * min(writes):,.0f}-{1e3 * max(writes):,.0f})",
        f"{1e3 * read:,.0f} ms",
        f"{(wait + write) / MINUTE:.2%}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="where the checkpoints go")
    chosen = parser.parse_args()
    rows = []
    for width in WIDTHS:
        with tempfile.TemporaryDirectory(dir=chosen.folder) as folder:
            rows.append(measure(width, Path(folder)))
    publish("checkpoints", "What a checkpoint costs", HEADER, rows, f"{TURNS} turns, medians. {machine()}")


if __name__ == "__main__":
    main()
