"""Which examples a device sees at which step: a pure function of the seed and the step, never of what ran before.

A batch is written as indices into the training split, `int32[replica, per_replica]`. Where there are fewer examples
than places, the rest is filled up with repetitions that do not count: `~i`, a negative number, repeats example `i` of
the same batch, device or client. So the last batch of an epoch is short instead of dropped, whoever has run out of data
has a row of negative numbers, and a model never sees anything but real examples.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import ceil

import numpy as np

from ctde_jax.data.disk import DiskArray
from ctde_jax.data.split import Drawn, Split
from ctde_jax.errors import InputError, check_at_least


@dataclass(frozen=True)
class Batches:
    """The order in which the replicas see the examples."""

    split: Split | Drawn
    """What the indices count: the whole training split, or a row `[replica, longest_part, ...]` for each replica."""

    axis: int | None
    """None where every device holds all of `split`, 0 where each holds its own row of it, or, where the split is on
    disk, what was drawn for it."""

    steps_per_epoch: int
    """After so many steps every example has been seen once; where clients are sampled, once on average."""

    steps_per_draw: int
    """The order is drawn anew after so many steps: after an epoch, or, where clients are sampled, after a round."""

    draw: Callable[[int], np.ndarray]
    """`draw(number) -> int32[steps_per_draw, replica, per_replica]`"""

    @property
    def is_on_disk(self) -> bool:
        """Whether examples are read when it is their turn."""
        return isinstance(self.split, Split) and self.split.is_on_disk

    def steps(self, start: int, stop: int) -> np.ndarray:
        """Returns the batches of these steps, at least one, counted from the start of training.

        Shape and type: `int32[stop - start, replica, per_replica]`.
        """
        length = self.steps_per_draw
        numbers = range(start // length, ceil(stop / length))
        pieces = [self.draw(n)[max(0, start - n * length) : stop - n * length] for n in numbers]
        return np.concatenate(pieces)

    def inputs(self, step: int) -> np.ndarray:
        """Returns the inputs of the batch of a step, of all replicas together: `[examples, ...]`.

        Where the examples are dealt anew in every epoch, their order is the same on any number of replicas.
        """
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
    split: Split,
    replicas: int,
    batch_size: int,
    seed: int,
    partition: Sequence[np.ndarray] | None = None,
    inner_steps: int = 1,
) -> Batches:
    """Deals the examples to the replicas.

    Without a partition every epoch is a new permutation of all examples, and the global batch of a step is the same on
    any number of replicas. With a part for each replica, every replica goes through its own examples, in a new order in
    every epoch; an epoch lasts until the largest part is through, and the other replicas have no examples meanwhile.

    With more parts than replicas the parts are *clients*, of whom as many as there are replicas take part in a round,
    drawn at random without replacement (McMahan et al., 2017). A client's own epoch lasts as many steps as the largest
    client needs. The inner steps of a round are one such epoch after the other, each in a new order, and every round
    begins anew: E times a client's epoch gives each client exactly E passes over its examples.

    Args:
        split: The training examples.
        replicas: How many there are.
        batch_size: Examples of one step over all replicas together.
        seed: Of all permutations, and of the clients drawn.
        partition: The indices of the examples of each replica, or of each client.
        inner_steps: Steps of a round, at least 1; only read where clients are drawn.

    Raises:
        InputError: The batch size does not divide over the replicas or is larger than the data, or the partition does
            not give each example to exactly one part, or too few parts have examples.
    """
    steps = steps_per_epoch(len(split.inputs), replicas, batch_size, partition)
    per_replica = batch_size // replicas
    if partition is None:
        return _reshuffled(split, replicas, per_replica, steps, seed)
    if len(partition) == replicas:
        return _kept(split, partition, per_replica, steps, seed)
    check_at_least(1, inner_steps=inner_steps)
    return _sampled(split, partition, replicas, per_replica, steps, inner_steps, seed)


def steps_per_epoch(
    examples: int, replicas: int, batch_size: int, partition: Sequence[np.ndarray] | None = None
) -> int:
    """Returns after how many steps every example has been seen; the arguments and errors are those of `deal`.

    Where clients are drawn, every example has then been seen once on average, if a round is made of whole epochs of the
    clients.
    """
    _check_batch_size(batch_size, replicas, examples)
    if partition is None:
        return ceil(examples / batch_size)
    _check_partition(partition, replicas, examples)
    return ceil(len(partition) * _part_epoch(partition, batch_size // replicas) / replicas)


def _reshuffled(split: Split, replicas: int, per_replica: int, steps: int, seed: int) -> Batches:
    examples = len(split.inputs)

    def epoch(number: int) -> np.ndarray:
        order = np.random.default_rng((seed, number)).permutation(examples).astype(np.int32)
        missing = steps * per_replica * replicas - examples
        last_batch = order[(steps - 1) * per_replica * replicas :]
        order = np.concatenate([order, np.resize(~last_batch, missing)])
        return order.reshape(steps, per_replica, replicas).swapaxes(1, 2)

    return Batches(
        split, 0 if split.is_on_disk else None, steps, steps, lru_cache(maxsize=2)(epoch)
    )


def _kept(
    split: Split, parts: Sequence[np.ndarray], per_replica: int, steps: int, seed: int
) -> Batches:
    replicas, longest, counts_all = len(parts), max(map(len, parts)), split.is_on_disk

    def rows(array: np.ndarray) -> np.ndarray:
        own = np.repeat(
            np.repeat(array[None, :1], longest, axis=1), replicas, axis=0
        )  # never all zeros
        for row, part in zip(own, parts, strict=True):
            row[: len(part)] = array[part]
        return own

    def epoch(number: int) -> np.ndarray:
        order = np.full((replicas, steps * per_replica), ~0, np.int32)
        for row, part, own in zip(order, parts, range(replicas), strict=True):
            if len(part):
                own_order = np.random.default_rng((seed, number, own)).permutation(len(part))
                row[:] = filled_up(part[own_order] if counts_all else own_order, len(row))
        return order.reshape(replicas, steps, per_replica).swapaxes(0, 1)

    held = split
    if not isinstance(split.inputs, DiskArray) and not isinstance(split.labels, DiskArray):
        held = Drawn(
            rows(split.inputs),
            rows(split.labels),
            rows(np.arange(len(split.labels), dtype=np.int32)),
        )
    return Batches(held, 0, steps, steps, lru_cache(maxsize=2)(epoch))


def _sampled(
    split: Split,
    clients: Sequence[np.ndarray],
    replicas: int,
    per_replica: int,
    steps: int,
    inner_steps: int,
    seed: int,
) -> Batches:
    with_examples = [number for number, client in enumerate(clients) if len(client)]
    epoch_steps = _part_epoch(clients, per_replica)

    def local_steps(client: int, number: int) -> np.ndarray:
        rng = np.random.default_rng(
            (seed, number, 1 + client)
        )  # numpy takes (seed, number, 0) for (seed, number)
        epochs = [
            filled_up(rng.permutation(clients[client]), epoch_steps * per_replica)
            for _ in range(ceil(inner_steps / epoch_steps))
        ]
        return np.concatenate(epochs).reshape(-1, per_replica)[:inner_steps]

    def a_round(number: int) -> np.ndarray:
        drawn = np.random.default_rng((seed, number)).choice(with_examples, replicas, replace=False)
        return np.stack([local_steps(client, number) for client in drawn], axis=1)

    return Batches(
        split, 0 if split.is_on_disk else None, steps, inner_steps, lru_cache(maxsize=2)(a_round)
    )


def _part_epoch(parts: Sequence[np.ndarray], per_replica: int) -> int:
    return ceil(max(map(len, parts)) / per_replica)


def filled_up(order: np.ndarray, places: int) -> np.ndarray:
    """Repeats the order until the places are taken; what is repeated does not count."""
    filled = np.resize(~order, places).astype(np.int32)
    filled[: len(order)] = order
    return filled


_MOST_STEPS = 2**31 - 1
"""A step's number is an int32."""


def count_steps(an_epoch: int, epochs: int | None, steps: int | None) -> int:
    """Returns the optimizer steps of a run, which is so many epochs or so many steps long."""
    if (epochs is None) == (steps is None):
        raise InputError(
            "epochs",
            f"or steps must be given, and not both, got epochs={epochs} and steps={steps}.",
        )
    check_at_least(1, epochs=epochs, steps=steps)
    total = steps or an_epoch * (epochs or 0)
    if total > _MOST_STEPS:
        option, given = ("epochs", epochs) if steps is None else ("steps", steps)
        raise InputError(
            option, f"must make at most {_MOST_STEPS:,} optimizer steps, got {given:,}."
        )
    return total


def index_blocks(
    batches: Batches, inner_steps: int, most: int, start: int, stop: int
) -> Iterator[tuple[np.ndarray, int]]:
    """Cuts the steps from `start` to `stop` into pieces of `most` rounds, the last of what is left.

    Yields:
        `int32[replica, most, inner_steps, per_replica]`, and how many of these rounds there are. A last round that is
        short of steps is filled up with empty ones.
    """
    for first in range(start, stop, most * inner_steps):
        steps = batches.steps(first, min(first + most * inner_steps, stop))
        filled = np.full((most * inner_steps, *steps.shape[1:]), ~0, np.int32)
        filled[: len(steps)] = steps
        rounds = filled.reshape(most, inner_steps, *steps.shape[1:])
        yield np.ascontiguousarray(np.moveaxis(rounds, 2, 0)), ceil(len(steps) / inner_steps)


def _check_batch_size(batch_size: int, replicas: int, examples: int) -> None:
    if examples < replicas:
        raise InputError(
            "devices", f"must be at most the {examples} training examples, got {replicas}."
        )
    if batch_size < 1 or batch_size % replicas:
        nearest = min(max(1, round(batch_size / replicas)), examples // replicas) * replicas
        raise InputError(
            "batch_size",
            f"must be a multiple of the {replicas} devices, got {batch_size}; {nearest} would do.",
        )
    if batch_size > examples:
        raise InputError(
            "batch_size",
            f"must be at most the {examples:,} training examples, got {batch_size}; "
            f"{examples // replicas * replicas} would do.",
        )


def _check_partition(partition: Sequence[np.ndarray], replicas: int, examples: int) -> None:
    if not len(partition) or not np.array_equal(
        np.sort(np.concatenate(partition)), np.arange(examples)
    ):
        raise InputError(
            "partition",
            f"must give each of the {examples:,} training examples to exactly one part, "
            f"got {len(partition)} parts with {sum(map(len, partition)):,} examples.",
        )
    if len(partition) < replicas:
        raise InputError(
            "partition",
            f"must have a part for each of the {replicas} devices, or more, of which some are drawn in every round, "
            f"got {len(partition)}.",
        )
    with_examples = sum(len(part) > 0 for part in partition)
    if len(partition) > replicas > with_examples:
        raise InputError(
            "partition",
            f"must have examples in at least {replicas} parts, one for each device, got {with_examples}.",
        )
