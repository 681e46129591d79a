"""Long runs on fake devices neither hang nor abort, and their memory does not grow."""

import os
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from ctde_jax import checkpoint

STEPS, STEPS_OF_HOSTS = 30_000, 10_000
PERIODS = ["--log-every", "500", "--eval-every", "2000", "--save-every", "1000"]


def resident(pid: int) -> int:
    """Returns the resident memory of a process in bytes."""
    pages = Path(f"/proc/{pid}/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


requires_linux = pytest.mark.skipif(
    not Path("/proc/self/statm").exists(),
    reason="needs /proc/self/statm of Linux",
)


@pytest.mark.slow
@requires_linux
def test_memory_is_bounded_on_eight_fake_devices(tmp_path):
    """With rows, evaluations and checkpoints; memory grows by under 5 % after 20 % of the run."""
    command = [
        sys.executable,
        "-m",
        "ctde_jax.train",
        "--devices",
        "8",
        "--steps",
        str(STEPS),
        *PERIODS,
    ]
    sizes = []
    with subprocess.Popen(
        [*command, "--run-dir", str(tmp_path)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        while process.poll() is None:
            try:
                process.wait(0.5)
            except subprocess.TimeoutExpired:
                sizes.append(
                    (checkpoint.steps(tmp_path / "checkpoints")[:1], resident(process.pid))
                )
        assert process.stderr is not None
        assert (process.returncode, process.stderr.read()) == (0, "")
    check_growth(sizes, STEPS)


def check_growth(sizes: list[tuple[list[int], int]], steps: int) -> None:
    """Compares the memory late and early in a run; `sizes` are pairs of newest step and memory."""
    early = [size for step, size in sizes if step and steps // 5 <= step[0] < steps // 2]
    late = [size for step, size in sizes if step and step[0] >= 4 * steps // 5]
    assert np.median(late) < 1.05 * np.median(early)


@pytest.mark.slow
@requires_linux
def test_memory_of_two_hosts_is_bounded(tmp_path):
    """Each has two fake devices; both end with status 0."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "ctde_jax.train",
        "--devices",
        "2",
        "--steps",
        str(STEPS_OF_HOSTS),
        *PERIODS,
    ]
    command += [
        "--coordinator",
        f"127.0.0.1:{port}",
        "--num-processes",
        "2",
        "--run-dir",
        str(tmp_path),
    ]
    with ExitStack() as stack:
        hosts = [
            stack.enter_context(
                subprocess.Popen(
                    [*command, "--process-id", str(index)],
                    env={**os.environ, "JAX_PLATFORMS": "cpu"},
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
            for index in (0, 1)
        ]
        sizes: list[list[tuple[list[int], int]]] = [[], []]
        while any(host.poll() is None for host in hosts):
            time.sleep(0.5)
            for host, sizes_of_host in zip(hosts, sizes, strict=True):
                children = Path(f"/proc/{host.pid}/task/{host.pid}/children")
                if children.exists() and (child := children.read_text().split()):
                    sizes_of_host.append(
                        (checkpoint.steps(tmp_path / "checkpoints")[:1], resident(int(child[0])))
                    )
        results = [(host.returncode, host.stderr.read()) for host in hosts]
    assert results == [(0, ""), (0, "")]
    for sizes_of_host in sizes:
        check_growth(sizes_of_host, STEPS_OF_HOSTS)
