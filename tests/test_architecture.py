"""The shape of the house: one walk, no way back, and `jax.pmap` behind one door."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "ctde_jax"
WALK = [
    "errors",
    "reading",
    "streams",
    "bundle",
    "presets",
    "config",
    "hosts",
    "settings",
    "memory",
    "devices",
    "replica",
    "data",
    "feed",
    "augment",
    "models",
    "initializers",
    "mup",
    "tasks",
    "transformations",
    "optimizers",
    "aggregate",
    "build",
    "state",
    "schedule",
    "gradient",
    "guard",
    "round",
    "hlo",
    "collectives",
    "traffic",
    "evaluate",
    "reestimate",
    "generation",
    "checks",
    "picture",
    "jaxprs",
    "identity",
    "position",
    "run_folder",
    "log",
    "meter",
    "atomic",
    "checkpoint",
    "resume",
    "stop",
    "run",
    "trained",
    "warm_start",
    "rollback",
    "loop",
    "loading",
    "report",
    "targets",
    "wire",
    "stopwatch",
    "profile",
    "supervisor",
    "train",
    "proofs",
    "export",
    "execute",
    "verify",
]
MODULES = sorted(PACKAGE.rglob("*.py"))


def room(path: Path) -> str:
    """The module or folder of a file, as the walk names it."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """The rooms of this package that a file imports."""
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names += [f"{node.module}.{alias.name}" for alias in node.names]
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
    return {name.split(".")[1] for name in names if name.startswith("ctde_jax.")}


def test_walk_names_every_room():
    assert {room(path) for path in MODULES} - {"__init__"} == set(WALK)


@pytest.mark.parametrize("path", [p for p in MODULES if room(p) != "__init__"], ids=lambda p: str(p.name))
def test_module_imports_only_what_stands_before_it(path):
    here = WALK.index(room(path))
    assert {name for name in imported(path) if WALK.index(name) > here} == set()


def test_only_replica_calls_pmap():
    def names(path: Path) -> set[str]:
        tree = ast.walk(ast.parse(path.read_text()))
        return {getattr(node, "attr", getattr(node, "id", getattr(node, "name", ""))) for node in tree}

    assert [room(path) for path in MODULES if "pmap" in names(path)] == ["replica"]


def test_walk_in_the_docs_is_the_walk():
    root = PACKAGE.parent
    for text in [(PACKAGE / "__init__.py").read_text(), (root / "CONTRIBUTING.md").read_text()]:
        flat = " ".join(text.replace("\n", " ").split())
        assert " -> ".join(WALK) in flat
