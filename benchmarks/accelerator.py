"""Throughput on an accelerator, which share of its arithmetic that is, and device time to an accuracy.

    python benchmarks/accelerator.py --data-dir FOLDER/mnist

Needs what this package needs to train, and takes PyTorch as a rival where it is installed. On a CPU it runs in a small
form that shows that everything works, and whose figures mean little.

While `fit` waits in `describe`, its rivals take their turns: a loop by hand in JAX, one dispatch a turn, of the same
network; and PyTorch, eager, and where there is CUDA also compiled and as one CUDA graph a step. All have the examples
on the device as they are stored, a new order in every epoch, and Adam at 0.001; the time of a turn ends when the device
is done. The operations that `bounds.py` counts are held against a large product of matrices of the same precision,
measured in the same run. What the file of results has already is not measured again.
"""

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, Protocol

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # both frameworks share the device's memory
sys.path.insert(0, str(Path(__file__).parents[1]))  # the package that this script comes with

import jax
import numpy as np
import optax
from bounds import Layer, cnn_layers, mlp_layers, operations, transformer_layers
from contestants import torch_network
from jax import lax
from jax import numpy as jnp
from points import as_markdown, machine
from rich.console import Console
from rich.table import Table

import ctde_jax as ctde
from ctde_jax.models import Model, in_bfloat16, with_raw_inputs

LEARNING_RATE = 0.001
RESULTS = Path(__file__).parent / "results"
OURS, BY_HAND = "this trainer", "JAX, by hand"
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
    steps: int
    """Of a turn."""

    layers: list[Layer]
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
    mlp_steps: int
    cnn_steps: int
    transformer_steps: int


ACCELERATOR = Scale(8192, (784, 2048, 2048, 10), 4096, 2048, 256, 768, 6, 64, 200, 100, 10)
CPU = Scale(1024, (784, 128, 10), 512, 32, 32, 64, 2, 16, 40, 40, 40)
VOCABULARY = 256


def perceptron_work(scale: Scale) -> Work:
    def build_torch() -> Any:
        from torch import nn

        layers = [[nn.Linear(before, after), nn.ReLU()] for before, after in pairwise(scale.widths)]
        return nn.Sequential(nn.Flatten(), *[layer for pair in layers for layer in pair][:-1])

    name = "-".join(map(str, scale.widths))
    data = random_pictures(16 * scale.mlp_batch)
    model, layers = ctde.models.mlp(scale.widths, "relu"), mlp_layers(scale.widths)
    batch_size, steps = scale.mlp_batch, scale.mlp_steps
    return Work(f"mlp {name}", model, data, ctde.tasks.classification, batch_size, steps, layers, build_torch)


def convolutional_work(scale: Scale) -> Work:
    data, model = random_pictures(16 * scale.cnn_batch), ctde.models.cnn((28, 28), 10)
    batch_size, steps, layers = scale.cnn_batch, scale.cnn_steps, cnn_layers()
    return Work("cnn", model, data, ctde.tasks.classification, batch_size, steps, layers, lambda: torch_network("cnn"))


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
        scale.transformer_steps,
        transformer_layers(VOCABULARY, scale.window, scale.width, scale.blocks),
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


class Rival(Protocol):
    """Who is compared with this trainer."""

    def turn(self) -> float:
        """Takes the steps of a turn, and returns the seconds until the device is done."""
        ...

    def accuracy(self, split: ctde.data.Split) -> float:
        """Returns the share of pictures that is labeled right."""
        ...


class PlainJax:
    """A loop written by hand: a turn is one scan, the data stay on the device, the carry is donated."""

    def __init__(self, work: Work, precision: Precision, seed: int, device: jax.Device):
        model, task, optimizer = network(work, precision), work.task, optax.adam(LEARNING_RATE)
        self._work, self._rng, self._order = work, np.random.default_rng(seed), np.zeros(0, np.int32)
        self._data = jax.device_put(tuple(work.data.train), device)
        params, self._state = jax.jit(model.init)(jax.random.key(seed), self._data[0][:1])
        self._carry = jax.device_put((params, optimizer.init(params)), device)
        self._predict = jax.jit(lambda params, inputs: model.apply(params, self._state, inputs, None)[0].argmax(-1))

        def step(carry, batch, inputs, labels):
            params, state = carry

            def loss(params):
                outputs = model.apply(params, self._state, inputs[batch], None)[0]
                return task.loss(outputs, labels[batch]).mean()

            value, grads = jax.value_and_grad(loss)(params)
            updates, state = optimizer.update(grads, state)
            return (optax.apply_updates(params, updates), state), value

        def steps(carry, batches, inputs, labels):
            return lax.scan(lambda carry, batch: step(carry, batch, inputs, labels), carry, batches)

        batches = jax.ShapeDtypeStruct((work.steps, work.batch_size), np.int32)
        with jax.default_matmul_precision(precision.matmul):
            self._steps = jax.jit(steps, donate_argnums=0).lower(self._carry, batches, *self._data).compile()

    def turn(self) -> float:
        begin = time.perf_counter()
        places = self._work.steps * self._work.batch_size
        while len(self._order) < places:
            self._order = np.append(self._order, self._rng.permutation(len(self._data[0])).astype(np.int32))
        batches, self._order = np.split(self._order, [places])
        self._carry, losses = self._steps(self._carry, batches.reshape(self._work.steps, -1), *self._data)
        jax.device_get(losses)
        return time.perf_counter() - begin

    def accuracy(self, split: ctde.data.Split) -> float:
        parts = np.split(split.inputs, range(1000, len(split.inputs), 1000))
        labels = np.concatenate([self._predict(self._carry[0], part) for part in parts])
        return float((labels == split.labels).mean())


class TorchTraining:
    """PyTorch."""

    def __init__(self, work: Work, precision: Precision, seed: int, how: str):
        import torch

        self._torch, self._precision, self._work = torch, precision, work
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._set_precision()
        torch.manual_seed(seed)
        torch._dynamo.reset()  # else what it compiles anew for another precision soon counts as too often
        self._network = work.build_torch().to(self._device)
        self._model = torch.compile(self._network, dynamic=False) if how == "compiled" else self._network
        graph = how == "CUDA graph"
        self._optimizer = torch.optim.Adam(self._network.parameters(), LEARNING_RATE, fused=True, capturable=graph)
        self._inputs = torch.tensor(work.data.train.inputs).to(self._device)
        self._labels = torch.tensor(work.data.train.labels).long().to(self._device)
        self._batches: Iterator[Any] = iter(())
        self._take_step = self._captured() if graph else self._step

    def turn(self) -> float:
        self._set_precision()
        begin = time.perf_counter()
        for _ in range(self._work.steps):
            self._take_step(self._next_batch())
        self._wait()
        return time.perf_counter() - begin

    def accuracy(self, split: ctde.data.Split) -> float:
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


def rivals(
    work: Work, precision: Precision, seed: int, devices: Sequence[jax.Device]
) -> tuple[dict[str, Rival], dict[str, str]]:
    """Returns who is compared, ready to begin, and what kept others from being there."""
    ways: dict[str, Callable[[], Rival]] = {BY_HAND: partial(PlainJax, work, precision, seed, devices[0])}
    absent = {}
    if not HAS_TORCH:
        absent["PyTorch"] = "is not installed"
    elif devices[0].platform != "cpu" and not sees_cuda():
        absent["PyTorch"] = "sees no accelerator"
    else:
        hows = ("eager", "compiled", "CUDA graph") if sees_cuda() else ("eager",)
        ways |= {f"PyTorch {how}": partial(TorchTraining, work, precision, seed, how) for how in hows}
    present = {}
    for name, make in ways.items():
        try:
            present[name] = make()
        except Exception as error:  # whatever a rival stumbles over is reported instead of its figures
            absent[name] = f"failed: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
    return present, absent


def sees_cuda() -> bool:
    """Says whether PyTorch has a GPU to compute on."""
    import torch

    return torch.cuda.is_available()


def network(work: Work, precision: Precision) -> Model:
    """Returns the model as it is trained: of the data as they are stored."""
    model = in_bfloat16(work.model) if precision.bfloat16 else work.model
    return with_raw_inputs(model, work.data.shift, work.data.scale)


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


def compare(work: Work, name: str, peak: float, turns: int, devices: Sequence[jax.Device]) -> list[Row]:
    """Lets all take turns; the first turn is not counted."""
    present, absent = rivals(work, PRECISIONS[name], 0, devices)
    seconds: dict[str, list[float]] = {OURS: []} | {rival: [] for rival in present}

    def others(*center: ctde.devices.PyTree) -> str:
        for rival, training in present.items():
            seconds[rival].append(training.turn())
        return ""

    every = {"eval_every": work.steps, "log_every": work.steps}
    trained = train(work, PRECISIONS[name], devices, steps=work.steps * (turns + 1), describe=others, **every)
    seconds[OURS] = [row["examples"] / row["examples_per_second"] for row in trained.history if row["split"] == "train"]
    alike = {"network": work.name, "precision": name, "batch_size": work.batch_size}
    rows: list[Row] = [{**alike, "contestant": rival, "absent": reason} for rival, reason in absent.items()]
    for contestant, taken in seconds.items():
        speed = work.steps * work.batch_size / np.array(taken[1:])
        share = np.median(speed) * operations(work.layers) / peak
        ratio = np.array(taken[1:]) / np.array(seconds[OURS][1:])
        measured = {"examples_per_second": quartiles(speed), "share_of_peak": float(share), "times": quartiles(ratio)}
        rows.append({**alike, "contestant": contestant, **measured})
    return rows


def race(work: Work, target: float, most_epochs: int, seed: int, devices: Sequence[jax.Device]) -> list[Row]:
    """Trains until a test after an epoch, which is a turn, gives the target; takes the time of training alone."""
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

    present, absent = rivals(work, PRECISIONS["tf32"], seed, devices)
    rows += [{**alike, "contestant": rival, "absent": reason} for rival, reason in absent.items()]
    for rival, training in present.items():
        seconds = 0.0
        for epoch in range(1, most_epochs + 1):
            seconds += training.turn()
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
    says = f"{kind}, {machine('torch')}"
    console.print(says)
    if on_cpu:
        console.print("There is no accelerator here: this is the small form, and the figures of GPUs are open.")

    precisions = {name: one for name, one in PRECISIONS.items() if not (on_cpu and name == "tf32")}
    file = chosen.results / f"accelerator-{kind.lower().replace(' ', '-')}.json"
    found: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    if found.get("device") != says:
        peaks = {name: measure_peak(scale.product, one) for name, one in precisions.items()}
        found = {"device": says, "peaks": peaks, "throughput": [], "to_accuracy": []}

    def add(part: str, what: str, row_has: Row, measure: Callable[[], list[Row]]) -> None:
        if any(row_has.items() <= row.items() for row in found[part]):
            return
        begin = time.perf_counter()
        found[part] += measure()
        console.print(f"{what}: {time.perf_counter() - begin:.0f} s")
        chosen.results.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(found, indent=2) + "\n")
        tables = [throughput_table(found["throughput"], found["peaks"]), race_table(found["to_accuracy"])]
        text = "\n\n".join(as_markdown(table) for table in tables if table.row_count)
        file.with_suffix(".md").write_text(f"{text}\n\n{says}\n")

    works = [perceptron_work(scale), convolutional_work(scale), transformer_work(scale)]
    if not on_cpu:  # and one so small that a step is little but launches
        works.insert(0, perceptron_work(CPU._replace(mlp_steps=1000)))
    for work in works:
        for name in precisions:
            row_has = {"network": work.name, "precision": name}
            measure = partial(compare, work, name, found["peaks"][name], chosen.turns, devices)
            add("throughput", f"throughput of {work.name}, {name}", row_has, measure)
    console.print(throughput_table(found["throughput"], found["peaks"]))

    if chosen.data_dir is None:
        console.print("The time to an accuracy is left out: it needs --data-dir with MNIST's files.")
        return
    epoch = {"data": ctde.data.mnist(chosen.data_dir), "batch_size": 120, "steps": 500}
    races = [(perceptron_work(scale._replace(widths=(784, 512, 10)))._replace(**epoch), 0.98, 15)]
    if on_cpu:
        console.print("The CNN's time to 99 % is left out on a CPU.")
    else:
        races.append((convolutional_work(scale)._replace(**epoch), 0.99, 10))
    for work, target, epochs in races:
        for seed in range(1 if on_cpu else chosen.seeds):
            measure = partial(race, work, target, epochs, seed, devices)
            row_has = {"network": work.name, "target": target, "seed": seed}
            add("to_accuracy", f"{work.name} to {target:.0%}, seed {seed}", row_has, measure)
    console.print(race_table(found["to_accuracy"]))


if __name__ == "__main__":
    main()
