"""Throughput on an accelerator, which share of its arithmetic that is, and device time to an accuracy.

    python benchmarks/accelerator.py --data-dir FOLDER/mnist

Needs what this package needs to train, and takes PyTorch as a rival where it is installed. On a CPU it runs in a small
form that shows that everything works, and whose figures mean little.

While `fit` waits in `describe`, PyTorch's contestants take their turns: eager, and where there is CUDA also compiled
and as one CUDA graph a step. All have the examples on the device as they are stored, a new order in every epoch, and
Adam at 0.001; the time of a turn ends when the device is done. FLOPs are counted in the program of a loss and its
gradient, as it is before XLA optimizes it, and held against a large product of matrices of the same precision, measured
in the same run.
"""

import argparse
import json
import math
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # both frameworks share the device's memory
sys.path.insert(0, str(Path(__file__).parents[1]))  # the package that this script comes with

import jax
import numpy as np
import optax
from contestants import torch_network
from jax import lax
from jax import numpy as jnp
from rich.console import Console
from rich.table import Table

import ctde_jax as ctde
from ctde_jax.models import Model, in_bfloat16, with_raw_inputs

LEARNING_RATE = 0.001
RESULTS = Path(__file__).parent / "results"
OURS = "this trainer"
HAS_TORCH = find_spec("torch") is not None

Row = dict[str, Any]
console = Console(width=160, highlight=False)


class Precision(NamedTuple):
    """What products of matrices are computed in."""

    matmul: str
    """As JAX calls it."""

    bfloat16: bool = False
    """Whether activations are in bfloat16 too."""


PRECISIONS = {
    "f32": Precision("highest"),
    "tf32": Precision("tensorfloat32"),
    "bf16": Precision("default", bfloat16=True),
}


class Work(NamedTuple):
    """What is trained, by both frameworks."""

    name: str
    model: Model
    data: ctde.data.Dataset
    task: ctde.Task
    batch_size: int
    build_torch: Callable[[], Any]


class Scale(NamedTuple):
    """How large everything is."""

    product: int
    widths: tuple[int, ...]
    mlp_batch: int
    cnn_batch: int
    window: int
    width: int
    blocks: int
    transformer_batch: int
    steps: int
    """Of a turn."""


ACCELERATOR = Scale(8192, (784, 2048, 2048, 10), 4096, 2048, 256, 768, 6, 64, steps=50)
CPU = Scale(1024, (784, 128, 10), 512, 32, 32, 64, 2, 16, steps=40)
VOCABULARY = 256


def perceptron_work(scale: Scale) -> Work:
    def build_torch() -> Any:
        from torch import nn

        layers = [[nn.Linear(before, after), nn.ReLU()] for before, after in pairwise(scale.widths)]
        return nn.Sequential(nn.Flatten(), *[layer for pair in layers for layer in pair][:-1])

    name = "-".join(map(str, scale.widths))
    data = random_pictures(16 * scale.mlp_batch)
    model = ctde.models.mlp(scale.widths, "relu")
    return Work(f"mlp {name}", model, data, ctde.tasks.classification, scale.mlp_batch, build_torch)


def convolutional_work(scale: Scale) -> Work:
    data, model = random_pictures(16 * scale.cnn_batch), ctde.models.cnn((28, 28), 10)
    return Work("cnn", model, data, ctde.tasks.classification, scale.cnn_batch, lambda: torch_network("cnn"))


def transformer_work(scale: Scale) -> Work:
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, (16 * scale.transformer_batch, scale.window + 1))
    held_out = tokens[:8]
    data = ctde.data.from_arrays(tokens[:, :-1], tokens[:, 1:], held_out[:, :-1], held_out[:, 1:])
    heads = max(1, scale.width // 64)
    size = {"length": scale.window, "width": scale.width, "blocks": scale.blocks, "heads": heads}
    return Work(
        f"transformer {scale.blocks} x {scale.width}, window {scale.window}",
        ctde.models.transformer(VOCABULARY, **size),
        data,
        ctde.tasks.language_modeling,
        scale.transformer_batch,
        lambda: torch_transformer(**size),
    )


def random_pictures(examples: int) -> ctde.data.Dataset:
    """Makes noise in the form of MNIST."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (examples, 28, 28), dtype=np.uint8)
    labels = rng.integers(0, 10, examples)
    return ctde.data.from_arrays(pixels, labels, pixels[:8], labels[:8], classes=tuple("0123456789"))


def torch_transformer(length: int, width: int, blocks: int, heads: int) -> Any:
    """Builds the network of `ctde.models.transformer` in PyTorch."""
    import torch
    from torch import nn
    from torch.nn import functional

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
            self.incoming = nn.Linear(width, 3 * width, bias=False)
            self.mix = nn.Linear(width, width, bias=False)
            self.perceptron = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Linear(4 * width, width))

        def forward(self, x):
            parts = self.incoming(self.norms[0](x)).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
            seen = functional.scaled_dot_product_attention(*parts, is_causal=True)
            x = x + self.mix(seen.transpose(1, 2).flatten(2))
            return x + self.perceptron(self.norms[1](x))

    class Transformer(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens, self.places = nn.Embedding(VOCABULARY, width), nn.Embedding(length, width)
            self.blocks = nn.Sequential(*(Block() for _ in range(blocks)))
            self.out = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, VOCABULARY, bias=False))

        def forward(self, tokens):
            places = self.places(torch.arange(tokens.shape[1], device=tokens.device))
            return self.out(self.blocks(self.tokens(tokens) + places))

    return Transformer()


class TorchTraining:
    """PyTorch's side of a comparison: so many steps, and how long they took."""

    def __init__(self, work: Work, precision: Precision, how: str):
        import torch

        self._torch, self._precision, self._work = torch, precision, work
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._set_precision()
        torch.manual_seed(0)
        self._network = work.build_torch().to(self._device)
        self._model = torch.compile(self._network, dynamic=False) if how == "compiled" else self._network
        graph = how == "CUDA graph"
        self._optimizer = torch.optim.Adam(self._network.parameters(), LEARNING_RATE, fused=True, capturable=graph)
        self._inputs = torch.tensor(work.data.train.inputs).to(self._device)
        self._labels = torch.tensor(work.data.train.labels).long().to(self._device)
        self._batches: Iterator[Any] = iter(())
        self._take_step = self._captured() if graph else self._step

    def turn(self, steps: int) -> float:
        """Takes so many steps, and returns the seconds until the device is done."""
        self._set_precision()
        begin = time.perf_counter()
        for _ in range(steps):
            self._take_step(self._next_batch())
        self._wait()
        return time.perf_counter() - begin

    def accuracy(self, split: ctde.data.Split) -> float:
        """Returns the share of pictures that is labeled right."""
        torch = self._torch
        with torch.inference_mode():
            parts = torch.tensor(split.inputs).to(self._device).split(1000)
            labels = torch.cat([self._network(part.float() / 255).argmax(-1) for part in parts]).cpu().numpy()
        return float((labels == split.labels).mean())

    def _step(self, indices: Any) -> None:
        inputs, labels = self._inputs[indices], self._labels[indices]
        inputs = inputs.float() / 255 if inputs.dtype == self._torch.uint8 else inputs
        self._optimizer.zero_grad(set_to_none=True)
        with self._torch.autocast(self._device, self._torch.bfloat16, enabled=self._precision.bfloat16):
            logits = self._model(inputs).flatten(0, -2)
        self._torch.nn.functional.cross_entropy(logits.float(), labels.flatten()).backward()
        self._optimizer.step()

    def _captured(self) -> Callable[[Any], None]:
        torch = self._torch
        indices = torch.zeros(self._work.batch_size, dtype=torch.long, device=self._device)
        beside = torch.cuda.Stream()
        beside.wait_stream(torch.cuda.current_stream())
        before = {name: value.clone() for name, value in self._network.state_dict().items()}
        with torch.cuda.stream(beside):
            for _ in range(3):
                self._step(indices)
        torch.cuda.current_stream().wait_stream(beside)
        graph = torch.cuda.CUDAGraph()
        self._optimizer.zero_grad(set_to_none=True)
        with torch.cuda.graph(graph):
            self._step(indices)
        self._network.load_state_dict(before)  # as if these steps had not been taken
        for state in self._optimizer.state.values():
            for value in state.values():
                value.zero_()

        def replay(batch: Any) -> None:
            indices.copy_(batch)
            graph.replay()

        return replay

    def _next_batch(self) -> Any:
        batch = next(self._batches, None)
        if batch is None:
            order = self._torch.randperm(len(self._inputs), device=self._device)
            self._batches = iter(order.split(self._work.batch_size))
            batch = next(self._batches)
        return batch

    def _set_precision(self) -> None:
        fast = self._precision.matmul == "tensorfloat32"
        self._torch.set_float32_matmul_precision("high" if fast else "highest")
        self._torch.backends.cudnn.allow_tf32 = fast

    def _wait(self) -> None:
        if self._device == "cuda":
            self._torch.cuda.synchronize()


def rivals(work: Work, precision: Precision) -> tuple[dict[str, TorchTraining], dict[str, str]]:
    """Returns PyTorch's contestants, warmed up, and what kept others from being there."""
    present, absent = {}, {}
    if not HAS_TORCH:
        return {}, {"PyTorch": "is not installed"}
    import torch

    if jax.default_backend() != "cpu" and not torch.cuda.is_available():
        return {}, {"PyTorch": "sees no accelerator"}
    for how in ("eager", "compiled", "CUDA graph") if torch.cuda.is_available() else ("eager",):
        try:
            training = TorchTraining(work, precision, how)
            training.turn(3)
            present[f"PyTorch {how}"] = training
        except Exception as error:  # whatever a rival stumbles over is reported instead of its figures
            absent[f"PyTorch {how}"] = f"failed: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
    return present, absent


def measure_peak(size: int, precision: Precision) -> float:
    """Returns the FLOP/s of ten large products of matrices one after the other, the best of five times."""
    dtype = jnp.bfloat16 if precision.bfloat16 else jnp.float32
    matrix = jax.random.normal(jax.random.key(0), (size, size), dtype) / jnp.asarray(math.sqrt(size), dtype)

    @jax.jit
    def products(x: jax.Array, matrix: jax.Array) -> jax.Array:
        return lax.fori_loop(0, 10, lambda _, x: x @ matrix, x)

    with jax.default_matmul_precision(precision.matmul):
        products(matrix, matrix).block_until_ready()
        seconds = []
        for _ in range(5):
            begin = time.perf_counter()
            products(matrix, matrix).block_until_ready()
            seconds.append(time.perf_counter() - begin)
    return 10 * 2 * size**3 / min(seconds)


def count_flops(work: Work) -> float:
    """Returns the FLOPs of the loss and its gradient on a batch."""
    model = with_raw_inputs(work.model, work.data.shift, work.data.scale)
    inputs, labels = (array[: work.batch_size] for array in work.data.train)
    params, state = jax.eval_shape(model.init, jax.eval_shape(jax.random.key, 0), inputs)

    def loss(params: ctde.replica.PyTree) -> jax.Array:
        return work.task.loss(model.apply(params, state, inputs, None)[0], labels).mean()

    return jax.jit(jax.value_and_grad(loss)).lower(params).cost_analysis()["flops"]


def train(work: Work, precision: Precision, devices: Sequence[jax.Device], **options: Any) -> ctde.Trained:
    """Trains with this package on one device."""
    model = in_bfloat16(work.model) if precision.bfloat16 else work.model
    optimizer = optax.adam(LEARNING_RATE)
    with jax.default_matmul_precision(precision.matmul):
        return ctde.fit(
            model,
            work.data,
            optimizer,
            task=work.task,
            batch_size=work.batch_size,
            devices=devices,
            show=False,
            **options,
        )


def compare(work: Work, name: str, peak: float, steps: int, turns: int, devices: Sequence[jax.Device]) -> list[Row]:
    """Lets all take turns of so many steps each; the first turn is not counted."""
    present, absent = rivals(work, PRECISIONS[name])
    seconds: dict[str, list[float]] = {OURS: []} | {rival: [] for rival in present}

    def others(*center: ctde.replica.PyTree) -> str:
        for rival, training in present.items():
            seconds[rival].append(training.turn(steps))
        return ""

    total = steps * (turns + 1)
    trained = train(work, PRECISIONS[name], devices, steps=total, eval_every=steps, log_every=steps, describe=others)
    seconds[OURS] = [row["examples"] / row["examples_per_second"] for row in trained.history if row["split"] == "train"]
    flops, alike = count_flops(work), {"network": work.name, "precision": name, "batch_size": work.batch_size}
    rows: list[Row] = [{**alike, "contestant": rival, "absent": reason} for rival, reason in absent.items()]
    for contestant, taken in seconds.items():
        speed = steps * work.batch_size / np.array(taken[1:])
        share = np.median(speed) / work.batch_size * flops / peak
        ratio = np.array(taken[1:]) / np.array(seconds[OURS][1:])
        measured = {"examples_per_second": quartiles(speed), "share_of_peak": float(share), "times": quartiles(ratio)}
        rows.append({**alike, "contestant": contestant, **measured})
    return rows


def race(work: Work, target: float, most_epochs: int, seed: int, devices: Sequence[jax.Device]) -> list[Row]:
    """Trains until a test after an epoch gives the target, and takes the time of the training alone."""
    alike = {"network": work.name, "target": target, "seed": seed}
    history = train(work, PRECISIONS["tf32"], devices, epochs=most_epochs, seed=seed).history
    seconds, found = 0.0, None
    for row in history:
        if row["split"] == "train":
            seconds += row["examples"] / row["examples_per_second"]
        elif row["accuracy"] >= target:
            found = {"seconds": seconds, "epochs": row["epoch"]}
            break
    rows = [{**alike, "contestant": OURS, **(found or {"absent": f"not in {most_epochs} epochs"})}]

    present, absent = rivals(work, PRECISIONS["tf32"])
    rows += [{**alike, "contestant": rival, "absent": reason} for rival, reason in absent.items()]
    steps = len(work.data.train.inputs) // work.batch_size
    for rival in present:
        training, seconds = present[rival], 0.0
        for epoch in range(1, most_epochs + 1):
            seconds += training.turn(steps)
            if training.accuracy(work.data.test) >= target:
                rows.append({**alike, "contestant": rival, "seconds": seconds, "epochs": epoch})
                break
        else:
            rows.append({**alike, "contestant": rival, "absent": f"not in {most_epochs} epochs"})
    return rows


def quartiles(values: np.ndarray) -> list[float]:
    return [float(value) for value in np.percentile(values, [25, 50, 75])]


def throughput_table(rows: Sequence[Row], peaks: dict[str, float]) -> Table:
    said = ", ".join(f"{name} {peak / 1e12:,.3g}" for name, peak in peaks.items())
    table = Table(title=f"Throughput; TFLOP/s of a large product: {said}")
    for column in ("network", "batch", "precision", "contestant"):
        table.add_column(column)
    for column in ("examples/s, median and quartiles", "of that product's FLOP/s", "time, times this trainer's"):
        table.add_column(column, justify="right")
    for row in rows:
        cells = [row["network"], str(row["batch_size"]), row["precision"], row["contestant"]]
        if "absent" in row:
            table.add_row(*cells, row["absent"], "-", "-")
            continue
        low, middle, high = row["examples_per_second"]
        first, ratio, last = row["times"]
        speed = f"{middle:,.0f} ({low:,.0f}-{high:,.0f})"
        table.add_row(*cells, speed, f"{row['share_of_peak']:.1%}", f"{ratio:.2f} ({first:.2f}-{last:.2f})")
    return table


def race_table(rows: Sequence[Row]) -> Table:
    table = Table(title="Training to a test accuracy on MNIST, without start, compilation and evaluation")
    for column in ("network", "target", "contestant", "seed"):
        table.add_column(column)
    for column in ("seconds", "epochs"):
        table.add_column(column, justify="right")
    for row in rows:
        cells = [row["network"], f"{row['target']:.0%}", row["contestant"], str(row["seed"])]
        reached = (f"{row['seconds']:.2f}", f"{row['epochs']:g}") if "seconds" in row else (row["absent"], "-")
        table.add_row(*cells, *reached)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, help="folder of MNIST's files, for the time to an accuracy")
    parser.add_argument("--turns", type=int, default=10, help="turns of each contestant")
    parser.add_argument("--seeds", type=int, default=3, help="trainings to an accuracy, on an accelerator")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for accelerator-DEVICE.json and .md")
    chosen = parser.parse_args()

    devices = ctde.devices.start(1)
    on_cpu = devices[0].platform == "cpu"
    scale, kind = (CPU if on_cpu else ACCELERATOR), devices[0].device_kind
    packages = [name for name in ("jax", "flax", "optax", "torch") if find_spec(name)]
    says = ", ".join([kind, f"Python {platform.python_version()}", *(f"{name} {version(name)}" for name in packages)])
    console.print(says)
    if on_cpu:
        console.print("There is no accelerator here: this is the small form, and the figures of GPUs are open.")

    precisions = {name: one for name, one in PRECISIONS.items() if not (on_cpu and name == "tf32")}
    peaks = {name: measure_peak(scale.product, one) for name, one in precisions.items()}
    found: dict[str, Any] = {"device": says, "peaks": peaks, "throughput": [], "to_accuracy": []}
    file = chosen.results / f"accelerator-{kind.lower().replace(' ', '-')}.json"

    def save() -> None:
        chosen.results.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(found, indent=2) + "\n")
        tables = [throughput_table(found["throughput"], peaks), race_table(found["to_accuracy"])]
        text = "\n\n".join(as_markdown(table) for table in tables if table.row_count)
        file.with_suffix(".md").write_text(f"{text}\n\n{says}\n")

    for build in (perceptron_work, convolutional_work, transformer_work):
        work = build(scale)
        for name in precisions:
            console.print(f"measuring {work.name}, {name}")
            found["throughput"] += compare(work, name, peaks[name], scale.steps, chosen.turns, devices)
            save()
    console.print(throughput_table(found["throughput"], peaks))

    if chosen.data_dir is None:
        console.print("The time to an accuracy is left out: it needs --data-dir with MNIST's files.")
        return
    data, classify = ctde.data.mnist(chosen.data_dir), ctde.tasks.classification
    widths = (784, 512, 10)
    mlp = perceptron_work(scale._replace(widths=widths))
    races = [(mlp._replace(data=data, batch_size=120), 0.98, 15)]
    if on_cpu:
        console.print("The CNN's time to 99 % is left out on a CPU.")
    else:
        build_torch = convolutional_work(scale).build_torch
        cnn = Work("cnn", ctde.models.cnn((28, 28), 10), data, classify, 120, build_torch)
        races.append((cnn, 0.99, 10))
    for work, target, epochs in races:
        for seed in range(1 if on_cpu else chosen.seeds):
            console.print(f"training {work.name} to {target:.0%}, seed {seed}")
            found["to_accuracy"] += race(work, target, epochs, seed, devices)
            save()
    console.print(race_table(found["to_accuracy"]))


def as_markdown(table: Table) -> str:
    """Writes a table with its title as Markdown."""
    columns = [[str(column.header), *map(str, column.cells)] for column in table.columns]
    header, *rows = [f"| {' | '.join(row)} |" for row in zip(*columns, strict=True)]
    return "\n".join([f"{table.title}\n", header, "|---" * len(columns) + "|", *rows])


if __name__ == "__main__":
    main()
