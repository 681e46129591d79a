"""Federations of real processes that are killed, and of nodes that leave and come back.

    python benchmarks/nodes.py kills      # resumable; half an hour
    python benchmarks/nodes.py absence    # resumable
    python benchmarks/nodes.py kills --report

See `nodes_kills.py` and `nodes_absence.py`. All processes are on this machine, and communicate over
loopback with TLS and keys.
"""

from pathlib import Path
from typing import Annotated, Literal

import nodes_absence
import nodes_kills
import tyro
from harness import RESULTS, Log, command_line

BENCHMARKS = {"kills": nodes_kills, "absence": nodes_absence}


def main(
    name: Annotated[Literal["kills", "absence"], tyro.conf.Positional],
    report: bool = False,
    results: Path = RESULTS,
) -> None:
    """Measures what is missing in the log, and writes the tables.

    Args:
        name: Name of the benchmark.
        report: Show earlier results without measuring.
        results: Folder for nodes_NAME.jsonl and .md.
    """
    benchmark = BENCHMARKS[name]
    log = Log(results / f"nodes_{name}.jsonl")
    if not report:
        benchmark.measure(log)
    benchmark.report(log, results / f"nodes_{name}.md")


if __name__ == "__main__":
    command_line(main, nodes_absence.measure_point)
