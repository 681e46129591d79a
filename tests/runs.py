"""Killed runs, and the parts of runs that tests compare."""

import json
from pathlib import Path

import pytest
from flax import nnx

from ctde_jax.trainer.log import Log


class Killed(BaseException):
    """Stands for the end of the process."""


class Dropping(nnx.Module):
    """Draws random numbers, and keeps batch statistics."""

    def __init__(self, rngs: nnx.Rngs):
        self.first, self.last = nnx.Linear(64, 8, rngs=rngs), nnx.Linear(8, 10, rngs=rngs)
        self.norm, self.dropout = nnx.BatchNorm(8, rngs=rngs), nnx.Dropout(0.2, rngs=rngs)

    def __call__(self, x):
        return self.last(self.dropout(self.norm(self.first(x.reshape(len(x), -1)))))


def rows(folder: Path) -> list[dict]:
    """The rows of a run, but for its speed."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [
        {k: v for k, v in json.loads(line).items() if k != "examples_per_second"} for line in lines
    ]


def killed_after(monkeypatch, lines: int, run) -> None:
    """Runs until `lines` rows have been written, and then kills the run."""
    add = Log.add

    def add_or_die(log: Log, row):
        if len(log.rows) == lines:
            raise Killed
        add(log, row)

    with monkeypatch.context() as patch:
        patch.setattr(Log, "add", add_or_die)
        with pytest.raises(Killed):
            run()
