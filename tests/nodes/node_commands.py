"""The commands `serve` and `node` as processes, with TLS and keys, for tests."""

import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from json import loads
from pathlib import Path

from ctde_jax.nodes.certificates import create_certificates
from ctde_jax.nodes.flower.processes import find_port
from ctde_jax.nodes.keys import create_node_key

LIMIT = 600.0  # seconds, for a busy machine


def wait_until(condition: Callable[[], object], seconds: float = LIMIT) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.02)


def superlink_of(process_id: int) -> int:
    """Returns the process of the SuperLink that a process has started."""
    # -ww: without it, the arguments end at the width of the screen.
    command = ["ps", "-ww", "-A", "-o", "pid=,ppid=,args="]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    rows = [line.split(maxsplit=2) for line in listed.splitlines()]
    return next(
        int(process)
        for process, parent, arguments in rows
        if int(parent) == process_id and "ctde_jax.nodes.flower.superlink" in arguments
    )


class Commands:
    """A server and nodes, each with a log of all its starts."""

    def __init__(self, folder: Path, names: Sequence[str], options: Sequence[str]):
        self.folder = folder
        self.run_dir = folder / "server"
        self.options = options
        self.address = f"127.0.0.1:{find_port()}"
        self.authority = create_certificates(folder / "server" / "certificates", []).authority
        lines = [create_node_key(folder / name, name).line + f" {name}" for name in names]
        (folder / "allowed").write_text("\n".join(lines) + "\n")
        self.running: dict[str, subprocess.Popen] = {}

    def serve(self, program: Sequence[str] = ("-m", "ctde_jax.serve")) -> subprocess.Popen:
        """Starts the server."""
        port = self.address.rpartition(":")[2]
        listening = ["--port", port, "--allow", str(self.folder / "allowed")]
        arguments = [*listening, *self.options, "--run-dir", str(self.run_dir)]
        return self._start("server", [*program, *arguments])

    def node(self, name: str, *arguments: str, authority: Path | None = None) -> subprocess.Popen:
        """Starts a node, with the certificate of the server unless another one is given."""
        own = ["--folder", str(self.folder / name), "--name", name]
        server = ["--server", self.address, "--authority", str(authority or self.authority)]
        return self._start(name, ["-m", "ctde_jax.node", *own, *server, *arguments])

    def log(self, name: str) -> str:
        """Returns all that the processes of this name have printed, each entry on one line."""
        return (self.folder / f"{name}.log").read_text()

    def rounds(self) -> list[dict]:
        """Returns the rows of closed rounds."""
        file = self.run_dir / "metrics.jsonl"
        lines = file.read_text().splitlines(keepends=True) if file.exists() else []
        rows = [loads(line) for line in lines if line.endswith("\n")]
        return [row for row in rows if row["split"] == "train"]

    def kill(self, name: str) -> None:
        self.running[name].kill()
        self.running[name].wait()

    def stop(self) -> None:
        for process in self.running.values():
            process.kill()
            process.wait()

    def fill_disk(self, name: str) -> None:
        """Lets each write of a file of more than 20 kB fail, as on a full disk."""
        self._limit_files(name, 20_000)

    def free_disk(self, name: str) -> None:
        self._limit_files(name, resource.RLIM_INFINITY)

    def superlink(self) -> int:
        """Returns the process of the SuperLink of the server."""
        return superlink_of(self.running["server"].pid)

    def _limit_files(self, name: str, size: int) -> None:
        process = self.running[name].pid
        hard = resource.prlimit(process, resource.RLIMIT_FSIZE)[1]
        resource.prlimit(process, resource.RLIMIT_FSIZE, (size, hard))

    def _start(self, name: str, arguments: list[str]) -> subprocess.Popen:
        with (self.folder / f"{name}.log").open("ab") as log:
            self.running[name] = subprocess.Popen(
                [sys.executable, "-P", *arguments],
                stdout=log,
                stderr=log,
                # rich breaks lines at the width of the terminal.
                env={**os.environ, "JAX_PLATFORMS": "cpu", "COLUMNS": "500"},
            )
        return self.running[name]
