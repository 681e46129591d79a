"""Time of many seeds: by one program, and by as many single runs.

    python benchmarks/many.py                 # five minutes on a quiet machine
    python benchmarks/many.py --report

As whole processes: `python -m ctde_jax.train --seeds 32` and the same command without `--seeds`,
whose time is multiplied by 32. Inside `fit`: the seconds of training and evaluation of `fit_many`,
and the sum of those of single calls of `fit`. The contestants take turns.
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jax
import numpy as np
import optax
from harness import RESULTS, Log, Table, command_line, console, machine, publish, spread, started

import ctde_jax as ctde

HEADER = ("runs", "devices", "turns", "one program, s", "single runs, s", "ratio")


def images() -> ctde.data.Dataset:
    """Random images in the shape of MNIST."""
    rng = np.random.default_rng(0)
    inputs = rng.integers(0, 256, (12_800, 28, 28), dtype=np.uint8)
    labels = (np.arange(len(inputs)) % 10).astype(np.int32)
    return ctde.data.from_arrays(inputs, labels, inputs[:1000], labels[:1000])


MODELS: dict[str, tuple[Callable[[], ctde.data.Dataset], list[int], int]] = {
    "digits, 64-128-10 at 64, 10 epochs": (ctde.data.digits, [64, 128, 10], 64),
    "images, 784-128-10 at 512, 10 epochs": (images, [784, 128, 10], 512),
}
"""Functions to the data, layer sizes and batch sizes, by name."""


def seconds_of(seconds: dict[str, float]) -> float:
    """Returns the time of training and evaluation."""
    return seconds["train"] + seconds["evaluate"]


def measure_commands(log: Log, seeds: int, turns: int) -> None:
    """Measures whole processes; the first turn fills the cache of compiled programs."""
    command = [sys.executable, "-m", "ctde_jax.train", "--devices", "2", "--replicas", "1"]
    single = [sys.executable, "-m", "ctde_jax.train", "--devices", "1"]
    for turn in range(turns + 1):
        row = {}
        for name, words in (("many", [*command, "--seeds", str(seeds)]), ("single", single)):
            with TemporaryDirectory() as folder, started([*words, "--run-dir", folder]) as process:
                row[name] = round(process.wait(), 3)
        console.print(f"commands, turn {turn} of {turns}: {row}")
        if turn:
            log.put({"what": "commands", "turn": turn}, seeds=seeds, **row)


def measure_fits(log: Log, seeds: int, turns: int) -> None:
    """Measures the training loops in this process; the first turn warms up."""
    cpu = jax.default_backend() == "cpu"
    devices = ctde.devices.start(2 if cpu else None)
    for model, (load, sizes, batch_size) in MODELS.items():
        data = load()
        options: dict[str, Any] = {"batch_size": batch_size, "epochs": 10, "show": False}
        arguments = (ctde.models.mlp(sizes), data, optax.adam(0.008))
        for turn in range(turns + 1):
            row = {}
            begin = time.perf_counter()
            single = [
                ctde.fit(*arguments, seed=seed, devices=devices[:1], **options)
                for seed in range(seeds if cpu else 1)
            ]
            row["single"] = sum(seconds_of(each.seconds) for each in single) * seeds / len(single)
            for count in range(1, len(devices) + 1):
                swept = ctde.fit_many(
                    *arguments,
                    seeds=range(seeds),
                    devices=devices[:count],
                    replicas=1,
                    **options,
                )
                trained = swept.outcomes[0].trained
                assert trained is not None
                row[str(count)] = seconds_of(trained.seconds)
            spent = time.perf_counter() - begin
            console.print(f"{model}, turn {turn} of {turns}: {row}, {spent:.0f} s in all")
            if turn:
                log.put({"what": model, "turn": turn}, seeds=seeds, **row)
            # `jax.pmap` keeps the programs of all runs, until the process has no memory maps left.
            jax.clear_caches()


def main(seeds: int = 32, turns: int = 5, report: bool = False, results: Path = RESULTS) -> None:
    """Measures all contestants, and replaces earlier results.

    Args:
        seeds: Number of runs.
        turns: Number of turns of each contestant.
        report: Show earlier results without measuring.
        results: Folder for many.jsonl and .md.
    """
    log = Log(results / "many.jsonl")
    if not report:
        log.file.unlink(missing_ok=True)
        measure_commands(log, seeds, turns)
        measure_fits(log, seeds, turns)

    rows = []
    for what in ("commands", *MODELS):
        found = log.find(what=what)
        for name in (
            [name for name in found[0] if name == "many" or name.isdecimal()] if found else ()
        ):
            count = found[0]["seeds"]
            many = np.array([row[name] for row in found])
            singles = np.array([row["single"] for row in found])
            label = f"inside fit, {count} seeds: {what}"
            # A command was measured once in each turn.
            if what == "commands":
                singles = count * singles
                label = f"commands, {count} seeds of the digits"
            devices = "2" if name == "many" else name
            times = [spread(values, ".2f") for values in (many, singles, many / singles)]
            rows.append([label, devices, str(len(found)), *times])
    note = f"On {jax.default_backend()}; single runs on one device. {machine()}."
    publish(results / "many.md", [Table("Many seeds", HEADER, rows)], note)


if __name__ == "__main__":
    command_line(main)
