"""What training costs as the work grows: memory and time over parameters, devices and examples.

    python benchmarks/scale.py                           # six minutes; may be interrupted and goes on
    python benchmarks/scale.py --axis devices            # or parameters, examples, strategies, models
    python benchmarks/scale.py --report                  # tables and pictures of what has been measured

Every point is a run of `fit` in a process of its own, on random data.

- parameters: the MLP 784-w-w-10, one device, batch 64.
- devices: the MLP 784-128-10, global batch 512, on 1 to 64 fake devices that share this machine's cores; synchronous,
  and DiLoCo every 16 steps in 4 bits with error feedback.
- examples: 28 x 28 bytes each, one device, batch 512. A point that would not fit into free memory is left out.
- strategies, models: each preset and each network for a few steps on 64 fake devices, to see that it runs.

*Device memory* is what the compiled program needs on each device, as XLA says: arguments (state, training examples,
batches), results that do not take over the memory of arguments, and what lies between. *Process* is the peak of
resident memory; fake devices are all in one process, so it has every device's copy, and the data set itself.
"""

import resource
import sys
from math import sqrt
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import optax
from harness import RESULTS, Log, Row, Table, command_line, machine, measure, publish
from matplotlib import pyplot

import ctde_jax as ctde
from ctde_jax.aggregate import error_feedback, quantize, two_phase
from ctde_jax.config.presets import PRESETS
from ctde_jax.cost.targets import compile_rounds
from ctde_jax.data import deal
from ctde_jax.rounds import Resident

MOST_DEVICES = 64
AxisName = Literal["parameters", "devices", "examples", "strategies", "models"]

AGREEMENTS = {
    "synchronous": ctde.Strategy(),
    "DiLoCo 16, int4": ctde.Strategy(
        16, two_phase(error_feedback(quantize(4))), optax.sgd(0.7, momentum=0.9, nesterov=True)
    ),
}

PARAMETERS = (100_000, 300_000, 1_000_000, 3_000_000, 10_000_000, 30_000_000, 100_000_000)
DEVICES = (1, 2, 4, 8, 16, 32, MOST_DEVICES)
EXAMPLES = (10_000, 100_000, 1_000_000, 3_000_000, 10_000_000)
NETWORKS = ("mlp", "cnn", "resnet", "lstm", "gru", "transformer")

AXES: dict[str, list[Row]] = {
    "parameters": [{"axis": "parameters", "parameters": size} for size in PARAMETERS],
    "devices": [
        {"axis": "devices", "devices": devices, "strategy": name}
        for devices in DEVICES
        for name in AGREEMENTS
    ],
    "examples": [{"axis": "examples", "examples": examples} for examples in EXAMPLES],
    "strategies": [{"axis": "strategies", "strategy": name} for name in PRESETS],
    "models": [{"axis": "models", "model": name} for name in NETWORKS],
}


def pictures(examples: int) -> ctde.data.Dataset:
    """Draws random pictures in the shape of MNIST; the test split is small."""
    rng = np.random.default_rng(0)
    inputs = rng.integers(0, 256, (examples, 28, 28), dtype=np.uint8)
    labels = (np.arange(examples) % 10).astype(np.int32)
    return ctde.data.from_arrays(inputs, labels, inputs[:512], labels[:512])


def perceptron(parameters: int) -> ctde.models.Model:
    """Builds the MLP 784-w-w-10 with about so many parameters."""
    linear = 784 + 10 + 2
    width = round((sqrt(linear**2 + 4 * (parameters - 10)) - linear) / 2)
    return ctde.models.mlp([784, width, width, 10])


def time_training(
    model: ctde.models.Model,
    data: ctde.data.Dataset,
    devices: int,
    batch_size: int,
    strategy: ctde.Strategy = ctde.Strategy(),
    dispatch: int = 16,
    **options: Any,
) -> Row:
    """Trains for five dispatches of so many steps; says how long a step took after the first one, and what memory."""
    around, before = ctde.devices.start(devices), peak_memory()
    steps = 5 * dispatch
    trained = ctde.fit(
        model,
        data,
        optax.adam(1e-4),
        strategy,
        devices=around,
        batch_size=batch_size,
        steps=steps,
        eval_every=steps,
        log_every=dispatch,
        show=False,
        **options,
    )
    rows = [row for row in trained.history if row["split"] == "train"]
    seconds = [batch_size / row["examples_per_second"] for row in rows[1:]]
    return {
        "params": ctde.models.count_params(trained.params),
        "step_seconds": [round(value, 7) for value in np.percentile(seconds, [25, 50, 75])],
        "compile_seconds": round(trained.seconds["compile"], 2),
        "process": peak_memory(),
        "process_before": before,
    }


def device_memory(
    model: ctde.models.Model,
    data: ctde.data.Dataset,
    devices: int,
    batch_size: int,
    strategy: ctde.Strategy,
) -> Row:
    """Compiles rounds like those of `fit`, places nothing, and asks XLA what memory each device needs for them."""
    around, batches = ctde.devices.start(devices), deal(data.train, devices, batch_size, seed=0)
    model = ctde.models.with_raw_inputs(model, data.shift, data.scale)
    task = ctde.tasks.classification
    program = compile_rounds(
        model, data, task, optax.adam(1e-4), strategy, Resident(batches), around
    )
    needs = program.memory_analysis()
    return {
        "arguments": needs.argument_size_in_bytes,
        "results": needs.output_size_in_bytes - needs.alias_size_in_bytes,
        "between": needs.temp_size_in_bytes,
    }


def measure_point(point: Row) -> Row:
    """Trains, and then asks XLA, whose answer takes memory of its own."""
    options, strategy = {}, ctde.Strategy()
    match point["axis"]:
        case "parameters":
            parts = (perceptron(point["parameters"]), pictures(10_000), 1, 64)
            options = {"dispatch": max(1, min(16, 20_000_000 // point["parameters"]))}
        case "devices":
            parts = (ctde.models.mlp([784, 128, 10]), pictures(60_000), point["devices"], 512)
            strategy = AGREEMENTS[point["strategy"]]
        case "examples":
            parts = (ctde.models.mlp([784, 128, 10]), pictures(point["examples"]), 1, 512)
        case "strategies":
            small = ctde.models.mlp([64, 32, 10]), ctde.data.digits(), MOST_DEVICES, 256
            return time_training(*small, ctde.strategy(point["strategy"]))
        case _:
            return try_model(point["model"])
    return time_training(*parts, strategy, **options) | device_memory(*parts, strategy)


def try_model(name: str) -> Row:
    """Trains a small one of these networks on many devices."""
    digits, task = ctde.data.digits(), ctde.tasks.language_modeling
    rows, tokens = (
        ctde.data.as_sequence(digits, "rows"),
        np.random.default_rng(0).integers(0, 32, (1024, 16)),
    )
    text = ctde.data.from_arrays(tokens, np.roll(tokens, -1, axis=1), tokens[:64], tokens[:64])
    build, data, batch_size, options = {
        "mlp": (lambda: ctde.models.mlp([64, 32, 10]), digits, 256, {}),
        "cnn": (lambda: ctde.models.cnn((8, 8), 10), digits, 64, {"dispatch": 2}),
        "resnet": (lambda: ctde.models.resnet((8, 8), 10), digits, 64, {"dispatch": 2}),
        "lstm": (lambda: ctde.models.rnn_classifier(8, 10, 16), rows, 64, {}),
        "gru": (lambda: ctde.models.rnn_classifier(8, 10, 16, cell="gru"), rows, 64, {}),
        "transformer": (
            lambda: ctde.models.transformer(32, 16, width=32),
            text,
            64,
            {"dispatch": 2, "task": task},
        ),
    }[name]
    return time_training(build(), data, MOST_DEVICES, batch_size, **options)


def peak_memory() -> int:
    """Returns the most bytes that this process has had in memory so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def free_memory() -> float:
    """Returns how many bytes programs may still take, infinity where the system does not say it."""
    file = Path("/proc/meminfo")
    lines = file.read_text().splitlines() if file.exists() else []
    return next(
        (int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")),
        float("inf"),
    )


def will_fit(point: Row) -> bool:
    """Returns whether a point leaves a tenth of the free memory: pictures are there twice, beside 0.5 GB."""
    return 0.5e9 + 2 * 28 * 28 * point.get("examples", 0) < 0.9 * free_memory()


def rows_of(log: Log, axis: str) -> list[Row]:
    """Returns the points of an axis that have come to an end, from the smallest to the largest."""
    return sorted(
        (row for row in log.find(axis=axis) if "failed" not in row),
        key=lambda row: row.get(axis, 0),
    )


def device_bytes(row: Row) -> float:
    return row["arguments"] + row["results"] + row["between"]


HEADER = (
    *(
        "axis",
        "point",
        "parameters",
        "device memory, MB",
        "of it between, MB",
        "process, MB",
        "compiling, s",
    ),
    "step, ms",
)


def cells(row: Row) -> list[str]:
    values = [
        value
        for key, value in row.items()
        if key in ("parameters", "devices", "examples", "strategy", "model")
    ]
    point = ", ".join(f"{value:,}" if isinstance(value, int) else value for value in values)
    if "failed" in row:
        return [row["axis"], point, row["failed"], *[""] * 5]
    low, middle, high = (value * 1e3 for value in row["step_seconds"])
    return [
        row["axis"],
        point,
        f"{row['params']:,}",
        f"{device_bytes(row) / 1e6:,.1f}" if "between" in row else "-",
        f"{row['between'] / 1e6:,.1f}" if "between" in row else "-",
        f"{row['process'] / 1e6:,.0f}",
        f"{row['compile_seconds']:.1f}",
        f"{middle:.3f} ({low:.3f}-{high:.3f})",
    ]


def growth(log: Log) -> str:
    """Describes what 64 devices need in comparison with one, each."""
    text = ""
    for name in AGREEMENTS:
        rows = {row["devices"]: row for row in rows_of(log, "devices") if row["strategy"] == name}
        if 1 in rows and MOST_DEVICES in rows:
            ratio = device_bytes(rows[MOST_DEVICES]) / device_bytes(rows[1])
            text += (
                f"{name}: {ratio:.3f} times the memory of one device on each of {MOST_DEVICES}. "
            )
    return text


def draw(log: Log) -> None:
    """Draws memory above time, over each of the three sizes that is measured."""
    sizes = [axis for axis in ("parameters", "devices", "examples") if rows_of(log, axis)]
    if not sizes:
        return
    shape = {
        "figsize": (1 + 4 * len(sizes), 7),
        "layout": "constrained",
        "sharex": "col",
        "squeeze": False,
    }
    figure, panels = pyplot.subplots(2, len(sizes), **shape)
    for axis, (memory, times) in zip(sizes, panels.T, strict=True):
        rows = rows_of(log, axis)
        for i, name in enumerate(AGREEMENTS if axis == "devices" else [None]):
            own = [row for row in rows if row.get("strategy") == name]
            x = [row[axis] for row in own]
            memory.plot(
                x,
                [device_bytes(row) / 1e6 for row in own],
                f"C{i}o-",
                label=f"{name or ''} each device".strip(),
            )
            memory.plot(
                x,
                [row["process"] / 1e6 for row in own],
                f"C{i}s--",
                label=f"{name or ''} process".strip(),
            )
            low, middle, high = (
                np.array([row["step_seconds"] for row in own]).reshape(-1, 3).T * 1e3
            )
            times.errorbar(
                x, middle, [middle - low, high - middle], color=f"C{i}", marker="o", label=name
            )
        memory.set(xscale="log", yscale="log", title=f"over {axis}")
        times.set(xscale="log", yscale="log", xlabel=axis)
        if axis == "examples":  # which time hardly knows of
            times.set(yscale="linear", ylim=(0, None))
        if axis == "devices":
            times.set_xticks(DEVICES, [str(devices) for devices in DEVICES])
            times.minorticks_off()
            times.legend(fontsize=8)
        memory.legend(fontsize=8)
        for panel in (memory, times):
            panel.grid(alpha=0.3)
    panels[0, 0].set_ylabel("memory, MB")
    panels[1, 0].set_ylabel("a step, ms")
    figure.savefig(log.file.with_suffix(".png"), dpi=120)


def main(
    axis: tuple[AxisName, ...] = get_args(AxisName),
    largest: float = 1e8,
    limit: float = 600,
    report: bool = False,
    results: Path = RESULTS,
) -> None:
    """Measures what is missing.

    Args:
        axis: What grows.
        largest: The largest point of an axis that is measured.
        limit: Seconds for one point.
        report: Only show what has been measured.
        results: Folder for scale.jsonl, .md and .png.
    """
    log = Log(results / "scale.jsonl")
    if not report:
        wanted = [point for name in axis for point in AXES[name] if point.get(name, 0) <= largest]
        measure(log, __file__, wanted, limit, will_fit)
    lines = [cells(row) for name in AXES for row in log.find(axis=name)]
    table = Table("Cost as the work grows", HEADER, lines)
    publish(results / "scale.md", [table], f"{growth(log)}{machine()}.")
    draw(log)


if __name__ == "__main__":
    command_line(main, measure_point)
