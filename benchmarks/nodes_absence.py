"""Twenty nodes of which four are away in every round; see `nodes.py`.

The server is the command `serve`; the nodes are threads of a few processes, each with its
connection, key and folder, which saves memory. An absent node has signed off. The schedule is drawn
for every five rounds; one node is away for 50 rounds in a row, and then starts from its folder.
With everybody present, nodes compute the bits of `fit`, which is the reference.
"""

import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import jax
import numpy as np
from federation import SERVER, Federation
from harness import Log, Row, Table, machine, point_command, publish, started

import ctde_jax as ctde
from ctde_jax.config import DataOptions, build, parse
from ctde_jax.nodes.center import to_bytes
from ctde_jax.nodes.envelope import unpack
from ctde_jax.nodes.node import Node, Setup
from ctde_jax.nodes.options import build_federation, received

NODES = 20
AWAY = 4
ROUNDS = 300
PERIOD = 5  # rounds
LONG = range(100, 150)
"""Rounds in which the first node is away."""

PROCESSES = 2
LIMIT = 7200.0  # seconds
STEPS = 2  # of a round
OF_SERVER = ["--nodes", str(NODES), "--rounds", str(ROUNDS), "--quorum", str(NODES - AWAY)]
OPTIONS = [
    *("--strategy", "diloco", "--reduce", "int4", "--error-feedback", "--sync-every", str(STEPS)),
    *("--batch-size", "80", "--eval-every", str(ROUNDS * STEPS)),
]
HEADER = ("nodes", "test accuracy", "rounds", "messages in a round", "seconds")


def schedule() -> list[set[int]]:
    """Returns the indices of the nodes that are away, for each round."""
    rng = np.random.default_rng(0)
    away = []
    for first in range(0, ROUNDS, PERIOD):
        is_long = first in LONG
        others = rng.choice(np.arange(1, NODES), AWAY - is_long, replace=False)
        away += [{*others.tolist(), *([0] if is_long else [])}] * PERIOD
    return away


class Light:
    """A node in a thread.

    Args:
        federation: The server.
        index: Index of the node.
    """

    def __init__(self, federation: Federation, index: int):
        self.returns: list[Row] = []
        self._federation = federation
        self._index = index
        self._node = self._make()
        self._expects_first = False
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def is_done(self) -> bool:
        return self._node.is_done

    def set_away(self, is_away: bool) -> None:
        """Lets the node leave, or come back."""
        is_here = self._thread is not None and self._thread.is_alive()
        if is_away and not self._stop.is_set():
            self._stop.set()
        elif not is_away and not is_here and not self.is_done:
            # After the long absence, a new node, as after a start of its process.
            if self._index == 0:
                self._node = self._make()
            self._stop = threading.Event()
            self._expects_first = True
            self._thread = threading.Thread(target=self._run, args=(self._stop,), daemon=True)
            self._thread.start()

    def _make(self) -> Node:
        name = self._federation.nodes[self._index]
        device = jax.local_devices(backend="cpu")[0]
        folder = self._federation.folder_of(name)
        return Node(folder, self._setup, [device], name, self._index)

    def _setup(self, sent) -> Setup:
        config, nodes, rounds = received(sent, DataOptions())
        data = build.load_data(config.data, config.optimization.seed)
        part = ctde.data.partition.iid(data.train.labels, NODES)[self._index]
        part_of_data = ctde.data.partition.part(data, part)
        return Setup(part_of_data, lambda data: build_federation(config, data, nodes, rounds))

    def _run(self, stop: threading.Event) -> None:
        from ctde_jax.nodes.flower.node import run_node  # requires the extra

        name = self._federation.nodes[self._index]
        run_node(
            self._federation.folder_of(name),
            self._federation.address,
            self._answer,
            authority=self._federation.authority,
            is_done=lambda: self.is_done,
            stop=stop,
            log=lambda line: print(line, file=sys.stderr),
        )

    def _answer(self, request: bytes) -> bytes:
        # The first request for a message after the return has what the node has missed.
        header = unpack(request).header
        member = self._node._member
        # A node that has just started is introduced to the run once more before that.
        if header["kind"] == "round" and self._expects_first and member is not None:
            self._expects_first = False
            self.returns.append(
                {
                    "node": self._index,
                    "missed": header["round"] - member._progress.round,
                    "bytes": len(request),
                    "is_snapshot": header["snapshot"],
                    "snapshot_bytes": len(to_bytes(tuple(member._state.center))),
                }
            )
        return self._node.answer(request)


def measure_point(point: Row) -> Row:
    """Runs some of the nodes until the run has ended; returns what they received."""
    ctde.devices.start(1)
    federation = Federation(Path(point["folder"]), NODES, [], point["address"])
    nodes = {index: Light(federation, index) for index in point["indices"]}
    away = schedule()
    while not all(node.is_done for node in nodes.values()):
        closed = len(federation.rounds())
        for index, node in nodes.items():
            node.set_away(closed < ROUNDS and index in away[closed])
        time.sleep(0.1)
    return {"returns": [each for node in nodes.values() for each in node.returns]}


def measure_federation() -> Row:
    """Runs the server and all nodes, of which some are away."""
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        options = [*OF_SERVER, *OPTIONS, "--linger", "60"]
        federation = Federation(folder, NODES, options)
        point = {"folder": temporary, "address": federation.address}
        points = [
            {**point, "indices": list(range(first, NODES, PROCESSES))} for first in range(PROCESSES)
        ]
        try:
            federation.start(SERVER)
            federation.wait_for_authority(LIMIT)
            script = str(Path(__file__).with_name("nodes.py"))
            with (
                started(point_command(script, points[0])) as first,
                started(point_command(script, points[1])) as second,
            ):
                returns = [
                    each
                    for process in (first, second)
                    for each in process.hear("measured", LIMIT)["returns"]
                ]
        finally:
            federation.stop()
        rows = federation.rows()
    rounds = [row["round"] for row in rows if row["split"] == "train"]
    return {
        "accuracy": [row["accuracy"] for row in rows if row["split"] == "test"][-1],
        "rounds": len(rounds),
        "messages": [len(each["nodes"]) for each in rounds],
        "late": sum(len(each["late"]) for each in rounds),
        "sent": sum(each["sent"] for each in rounds),
        "returns": returns,
    }


def measure_fit() -> Row:
    """Trains with everybody present, on fake devices."""
    devices = ctde.devices.start(NODES)
    config = parse(OPTIONS, "serve")
    data = ctde.data.digits()
    federation = build_federation(config, data, NODES, ROUNDS)
    trained = ctde.fit(
        federation.model,
        data,
        federation.optimizer,
        federation.strategy,
        batch_size=federation.batch_size,
        steps=federation.steps,
        devices=devices,
        partition=ctde.data.partition.iid(data.train.labels, NODES),
        show=False,
    )
    return {
        "accuracy": trained.tested["accuracy"],
        "rounds": ROUNDS,
        "messages": [NODES] * ROUNDS,
    }


def measure(log: Log) -> None:
    """Measures what is missing in the log."""
    contestants: dict[str, Callable[[], Row]] = {"all": measure_fit, "absent": measure_federation}
    for name, contestant in contestants.items():
        log.make(contestant, nodes=name)


def report(log: Log, file: Path) -> None:
    """Writes the tables."""
    names = {"all": "all present (`fit`)", "absent": f"{AWAY} of {NODES} away in every round"}
    rows = [
        [
            names[row["nodes"]],
            f"{row['accuracy']:.4f}",
            str(row["rounds"]),
            f"{np.mean(row['messages']):.1f} ({min(row['messages'])}-{max(row['messages'])})",
            f"{row['seconds']:.0f}",
        ]
        for row in log.find()
    ]

    # What nodes received after an absence, by the number of missed rounds.
    (absent,) = log.find(nodes="absent")
    returns = [each for each in absent["returns"] if each["missed"]]
    found = []
    for missed in sorted({each["missed"] for each in returns}):
        some = [each for each in returns if each["missed"] == missed]
        sizes = [each["bytes"] for each in some]
        kinds = {"a snapshot" if each["is_snapshot"] else "the answers" for each in some}
        found.append([str(missed), str(len(some)), " or ".join(sorted(kinds)), f"{max(sizes):,}"])
    header = ("rounds missed", "returns", "received", "most bytes of the request")
    note = (
        f"A snapshot has {returns[0]['snapshot_bytes']:,} bytes. {absent['late']} messages came "
        f"after their round had been closed. {machine('flwr')}."
    )
    tables = [Table("Absence", HEADER, rows), Table("Returns", header, found)]
    publish(file, tables, note)
