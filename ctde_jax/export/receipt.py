"""The receipt of an artifact: its accuracy and speed, compared with the trained model.

An artifact computes the same function in a different order of operations, so outputs differ by
rounding. They are compared with those of the trained model in JAX, computed in batches of 64, over
the whole test split.
"""

import time
from collections.abc import Callable, Mapping
from math import ceil
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp

from ctde_jax.bundle import (
    BATCH_SIZES,
    Carry,
    Predict,
    Step,
    difference,
    in_batches,
    relative_difference,
)
from ctde_jax.data import Split
from ctde_jax.errors import InputError
from ctde_jax.models import Task
from ctde_jax.trainer import Trained

TIMED = (1, 32)
"""Batch sizes at which calls are timed."""

# Examples that are in memory at once; a multiple of all batch sizes, so that only the last batch of
# a split is short.
_PIECE = 1344
_TURNS = 7
_TURN_SECONDS = 0.05

Facts = dict[str, Any]


def make_reference(trained: Trained) -> Predict:
    """Returns the trained model as a jitted JAX function from inputs to outputs as numpy arrays."""
    # Parameters are arguments, as `jit` would embed arrays of the closure as constants.
    apply = jax.jit(
        lambda params, model_state, inputs: trained.model.apply(params, model_state, inputs, None)[
            0
        ]
    )
    center = jax.device_put((trained.params, trained.model_state))
    return lambda inputs: np.asarray(apply(*center, inputs))


def count_pieces(split: Split) -> int:
    """Returns the number of pieces into which `compare` divides a split."""
    return ceil(len(split.inputs) / _PIECE)


def compare(
    predict: Predict, reference: Predict, split: Split, task: Task, advance: Callable[[], None]
) -> Facts:
    """Measures an artifact on a split, at each of `BATCH_SIZES`.

    Args:
        predict: The artifact.
        reference: The trained model.
        split: The examples; each counts once per batch size.
        task: The task with the loss and metrics to average.
        advance: Progress callback, called after each piece of the split at each batch size.

    Returns:
        `largest_difference`, the largest absolute difference by batch size; `relative`, the largest
        difference at any batch size, scaled as for `PARITY`; and `measured`, the averages of loss
        and metrics.
    """
    largest = dict.fromkeys(map(str, BATCH_SIZES), 0.0)
    relative = 0.0
    sums = {}
    for first in range(0, len(split.inputs), _PIECE):
        inputs, labels = (np.asarray(array[first : first + _PIECE]) for array in split)
        expected = found = in_batches(reference, inputs, 64)
        for size in BATCH_SIZES:
            found = in_batches(predict, inputs, size)
            largest[str(size)] = max(largest[str(size)], float(difference(found, expected).max()))
            relative = max(relative, relative_difference(found, expected))
            advance()

        # Loss and metrics are those of the last batch size. Sums are in float64.
        for name, values in task.measure(jnp.asarray(found), jnp.asarray(labels)).items():
            sums[name] = sums.get(name, 0.0) + float(np.asarray(values).sum(dtype=np.float64))
    return {
        "largest_difference": largest,
        "relative": relative,
        "measured": task.averages(sums, len(split.inputs)),
    }


def check_same(trained: Trained, measured: Mapping[str, float]) -> None:
    """Checks that averages over the test split agree with those that training recorded.

    The relative tolerance is 1e-4 if both were computed on CPUs, in float32, and 1e-2 otherwise,
    because accelerators may multiply with fewer bits. Metrics may also differ by the contribution
    of 0.1 % of the examples, but at least of one, because rounding can break ties differently.

    Args:
        trained: The model and its history.
        measured: Averages over the test split by name.

    Raises:
        InputError: A difference exceeds its tolerance, for example because the data are not those
            of the training.
    """
    is_cpu = {trained.platform, trained.devices[0].platform} == {"cpu"}
    relative = 1e-4 if is_cpu else 1e-2
    examples = measured["examples"]
    tested = trained.tested
    for name in trained.task.names:
        # The factor 1.001 allows for rounding if exactly the allowed number of examples changed.
        tied = max(1.0, 1e-3 * examples) / examples if name in trained.task.metrics else 0.0
        if not np.isclose(
            measured[name], tested[name], rtol=relative, atol=max(1e-6, tied * 1.001)
        ):
            raise InputError(
                "data",
                f"must be those of the training, but the test {name} on them is "
                f"{measured[name]:.6g}, and training measured {tested[name]:.6g}.",
            )


def compare_steps(step: Step, start: Carry, reference: Predict, inputs: np.ndarray) -> float:
    """Runs a recurrent artifact one position at a time and compares it with the trained model.

    Args:
        step: The artifact.
        start: The carry before the first position, float32 `[examples, ...]` each.
        reference: The trained model, which reads whole sequences.
        inputs: Sequences `[examples, length, ...]`.

    Returns:
        The largest difference of outputs, scaled as for `PARITY`.
    """
    expected = reference(inputs)
    carry = start
    steps = []
    for position in range(inputs.shape[1]):
        outputs, carry = step(np.ascontiguousarray(inputs[:, position]), carry)
        steps.append(outputs)

    # The model has outputs at every position, or at the last one only.
    found = np.stack(steps, axis=1) if expected.ndim > steps[-1].ndim else steps[-1]
    return relative_difference(found, expected)


def time_all(contestants: Mapping[str, Predict], inputs: np.ndarray) -> dict[str, Facts]:
    """Times contestants alternately, on batches of each size in `TIMED`.

    Args:
        contestants: Functions to time, by name.
        inputs: Examples `[examples, ...]`, repeated or cut to the batch size.

    Returns:
        For each contestant, by batch size, the three quartiles of the time of a call in
        milliseconds.
    """
    found: dict[str, Facts] = {name: {} for name in contestants}
    for size in TIMED:
        batch = np.resize(inputs, (size, *inputs.shape[1:]))

        # As many calls per turn as fit into `_TURN_SECONDS`, by an estimate from three calls.
        calls = {
            name: ceil(_TURN_SECONDS / _seconds(predict, batch, 3))
            for name, predict in contestants.items()
        }

        # Alternate, so that a slow phase of the machine affects all contestants.
        turns = [
            {name: _seconds(predict, batch, calls[name]) for name, predict in contestants.items()}
            for _ in range(_TURNS)
        ]
        for name in contestants:
            quartiles = np.percentile([turn[name] for turn in turns], [25, 50, 75])
            found[name][str(size)] = [round(1000 * float(seconds), 4) for seconds in quartiles]
    return found


def _seconds(predict: Predict, batch: np.ndarray, calls: int) -> float:
    """Returns the mean time of a call in seconds, after one call that is not timed."""
    predict(batch)  # compiles, and allocates memory
    before = time.perf_counter()
    for _ in range(calls):
        predict(batch)
    return (time.perf_counter() - before) / calls
