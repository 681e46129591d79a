"""What a node has of a trained model: a folder that says what it is, and runs with no trainer and no network.

Nothing here imports JAX, unless a node asks for that runtime.
"""

from ctde_jax.bundle import answers, parity, perceptron
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
from ctde_jax.bundle.parity import BATCH_SIZES, PARITY, difference, in_batches, is_exact, relative_difference
from ctde_jax.bundle.runtimes import RUNTIMES, Carry, Predict, Step, load, load_step, pick, traceable
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
    "Step",
    "answers",
    "difference",
    "in_batches",
    "is_exact",
    "load",
    "load_step",
    "open_bundle",
    "parity",
    "parse",
    "perceptron",
    "pick",
    "read",
    "relative_difference",
    "run",
    "sums_of",
    "traceable",
]
