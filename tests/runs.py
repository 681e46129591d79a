"""Killed runs, and the parts of runs that tests compare."""

import json
from pathlib import Path

import pytest
from flax import nnx

from ctde_jax.trainer.log import Log


class Killed(BaseException):
    """Represents the end of the process."""


class DropoutNet(nnx.Module):
    """A network with dropout and batch statistics."""

    def __init__(self, rngs: nnx.Rngs):
        self.first, self.last = nnx.Linear(64, 8, rngs=rngs), nnx.Linear(8, 10, rngs=rngs)
        self.norm, self.dropout = nnx.BatchNorm(8, rngs=rngs), nnx.Dropout(0.2, rngs=rngs)

    def __call__(self, x):
        return self.last(self.dropout(self.norm(self.first(x.reshape(len(x), -1)))))


def rows(folder: Path) -> list[dict]:
    """Returns the rows of a run without speed and time."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [
        {k: v for k, v in json.loads(line).items() if k not in ("examples_per_second", "time")}
        for line in lines
    ]


def killed_after(monkeypatch, lines: int, run) -> None:
    """Runs until `lines` rows have been written, and then kills the run."""
    add = Log.add

    def add_or_kill(log: Log, row):
        if len(log.rows) == lines:
            raise Killed
        add(log, row)

    with monkeypatch.context() as patch:
        patch.setattr(Log, "add", add_or_kill)
        with pytest.raises(Killed):
            run()
