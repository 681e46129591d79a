"""The plan: `fit` and the command print the same rows, which describe the computation."""

import numpy as np
import optax
import pytest
from rich.console import Console

import ctde_jax as ctde
from ctde_jax import train
from ctde_jax.trainer import plan

MODEL = ctde.models.mlp([64, 8, 10])


def rows(text):
    """Returns the rows of a plan by name; continuation lines of a row are joined."""
    parts, last = {}, ""
    for line in text.splitlines():
        name, value = line[:9].strip(), line[9:].strip()
        last = name or last
        parts[last] = f"{parts.get(last, '')} {value}".strip()
    return parts


@pytest.mark.slow
def test_fit_prints_the_plan_of_the_command(tmp_path, capsys):
    options = ["--devices", "4", "--hidden-sizes", "8", "--steps", "2", "--batch-size", "32"]
    assert train.main([*options, "--run-dir", str(tmp_path / "run")]) == 0
    command_rows = rows(capsys.readouterr().out)

    devices = ctde.devices.start(4)
    digits = ctde.data.digits()
    ctde.fit(MODEL, digits, optax.adam(0.008), steps=2, batch_size=32, devices=devices)
    fit_rows = rows(capsys.readouterr().out)

    assert next(iter(fit_rows)) == "devices"
    for name in ("devices", "data", "inputs", "split", "batch", "steps", "wire"):
        assert fit_rows[name] == command_rows[name]
    assert command_rows["model"] == f"mlp 64-8-10 with tanh, f32, {fit_rows['model']}"
    assert fit_rows["model"] == f"{64 * 8 + 8 + 8 * 10 + 10} parameters"


def test_fit_without_show_prints_no_plan(capsys):
    ctde.fit(MODEL, ctde.data.digits(), optax.sgd(0.1), steps=1, show=False)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {"split": "reshuffled in every epoch, 719 examples per device"}),
        ({"batch_size": 64}, {"batch": "64 examples, 32 per device"}),
        (
            {"batch_size": 64, "accumulation_steps": 4},
            {"batch": "64 examples, 32 per device in 4 microbatches"},
        ),
        (
            {"partition": [np.arange(700), np.arange(700, 1438)]},
            {"split": "partition: 700, 738 examples, fixed to their devices"},
        ),
        (
            {"partition": np.split(np.arange(1438), [100, 300, 600, 1000]), "batch_size": 8},
            {
                "split": "partition: 5 clients with 100 to 438 examples each; 2 of them, drawn at "
                "random, train in each round"
            },
        ),
        (
            {"strategy": ctde.Strategy(inner_steps=8)},
            {"strategy": "mean of the parameters after every 8 local steps"},
        ),
        ({}, {"strategy": "mean of the gradients at every step"}),
    ],
)
def test_rows_of_the_plan(options, expected):
    defaults = {
        "strategy": ctde.Strategy(),
        "task": ctde.tasks.classification,
        "devices": ctde.devices.start(2),
        "batch_size": 32,
        "steps": 3,
    }
    training = ctde.Training(MODEL, ctde.data.digits(), optax.sgd(0.1), **(defaults | options))
    screen = Console(width=200)
    with screen.capture() as captured:
        screen.print(plan(training, None))
    shown = rows(captured.get())
    assert "results" not in shown
    assert shown | expected == shown
