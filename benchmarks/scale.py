"""Measures memory and time of training as parameters, devices and examples grow.

    python benchmarks/scale.py                    # six minutes; resumes if interrupted
    python benchmarks/scale.py --axis devices     # or parameters, examples, strategies, models
    python benchmarks/scale.py --report           # tables and figures of earlier measurements

Every point is a run of `fit` in a separate process, on random data.

- parameters: the MLP 784-w-w-10, one device, batch 64.
- devices: the MLP 784-128-10, global batch 512, on 1 to 64 fake devices that share the cores of
  this machine; synchronous, and DiLoCo every 16 steps in 4 bits with error feedback.
- examples: 28 x 28 bytes each, one device, batch 512. A point is skipped if it would not fit into
  free memory.
- strategies, models: each preset and each network for a few steps on 64 fake devices, as a test
  that it runs.

*Device memory* is what the compiled program needs on each device, according to XLA: arguments
(state, training examples, batches), results that do not reuse the memory of arguments, and
temporary buffers. *Process* is the peak of resident memory; all fake devices are in one process, so
it includes the copy of every device and the data set.
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

# The strategies that are compared over devices.
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
    # The rounds of qsr are those of local-sgd.
    "strategies": [{"axis": "strategies", "strategy": name} for name in PRESETS if name != "qsr"],
    "models": [{"axis": "models", "model": name} for name in NETWORKS],
}


def pictures(examples: int) -> ctde.data.Dataset:
    """Draws random images in the shape of MNIST, with 512 test examples."""
    rng = np.random.default_rng(0)
    inputs = rng.integers(0, 256, (examples, 28, 28), dtype=np.uint8)
    labels = (np.arange(examples) % 10).astype(np.int32)
    return ctde.data.from_arrays(inputs, labels, inputs[:512], labels[:512])


def perceptron(parameters: int) -> ctde.models.Model:
    """Builds the MLP 784-w-w-10 with about `parameters` parameters."""
    # Solve w^2 + (784 + 10 + 2) w + 10 = parameters for w.
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
    """Trains for five dispatches of `dispatch` steps; returns time per step, and memory in bytes.

    The first dispatch is not counted.
    """
    # The memory that the process has before training: JAX and the data set.
    around = ctde.devices.start(devices)
    before = peak_memory()
    steps = 5 * dispatch

    # One row in the log for each dispatch, and a single evaluation at the end.
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

    # Quartiles over the dispatches after the first.
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
    """Compiles rounds as `fit` does, without data, and returns the memory per device in bytes."""
    around = ctde.devices.start(devices)
    batches = deal(data.train, devices, batch_size, seed=0)
    model = ctde.models.with_raw_inputs(model, data.shift, data.scale)
    task = ctde.tasks.classification
    program = compile_rounds(
        model, data, task, optax.adam(1e-4), strategy, Resident(batches), around
    )
    needs = program.memory_analysis()
    # Donated arguments alias results, which take no memory in addition.
    return {
        "arguments": needs.argument_size_in_bytes,
        "results": needs.output_size_in_bytes - needs.alias_size_in_bytes,
        "between": needs.temp_size_in_bytes,
    }


def measure_point(point: Row) -> Row:
    """Measures a training, and except for strategies and models the memory that XLA reports."""
    # XLA comes last, because its compilation would add to the peak memory of the process.
    options = {}
    strategy = ctde.Strategy()
    match point["axis"]:
        case "parameters":
            parts = (perceptron(point["parameters"]), pictures(10_000), 1, 64)
            # Fewer steps for large models, whose steps take long.
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
    """Trains a small network of this name on MOST_DEVICES devices."""
    # The data: images, their rows as sequences, and random tokens.
    digits = ctde.data.digits()
    task = ctde.tasks.language_modeling
    rows = ctde.data.as_sequence(digits, "rows")
    tokens = np.random.default_rng(0).integers(0, 32, (1024, 16))
    text = ctde.data.from_arrays(tokens, np.roll(tokens, -1, axis=1), tokens[:64], tokens[:64])

    # The slow networks take fewer steps in a dispatch.
    build, data, batch_size, options = {
        "mlp": (lambda: ctde.models.mlp([64, 32, 10]), digits, 256, {}),
        "cnn": (lambda: ctde.models.cnn((8, 8), 10), digits, 64, {"dispatch": 2}),
        "resnet": (lambda: ctde.models.resnet((8, 8), 10), digits, 64, {"dispatch": 2}),
        "lstm": (lambda: ctde.models.rnn_classifier(8, 10, 16), rows, 64, {}),
        "gru": (lambda: ctde.models.rnn_classifier(8, 10, 16, cell="gru"), rows, 64, {}),
        "transformer": (
            lambda: ctde.models.transformer(32, 16, hidden_size=32),
            text,
            64,
            {"dispatch": 2, "task": task},
        ),
    }[name]
    return time_training(build(), data, MOST_DEVICES, batch_size, **options)


def peak_memory() -> int:
    """Returns the peak of the resident memory of this process in bytes."""
    # macOS counts in bytes, and Linux in KiB.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def free_memory() -> float:
    """Returns the available memory in bytes, or infinity if the system does not report it."""
    # Only Linux has this file. MemAvailable includes caches that the kernel can drop.
    file = Path("/proc/meminfo")
    lines = file.read_text().splitlines() if file.exists() else []
    return next(
        (int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")),
        float("inf"),
    )


def will_fit(point: Row) -> bool:
    """Returns whether 0.5 GB and two copies of the images fit into 90 % of the free memory."""
    return 0.5e9 + 2 * 28 * 28 * point.get("examples", 0) < 0.9 * free_memory()


def rows_of(log: Log, axis: str) -> list[Row]:
    """Returns the successful points of an axis, from the smallest to the largest."""
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
    """Describes the memory per device on 64 devices, relative to one device."""
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
    """Draws memory above time, over each of the three sizes that has been measured."""
    sizes = [axis for axis in ("parameters", "devices", "examples") if rows_of(log, axis)]
    if not sizes:
        return
    # A column for each axis: memory in the first row, time in the second.
    shape = {
        "figsize": (1 + 4 * len(sizes), 7),
        "layout": "constrained",
        "sharex": "col",
        "squeeze": False,
    }
    figure, panels = pyplot.subplots(2, len(sizes), **shape)
    for axis, (memory, times) in zip(sizes, panels.T, strict=True):
        rows = rows_of(log, axis)
        # Over devices there is one line for each strategy, elsewhere a single line.
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

        # Both axes are logarithmic, except the time over examples, which is nearly constant.
        memory.set(xscale="log", yscale="log", title=f"over {axis}")
        times.set(xscale="log", yscale="log", xlabel=axis)
        if axis == "examples":
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
        axis: Axes to measure.
        largest: Largest value of an axis to measure.
        limit: Time limit of a point in seconds.
        report: Show earlier results without measuring.
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
