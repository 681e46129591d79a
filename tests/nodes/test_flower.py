"""Bytes between a server and nodes in real processes, which are killed and come back."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
from node_commands import superlink_of

from ctde_jax.errors import InputError
from ctde_jax.nodes.certificates import create_certificates
from ctde_jax.nodes.keys import create_node_key

pytest.importorskip("flwr", reason="requires Flower: pip install 'ctde_jax[flower]'")
serving = pytest.importorskip("ctde_jax.nodes.flower.serving")
processes = pytest.importorskip("ctde_jax.nodes.flower.processes")

pytestmark = [
    pytest.mark.slow,
    # Flower builds its apps with a name that pathspec deprecates.
    pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning"),
]

HERE = Path(__file__).parent


class Federation:
    """A folder with a server and nodes, and the processes that a test starts."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.port = processes.find_port()
        self.certificates = create_certificates(folder / "server", [])
        self.processes: list[subprocess.Popen[str]] = []

    def start(self, program: str, *arguments: object) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, HERE / program, *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.processes.append(process)
        return process

    def node(
        self, name: str = "north", host: str = "127.0.0.1", ca: str | None = "server"
    ) -> subprocess.Popen[str]:
        """Starts a node; without `ca`, its connection is insecure."""
        authority = [] if ca is None else [self.folder / ca / "ca.pem"]
        address = f"{host}:{self.port}"
        return self.start("node_process.py", self.folder / name, address, *authority)

    @contextmanager
    def serve(self, *names: str, insecure: bool = False, **options):
        allowed = [create_node_key(self.folder / name, name) for name in names]
        with serving.serve(
            self.folder / "server",
            "127.0.0.1",
            self.port,
            certificates=None if insecure else self.certificates,
            allowed=allowed,
            **options,
        ) as link:
            yield link

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
            process.communicate()


@pytest.fixture
def federation(tmp_path):
    federation = Federation(tmp_path)
    yield federation
    federation.stop()


def wait_until(condition: Callable[[], object], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.02)


def pull(link, count: int = 1) -> list:
    replies = []

    def is_complete() -> bool:
        replies.extend(link.pull())
        return len(replies) >= count

    wait_until(is_complete)
    return replies


def test_each_node_answers_its_request(federation):
    with federation.serve("north", "south") as link:
        for name in ("north", "south"):
            federation.node(name)
        wait_until(lambda: len(link.nodes()) == 2)
        requests = {node: link.name(node).encode() for node in link.nodes()}
        link.push(requests, 30)
        assert dict(pull(link, 2)) == requests

        # Payloads of any size, from empty to tens of megabytes.
        north = next(node for node in link.nodes() if link.name(node) == "north")
        for size in (0, 1, 20_000_000):
            link.push({north: b"size %d" % size}, 60)
            assert pull(link) == [(north, bytes(size))]

        # An answer that fails is reported in a sentence, and the node goes on.
        link.push({north: b"raise"}, 30)
        assert pull(link) == [(north, "ValueError: a request for the test")]
        link.push({north: b"later"}, 30)
        assert pull(link) == [(north, b"later")]


def test_killed_node_returns_as_itself(federation):
    with federation.serve("north") as link:
        process = federation.node()
        wait_until(link.nodes)
        (node,) = link.nodes()
        identity = link.identity(node)
        link.push({node: b"sleep 30"}, 60)
        time.sleep(0.5)
        process.kill()
        process.wait()
        federation.node()
        # Flower would refuse it for a minute, so the new process signs the former one off. The
        # server may ask in between.
        ((who, sentence),) = pull(link)
        assert who == node
        assert sentence in ("The node was restarted.", "The node went offline.")
        wait_until(link.nodes)
        assert [link.identity(node) for node in link.nodes()] == [identity]
        link.push({node: b"again"}, 30)
        assert pull(link) == [(node, b"again")]


def test_killed_superlink_is_started_again(federation):
    with federation.serve("north") as link:
        federation.node()
        wait_until(link.nodes)
        (node,) = link.nodes()
        link.push({node: b"sleep 2"}, 60)
        os.kill(superlink_of(os.getpid()), signal.SIGKILL)
        assert pull(link) == [(node, "The SuperLink was restarted.")]
        wait_until(link.nodes)
        (successor,) = link.nodes()
        assert link.identity(successor) == link.identity(node)
        link.push({successor: b"again"}, 30)
        assert pull(link) == [(successor, b"again")]


def test_killed_server_ends_its_superlink_and_finds_its_nodes_again(federation):
    key = create_node_key(federation.folder / "north", "north")
    (federation.folder / "server" / "allowed").write_text(f"{key.line} north\n")
    federation.node()
    for _ in range(2):
        server = federation.start(
            "server_process.py", federation.folder / "server", federation.port
        )
        assert server.stdout is not None
        assert server.stdout.readline() == f"{key.identity} b'round'\n"
        superlink = superlink_of(server.pid)
        server.kill()
        server.wait()
        wait_until(partial(has_ended, superlink), 5)


def has_ended(process_id: int) -> bool:
    """Returns whether a process has ended; it may stay as a zombie."""
    command = ["ps", "-o", "stat=", "-p", str(process_id)]
    state = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    return not state or state.startswith("Z")


def test_silent_node_costs_the_deadline(federation):
    with federation.serve("north") as link:
        federation.node()
        wait_until(link.nodes)
        (node,) = link.nodes()
        link.push({node: b"sleep 6"}, 2)
        ((_, sentence),) = pull(link)
        assert isinstance(sentence, str)


def test_large_reply_is_refused(federation):
    with federation.serve("north", most_bytes=1_000_000) as link:
        federation.node()
        wait_until(link.nodes)
        (node,) = link.nodes()
        link.push({node: b"size 50000000"}, 5)
        ((_, sentence),) = pull(link)
        assert sentence == "The deadline passed."
        link.push({node: b"later"}, 30)
        assert pull(link) == [(node, b"later")]


def test_unknown_key_is_refused_in_a_sentence(federation):
    key = create_node_key(federation.folder / "east", "east")
    with federation.serve("north") as link:
        node = federation.node("east")
        _, error = node.communicate(timeout=30)
        assert node.returncode == 1
        assert f"does not accept the key of this node, {key.identity}; add the line of" in error
        assert not link.nodes()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"ca": "other"}, "has another certificate"),
        # Another name of 127.0.0.1, for which there is no certificate.
        ({"host": "127.1"}, "connect by a name for which the server was started"),
        ({"ca": None}, "insecure must be left out, as the server"),
    ],
)
def test_wrong_connection_is_refused_in_a_sentence(federation, options, sentence):
    create_certificates(federation.folder / "other", [])
    with federation.serve("north"):
        _, error = federation.node(**options).communicate(timeout=30)
        assert sentence in error
        assert len(error.strip().splitlines()) == 1


def test_server_without_tls_is_for_loopback(federation):
    with federation.serve("north", insecure=True) as link:
        tls = federation.node()
        _, error = tls.communicate(timeout=30)
        assert "server must have TLS" in error
        node = federation.node(ca=None)
        wait_until(link.nodes)
        node.kill()
        node.wait()
        (former,) = link.nodes()
        federation.node(ca=None)
        link.push({former: b"again"}, 30)
        assert pull(link)
        (node,) = link.nodes()
        assert link.identity(node) == link.identity(former)
    with pytest.raises(InputError, match="insecure is allowed on loopback only"):
        serving.serve(federation.folder, "0.0.0.0", 1, certificates=None).__enter__()


def test_port_must_be_free(federation):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", federation.port))
        taken.listen()
        with pytest.raises(InputError, match="port must be free"), federation.serve():
            pass


def test_folder_has_one_node(federation):
    with federation.serve("north") as link:
        federation.node()
        wait_until(link.nodes)
        _, error = federation.node().communicate(timeout=30)
        assert "a node runs in" in error
