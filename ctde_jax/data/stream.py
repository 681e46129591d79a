"""Batches of the user's own, which come one after another from any iterable, such as a loader of Grain."""

from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import replace
from itertools import count, islice
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from ctde_jax.data.classes import note_on_numbers, numbered
from ctde_jax.data.dataset import Dataset, Split, as_batch, from_arrays, notes_on_inputs
from ctde_jax.data.disk import DiskArray
from ctde_jax.errors import InputError, check_at_least

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
        batch = _as_batch(name, pair, self.classes)
        for part, array, like in zip(batch._fields, batch, self.like, strict=True):
            if (array.shape[1:], array.dtype) != (like.shape[1:], like.dtype):
                raise InputError(
                    "batches",
                    f"must be like the first one, whose {part} are {like.dtype}{[..., *like.shape[1:]]}, got "
                    f"{array.dtype}{[..., *array.shape[1:]]} in {name}.".replace("Ellipsis", "examples"),
                )
        return batch


class Arrivals(NamedTuple):
    """A stream that is dealt to replicas."""

    stream: Stream
    replicas: int
    batch_size: int
    axis: int = 0
    """Each device holds what was drawn for it."""

    @property
    def steps_per_epoch(self) -> int:
        """After so many steps an epoch is over."""
        return self.stream.steps_per_epoch

    def inputs(self, step: int) -> np.ndarray:
        """Returns the inputs of the first batch, the only one that can be had twice."""
        assert step == 0, "a stream does not come back"
        return np.asarray(self.stream.like.inputs)


def from_batches(
    batches: Callable[[int], Iterable[Pair]],
    steps_per_epoch: int,
    x_test: np.ndarray | DiskArray,
    y_test: np.ndarray | DiskArray,
    *,
    name: str = "batches",
    classes: tuple[str, ...] | None = None,
) -> Dataset:
    """Makes a data set of training batches that come from an iterable, and of test arrays.

    The batches train in the order in which they come, and a thread draws them while the devices compute: what goes
    wrong there is raised by `fit`. Types and labels are those of `from_arrays`. A loader of Grain that gives pairs goes
    in as `from_batches(lambda epoch: loader, ...)`.

    Args:
        batches: Called with the number of an epoch, counted from 0, it returns an iterable of pairs of inputs
            `[examples, ...]` and labels. A batch has as many examples as `fit` is told, or fewer, as the last one of an
            epoch may. It is also called here, to see the first batch.
        steps_per_epoch: How many batches are drawn in an epoch.
        x_test: Test inputs, shaped like those of the batches.
        y_test: Test labels.
        name: What to call the data set.
        classes: Label names; by default the numbers from 0 to the largest label of the test split and the first batch.

    Raises:
        InputError: The first batch is no pair of arrays, or does not go with the test arrays.
    """
    check_at_least(1, steps_per_epoch=steps_per_epoch)
    if not callable(batches):
        raise InputError(
            "batches",
            f"must be a function from the number of an epoch to an iterable, got {type(batches).__name__}; pass "
            "lambda epoch: loader.",
        )
    first = next(iter(batches(0)), None)
    if first is None:
        raise InputError("batches", "must give at least one batch, got none in epoch 0.")
    like = _as_batch("batch 0 of epoch 0", first)
    is_numbered = classes is None
    if classes is None:
        test = as_batch("the test split", x_test, y_test)
        own = numbered(like.labels)
        classes = max(own, numbered(test.labels), key=len) if own else ()  # integers may test targets that are floats
    dataset = from_arrays(*like, x_test, y_test, name=name, classes=classes)
    stream = Stream(batches, steps_per_epoch, like, len(classes))
    # Of the notes on classes only the one on their number holds, as one batch lacks some of them.
    notes = [*(note_on_numbers(len(classes), "the labels") if is_numbered else []), *notes_on_inputs(dataset)]
    return replace(dataset, stream=stream, notes=tuple(notes))


def deal_stream(
    stream: Stream, replicas: int, batch_size: int, partition: Sequence[np.ndarray] | None = None
) -> Arrivals:
    """Deals every batch evenly to the replicas.

    Raises:
        InputError: The batch size does not divide over the replicas or is not that of the batches, or there is a
            partition.
    """
    if batch_size < 1 or batch_size % replicas:
        nearest = max(1, round(batch_size / replicas)) * replicas
        raise InputError(
            "batch_size", f"must be a multiple of the {replicas} devices, got {batch_size}; {nearest} would do."
        )
    if partition is not None:
        raise InputError("partition", "goes with arrays, and not with batches that come one after another.")
    check_size(len(stream.like.inputs), batch_size)
    return Arrivals(stream, replicas, batch_size)


def check_size(examples: int, batch_size: int) -> None:
    """Raises InputError for a batch of more examples than `fit` was told."""
    if examples > batch_size:
        raise InputError(
            "batch_size", f"must be that of the data set's batches, got {batch_size} and a batch of {examples:,}."
        )


def _as_batch(name: str, pair: Pair, classes: int = 0) -> Split:
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise InputError(
            "batches", f"must be pairs of inputs and labels, got {type(pair).__name__} {pair!r:.60} as {name}."
        )
    return as_batch(name, *pair, classes)
