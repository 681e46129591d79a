"""What the arithmetic of compressed aggregation costs: the time of a step beside that of a synchronous float32 step.

    python benchmarks/aggregation_cost.py

The MLP 784-128-10 with a global batch of 512 on 4 devices, random data. All contestants take turns in one process, so
that whatever else the machine does meets them all; the table has medians over the turns and the ratios turn by turn.
"""

import argparse
import time
from collections.abc import Callable

import jax
import numpy as np
import optax
from rich.console import Console
from rich.progress import track
from rich.table import Table

import ctde_jax as ctde
from ctde_jax.aggregate import error_feedback, power_sgd, quantize, sign, top_k, two_phase
from ctde_jax.data import Split
from ctde_jax.devices import replica
from ctde_jax.models.tasks import classification
from ctde_jax.rounds import state
from ctde_jax.rounds.gradient import make_gradient
from ctde_jax.rounds.round import parallel_rounds

DEVICES, BATCH_SIZE, STEPS = 4, 512, 20
CONTESTANTS = {
    "float32 mean": ctde.Strategy(),
    "int8, error feedback": ctde.Strategy(reduce=two_phase(error_feedback(quantize(8)))),
    "int4, error feedback": ctde.Strategy(reduce=two_phase(error_feedback(quantize(4)))),
    "int2 statistical, error feedback": ctde.Strategy(reduce=two_phase(error_feedback(quantize(2, "statistical")))),
    "sign, error feedback": ctde.Strategy(reduce=two_phase(error_feedback(sign()))),
    "top 32 of 4096, error feedback": ctde.Strategy(reduce=two_phase(error_feedback(top_k(32)))),
    "rank 4": ctde.Strategy(reduce=power_sgd(4)),
    "int4, error feedback, every 16 steps": ctde.Strategy(16, two_phase(error_feedback(quantize(4)))),
}


def make_turn(strategy: ctde.Strategy, devices: list[jax.Device]) -> Callable[[], float]:
    """Returns a function that takes as many steps as all others do, and says how many seconds one of them took."""
    rng = np.random.default_rng(0)
    split = Split(rng.normal(size=(8192, 784)).astype(np.float32), rng.integers(0, 10, 8192).astype(np.int32))
    model, optimizer = ctde.models.mlp([784, 128, 10]), optax.adam(0.001)
    center = jax.jit(model.init)(jax.random.key(0), split.inputs[:1])
    round_steps = max(1, strategy.inner_steps)
    rounds = -(-STEPS // round_steps)
    indices = rng.integers(0, 8192, (DEVICES, rounds, round_steps, BATCH_SIZE // DEVICES)).astype(np.int32)

    here = state.place(*center, optimizer, strategy, devices)
    examples, key = replica.replicate((split, jax.random.key(1)), devices)
    indices = replica.shard(indices, devices)
    run = parallel_rounds(make_gradient(model, classification), optimizer, strategy, devices, None)
    run = replica.compiled(run.lower(here, examples, indices, np.int32(0), np.int32(rounds), key), devices)

    def turn() -> float:
        nonlocal here
        before = time.perf_counter()
        here, _ = run(here, examples, indices, np.int32(0), np.int32(rounds), key)
        jax.block_until_ready(here)
        return (time.perf_counter() - before) / (rounds * round_steps)

    return turn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=40, help="turns of each contestant")
    turns = parser.parse_args().turns
    devices = ctde.devices.start(DEVICES)
    contestants = {name: make_turn(strategy, devices) for name, strategy in CONTESTANTS.items()}
    for turn in contestants.values():
        turn()  # warm

    seconds = {name: [] for name in contestants}
    for _ in track(range(turns), description="measuring"):
        for name, turn in contestants.items():
            seconds[name].append(turn())

    table = Table(
        "aggregation",
        *("step, median", "fastest", "times the float32 step"),
        title=f"{len(devices)} {devices[0].device_kind} devices, jax {jax.__version__}, {turns} turns of {STEPS} steps",
    )
    plain = np.array(seconds["float32 mean"])
    for name, measured in seconds.items():
        own = np.array(measured)
        low, middle, high = np.percentile(own / plain, [25, 50, 75])
        table.add_row(
            name,
            f"{np.median(own) * 1e3:.2f} ms",
            f"{own.min() * 1e3:.2f} ms",
            f"{middle:.2f} ({low:.2f}-{high:.2f})",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
