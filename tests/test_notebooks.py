"""Notebooks run from top to bottom, and are committed without outputs."""

import time
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
PICTURES = {"04_decentralised_execution": 5}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_committed_without_outputs(path):
    for cell in nbformat.read(path, as_version=4).cells:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None


@pytest.mark.slow
@pytest.mark.parametrize(
    "widgets", ["import ipywidgets", "import sys; sys.modules['ipywidgets'] = None"]
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the kernel's own libraries
def test_fit_shows_one_line_that_is_replaced(widgets, monkeypatch, tmp_path):
    """Six hundred evaluations, in a notebook whose first cells are not kind."""
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    first = f"""
{widgets}
import warnings
import jax, matplotlib.pyplot as plt, numpy as np
jax.devices()
np.seterr(all="raise")
warnings.simplefilter("error")
"""
    train = """
import ctde_jax as ctde, optax
ctde.fit(ctde.models.mlp([64, 8, 10]), ctde.data.digits(), optax.adam(0.01), \
devices=ctde.devices.start(1),
         batch_size=64, steps=600, eval_every=1, log_every=1, run_dir="run").step
"""
    notebook = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(code) for code in (first, train)]
    )
    client = NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}})
    kinds: list[str] = []
    process = client.process_message
    monkeypatch.setattr(
        client,
        "process_message",
        lambda m, *rest: (kinds.append(m["msg_type"]), process(m, *rest))[1],
    )
    started = time.monotonic()
    client.execute()
    seconds = time.monotonic() - started
    outputs = notebook.cells[1].outputs
    lines = [
        output.data["text/plain"] for output in outputs if output.output_type == "display_data"
    ]
    assert [line.split()[0] for line in lines] == ["wire", "step"]
    assert lines[1].startswith("step 600 of 600")
    assert kinds.count("update_display_data") <= seconds + 2
    assert outputs[-1].data["text/plain"] == "600"
    assert (tmp_path / "run" / "curves.png").exists()


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the kernel's own libraries
def test_notebook_runs_and_learns(path, monkeypatch):
    """In a separate kernel, as Jupyter starts it, with the JAX platform that the machine has."""
    monkeypatch.delenv("NPROC", raising=False)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(
        notebook, timeout=300, resources={"metadata": {"path": str(path.parent)}}
    ).execute()

    measured = [
        output.data["text/plain"]
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if output.output_type == "execute_result"
        and "'accuracy'" in output.data.get("text/plain", "")
    ]
    accuracies = [float(text.split("'accuracy': ")[1].split(",")[0]) for text in measured]
    assert len(accuracies) == 3
    assert min(accuracies) > 0.9
    pictures = [
        o
        for cell in notebook.cells
        for o in cell.get("outputs", [])
        if "image/png" in o.get("data", {})
    ]
    assert len(pictures) == PICTURES.get(path.stem, 4)
