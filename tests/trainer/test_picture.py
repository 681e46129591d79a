"""Figures require neither a display nor a valid backend; a failure is reported in one sentence."""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import matplotlib
import numpy as np
import optax
import pytest

import ctde_jax as ctde
from ctde_jax.trainer import log, picture

pytestmark = pytest.mark.curves

ROWS = [
    {"split": "test", "step": step, "epoch": 1, "loss": 0.5, "accuracy": 1.0, "examples": 3}
    for step in (1, 2)
]


def draw():
    return log.plot_curves(ROWS)


@pytest.mark.slow
@pytest.mark.parametrize(
    "backend", ["module://matplotlib_inline.backend_inline", "module://absent", "garbage"]
)
def test_backend_of_the_environment_has_no_effect(tmp_path, backend):
    """The user's backend stays selected, and pyplot is not imported."""
    program = """
import os, sys
from pathlib import Path
from ctde_jax.trainer import log, picture
print(repr(picture.save(lambda: log.plot_curves(ROWS), Path("curves.png"))))
import matplotlib
print("matplotlib.pyplot" in sys.modules, os.environ["MPLBACKEND"], \
matplotlib.rcParams._get_backend_or_none())
"""
    environment = {
        **os.environ,
        "MPLBACKEND": backend,
        "PYTHONPATH": str(Path(ctde.__file__).parents[1]),
    }
    command = [sys.executable, "-c", program.replace("ROWS", repr(ROWS))]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout == f"''\nFalse {backend} {None if backend == 'garbage' else backend}\n"
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_warning_and_floating_point_settings_of_the_user_have_no_effect(tmp_path):
    def warn():
        warnings.warn("a glyph is missing", stacklevel=1)
        assert np.float32(1e-30) * np.float32(1e-30) == 0
        return draw()

    with warnings.catch_warnings(action="error"), np.errstate(all="raise"):
        assert picture.save(warn, tmp_path / "curves.png") == ""


def test_unwritable_picture_is_reported_in_one_sentence():
    assert picture.save(draw, Path("/dev/full")) == (
        "could not write /dev/full (No space left on device); nothing else depends on this file."
    )


def test_run_returns_its_result_if_drawing_fails(digits, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(matplotlib.rcParams, "figure.figsize", (4, 3))
    monkeypatch.setattr(log, "plot_curves", lambda rows: 1 / 0)
    devices = ctde.devices.start(1)
    fit = {"devices": devices, "batch_size": 64, "steps": 2, "run_dir": tmp_path}
    assert ctde.fit(ctde.models.mlp([64, 10]), digits, optax.sgd(0.1), **fit).step == 2
    sentence = f"could not write {tmp_path / 'curves.png'} (ZeroDivisionError: division by zero)"
    assert sentence in capsys.readouterr().out
