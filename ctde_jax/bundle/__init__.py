"""Bundles of trained models, and the code that runs them on a node.

A *bundle* is a folder with a trained model in the formats of several runtimes. A *node* is a
machine that runs it, without the trainer and without network access. Nothing here imports JAX,
unless the node selects it as the runtime.
"""

from ctde_jax.bundle import answers, parity, perceptron, recipe, streams
from ctde_jax.bundle.accepted import Accepted
from ctde_jax.bundle.card import (
    CARD,
    EXAMPLES,
    FORMAT,
    SUMS,
    WEIGHTS,
    Artifact,
    Bundle,
    Card,
    File,
    Layers,
    open_bundle,
    sums_of,
)
from ctde_jax.bundle.command import Parser, run
from ctde_jax.bundle.inputs import Examples, read
from ctde_jax.bundle.parity import (
    BATCH_SIZES,
    PARITY,
    difference,
    in_batches,
    is_exact,
    relative_difference,
)
from ctde_jax.bundle.reading import (
    are_numbers,
    finder,
    number_of,
    open_regular,
    read_small,
)
from ctde_jax.bundle.recipe import Recipe, cell_of, days_of, is_missing
from ctde_jax.bundle.runtimes import (
    RUNTIMES,
    Carry,
    Predict,
    Step,
    load,
    load_step,
    pick,
    traceable,
)
from ctde_jax.bundle.streams import Screen
from ctde_jax.bundle.tables import Row, rows_of
from ctde_jax.bundle.tensors import parse

__all__ = [
    "BATCH_SIZES",
    "CARD",
    "EXAMPLES",
    "FORMAT",
    "PARITY",
    "RUNTIMES",
    "SUMS",
    "WEIGHTS",
    "Accepted",
    "Artifact",
    "Bundle",
    "Card",
    "Carry",
    "Examples",
    "File",
    "Layers",
    "Parser",
    "Predict",
    "Recipe",
    "Row",
    "Screen",
    "Step",
    "answers",
    "are_numbers",
    "cell_of",
    "days_of",
    "difference",
    "finder",
    "in_batches",
    "is_exact",
    "is_missing",
    "load",
    "load_step",
    "number_of",
    "open_bundle",
    "open_regular",
    "parity",
    "parse",
    "perceptron",
    "pick",
    "read",
    "read_small",
    "recipe",
    "relative_difference",
    "rows_of",
    "run",
    "streams",
    "sums_of",
    "traceable",
]
