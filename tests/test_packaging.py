"""Packages of the extras, and commands of the workflows."""

import re
import sys
import tomllib
from pathlib import Path

import nbformat
import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]


def packages(extra: str) -> set[str]:
    """Returns the packages of an extra, including those of other extras that it requires."""
    found = set()
    for requirement in map(Requirement, EXTRAS[extra]):
        if requirement.name == PROJECT["name"]:
            found |= set().union(*(packages(inner) for inner in requirement.extras))
        else:
            found.add(requirement.name)
    return found


@pytest.mark.parametrize("extra", ["cuda12", "cuda13", "tpu"])
def test_extra_of_a_platform_requires_jax_in_the_supported_range(extra):
    """The extra of a platform installs JAX's extra of the same name, and nothing else."""
    [jax] = [each for each in map(Requirement, PROJECT["dependencies"]) if each.name == "jax"]
    [platform] = map(Requirement, EXTRAS[extra])
    assert platform.name == "jax"
    assert platform.extras == {extra}
    assert platform.specifier == jax.specifier


def test_notebook_extra_does_not_install_the_export_stack():
    assert "onnx" in packages("onnx")
    assert not packages("notebook") & packages("onnx")


@pytest.mark.parametrize(
    "path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem
)
def test_notebook_installs_the_packages_that_it_imports(path):
    _, install, *cells = nbformat.read(path, as_version=4).cells
    [extras] = re.findall(r"ctde_jax\[(.*?)\]", install.source)
    installed = {Requirement(each).name for each in PROJECT["dependencies"]} | {PROJECT["name"]}
    installed = installed.union(*map(packages, extras.split(",")))

    # The package of a module has the same name, except that of sklearn, a dependency of ctde_jax.
    code = "\n".join(cell.source for cell in cells if cell.cell_type == "code")
    modules = set(re.findall(r"^(?:import|from) (\w+)", code, re.M)) - sys.stdlib_module_names
    assert modules - {"sklearn"} <= installed


def test_workflow_runs_the_test_command_of_the_readme():
    workflow = (ROOT / ".github" / "workflows" / "tests.yml").read_text()
    [command] = re.findall(r"^pip .* python -m pytest$", (ROOT / "README.md").read_text(), re.M)
    assert command in workflow
