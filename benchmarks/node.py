"""Requirements of a node: installed size of each runtime, and time from start to first answer.

    python benchmarks/node.py        # one virtual environment per runtime; minutes and a download

The networks are the default perceptron on the digits and the convolutional network of federated
averaging on images of 28 x 28, both untrained, because weights do not affect the time. Each is
executed in turns by `python -m ctde_jax.execute` on one example; the files have been read once
before, so they come from the page cache.
"""

import subprocess
import venv
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import optax
from harness import (
    RESULTS,
    Log,
    Row,
    Table,
    command_line,
    machine,
    publish,
    spread,
    started,
    take_turns,
)
from rich.progress import track

import ctde_jax as ctde

ROOT = Path(__file__).parents[1]
PACKAGES = {
    "numpy": ["numpy"],
    "onnx": ["numpy", "onnxruntime"],
    "jax": ["numpy", "jax", "flatbuffers"],
}
HEADER = ("runtime", "what is installed", "MB", "model", "seconds from start to first answer")


def build(folder: Path, packages: list[str]) -> Path:
    """Installs packages and this library without its dependencies; returns the interpreter."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    pip = [python, "-m", "pip", "install", "-q", "--no-warn-conflicts"]
    subprocess.run([*pip, "--no-deps", str(ROOT)], check=True)
    subprocess.run([*pip, *packages], check=True)
    # A node does not need pip, whose size would count.
    subprocess.run([python, "-m", "pip", "uninstall", "-q", "-y", "pip", "setuptools"], check=True)
    return python


def megabytes(folder: Path) -> int:
    """Returns the size of the installed packages in MB (1e6 bytes)."""
    site = next(folder.glob("lib/python*/site-packages"))
    return round(sum(path.stat().st_size for path in site.rglob("*") if path.is_file()) / 1e6)


def write_bundles(folder: Path) -> dict[str, Path]:
    """Writes the bundles of a perceptron and a convolutional network; returns folders by name."""
    digits = ctde.data.digits()
    # A small test split keeps the evaluation short.
    few = ctde.data.Split(*(array[:64] for array in digits.test))
    pictures = np.random.default_rng(0).integers(0, 256, (64, 28, 28)).astype(np.uint8)
    large = ctde.data.from_arrays(pictures, np.arange(64) % 10)
    models = {
        "mlp 64-128-10": (ctde.models.mlp([64, 128, 10]), replace(digits, test=few)),
        "cnn, 1.66 M parameters": (ctde.models.cnn((28, 28), 10), large),
    }
    found = {}
    for name, (model, data) in models.items():
        # One step at learning rate 0, so that the bundle holds the initial weights.
        options = {"devices": ctde.devices.start(1), "batch_size": 32, "steps": 1, "show": False}
        trained = ctde.fit(model, data, optax.sgd(0.0), **options)
        found[name] = folder / name.split()[0]
        ctde.write_bundle(trained, data, found[name], show=False)
        np.save(f"{found[name]}.npy", data.test.inputs[:1])
    return found


def timed(*command: str | Path) -> Callable[[], float]:
    """Returns a function that runs a process to its end and returns its seconds."""

    def run() -> float:
        with started(command) as process:
            return process.wait()

    return run


def main(turns: int = 15, report: bool = False, results: Path = RESULTS) -> None:
    """Measures all runtimes, and replaces earlier results.

    Args:
        turns: Number of turns of each contestant.
        report: Show earlier results without measuring.
        results: Folder for node.jsonl and .md.
    """
    log = Log(results / "node.jsonl")
    # Build the environments, and let the runtimes answer in turns.
    if not report:
        log.file.unlink(missing_ok=True)
        with TemporaryDirectory() as temporary:
            folder = Path(temporary)
            bundles = write_bundles(folder)
            nodes = {
                name: build(folder / name, PACKAGES[name]) for name in track(PACKAGES, "installing")
            }
            installed = {
                name: {"runtime": name, "megabytes": megabytes(folder / name)} for name in nodes
            }
            # The lower bound: a process that only imports numpy.
            bare = installed["numpy"] | {"model": "import numpy alone"}
            contestants: list[tuple[Row, Callable[[], float]]] = [
                (bare, timed(nodes["numpy"], "-c", "import numpy"))
            ]
            for name, bundle in bundles.items():
                for runtime in ctde.open_bundle(bundle).card.artifacts:
                    arguments = [bundle, "--input", f"{bundle}.npy", "--runtime", runtime]
                    run = timed(nodes[runtime], "-m", "ctde_jax.execute", *arguments)
                    contestants.append((installed[runtime] | {"model": name}, run))
            take_turns(log, contestants, turns)

    # Report what the log has.
    rows = []
    measured = max((len(row.get("seconds", ())) for row in log.find()), default=0)
    for row in log.find():
        packages = ", ".join(["ctde_jax", *PACKAGES[row["runtime"]]])
        seconds = row.get("seconds")
        answered = spread(seconds, ".3f") if seconds else row["failed"]
        rows.append([row["runtime"], packages, str(row["megabytes"]), row["model"], answered])
    publish(
        results / "node.md",
        [Table("What a node needs", HEADER, rows)],
        f"{measured} turns. {machine()}.",
    )


if __name__ == "__main__":
    command_line(main)
