"""The contestants of `peers.py`: the same training, as this package and as others do it.

Each runs in a process of its own, so that thread pools, XLA flags and devices are its own. What
is the same for all: MNIST divided by 255, the network, Adam at 0.001, the global batch, a new order in every epoch, and
the short last batch, which is trained on like the others. What each framework decides by default (how weights start,
threads) stays as it is, unless the contestant says otherwise.

Top-level imports are light: some of these processes are timed from their very start.
"""

import gzip
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np

LEARNING_RATE = 0.001
HIDDEN, CLASSES = 128, 10


@dataclass(frozen=True)
class Job:
    """What a contestant is to do."""

    contestant: str
    model: str
    batch_size: int
    devices: int
    epochs: int
    data_dir: str
    examples: int | None = None  # the first training pictures; None: all
    every_epoch: bool = False  # whether to evaluate after every epoch, or after the last one
    rank: int = 0  # of several processes of a contestant; the first one reports
    meeting: str = ""  # the file by which these processes find each other


class Referee:
    """Lets a contestant begin its epochs one by one, and takes the time of each, the same way for all.

    On the one side stands the command that compares: it writes a line to the standard input when the contestant may
    begin, and reads lines of JSON. On the other side the contestant calls `ready` once and `done` after every epoch.
    """

    def __init__(self, job: Job):
        self._job, self._epochs_left = job, job.epochs
        self._out = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(
            os.open(os.devnull, os.O_WRONLY), 1
        )  # progress and logging go on, and disturb nobody
        self._begin = 0.0

    def ready(self) -> None:
        """Waits until the next epoch may begin; in the first one whatever is compiled is compiled."""
        if self._job.rank == 0 and not sys.stdin.readline():
            sys.exit("the command that compares has ended")
        self._begin = time.perf_counter()

    def done(self, evaluate: Callable[[], float]) -> None:
        """Ends an epoch, whose results must be there, and waits for the next one."""
        self._say(seconds=time.perf_counter() - self._begin)
        self._epochs_left -= 1
        if self._job.every_epoch or not self._epochs_left:
            self._say(accuracy=evaluate())
        if self._epochs_left:
            self.ready()

    def _say(self, **what: Any) -> None:
        if self._job.rank == 0:
            print(json.dumps(what), file=self._out)


class Pictures(NamedTuple):
    """MNIST between 0 and 1."""

    x: np.ndarray  # float32[examples, 28, 28]
    y: np.ndarray  # int32[examples]
    x_test: np.ndarray
    y_test: np.ndarray


def read_mnist(job: Job) -> Pictures:
    """Reads the four files as anybody would."""

    def read(name: str, header: int) -> np.ndarray:
        path = Path(job.data_dir) / name
        content = (
            path.read_bytes()
            if path.exists()
            else gzip.decompress(path.with_name(f"{name}.gz").read_bytes())
        )
        return np.frombuffer(content, np.uint8, offset=header)

    def pictures(split: str, examples: int | None) -> tuple[np.ndarray, np.ndarray]:
        pixels = read(f"{split}-images-idx3-ubyte", 16).reshape(-1, 28, 28)[:examples]
        return pixels.astype(np.float32) / 255, read(f"{split}-labels-idx1-ubyte", 8)[
            :examples
        ].astype(np.int32)

    return Pictures(*pictures("train", job.examples), *pictures("t10k", None))


def accuracy(predict: Callable[[np.ndarray], Any], pictures: Pictures) -> float:
    """Averages over the test pictures, a thousand at a time."""
    parts = range(0, len(pictures.x_test), 1000)
    labels = [
        np.asarray(predict(pictures.x_test[start : start + 1000])).argmax(-1) for start in parts
    ]
    return float((np.concatenate(labels) == pictures.y_test).mean())


def this_trainer(job: Job, referee: Referee) -> None:
    """`ctde.fit` with its progress, its log and its files.

    It evaluates after every epoch, and then lets the referee know. So the test split that it is given is one picture a
    device: the time of an epoch is taken as for the others, and what is left of the evaluation counts against it.
    """
    import jax
    import optax

    import ctde_jax as ctde

    devices = ctde.devices.start(job.devices)
    data = ctde.data.mnist(job.data_dir)
    train = ctde.data.Split(*(array[: job.examples] for array in data.train))
    data = replace(
        data, train=train, test=ctde.data.Split(*(array[: job.devices] for array in data.test))
    )
    model = {
        "mlp": lambda: ctde.models.mlp([28 * 28, HIDDEN, CLASSES], "relu"),
        "cnn": lambda: ctde.models.cnn((28, 28), CLASSES),
        "lstm": lambda: ctde.models.rnn_classifier(28, CLASSES, HIDDEN),
    }[job.model]()
    apply = jax.jit(model.apply)

    def after_epoch(params: ctde.devices.PyTree, model_state: ctde.devices.PyTree) -> str:
        referee.done(
            lambda: accuracy(lambda x: apply(params, model_state, x, None)[0], read_mnist(job))
        )
        return ""

    referee.ready()
    with TemporaryDirectory() as folder:
        ctde.fit(
            model,
            data,
            optax.adam(LEARNING_RATE),
            batch_size=job.batch_size,
            epochs=job.epochs,
            devices=devices,
            run_dir=folder,
            describe=after_epoch,
        )


def plain_jax(job: Job, referee: Referee, scan: bool) -> None:
    """A loop written by hand, on one device or under `shard_map`: data on the devices, the carry donated.

    Args:
        job: What to train.
        referee: Who takes the time.
        scan: Whether an epoch is one dispatch, or each step is.
    """
    os.environ["JAX_NUM_CPU_DEVICES"] = str(job.devices)
    os.environ["NPROC"] = str(
        max(2 * job.devices, os.cpu_count() or 1)
    )  # else collectives wait for ever
    import jax
    import optax
    from jax import lax
    from jax.sharding import NamedSharding, PartitionSpec

    pictures = read_mnist(job)
    network, optimizer = linen_network(job.model), optax.adam(LEARNING_RATE)
    params = network.init(jax.random.key(0), pictures.x[:1])
    mesh = jax.make_mesh((job.devices,), ("replica",), axis_types=(jax.sharding.AxisType.Auto,))
    everywhere = NamedSharding(mesh, PartitionSpec())
    carry = jax.device_put((params, optimizer.init(params)), everywhere)
    x, y = jax.device_put((pictures.x, pictures.y), everywhere)

    def step(carry, indices, x, y):
        params, state = carry

        def loss(params):
            logits = network.apply(params, x[indices])
            return optax.softmax_cross_entropy_with_integer_labels(logits, y[indices]).mean()

        value, grads = jax.value_and_grad(loss)(params)
        if job.devices > 1:
            value, grads = lax.pmean((value, grads), "replica")
        updates, state = optimizer.update(grads, state)
        return (optax.apply_updates(params, updates), state), value

    def epoch(carry, batches, last, x, y):
        carry, losses = lax.scan(lambda carry, indices: step(carry, indices, x, y), carry, batches)
        return step(carry, last, x, y) if last.size else (carry, losses[-1])

    def compiled(function, *indices):
        if job.devices > 1:
            specs = PartitionSpec(), *indices, PartitionSpec(), PartitionSpec()
            function = jax.shard_map(
                function, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(), check_vma=False
            )
        return jax.jit(function, donate_argnums=0)

    one_step = compiled(step, PartitionSpec("replica"))
    one_epoch = compiled(epoch, PartitionSpec(None, "replica"), PartitionSpec("replica"))
    rng, predict, size = np.random.default_rng(0), jax.jit(network.apply), job.batch_size

    referee.ready()
    for _ in range(job.epochs):
        order = rng.permutation(len(x)).astype(np.int32)
        if scan:
            full = len(x) // size * size
            carry, loss = one_epoch(carry, order[:full].reshape(-1, size), order[full:], x, y)
        else:
            for start in range(0, len(x), size):
                carry, loss = one_step(carry, order[start : start + size], x, y)
        jax.block_until_ready((carry, loss))
        params = carry[0]
        referee.done(lambda params=params: accuracy(lambda x: predict(params, x), pictures))


def linen_network(name: str) -> Any:
    """Builds a flax.linen module for pictures `[examples, 28, 28]`."""
    from flax import linen

    halve = partial(linen.max_pool, window_shape=(2, 2), strides=(2, 2))
    layers = {
        "mlp": lambda: [
            lambda x: x.reshape(len(x), -1),
            *(linen.Dense(HIDDEN), linen.relu, linen.Dense(CLASSES)),
        ],
        "cnn": lambda: [
            lambda x: x[..., None],
            *(linen.Conv(32, (5, 5)), halve, linen.relu),
            *(linen.Conv(64, (5, 5)), halve, linen.relu),
            lambda x: x.reshape(len(x), -1),
            *(linen.Dense(512), linen.relu, linen.Dense(CLASSES)),
        ],
        "lstm": lambda: [
            linen.RNN(linen.OptimizedLSTMCell(HIDDEN)),
            lambda x: x[:, -1],
            linen.Dense(CLASSES),
        ],
    }
    return linen.Sequential(layers[name]())


def pytorch(job: Job, referee: Referee, fused: bool = False, compiled: bool = False) -> None:
    """A loop over batches of tensors that are in memory; with several devices, processes under DDP over Gloo.

    Args:
        job: What to train.
        referee: Who takes the time.
        fused: Whether Adam is the fused one, instead of the default.
        compiled: Whether the network goes through `torch.compile`.
    """
    import torch
    from torch import distributed
    from torch.nn.functional import cross_entropy

    torch.manual_seed(0)
    pictures = read_mnist(job)
    x, y = torch.from_numpy(pictures.x), torch.from_numpy(pictures.y).long()
    network = model = torch_network(job.model)
    if job.devices > 1:
        torch.set_num_threads(1)  # as torchrun has it
        distributed.init_process_group(
            "gloo", f"file://{job.meeting}", rank=job.rank, world_size=job.devices
        )
        model = torch.nn.parallel.DistributedDataParallel(network)
    if compiled:
        model = torch.compile(network, dynamic=False)
    optimizer = torch.optim.Adam(network.parameters(), LEARNING_RATE, fused=fused)

    def predict(x: np.ndarray) -> Any:
        with torch.inference_mode():
            return network(torch.from_numpy(x))

    referee.ready()
    for _ in range(job.epochs):
        if job.devices > 1:
            distributed.barrier()  # the others wait here until the first one may begin
        for batch in torch.randperm(len(x)).split(
            job.batch_size
        ):  # the same order in all processes
            own = batch[job.rank :: job.devices]
            optimizer.zero_grad()
            cross_entropy(model(x[own]), y[own]).backward()
            optimizer.step()
        referee.done(lambda: accuracy(predict, pictures))


def torch_network(name: str) -> Any:
    """Builds a PyTorch module for pictures `[examples, 28, 28]`."""
    from torch import nn

    class LastState(nn.LSTM):
        def forward(self, x):
            return super().forward(x)[0][:, -1]

    layers = {
        "mlp": lambda: [
            nn.Flatten(),
            nn.Linear(28 * 28, HIDDEN),
            nn.ReLU(),
            nn.Linear(HIDDEN, CLASSES),
        ],
        "cnn": lambda: [
            nn.Unflatten(1, (1, 28)),
            *(nn.Conv2d(1, 32, 5, padding=2), nn.MaxPool2d(2), nn.ReLU()),
            *(nn.Conv2d(32, 64, 5, padding=2), nn.MaxPool2d(2), nn.ReLU()),
            nn.Flatten(),
            *(nn.Linear(7 * 7 * 64, 512), nn.ReLU(), nn.Linear(512, CLASSES)),
        ],
        "lstm": lambda: [LastState(28, HIDDEN, batch_first=True), nn.Linear(HIDDEN, CLASSES)],
    }
    return nn.Sequential(*layers[name]())


def distributed_data_parallel(job: Job, referee: Referee) -> None:
    """PyTorch's DistributedDataParallel over loopback: this process, and the others that it starts."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    if job.rank:
        return pytorch(job, referee)
    with TemporaryDirectory() as folder:
        jobs = [replace(job, rank=rank, meeting=f"{folder}/meeting") for rank in range(job.devices)]
        others = [
            subprocess.Popen([sys.executable, __file__, json.dumps(asdict(other))])
            for other in jobs[1:]
        ]
        try:
            pytorch(jobs[0], referee)
        finally:
            for other in others:
                other.kill()


def keras(job: Job, referee: Referee) -> None:
    """Keras 3 on JAX: `compile` and `fit`, which prints a line an epoch.

    Kernels start as flax has them: Keras' own, larger start is a point ahead after the first epochs of the perceptron.
    """
    os.environ["KERAS_BACKEND"] = "jax"
    import keras
    from keras import layers

    pictures, start = read_mnist(job), {"kernel_initializer": "lecun_normal"}
    network = {
        "mlp": lambda: [
            layers.Flatten(),
            layers.Dense(HIDDEN, "relu", **start),
            layers.Dense(CLASSES, **start),
        ],
        "cnn": lambda: [
            layers.Reshape((28, 28, 1)),
            *(layers.Conv2D(32, 5, padding="same", **start), layers.MaxPooling2D(), layers.ReLU()),
            *(layers.Conv2D(64, 5, padding="same", **start), layers.MaxPooling2D(), layers.ReLU()),
            *(layers.Flatten(), layers.Dense(512, "relu", **start), layers.Dense(CLASSES, **start)),
        ],
        "lstm": lambda: [layers.LSTM(HIDDEN, **start), layers.Dense(CLASSES, **start)],
    }[job.model]()
    model = keras.Sequential([keras.Input((28, 28)), *network])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(LEARNING_RATE), loss, metrics=["accuracy"])

    def after_epoch(epoch: int, logs: Any) -> None:
        referee.done(lambda: accuracy(model.predict_on_batch, pictures))

    referee.ready()
    callback = keras.callbacks.LambdaCallback(on_epoch_end=after_epoch)
    model.fit(pictures.x, pictures.y, job.batch_size, job.epochs, verbose=2, callbacks=[callback])


TRAIN: dict[str, Callable[[Job, Referee], None]] = {
    "this trainer": this_trainer,
    "JAX, one dispatch a step": partial(plain_jax, scan=False),
    "JAX, one scan an epoch": partial(plain_jax, scan=True),
    "PyTorch": pytorch,
    "PyTorch, fused Adam": partial(pytorch, fused=True),
    "PyTorch, torch.compile": partial(pytorch, fused=True, compiled=True),
    "PyTorch DDP, Gloo": distributed_data_parallel,
    "Keras on JAX": keras,
}


if __name__ == "__main__":
    job = Job(**json.loads(sys.argv[1]))
    TRAIN[job.contestant](job, Referee(job))
