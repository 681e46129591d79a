"""Why several fake devices take longer than one: the same steps, meeting for everything, for ten numbers, not at all.

    python benchmarks/meeting.py --data-dir FOLDER/mnist      # some minutes
    python benchmarks/meeting.py --report                     # results/meeting.md

The MLP 784-128-10 with Adam, the same global batch on one device and on four fake ones that share this machine's cores.
Beside this trainer stand loops by hand (`contestants.py`): with the all-reduce of all gradients; with one of the ten
numbers of the last bias, so that the devices wait for each other once a step and send next to nothing; and without any,
which is what computing alone takes: four small batches instead of a large one, and four updates of Adam. The last two
train no common model. Each contestant is a process of its own, and trains an epoch in turn while the others wait;
ratios are taken turn by turn to the same kind of loop on one device.
"""

import argparse
import itertools
import json
from contextlib import ExitStack
from dataclasses import asdict

import numpy as np
import points
from contestants import FLOORS, Job
from peers import OURS, SCRIPT, started

from ctde_jax.data.published.idx import MNIST

NAME = "meeting"
BY_HAND = "JAX, one scan an epoch"
DEVICES = 4
FIELD = [(OURS, 1), (OURS, DEVICES), (BY_HAND, 1), *((name, DEVICES) for name in (BY_HAND, *FLOORS))]


def measure(turns: int, batch_sizes: list[int], data_dir: str) -> None:
    """Lets all take turns, and writes down each."""
    first = points.next_turn(NAME)
    for batch_size in batch_sizes:
        with ExitStack() as running:
            processes = {}
            for name, devices in FIELD:
                job = Job(name, "mlp", batch_size, devices, turns + 1, data_dir)
                processes[name, devices] = running.enter_context(started([SCRIPT, json.dumps(asdict(job))]))
                processes[name, devices].hear("ready")
            for turn, (name, devices) in itertools.product([None, *range(first, first + turns)], FIELD):
                processes[name, devices].go()
                seconds = processes[name, devices].hear("seconds")
                alike = {"batch_size": batch_size, "turn": turn, "contestant": name, "devices": devices}
                row = {**alike, "seconds": seconds}
                if turn is not None:  # in the first one everything is compiled
                    points.add(NAME, row)
                print(json.dumps(row), flush=True)  # no bar here, which would run beside those that are measured


HEADER = "batch size", "contestant", "devices", "an epoch, s", "to the same on one device", "turns"


def report() -> None:
    """Prints and writes the ratios, turn by turn."""
    rows, lines = points.known(NAME), []
    for batch_size in sorted({row["batch_size"] for row in rows}):
        of = {(row["turn"], row["contestant"], row["devices"]): row for row in rows if row["batch_size"] == batch_size}
        turns = [turn for turn in {turn for turn, *_ in of} if all((turn, *each) in of for each in FIELD)]
        for name, devices in FIELD if turns else []:
            alone = (OURS if name == OURS else BY_HAND), 1
            times, base = (
                np.array([of[turn, *each]["seconds"] for turn in turns]) for each in ((name, devices), alone)
            )
            cells = points.quartiles(times, ".3f"), points.quartiles(times / base)
            lines.append([f"{batch_size}", name, f"{devices}", *cells, f"{len(turns)}"])
    points.publish(NAME, "What meeting at every step costs", HEADER, lines, f"{points.machine()}.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=15, help="epochs of each contestant, after one not counted")
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[64, 512])
    parser.add_argument("--data-dir", help="the folder of MNIST's files; by default the cache folder")
    parser.add_argument("--report", action="store_true", help="measure nothing")
    chosen = parser.parse_args()
    if not chosen.report:
        measure(chosen.turns, chosen.batch_sizes, str(MNIST.folder(chosen.data_dir)))
    report()


if __name__ == "__main__":
    main()
