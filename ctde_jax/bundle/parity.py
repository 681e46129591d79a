"""Compares the outputs of artifacts with those of the trained model."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from ctde_jax.bundle import answers, tensors
from ctde_jax.bundle.card import EXAMPLES, Bundle, faulty
from ctde_jax.bundle.inputs import Examples
from ctde_jax.bundle.runtimes import RUNTIMES, Predict, is_installed, load

BATCH_SIZES = (1, 3, 7, 64)
"""Batch sizes at which every artifact is compared."""

PARITY = 1e-5
"""Tolerance of the differences of an example's outputs.

It is relative to the largest magnitude among the outputs of the example, or absolute if that is
below 1.

It allows for float32 rounding: the logits of JAX itself, if they reach 40, differ by 1.7e-5 between
a batch of one picture and a batch of 64.
"""


class Repeated(NamedTuple):
    """Comparison of an artifact on this machine with the trained model."""

    examples: int
    """Number of examples in the bundle that were compared."""

    relative: float
    """Largest difference of the outputs, scaled as for `PARITY`; 0 without examples."""

    allowed: float
    """Tolerance: `PARITY`, plus the difference in the receipt if the artifact is quantized."""

    @property
    def holds(self) -> bool:
        """Whether the difference is within the tolerance."""
        return self.relative <= self.allowed


def repeat(bundle: Bundle) -> Mapping[str, Repeated | None]:
    """Compares every artifact with the outputs of the trained model that are stored in the bundle.

    Returns:
        The comparison for each runtime with an artifact; None if the runtime is not installed here.

    Raises:
        InputError: If a file is damaged, or a runtime rejects or fails to run an artifact.
    """
    # Check the SHA-256 of all files, including those that no runtime reads.
    for name in bundle.card.files:
        bundle.read(name)

    # Compare each runtime at every batch size, as a program may differ between them.
    inputs, outputs = _examples(bundle)
    found = {}
    for name in RUNTIMES:
        if name not in bundle.card.artifacts:
            continue
        if not is_installed(name):
            found[name] = None
            continue
        predict = load(bundle, name)
        allowed = PARITY
        # A quantized artifact may differ by as much as it did at the export.
        if not is_exact(name):
            allowed += bundle.card.artifacts[name].receipt.get("relative", 0.0)
        sizes = BATCH_SIZES if len(inputs) else ()
        differences = [
            relative_difference(in_batches(predict, inputs, size), outputs) for size in sizes
        ]
        found[name] = Repeated(len(inputs), max(differences, default=0.0), allowed)
    return found


def _examples(bundle: Bundle) -> tuple[np.ndarray, np.ndarray]:
    """Reads the stored inputs and outputs, which are empty if the bundle has no examples."""
    card = bundle.card
    inputs = np.zeros((0, *card.input_shape), card.input_dtype)
    outputs = np.zeros((0, *card.output_shape), np.float32)
    if EXAMPLES not in card.files:
        return inputs, outputs

    # The file must match its SHA-256, but its content may still not fit the card.
    try:
        stored = tensors.parse(bundle.read(EXAMPLES))
        for name, like in {"inputs": inputs, "outputs": outputs}.items():
            if stored[name].dtype != like.dtype or stored[name].shape != (
                len(stored["inputs"]),
                *like.shape[1:],
            ):
                raise tensors.Malformed(f"the shape or dtype of {name} does not match the card")
    except (tensors.Malformed, KeyError, TypeError) as error:
        raise faulty(
            bundle.folder, f"{EXAMPLES} is invalid ({error})", "export the model again"
        ) from error
    return stored["inputs"], stored["outputs"]


def is_exact(runtime: str) -> bool:
    """Returns whether the artifact of a runtime is in float32 and not quantized."""
    return "int8" not in runtime


def score(bundle: Bundle, runtime: str, examples: Examples) -> float:
    """Returns the accuracy of a runtime's artifact on examples, which must have labels."""
    assert examples.labels is not None
    outputs = in_batches(load(bundle, runtime), examples.inputs, BATCH_SIZES[-1])
    return float(answers.score(outputs, examples.labels)[1].mean())


def in_batches(predict: Predict, inputs: np.ndarray, size: int) -> np.ndarray:
    """Computes the outputs of one or more examples, in batches of at most `size` examples."""
    return np.concatenate(
        [predict(inputs[first : first + size]) for first in range(0, len(inputs), size)]
    )


def relative_difference(found: np.ndarray, right: np.ndarray) -> float:
    """Returns the largest difference of outputs, scaled as for `PARITY`.

    Args:
        found: Outputs to compare, `[examples, ...]`.
        right: Outputs of the trained model, which determine the scale.

    Returns:
        The difference; infinite if the shapes differ, or a value is NaN or infinite in only one of
        the arrays.
    """
    if found.shape != right.shape:
        return np.inf
    differences = difference(found, right).reshape(len(right), -1)
    # `initial=1` makes it absolute for outputs up to 1, and relative above.
    largest = (
        np.where(np.isfinite(right), np.abs(right), 0)
        .reshape(len(right), -1)
        .max(axis=1, initial=1)
    )
    return float((differences.max(axis=1, initial=0) / largest).max(initial=0))


def difference(found: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Returns elementwise absolute differences; equal infinities and two NaNs have difference 0.

    The difference is infinite if only one value is NaN or infinite.
    """
    # `where` drops the NaN that results from the difference of equal infinities.
    with np.errstate(invalid="ignore"):
        apart = np.where(found == right, 0, np.abs(found - right))
    apart[np.isnan(found) & np.isnan(right)] = 0
    return np.nan_to_num(apart, nan=np.inf, posinf=np.inf)
