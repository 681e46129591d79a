"""Averages of the loss and metrics over a split; every example counts once, without padding."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from itertools import chain
from math import ceil, prod

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp
from jaxtyping import Array, Bool, Num

from ctde_jax.data import Split
from ctde_jax.devices import AXIS, PyTree, replica
from ctde_jax.errors import InputError
from ctde_jax.models import Model, Task
from ctde_jax.rounds.feed import prefetched

Averages = dict[str, float]
"""Values by name: the means of `loss` and of each metric, `Task.derived`, and `examples`.

`examples` is the number of examples.
"""

LABELS_AT_ONCE = 2**16
"""Maximum number of labels in a default batch, so that few long windows of a text are evaluated
at once."""

BYTES_AT_ONCE = 2**25
"""Approximate size in bytes of the pieces in which a split on disk is read; at least one batch."""


def default_batch_size(split: Split) -> int:
    """Returns the number of examples with `LABELS_AT_ONCE` labels; at most 1,024, at least 1."""
    return min(1024, max(1, LABELS_AT_ONCE // prod(split.labels.shape[1:])))


MaskedSplit = tuple[Split, Bool[Array, "batches per_replica"]]
"""Batches of examples, and the mask of those that count; the others are padding."""


def make_sum(
    model: Model, task: Task
) -> Callable[[PyTree, PyTree, MaskedSplit], dict[str, Num[Array, ""]]]:
    """Makes the function that sums the loss and metrics over the examples of one replica.

    Args:
        model: Model, which is evaluated in inference mode.
        task: Task whose loss and metrics are summed.

    Returns:
        `sum_over(params, model_state, part) -> sums`: of every name in `task.summed`, and
        `examples`, the number of examples.
    """

    def sum_over(params: PyTree, model_state: PyTree, part: MaskedSplit):
        def add_batch(sums, batch_and_mask):
            batch, is_example = batch_and_mask
            outputs, _ = model.apply(params, model_state, batch.inputs, None)
            measured = {
                **task.measure(outputs, batch.labels),
                "examples": jnp.ones(len(is_example), jnp.int32),
            }

            def add(total, values):
                return total + jnp.sum(values, where=is_example, dtype=total.dtype)

            return jax.tree.map(add, sums, measured), None

        # Counts are int32, as float32 is exact only up to 2**24.
        zeros = dict.fromkeys(task.summed, jnp.float32(0)) | {"examples": jnp.int32(0)}
        sums, _ = lax.scan(add_batch, zeros, part)
        return sums

    return sum_over


def make_evaluate(
    model: Model,
    task: Task,
    split: Split,
    devices: Sequence[jax.Device],
    params: PyTree,
    model_state: PyTree,
    batch_size: int | None = None,
) -> Callable[[PyTree, PyTree], Averages]:
    """Makes the function that averages the loss and metrics over a split.

    Each device holds a part of the split, and all averages are computed in one dispatch. A split on
    disk is read in pieces of a few batches; the next piece is read while the devices compute.

    Args:
        model: Model, which is evaluated in inference mode.
        task: Task whose loss and metrics are averaged.
        split: Examples, at least one.
        devices: Devices, with one replica on each.
        params: Parameters, replicated on the devices. The function is compiled for their shapes and
            dtypes.
        model_state: Model state, replicated on the devices, as for `params`.
        batch_size: Global batch size, rounded up to a multiple of the number of devices; by default
            `default_batch_size`.

    Returns:
        `evaluate(params, model_state) -> averages`.

    Raises:
        InputError: If the split is empty, or inputs and labels differ in number.
    """
    examples = len(split.inputs)
    if not examples or len(split.labels) != examples:
        raise InputError(
            "split",
            f"must have one label for each example, got {len(split.labels)} for {examples}.",
        )

    # Shape of a piece: one piece for a split in memory, limited in bytes for a split on disk.
    batch_size = batch_size or default_batch_size(split)
    per_replica = ceil(min(batch_size, examples) / len(devices))
    batches = ceil(examples / (per_replica * len(devices)))
    if split.is_on_disk:
        example_bytes = sum(array.dtype.itemsize * prod(array.shape[1:]) for array in split)
        batches = min(batches, ceil(BYTES_AT_ONCE / (example_bytes * per_replica * len(devices))))
    shape = (len(devices), batches, per_replica)
    here = replica.local_replicas(devices)

    def piece(first: int) -> tuple[Split, Bool[Array, "replicas batches per_replica"]]:
        """Returns one piece of examples, from example `first` on, and the mask of its padding."""
        # Positions after the last example repeat the first examples, and are masked.
        numbers = np.arange(first, first + prod(shape)).reshape(shape)[here]
        inputs, labels = (
            array[numbers.ravel() % examples].reshape(*numbers.shape, *array.shape[1:])
            for array in split
        )
        return replica.shard((Split(inputs, labels), numbers < examples), devices)

    sum_over = make_sum(model, task)

    def sum_up(center: tuple[PyTree, PyTree], part: MaskedSplit) -> dict[str, Num[Array, ""]]:
        return lax.psum(sum_over(*center, part), AXIS)

    # `center` is one argument: if there were as many arguments as leaves, pmap would apply in_axes
    # leaf by leaf.
    sum_up = replica.parallel(sum_up, devices, in_axes=(None, 0), out_axes=None)

    # Compiled once, as all pieces have the shape of the first.
    held = [piece(0)]
    compiled = replica.compiled(replica.lowered(sum_up, (params, model_state), held[0]), devices)

    def evaluate(params: PyTree, model_state: PyTree) -> Averages:
        # The first piece stays on the devices; further ones exist only if the split is on disk.
        rest = (piece(first) for first in range(prod(shape), examples, prod(shape)))
        with prefetched(rest) if split.is_on_disk else nullcontext(rest) as rest_of_pieces:
            parts = [
                jax.device_get(compiled((params, model_state), each))
                for each in chain(held, rest_of_pieces)
            ]

        # Pieces are added in float64.
        sums = {name: sum(float(part[name]) for part in parts) for name in parts[0]}
        assert sums["examples"] == examples, f"counted {sums['examples']} of {examples} examples"
        return task.averages(sums, examples) | {"examples": examples}

    return evaluate
