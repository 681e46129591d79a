"""Compares the step time of `fit` with the arithmetic and memory bounds of the machine (roofline).

    python benchmarks/limit.py                   # seven turns, half an hour; resumes if interrupted
    python benchmarks/limit.py --turns 2 --only mlp-512
    python benchmarks/limit.py --report          # table and figure of earlier measurements

**Operations.** A layer with m multiply-adds per example takes 2 m floating-point operations
forward, 2 m for the gradient of its weights, and 2 m for the gradient of its inputs if earlier
layers have parameters. An epoch of 60,000 examples through 784-128-10 therefore takes
60,000 x 2 x (2 x 784 x 128 + 3 x 128 x 10) = 24.5 GFLOP. Activations, losses and the optimizer are
not counted, nor are products with padding or, in causal attention, with later positions.

**Bytes.** Every parameter is moved ten times per step (read forward and backward; its gradient
written and read; parameter and both moments of Adam read and written), every output of a layer four
times (it and its gradient written and read), and the inputs are read as they are stored.

The arithmetic bound is the fastest product of square float32 matrices, by numpy or by JAX, on all
cores. The memory bound is the faster of numpy's copy and JAX's triad: in the last-level cache if
the working set of a step fits into it, otherwise in main memory. The columns "by XLA" compare both
counts with those of XLA for a compiled step: operations of the gradient alone, including
activations, and bytes that instructions read and write, in any memory. XLA counts the body of a
loop once, so the LSTM's operations are compared for a sequence of length 1, and its bytes are not
compared.

Bounds and contestants take turns, each in a separate process; a ratio uses measurements of the same
turn. The data are random, in the shape of MNIST and of windows of text, because values do not
affect the speed.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from math import ceil, prod
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import jax
import numpy as np
import optax
from harness import RESULTS, Log, Row, Table, command_line, cores, machine, measure, publish, spread
from jax import numpy as jnp
from matplotlib import pyplot

import ctde_jax as ctde

LIMIT = 600  # seconds for one process
WINDOW = 64
VOCABULARY = 65
# The LSTM reads an image of 28 x 28 as 28 rows of 28 pixels.
PLACES = 28
FEATURES = 28
LSTM_WIDTH = 128

CaseName = Literal["mlp-64", "mlp-512", "cnn", "lstm", "transformer"]


class Layer(NamedTuple):
    """Cost of one layer for one example in the forward pass."""

    multiply_adds: int
    outputs: int
    to_inputs: float = 1.0  # fraction of the inputs that need a gradient


def mlp_layers(widths: Sequence[int]) -> list[Layer]:
    # No gradient of the inputs of the first layer is needed.
    first, *others = [Layer(before * after, after) for before, after in pairwise(widths)]
    return [first._replace(to_inputs=0), *others]


def cnn_layers() -> list[Layer]:
    """Two 5 x 5 convolutions with 32 and 64 channels, each with pooling, then 512 and 10 units."""
    # Along each axis, the outputs at either border have one and two taps fewer: 6 fewer in all.
    return [
        Layer((5 * 28 - 6) ** 2 * 32, 28 * 28 * 32, to_inputs=0),
        Layer((5 * 14 - 6) ** 2 * 32 * 64, 14 * 14 * 64),
        *(Layer(7 * 7 * 64 * 512, 512), Layer(512 * 10, 10)),
    ]


def lstm_layers(places: int = PLACES) -> list[Layer]:
    """Four gates at every position, from the input and from the state, and the output layer.

    The initial state is zero, so the first position needs no gradient of it.
    """
    gates = 4 * LSTM_WIDTH
    return [
        Layer(places * FEATURES * gates, places * gates, to_inputs=0),
        Layer(
            places * LSTM_WIDTH * gates, places * 2 * LSTM_WIDTH, to_inputs=(places - 1) / places
        ),
        Layer(LSTM_WIDTH * 10, 10),
    ]


def transformer_layers(vocabulary: int, window: int, hidden_size: int, blocks: int) -> list[Layer]:
    """Blocks of projections, attention and perceptron at every position, and the output layer."""
    # Causal attention multiplies window (window + 1) / 2 pairs of positions, twice.
    block = [
        Layer(window * 4 * hidden_size**2, window * 5 * hidden_size),
        Layer(round(2 * window * (window + 1) / 2 * hidden_size), window * hidden_size),
        Layer(window * 8 * hidden_size**2, window * 6 * hidden_size),
    ]
    return [*blocks * block, Layer(window * hidden_size * vocabulary, window * vocabulary)]


def operations(layers: Sequence[Layer]) -> float:
    """Counts the floating-point operations of one example, forward and backward."""
    return sum(2 * layer.multiply_adds * (2 + layer.to_inputs) for layer in layers)


class Case(NamedTuple):
    """A training to measure."""

    build: Callable[[], ctde.models.Model]
    layers: list[Layer]
    input_shape: tuple[int, ...]
    batch_size: int
    examples: int  # per epoch; fewer if an example takes long
    epochs: int  # counted epochs, after the first one, which warms up
    task: ctde.Task = ctde.tasks.classification

    @property
    def step_examples(self) -> float:
        """Mean number of examples per step; the last batch of an epoch may be padded."""
        return self.examples / ceil(self.examples / self.batch_size)

    def draw(self, examples: int) -> tuple[np.ndarray, np.ndarray]:
        """Draws random images (uint8) and labels, or tokens and the next tokens (int32)."""
        rng = np.random.default_rng(0)
        shape = (examples, *self.input_shape)
        if self.task is ctde.tasks.language_modeling:
            tokens = rng.integers(0, VOCABULARY, shape, dtype=np.int32)
            return tokens, np.roll(tokens, -1, axis=1)
        return rng.integers(0, 256, shape, dtype=np.uint8), (np.arange(examples) % 10).astype(
            np.int32
        )


WIDTHS = (784, 128, 10)
TRANSFORMER = {"vocabulary": VOCABULARY, "hidden_size": 128, "blocks": 4}
mlp = partial(Case, partial(ctde.models.mlp, WIDTHS), mlp_layers(WIDTHS), (28, 28))
cnn = partial(ctde.models.cnn, (28, 28), 10)
lstm = partial(ctde.models.rnn_classifier, FEATURES, 10, LSTM_WIDTH)
transformer = partial(ctde.models.transformer, length=WINDOW, **TRANSFORMER)
windows = (WINDOW,)
CASES: dict[str, Case] = {
    "mlp-64": mlp(batch_size=64, examples=60_000, epochs=5),
    "mlp-512": mlp(batch_size=512, examples=60_000, epochs=10),
    "cnn": Case(cnn, cnn_layers(), (28, 28), batch_size=64, examples=3_840, epochs=2),
    "lstm": Case(lstm, lstm_layers(), (PLACES, FEATURES), batch_size=64, examples=7_680, epochs=2),
    "transformer": Case(
        *(transformer, transformer_layers(window=WINDOW, **TRANSFORMER), windows),
        **{"batch_size": 12, "examples": 480, "epochs": 2, "task": ctde.tasks.language_modeling},
    ),
}


def count(name: str) -> Row:
    """Counts operations and bytes by formula, and divides the counts of XLA by them."""
    # Shapes alone determine the counts, so that the model is not initialized.
    case = CASES[name]
    inputs, labels = case.draw(case.batch_size)
    model = case.build()
    optimizer = optax.adam(1e-3)
    is_loop = name == "lstm"
    seen = (inputs / 255).astype(np.float32) if inputs.dtype == np.uint8 else inputs
    params, model_state = jax.eval_shape(model.init, jax.random.key(0), seen)

    # XLA counts the gradient for the operations, and the whole step for the bytes.
    def gradient(params, inputs):
        return jax.grad(
            lambda params: case.task.loss(
                model.apply(params, model_state, inputs, None)[0], labels
            ).mean()
        )(params)

    def step(params, opt_state, inputs):
        updates, opt_state = optimizer.update(gradient(params, inputs), opt_state)
        return optax.apply_updates(params, updates), opt_state

    def by_xla(function, *arguments):
        return jax.jit(function).lower(params, *arguments).compile().cost_analysis()

    whole = by_xla(step, jax.eval_shape(optimizer.init, params), seen)
    # XLA counts the body of a loop once, so the LSTM is compared for one position.
    counted = operations(lstm_layers(places=1) if is_loop else case.layers)

    # The counts by formula; see the docstring of the module.
    numbers = ctde.models.count_params(params)
    outputs = sum(layer.outputs for layer in case.layers)
    moved = 10 * 4 * numbers + case.batch_size * (
        prod(case.input_shape) * inputs.itemsize + 4 * 4 * outputs
    )
    return {
        "params": numbers,
        "operations": operations(case.layers),
        "operations_by_xla": by_xla(gradient, seen[:, :1] if is_loop else seen)["flops"]
        / case.batch_size
        / counted,
        "bytes": moved,
        "bytes_by_xla": None if is_loop else whole["bytes accessed"] / moved,
        "working_set": 4 * 4 * numbers + case.batch_size * 4 * outputs,
    }


def time_fit(name: str, devices: int) -> Row:
    """Trains; returns the seconds per step of each epoch after the first, without evaluation."""
    case = CASES[name]
    inputs, labels = case.draw(case.examples)
    # A small test split keeps the evaluations short.
    few = slice(8 * case.batch_size)
    trained = ctde.fit(
        case.build(),
        ctde.data.from_arrays(inputs, labels, inputs[few], labels[few]),
        optax.adam(1e-3),
        task=case.task,
        devices=ctde.devices.start(devices),
        batch_size=case.batch_size,
        epochs=1 + case.epochs,
        show=False,
    )

    # Rows report throughput since the previous row; sum their seconds for each epoch.
    seconds = np.zeros(1 + case.epochs)
    for row in trained.history:
        if row["split"] == "train":
            seconds[ceil(row["epoch"]) - 1] += row["examples"] / row["examples_per_second"]
    return {
        "step_seconds": [
            round(value, 7) for value in seconds[1:] * case.step_examples / case.examples
        ]
    }


def fastest(function: Callable[[], object], seconds: float = 0.15) -> float:
    """Calls a function for `seconds`, at least twice; returns the seconds of the fastest call."""
    # The first call compiles, and is not counted.
    function()
    times = []
    end = time.perf_counter() + seconds
    while len(times) < 2 or time.perf_counter() < end:
        before = time.perf_counter()
        function()
        times.append(time.perf_counter() - before)
    return min(times)


def time_ceilings() -> Row:
    """Measures products of matrices in FLOP/s, and copies in bytes per second."""
    # Square float32 products of several sizes.
    ctde.devices.start(1)
    products = {}
    multiply = jax.jit(jnp.matmul)
    for size in (512, 1024, 2048, 3072):
        a, b, c = (np.random.default_rng(i).random((size, size), np.float32) for i in range(3))
        on_device = jnp.asarray(a), jnp.asarray(b)
        by_numpy = fastest(partial(np.matmul, a, b, out=c))
        by_jax = fastest(lambda on_device=on_device: multiply(*on_device).block_until_ready())
        products |= {f"numpy {size}": 2 * size**3 / by_numpy, f"jax {size}": 2 * size**3 / by_jax}

    # The size of the last-level cache, or 8 MiB if the system does not report it.
    sizes = [
        file.read_text().strip()
        for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    ]
    cache = max(
        [int(size[:-1]) * {"K": 2**10, "M": 2**20}[size[-1]] for size in sizes], default=2**23
    )
    return {
        "products": products,
        "memory": time_copies(8 * cache),
        "cached": time_copies(cache // 4),
        "cache_bytes": cache,
    }


def time_copies(size: int) -> dict[str, float]:
    """Measures bytes per second when `size` bytes are read and written, with all cores."""
    # numpy: a copy of an array of float32 in each thread.
    threads = cores()
    pairs = [
        tuple(np.ones(size // 2 // threads // 4, np.float32) for _ in range(2))
        for _ in range(threads)
    ]
    again = max(1, 2**26 // size)  # repetitions, so that starting the threads takes little time

    def copy(pair: tuple[np.ndarray, ...]) -> None:
        for _ in range(again):
            np.copyto(*pair)

    with ThreadPoolExecutor(threads) as pool:
        by_numpy = fastest(lambda: list(pool.map(copy, pairs))) / again

    # JAX: two float32 arrays are read, and one is written in place of the second.
    a = jnp.ones(size // 12, jnp.float32)
    b = jnp.ones(size // 12, jnp.float32)
    triad = jax.jit(lambda a, b: a + 0.5 * b, donate_argnums=1)

    def move() -> None:
        nonlocal b
        b = triad(a, b).block_until_ready()

    return {"copy": size / by_numpy, "triad": size / fastest(move)}


def measure_point(point: Row) -> Row:
    if point["what"] == "ceilings":
        return time_ceilings()
    return (
        count(point["case"])
        if point["what"] == "count"
        else time_fit(point["case"], point["devices"])
    )


class Measured(NamedTuple):
    """Measurements of a case in all turns; arrays are float64[turns]."""

    name: str
    devices: int
    counted: Row
    seconds: np.ndarray  # per step
    arithmetic: np.ndarray  # arithmetic bound in seconds per step
    moving: np.ndarray  # memory bound in seconds per step

    @property
    def flop(self) -> float:
        """Floating-point operations per step."""
        return self.counted["operations"] * CASES[self.name].step_examples


def everything(log: Log, ceilings: dict[int, Row]) -> list[Measured]:
    """Pairs each measurement of a case with the bounds of the same turn."""
    counts = {row["case"]: row for row in log.find(what="count") if "failed" not in row}
    measured = []
    for name, devices in {(row["case"], row["devices"]): None for row in log.find(what="fit")}:
        rows = log.find(what="fit", case=name, devices=devices)
        turns = [row for row in rows if "failed" not in row and row["turn"] in ceilings]
        if not turns or name not in counts:
            continue
        # Memory is that of the last-level cache if the working set fits into it.
        fits = counts[name]["working_set"] <= ceilings[turns[0]["turn"]]["cache_bytes"]
        seconds = np.array([np.median(row["step_seconds"]) for row in turns])
        peak = np.array([max(ceilings[row["turn"]]["products"].values()) for row in turns])
        speed = np.array(
            [max(ceilings[row["turn"]]["cached" if fits else "memory"].values()) for row in turns]
        )
        arithmetic = counts[name]["operations"] * CASES[name].step_examples / peak
        measured.append(
            Measured(
                name, devices, counts[name], seconds, arithmetic, counts[name]["bytes"] / speed
            )
        )
    return measured


HEADER = (
    *("case", "devices", "GFLOP a step", "by XLA", "MB a step", "by XLA"),
    *("arithmetic, ms", "memory, ms", "measured, ms", "arithmetic / measured", "larger / measured"),
)


def cells(one: Measured) -> list[str]:
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
        spread(one.seconds * 1e3, ".3f"),
        spread(one.arithmetic / one.seconds),
        spread(np.maximum(one.arithmetic, one.moving) / one.seconds),
    ]


def ceilings_text(ceilings: Sequence[Row]) -> str:
    """Describes the bounds, and which program reached each of them."""
    lines = []
    for what, unit in (
        ("products", "GFLOP/s"),
        ("cached", "GB/s in cache"),
        ("memory", "GB/s in memory"),
    ):
        medians = {
            name: float(np.median([row[what][name] for row in ceilings]))
            for name in ceilings[0][what]
        }
        # The text names the program with the highest median.
        highest = [max(row[what].values()) / 1e9 for row in ceilings]
        lines.append(
            f"{spread(highest, '.1f')} {unit} (mostly {max(medians, key=medians.__getitem__)})"
        )
    return f"{', '.join(lines)}; {len(ceilings)} turns. {machine()}."


def draw(measured: list[Measured], ceilings: Sequence[Row], file: Path) -> None:
    """Draws the roofline and the cases below it."""
    # The roofs: the smaller of the arithmetic bound, and memory times operations per byte.
    highest = {
        what: np.median([max(row[what].values()) for row in ceilings])
        for what in ("products", "memory", "cached")
    }
    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    intensity = np.geomspace(0.5, 100, 200)
    for what, label, style in (
        ("cached", "last-level cache", "-"),
        ("memory", "main memory", "--"),
    ):
        roof = np.minimum(highest["products"], intensity * highest[what]) / 1e9
        axes.loglog(intensity, roof, style, color="tab:gray", label=label)

    # The cases: a color for each, and open squares for several devices.
    names = list(dict.fromkeys(one.name for one in measured))
    for one in measured:
        color = f"C{names.index(one.name)}"
        low, middle, high = np.percentile(one.flop / one.seconds / 1e9, [25, 50, 75])
        axes.errorbar(
            one.flop / one.counted["bytes"],
            middle,
            yerr=[[middle - low], [high - middle]],
            color=color,
            marker="o" if one.devices == 1 else "s",
            markerfacecolor=color if one.devices == 1 else "white",
            linestyle="",
            label=f"{one.name}, {one.devices} device{'s' * (one.devices > 1)}",
        )
    axes.set(
        xlabel="operations for each byte moved, by formula",
        ylabel="GFLOP/s",
        title="Training below its ceilings",
    )
    axes.grid(alpha=0.3, which="both")
    figure.legend(fontsize=8, loc="outside right upper")
    figure.savefig(file, dpi=120)


def main(
    turns: int = 7,
    only: tuple[CaseName, ...] = get_args(CaseName),
    devices: tuple[int, ...] = (1, 4),
    report: bool = False,
    results: Path = RESULTS,
) -> None:
    """Measures what is missing.

    Args:
        turns: Number of turns of each contestant, including those of earlier runs.
        only: Cases to measure.
        devices: Numbers of fake devices, measured one after another.
        report: Show earlier results without measuring.
        results: Folder for limit.jsonl, .md and .png.
    """
    log = Log(results / "limit.jsonl")
    wanted: list[Row] = [{"what": "count", "case": name} for name in only]
    # Every turn measures the bounds, and then all cases.
    for turn in range(turns):
        fits = [
            {"what": "fit", "case": name, "devices": count} for name in only for count in devices
        ]
        wanted += [{"what": "ceilings", "turn": turn}, *({**fit, "turn": turn} for fit in fits)]
    if not report:
        measure(log, __file__, wanted, LIMIT)
    ceilings = {row["turn"]: row for row in log.find(what="ceilings") if "failed" not in row}
    if measured := everything(log, ceilings):
        table = Table(
            "Bounds and measured time of a step", HEADER, [cells(one) for one in measured]
        )
        publish(results / "limit.md", [table], ceilings_text([*ceilings.values()]))
        draw(measured, [*ceilings.values()], results / "limit.png")


if __name__ == "__main__":
    command_line(main, measure_point)
