"""The receipt: what an artifact says beside what the trained model says, over the whole test split, and how fast.

An artifact computes the same in another order, so it is never the same to the last bit. Differences are those of its
outputs to the trained model's, by JAX, in batches of 64.
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
"""At which batch sizes."""

_PIECE = 1344  # examples, a multiple of all batch sizes
_TURNS, _TURN_SECONDS = 7, 0.05

Facts = dict[str, Any]


def make_reference(trained: Trained) -> Predict:
    """Makes the function that the trained model computes, by JAX."""
    apply = jax.jit(
        lambda params, model_state, inputs: trained.model.apply(params, model_state, inputs, None)[
            0
        ]
    )
    center = jax.device_put((trained.params, trained.model_state))
    return lambda inputs: np.asarray(apply(*center, inputs))


def count_pieces(split: Split) -> int:
    """Returns how often `compare` calls its `advance` for each batch size."""
    return ceil(len(split.inputs) / _PIECE)


def compare(
    predict: Predict, reference: Predict, split: Split, task: Task, advance: Callable[[], None]
) -> Facts:
    """Measures what an artifact says of a split.

    Args:
        predict: The artifact.
        reference: The trained model.
        split: Of which every example counts once at each batch size.
        task: Whose loss and metrics are averaged.
        advance: Is called after each piece of the split at each batch size.

    Returns:
        `largest_difference` by batch size, `relative`, the largest of all as `PARITY` has it, and `measured`, the
        averages.
    """
    largest, relative, sums = dict.fromkeys(map(str, BATCH_SIZES), 0.0), 0.0, {}
    for first in range(0, len(split.inputs), _PIECE):
        inputs, labels = (np.asarray(array[first : first + _PIECE]) for array in split)
        right = found = in_batches(reference, inputs, 64)
        for size in BATCH_SIZES:
            found = in_batches(predict, inputs, size)
            largest[str(size)] = max(largest[str(size)], float(difference(found, right).max()))
            relative = max(relative, relative_difference(found, right))
            advance()
        for name, values in task.measure(jnp.asarray(found), jnp.asarray(labels)).items():
            sums[name] = sums.get(name, 0.0) + float(np.asarray(values).sum(dtype=np.float64))
    return {
        "largest_difference": largest,
        "relative": relative,
        "measured": task.averages(sums, len(split.inputs)),
    }


def check_same(trained: Trained, measured: Mapping[str, float]) -> None:
    """Compares what is measured of a model on its test split with the row that its training wrote.

    Both were computed in float32 on CPUs: the relative difference may be 1e-4, and of a metric that counts examples one
    in 1,000, at least one, may fall differently, as equal outputs do. Accelerators multiply in fewer bits: 1e-2.

    Args:
        trained: The model and its history.
        measured: Averages over the test split by name.

    Raises:
        InputError: They differ by more, so the model was trained on other data, or by another program.
    """
    is_cpu = {trained.platform, trained.devices[0].platform} == {"cpu"}
    relative, examples = (1e-4 if is_cpu else 1e-2), measured["examples"]
    tested = trained.tested
    for name in trained.task.names:
        tied = max(1.0, 1e-3 * examples) / examples if name in trained.task.metrics else 0.0
        if not np.isclose(
            measured[name], tested[name], rtol=relative, atol=max(1e-6, tied * 1.001)
        ):
            raise InputError(
                "data",
                f"must be those that the model was trained on, but there its test {name} is {measured[name]:.6g}, and "
                f"its training measured {tested[name]:.6g}.",
            )


def compare_steps(step: Step, start: Carry, reference: Predict, inputs: np.ndarray) -> float:
    """Reads sequences place by place; returns how far that is from what the trained model says, as `PARITY` has it."""
    right, carry, said = reference(inputs), start, []
    for place in range(inputs.shape[1]):
        outputs, carry = step(np.ascontiguousarray(inputs[:, place]), carry)
        said.append(outputs)
    found = np.stack(said, axis=1) if right.ndim > said[-1].ndim else said[-1]
    return relative_difference(found, right)


def time_all(contestants: Mapping[str, Predict], inputs: np.ndarray) -> dict[str, Facts]:
    """Times contestants in turns, on batches of each size in `TIMED`.

    Returns:
        For each of them, by batch size, the quartiles of a call in milliseconds.
    """
    found: dict[str, Facts] = {name: {} for name in contestants}
    for size in TIMED:
        batch = np.resize(inputs, (size, *inputs.shape[1:]))
        calls = {
            name: ceil(_TURN_SECONDS / _seconds(predict, batch, 3))
            for name, predict in contestants.items()
        }
        turns = [
            {name: _seconds(predict, batch, calls[name]) for name, predict in contestants.items()}
            for _ in range(_TURNS)
        ]
        for name in contestants:
            quartiles = np.percentile([turn[name] for turn in turns], [25, 50, 75])
            found[name][str(size)] = [round(1000 * float(seconds), 4) for seconds in quartiles]
    return found


def _seconds(predict: Predict, batch: np.ndarray, calls: int) -> float:
    predict(batch)
    before = time.perf_counter()
    for _ in range(calls):
        predict(batch)
    return (time.perf_counter() - before) / calls
