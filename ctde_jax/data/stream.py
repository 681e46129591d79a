"""Training batches from any iterable, such as a Grain data loader."""

from collections.abc import Callable, Generator, Iterable, Sequence
from itertools import count, islice
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from ctde_jax.data.split import TrainingSplit, as_batch
from ctde_jax.errors import InputError

Pair = tuple[ArrayLike, ArrayLike] | tuple[ArrayLike, ArrayLike, ArrayLike]
"""Inputs `[examples, ...]`, labels, and possibly weights `[examples]` of a batch."""


class Stream(NamedTuple):
    """Training batches that an iterable yields, epoch by epoch."""

    batches: Callable[[int], Iterable[Pair]]
    """Returns the batches of an epoch; epochs are counted from 0."""

    steps_per_epoch: int
    """Number of batches per epoch; further ones are ignored."""

    like: TrainingSplit
    """The first batch; all batches have its dtypes and example shapes."""

    classes: int
    """Number of classes; 0 if the labels are targets."""

    def steps(self, start: int = 0) -> Generator[TrainingSplit]:
        """Yields the batches from step `start` on, epoch after epoch, and checks each of them.

        If `start` lies within an epoch, the earlier batches of this epoch are drawn and discarded.

        Raises:
            InputError: If a batch is not a pair of valid arrays, differs from the first batch in
                dtype, example shape or in having weights, or an epoch has fewer than
                `steps_per_epoch` batches.
        """
        for epoch in count(start // self.steps_per_epoch):
            # An iterable cannot seek, so the first epoch is drawn from its first batch on.
            drawn = 0
            left_out = max(0, start - epoch * self.steps_per_epoch)
            for drawn, batch in enumerate(islice(self.batches(epoch), self.steps_per_epoch), 1):
                if drawn > left_out:
                    yield self._checked(batch, f"batch {drawn - 1} of epoch {epoch}")

            # An iterable that ends early would shift the schedule of all later epochs.
            if drawn < self.steps_per_epoch:
                raise InputError(
                    "steps_per_epoch",
                    f"must be the number of batches in an epoch, got {self.steps_per_epoch}, but "
                    f"epoch {epoch} ended after {drawn}.",
                )

    def _checked(self, pair: Pair, name: str) -> TrainingSplit:
        """Converts a pair to a split and compares its dtypes and example shapes with `like`."""
        batch = of_pair(name, pair, self.classes)
        if len(batch) != len(self.like):
            had, got = (
                "no weights" if each.weights is None else "weights" for each in (self.like, batch)
            )
            raise InputError(
                "batches", f"must match the first batch, which has {had}, got {got} in {name}."
            )
        for part, array, like in zip(batch._fields, batch, self.like, strict=True):
            if (array.shape[1:], array.dtype) != (like.shape[1:], like.dtype):
                # A shape prints as `[Ellipsis, 28, 28]`; the message shows `[examples, 28, 28]`.
                raise InputError(
                    "batches",
                    f"must match the first batch, whose {part} are "
                    f"{like.dtype}{[..., *like.shape[1:]]}, got "
                    f"{array.dtype}{[..., *array.shape[1:]]} in {name}.".replace(
                        "Ellipsis", "examples"
                    ),
                )
        return batch


def check_stream(
    stream: Stream, replicas: int, batch_size: int, partition: Sequence[np.ndarray] | None
) -> None:
    """Raises InputError if a stream cannot be used with these arguments of `fit`.

    It cannot if the batch size is not a multiple of the replicas or less than the first batch, or
    if a partition is given.
    """
    if batch_size < 1 or batch_size % replicas:
        nearest = max(1, round(batch_size / replicas)) * replicas
        raise InputError(
            "batch_size",
            f"must be a multiple of the {replicas} devices, got {batch_size}; use {nearest}.",
        )
    # A partition consists of indices into arrays, and the examples of a stream have none.
    if partition is not None:
        raise InputError("partition", "requires a data set of arrays, got one that yields batches.")
    check_size(len(stream.like.inputs), batch_size)


def check_size(examples: int, batch_size: int) -> None:
    """Raises InputError if a batch of `examples` exceeds the batch size of `fit`."""
    if examples > batch_size:
        raise InputError(
            "batch_size",
            f"must be the size of the data set's batches, got {batch_size}, but a batch has "
            f"{examples:,} examples.",
        )


def of_pair(name: str, pair: Pair, classes: int = 0) -> TrainingSplit:
    """Converts a pair of inputs and labels, or a triple with weights, from a stream to a split.

    Args:
        name: Description of the batch in error messages.
        pair: Batch that the iterable yielded.
        classes: Number of classes; 0 if the labels are targets.

    Raises:
        InputError: If it is neither a pair nor a triple, or as for `as_batch`.
    """
    if not isinstance(pair, (tuple, list)) or len(pair) not in (2, 3):
        raise InputError(
            "batches",
            "must yield pairs of inputs and labels, or triples with weights, got "
            f"{type(pair).__name__} {pair!r:.60} as {name}.",
        )
    return as_batch(name, *pair, classes=classes)
