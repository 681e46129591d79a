"""Exact averages over a split: every example is counted once, on any number of devices and for any batch size."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from itertools import chain
from math import ceil, prod

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp

from ctde_jax.data import Split
from ctde_jax.devices import AXIS, PyTree, replica
from ctde_jax.errors import InputError
from ctde_jax.models import Model, Task
from ctde_jax.rounds.feed import prefetched

Averages = dict[str, float]
"""`loss`, each metric and what is a function of the loss, as means over the examples, and `examples`, their number."""

LABELS_AT_ONCE = 2**16
"""So long windows of a text are evaluated a few at a time."""

BYTES_AT_ONCE = 2**25
"""A split on disk is evaluated in pieces of so many bytes, or of a batch where that is more."""


def make_evaluate(
    model: Model,
    task: Task,
    split: Split,
    devices: Sequence[jax.Device],
    params: PyTree,
    model_state: PyTree,
    batch_size: int | None = None,
) -> Callable[[PyTree, PyTree], Averages]:
    """Makes the function that averages over a split.

    The devices hold the split, a part on each, and average in one dispatch. Of a split on disk they get some batches at
    a time, read while they compute those before.

    Args:
        model: Evaluated without a key, that is in inference mode.
        task: Its loss and metrics are averaged.
        split: At least one example.
        devices: One replica on each.
        params: Replicated on the devices; the function is compiled for parameters like these.
        model_state: Likewise.
        batch_size: Examples computed at once on all devices together, rounded up to a multiple of them; by default
            `LABELS_AT_ONCE` labels of them, and at most 1,024.

    Returns:
        `evaluate(params, model_state)`.

    Raises:
        InputError: The split is empty, or examples and labels differ in number.
    """
    examples = len(split.inputs)
    if not examples or len(split.labels) != examples:
        raise InputError(
            "split",
            f"must have one label for each example, got {len(split.labels)} for {examples}.",
        )
    batch_size = batch_size or min(1024, max(1, LABELS_AT_ONCE // prod(split.labels.shape[1:])))
    per_replica = ceil(min(batch_size, examples) / len(devices))
    batches = ceil(examples / (per_replica * len(devices)))
    if split.is_on_disk:
        example_bytes = sum(array.dtype.itemsize * prod(array.shape[1:]) for array in split)
        batches = min(batches, ceil(BYTES_AT_ONCE / (example_bytes * per_replica * len(devices))))
    shape, here = (len(devices), batches, per_replica), replica.own(devices)

    def piece(first: int) -> tuple[Split, jax.Array]:
        """Returns as many examples as there are places from this one on, and which places have one."""
        numbers = np.arange(first, first + prod(shape)).reshape(shape)[here]
        inputs, labels = (
            array[numbers.ravel() % examples].reshape(*numbers.shape, *array.shape[1:])
            for array in split
        )
        return replica.shard((Split(inputs, labels), numbers < examples), devices)

    def sum_up(
        center: tuple[PyTree, PyTree], part: tuple[Split, jax.Array]
    ) -> dict[str, jax.Array]:
        params, model_state = center

        def add_batch(sums, batch_and_mask):
            batch, is_example = batch_and_mask
            outputs, _ = model.apply(params, model_state, batch.inputs, None)
            measured = {
                **task.measure(outputs, batch.labels),
                "examples": jnp.ones(per_replica, jnp.int32),
            }

            def add(total, values):
                return total + jnp.sum(values, where=is_example, dtype=total.dtype)

            return jax.tree.map(add, sums, measured), None

        zeros = dict.fromkeys(["loss", *task.metrics], jnp.float32(0)) | {"examples": jnp.int32(0)}
        sums, _ = lax.scan(add_batch, zeros, part)
        return lax.psum(sums, AXIS)

    # of three arguments with three leaves in all, pmap would take in_axes leaf by leaf
    sum_up = replica.parallel(sum_up, devices, in_axes=(None, 0), out_axes=None)
    held = [piece(0)]
    compiled = replica.compiled(replica.lowered(sum_up, (params, model_state), held[0]), devices)

    def evaluate(params: PyTree, model_state: PyTree) -> Averages:
        rest = (piece(first) for first in range(prod(shape), examples, prod(shape)))
        with prefetched(rest) if split.is_on_disk else nullcontext(rest) as rest_of_pieces:
            parts = [
                jax.device_get(compiled((params, model_state), each))
                for each in chain(held, rest_of_pieces)
            ]
        sums = {name: sum(float(part[name]) for part in parts) for name in parts[0]}
        assert sums["examples"] == examples, f"counted {sums['examples']} of {examples} examples"
        return task.averages(sums, examples) | {"examples": examples}

    return evaluate
