"""Batches of the user's own, which come one after another from any iterable, such as a loader of Grain."""

from collections.abc import Callable, Generator, Iterable, Sequence
from itertools import count, islice
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from ctde_jax.data.split import Split, as_batch
from ctde_jax.errors import InputError

Pair = tuple[ArrayLike, ArrayLike]
"""The inputs and the labels of a batch."""


class Stream(NamedTuple):
    """Training batches that come one after another."""

    batches: Callable[[int], Iterable[Pair]]
    """The batches of an epoch, which is counted from 0."""

    steps_per_epoch: int
    like: Split
    """The first batch, whose types and shapes all have."""

    classes: int
    """How many the labels may name; 0 where they are no classes."""

    def steps(self, start: int = 0) -> Generator[Split]:
        """Draws the batches of one epoch after the other, each checked.

        Those before the start are left out; of its epoch they have to be drawn.

        Raises:
            InputError: A batch is not like the first one, or an epoch has too few.
        """
        for epoch in count(start // self.steps_per_epoch):
            drawn, left_out = 0, max(0, start - epoch * self.steps_per_epoch)
            for drawn, batch in enumerate(islice(self.batches(epoch), self.steps_per_epoch), 1):
                if drawn > left_out:
                    yield self._checked(batch, f"batch {drawn - 1} of epoch {epoch}")
            if drawn < self.steps_per_epoch:
                raise InputError(
                    "steps_per_epoch",
                    f"must be the number of batches in an epoch, got {self.steps_per_epoch}, but epoch {epoch} ended "
                    f"after {drawn}.",
                )

    def _checked(self, pair: Pair, name: str) -> Split:
        batch = of_pair(name, pair, self.classes)
        for part, array, like in zip(batch._fields, batch, self.like, strict=True):
            if (array.shape[1:], array.dtype) != (like.shape[1:], like.dtype):
                raise InputError(
                    "batches",
                    f"must be like the first one, whose {part} are {like.dtype}{[..., *like.shape[1:]]}, got "
                    f"{array.dtype}{[..., *array.shape[1:]]} in {name}.".replace(
                        "Ellipsis", "examples"
                    ),
                )
        return batch


def check_stream(
    stream: Stream, replicas: int, batch_size: int, partition: Sequence[np.ndarray] | None
) -> None:
    """Raises InputError if the batches of a stream cannot be dealt evenly, or with a partition."""
    if batch_size < 1 or batch_size % replicas:
        nearest = max(1, round(batch_size / replicas)) * replicas
        raise InputError(
            "batch_size",
            f"must be a multiple of the {replicas} devices, got {batch_size}; {nearest} would do.",
        )
    if partition is not None:
        raise InputError(
            "partition", "goes with arrays, and not with batches that come one after another."
        )
    check_size(len(stream.like.inputs), batch_size)


def check_size(examples: int, batch_size: int) -> None:
    """Raises InputError for a batch of more examples than `fit` was told."""
    if examples > batch_size:
        raise InputError(
            "batch_size",
            f"must be that of the data set's batches, got {batch_size} and a batch of {examples:,}.",
        )


def of_pair(name: str, pair: Pair, classes: int = 0) -> Split:
    """Makes a split of a pair that a stream gives, or raises InputError."""
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise InputError(
            "batches",
            f"must be pairs of inputs and labels, got {type(pair).__name__} {pair!r:.60} as {name}.",
        )
    return as_batch(name, *pair, classes)
