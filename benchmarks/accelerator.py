"""Measures throughput on an accelerator, its fraction of peak, and device time to an accuracy.

    python benchmarks/accelerator.py --data-dir FOLDER/mnist

Requires the package (`pip install .`), and compares with PyTorch if it is installed. On a CPU, a
small version runs, which shows that everything works but whose numbers are not meaningful.

While `fit` waits in `describe`, its rivals take their turns: a loop by hand in JAX of the same
network, with one dispatch per turn; and PyTorch, eager and, with CUDA, also compiled and as one
CUDA graph per step. All keep the examples on the device in their stored dtype, use a new order in
every epoch and Adam at 0.001; a turn ends when the device has finished. Peak is the rate of a large
matrix product of the same precision in the same run, and `limit.py` counts the operations.
Measurements that are in the file of results are not repeated.
"""

import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

# JAX must not preallocate memory, because PyTorch uses the same device. Set before JAX is imported.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import numpy as np
import optax
from contestants import torch_network
from harness import RESULTS, Log, Row, Table, command_line, console, machine, publish
from jax import lax
from jax import numpy as jnp
from limit import Layer, cnn_layers, mlp_layers, operations, transformer_layers

import ctde_jax as ctde
from ctde_jax.models import Model, in_bfloat16, with_raw_inputs

LEARNING_RATE = 0.001
VOCABULARY = 256
OURS = "this trainer"
BY_HAND = "JAX, by hand"
# Precisions of matrix products in JAX; in bf16, activations are bfloat16, too.
PRECISIONS = {"f32": "highest", "tf32": "tensorfloat32", "bf16": "default"}


class Work(NamedTuple):
    """A training that both frameworks run."""

    name: str
    model: Model
    data: ctde.data.Dataset
    task: ctde.Task
    batch_size: int
    steps: int  # per turn
    layers: list[Layer]
    build_torch: Callable[[], Any]


def perceptron_work(widths: tuple[int, ...], batch_size: int, steps: int) -> Work:
    def build_torch() -> Any:
        from torch import nn

        layers = [[nn.Linear(before, after), nn.ReLU()] for before, after in pairwise(widths)]
        return nn.Sequential(nn.Flatten(), *[layer for pair in layers for layer in pair][:-1])

    model = ctde.models.mlp(widths, "relu")
    name = f"mlp {'-'.join(map(str, widths))}"
    data = random_pictures(16 * batch_size)
    task = ctde.tasks.classification
    return Work(name, model, data, task, batch_size, steps, mlp_layers(widths), build_torch)


def convolutional_work(batch_size: int, steps: int) -> Work:
    model = ctde.models.cnn((28, 28), 10)
    data = random_pictures(16 * batch_size)
    task = ctde.tasks.classification
    return Work(
        "cnn", model, data, task, batch_size, steps, cnn_layers(), lambda: torch_network("cnn")
    )


def transformer_work(window: int, width: int, blocks: int, batch_size: int, steps: int) -> Work:
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, (16 * batch_size, window + 1))
    data = ctde.data.from_arrays(tokens[:, :-1], tokens[:, 1:], tokens[:8, :-1], tokens[:8, 1:])
    size = {"length": window, "hidden_size": width, "blocks": blocks, "heads": max(1, width // 64)}
    model = ctde.models.transformer(VOCABULARY, **size)
    name = f"transformer {blocks} x {width}, window {window}"
    layers = transformer_layers(VOCABULARY, window, width, blocks)
    build_torch = partial(torch_transformer, **size)
    return Work(
        name, model, data, ctde.tasks.language_modeling, batch_size, steps, layers, build_torch
    )


def random_pictures(examples: int) -> ctde.data.Dataset:
    """Draws random images in the shape of MNIST, with 8 test examples."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (examples, 28, 28), dtype=np.uint8)
    labels = rng.integers(0, 10, examples)
    return ctde.data.from_arrays(
        pixels, labels, pixels[:8], labels[:8], classes=tuple("0123456789")
    )


def torch_transformer(length: int, hidden_size: int, blocks: int, heads: int) -> Any:
    """Builds the network of `ctde.models.transformer` in PyTorch."""
    import torch
    from torch import nn

    # Normalization comes before attention and perceptron; projections have no biases.
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norms = nn.ModuleList(nn.LayerNorm(hidden_size) for _ in range(2))
            self.incoming = nn.Linear(hidden_size, 3 * hidden_size, bias=False)
            self.mix = nn.Linear(hidden_size, hidden_size, bias=False)
            self.perceptron = nn.Sequential(
                nn.Linear(hidden_size, 4 * hidden_size),
                nn.GELU("tanh"),
                nn.Linear(4 * hidden_size, hidden_size),
            )

        def forward(self, x):
            # Query, key and value, each [examples, heads, length, hidden_size / heads].
            parts = (
                self.incoming(self.norms[0](x)).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
            )
            seen = nn.functional.scaled_dot_product_attention(*parts, is_causal=True)
            x = x + self.mix(seen.transpose(1, 2).flatten(2))
            return x + self.perceptron(self.norms[1](x))

    class Embedding(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens = nn.Embedding(VOCABULARY, hidden_size)
            self.places = nn.Embedding(length, hidden_size)

        def forward(self, tokens):
            return self.tokens(tokens) + self.places(
                torch.arange(tokens.shape[1], device=tokens.device)
            )

    out = nn.LayerNorm(hidden_size), nn.Linear(hidden_size, VOCABULARY, bias=False)
    return nn.Sequential(Embedding(), *(Block() for _ in range(blocks)), *out)


class Rival(NamedTuple):
    """A training that is compared with this trainer."""

    turn: Callable[[], object]  # takes the steps of a turn, and returns when the device is done
    predict: Callable[[np.ndarray], np.ndarray]  # uint8[n, 28, 28] to int[n]

    def accuracy(self, split: ctde.data.Split) -> float:
        # In parts of 1,000, to limit the memory of activations.
        parts = np.split(split.inputs, range(1000, len(split.inputs), 1000))
        return float(
            (np.concatenate([self.predict(part) for part in parts]) == split.labels).mean()
        )


def timed(act: Callable[[], object]) -> float:
    begin = time.perf_counter()
    act()
    return time.perf_counter() - begin


def by_hand(work: Work, precision: str, seed: int, device: jax.Device) -> Rival:
    """A JAX loop by hand: a turn is one scan, data stay on the device, the carry is donated."""
    # State and examples, on the device.
    model = network(work, precision)
    optimizer = optax.adam(LEARNING_RATE)
    rng = np.random.default_rng(seed)
    data = jax.device_put(tuple(work.data.train), device)
    order = np.zeros(0, np.int32)
    params, model_state = jax.jit(model.init)(jax.random.key(seed), data[0][:1])
    carry = jax.device_put((params, optimizer.init(params)), device)
    classify = jax.jit(
        lambda params, inputs: model.apply(params, model_state, inputs, None)[0].argmax(-1)
    )

    # A turn is a program that takes the indices of its batches.
    def step(inputs, labels, carry, batch):
        params, state = carry

        def loss(params):
            outputs = model.apply(params, model_state, inputs[batch], None)[0]
            return work.task.loss(outputs, labels[batch]).mean()

        value, grads = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(grads, state)
        return (optax.apply_updates(params, updates), state), value

    def scan(carry, batches, inputs, labels):
        return lax.scan(partial(step, inputs, labels), carry, batches)

    shape = jax.ShapeDtypeStruct((work.steps, work.batch_size), np.int32)
    with jax.default_matmul_precision(PRECISIONS[precision]):
        steps = jax.jit(scan, donate_argnums=0).lower(carry, shape, *data).compile()

    # Batches run on across epochs, so that every turn has full batches of one shape.
    def turn() -> None:
        nonlocal carry, order
        while len(order) < shape.size:
            order = np.append(order, rng.permutation(len(data[0])).astype(np.int32))
        batches, order = np.split(order, [shape.size])
        carry, losses = steps(carry, batches.reshape(shape.shape), *data)
        jax.device_get(losses)

    return Rival(turn, lambda inputs: classify(carry[0], inputs))


def in_torch(how: str, work: Work, precision: str, seed: int, beside: jax.Device) -> Rival:
    """A PyTorch loop: eager, compiled, or as a CUDA graph."""
    import torch

    device = "cpu" if beside.platform == "cpu" else "cuda"
    fast = precision == "tf32"
    torch.manual_seed(seed)
    # Otherwise, compilations for other precisions count towards the recompilation limit.
    torch._dynamo.reset()

    # The network, and the examples in their stored dtype.
    network = work.build_torch().to(device)
    model = torch.compile(network, dynamic=False) if how == "compiled" else network
    optimizer = torch.optim.Adam(
        network.parameters(), LEARNING_RATE, fused=True, capturable=how == "CUDA graph"
    )
    inputs, labels = (torch.tensor(array).to(device) for array in work.data.train)
    labels = labels.long()
    graph_batch = torch.zeros(work.batch_size, dtype=torch.long, device=device)

    def set_precision() -> None:
        torch.set_float32_matmul_precision("high" if fast else "highest")
        torch.backends.cudnn.allow_tf32 = fast

    def epochs() -> Iterator[Any]:
        while True:
            yield from torch.randperm(len(inputs), device=device).split(work.batch_size)

    def step(batch: Any) -> None:
        x = inputs[batch].float() / 255 if inputs.dtype == torch.uint8 else inputs[batch]
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
            logits = model(x).flatten(0, -2)
        torch.nn.functional.cross_entropy(logits.float(), labels[batch].flatten()).backward()
        optimizer.step()

    # Warm up on a side stream, as the documentation of CUDA graphs requires, and record one step.
    def capture() -> Callable[[Any], None]:
        side = torch.cuda.Stream()
        graph = torch.cuda.CUDAGraph()
        side.wait_stream(torch.cuda.current_stream())
        before = {name: value.clone() for name, value in network.state_dict().items()}
        with torch.cuda.stream(side):
            for _ in range(3):
                step(graph_batch)
        torch.cuda.current_stream().wait_stream(side)
        optimizer.zero_grad(set_to_none=True)
        with torch.cuda.graph(graph):
            step(graph_batch)
        # Undo the warmup steps: parameters and the state of the optimizer.
        network.load_state_dict(before)
        for value in (value for state in optimizer.state.values() for value in state.values()):
            value.zero_()

        def replay(batch: Any) -> None:
            graph_batch.copy_(batch)
            graph.replay()

        return replay

    def turn() -> None:
        set_precision()
        for _ in range(work.steps):
            take_step(next(batches))
        if device == "cuda":
            torch.cuda.synchronize()

    def predict(pictures: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return network(torch.tensor(pictures).to(device).float() / 255).argmax(-1).cpu().numpy()

    set_precision()
    batches = epochs()
    take_step = capture() if how == "CUDA graph" else step
    return Rival(turn, predict)


def make_rivals(
    work: Work, precision: str, seed: int, device: jax.Device
) -> tuple[dict[str, Rival], dict[str, Row]]:
    """Returns the rivals that are ready to start, and rows with the reasons of failures."""
    hows = ("eager",) if device.platform == "cpu" else ("eager", "compiled", "CUDA graph")
    ways: dict[str, Callable[[], Rival]] = {
        BY_HAND: partial(by_hand, work, precision, seed, device)
    }
    ways |= {
        f"PyTorch {how}": partial(in_torch, how, work, precision, seed, device) for how in hows
    }
    present = {}
    absent = {}
    for name, make in ways.items():
        # A rival may fail in any way; the reason takes the place of its numbers.
        try:
            present[name] = make()
        except Exception as error:
            absent[name] = {
                "absent": "failed: "
                f"{str(error).splitlines()[0] if str(error) else type(error).__name__}"
            }
    return present, absent


def network(work: Work, precision: str) -> Model:
    """Returns the model with the precision's dtype, for inputs as they are stored."""
    model = in_bfloat16(work.model) if precision == "bf16" else work.model
    return with_raw_inputs(model, work.data.shift, work.data.scale)


def measure_peak(size: int, precision: str) -> float:
    """Returns the FLOP/s of ten matrix products in sequence, the best of five measurements."""
    # Scaled so that products of products keep their magnitude.
    dtype = jnp.bfloat16 if precision == "bf16" else jnp.float32
    matrix = jax.random.normal(jax.random.key(0), (size, size), dtype) / jnp.asarray(
        math.sqrt(size), dtype
    )
    # The first of six measurements compiles.
    products = jax.jit(lambda x, matrix: lax.fori_loop(0, 10, lambda _, x: x @ matrix, x))
    with jax.default_matmul_precision(PRECISIONS[precision]):
        seconds = [timed(lambda: products(matrix, matrix).block_until_ready()) for _ in range(6)]
    return 10 * 2 * size**3 / min(seconds[1:])


def train(work: Work, precision: str, device: jax.Device, **options: Any) -> ctde.Trained:
    """Trains with this package on one device."""
    model = in_bfloat16(work.model) if precision == "bf16" else work.model
    around = {"task": work.task, "batch_size": work.batch_size, "devices": [device], "show": False}
    with jax.default_matmul_precision(PRECISIONS[precision]):
        return ctde.fit(model, work.data, optax.adam(LEARNING_RATE), **around, **options)


def compare(
    work: Work, precision: str, peak: float, turns: int, device: jax.Device
) -> dict[str, Row]:
    """Compares the throughput of all contestants in turns; the first turn is not counted."""
    rivals, absent = make_rivals(work, precision, 0, device)
    seconds: dict[str, list[float]] = {name: [] for name in rivals}

    # `fit` calls this for every row; the turn of the others comes after its evaluation.
    def others(row: Row) -> None:
        if row["split"] == "test":
            for name, rival in rivals.items():
                seconds[name].append(timed(rival.turn))

    options = {"steps": work.steps * (turns + 1), "eval_every": work.steps, "log_every": work.steps}
    history = train(work, precision, device, callbacks=[others], **options).history
    ours = [
        row["examples"] / row["examples_per_second"] for row in history if row["split"] == "train"
    ]

    # Quartiles of throughput, and of the ratio to this trainer in the same turn.
    found = {}
    for name, taken in {OURS: ours, **seconds}.items():
        speed = work.steps * work.batch_size / np.array(taken[1:])
        found[name] = {
            "examples_per_second": list(np.percentile(speed, [25, 50, 75])),
            "share_of_peak": float(np.median(speed) * operations(work.layers) / peak),
            "times": list(np.percentile(np.array(taken[1:]) / ours[1:], [25, 50, 75])),
        }
    return absent | found


def race(
    work: Work, target: float, most_epochs: int, seed: int, device: jax.Device
) -> dict[str, Row]:
    """Trains until a test after an epoch gives the target; returns seconds of training alone.

    A turn of the rivals is an epoch.
    """

    # Training seconds and test accuracy of each epoch.
    def ours() -> Iterator[tuple[float, float]]:
        seconds = 0.0
        for row in train(work, "tf32", device, epochs=most_epochs, seed=seed).history:
            if row["split"] == "train":
                seconds += row["examples"] / row["examples_per_second"]
            else:
                yield seconds, row["accuracy"]
                seconds = 0.0

    def reached(epochs: Iterable[tuple[float, float]]) -> Row:
        total = 0.0
        for epoch, (seconds, accuracy) in enumerate(epochs, 1):
            total += seconds
            if accuracy >= target:
                return {"seconds": total, "epochs": epoch}
        return {"absent": f"not in {most_epochs} epochs"}

    def theirs(rival: Rival) -> Iterator[tuple[float, float]]:
        return ((timed(rival.turn), rival.accuracy(work.data.test)) for _ in range(most_epochs))

    found = {OURS: reached(ours())}
    rivals, absent = make_rivals(work, "tf32", seed, device)
    return found | absent | {name: reached(theirs(rival)) for name, rival in rivals.items()}


def throughput_table(rows: Sequence[Row], peaks: dict[str, float]) -> Table:
    def figures(row: Row) -> tuple[str, str, str]:
        if "absent" in row:
            return row["absent"], "-", "-"
        low, middle, high = row["examples_per_second"]
        first, ratio, last = row["times"]
        speed = f"{middle:,.0f} ({low:,.0f}-{high:,.0f})"
        return speed, f"{row['share_of_peak']:.1%}", f"{ratio:.2f} ({first:.2f}-{last:.2f})"

    lines = [
        [row["network"], str(row["batch_size"]), row["precision"], row["contestant"], *figures(row)]
        for row in rows
    ]
    measured = (
        "examples/s, median and quartiles",
        "of that product's FLOP/s",
        "time, times this trainer's",
    )
    header = ("network", "batch", "precision", "contestant", *measured)
    text = ", ".join(f"{name} {peak / 1e12:,.3g}" for name, peak in peaks.items())
    return Table(f"Throughput; TFLOP/s of a large product: {text}", header, lines)


def race_table(rows: Sequence[Row]) -> Table:
    def reached(row: Row) -> tuple[str, str]:
        return (
            (f"{row['seconds']:.2f}", f"{row['epochs']:g}")
            if "seconds" in row
            else (row["absent"], "-")
        )

    lines = [
        [row["network"], f"{row['target']:.0%}", row["contestant"], str(row["seed"]), *reached(row)]
        for row in rows
    ]
    header = ("network", "target", "contestant", "seed", "seconds", "epochs")
    return Table(
        "Training to a test accuracy on MNIST, without start, compilation and evaluation",
        header,
        lines,
    )


def main(
    data_dir: Path | None = None, turns: int = 10, seeds: int = 3, results: Path = RESULTS
) -> None:
    """Measures what is missing.

    Args:
        data_dir: Folder of MNIST's files, for the time to an accuracy.
        turns: Number of turns of each contestant.
        seeds: Number of trainings to an accuracy on an accelerator; a CPU runs one.
        results: Folder for accelerator-DEVICE.jsonl and .md.
    """
    # The log belongs to a kind of device; rows also name the machine and the versions.
    (device,) = ctde.devices.start(1)
    on_cpu = device.platform == "cpu"
    kind = device.device_kind
    log = Log(results / f"accelerator-{kind.lower().replace(' ', '-')}.jsonl")
    here = {"device": f"{kind}, {machine('torch')}"}
    console.print(here["device"])
    if on_cpu:
        console.print(
            "There is no accelerator here: "
            "this is the small form, and the figures of GPUs are open."
        )

    def add(run: Callable[[], dict[str, Row]], **what: Any) -> None:
        if not log.find(**here, **what):
            begin = time.perf_counter()
            for contestant, row in run().items():
                log.put({**here, **what, "contestant": contestant}, **row)
            console.print(
                f"{', '.join(map(str, what.values()))}: {time.perf_counter() - begin:.0f} s"
            )

    # Peak FLOP/s of each precision.
    peaks = {}
    for name in [name for name in PRECISIONS if not (on_cpu and name == "tf32")]:
        size = 1024 if on_cpu else 8192
        add(
            lambda size=size, name=name: {"product": {"flops": measure_peak(size, name)}},
            part="peak",
            precision=name,
        )
        peaks[name] = log.find(**here, part="peak", precision=name)[0]["flops"]

    # Throughput. On a GPU, launches take most of the time of the small perceptron.
    small = perceptron_work((784, 128, 10), 512, steps=40 if on_cpu else 1000)
    if on_cpu:
        works = [small, convolutional_work(32, 40), transformer_work(32, 64, 2, 16, 40)]
    else:
        large = perceptron_work((784, 2048, 2048, 10), 4096, 200)
        works = [small, large, convolutional_work(2048, 100), transformer_work(256, 768, 6, 64, 10)]
    for work, name in [(work, name) for work in works for name in peaks]:
        run = partial(compare, work, name, peaks[name], turns, device)
        add(run, part="throughput", network=work.name, precision=name, batch_size=work.batch_size)

    # Time to an accuracy, if MNIST is there; the CNN takes too long on a CPU.
    epoch = {"data": ctde.data.mnist(data_dir), "batch_size": 120, "steps": 500} if data_dir else {}
    races = [
        (perceptron_work((784, 512, 10), 120, 500), 0.98, 15),
        (convolutional_work(120, 500), 0.99, 10),
    ]
    for work, target, epochs in races[: 1 if on_cpu else 2] if data_dir else ():
        for seed in range(1 if on_cpu else seeds):
            run = partial(race, work._replace(**epoch), target, epochs, seed, device)
            add(run, part="to_accuracy", network=work.name, target=target, seed=seed)
    if not data_dir:
        console.print(
            "The time to an accuracy is left out: it needs --data-dir with MNIST's files."
        )

    tables = [throughput_table(log.find(**here, part="throughput"), peaks)]
    if rows := log.find(**here, part="to_accuracy"):
        tables.append(race_table(rows))
    publish(log.file.with_suffix(".md"), tables, here["device"])


if __name__ == "__main__":
    command_line(main)
