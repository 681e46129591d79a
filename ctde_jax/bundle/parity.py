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
    """How far it is from the trained model, as `PARITY` has it; 0 of no examples."""

    allowed: float
    """How far it may be: `PARITY`, or as far as its receipt says where it has fewer bits than the trained model."""

    @property
    def holds(self) -> bool:
        """Whether it is no farther."""
        return self.relative <= self.allowed


def repeat(bundle: Bundle) -> Mapping[str, Repeated | None]:
    """Runs every artifact whose runtime is here on the bundle's own examples; None stands for one that is not here.

    Raises:
        InputError: A file is damaged, or a runtime refuses one.
    """
    for name in bundle.card.files:
        bundle.read(name)
    inputs, outputs = _examples(bundle)
    found = {}
    for name in RUNTIMES:
        if name not in bundle.card.artifacts:
            continue
        if not is_installed(name):
            found[name] = None
            continue
        predict, allowed = load(bundle, name), PARITY
        if not is_exact(name):
            allowed += bundle.card.artifacts[name].receipt.get("relative", 0.0)
        sizes = BATCH_SIZES if len(inputs) else ()
        differences = [
            relative_difference(in_batches(predict, inputs, size), outputs) for size in sizes
        ]
        found[name] = Repeated(len(inputs), max(differences, default=0.0), allowed)
    return found


def _examples(bundle: Bundle) -> tuple[np.ndarray, np.ndarray]:
    """Reads the inputs and outputs that came along; none where none did."""
    card = bundle.card
    inputs = np.zeros((0, *card.input_shape), card.input_dtype)
    outputs = np.zeros((0, *card.output_shape), np.float32)
    if EXAMPLES not in card.files:
        return inputs, outputs
    try:
        stored = tensors.parse(bundle.read(EXAMPLES))
        for name, like in {"inputs": inputs, "outputs": outputs}.items():
            if stored[name].dtype != like.dtype or stored[name].shape != (
                len(stored["inputs"]),
                *like.shape[1:],
            ):
                raise tensors.Malformed(f"{name} are of another shape or type than the card says")
    except (tensors.Malformed, KeyError, TypeError) as error:
        raise InputError(
            "bundle", f"names {bundle.folder}, whose {EXAMPLES} make no sense: {error}."
        ) from error
    return stored["inputs"], stored["outputs"]


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
    return np.concatenate(
        [predict(inputs[first : first + size]) for first in range(0, len(inputs), size)]
    )


def relative_difference(found: np.ndarray, right: np.ndarray) -> float:
    """Returns how far outputs `[examples, ...]` are from the right ones, as `PARITY` has it.

    What is NaN in one of them alone, or of another shape, is infinitely far.
    """
    if found.shape != right.shape:
        return np.inf
    differences = difference(found, right).reshape(len(right), -1)
    largest = (
        np.where(np.isfinite(right), np.abs(right), 0)
        .reshape(len(right), -1)
        .max(axis=1, initial=1)
    )
    return float((differences.max(axis=1, initial=0) / largest).max(initial=0))


def difference(found: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Returns how far numbers are from the right ones: infinitely, where one of two is NaN or infinite."""
    with np.errstate(invalid="ignore"):
        apart = np.where(found == right, 0, np.abs(found - right))
    apart[np.isnan(found) & np.isnan(right)] = 0
    return np.nan_to_num(apart, nan=np.inf, posinf=np.inf)
