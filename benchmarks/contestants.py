"""Contestants of `peers.py`: the same training in this package and in other frameworks.

Each runs in a separate process, so that they share no thread pools, XLA flags or devices. All use
MNIST divided by 255, the same network, Adam at 0.001, the same global batch, a new order in every
epoch, and the short last batch. The defaults of each framework (initialization, threads) are kept,
unless the contestant's docstring states otherwise.

Imports at the top are light, because some of these processes are timed from their start.
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
HIDDEN = 128
CLASSES = 10


@dataclass(frozen=True)
class Job:
    """The training of a contestant."""

    contestant: str
    model: str
    batch_size: int
    devices: int
    epochs: int
    data_dir: str
    examples: int | None = None  # use the first training examples only; None uses all
    every_epoch: bool = False  # evaluate after every epoch instead of only after the last one
    rank: int = 0  # index among the processes of a contestant; rank 0 reports
    meeting: str = ""  # file through which these processes find each other


class Referee:
    """Starts the epochs of a contestant one by one and times each, in the same way for all.

    `peers.py` writes a line to the standard input when the contestant may begin an epoch, and reads
    JSON lines. The contestant calls `ready` once, and `done` after every epoch.
    """

    def __init__(self, job: Job):
        self._job = job
        self._epochs_left = job.epochs
        # Results use a copy of stdout. What the framework prints to stdout itself is discarded.
        self._out = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        self._begin = 0.0

    def ready(self) -> None:
        """Waits until the next epoch may begin; the first epoch includes compilation."""
        # An empty read is the end of the file: `peers.py` has ended.
        if self._job.rank == 0 and not sys.stdin.readline():
            sys.exit("the command that compares has ended")
        self._begin = time.perf_counter()

    def done(self, evaluate: Callable[[], float]) -> None:
        """Ends an epoch, whose results must be ready, and waits for the next one."""
        # The clock stops before the evaluation.
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
    """MNIST with pixels between 0 and 1."""

    x: np.ndarray  # float32[examples, 28, 28]
    y: np.ndarray  # int32[examples]
    x_test: np.ndarray
    y_test: np.ndarray


def read_mnist(job: Job) -> Pictures:
    """Reads the four IDX files, compressed or not."""

    def read(name: str, header: int) -> np.ndarray:
        path = Path(job.data_dir) / name
        content = (
            path.read_bytes()
            if path.exists()
            else gzip.decompress(path.with_name(f"{name}.gz").read_bytes())
        )
        return np.frombuffer(content, np.uint8, offset=header)

    # The header of an IDX file has 16 bytes for images and 8 for labels.
    def pictures(split: str, examples: int | None) -> tuple[np.ndarray, np.ndarray]:
        pixels = read(f"{split}-images-idx3-ubyte", 16).reshape(-1, 28, 28)[:examples]
        return pixels.astype(np.float32) / 255, read(f"{split}-labels-idx1-ubyte", 8)[
            :examples
        ].astype(np.int32)

    return Pictures(*pictures("train", job.examples), *pictures("t10k", None))


def accuracy(predict: Callable[[np.ndarray], Any], pictures: Pictures) -> float:
    """Returns the test accuracy of `predict`, which maps float32[n, 28, 28] to float[n, 10]."""
    # In parts: the first convolution of the CNN has 1 GB of activations for 10,000 examples.
    parts = range(0, len(pictures.x_test), 1000)
    labels = [
        np.asarray(predict(pictures.x_test[start : start + 1000])).argmax(-1) for start in parts
    ]
    return float((np.concatenate(labels) == pictures.y_test).mean())


def this_trainer(job: Job, referee: Referee) -> None:
    """`ctde.fit` with its progress, its log and its files.

    `fit` evaluates after every epoch and then calls `describe`, which notifies the referee. The
    test split therefore has one example per device. The time of an epoch includes this small
    evaluation, which counts against this trainer.
    """
    import jax
    import optax

    import ctde_jax as ctde

    # The data: the first training examples, and as few test examples as possible.
    devices = ctde.devices.start(job.devices)
    data = ctde.data.mnist(job.data_dir)
    train = ctde.data.Split(*(array[: job.examples] for array in data.train))
    data = replace(
        data, train=train, test=ctde.data.Split(*(array[: job.devices] for array in data.test))
    )
    # The model, and the accuracy on all test examples, computed outside the timed part.
    model = {
        "mlp": lambda: ctde.models.mlp([28 * 28, HIDDEN, CLASSES], "relu"),
        "cnn": lambda: ctde.models.cnn((28, 28), CLASSES),
        "lstm": lambda: ctde.models.rnn_classifier(28, CLASSES, HIDDEN),
    }[job.model]()
    apply = jax.jit(model.apply)

    class AfterEpoch(ctde.Callback):
        def on_evaluation(self, rows, params, model_state) -> None:
            referee.done(
                lambda: accuracy(lambda x: apply(params, model_state, x, None)[0], read_mnist(job))
            )

    # Train as users do, with a run folder.
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
            callbacks=[AfterEpoch()],
        )


def plain_jax(job: Job, referee: Referee, scan: bool) -> None:
    """A loop written by hand, on one device or under `shard_map`.

    The data are on the devices, and the carry is donated.

    Args:
        job: Training to run.
        referee: Referee that times the epochs.
        scan: Whether an epoch is one dispatch; otherwise each step is one.
    """
    # Set before JAX is imported. XLA's thread pool has NPROC threads, and collectives may deadlock
    # if these are fewer than twice the devices.
    os.environ["JAX_NUM_CPU_DEVICES"] = str(job.devices)
    os.environ["NPROC"] = str(max(2 * job.devices, os.cpu_count() or 1))
    import jax
    import optax
    from jax import lax
    from jax.sharding import NamedSharding, PartitionSpec

    # Replicate the state and all examples; batches are int32 indices into them.
    pictures = read_mnist(job)
    network = linen_network(job.model)
    optimizer = optax.adam(LEARNING_RATE)
    params = network.init(jax.random.key(0), pictures.x[:1])
    mesh = jax.make_mesh((job.devices,), ("replica",), axis_types=(jax.sharding.AxisType.Auto,))
    everywhere = NamedSharding(mesh, PartitionSpec())
    carry = jax.device_put((params, optimizer.init(params)), everywhere)
    x, y = jax.device_put((pictures.x, pictures.y), everywhere)

    # A step and an epoch, as functions of the carry and of the indices of their batches.
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
        # The short last batch has another shape, so it is a step after the scan.
        carry, losses = lax.scan(lambda carry, indices: step(carry, indices, x, y), carry, batches)
        return step(carry, last, x, y) if last.size else (carry, losses[-1])

    def compiled(function, *indices):
        if job.devices > 1:
            specs = PartitionSpec(), *indices, PartitionSpec(), PartitionSpec()
            function = jax.shard_map(
                function, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(), check_vma=False
            )
        return jax.jit(function, donate_argnums=0)

    # Every batch is split over the devices.
    one_step = compiled(step, PartitionSpec("replica"))
    one_epoch = compiled(epoch, PartitionSpec(None, "replica"), PartitionSpec("replica"))
    rng = np.random.default_rng(0)
    predict = jax.jit(network.apply)
    size = job.batch_size

    # Train: an epoch ends when its results are ready.
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
    """Builds a flax.linen module that maps float32[examples, 28, 28] to logits."""
    from flax import linen

    # Pooling before ReLU gives the same as after it, with a quarter of the work for ReLU.
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
    """A loop over batches of tensors in memory; several devices are processes under DDP over Gloo.

    Args:
        job: Training to run.
        referee: Referee that times the epochs.
        fused: Use the fused Adam instead of the default one.
        compiled: Use `torch.compile`.
    """
    import torch
    from torch import distributed
    from torch.nn.functional import cross_entropy

    # The same seed in every process, so that all of them draw the same order of the examples.
    torch.manual_seed(0)
    pictures = read_mnist(job)
    x = torch.from_numpy(pictures.x)
    y = torch.from_numpy(pictures.y).long()
    # `network` has the parameters; `model` is `network`, possibly wrapped or compiled.
    network = model = torch_network(job.model)
    if job.devices > 1:
        torch.set_num_threads(1)  # the default of torchrun
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

    # Train: each rank takes every n-th example of a batch.
    referee.ready()
    for _ in range(job.epochs):
        if job.devices > 1:
            distributed.barrier()  # the other ranks wait here until rank 0 may begin
        for batch in torch.randperm(len(x)).split(job.batch_size):
            own = batch[job.rank :: job.devices]
            optimizer.zero_grad()
            cross_entropy(model(x[own]), y[own]).backward()
            optimizer.step()
        referee.done(lambda: accuracy(predict, pictures))


def torch_network(name: str) -> Any:
    """Builds a PyTorch module that maps float32[examples, 28, 28] to logits."""
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
    """PyTorch's DistributedDataParallel over loopback, in this process and those that it starts."""
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
    """Keras 3 on JAX: `compile` and `fit`, which prints a line per epoch.

    Kernels are initialized as in flax (LeCun normal): the default of Keras is larger, and is a
    percentage point ahead after the first epochs of the perceptron.
    """
    # Keras reads its backend on import.
    os.environ["KERAS_BACKEND"] = "jax"
    import keras
    from keras import layers

    pictures = read_mnist(job)
    start = {"kernel_initializer": "lecun_normal"}
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
