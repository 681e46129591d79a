"""Command `python -m ctde_jax.export`: writes the trained model of a run as a bundle.

    python -m ctde_jax.export RUN                            # writes RUN/bundle
    python -m ctde_jax.export RUN --formats onnx onnx-int8   # writes these formats only
    python -m ctde_jax.export RUN --web FOLDER               # also writes a page that runs the
                                                             # model in a browser

RUN is the folder of a run of python -m ctde_jax.train, or the folder of one checkpoint. Of a run,
the newest checkpoint is exported; with --patience, the parameters of the lowest validation loss.
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
    """Writes a bundle according to the options.

    Args:
        arguments: Arguments of the command line.

    Returns:
        The exit status: 0, or 2 for invalid input.
    """
    return run(
        lambda: _export(_parse(arguments)),
        names={"run_dir": "RUN", "folder": "--to", "data": "the data"},
    )


def _parse(arguments: Sequence[str]) -> Namespace:
    parser = Parser("ctde_jax.export", __doc__ or "")
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run or of a checkpoint")
    parser.add_argument(
        "--to",
        type=Path,
        metavar="FOLDER",
        help="folder to write the bundle to (default: bundle in the run folder)",
    )
    parser.add_argument(
        "--formats",
        nargs="+",
        default=list(DEFAULT),
        metavar="NAME",
        help=f"one or more of {', '.join(FORMATS)} (default: {' '.join(DEFAULT)})",
    )
    parser.add_argument(
        "--web",
        type=Path,
        metavar="FOLDER",
        help="folder to write a page to, static files that run the model in a browser",
    )
    parser.add_argument(
        "--examples",
        type=int,
        default=100,
        metavar="N",
        help="maximum number of test examples in the bundle (default: 100)",
    )
    for name, kind in (("--data-dir", "folder"), ("--data-file", "file")):
        parser.add_argument(
            name, metavar=kind.upper(), help=f"{kind} of the data, if it has moved since the run"
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

    # The card records the options that determine the result of the run.
    recorded = config.deciding(options)
    folder = chosen.to or load.folder_of(chosen.run) / "bundle"
    written = write_bundle(
        trained,
        data,
        folder,
        chosen.formats,
        examples=chosen.examples,
        options={"options": recorded},
    )

    # The SHA-256 of the card is printed, so that a node can require it with --expect.
    screen = console()
    screen.print(_table(written))
    for name, reason in written.left_out.items():
        screen.print(f"left out   {name}: {reason}")
    screen.print(f"bundle     {folder}")
    if chosen.web is not None:
        screen.print(
            f"page       {write_page(written.bundle, chosen.web)}; serve it with "
            f"python -m http.server -d {chosen.web}"
        )
    screen.print(
        f"sha256     {written.bundle.sha256} of card.json; to require it on a node: "
        f"--expect {written.bundle.sha256[:12]}"
    )


def _table(written: Written) -> Table:
    """Returns a table of the receipts: a row for the trained model, and one for each format."""
    facts = written.bundle.card.facts
    trained = facts["trained_model"]
    rows = Table(
        title=f"model after {facts['training']['step']:,} steps",
        caption="difference: maximum, from the trained model; ms (n): median for n examples",
        caption_justify="left",
    )

    # Two measures at most: with them the table fits into 80 columns.
    measures = list(trained["measured"])[:2]
    for name in ("runtime", "size", "difference", *measures, "ms (1)", "ms (32)"):
        rows.add_column(name, justify="left" if name == "runtime" else "right")

    def add(name: str, size: str, difference: str, receipt: Mapping[str, Any]) -> None:
        measured = [f"{receipt['measured'][measure]:.4f}" for measure in measures]
        # Quartiles of a call: index 1 is the median.
        medians = [receipt["milliseconds"][batch][1] for batch in ("1", "32")]
        rows.add_row(
            name, size, difference, *measured, *(f"{ms:.{3 if ms < 10 else 1}f}" for ms in medians)
        )

    add("trained (jit)", "", "", trained)
    for name, artifact in written.bundle.card.artifacts.items():
        receipt = artifact.receipt
        add(name, decimal(receipt["bytes"]), f"{receipt['relative']:.1e}", receipt)
    return rows


if __name__ == "__main__":
    sys.exit(streams.run(main))
