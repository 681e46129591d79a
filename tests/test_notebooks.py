"""Notebooks run from top to bottom on any machine, and are committed without outputs."""

import re
import time
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
*OF_DATA_SETS, OF_A_FRAME, OF_SEEDS, OF_NODES = NOTEBOOKS
TRAINING_HERE = NOTEBOOKS[:-1]  # the nodes are separate processes, on the CPU
OF_REPLICAS = ("01_quickstart", "02_aggregation")
NEEDED_DEVICES = {"04_decentralized_execution": 2}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_committed_without_outputs(path):
    for cell in nbformat.read(path, as_version=4).cells:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_opens_in_colab_and_installs_a_missing_package(path):
    title, install, *_ = nbformat.read(path, as_version=4).cells
    address = f"github/OWNER/ctde_jax/blob/main/notebooks/{path.name}"
    assert f"](https://colab.research.google.com/{address})" in title.source
    assert install.source.split("\n")[2] == 'if find_spec("ctde_jax") is None:'
    assert "    %pip install -q 'ctde_jax[notebook" in install.source


@pytest.mark.parametrize("path", TRAINING_HERE, ids=lambda path: path.stem)
def test_notebook_uses_all_accelerators_or_fake_devices(path):
    wanted = "replicas=8" if path.stem in OF_REPLICAS else "cpu_devices=4"
    assert re.findall(r"devices\.start\((.*?)\)", path.read_text()) == [wanted]


@pytest.mark.slow
@pytest.mark.parametrize(
    "widgets", ["import ipywidgets", "import sys; sys.modules['ipywidgets'] = None"]
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the kernel's libraries
def test_fit_updates_a_single_line(widgets, monkeypatch, tmp_path):
    """Six hundred evaluations; the first cell turns warnings and numpy errors into exceptions."""
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
    assert [line.split()[0] for line in lines] == ["devices", "wire", "step"]
    assert lines[2].startswith("step 600 of 600")
    assert kinds.count("update_display_data") <= seconds + 2
    assert outputs[-1].data["text/plain"] == "600"
    assert (tmp_path / "run" / "curves.png").exists()


def execute(
    path: Path, monkeypatch, first: str = "", last: str = ""
) -> list[nbformat.NotebookNode]:
    """Runs a notebook in a separate kernel, as Jupyter starts it; returns the outputs of its cells.

    Args:
        path: The notebook.
        monkeypatch: The fixture.
        first: Code of a cell to run before those of the notebook.
        last: Code of a cell to run after those of the notebook.
    """
    monkeypatch.delenv("NPROC", raising=False)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    notebook = nbformat.read(path, as_version=4)
    notebook.cells.insert(0, nbformat.v4.new_code_cell(first))
    notebook.cells.append(nbformat.v4.new_code_cell(last))
    resources = {"metadata": {"path": str(path.parent)}}
    NotebookClient(notebook, timeout=300, resources=resources).execute()
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


def fallbacks(outputs: list[nbformat.NotebookNode]) -> int:
    printed = "".join(output.text for output in outputs if output.output_type == "stream")
    return printed.count("on four fake CPU devices.")


@pytest.mark.slow
@pytest.mark.parametrize("path", OF_DATA_SETS, ids=lambda path: path.stem)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the kernel's libraries
def test_notebook_runs_and_learns(path, monkeypatch):
    """On a machine without accelerators, on fake CPU devices."""
    outputs = execute(path, monkeypatch)
    # The results are three test accuracies and four pictures.
    measured = [
        output.data["text/plain"]
        for output in outputs
        if output.output_type == "execute_result"
        and "'accuracy'" in output.data.get("text/plain", "")
    ]
    accuracies = [float(text.split("'accuracy': ")[1].split(",")[0]) for text in measured]
    assert len(accuracies) == 3
    assert min(accuracies) > 0.9
    assert len([output for output in outputs if "image/png" in output.get("data", {})]) == 4
    assert fallbacks(outputs) == 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the kernel's libraries
def test_notebook_of_a_data_frame_learns_exports_and_refuses(monkeypatch):
    """Class weights raise the recall and not the AUROC; a node computes the trained model."""
    facts = """
recall, auroc = comparison["recall of failures"], comparison["AUROC"]
assert recall["balanced"] > recall["plain"] + 0.1
assert auroc.min() > 0.95 and auroc.max() - auroc.min() < 0.02
assert regression.tested["r2"] > 0.8
assert len(outputs) == count and difference < 1e-5
"""
    outputs = execute(OF_A_FRAME, monkeypatch, last=facts)
    assert len([output for output in outputs if "image/png" in output.get("data", {})]) == 2
    assert any("ctde-report" in output.get("data", {}).get("text/html", "") for output in outputs)
    printed = "".join(output.text for output in outputs if output.output_type == "stream")
    for fault in (
        "has no column 'temperature'",
        "column 'installed', which is not a valid date of the form YYYY-MM-DD",
        "column 'id', which look like names or texts",
    ):
        assert fault in printed


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the kernel's libraries
def test_notebook_of_seeds_finds_what_one_pair_may_not(monkeypatch):
    facts = """
assert 0 < worse + equal < 16
assert compare(accuracy)["p, t-test"] < 0.05 and difference.mean() > 0
assert rows[1]["improvement found"] < 0.5 < rows[3]["improvement found"]
assert by_fold["difference"].mean() > 0
"""
    outputs = execute(OF_SEEDS, monkeypatch, last=facts)
    assert len([output for output in outputs if "image/png" in output.get("data", {})]) == 2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the kernel's libraries
def test_notebook_of_nodes_trains_with_a_node_that_leaves_and_returns(monkeypatch):
    pytest.importorskip("flwr", reason="requires Flower: pip install 'ctde_jax[flower]'")
    facts = """
# When the third process starts and returns depends on the machine.
assert len(rounds) == ROUNDS and 0 < len(absent) < ROUNDS
assert any("west" in who for who in rounds["nodes"])
assert correct.mean() == accuracy[-1] > 0.9 and ratio > 40
"""
    outputs = execute(OF_NODES, monkeypatch, last=facts)
    assert len([output for output in outputs if "image/png" in output.get("data", {})]) == 2


ON_ACCELERATORS = [
    (path, count)
    for path in TRAINING_HERE
    for count in (1, 2, 8)
    # The longest notebook runs on any number of devices: the largest has the fewest examples.
    if path.stem != "03_models" or count == 8
]


@pytest.mark.slow
@pytest.mark.parametrize("case", ON_ACCELERATORS, ids=lambda case: f"{case[0].stem}-{case[1]}")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the kernel's libraries
def test_notebook_runs_on_any_number_of_accelerators(case, monkeypatch):
    """With simulated accelerators, and trainings of one epoch.

    The first fake CPU devices are the accelerators, which `start` returns, once for each replica on
    them, and `jax.devices("cpu")` returns at least four. So batch sizes and partitions are valid
    for these numbers of devices, and a notebook that needs more devices prints one sentence and
    uses fake ones. Compilation for a GPU or TPU is not tested.
    """
    path, accelerators = case
    machine = f"""
import ctde_jax as ctde

start_cpu = ctde.devices.start
start_cpu({max(accelerators, 4)})


def start(cpu_devices=1, replicas=None):
    return start_cpu({accelerators}, replicas=replicas)


def for_an_epoch(fit):
    def fit_for_an_epoch(*arguments, **options):
        length = {{"epochs": 1}} if "epochs" in options else {{}}
        return fit(*arguments, **{{**options, **length}})

    return fit_for_an_epoch


ctde.devices.start = start
ctde.fit, ctde.fit_many = map(for_an_epoch, (ctde.fit, ctde.fit_many))
"""
    outputs = execute(path, monkeypatch, machine)
    assert fallbacks(outputs) == (accelerators < NEEDED_DEVICES.get(path.stem, 1))
