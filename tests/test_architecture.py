"""Architecture: layers and public names of rooms, one `jax.pmap`, a correct architecture page."""

import ast
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from importlib import import_module, metadata
from pathlib import Path

import pytest

import ctde_jax

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "ctde_jax"
MODULES = sorted(PACKAGE.rglob("*.py"))
ROOMS = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
PAGE = (ROOT / "docs" / "architecture.md").read_text()


def room(path: Path) -> str:
    """Returns the top-level folder or module of a file."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path) -> list[tuple[str, str]]:
    """Returns the modules of this package and the names that a file imports from them."""
    nodes = [
        node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)
    ]
    return [(str(node.module), alias.name) for node in nodes for alias in node.names]


def test_import_contract_holds():
    """`pyproject.toml` has the layers; `exhaustive` requires a layer for every room."""
    pytest.importorskip("importlinter")
    result = subprocess.run(
        [
            sys.executable,
            "-c",
            "from importlinter.cli import lint_imports; raise SystemExit(lint_imports())",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_rooms_are_imported_by_their_public_names(path):
    """Imports from another room are names in its `__all__`, or its modules."""
    for module, name in imported(path):
        _, _, inside = module.partition(".")
        other, _, deeper = inside.partition(".")
        if module.split(".")[0] != "ctde_jax" or other not in ROOMS - {room(path)}:
            continue
        is_module = (PACKAGE / other / f"{name}.py").exists()
        assert not deeper, f"{module} in {path}"
        assert is_module or name in import_module(module).__all__, f"{name} of {module} in {path}"


def test_imports_have_no_cycles():
    known = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts): path
        for path in MODULES
        if path.stem != "__init__"
    }
    graph = {
        name: {
            target
            for module, item in imported(path)
            for target in (module, f"{module}.{item}")
            if target in known
        }
        for name, path in known.items()
    }
    assert [*TopologicalSorter(graph).static_order()]


def test_package_has_at_most_twenty_three_entries():
    """Not counting `py.typed`, an empty file for type checkers."""
    entries = {path.name for path in PACKAGE.iterdir()} - {"__pycache__", "py.typed"}
    assert len(entries) <= 23


def test_help_of_the_package_lists_every_public_name():
    entries = re.findall(
        r"^    (\w[\w, ]*?)(?:  |$| initializations)", ctde_jax.__doc__, re.MULTILINE
    )
    named = {name for entry in entries for name in entry.split(", ")}
    others = {"HostLost", "NonFiniteLoss", "Preempted", "ReplicasDiverged"}
    assert named - {"import ctde_jax as ctde"} == {*ctde_jax.__all__} - others
    assert all(name in ctde_jax.__doc__ for name in others)


def test_package_as_a_command_lists_the_commands():
    """`python -m ctde_jax`, at most 80 columns wide; every command is there, and no other."""
    shown = subprocess.run(
        [sys.executable, "-m", "ctde_jax"], capture_output=True, text=True, check=True
    ).stdout
    assert max(map(len, shown.splitlines())) <= 80
    commands = {path.stem for path in PACKAGE.glob("[!_]*.py")} - {"errors"}
    assert {*re.findall(r"^  python -m ctde_jax\.(\w+) ", shown, re.MULTILINE)} == commands | {
        "export"
    }


@pytest.mark.parametrize(
    ("argument", "status", "output", "error"),
    [
        ("--version", 0, metadata.version("ctde_jax"), ""),
        ("train", 2, "", "error: train is not an option; use python -m ctde_jax.train"),
    ],
)
def test_package_as_a_command_accepts_only_version(argument, status, output, error):
    shown = subprocess.run(
        [sys.executable, "-m", "ctde_jax", argument], capture_output=True, text=True
    )
    assert (shown.returncode, shown.stdout.strip(), shown.stderr.strip()) == (status, output, error)


@pytest.mark.slow
def test_public_names_are_found_after_other_imports():
    program = """
import os, sys, ctde_jax
assert not {"jax", "numpy"} & set(sys.modules)
import flax, jax, optax
# One name of each module, as an import takes a second.
homes = {home or name: name for name, home in ctde_jax._HOMES.items()}
for name in homes.values():
    if not os.fork():
        getattr(ctde_jax, name)
        os._exit(0)
    assert not os.wait()[1], name
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", program], cwd=ROOT, check=True)


def test_version_equals_that_of_the_installed_package():
    assert ctde_jax.__version__ == metadata.version("ctde_jax")


def test_functions_have_at_most_eighty_lines():
    """Not counting the docstring; `ruff` limits the complexity."""
    long = {}
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                has_docstring = ast.get_docstring(node) is not None
                start = node.body[0].end_lineno if has_docstring else node.lineno
                if node.end_lineno - start > 80:
                    long[f"{path.relative_to(PACKAGE)}: {node.name}"] = node.end_lineno - start
    assert not long


def test_fit_and_train_have_at_most_60_lines():
    """`fit` builds the arguments of `train`, whose paragraphs have comments."""
    source = (PACKAGE / "trainer" / "fit.py").read_text()
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef) and node.name in ("fit", "train"):
            docstring = node.body[0]
            lines = source.splitlines()[docstring.end_lineno : node.end_lineno]
            arguments = [*node.args.args, *node.args.kwonlyargs, node.args.kwarg]
            assert len([line for line in lines if line.strip()]) <= 60
            assert len([argument for argument in arguments if argument]) <= 16
            comments = [line for line in lines if line.lstrip().startswith("#")]
            assert len(comments) >= 5 or node.name == "fit"


def test_only_the_mapped_axes_call_pmap_and_shard_map():
    def names(path: Path) -> set[str]:
        tree = ast.walk(ast.parse(path.read_text()))
        return {
            getattr(node, "attr", getattr(node, "id", getattr(node, "name", ""))) for node in tree
        }

    callers = [path.stem for path in MODULES if {"pmap", "shard_map"} & names(path)]
    assert callers == ["replica", "runs"]


def test_architecture_page_names_every_room_and_existing_files():
    assert {*re.findall(r"^\| `(\w+)/` \|", PAGE, re.M)} == ROOMS
    for path in re.findall(r"`(\w+/\w+(?:/\w+)?\.py)`", PAGE):
        assert (PACKAGE / path).exists(), path


def test_tests_mirror_the_rooms():
    folders = {
        path.name
        for path in (ROOT / "tests").iterdir()
        if path.is_dir() and path.name != "__pycache__"
    }
    assert folders == ROOMS | {"commands"}
