"""Sources of training examples: the memory of the devices, a disk, or a stream of batches.

The round is the same for all three, because its indices refer to the examples on the device. If the
training split is in memory, the devices hold it during the whole run, and only indices are
transferred. If it is on disk, or a stream, each piece (see `feed.py`) includes its examples.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from math import ceil
from typing import Protocol

import jax
import numpy as np
from jaxtyping import Int32

from ctde_jax.data import (
    Batches,
    Dataset,
    Drawn,
    Stream,
    TrainingSplit,
    check_size,
    check_stream,
    deal,
    filled_up,
    index_blocks,
    take,
)
from ctde_jax.devices import PyTree, replica
from ctde_jax.rounds.feed import Feed, Span, prefetched

_PLACES = 2**20
"""Maximum number of indices, over all devices, that are transferred at once; 4 MiB."""


class ExampleSource(Protocol):
    """The interface of a source of training examples."""

    @property
    def axis(self) -> int | None:
        """None if every device holds all examples, 0 if each holds one row of them."""
        ...

    @property
    def steps_per_epoch(self) -> int:
        """Number of steps in which every example is used once; a mean if clients are sampled."""
        ...

    @property
    def piece_steps(self) -> int:
        """Maximum number of steps in a piece; 1, the minimum, if a piece includes its examples."""
        ...

    def inputs(self, step: int) -> np.ndarray:
        """Returns the inputs of the global batch of a step, `[examples, ...]`."""
        ...

    def shapes(self, span: Span) -> tuple[PyTree, jax.ShapeDtypeStruct]:
        """Returns shapes and dtypes of the examples and the indices of a piece."""
        ...

    def feed(self, devices: Sequence[jax.Device]) -> Feed:
        """Returns the feed of pieces; first transfers the examples that the devices hold."""
        ...


def make_source(
    data: Dataset,
    replicas: int,
    batch_size: int,
    seed: int,
    partition: Sequence[np.ndarray] | None = None,
    inner_steps: int = 1,
) -> "Resident | OnDisk | Streamed":
    """Makes the source of the training examples, which distributes them over the replicas.

    Args:
        data: Data set with a training split or a stream.
        replicas: Number of replicas.
        batch_size: Global batch size.
        seed: Random seed for the order of the examples and the sampling of clients.
        partition: Example indices of each replica or client, `int[examples]` arrays.
        inner_steps: Number of steps per round.

    Returns:
        `Streamed` for a stream; otherwise `OnDisk` or `Resident`, depending on the arrays.

    Raises:
        InputError: As for `data.deal`, or for `data.check_stream` if batches come from a stream.
    """
    if data.stream is not None:
        check_stream(data.stream, replicas, batch_size, partition)
        return Streamed(data.stream, replicas, batch_size)
    batches = deal(data.train, replicas, batch_size, seed, partition, inner_steps)
    return OnDisk(batches) if batches.is_on_disk else Resident(batches)


@dataclass(frozen=True)
class Resident:
    """Examples in memory, which the devices hold during the whole run."""

    batches: Batches

    @property
    def axis(self) -> int | None:
        """None if every device holds all examples, 0 if each holds one row of them."""
        return self.batches.axis

    @property
    def steps_per_epoch(self) -> int:
        """Number of steps in which every example is used once; a mean if clients are sampled."""
        return self.batches.steps_per_epoch

    @property
    def piece_steps(self) -> int:
        """Maximum number of steps whose indices are transferred at once."""
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
        """Transfers the examples to the devices."""
        place = replica.replicate if self.axis is None else replica.shard
        return place(self.batches.split, devices)

    def feed(self, devices: Sequence[jax.Device]) -> Feed:
        """Transfers the examples to the devices, and returns the feed of indices."""
        # The same arrays are part of every piece; only indices are transferred again.
        held = self.hold(devices)
        return lambda spans: prefetched(
            (held, replica.shard(indices, devices), rounds)
            for indices, rounds in indices_of(self.batches, spans)
        )


@dataclass(frozen=True)
class OnDisk:
    """Examples in files; each host reads only those of its devices."""

    batches: Batches

    # Each piece includes its examples, so pieces are as short as possible: one row.
    axis = 0
    piece_steps = 1

    @property
    def steps_per_epoch(self) -> int:
        """Number of steps in which every example is used once; a mean if clients are sampled."""
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
        """Returns the feed of pieces, which include the examples that it reads."""
        return _feed_of_drawn(self._read, devices)

    def _read(
        self, here: list[int], spans: Iterable[Span]
    ) -> Iterator[tuple[Drawn, np.ndarray, int]]:
        """Yields the examples, indices and number of rounds of each piece.

        Args:
            here: Indices of the replicas on this host, whose examples are read.
            spans: Spans that are divided into the pieces.
        """
        split = self.batches.split
        assert not isinstance(split, Drawn), "parts are drawn from the whole split"
        for indices, rounds in indices_of(self.batches, spans):
            indices = indices[here]
            # A negative index ~i is padding: example i is read and masked.
            numbers = np.where(indices >= 0, indices, ~indices).reshape(len(indices), -1)
            drawn = take(split, numbers)
            # The indices of a piece refer to its examples, one for each index.
            yield drawn, _places(indices >= 0), rounds


@dataclass(frozen=True)
class Streamed:
    """Batches that an iterable of the user yields; each device gets an equal part of each batch."""

    stream: Stream
    replicas: int
    batch_size: int

    # As on disk, each piece includes its examples.
    axis = 0
    piece_steps = 1

    @property
    def steps_per_epoch(self) -> int:
        """Number of batches in an epoch."""
        return self.stream.steps_per_epoch

    def inputs(self, step: int) -> np.ndarray:
        """Returns the inputs of the first batch, which the stream keeps; `step` must be 0."""
        assert step == 0, "a stream can be read only once"
        return np.asarray(self.stream.like.inputs)

    def shapes(self, span: Span) -> tuple[PyTree, jax.ShapeDtypeStruct]:
        """Returns shapes and dtypes of the examples and the indices of a piece."""
        indices = _shape_of_indices(span, self.replicas, self.batch_size // self.replicas)
        return _shape_of_drawn(self.stream.like, indices), indices

    def feed(self, devices: Sequence[jax.Device]) -> Feed:
        """Returns the feed of pieces, which include the batches that it draws."""
        return _feed_of_drawn(self._draw, devices)

    def _draw(
        self, here: list[int], spans: Iterable[Span]
    ) -> Iterator[tuple[Drawn, np.ndarray, int]]:
        """Yields the examples, indices and number of rounds of each piece.

        Args:
            here: Indices of the replicas on this host, whose parts of the batches are kept.
            spans: Consecutive spans that are divided into the pieces.
        """
        # A single pass over the stream, from the first step of the first span.
        spans = list(spans)
        steps = self.stream.steps(spans[0].start if spans else 0)
        for span in spans:
            join = partial(_join, rows=[0] * len(here) if span.is_shared else here)
            # A piece has `size` batches, the last one in a span maybe fewer.
            size = span.piece_rounds * span.round_steps
            for first in range(span.start, span.stop, size):
                parts = [self._cut(next(steps)) for _ in range(min(size, span.stop - first))]
                rounds = ceil(len(parts) / span.round_steps)

                # Pad with masked copies of a batch, as all pieces must have the same shape.
                empty = (parts[0][0], np.zeros_like(parts[0][1]))
                parts += [empty] * (size - len(parts))

                # Join the batches of each replica: [replica, steps * per_replica, ...].
                drawn, is_example = jax.tree.map(join, *parts)
                shape = (len(here), span.piece_rounds, span.round_steps, -1)
                yield drawn, _places(is_example.reshape(shape)), rounds

    def _cut(self, batch: TrainingSplit) -> tuple[Drawn, np.ndarray]:
        """Cuts a batch into the parts of the replicas, in the order of `data.deal`.

        Returns:
            The examples `[replica, per_replica, ...]`, and their mask, which is False for the
            repeated examples that pad a short batch.
        """
        check_size(len(batch.inputs), self.batch_size)
        order = filled_up(np.arange(len(batch.inputs)), self.batch_size)
        # int32[replica, per_replica]: of R replicas, replica r gets positions r, r + R and so on.
        order = order.reshape(-1, self.replicas).T
        numbers = np.where(order >= 0, order, ~order)
        return take(batch, numbers), order >= 0


def _join(*arrays: np.ndarray, rows: list[int]) -> np.ndarray:
    """Joins arrays `[replica, examples, ...]` along the examples, and selects replicas."""
    return np.concatenate(arrays, axis=1)[rows]


def _feed_of_drawn(
    draw: Callable[[list[int], Iterable[Span]], Iterator[tuple[Drawn, np.ndarray, int]]],
    devices: Sequence[jax.Device],
) -> Feed:
    """Returns the feed of pieces that include their examples.

    Args:
        draw: Function of the replicas on this host and of spans; yields the examples, the indices
            and the number of rounds of each piece for these replicas.
        devices: Devices, with one replica on each.
    """
    here = replica.local_replicas(devices)
    return lambda spans: prefetched(
        (*replica.shard(each, devices), rounds) for *each, rounds in draw(here, spans)
    )


def _shape_of_indices(span: Span, replicas: int, per_replica: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(
        (replicas, span.piece_rounds, span.round_steps, per_replica), np.int32
    )


def _shape_of_drawn(split: TrainingSplit | Drawn, indices: jax.ShapeDtypeStruct) -> Drawn:
    replicas, rounds, round_steps, per_replica = indices.shape
    # A piece has one example for each of its indices.
    leading = (replicas, rounds * round_steps * per_replica)

    def like(shape: tuple[int, ...], dtype: np.dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((*leading, *shape), dtype)

    inputs = split.inputs
    labels = split.labels
    leaves = [
        like(inputs.shape[1:], inputs.dtype),
        like(labels.shape[1:], labels.dtype),
        like((), np.dtype(np.int32)),
        None if split.weights is None else like((), split.weights.dtype),
    ]
    return Drawn._make(leaves)


def indices_of(
    batches: Batches, spans: Iterable[Span]
) -> Iterator[tuple[Int32[np.ndarray, "replicas rounds round_steps per_replica"], int]]:
    """Yields the indices of each piece of some spans, and its number of rounds with examples."""
    for span in spans:
        for indices, rounds in index_blocks(
            batches, span.round_steps, span.piece_rounds, span.start, span.stop
        ):
            if span.is_shared:
                indices = np.repeat(indices[:1], len(indices), axis=0)
            yield indices, rounds


def _places(is_example: np.ndarray) -> np.ndarray:
    """Returns the positions 0, 1, ... on each replica; `~position`, a negative number, for padding.

    Args:
        is_example: False for padding, `bool[replica, rounds, steps, per_replica]`; the result has
            the same shape.
    """
    places = np.arange(is_example[0].size, dtype=np.int32).reshape(is_example.shape[1:])
    return np.where(is_example, places, ~places)
