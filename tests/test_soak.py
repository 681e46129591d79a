"""Long runs on fake devices neither hang nor abort, and do not grow."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ctde_jax import checkpoint

STEPS = 100_000


def resident(process: subprocess.Popen) -> int:
    """Bytes of memory that a process has now."""
    pages = Path(f"/proc/{process.pid}/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
@pytest.mark.skipif(
    not Path("/proc/self/statm").exists(), reason="needs Linux, which says how much memory a process has"
)
def test_100_000_steps_on_eight_fake_devices(tmp_path):
    """With rows, evaluations and checkpoints; from a fifth of the run on, memory grows by less than 5 %."""
    often = ["--log-every", "500", "--eval-every", "2000", "--save-every", "5000"]
    command = [sys.executable, "-m", "ctde_jax.train", "--devices", "8", "--steps", str(STEPS), *often]
    sizes = []
    with subprocess.Popen(
        [*command, "--run-dir", str(tmp_path)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        while process.poll() is None:
            try:
                process.wait(0.5)
            except subprocess.TimeoutExpired:
                sizes.append((checkpoint.steps(tmp_path / "checkpoints")[:1], resident(process)))
        assert process.stderr is not None
        assert (process.returncode, process.stderr.read()) == (0, "")
    early = [size for step, size in sizes if step and STEPS // 5 <= step[0] < STEPS // 2]
    late = [size for step, size in sizes if step and step[0] >= 4 * STEPS // 5]
    assert np.median(late) < 1.05 * np.median(early)
