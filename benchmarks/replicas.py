"""Time of a step with many replicas on one device, and on as many fake CPU devices.

    python benchmarks/replicas.py             # resumable; five minutes
    python benchmarks/replicas.py --report    # results/replicas.md

The MLP 784-128-10 trains with SGD on random images in the shape of MNIST, at a global batch size of
512. The contestants are one replica, eight replicas on one device, and eight on eight fake devices,
each with gradients averaged at every step and with parameters averaged every 16 steps.

The contestants take turns, each turn in a new process, as JAX fixes the number of CPU devices when
it starts. The time of a turn is that of the fastest of its intervals of 64 steps between two
evaluations, as other load on the machine only adds time. Ratios are those to one replica with the
same strategy in the same turn.
"""

from pathlib import Path

import numpy as np
import optax
from harness import RESULTS, Log, Row, Table, command_line, machine, measure, publish, spread

import ctde_jax as ctde

LIMIT = 120  # seconds for one process
BATCH_SIZE = 512
INTERVAL = 64  # steps between two evaluations
INTERVALS = 25
EXAMPLES = 10_000

STRATEGIES = {"every step": ctde.Strategy(), "every 16 steps": ctde.Strategy(16)}
PLACES = {"1 on 1": (1, 1), "8 on 1": (1, 8), "8 on 8": (8, 8)}
"""Numbers of devices and replicas, by name: replicas on devices."""

ONE = "1 on 1"
HEADER = ("averaged", "replicas on devices", "step, ms", "to one replica")


def measure_point(point: Row) -> Row:
    """Trains, and returns the time per step of the fastest interval after the first, in ms."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (EXAMPLES, 28, 28), dtype=np.uint8)
    labels = (np.arange(EXAMPLES) % 10).astype(np.int32)
    devices, replicas = PLACES[point["place"]]
    trained = ctde.fit(
        ctde.models.mlp([784, 128, 10]),
        ctde.data.from_arrays(images, labels, images[:BATCH_SIZE], labels[:BATCH_SIZE]),
        optax.sgd(0.01),
        STRATEGIES[point["averaged"]],
        devices=ctde.devices.start(devices, replicas=replicas),
        batch_size=BATCH_SIZE,
        steps=INTERVALS * INTERVAL,
        eval_every=INTERVAL,
        log_every=INTERVAL,
        show=False,
    )
    speeds = [row["examples_per_second"] for row in trained.history if row["split"] == "train"]
    return {"step_ms": round(1e3 * BATCH_SIZE / max(speeds[1:]), 4)}


def main(turns: int = 9, report: bool = False, results: Path = RESULTS) -> None:
    """Measures what is missing.

    Args:
        turns: Number of turns of each contestant, including those of earlier runs.
        report: Show earlier results without measuring.
        results: Folder for replicas.jsonl and .md.
    """
    log = Log(results / "replicas.jsonl")
    points = [
        {"turn": turn, "averaged": averaged, "place": place}
        for turn in range(turns)
        for averaged in STRATEGIES
        for place in PLACES
    ]
    if not report:
        measure(log, __file__, points, LIMIT)

    rows = []
    for averaged in STRATEGIES:
        times = {
            place: np.array([row["step_ms"] for row in log.find(averaged=averaged, place=place)])
            for place in PLACES
        }
        rows += [
            (averaged, place, spread(values, ".3f"), spread(values / times[ONE]))
            for place, values in times.items()
        ]
    title = "A step of the MLP 784-128-10 at batch size 512"
    note = f"{turns} turns. {machine()}."
    publish(results / "replicas.md", [Table(title, HEADER, rows)], note)


if __name__ == "__main__":
    command_line(main, measure_point)
