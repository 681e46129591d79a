"""Where the examples of a run come from: the memory of the devices, a disk, or batches that arrive.

The round is the same for all three, as its indices count what a device holds. If the training split is in memory, the
devices hold it, and a piece is indices alone. If it is on disk, or comes in batches, a piece brings its own examples.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Protocol

import jax
import numpy as np

from ctde_jax.data import (
    Batches,
    Dataset,
    Drawn,
    Split,
    Stream,
    check_size,
    check_stream,
    deal,
    filled_up,
    index_blocks,
)
from ctde_jax.devices import PyTree, replica
from ctde_jax.rounds.feed import Feed, Span, prefetched

_PLACES = 2**20
"""Indices of all devices together that are put on the devices at once; 4 MiB."""


class ExampleSource(Protocol):
    """What a run needs to know of its training examples."""

    @property
    def axis(self) -> int | None:
        """None if every device holds all examples, 0 if each holds its own row."""
        ...

    @property
    def steps_per_epoch(self) -> int:
        """Steps after which every example has been seen, on average if clients are sampled."""
        ...

    @property
    def piece_steps(self) -> int:
        """Most steps whose indices are put on the devices at once; 1 if their examples travel with them."""
        ...

    def inputs(self, step: int) -> np.ndarray:
        """Returns the inputs of the global batch of a step, `[examples, ...]`."""
        ...

    def shapes(self, span: Span) -> tuple[PyTree, jax.ShapeDtypeStruct]:
        """Returns shapes and dtypes of the examples and the indices of a piece."""
        ...

    def feed(self, devices: Sequence[jax.Device]) -> Feed:
        """Puts on the devices what stays there, and returns what draws the pieces."""
        ...


def make_source(
    data: Dataset,
    replicas: int,
    batch_size: int,
    seed: int,
    partition: Sequence[np.ndarray] | None = None,
    inner_steps: int = 1,
) -> "Resident | OnDisk | Streamed":
    """Deals the training examples to the replicas; arguments and errors are those of `data.deal`."""
    if data.stream is not None:
        check_stream(data.stream, replicas, batch_size, partition)
        return Streamed(data.stream, replicas, batch_size)
    batches = deal(data.train, replicas, batch_size, seed, partition, inner_steps)
    return OnDisk(batches) if batches.is_on_disk else Resident(batches)


@dataclass(frozen=True)
class Resident:
    """Examples in memory, which the devices hold for the whole run."""

    batches: Batches

    @property
    def axis(self) -> int | None:
        """None if every device holds all examples, 0 if each holds its own row."""
        return self.batches.axis

    @property
    def steps_per_epoch(self) -> int:
        """Steps after which every example has been seen, on average if clients are sampled."""
        return self.batches.steps_per_epoch

    @property
    def piece_steps(self) -> int:
        """Most steps whose indices are put on the devices at once."""
        return max(1, _PLACES // self.batches.steps(0, 1).size)

    def inputs(self, step: int) -> np.ndarray:
        """Returns the inputs of the global batch of a step, `[examples, ...]`."""
        return self.batches.inputs(step)

    def shapes(self, span: Span) -> tuple[PyTree, jax.ShapeDtypeStruct]:
        """Returns shapes and dtypes of all examples, and of the indices of a piece."""
        _, replicas, per_replica = self.batches.steps(0, 1).shape
        examples = jax.tree.map(
            lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype), self.batches.split
        )
        return examples, _shape_of_indices(span, replicas, per_replica)

    def hold(self, devices: Sequence[jax.Device]) -> PyTree:
        """Puts the examples on the devices."""
        place = replica.replicate if self.axis is None else replica.shard
        return place(self.batches.split, devices)

    def feed(self, devices: Sequence[jax.Device]) -> Feed:
        """Puts the examples on the devices, and returns what draws the indices."""
        held = self.hold(devices)
        return lambda spans: prefetched(
            (held, replica.shard(indices, devices), rounds)
            for indices, rounds in _indices(self.batches, spans)
        )


@dataclass(frozen=True)
class OnDisk:
    """Examples in files, of which a host reads only what its own devices get."""

    batches: Batches

    axis = 0
    piece_steps = 1

    @property
    def steps_per_epoch(self) -> int:
        """Steps after which every example has been seen, on average if clients are sampled."""
        return self.batches.steps_per_epoch

    def inputs(self, step: int) -> np.ndarray:
        """Returns the inputs of the global batch of a step, `[examples, ...]`."""
        return self.batches.inputs(step)

    def shapes(self, span: Span) -> tuple[PyTree, jax.ShapeDtypeStruct]:
        """Returns shapes and dtypes of the examples and the indices of a piece."""
        _, replicas, per_replica = self.batches.steps(0, 1).shape
        indices = _shape_of_indices(span, replicas, per_replica)
        return _shape_of_drawn(self.batches.split, indices), indices

    def feed(self, devices: Sequence[jax.Device]) -> Feed:
        """Returns what reads the examples of the pieces."""
        here = replica.own(devices)
        return lambda spans: prefetched(
            (*replica.shard(each, devices), rounds) for *each, rounds in self._read(here, spans)
        )

    def _read(
        self, here: list[int], spans: Iterable[Span]
    ) -> Iterator[tuple[Drawn, np.ndarray, int]]:
        """Reads the examples that these replicas have of each piece."""
        split = self.batches.split
        for indices, rounds in _indices(self.batches, spans):
            indices = indices[here]
            numbers = np.where(indices >= 0, indices, ~indices).reshape(len(indices), -1)
            drawn = Drawn(split.inputs[numbers], split.labels[numbers], numbers)
            yield drawn, _places(indices >= 0), rounds


@dataclass(frozen=True)
class Streamed:
    """Batches of the user's own that arrive one after another, of which each device gets an equal part."""

    stream: Stream
    replicas: int
    batch_size: int

    axis = 0
    piece_steps = 1

    @property
    def steps_per_epoch(self) -> int:
        """Batches of an epoch."""
        return self.stream.steps_per_epoch

    def inputs(self, step: int) -> np.ndarray:
        """Returns the inputs of the first batch, the only one that can be drawn twice."""
        assert step == 0, "a stream does not come back"
        return np.asarray(self.stream.like.inputs)

    def shapes(self, span: Span) -> tuple[PyTree, jax.ShapeDtypeStruct]:
        """Returns shapes and dtypes of the examples and the indices of a piece."""
        indices = _shape_of_indices(span, self.replicas, self.batch_size // self.replicas)
        return _shape_of_drawn(self.stream.like, indices), indices

    def feed(self, devices: Sequence[jax.Device]) -> Feed:
        """Returns what draws the batches of the pieces."""
        here = replica.own(devices)
        return lambda spans: prefetched(
            (*replica.shard(each, devices), rounds) for *each, rounds in self._draw(here, spans)
        )

    def _draw(
        self, here: list[int], spans: Iterable[Span]
    ) -> Iterator[tuple[Drawn, np.ndarray, int]]:
        """Draws the batches of each piece, and keeps what these replicas have of them."""
        spans = list(spans)
        steps = self.stream.steps(spans[0].start if spans else 0)
        for span in spans:
            size = span.piece_rounds * span.round_steps
            for first in range(span.start, span.stop, size):
                dealt = [self._deal(next(steps)) for _ in range(min(size, span.stop - first))]
                rounds = ceil(len(dealt) / span.round_steps)
                empty = (dealt[0][0], np.zeros_like(dealt[0][1]))
                dealt += [empty] * (size - len(dealt))
                drawn, is_example = jax.tree.map(
                    lambda *own: np.concatenate(own, axis=1)[here], *dealt
                )
                shape = (len(here), span.piece_rounds, span.round_steps, -1)
                yield drawn, _places(is_example.reshape(shape)), rounds

    def _deal(self, batch: Split) -> tuple[Drawn, np.ndarray]:
        """Deals a batch as `data.deal` deals arrays, padded with itself, and returns which places are examples."""
        check_size(len(batch.inputs), self.batch_size)
        order = filled_up(np.arange(len(batch.inputs)), self.batch_size)
        order = order.reshape(-1, self.replicas).T
        numbers = np.where(order >= 0, order, ~order)
        return Drawn(batch.inputs[numbers], batch.labels[numbers], numbers), order >= 0


def _shape_of_indices(span: Span, replicas: int, per_replica: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(
        (replicas, span.piece_rounds, span.round_steps, per_replica), np.int32
    )


def _shape_of_drawn(split: Split | Drawn, indices: jax.ShapeDtypeStruct) -> Drawn:
    replicas, rounds, round_steps, per_replica = indices.shape
    own = (replicas, rounds * round_steps * per_replica)

    def like(shape: tuple[int, ...], dtype: np.dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((*own, *shape), dtype)

    inputs, labels = split.inputs, split.labels
    leaves = [
        like(inputs.shape[1:], inputs.dtype),
        like(labels.shape[1:], labels.dtype),
        like((), np.dtype(np.int32)),
    ]
    return Drawn._make(leaves)


def _indices(batches: Batches, spans: Iterable[Span]) -> Iterator[tuple[np.ndarray, int]]:
    for span in spans:
        yield from index_blocks(batches, span.round_steps, span.piece_rounds, span.start, span.stop)


def _places(is_example: np.ndarray) -> np.ndarray:
    """Counts the places that each replica has; `[replica, rounds, round_steps, per_replica]`."""
    places = np.arange(is_example[0].size, dtype=np.int32).reshape(is_example.shape[1:])
    return np.where(is_example, places, ~places)
