"""What a node needs: what each runtime installs, and the time from the start of a process to its first answer.

    python benchmarks/node.py                  # builds a virtual environment for each; some minutes, and a download

The networks are the default perceptron on the digits and the convolutional network of federated averaging on pictures
of 28 x 28, both as they start, for their weights change no time. Each is executed by `python -m ctde_jax.execute` on
one example, in turns; the files were read once before, so they come out of the system's cache.
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
    """Installs what a node needs, this library without its dependencies among it; returns the interpreter."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    pip = [python, "-m", "pip", "install", "-q", "--no-warn-conflicts"]
    subprocess.run([*pip, "--no-deps", str(ROOT)], check=True)
    subprocess.run([*pip, *packages], check=True)
    subprocess.run([python, "-m", "pip", "uninstall", "-q", "-y", "pip", "setuptools"], check=True)
    return python


def megabytes(folder: Path) -> int:
    """Returns the size of what is installed."""
    site = next(folder.glob("lib/python*/site-packages"))
    return round(sum(path.stat().st_size for path in site.rglob("*") if path.is_file()) / 1e6)


def write_bundles(folder: Path) -> dict[str, Path]:
    """Writes a perceptron and a convolutional network."""
    digits = ctde.data.digits()
    few = ctde.data.Split(*(array[:64] for array in digits.test))
    pictures = np.random.default_rng(0).integers(0, 256, (64, 28, 28)).astype(np.uint8)
    large = ctde.data.from_arrays(pictures, np.arange(64) % 10)
    models = {
        "mlp 64-128-10": (ctde.models.mlp([64, 128, 10]), replace(digits, test=few)),
        "cnn, 1.66 M parameters": (ctde.models.cnn((28, 28), 10), large),
    }
    found = {}
    for name, (model, data) in models.items():
        options = {"devices": ctde.devices.start(1), "batch_size": 32, "steps": 1, "show": False}
        trained = ctde.fit(model, data, optax.sgd(0.0), **options)
        found[name] = folder / name.split()[0]
        ctde.write_bundle(trained, data, found[name], show=False)
        np.save(f"{found[name]}.npy", data.test.inputs[:1])
    return found


def timed(*command: str | Path) -> Callable[[], float]:
    """Returns a function that runs a process to its end."""

    def run() -> float:
        with started(command) as process:
            return process.wait()

    return run


def main(turns: int = 15, report: bool = False, results: Path = RESULTS) -> None:
    """Measures all, instead of what was measured before.

    Args:
        turns: Turns of each contestant.
        report: Only show what has been measured.
        results: Folder for node.jsonl and .md.
    """
    log = Log(results / "node.jsonl")
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
    rows, measured = [], max((len(row.get("seconds", ())) for row in log.find()), default=0)
    for row in log.find():
        packages, seconds = ", ".join(["ctde_jax", *PACKAGES[row["runtime"]]]), row.get("seconds")
        answered = spread(seconds, ".3f") if seconds else row["failed"]
        rows.append([row["runtime"], packages, str(row["megabytes"]), row["model"], answered])
    publish(
        results / "node.md",
        [Table("What a node needs", HEADER, rows)],
        f"{measured} turns. {machine()}.",
    )


if __name__ == "__main__":
    command_line(main)
