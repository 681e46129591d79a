"""The command `python -m ctde_jax.export`: what a run has trained, as a bundle that executes
anywhere.

    python -m ctde_jax.export RUN                            # writes RUN/bundle
    python -m ctde_jax.export RUN --formats onnx onnx-int8   # in these forms alone
    python -m ctde_jax.export RUN --web FOLDER               # and a page that runs the model
                                                             # in a browser

RUN is the folder of a run of python -m ctde_jax.train, of which its newest checkpoint is meant,
or of one checkpoint.
"""

import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.filesize import decimal
from rich.table import Table

from ctde_jax import config
from ctde_jax.bundle import Parser, run, streams
from ctde_jax.config import load
from ctde_jax.export.web import check_page, write_page
from ctde_jax.export.write import DEFAULT, FORMATS, Written, write_bundle
from ctde_jax.trainer import console


def main(arguments: Sequence[str]) -> int:
    """Writes a bundle according to the options; returns the exit status, 2 for invalid input."""
    return run(
        lambda: _export(_parse(arguments)),
        names={"run_dir": "RUN", "folder": "--to", "data": "the data"},
    )


def _parse(arguments: Sequence[str]) -> Namespace:
    parser = Parser("ctde_jax.export", __doc__ or "")
    parser.add_argument(
        "run", type=Path, metavar="RUN", help="the folder of a run or of a checkpoint"
    )
    parser.add_argument(
        "--to",
        type=Path,
        metavar="FOLDER",
        help="the bundle; by default bundle in the run's folder",
    )
    parser.add_argument(
        "--formats",
        nargs="+",
        default=list(DEFAULT),
        metavar="NAME",
        help=f"of {', '.join(FORMATS)}; by default those of f32",
    )
    parser.add_argument(
        "--web", type=Path, metavar="FOLDER", help="for a page of static files that runs the model"
    )
    parser.add_argument(
        "--examples", type=int, default=100, metavar="N", help="test examples that go along (100)"
    )
    for name, what in (("--data-dir", "folder"), ("--data-file", "file")):
        parser.add_argument(
            name, metavar=what.upper(), help=f"the {what} of the data, where it has moved"
        )
    return parser.parse_args(arguments)


def _export(chosen: Namespace) -> None:
    # Checked first, so that a page that cannot be written is reported before the model is exported.
    if chosen.web is not None:
        check_page(chosen.web, chosen.formats)

    moved = [("--data-dir", chosen.data_dir), ("--data-file", chosen.data_file)]
    trained, data, options = load.load_run(
        chosen.run, [f"{name}={value}" for name, value in moved if value is not None]
    )

    # The card records the options that affect the numbers of the run.
    said = config.deciding(options)
    folder = chosen.to or load.folder_of(chosen.run) / "bundle"
    written = write_bundle(
        trained, data, folder, chosen.formats, examples=chosen.examples, options={"options": said}
    )

    # The sum of the card is printed so that a node can require it with --expect.
    screen = console()
    screen.print(_table(written))
    for name, reason in written.left_out.items():
        screen.print(f"left out   {name}: {reason}")
    screen.print(f"bundle     {folder}")
    if chosen.web is not None:
        screen.print(
            f"page       {write_page(written.bundle, chosen.web)}; "
            f"python -m http.server -d {chosen.web}"
        )
    screen.print(
        f"sha256     {written.bundle.sha256}, of its card; "
        f"--expect {written.bundle.sha256[:12]} insists on it"
    )


def _table(written: Written) -> Table:
    """Returns a table of the receipts, one row per format."""
    facts = written.bundle.card.facts
    trained = facts["trained_model"]
    rows = Table(title=f"after {facts['training']['step']:,} steps")

    # Two measures at most: with them the table fits into 80 columns.
    measures = list(trained["measured"])[:2]
    for name in ("runtime", "size", "differs", *measures, "ms of 1", "of 32"):
        rows.add_column(name, justify="left" if name == "runtime" else "right")

    def add(name: str, size: str, difference: str, said: Mapping[str, Any]) -> None:
        measured = [f"{said['measured'][measure]:.4f}" for measure in measures]
        # Quartiles of a call: index 1 is the median.
        taken = [said["milliseconds"][batch][1] for batch in ("1", "32")]
        rows.add_row(
            name, size, difference, *measured, *(f"{ms:.{3 if ms < 10 else 1}f}" for ms in taken)
        )

    add("trained (jit)", "", "", trained)
    for name, artifact in written.bundle.card.artifacts.items():
        said = artifact.receipt
        add(name, decimal(said["bytes"]), f"{said['relative']:.1e}", said)
    return rows


if __name__ == "__main__":
    sys.exit(streams.run(main))
