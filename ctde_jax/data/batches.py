"""The order of the examples: a pure function of the seed and the step, not of earlier steps.

A batch is an array of indices into the training split, `int32[replica, per_replica]`. If it has
fewer examples than elements, the other elements are padding: `~i`, a negative number, repeats
example `i` of the same batch, device or client, and is masked out. Thus the last batch of an epoch
is short instead of dropped, a replica that has run out of data has a row of negative numbers, and
the inputs of the model are always real examples.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from math import ceil
from typing import TypeAlias

import numpy as np
from jaxtyping import Int, Int32, Shaped

from ctde_jax.data.disk import DiskArray
from ctde_jax.data.split import Drawn, TrainingSplit
from ctde_jax.errors import InputError, check_at_least

Parts: TypeAlias = Sequence[Int[np.ndarray, " examples"]]
"""Indices of the examples of each replica or client."""


@dataclass(frozen=True)
class Batches:
    """The order in which the replicas process the examples."""

    split: TrainingSplit | Drawn
    """The indexed examples: the whole training split, or one row `[replica, longest_part, ...]` per
    replica."""

    axis: int | None
    """None if every device holds all of `split`; 0 if each device holds only its row of it, or, for
    a split on disk, only the examples drawn for it."""

    steps_per_epoch: int
    """Number of steps in which every example is seen once, on average if clients are sampled."""

    steps_per_draw: int
    """Number of steps that `draw` returns: an epoch, or a round if clients are sampled."""

    draw: Callable[[int], Int32[np.ndarray, "steps_per_draw replicas per_replica"]]
    """`draw(number)` returns the batches of this epoch, or round if clients are sampled."""

    @property
    def is_on_disk(self) -> bool:
        """Whether the examples of each batch are read from disk during training."""
        return not isinstance(self.split, Drawn) and self.split.is_on_disk

    def steps(self, start: int, stop: int) -> Int32[np.ndarray, "steps replicas per_replica"]:
        """Returns the batches of the steps in `range(start, stop)`.

        Steps are counted from the start of training; the range must not be empty.
        """
        # Concatenate the draws that overlap the range, each restricted to it.
        length = self.steps_per_draw
        numbers = range(start // length, ceil(stop / length))
        pieces = [self.draw(n)[max(0, start - n * length) : stop - n * length] for n in numbers]
        return np.concatenate(pieces)

    def with_empty_cache(self) -> "Batches":
        """Returns a copy with the same order and an empty cache of draws."""
        # The function that `deal` has cached.
        draw = self.draw.__wrapped__  # pyright: ignore[reportFunctionMemberAccess]
        return replace(self, draw=lru_cache(maxsize=2)(draw))

    def inputs(self, step: int) -> Shaped[np.ndarray, "examples ..."]:
        """Returns the inputs of a step's global batch, without padding.

        Without a partition, their order is the same for any number of replicas.
        """
        # `_reshuffled` assigns the examples to the replicas in turn; the transpose restores their
        # order.
        (indices,) = self.steps(step, step + 1)
        place, own = np.nonzero(indices.T >= 0)
        rows = indices[own, place]
        inputs = self.split.inputs
        return (
            inputs[rows]
            if self.axis is None or isinstance(inputs, DiskArray)
            else inputs[own, rows]
        )


def deal(
    split: TrainingSplit,
    replicas: int,
    batch_size: int,
    seed: int,
    partition: Parts | None = None,
    inner_steps: int = 1,
) -> Batches:
    """Assigns the examples to the replicas and determines their order.

    Without a partition, every epoch is a new permutation of all examples, and the global batch of a
    step is the same for any number of replicas. If the partition has one part per replica, every
    replica iterates over its part, in a new order in every epoch; an epoch lasts until the replica
    with the largest part has finished it, and the others have empty batches until then.

    If the partition has more parts than replicas, the parts are *clients*. Each round samples one
    client per replica, without replacement (McMahan et al., 2017). A client's epoch has as many
    steps as the largest client needs. The inner steps of a round are consecutive epochs of the
    client, each in a new order, and every round starts at the beginning of an epoch: E epochs of
    inner steps give each client exactly E passes over its examples.

    Args:
        split: Training examples.
        replicas: Number of replicas.
        batch_size: Global batch size.
        seed: Random seed for all permutations and for the sampling of clients.
        partition: Example indices of each replica or client.
        inner_steps: Number of steps per round, at least 1; only used if clients are sampled.

    Raises:
        InputError: If the batch size is not a multiple of the replicas or exceeds the number of
            examples, there are fewer examples or parts than replicas, the partition does not assign
            each example to exactly one part, or too few clients have examples.
    """
    steps = steps_per_epoch(len(split.inputs), replicas, batch_size, partition)
    per_replica = batch_size // replicas
    if partition is None:
        return _reshuffled(split, replicas, per_replica, steps, seed)
    if len(partition) == replicas:
        return _kept(split, partition, per_replica, steps, seed)
    check_at_least(1, inner_steps=inner_steps)
    return _sampled(split, partition, replicas, per_replica, steps, inner_steps, seed)


def deal_part(
    split: TrainingSplit,
    replicas: int,
    batch_size: int,
    seed: int,
    own: int,
    epoch_steps: int | None = None,
) -> Batches:
    """Assigns the examples of a node to its replicas, in the order of its part in a partition.

    With one replica and the `epoch_steps` of all nodes, these are the batches of replica `own` of
    `deal`, if part `own` of its partition has these examples in this order.

    Args:
        split: Training examples of the node.
        replicas: Number of replicas of the node.
        batch_size: Batch size of the node.
        seed: Random seed for all permutations.
        own: Index of the node.
        epoch_steps: Number of steps in an epoch; by default as many as the examples need.

    Raises:
        InputError: If the batch size is not a multiple of the replicas, there are fewer examples
            than replicas, or more than the steps of an epoch use.
    """
    examples = len(split.inputs)
    if examples < replicas:
        raise InputError(
            "devices",
            f"must be at most the number of training examples, {examples}, got {replicas}.",
        )
    if batch_size % replicas:
        rule = f"must be a multiple of the {replicas} devices of the node"
        raise InputError("batch_size", f"{rule}, got {batch_size} per node.")
    least = ceil(examples / batch_size)
    check_at_least(least, epoch_steps=epoch_steps)
    steps = epoch_steps or least

    def epoch(number: int) -> Int32[np.ndarray, "steps replicas per_replica"]:
        order = filled_up(_shuffled(examples, seed, number, own), steps * batch_size)
        return order.reshape(steps, -1, replicas).swapaxes(1, 2)

    return Batches(
        split, 0 if split.is_on_disk else None, steps, steps, lru_cache(maxsize=2)(epoch)
    )


def steps_per_epoch(
    examples: int, replicas: int, batch_size: int, partition: Parts | None = None
) -> int:
    """Returns the number of steps in which every example is seen once.

    If clients are sampled, this is an average, and holds only if a round consists of whole epochs
    of the clients.

    Args:
        examples: Number of training examples.
        replicas: Number of replicas.
        batch_size: Global batch size.
        partition: Example indices of each replica or client.

    Raises:
        InputError: As for `deal`.

    Examples:
        >>> ctde.data.steps_per_epoch(examples=1438, replicas=4, batch_size=64)
        23
    """
    _check_batch_size(batch_size, replicas, examples)
    if partition is None:
        return ceil(examples / batch_size)
    _check_partition(partition, replicas, examples)
    # A client takes part in every `len(partition) / replicas`-th round on average; with one part
    # per replica, in every round.
    return ceil(len(partition) * _part_epoch(partition, batch_size // replicas) / replicas)


def _reshuffled(
    split: TrainingSplit, replicas: int, per_replica: int, steps: int, seed: int
) -> Batches:
    examples = len(split.inputs)

    def epoch(number: int) -> Int32[np.ndarray, "steps replicas per_replica"]:
        order = np.random.default_rng((seed, number)).permutation(examples).astype(np.int32)

        # Pad the last batch with masked repetitions of its examples.
        missing = steps * per_replica * replicas - examples
        last_batch = order[(steps - 1) * per_replica * replicas :]
        order = np.concatenate([order, np.resize(~last_batch, missing)])

        # Assign the examples of each global batch to the replicas in turn, so that the global batch
        # is the same for any number of replicas.
        return order.reshape(steps, per_replica, replicas).swapaxes(1, 2)

    # Two draws are cached, for blocks of steps that extend into the next epoch.
    return Batches(
        split, 0 if split.is_on_disk else None, steps, steps, lru_cache(maxsize=2)(epoch)
    )


def _kept(split: TrainingSplit, parts: Parts, per_replica: int, steps: int, seed: int) -> Batches:
    replicas = len(parts)
    longest = max(map(len, parts))
    counts_all = split.is_on_disk

    def rows(
        array: Shaped[np.ndarray, "examples ..."],
    ) -> Shaped[np.ndarray, "replicas longest_part ..."]:
        # Pad each part to the longest one with the split's first example, as zeros are no example.
        own = np.repeat(np.repeat(array[None, :1], longest, axis=1), replicas, axis=0)
        for row, part in zip(own, parts, strict=True):
            row[: len(part)] = array[part]
        return own

    def epoch(number: int) -> Int32[np.ndarray, "steps replicas per_replica"]:
        # A replica without examples keeps `~0` everywhere.
        order = np.full((replicas, steps * per_replica), ~0, np.int32)
        for row, part, own in zip(order, parts, range(replicas), strict=True):
            if len(part):
                # Indices are those of the part, or, on disk, of the whole split.
                own_order = _shuffled(len(part), seed, number, own)
                row[:] = filled_up(part[own_order] if counts_all else own_order, len(row))
        return order.reshape(replicas, steps, per_replica).swapaxes(0, 1)

    # In memory, each replica's part becomes a row; on disk, the split is unchanged.
    held = split
    if not isinstance(split.inputs, DiskArray) and not isinstance(split.labels, DiskArray):
        held = Drawn(
            rows(split.inputs),
            rows(split.labels),
            rows(np.arange(len(split.labels), dtype=np.int32)),
            None if split.weights is None else rows(split.weights),
        )
    return Batches(held, 0, steps, steps, lru_cache(maxsize=2)(epoch))


def _shuffled(examples: int, seed: int, epoch: int, own: int) -> Int[np.ndarray, " examples"]:
    """Returns the order of the examples of part `own` in an epoch."""
    # Each part has a separate generator.
    return np.random.default_rng((seed, epoch, own)).permutation(examples)


def _sampled(
    split: TrainingSplit,
    clients: Parts,
    replicas: int,
    per_replica: int,
    steps: int,
    inner_steps: int,
    seed: int,
) -> Batches:
    with_examples = [number for number, client in enumerate(clients) if len(client)]
    epoch_steps = _part_epoch(clients, per_replica)

    def local_steps(client: int, number: int) -> Int32[np.ndarray, "inner_steps per_replica"]:
        # 1 + client, because numpy seeds (seed, number, 0) like the (seed, number) of `a_round`.
        rng = np.random.default_rng((seed, number, 1 + client))

        # One permutation per epoch of the client; the round may end within the last one.
        epochs = [
            filled_up(rng.permutation(clients[client]), epoch_steps * per_replica)
            for _ in range(ceil(inner_steps / epoch_steps))
        ]
        return np.concatenate(epochs).reshape(-1, per_replica)[:inner_steps]

    def a_round(number: int) -> Int32[np.ndarray, "inner_steps replicas per_replica"]:
        # Only clients with examples take part.
        drawn = np.random.default_rng((seed, number)).choice(with_examples, replicas, replace=False)
        return np.stack([local_steps(client, number) for client in drawn], axis=1)

    return Batches(
        split, 0 if split.is_on_disk else None, steps, inner_steps, lru_cache(maxsize=2)(a_round)
    )


def _part_epoch(parts: Parts, per_replica: int) -> int:
    return ceil(max(map(len, parts)) / per_replica)


def filled_up(order: Int[np.ndarray, " examples"], places: int) -> Int32[np.ndarray, " places"]:
    """Pads one or more indices to the length `places` with masked repetitions of them."""
    filled = np.resize(~order, places).astype(np.int32)
    filled[: len(order)] = order
    return filled


_MOST_STEPS = 2**31 - 1
"""Step numbers are int32."""


def count_steps(an_epoch: int, epochs: int | None, steps: int | None) -> int:
    """Returns the number of optimizer steps of a run, given by `epochs` or by `steps`.

    Args:
        an_epoch: Number of steps per epoch.
        epochs: Number of epochs, or None.
        steps: Number of steps, or None.

    Raises:
        InputError: If not exactly one of `epochs` and `steps` is given, it is less than 1, or the
            steps exceed int32.
    """
    if (epochs is None) == (steps is None):
        raise InputError(
            "epochs",
            f"or steps must be set, but not both, got epochs={epochs} and steps={steps}.",
        )
    check_at_least(1, epochs=epochs, steps=steps)
    total = steps or an_epoch * (epochs or 0)
    if total > _MOST_STEPS:
        option, given = ("epochs", epochs) if steps is None else ("steps", steps)
        raise InputError(
            option, f"must result in at most {_MOST_STEPS:,} optimizer steps, got {given:,}."
        )
    return total


def index_blocks(
    batches: Batches, inner_steps: int, most: int, start: int, stop: int
) -> Iterator[tuple[Int32[np.ndarray, "replicas rounds inner_steps per_replica"], int]]:
    """Cuts the steps in `range(start, stop)` into blocks of rounds of the same shape.

    Args:
        batches: Order of the examples.
        inner_steps: Number of steps per round.
        most: Number of rounds per block.
        start: First step.
        stop: Step after the last one.

    Yields:
        Indices of `most` rounds, and the number of them that have steps, which is less only in the
        last block. Missing steps are padded with empty batches.
    """
    for first in range(start, stop, most * inner_steps):
        steps = batches.steps(first, min(first + most * inner_steps, stop))
        # All blocks have one shape, so that one compiled program runs them; `~0` marks empty steps.
        filled = np.full((most * inner_steps, *steps.shape[1:]), ~0, np.int32)
        filled[: len(steps)] = steps

        # The leading axis is that of the replicas.
        rounds = filled.reshape(most, inner_steps, *steps.shape[1:])
        yield np.ascontiguousarray(np.moveaxis(rounds, 2, 0)), ceil(len(steps) / inner_steps)


def _check_batch_size(batch_size: int, replicas: int, examples: int) -> None:
    # Every replica needs at least one example.
    if examples < replicas:
        raise InputError(
            "devices",
            f"must be at most the number of training examples, {examples}, got {replicas}.",
        )

    # Suggest the nearest multiple that does not exceed the number of examples.
    if batch_size < 1 or batch_size % replicas:
        nearest = min(max(1, round(batch_size / replicas)), examples // replicas) * replicas
        raise InputError(
            "batch_size",
            f"must be a multiple of the {replicas} devices, got {batch_size}; use {nearest}.",
        )
    if batch_size > examples:
        raise InputError(
            "batch_size",
            f"must be at most the number of training examples, {examples:,}, got {batch_size}; "
            f"use {examples // replicas * replicas}.",
        )


def _check_partition(partition: Parts, replicas: int, examples: int) -> None:
    if not len(partition) or not np.array_equal(
        np.sort(np.concatenate(partition)), np.arange(examples)
    ):
        raise InputError(
            "partition",
            f"must assign each of the {examples:,} training examples to exactly one part, "
            f"got {len(partition)} parts with {sum(map(len, partition)):,} examples.",
        )
    if len(partition) < replicas:
        raise InputError(
            "partition",
            f"must have at least one part for each of the {replicas} devices, got "
            f"{len(partition)}.",
        )

    # A round samples as many clients as there are replicas, all of them with examples.
    with_examples = sum(len(part) > 0 for part in partition)
    if len(partition) > replicas > with_examples:
        raise InputError(
            "partition",
            f"must have at least {replicas} parts with examples, one for each device, got "
            f"{with_examples}.",
        )
