"""The process of a SuperLink, which ends with the process that started it."""

import os
import secrets
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from ctde_jax.errors import InputError, shortened
from ctde_jax.nodes.certificates import Certificates

_START = 60.0  # seconds that a busy machine may need to import Flower


class SuperLinkKilled(Exception):
    """Raised if a signal ended a SuperLink before it listened; another one may start."""


class SuperLink:
    """Starts a SuperLink and waits until it listens.

    Args:
        folder: Folder of the log, `superlink.log`, which each start replaces.
        host: Address to listen on, such as 0.0.0.0.
        port: Port to listen on.
        certificates: Certificates of the server; None for connections without TLS.
        most_bytes: Largest request of a node, in bytes; a larger one is refused.

    Raises:
        InputError: If the port is in use, or if the SuperLink does not start.
        SuperLinkKilled: If a signal ended the SuperLink.
    """

    def __init__(
        self,
        folder: Path,
        host: str,
        port: int,
        certificates: Certificates | None,
        most_bytes: int,
    ):
        _check_free(host, port)
        self.secret = secrets.token_hex(32)
        self._log = folder / "superlink.log"
        command = [sys.executable, "-P", "-m", "ctde_jax.nodes.flower.superlink"]
        command += ["--host", host, "--port", str(port), "--most-bytes", str(most_bytes)]
        if certificates is not None:
            paths = (certificates.authority, certificates.certificate, certificates.key)
            command += ["--certificates", *map(str, paths)]
        with self._log.open("wb") as log:
            # A session for itself, so that Ctrl-C in a terminal reaches the server alone, which
            # then closes the pipe.
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env={**os.environ, "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"},
            )
        pipe = self._process.stdin
        assert pipe is not None
        # If it is killed already, the pipe is broken.
        with suppress(BrokenPipeError):
            pipe.write(f"{self.secret}\n".encode())
            pipe.flush()
        self._wait_until_listening(reachable(host), port)

    @property
    def is_alive(self) -> bool:
        """Whether the process runs."""
        return self._process.poll() is None

    def has_ended(self, seconds: float) -> bool:
        """Returns whether the process has ended, or ends within this time."""
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def stop(self) -> None:
        """Ends the process."""
        if self._process.stdin is not None:
            with suppress(BrokenPipeError):
                self._process.stdin.close()
        self._process.kill()
        self._process.wait()

    def _wait_until_listening(self, host: str, port: int) -> None:
        end = time.monotonic() + _START
        while self.is_alive and time.monotonic() < end:
            try:
                socket.create_connection((host, port), timeout=1).close()
                return
            except OSError:
                time.sleep(0.05)
        if self._process.returncode is not None and self._process.returncode < 0:
            raise SuperLinkKilled(f"Signal {-self._process.returncode} ended the SuperLink.")
        self.stop()
        lines = self._log.read_text(errors="replace").split("\n")
        last = next((line for line in reversed(lines) if line.strip()), "no message")
        raise InputError("port", f"must be one that Flower can serve, but: {shortened(last)}")


def find_port() -> int:
    """Returns a port of loopback that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _check_free(host: str, port: int) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        # As the SuperLink does, so a port of a former process that is still closing is free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise InputError(
                "port", f"must be free, but {host}:{port} is not: {error.strerror}."
            ) from None


def reachable(host: str) -> str:
    """Returns an address by which this machine reaches a socket that listens on `host`."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
