"""Whether an artifact says what the trained model said."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from ctde_jax.bundle import answers, tensors
from ctde_jax.bundle.card import EXAMPLES, Bundle
from ctde_jax.bundle.inputs import Examples
from ctde_jax.bundle.runtimes import RUNTIMES, Predict, is_installed, load
from ctde_jax.errors import InputError

BATCH_SIZES = (1, 3, 7, 64)
"""One artifact serves all of them."""

PARITY = 1e-5
"""How far an output may be from the trained model's; where the largest of an example is more than 1, as a share of it.

Numbers that a float32 has room for are that far apart: JAX itself says 1.7e-5 less or more for one picture alone than
for 64 at once, where logits reach 40.
"""


class Repeated(NamedTuple):
    """What a runtime says here of the examples of a bundle, beside its receipt."""

    examples: int
    relative: float
    """How far it is from the trained model, as `PARITY` has it."""

    is_exact: bool
    """Whether it should say what the trained model said, and not only nearly, in fewer bits."""

    @property
    def holds(self) -> bool:
        """Whether it does."""
        return self.relative <= PARITY or not self.is_exact


def repeat(bundle: Bundle) -> Mapping[str, Repeated | None]:
    """Runs every artifact whose runtime is here on the bundle's own examples; None stands for one that is not here.

    Raises:
        InputError: A file is damaged, a runtime refuses one, or the bundle came without examples.
    """
    for name in bundle.card.files:
        bundle.read(name)
    if EXAMPLES not in bundle.card.files:
        raise InputError("bundle", f"names {bundle.folder}, which came without examples: give --input with labels.")
    try:
        stored = tensors.parse(bundle.read(EXAMPLES))
        inputs, outputs = stored["inputs"], stored["outputs"]
    except (tensors.Malformed, KeyError) as error:
        raise InputError("bundle", f"names {bundle.folder}, whose {EXAMPLES} make no sense: {error}.") from error
    return {
        name: _repeat(load(bundle, name), inputs, outputs, is_exact(name)) if is_installed(name) else None
        for name in RUNTIMES
        if name in bundle.card.artifacts
    }


def is_exact(runtime: str) -> bool:
    """Says whether what a runtime takes has all bits of the trained model."""
    return "int8" not in runtime


def score(bundle: Bundle, runtime: str, examples: Examples) -> float:
    """Returns the accuracy of a runtime over labeled examples."""
    assert examples.labels is not None
    outputs = in_batches(load(bundle, runtime), examples.inputs, BATCH_SIZES[-1])
    return float(answers.score(outputs, examples.labels)[1].mean())


def in_batches(predict: Predict, inputs: np.ndarray, size: int) -> np.ndarray:
    """Computes examples so many at a time."""
    return np.concatenate([predict(inputs[first : first + size]) for first in range(0, len(inputs), size)])


def relative_difference(found: np.ndarray, right: np.ndarray) -> float:
    """Returns how far outputs `[examples, ...]` are from the right ones, as `PARITY` has it."""
    found, right = found.reshape(len(found), -1), right.reshape(len(right), -1)
    largest = np.maximum(1, np.abs(right).max(axis=1))
    return float((np.abs(found - right).max(axis=1) / largest).max())


def _repeat(predict: Predict, inputs: np.ndarray, outputs: np.ndarray, is_exact: bool) -> Repeated:
    differences = [relative_difference(in_batches(predict, inputs, size), outputs) for size in BATCH_SIZES]
    return Repeated(len(inputs), max(differences), is_exact)
