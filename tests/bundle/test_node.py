"""A virtual environment with Python, numpy and optionally ONNX Runtime runs trained models.

Its packages are links to those of the tests, so that nothing is downloaded.
"""

import subprocess
import sys
import time
import venv
from collections.abc import Sequence
from importlib.metadata import distribution
from pathlib import Path

import bundles
import numpy as np
import pytest

pytestmark = pytest.mark.slow
PACKAGE = Path(__file__).parents[2] / "ctde_jax"


def build(folder: Path, *packages: str) -> Path:
    """Creates an environment with these packages and this library; returns its interpreter."""
    venv.create(folder, symlinks=True)
    site = next(folder.glob("lib/python*/site-packages"))
    for name in packages:
        files = distribution(name).files or []
        for top in {file.parts[0] for file in files} - {"..", "__pycache__"}:
            (site / top).symlink_to(distribution(name).locate_file(top))
    (site / "ctde_jax").symlink_to(PACKAGE)
    return folder / "bin" / "python"


@pytest.fixture(scope="module")
def numpy_only(tmp_path_factory) -> Path:
    return build(tmp_path_factory.mktemp("node") / "numpy", "numpy")


@pytest.fixture(scope="module")
def with_onnxruntime(tmp_path_factory) -> Path:
    pytest.importorskip("onnxruntime")
    return build(tmp_path_factory.mktemp("node") / "onnx", "numpy", "onnxruntime")


def run_with(python: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [python, *map(str, arguments)], capture_output=True, text=True, cwd=python.parent
    )


def classes(trained: bundles.ctde.Trained, inputs: np.ndarray) -> Sequence[str]:
    return [str(label) for label in trained.predict(inputs).argmax(-1)]


@pytest.mark.parametrize("environment", ["numpy_only", "with_onnxruntime"])
def test_node_has_no_package_of_the_trainer(environment, request):
    python = request.getfixturevalue(environment)
    for module in ("jax", "flax", "optax", "rich", "safetensors"):
        assert "No module named" in run_with(python, "-c", f"import {module}").stderr


@pytest.mark.parametrize("name", ["mlp", "linen"])
def test_perceptron_runs_with_numpy_only(name, numpy_only, tmp_path):
    (trained, data), folder = bundles.trained(name), bundles.written(name).bundle.folder
    np.savez(tmp_path / "x.npz", x_test=data.test.inputs, y_test=data.test.labels)
    done = run_with(numpy_only, "-m", "ctde_jax.execute", folder, "--input", tmp_path / "x.npz")
    assert [line.split()[1] for line in done.stdout.splitlines()[1:]] == classes(
        trained, data.test.inputs
    )
    verified = run_with(
        numpy_only, "-m", "ctde_jax.verify", "bundle", folder, "--input", tmp_path / "x.npz"
    )
    assert (
        "holds: every file matches its SHA-256; the outputs of numpy agree with the trained model"
        in verified.stdout
    )
    assert "onnx: skipped, its runtime is not installed" in verified.stdout


@pytest.mark.parametrize("name", bundles.PICTURES)
def test_any_classifier_runs_with_numpy_and_onnxruntime(name, with_onnxruntime, tmp_path):
    (trained, data), folder = bundles.trained(name), bundles.written(name).bundle.folder
    np.savez(tmp_path / "x.npz", x_test=data.test.inputs, y_test=data.test.labels)
    arguments = [
        "-m",
        "ctde_jax.execute",
        folder,
        "--input",
        tmp_path / "x.npz",
        "--runtime",
        "onnx",
    ]
    done = run_with(with_onnxruntime, *arguments)
    assert [line.split()[1] for line in done.stdout.splitlines()[1:]] == classes(
        trained, data.test.inputs
    )
    assert (
        f"accuracy {trained.tested['accuracy']:.2%}"
        in run_with(with_onnxruntime, *arguments, "--score").stdout
    )


@pytest.mark.parametrize("name", bundles.TEXTS)
def test_any_language_model_runs_with_numpy_and_onnxruntime(name, with_onnxruntime):
    folder = bundles.written(name).bundle.folder
    done = run_with(
        with_onnxruntime, "-m", "ctde_jax.execute", folder, "--prompt", "To be", "--temperature", 0
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout) == len("To be") + 200 + 1


def test_missing_runtime_is_reported_in_one_sentence(numpy_only, tmp_path):
    folder, path = bundles.written("cnn").bundle.folder, tmp_path / "x.npy"
    np.save(path, bundles.trained("cnn")[1].test.inputs[:1])
    for arguments in ([], ["--runtime", "onnx"], ["--runtime", "jax"]):
        done = run_with(numpy_only, "-m", "ctde_jax.execute", folder, "--input", path, *arguments)
        assert done.returncode == 2
        assert "pip install" in done.stderr
        assert "Traceback" not in done.stderr


def test_time_to_the_first_prediction_is_recorded(
    numpy_only, with_onnxruntime, tmp_path, record_property
):
    """Includes the start of the process; recorded, not asserted (see `benchmarks/node.py`)."""
    inputs = bundles.trained("mlp")[1].test.inputs
    np.save(tmp_path / "x.npy", inputs[:1])
    for runtime, python in (("numpy", numpy_only), ("onnx", with_onnxruntime)):
        arguments = [
            "-m",
            "ctde_jax.execute",
            bundles.written("mlp").bundle.folder,
            "--input",
            tmp_path / "x.npy",
        ]
        start = time.perf_counter()
        done = run_with(python, *arguments, "--runtime", runtime)
        seconds = time.perf_counter() - start
        assert done.returncode == 0, done.stderr
        record_property(f"{runtime}, seconds to the first answer", round(seconds, 3))
        print(f"{runtime}: {seconds:.3f} s to the first answer", file=sys.stderr)
