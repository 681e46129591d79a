"""Compares the bytes until an accuracy of Flower's FedAvg and of nodes of this package.

MNIST on 10 nodes, Dirichlet 0.5, MLP 784-128-10. All nodes of a contestant are connected to their
server through a proxy that counts the bytes of the sockets in both directions, from the start of
the first node on: registration, polls, heartbeats, headers and payloads. Neither uses TLS.

    python benchmarks/nodes_bytes.py --data-dir FOLDER/mnist               # what is missing
    python benchmarks/nodes_bytes.py --data-dir FOLDER/mnist --tune        # FedAvg, simulated
    python benchmarks/nodes_bytes.py --report

Requires Flower. FedAvg is Flower's: `flower-superlink`, 10 `flower-supernode`, `flwr run` with the
app in `flower_fedavg/`, whose local steps are taken by `FedAvgSteps` below.
"""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import ExitStack
from functools import partial
from multiprocessing.connection import Listener
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import numpy as np
import optax
import tyro
from harness import (
    RESULTS,
    Log,
    Row,
    Table,
    command_line,
    console,
    machine,
    point_command,
    publish,
    started,
)
from jax import lax
from jax import numpy as jnp
from jax.flatten_util import ravel_pytree

import ctde_jax as ctde
from ctde_jax.nodes.node import Setup

FEDAVG = "Flower's FedAvg"
OURS = "ctde_jax"
NODES = 10
FLOWER = Path(__file__).with_name("flower_fedavg")


def partition(data: ctde.data.Dataset) -> list[np.ndarray]:
    """Returns the examples of each node."""
    return ctde.data.partition.dirichlet(data.train.labels, NODES, 0.5, seed=0)


def network() -> ctde.models.Model:
    """Returns the model of both contestants."""
    return ctde.models.mlp([784, 128, 10], activation="relu")


class Proxy:
    """A TCP proxy on loopback that counts the bytes of all its connections.

    Args:
        port: Port of the server.
    """

    def __init__(self, port: int):
        self.up = 0
        self.down = 0
        self._target = port
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def count(self) -> Row:
        """Bytes from and to the nodes so far."""
        return {"up": self.up, "down": self.down}

    def _accept(self) -> None:
        while True:
            node, _ = self._listener.accept()
            threading.Thread(target=self._connect, args=(node,), daemon=True).start()

    def _connect(self, node: socket.socket) -> None:
        # Nodes may start before their server.
        wait_for(self._target)
        server = socket.create_connection(("127.0.0.1", self._target))
        for source, sink, name in ((node, server, "up"), (server, node, "down")):
            arguments = (source, sink, name)
            threading.Thread(target=self._pump, args=arguments, daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, name: str) -> None:
        try:
            while chunk := source.recv(1 << 16):
                with self._lock:
                    setattr(self, name, getattr(self, name) + len(chunk))
                sink.sendall(chunk)
        except OSError:
            pass
        # The other direction ends as well.
        for end in (source, sink):
            end.close()


# FedAvg.


class FedAvgSteps:
    """Local epochs of SGD with momentum, as FedAvg's nodes take them: the momentum starts at 0.

    Args:
        data: MNIST.
        optimizer: Optimizer of the local steps.
        epochs: Local epochs.
        batch_size: Batch size of a node.
    """

    def __init__(
        self,
        data: ctde.data.Dataset,
        optimizer: optax.GradientTransformation,
        epochs: int,
        batch_size: int,
    ):
        self.parts = partition(data)
        self._epochs = epochs
        self._batch_size = batch_size
        self._random = [np.random.default_rng(node) for node in range(NODES)]
        model = ctde.models.with_raw_inputs(network(), data.shift, data.scale)
        params, model_state = model.init(jax.random.key(0), data.train.inputs[:1])
        self.params = params
        self.begin, tree_of = ravel_pytree(params)
        inputs = jnp.asarray(data.train.inputs)
        labels = jnp.asarray(data.train.labels)

        def logits(vector, examples):
            outputs, _ = model.apply(tree_of(vector), model_state, examples, None)
            return outputs

        def loss(vector, rows):
            losses = optax.softmax_cross_entropy_with_integer_labels(
                logits(vector, inputs[rows]), labels[rows]
            )
            return losses.mean()

        @jax.jit
        def steps(vector, batches, count):
            def step(place, carry):
                grads = jax.grad(loss)(carry[0], batches[place])
                updates, state = optimizer.update(grads, carry[1], carry[0])
                return optax.apply_updates(carry[0], updates), state

            return lax.fori_loop(0, count, step, (vector, optimizer.init(vector)))[0]

        @jax.jit
        def accuracy(vector):
            found = jnp.argmax(logits(vector, data.test.inputs), axis=-1)
            return jnp.mean(found == data.test.labels)

        self._steps = steps
        self._accuracy = accuracy

    def train(self, node: int, vector: np.ndarray) -> np.ndarray:
        """Returns the parameters after the local epochs of a node."""
        rows = self.parts[node]
        count = -(-len(rows) // self._batch_size)
        random = self._random[node]
        # The last batch of an epoch is filled up with examples of the next permutation.
        epochs = [
            np.resize(random.permutation(rows), count * self._batch_size)
            for _ in range(self._epochs)
        ]
        most = -(-max(map(len, self.parts)) // self._batch_size) * self._epochs
        batches = np.zeros((most, self._batch_size), np.int32)
        batches[: count * self._epochs] = np.concatenate(epochs).reshape(-1, self._batch_size)
        return np.asarray(self._steps(vector, batches, count * self._epochs))

    def accuracy(self, vector: np.ndarray) -> float:
        """Returns the accuracy on the test split."""
        return float(self._accuracy(vector))


class Settings(NamedTuple):
    """Settings of FedAvg."""

    epochs: int
    optimizer: str
    learning_rate: float

    def make(self) -> optax.GradientTransformation:
        """Returns the optimizer."""
        if self.optimizer == "adam":
            return optax.adam(self.learning_rate)
        return optax.sgd(self.learning_rate, momentum=0.9)


TUNED = Settings(5, "momentum", 0.1)
BATCH_SIZE = 32  # of a node
CANDIDATES = [
    *(Settings(epochs, "momentum", 0.1) for epochs in (1, 2, 5)),
    *(Settings(5, "momentum", rate) for rate in (0.05, 0.2)),
    Settings(5, "adam", 0.001),
]


def simulate(settings: Settings, rounds: int, data: ctde.data.Dataset) -> Row:
    """Runs FedAvg in this process; returns the accuracy after each round."""
    steps = FedAvgSteps(data, settings.make(), settings.epochs, BATCH_SIZE)
    vector = steps.begin
    weights = np.array([len(rows) for rows in steps.parts])
    accuracies = []
    for _ in range(rounds):
        trained = [steps.train(node, vector) for node in range(NODES)]
        vector = np.average(trained, axis=0, weights=weights).astype(np.float32)
        accuracies.append(steps.accuracy(vector))
    return {"accuracies": accuracies}


def run_flower(rounds: int, data: ctde.data.Dataset, folder: Path) -> list[Row]:
    """Runs Flower's FedAvg; returns the accuracy and the bytes so far after each round.

    Args:
        rounds: Number of rounds.
        data: MNIST.
        folder: Folder for logs and Flower's files.
    """
    port = find_port()
    proxy = Proxy(port)
    steps = FedAvgSteps(data, TUNED.make(), TUNED.epochs, BATCH_SIZE)
    _, tree_of = ravel_pytree(steps.params)
    structure = jax.tree.structure(steps.params)
    rows: list[Row] = []

    def vector_of(arrays: list[np.ndarray]) -> np.ndarray:
        return np.asarray(ravel_pytree(structure.unflatten(arrays))[0])

    def arrays_of(vector: np.ndarray) -> list[np.ndarray]:
        return [np.asarray(leaf) for leaf in jax.tree.leaves(tree_of(vector))]

    def answer(kind: str, *arguments: Any) -> Any:
        if kind == "begin":
            return arrays_of(steps.begin)
        if kind == "train":
            node, arrays = arguments
            return arrays_of(steps.train(node, vector_of(arrays))), len(steps.parts[node])
        if kind == "evaluate":
            number, arrays = arguments
            accuracy = steps.accuracy(vector_of(arrays))
            rows.append({"round": number, "accuracy": accuracy, **proxy.count})
            console.print(rows[-1])
            return accuracy
        return None

    # Flower finds the SuperLink by its configuration.
    (folder / "home").mkdir()
    (folder / "home" / "config.toml").write_text(
        f'[superlink]\ndefault = "here"\n\n[superlink.here]\naddress = "127.0.0.1:{port}"\n'
        "insecure = true\n"
    )
    programs = Path(sys.executable).parent
    environment = {
        **os.environ,
        "FLWR_HOME": str(folder / "home"),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FEDAVG_SOCKET": str(folder / "socket"),
        "PATH": f"{programs}:{os.environ['PATH']}",
    }

    with ExitStack() as at_end:

        def start(name: str, *arguments: object) -> None:
            log = at_end.enter_context((folder / f"{name}.log").open("ab"))
            process = subprocess.Popen(
                [programs / name, "--insecure", *map(str, arguments)],
                env=environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
            at_end.callback(lambda: (os.killpg(process.pid, signal.SIGKILL), process.wait()))

        start("flower-superlink", "--port", port, "--disable-runtime-dependency-installation")
        wait_for(port)
        for node in range(NODES):
            addresses = ("--superlink", f"127.0.0.1:{proxy.port}", "--port", find_port())
            start("flower-supernode", *addresses, "--node-config", f"part={node}")
        listener = at_end.enter_context(Listener(str(folder / "socket"), backlog=NODES))
        config = f"nodes={NODES} rounds={rounds}"
        command = [programs / "flwr", "run", FLOWER, "here", "--run-config", config]
        subprocess.run(command, env=environment, check=True, capture_output=True)
        while True:
            with listener.accept() as connection:
                request = connection.recv()
                connection.send(answer(*request))
            if request[0] == "end":
                return rows


# Nodes of this package.

ROUNDS = 17
KEEP = 10  # components of the kernel along each direction
# The learning rate in the last rounds, in units of that in the others.
TAIL = (0.5, 0.2, 0.05)


def federation(data: ctde.data.Dataset, epoch_steps: int) -> ctde.nodes.Federation:
    """Returns the federation, on the server or on a node with these data.

    The local steps are those of FedAvg, with calibrated logits, and a lower learning rate in the
    last rounds. A node with fewer examples than another pauses, so its schedule has the steps that
    it takes.
    """
    steps = TUNED.epochs * -(-len(data.train.inputs) // BATCH_SIZE)
    drops = {
        steps * (ROUNDS - len(TAIL) + place): after / before
        for place, (before, after) in enumerate(zip((1.0, *TAIL), TAIL, strict=False))
    }
    rate = optax.piecewise_constant_schedule(TUNED.learning_rate, drops)
    counts = np.bincount(data.train.labels, minlength=10)
    codec = ctde.aggregate.error_feedback(ctde.aggregate.quantize(2, "statistical", block=360))
    reduce = ctde.aggregate.smooth(
        ctde.aggregate.two_phase(codec), image=(28, 28), keep=(KEEP, KEEP), length=2.0, width=6.0
    )
    return ctde.nodes.Federation(
        network(),
        optax.sgd(rate, momentum=0.9),
        ctde.Strategy(inner_steps=TUNED.epochs * epoch_steps, reduce=reduce),
        nodes=NODES,
        rounds=ROUNDS,
        task=ctde.tasks.calibrated(ctde.tasks.classification, counts),
        batch_size=NODES * BATCH_SIZE,
        epoch_steps=epoch_steps,
    )


def run_server(data_dir: Path | None, folder: Path) -> Row:
    """Runs the nodes of this package; returns the accuracy and the bytes after each round.

    Args:
        data_dir: Folder of MNIST's files.
        folder: Folder for the server and the nodes.
    """
    data = ctde.data.mnist(data_dir)
    epoch_steps = -(-max(map(len, partition(data))) // BATCH_SIZE)
    port = find_port()
    proxy = Proxy(port)
    curve: list[Row] = []

    def record(row: Row) -> None:
        if row["split"] == "test":
            number = row["step"] // (TUNED.epochs * epoch_steps)
            curve.append({"round": number, "accuracy": row["accuracy"], **proxy.count})
            console.print(curve[-1])

    point = {
        "folder": str(folder),
        "data_dir": data_dir and str(data_dir),
        "port": proxy.port,
        "epoch_steps": epoch_steps,
    }
    with started(point_command(__file__, point)):
        ctde.nodes.serve(
            federation(data, epoch_steps),
            data,
            folder / "server",
            ctde.nodes.Listening(port=port, insecure=True),
            callbacks=[record],
            show=False,
        )
    # With the bundle, which each node gets at the end.
    return {"curve": curve, "whole": proxy.count}


def run_nodes(point: Row) -> None:
    """Runs all nodes in threads of this process, each with its folder and its connections."""
    data = ctde.data.mnist(point["data_dir"])
    parts = partition(data)

    def join(node: int) -> None:
        ctde.nodes.join(
            f"127.0.0.1:{point['port']}",
            Path(point["folder"], f"node-{node}"),
            lambda _: Setup(
                ctde.data.partition.part(data, parts[node]),
                lambda data: federation(data, point["epoch_steps"]),
            ),
            [jax.local_devices(backend="cpu")[0]],
            name=f"node-{node}",
            index=node,
            insecure=True,
        )

    threads = [threading.Thread(target=join, args=(node,)) for node in range(NODES)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def find_port() -> int:
    """Returns a port of loopback that is free now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def wait_for(port: int) -> None:
    """Waits until a server listens."""
    for _ in range(600):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise RuntimeError(f"nothing listens on port {port}")


def rounds_until(curve: list[Row], accuracy: float) -> Row | None:
    """Returns the round in which the median of the last three accuracies reaches a value."""
    for place in range(2, len(curve)):
        last = [row["accuracy"] for row in curve[place - 2 : place + 1]]
        # Half of an example, as accuracies are float32.
        if np.median(last) >= accuracy - 0.5e-4:
            return curve[place]
    return None


def megabytes(row: Row) -> float:
    """Returns the bytes in both directions."""
    return (row["up"] + row["down"]) / 1e6


def report(log: Log) -> None:
    """Prints the tables, and writes them as Markdown."""
    curves = {name: log.find(contestant=name)[-1]["curve"] for name in (FEDAVG, OURS)}
    fedavg = curves[FEDAVG]
    level = float(np.mean([row["accuracy"] for row in fedavg[-5:]]))

    # Bytes until an accuracy.
    lines = []
    for accuracy in (0.97, 0.975, 0.9775, level):
        found = [rounds_until(curve, accuracy) for curve in curves.values()]
        cells = [f"{row['round']}: {megabytes(row):.2f} MB" if row else "-" for row in found]
        if None not in found:
            cells.append(f"{megabytes(found[0]) / megabytes(found[1]):.0f}")
        lines.append([f"{accuracy:.2%}", *cells])
    names = [f"{name}, rounds and bytes" for name in curves]
    until = Table("Bytes until an accuracy", ("accuracy", *names, "ratio"), lines)

    # The curves.
    numbers = range(1, max(curve[-1]["round"] for curve in curves.values()) + 1)
    rows = {name: {row["round"]: row for row in curve} for name, curve in curves.items()}
    lines = [
        [
            str(number),
            *(
                cell
                for of in rows.values()
                for cell in (
                    (f"{of[number]['accuracy']:.2%}", f"{megabytes(of[number]):.3f}")
                    if number in of
                    else ("", "")
                )
            ),
        ]
        for number in numbers
    ]
    header = ["round"]
    for name in curves:
        header += [f"{name}, accuracy", "MB so far"]
    simulated = [
        [
            f"local epochs {row['epochs']}, {row['optimizer']} {row['learning_rate']}",
            *(f"{row['accuracies'][number - 1]:.2%}" for number in (5, 10, 15, 20)),
        ]
        for row in log.find(contestant="FedAvg, simulated")
    ]
    tables = [until, Table("Accuracy and bytes after each round", header, lines)]
    if simulated:
        after = ("settings", *(f"round {number}" for number in (5, 10, 15, 20)))
        tables.append(Table("FedAvg with other settings, simulated", after, simulated))
    whole = log.find(contestant=OURS)[-1]["whole"]
    note = (
        "An accuracy is reached if the median of three successive rounds reaches it; the last one "
        "is the mean of FedAvg's last five rounds. With the bundle that each node gets at the end, "
        f"{OURS} sent {megabytes(whole):.2f} MB. {machine('flwr')}."
    )
    publish(log.file.with_suffix(".md"), tables, note)


def main(
    data_dir: Path | None = None,
    rounds: int = 20,
    only: tuple[str, ...] = (FEDAVG, OURS),
    tune: bool = False,
    report_only: Annotated[bool, tyro.conf.arg(name="report")] = False,
    results: Path = RESULTS,
) -> None:
    """Measures what is missing.

    Args:
        data_dir: Folder of MNIST's files; by default the cache folder, into which they are
            downloaded.
        rounds: Number of rounds of FedAvg.
        only: Contestants.
        tune: Simulate FedAvg with several settings instead.
        report_only: Show earlier results without measuring.
        results: Folder for nodes_bytes.jsonl and .md.
    """
    log = Log(results / "nodes_bytes.jsonl")
    data = ctde.data.mnist(data_dir)

    def flower() -> Row:
        with tempfile.TemporaryDirectory() as folder:
            return {"curve": run_flower(rounds, data, Path(folder))}

    def ours() -> Row:
        with tempfile.TemporaryDirectory() as folder:
            return run_server(data_dir, Path(folder))

    if tune:
        for each in CANDIDATES:
            run = partial(simulate, each, rounds, data)
            log.make(run, contestant="FedAvg, simulated", **each._asdict(), rounds=rounds)
    elif not report_only:
        for name, run in {FEDAVG: flower, OURS: ours}.items():
            if name in only:
                log.make(run, contestant=name)
    report(log)


if __name__ == "__main__":
    command_line(main, run_nodes)
