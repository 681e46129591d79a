"""The history of a run: its rows, which `metrics.jsonl` has as JSON lines.

A *row* is a flat dict with the averages over some training steps or over an evaluation: `split`
("train", "validation" or "test"), `step`, `epoch`, `loss`, the metrics of the task, and `examples`,
the number of examples. Rows of the training split also have:

- `examples_per_second`: the mean since the start or the last evaluation;
- `time`: when the row was computed, in seconds since 1970 (Unix time);
- `bytes_sent`: bytes that each device has sent since the start;
- `skipped`: rounds skipped since the start, if `on_nonfinite` is `skip`;
- `learning_rate`: the learning rate of the row's last step, if `optax.inject_hyperparams` made the
  optimizer, as it makes those of the command. If the optimizer contains several learning rates, as
  `optax.multi_transform` may, none applies to all parameters, and none is logged;
- `gradient_norm`: the norm of the gradient in the row's last step, if the optimizer contains
  `optax.snapshot("gradient_norm", optax.tree.norm)`, as that of the command does if it clips. In
  local steps, it is the mean over the devices;
- `round`: the messages of the round, if nodes have sent them; see `nodes.server`.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from ctde_jax.bundle import open_regular
from ctde_jax.checkpoint import METRICS
from ctde_jax.devices import hosts
from ctde_jax.errors import InputError, writing_to

Row = dict[str, Any]

_LONGEST_ROW = 2**20  # bytes


class History:
    """The rows of a run, each of which host 0 writes to the file immediately.

    Made by `open_history`.
    """

    def __init__(self, rows: list[Row], folder: Path | None, file: TextIO | None):
        self.rows = rows
        self._folder = folder
        self._file = file

    def add(self, row: Row) -> None:
        """Appends a row to the history and to the file.

        Raises:
            InputError: The file cannot be written.
        """
        self.rows.append(row)
        if self._folder and self._file:
            # Flush each row: a checkpoint relies on all rows before it being in the file.
            with writing_to(self._folder):
                self._file.write(json.dumps(row) + "\n")
                self._file.flush()


@contextmanager
def open_history(folder: Path | None = None, kept: int = 0) -> Iterator[History]:
    """Opens the history of a run, and closes its file on exit.

    Args:
        folder: Folder for `metrics.jsonl`, which host 0 writes; None for no file.
        kept: Number of rows in the folder that belong to the checkpoint from which the run
            continues; later rows are removed.

    Raises:
        InputError: The folder cannot be written to, or has fewer than `kept` intact rows.
    """
    # Host 0 reads the rows that the checkpoint counts, and cuts off the rows after them.
    files: list[TextIO] = []  # empty on other hosts

    def read_kept() -> list[Row]:
        assert folder is not None
        path = folder / METRICS
        with writing_to(folder):
            rows, length = _read(path, kept) if kept else ([], 0)
            if path.exists():
                # Refuse a pipe first, because opening it for writing would wait for a reader.
                open_regular(path).close()
            file = path.open("a", encoding="utf-8")
            file.truncate(length)
        files.append(file)
        return rows

    rows = [] if folder is None else hosts.of_the_first(read_kept)
    try:
        yield History(rows, folder, files[0] if files else None)
    finally:
        for file in files:
            assert folder is not None
            with writing_to(folder):
                file.close()


def read_rows(folder: Path, count: int) -> list[Row]:
    """Returns the first `count` rows of `metrics.jsonl`, even if the file is damaged after them.

    Args:
        folder: The folder of the run.
        count: Number of rows to read.

    Raises:
        InputError: The file cannot be read, or has fewer than `count` intact rows.
    """
    return _read(folder / METRICS, count)[0]


def _read(path: Path, count: int) -> tuple[list[Row], int]:
    """Returns the first `count` rows of a file, and the length of their lines in bytes.

    Raises:
        InputError: The file cannot be read, or has fewer than `count` intact rows.
    """
    rows: list[Row] = []
    length = 0
    # The intact rows end at the first line that is not UTF-8, JSON or a row, or has no line end.
    try:
        with (
            open_regular(path) as file,
            suppress(ValueError, RecursionError),
        ):
            while len(rows) < count and (line := file.readline(_LONGEST_ROW)).endswith(b"\n"):
                row = json.loads(line)
                if not _is_row(row):
                    break
                rows.append(row)
                length += len(line)
    except OSError as error:
        raise InputError(
            "run_dir", f"must have {METRICS}, and {path} cannot be read: {error.strerror}."
        ) from error
    if len(rows) < count:
        raise InputError(
            "run_dir",
            f"must have the {count} rows in {path} that were there when its checkpoint was "
            f"written, got {len(rows)}; name another folder.",
        )
    return rows, length


def _is_row(value: object) -> bool:
    if not isinstance(value, dict):
        return False
    numbers = value.get("step"), value.get("loss")
    return isinstance(value.get("split"), str) and all(
        isinstance(number, int | float) for number in numbers
    )
