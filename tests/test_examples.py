"""The examples in the docstrings run, and every function that users call has one."""

import ast
import doctest
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import ctde_jax as ctde

ROOT = Path(__file__).parents[1]
INDEX = (ROOT / "docs" / "reference" / "index.md").read_text()

GIVEN = re.search(r"```python\n(.*?)```", INDEX, flags=re.DOTALL)[1]
"""The imports that the reference lists, which all examples use."""


def docstrings(tree: ast.AST, module: str) -> Iterator[tuple[str, str]]:
    """Yields the docstrings of functions and classes by their full name."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            name = f"{module}.{node.name}"
            yield name, ast.get_docstring(node) or ""
            yield from docstrings(node, name)


EXAMPLES = {
    name: text.partition("\nExamples:\n")[2]
    for path in sorted((ROOT / "ctde_jax").rglob("*.py"))
    for name, text in docstrings(
        ast.parse(path.read_text()), ".".join(path.relative_to(ROOT).with_suffix("").parts)
    )
    if "\nExamples:\n" in text
}

ROOMS = [ctde, ctde.aggregate, ctde.cost, ctde.data, ctde.models]
PARTS = [ctde.augment, ctde.data.partition, ctde.tasks]
PARTS += [ctde.initializers, ctde.mup, ctde.optimizers]

# Classes that a user reads, catches or receives, and functions for other rooms of the package.
WITHOUT = {
    *("HostLost", "NonFiniteLoss", "Preempted", "ReplicasDiverged"),
    *("CutByOwner", "Star", "adapted", "as_transformation", "depends_on", "evaluated_point"),
    *("has_evaluated_point", "with_hyperparams_of"),
    *(
        "Batches",
        "DiskArray",
        "Drawn",
        "Meaning",
        "Stream",
        "apply_to",
        "check_size",
        "check_stream",
    ),
    *(
        "count_steps",
        "deal",
        "deal_part",
        "digest",
        "digests_of",
        "digests_of_conversion",
        "filled_up",
        "index_blocks",
        "take",
    ),
    *("is_channels_first", "look_up", "plain", "slices", "targets_or_classes"),
    *("CNN", "MLP", "RNNClassifier", "RNNLanguageModel", "ResNet", "Transformer"),
    *("describe", "is_random", "is_trained", "split_variables", "unscaled"),
    *("Kernel", "find_kernels", "leaves_with_path", "map_with_path"),
}


class Checker(doctest.OutputChecker):
    """Compares the output of the statements for which an example shows one."""

    def check_output(self, want: str, got: str, optionflags: int) -> bool:
        return not want or super().check_output(want, got, optionflags)


@pytest.mark.parametrize("name", EXAMPLES)
def test_example_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {}
    exec(GIVEN, namespace)
    example = doctest.DocTestParser().get_doctest(EXAMPLES[name], namespace, name, None, 0)
    report = []
    runner = doctest.DocTestRunner(Checker(), verbose=False)
    result = runner.run(example, out=report.append)
    assert example.examples
    assert not result.failed, "".join(report)


def test_examples_are_short():
    long = {name for name, text in EXAMPLES.items() if len(text.strip().splitlines()) > 6}
    assert not long


def test_functions_that_users_call_have_examples():
    values = [getattr(room, name) for room in ROOMS for name in room.__all__]
    for part in PARTS:
        public = [value for name, value in vars(part).items() if not name.startswith("_")]
        values += [each for each in public if getattr(each, "__module__", "") == part.__name__]

    # Constants and modules have no qualified name; type aliases are of another package.
    functions = [value for value in values if hasattr(value, "__qualname__")]
    names = {f"{value.__module__}.{value.__qualname__}" for value in functions}
    lacking = {name for name in names if name.startswith("ctde_jax.")} - {*EXAMPLES}
    assert not {name for name in lacking if name.rpartition(".")[2] not in WITHOUT}


def test_index_of_the_reference_has_every_public_name():
    missing = {name for name in ctde.__all__ if f"`{name}`" not in INDEX}
    assert not missing
