"""How near training comes to what the machine can do: arithmetic and memory bounds beside the measured time of `fit`.

    python benchmarks/limit.py                        # seven turns, half an hour; may be interrupted and goes on
    python benchmarks/limit.py --turns 2 --only mlp-512
    python benchmarks/limit.py --report               # the table and the picture of what has been measured

What a step has to compute and to move is counted by the formulas of `bounds.py`. The ceiling of arithmetic is the
fastest product of square float32 matrices, by numpy or by JAX, with all cores; that of memory the faster of numpy's
copy and JAX's triad: in main memory, or in the last-level cache where what a step touches fits in there.

The columns "by XLA" hold both counts against XLA's own, of one step as it is compiled: operations of the gradient
alone, which have the activations in them, and bytes that its instructions read and write, wherever those are. XLA
counts the body of a loop once, so the LSTM is held against it for a sequence of one place, and its bytes are not.

Ceilings and contestants take turns, each in a process of its own; a ratio is made of what one turn has measured.
The data are random, in the shape of MNIST and of windows of text, which makes no difference to speed.
"""

import argparse
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import optax
import points
from bounds import CASES, bytes_of_step, lstm_layers, operations, working_set
from jax import numpy as jnp
from matplotlib import pyplot
from points import Row

import ctde_jax as ctde

NAME = "limit"
LIMIT = 600  # seconds for one process


def count(name: str) -> Row:
    """Counts by formula and by XLA."""
    case = CASES[name]
    model, inputs = case.build(), case.inputs(case.batch_size)
    labels = case.labels(inputs)
    seen = inputs if case.learns_text else (inputs / 255).astype(np.float32)
    params, model_state = jax.eval_shape(model.init, jax.random.key(0), seen)
    optimizer = optax.adam(1e-3)

    def gradient(params, model_state, inputs, labels):
        return jax.grad(
            lambda params: case.task.loss(model.apply(params, model_state, inputs, None)[0], labels).mean()
        )(params)

    def step(params, model_state, opt_state, inputs, labels):
        updates, opt_state = optimizer.update(gradient(params, model_state, inputs, labels), opt_state)
        return optax.apply_updates(params, updates), opt_state

    first = slice(1 if name == "lstm" else None)
    layers = lstm_layers(places=1) if name == "lstm" else case.layers
    by_xla = jax.jit(gradient).lower(params, model_state, seen[:, first], labels).compile().cost_analysis()
    opt_state = jax.eval_shape(optimizer.init, params)
    whole = jax.jit(step).lower(params, model_state, opt_state, seen, labels).compile().cost_analysis()
    params = ctde.models.count_params(params)
    return {
        "params": params,
        "operations": operations(case.layers),
        "operations_by_xla": by_xla["flops"] / case.batch_size / operations(layers),
        "bytes": bytes_of_step(case, params),
        "bytes_by_xla": None if name == "lstm" else whole["bytes accessed"] / bytes_of_step(case, params),
        "working_set": working_set(case, params),
    }


def time_fit(name: str, devices: int) -> Row:
    """Trains and returns the seconds of a step in each epoch after the first, without what evaluation takes."""
    case = CASES[name]
    inputs = case.inputs(case.examples)
    labels, few = case.labels(inputs), slice(8 * case.batch_size)
    data = ctde.data.from_arrays(inputs, labels, inputs[few], labels[few])
    trained = ctde.fit(
        case.build(),
        data,
        optax.adam(1e-3),
        task=case.task,
        devices=ctde.devices.start(devices),
        batch_size=case.batch_size,
        epochs=1 + case.epochs,
        show=False,
    )
    seconds = np.zeros(1 + case.epochs)
    for row in trained.history:
        if row["split"] == "train":
            seconds[int(np.ceil(row["epoch"])) - 1] += row["examples"] / row["examples_per_second"] / case.steps
    return {"step_seconds": [round(value, 7) for value in seconds[1:]]}


def fastest(function: Callable[[], object], seconds: float = 0.15) -> float:
    """Calls it again and again, at least twice, and returns the seconds of the fastest call."""
    function()
    times, end = [], time.perf_counter() + seconds
    while len(times) < 2 or time.perf_counter() < end:
        before = time.perf_counter()
        function()
        times.append(time.perf_counter() - before)
    return min(times)


def time_ceilings() -> Row:
    """Measures the fastest product of matrices, in operations a second, and copies, in bytes a second."""
    ctde.devices.start(1)
    products: dict[str, float] = {}
    for size in (512, 1024, 2048, 3072):
        a, b, c = (np.random.default_rng(i).random((size, size), np.float32) for i in range(3))
        on_device, multiply = (jnp.asarray(a), jnp.asarray(b)), jax.jit(jnp.matmul)
        by_numpy = fastest(partial(np.matmul, a, b, out=c))
        by_jax = fastest(lambda on_device=on_device, multiply=multiply: multiply(*on_device).block_until_ready())
        products |= {f"numpy {size}": 2 * size**3 / by_numpy, f"jax {size}": 2 * size**3 / by_jax}
    cache = cache_bytes()
    memory, cached = time_copies(8 * cache), time_copies(cache // 4)
    return {"products": products, "memory": memory, "cached": cached, "cache_bytes": cache}


def time_copies(size: int) -> dict[str, float]:
    """Moves so many bytes in all, in as many threads as there are cores."""
    threads = points.cores()
    pairs = [tuple(np.ones(size // 2 // threads // 4, np.float32) for _ in range(2)) for _ in range(threads)]
    again = max(1, 2**26 // size)  # so that starting the threads does not count

    def copy(pair: tuple[np.ndarray, np.ndarray]) -> None:
        for _ in range(again):
            np.copyto(*pair)

    with ThreadPoolExecutor(threads) as pool:
        by_numpy = fastest(lambda: list(pool.map(copy, pairs))) / again

    a, b = jnp.ones(size // 12, jnp.float32), jnp.ones(size // 12, jnp.float32)
    triad = jax.jit(lambda a, b: a + 0.5 * b, donate_argnums=1)

    def move() -> None:
        nonlocal b
        b = triad(a, b).block_until_ready()

    return {"copy": size / by_numpy, "triad": size / fastest(move)}


def cache_bytes() -> int:
    """Returns the size of the last-level cache, 8 MiB where the system does not say it."""
    sizes = [file.read_text().strip() for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max([int(size[:-1]) * {"K": 2**10, "M": 2**20}[size[-1]] for size in sizes], default=2**23)


def measure_point(point: Row) -> Row:
    """Measures what a turn's line asks for."""
    match point["what"]:
        case "ceilings":
            return time_ceilings()
        case "count":
            return count(point["case"])
        case _:
            return time_fit(point["case"], point["devices"])


class Turn(NamedTuple):
    """What one turn has measured of one case, beside its ceilings."""

    seconds: float
    """Of a step."""

    peak: float
    memory: float
    cached: float


def ceilings_of(rows: list[Row]) -> list[Row]:
    """Returns the ceilings of every turn."""
    return [row for row in rows if row["what"] == "ceilings" and "failed" not in row]


def turns_of(rows: list[Row], case: str, devices: int) -> list[Turn]:
    """Pairs each measurement of a case with the ceilings of the same turn."""
    ceilings = {row["turn"]: row for row in ceilings_of(rows)}
    return [
        Turn(
            float(np.median(row["step_seconds"])),
            *(max(ceilings[row["turn"]][ceiling].values()) for ceiling in ("products", "memory", "cached")),
        )
        for row in rows
        if (row["what"], row.get("case"), row.get("devices")) == ("fit", case, devices)
        and "failed" not in row
        and row["turn"] in ceilings
    ]


class Measured(NamedTuple):
    """What all turns have measured of one case; arrays have an entry for each turn."""

    name: str
    devices: int
    counted: Row
    seconds: np.ndarray
    arithmetic: np.ndarray
    """The arithmetic bound, in seconds of a step, and below that of memory."""

    moving: np.ndarray

    @property
    def flop(self) -> float:
        """Operations of a step."""
        return self.counted["operations"] * CASES[self.name].step_examples


def everything(rows: list[Row]) -> list[Measured]:
    """Returns the cases of which there are turns, in the order in which they were measured."""
    counts = {row["case"]: row for row in rows if row["what"] == "count" and "failed" not in row}
    measured = []
    for name, devices in {(row["case"], row["devices"]): None for row in rows if row["what"] == "fit"}:
        turns = turns_of(rows, name, devices)
        if not turns or name not in counts:
            continue
        seconds, peak, memory, cached = np.array(turns).T
        fits = counts[name]["working_set"] <= ceilings_of(rows)[0]["cache_bytes"]
        arithmetic = counts[name]["operations"] * CASES[name].step_examples / peak
        moving = counts[name]["bytes"] / (cached if fits else memory)
        measured.append(Measured(name, devices, counts[name], seconds, arithmetic, moving))
    return measured


HEADER = (
    *("case", "devices", "GFLOP a step", "by XLA", "MB a step", "by XLA"),
    *("arithmetic, ms", "memory, ms", "measured, ms", "arithmetic / measured", "larger / measured"),
)


def cells(one: Measured) -> list[str]:
    """Writes a row of the table."""
    counted = one.counted
    return [
        one.name,
        str(one.devices),
        f"{one.flop / 1e9:.3f}",
        f"{counted['operations_by_xla']:.3f} x",
        f"{counted['bytes'] / 1e6:.1f}",
        f"{counted['bytes_by_xla']:.2f} x" if counted["bytes_by_xla"] else "-",
        f"{np.median(one.arithmetic) * 1e3:.3f}",
        f"{np.median(one.moving) * 1e3:.3f}",
        points.quartiles(one.seconds * 1e3, ".3f"),
        points.quartiles(one.arithmetic / one.seconds),
        points.quartiles(np.maximum(one.arithmetic, one.moving) / one.seconds),
    ]


def ceilings_text(rows: list[Row]) -> str:
    """Says how high the ceilings are, and who has reached them."""
    ceilings = ceilings_of(rows)
    lines = []
    for what, unit in (("products", "GFLOP/s"), ("cached", "GB/s in cache"), ("memory", "GB/s in memory")):
        medians = {name: np.median([row[what][name] for row in ceilings]) for name in ceilings[0][what]}
        best = max(medians, key=lambda name: medians[name])
        highest = [max(row[what].values()) / 1e9 for row in ceilings]
        lines.append(f"{points.quartiles(highest, '.1f')} {unit} (mostly {best})")
    return f"{', '.join(lines)}; {len(ceilings)} turns. {points.machine()}."


def draw(measured: list[Measured], rows: list[Row]) -> None:
    """Draws the roofline, and where each case stands below it."""
    highest = {
        what: np.median([max(row[what].values()) for row in ceilings_of(rows)])
        for what in ("products", "memory", "cached")
    }
    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    intensity = np.geomspace(0.5, 100, 200)
    for what, label, style in (("cached", "last-level cache", "-"), ("memory", "main memory", "--")):
        roof = np.minimum(highest["products"], intensity * highest[what]) / 1e9
        axes.loglog(intensity, roof, style, color="tab:gray", label=label)
    for i, name in enumerate({one.name: None for one in measured}):
        for one in (one for one in measured if one.name == name):
            x, y = one.flop / one.counted["bytes"], one.flop / one.seconds / 1e9
            low, middle, high = np.percentile(y, [25, 50, 75])
            axes.errorbar(
                x,
                middle,
                yerr=[[middle - low], [high - middle]],
                color=f"C{i}",
                marker="o" if one.devices == 1 else "s",
                markerfacecolor=f"C{i}" if one.devices == 1 else "white",
                linestyle="",
                label=f"{name}, {one.devices} device{'s' * (one.devices > 1)}",
            )
    axes.set(xlabel="operations for each byte moved, by formula", ylabel="GFLOP/s", title="Training below its ceilings")
    axes.grid(alpha=0.3, which="both")
    figure.legend(fontsize=8, loc="outside right upper")
    figure.savefig(points.RESULTS / f"{NAME}.png", dpi=120)


def report() -> None:
    """Prints and writes the table, and draws the picture."""
    rows = points.known(NAME)
    measured = everything(rows)
    if not measured:
        return
    lines = [cells(one) for one in measured]
    points.publish(NAME, "Bounds and measured time of a step", HEADER, lines, ceilings_text(rows))
    draw(measured, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=7, help="turns of each contestant, those of earlier runs included")
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES), help="cases")
    parser.add_argument("--devices", nargs="+", type=int, default=[1, 4], help="how many, one number after another")
    chosen = points.parse(parser, measure_point)
    wanted: list[Row] = [{"what": "count", "case": name} for name in chosen.only]
    for turn in range(chosen.turns):
        wanted.append({"what": "ceilings", "turn": turn})
        wanted += [
            {"what": "fit", "case": name, "devices": devices, "turn": turn}
            for name in chosen.only
            for devices in chosen.devices
        ]
    if not chosen.report:
        points.measure(NAME, __file__, wanted, LIMIT)
    report()


if __name__ == "__main__":
    main()
