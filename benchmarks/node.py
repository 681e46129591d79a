"""What a node needs: what each runtime installs, and the time from the start of a process to its first answer.

    python benchmarks/node.py                  # builds a virtual environment for each; some minutes, and a download

The networks are the default perceptron on the digits and the convolutional network of federated averaging on pictures
of 28 x 28, both as they start, for their weights change no time. Each is executed by `python -m ctde_jax.execute` on
one example, in turns; the files were read once before, so they come out of the system's cache.
"""

import argparse
import subprocess
import sys
import time
import venv
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import optax
import points
from rich.progress import track

import ctde_jax as ctde

ROOT = Path(__file__).parents[1]
PACKAGES = {
    "numpy": ["numpy"],
    "onnx": ["numpy", "onnxruntime"],
    "jax": ["numpy", "jax", "flatbuffers"],
}
BARE = "import numpy alone"


def build(folder: Path, packages: list[str]) -> Path:
    """Installs what a node needs, this library without its dependencies among it; returns the interpreter."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    pip = [python, "-m", "pip", "install", "-q", "--no-warn-conflicts"]
    subprocess.run([*pip, "--no-deps", str(ROOT)], check=True)
    subprocess.run([*pip, *packages], check=True)
    subprocess.run([python, "-m", "pip", "uninstall", "-q", "-y", "pip", "setuptools"], check=True)
    return python


def size(folder: Path) -> float:
    """Returns the megabytes of what is installed."""
    site = next(folder.glob("lib/python*/site-packages"))
    return sum(path.stat().st_size for path in site.rglob("*") if path.is_file()) / 1e6


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


def seconds(command: list[str | Path]) -> float:
    """Runs a process to its end."""
    before = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=15)
    turns = parser.parse_args().turns
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        bundles = write_bundles(folder)
        nodes = {name: build(folder / name, PACKAGES[name]) for name in track(PACKAGES, "installing")}
        commands = {("numpy", BARE): [nodes["numpy"], "-c", "import numpy"]}
        for name, bundle in bundles.items():
            for runtime in ctde.open_bundle(bundle).card.artifacts:
                arguments = [bundle, "--input", f"{bundle}.npy", "--runtime", runtime]
                commands[runtime, name] = [nodes[runtime], "-m", "ctde_jax.execute", *arguments]
        taken = {key: [] for key in commands}
        for turn in track(range(turns + 1), "executing"):
            for key, command in commands.items():
                spent = seconds(command)
                if turn:
                    taken[key].append(spent)
        megabytes = {name: size(folder / name) for name in nodes}
    header = ["runtime", "what is installed", "MB", "model", "seconds from start to first answer"]
    rows = []
    for (runtime, name), spent in taken.items():
        installed = ", ".join(["ctde_jax", *PACKAGES[runtime]])
        rows.append([runtime, installed, f"{megabytes[runtime]:.0f}", name, points.quartiles(spent, ".3f")])
    points.publish("node", "What a node needs", header, rows, f"{turns} turns. {points.machine()}.")


if __name__ == "__main__":
    sys.exit(main())
