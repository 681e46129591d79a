"""Commands, transcripts and Python of the README and the documentation run as shown."""

import os
import re
import socket
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from cases import some
from PIL import Image
from sklearn.datasets import load_wine

import ctde_jax

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
}


OPTIONAL = ("datasets", "flwr", "grain", "optuna", "torch")
"""Packages that some blocks import, but the extra `test` does not contain."""


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def commands(text: str) -> list[str]:
    return [
        block.strip() for block in blocks(text, "bash") if block.startswith("python -m ctde_jax")
    ]


def shape(output: str) -> list[str]:
    """Returns the lines of the output; numbers, which depend on the machine, are replaced by 0."""
    lines = (re.sub("─+", "─", " ".join(line.split())) for line in output.strip().splitlines())
    return [re.sub(r"\d[\d,.]*", "0", line) for line in lines]


def in_shell(command: str, folder: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "NPROC"}
    environment |= {
        "JAX_PLATFORMS": "cpu",
        "XDG_CACHE_HOME": str(folder / ".cache"),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    done = subprocess.run(
        ["bash", "-ec", command],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


def free_port() -> int:
    """Returns a port of loopback that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def folder(tmp_path):
    """A working folder with a text, two tables and pictures of a user."""
    (tmp_path / "mine.txt").write_text("\n".join(PAGES.values())[:12000])
    wine = load_wine()
    table = np.column_stack([wine.data, wine.target])
    names = ",".join([*wine.feature_names, "cultivar"])
    np.savetxt(tmp_path / "mine.csv", table, "%g", ",", header=names, comments="")
    rows = [f"p{i},{i % 9},cook,{i % 3},2020-01-0{i % 5 + 1},yes,{i % 2}\n" for i in range(100)]
    (tmp_path / "people.csv").write_text("id,age,job,zip,hired,member,wealth\n" + "".join(rows))
    for name, color in {"cat": "black", "dog": "white"}.items():
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for number in range(40):
            Image.new("RGB", (40, 30), color).save(tmp_path / "pictures" / name / f"{number}.png")
    return tmp_path


def test_transcript_equals_the_output_of_the_first_command(tmp_path):
    install, command = blocks(README, "bash")[0].strip().split(" && ")
    assert install == "pip install ."
    assert shape(in_shell(command, tmp_path)) == shape(blocks(README, "text")[0])


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page, text in PAGES.items() if commands(text)])
def test_commands_run(page, folder):
    """Runs the commands of a page in order and in one folder."""
    prints = {
        "train": "test loss",
        "wire": "per round",
        "profile": "figure ",
        "verify": "holds:",
        "export": "sha256",
        "execute": "probability",
    }
    for command in commands(PAGES[page]):
        name = re.search(r"ctde_jax\.(\w+)", command)[1]
        assert prints[name] in in_shell(command, folder)


@pytest.mark.slow
def test_first_run_of_nodes_has_the_transcript_of_the_page(tmp_path):
    """Each line of the block is a process; the order in which nodes join does not matter."""
    pytest.importorskip("flwr", reason="requires Flower: pip install 'ctde_jax[flower]'")
    page = PAGES["docs/nodes.md"]
    block = next(block for block in blocks(page, "bash") if block.startswith("# terminal"))
    port = free_port()
    serve, *nodes = [
        line.replace(":9092", f":{port}") for line in block.splitlines() if line[0] != "#"
    ]
    waiting = " & ".join([*(f"{node} > {index}.txt" for index, node in enumerate(nodes)), "wait"])
    output = in_shell(f"{serve} --port {port} > server.txt & {waiting}; cat *.txt", tmp_path)
    for transcript in blocks(page, "text"):
        for line in transcript.splitlines():
            line = re.sub("north|south", "NODE", line)
            assert {*shape(line)} <= {*shape(re.sub("north|south", "NODE", output))}
    for node in ("north", "south"):
        assert (tmp_path / f"node-{node}" / "bundle" / "card.json").exists()


@pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")  # of Flower
@pytest.mark.parametrize(
    "page", some((page for page, text in PAGES.items() if blocks(text, "python")), "README.md")
)
def test_python_blocks_run(page, folder, monkeypatch):
    """Runs the blocks of a page in order and in one namespace.

    If packages are not installed, the test runs all other blocks and is skipped.
    """
    monkeypatch.chdir(folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / ".cache"))
    absent = {name for name in OPTIONAL if find_spec(name) is None}
    lacking = set()
    port = free_port()
    namespace = {}
    for block in blocks(PAGES[page], "python"):
        needs = {*re.findall(r"^import (\w+)", block, flags=re.MULTILINE)}
        lacks = absent & (needs | {"flwr"} if "ctde.nodes.serve" in block else needs)
        lacking |= lacks
        if not lacks:
            exec(block.replace("port=9092", f"port={port}").replace(":9092", f":{port}"), namespace)
    if lacking:
        pytest.skip(f"all other blocks ran, but some need {' and '.join(sorted(lacking))}")


def test_readme_has_at_most_250_lines():
    assert len(README.splitlines()) <= 250


def test_tree_names_every_folder():
    tree = blocks((ROOT / "CONTRIBUTING.md").read_text(), "text")[0]
    named = set(re.findall(r"^([\w.]+)/", tree, flags=re.MULTILINE))
    assert named == {"ctde_jax", "examples", "notebooks", "benchmarks", "tests", "docs", ".ci"}
    assert all((ROOT / name).is_dir() for name in named)


def test_ci_runs_the_test_command_of_the_readme():
    tested = [block.strip() for block in blocks(README, "bash") if "pytest" in block]
    assert len(tested) == 1
    assert tested[0] in (ROOT / ".ci" / "run").read_text()


def test_reference_has_every_public_name():
    """Every room has a directive, which shows its `__all__`.

    Public modules, and functions with the name of a module, have separate directives.
    """
    found = re.findall(r"^::: ([\w.]+)$", "\n".join(PAGES.values()), flags=re.MULTILINE)
    assert len(found) == len(set(found))
    names = [path.parent.name for path in (ROOT / "ctde_jax").glob("*/__init__.py")]
    rooms = [getattr(ctde_jax, name) for name in names]
    for module in [ctde_jax, *rooms]:
        for name in module.__all__:
            value = getattr(module, name)
            if isinstance(value, ModuleType):
                assert value.__name__ in found
                continue

            # Constants have no module; those of a room are shown with it.
            path = f"{getattr(value, '__module__', '')}.{name}"
            room = module if module in rooms else import_module(".".join(path.split(".")[:2]))
            is_shown = name in getattr(room, "__all__", vars(room))
            is_hidden = (Path(room.__file__).parent / f"{name}.py").exists()
            assert path in found or (is_shown and not is_hidden), path
