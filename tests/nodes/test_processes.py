"""Federations of real processes: kills, full disks, hostile nodes, and strangers."""

import os
import resource
import signal
import threading
from contextlib import ExitStack
from functools import partial

import jax
import numpy as np
import pytest
from node_commands import LIMIT, Commands, wait_until
from nodes_here import run_federation

import ctde_jax as ctde
from ctde_jax import checkpoint
from ctde_jax.config import parse
from ctde_jax.nodes.certificates import create_certificates
from ctde_jax.nodes.envelope import pack, unpack
from ctde_jax.nodes.node import Node, Setup
from ctde_jax.nodes.options import build_federation

pytest.importorskip("flwr", reason="requires Flower: pip install 'ctde_jax[flower]'")
run_node = pytest.importorskip("ctde_jax.nodes.flower.node").run_node

pytestmark = pytest.mark.slow

NAMES = ["north", "south"]
OF_SERVER = ["--nodes", "2", "--rounds", "12"]
OPTIONS = [
    *("--strategy", "diloco", "--reduce", "int4", "--error-feedback", "--sync-every", "2"),
    *("--batch-size", "16", "--eval-every", "24"),
]


@pytest.fixture
def start(tmp_path):
    """Returns a function that makes commands, whose processes end with the test."""
    made = []

    def make(names, options) -> Commands:
        made.append(Commands(tmp_path, names, options))
        return made[-1]

    yield make
    for commands in made:
        commands.stop()


def start_nodes(commands: Commands) -> None:
    for index, name in enumerate(NAMES):
        start_node(commands, name, index)


def start_node(commands: Commands, name: str, index: int) -> None:
    commands.node(name, "--index", str(index), "--part", f"{index + 1}/{len(NAMES)}")


def wait_for_rounds(commands: Commands, more: int) -> None:
    rounds = len(commands.rounds()) + more
    wait_until(lambda: len(commands.rounds()) >= rounds)


def wait_for_line(commands: Commands, name: str, sentence: str) -> None:
    """Waits until a line of a log contains a sentence."""
    wait_until(lambda: any(sentence in line for line in commands.log(name).splitlines()))


def check_complete(commands: Commands) -> None:
    """Checks that all commands end without an error, and that no round is lost or repeated."""
    for name in ("server", *NAMES):
        assert commands.running[name].wait(LIMIT) == 0, commands.log(name)
        assert "Traceback" not in commands.log(name)
    assert [row["step"] for row in commands.rounds()] == [*range(2, 25, 2)]
    cards = [commands.folder / name / "bundle" / "card.json" for name in ("server", *NAMES)]
    assert len({card.read_bytes() for card in cards}) == 1


def tensors_of(run_dir):
    found = checkpoint.newest_intact(run_dir / checkpoint.CHECKPOINTS, print)
    assert found is not None
    return found.tensors


@pytest.mark.skipif(
    not hasattr(resource, "prlimit"), reason="only Linux limits the files of a running process"
)
def test_kills_and_full_disks_do_not_change_a_bit(start, digits, tmp_path):
    commands = start(NAMES, [*OF_SERVER, *OPTIONS])
    commands.serve()
    start_nodes(commands)
    wait_for_rounds(commands, 1)

    # The disk of a node is full for some time; both sides report it.
    commands.fill_disk("north")
    wait_for_line(commands, "north", "refused    folder must be a writable folder")
    wait_for_line(commands, "server", "refused    north: request was refused: folder must be a")
    commands.free_disk("north")
    wait_for_rounds(commands, 1)

    os.kill(commands.superlink(), signal.SIGKILL)
    wait_for_rounds(commands, 2)
    commands.kill("south")
    start_node(commands, "south", 1)
    wait_for_rounds(commands, 1)

    # The disk of the server is full: it ends with a sentence, and is started again.
    commands.fill_disk("server")
    assert commands.running["server"].wait(LIMIT) == 2
    assert commands.log("server").splitlines()[-1].startswith("error: --run-dir must be a writable")
    commands.serve()
    wait_for_rounds(commands, 1)
    commands.kill("server")
    commands.serve()
    check_complete(commands)

    # The same federation in one process, undisturbed.
    federation = build_federation(parse(OPTIONS, "serve"), digits, nodes=2, rounds=12)
    parts = ctde.data.partition.iid(digits.train.labels, 2)
    run_federation(tmp_path / "here", federation, digits, parts)
    expected = tensors_of(tmp_path / "here" / "server")
    found = tensors_of(commands.run_dir)
    assert found.keys() == expected.keys()
    jax.tree.map(np.testing.assert_array_equal, found, expected)


class Hostile:
    """A node in a thread whose messages are made from those of an honest one.

    Args:
        commands: The server.
        name: Name of the node, whose key the server accepts.
        honest: Returns the reply of an honest node to a request.
        attack: Returns the reply to a request for a message, given the honest one.
    """

    def __init__(self, commands: Commands, name: str, honest, attack):
        self.lines: list[str] = []
        self._name = name
        self._honest = honest
        self._attack = attack
        self._stop = threading.Event()
        folder = commands.folder / name
        self._run = partial(
            run_node,
            folder,
            commands.address,
            self._answer,
            authority=commands.authority,
            stop=self._stop,
            log=self.lines.append,
        )
        self._thread = threading.Thread(target=self._run)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join()

    def _answer(self, request: bytes) -> bytes:
        reply = unpack(self._honest(request))
        if reply.header["kind"] == "joined":
            index = 2 + [*ATTACKS].index(self._name)
            return pack({**reply.header, "name": self._name, "index": index})
        if reply.header["kind"] == "message":
            return self._attack(reply)
        return pack(reply.header, reply.parts)


def with_header(**values):
    return lambda reply: pack({**reply.header, **values}, reply.parts)


def with_payload(change):
    return lambda reply: pack(reply.header, [change(reply.parts[0]), *reply.parts[1:]])


def fail(reply):
    raise ValueError("a failure for the test")


ATTACKS = {
    "garbage": lambda reply: b"\xff" * 1000,
    "size": with_payload(lambda payload: payload[:-1]),
    "nan": with_payload(lambda payload: b"\xff" * len(payload)),
    "replayed": with_header(round=0),
    "future": with_header(round=1000),
    "foreign": with_header(run="another"),
    "failing": fail,
    "large": with_payload(lambda payload: bytes(2_000_000)),
}
"""Attacks by the name of the node."""

REFUSED = {
    "garbage": "message must be a header and arrays of the sizes in the header",
    "size": "message must have ",
    "nan": "message must be finite, got NaN or infinity",
    "future": "round must be ",
    "foreign": "run must be ",
}
"""Sentences of the server, by the name of the node."""

# The server with a limit of 1 MB for replies, so that the test need not send 256 MB.
SERVE = """
import sys
from ctde_jax import serve
from ctde_jax.nodes.flower import serving

serving.serve.__wrapped__.__kwdefaults__["most_bytes"] = 1_000_000
sys.exit(serve.main(sys.argv[1:]))
"""


def test_hostile_nodes_and_strangers_are_refused_in_a_sentence(start, digits, tmp_path):
    commands = start([*NAMES, *ATTACKS], [*OF_SERVER, "--deadline", "1", *OPTIONS])
    commands.serve(["-c", SERVE])

    # Strangers: a server with another certificate, and a node whose key the server does not have.
    other = create_certificates(tmp_path / "other", []).authority
    strangers = {
        "misled": commands.node("misled", authority=other),
        "unknown": commands.node("unknown"),
    }

    # Hostile nodes, which share an honest one.
    device = jax.local_devices(backend="cpu")[0]
    federation = build_federation(parse(OPTIONS, "serve"), digits, nodes=2, rounds=12)
    shared = Node(tmp_path / "shared", lambda _: Setup(digits, lambda _: federation), [device], "x")
    lock = threading.Lock()

    def honest(request: bytes) -> bytes:
        with lock:
            return shared.answer(request)

    hostile = [Hostile(commands, name, honest, attack) for name, attack in ATTACKS.items()]
    with ExitStack() as stack:
        for node in hostile:
            stack.enter_context(node)
        start_nodes(commands)
        check_complete(commands)
    for name, sentence in REFUSED.items():
        wait_for_line(commands, "server", f"refused    {name}: {sentence}")
    wait_for_line(commands, "server", "lost       failing: ValueError: a failure for the test")
    rows = [row["round"] for row in commands.rounds()]
    assert {name for row in rows for name in row["refused"]} >= {*REFUSED}
    assert "replayed" in {name for row in rows for name in row["late"]}
    assert any("it is larger than the server accepts" in line for line in hostile[7].lines)

    # Each ends with one sentence.
    sentences = {
        "misled": "error: --server must be the machine that signed ca.pem",
        "unknown": f"error: --server {commands.address} does not accept the key of this node",
    }
    for name, stranger in strangers.items():
        assert stranger.wait(LIMIT) == 2
        assert commands.log(name).splitlines()[-1].startswith(sentences[name])
