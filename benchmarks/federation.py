"""A federation for benchmarks: the commands `serve` and `node` as processes on loopback."""

import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from json import loads
from pathlib import Path

from harness import Row

from ctde_jax import checkpoint
from ctde_jax.nodes.flower.processes import find_port
from ctde_jax.nodes.keys import create_node_key

SERVER = "server"


class Federation:
    """A server and nodes, each of which is started again by the same command if it was killed.

    Connections have TLS, and the server accepts the keys of these nodes only.

    Args:
        folder: Folder for all of them.
        nodes: Number of nodes; each has an equal part of the digits.
        options: Further options of `python -m ctde_jax.serve`.
        address: `host:port` of the server; by default, a free port of loopback.
    """

    def __init__(
        self, folder: Path, nodes: int, options: Sequence[str], address: str | None = None
    ):
        self.run_dir = folder / SERVER
        self.authority = self.run_dir / "certificates" / "ca.pem"
        self.nodes = [f"node-{number}" for number in range(1, nodes + 1)]
        self.address = address or f"127.0.0.1:{find_port()}"
        self._folder = folder
        self._running: dict[str, subprocess.Popen] = {}
        lines = [create_node_key(folder / name, name).line for name in self.nodes]
        allowed = folder / "allowed"
        allowed.write_text("\n".join(lines) + "\n")

        # Indices are given, so that the first node to join does not get the first part of another.
        port = self.address.rpartition(":")[2]
        serve = ["ctde_jax.serve", "--port", port, "--allow", str(allowed), *options]
        self._commands = {SERVER: [*serve, "--run-dir", str(self.run_dir)]}
        for index, name in enumerate(self.nodes):
            node = ["ctde_jax.node", "--server", self.address, "--authority", str(self.authority)]
            node += ["--folder", str(self.folder_of(name)), "--name", name, "--index", str(index)]
            self._commands[name] = [*node, "--part", f"{index + 1}/{nodes}"]

    def start(self, name: str) -> None:
        """Starts the server or a node; each start appends to the same log."""
        with self._log(name).open("ab") as log:
            self._running[name] = subprocess.Popen(
                [sys.executable, "-P", "-m", *self._commands[name]],
                stdout=log,
                stderr=log,
                env={**os.environ, "JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""},
                # A group, so that a benchmark that is terminated ends it as a whole.
                start_new_session=True,
            )

    def wait_for_authority(self, limit: float) -> None:
        """Waits until the server has its certificates, of which nodes need one."""
        end = time.monotonic() + limit
        while not self.authority.exists():
            assert time.monotonic() < end, self.last_words(SERVER)
            time.sleep(0.05)

    def folder_of(self, name: str) -> Path:
        """Returns the folder of a node."""
        return self._folder / name

    def kill(self, name: str) -> None:
        """Sends SIGKILL to the server or a node, and waits for its end."""
        self._running[name].kill()
        self._running[name].wait()

    def status(self, name: str) -> int | None:
        """Returns the exit status of the server or a node, or None while it runs."""
        return self._running[name].poll()

    def superlink(self) -> int | None:
        """Returns the id of the process of the SuperLink, or None if there is none at present."""
        command = ["ps", "-ww", "-A", "-o", "pid=,ppid=,args="]
        listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        parent = self._running[SERVER].pid
        for line in listed.splitlines():
            process, its_parent, arguments = line.split(maxsplit=2)
            if int(its_parent) == parent and "nodes.flower.superlink" in arguments:
                return int(process)
        return None

    def last_words(self, name: str) -> str:
        """Returns the last line that the server or a node has printed."""
        lines = self._log(name).read_text(errors="replace").split("\n")
        return next((line for line in reversed(lines) if line.strip()), "no message")[:300]

    def rows(self) -> list[Row]:
        """Returns the rows of the run of the server; the last line may be incomplete."""
        file = self.run_dir / checkpoint.METRICS
        lines = file.read_text().splitlines(keepends=True) if file.exists() else []
        return [loads(line) for line in lines if line.endswith("\n")]

    def rounds(self) -> list[int]:
        """Returns the last steps of the rounds, in the order of the rows."""
        return [row["step"] for row in self.rows() if row["split"] == "train"]

    def has_bundle(self, name: str) -> bool:
        """Returns whether a node has the bundle of the server."""
        cards = [folder / "bundle" / "card.json" for folder in (self.run_dir, self._folder / name)]
        return (
            all(card.exists() for card in cards) and len({card.read_bytes() for card in cards}) == 1
        )

    def digest(self) -> str:
        """Returns the SHA-256 of the bits of all tensors in the newest checkpoint."""
        found = checkpoint.newest_intact(self.run_dir / checkpoint.CHECKPOINTS, print)
        assert found is not None
        digest = hashlib.sha256()
        for name, tensor in sorted(found.tensors.items()):
            digest.update(f"{name} {tensor.dtype} {tensor.shape}".encode())
            digest.update(tensor.tobytes())
        return digest.hexdigest()

    def stop(self) -> None:
        """Ends all processes. A SuperLink ends with its server."""
        for process in self._running.values():
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def _log(self, name: str) -> Path:
        return self._folder / f"{name}.log"


@contextmanager
def running(folder: Path, nodes: int, options: Sequence[str], limit: float) -> Iterator[Federation]:
    """Starts a server, then its nodes, and ends them on exit.

    Args:
        folder: As of `Federation`.
        nodes: As of `Federation`.
        options: As of `Federation`.
        limit: Seconds in which the server must have its certificates.
    """
    federation = Federation(folder, nodes, options)
    try:
        federation.start(SERVER)
        federation.wait_for_authority(limit)
        for name in federation.nodes:
            federation.start(name)
        yield federation
    finally:
        federation.stop()
