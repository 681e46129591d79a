"""What the same bits on any number of devices cost: steps with `--exact` beside steps without, in turns.

    python benchmarks/exact.py       # two minutes; results/exact.md

Both take the same batches of random pictures, in dispatches of some tenths of a second, in one process. A ratio is that
of one turn.
"""

import statistics
import time
from typing import NamedTuple

import jax
import numpy as np
import optax
from points import machine, publish

import ctde_jax as ctde
from ctde_jax.aggregate import IN_ORDER
from ctde_jax.cost.traffic import measure
from ctde_jax.data import deal
from ctde_jax.devices import replica
from ctde_jax.rounds import feed, state
from ctde_jax.rounds.gradient import make_gradient
from ctde_jax.rounds.round import parallel_rounds

TURNS, SECONDS, MOST = 9, 0.4, 512
HEADER = ("network", "batch size", "devices", "exact", "", "bytes sent a step", "without")


class Case(NamedTuple):
    network: str
    model: ctde.models.Model
    batch_size: int
    devices: int


class Contestant:
    """A program of rounds, and the state that it goes on from."""

    def __init__(self, case: Case, strategy: ctde.Strategy, examples: ctde.data.Split):
        devices = ctde.devices.start(case.devices)
        task, optimizer, key = ctde.tasks.classification, optax.adam(1e-3), jax.random.key(0)
        batches = deal(examples, case.devices, case.batch_size, seed=0)
        span = feed.Span(0, MOST, 1, piece_rounds=MOST)
        with feed.make_feed(batches, devices)([span]) as pieces:
            self._split, self._indices, _ = next(pieces)
        center = jax.jit(case.model.init)(key, batches.inputs(0))
        self._state = state.place(*center, optimizer, strategy, devices)
        self._key = replica.replicate(key, devices)
        gradient = make_gradient(case.model, task, exact=strategy.is_exact)
        rounds = parallel_rounds(gradient, optimizer, strategy, devices, batches.axis)
        arguments = (self._state, self._split, self._indices, np.int32(0), np.int32(MOST), self._key)
        self._program = replica.compiled(replica.lowered(rounds, *arguments), devices, strategy.is_exact)
        self.sent = measure(self._program.as_text() or "", 0).sent
        self.steps = 1
        self.steps = min(MOST, max(1, int(SECONDS / min(self.seconds() for _ in range(3)))))

    def seconds(self) -> float:
        """Of a step."""
        before = time.perf_counter()
        self._state, sums = self._program(
            self._state, self._split, self._indices, np.int32(0), np.int32(self.steps), self._key
        )
        jax.block_until_ready(sums)
        return (time.perf_counter() - before) / self.steps


def compare(case: Case) -> list[str]:
    """Returns the row of a table."""
    random = np.random.default_rng(0)
    inputs, labels = random.integers(0, 256, (4096, 28, 28), np.uint8), random.integers(0, 10, 4096, np.int32)
    examples = ctde.data.from_arrays(inputs, labels, inputs[:1], labels[:1]).train
    exact, plain = (Contestant(case, own, examples) for own in (ctde.Strategy(reduce=IN_ORDER), ctde.Strategy()))
    ratios = [exact.seconds() / plain.seconds() for _ in range(TURNS)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return [
        case.network,
        str(case.batch_size),
        str(case.devices),
        f"{middle:.2f} times as long",
        f"{low:.2f}-{high:.2f}",
        f"{exact.sent:,.0f}",
        f"{plain.sent:,.0f}",
    ]


def main() -> None:
    mlp, cnn = ctde.models.mlp([784, 128, 10]), ctde.models.cnn((28, 28), 10)
    networks = [("mlp", mlp, 64), ("mlp", mlp, 512), ("cnn", cnn, 64), ("cnn", cnn, 512)]
    rows = [compare(Case(*network, devices)) for network in networks for devices in (1, 4)]
    publish("exact", "What the same bits cost", HEADER, rows, f"{TURNS} turns, medians, quartiles. {machine()}")


if __name__ == "__main__":
    main()
