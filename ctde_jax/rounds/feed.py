"""How examples reach the devices: all of them once, or those of a piece while the devices compute the one before.

Where the training split is in memory, the devices hold it, and a piece is indices alone. Where it is on disk, or comes
in batches, a piece has examples of its own. A thread draws pieces and puts them on the devices, one ahead. The round is
the same: its indices count what the device holds.
"""

import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from math import ceil
from queue import SimpleQueue
from typing import NamedTuple, TypeAlias, TypeVar

import jax
import numpy as np

from ctde_jax.data import Arrivals, Batches, Drawn, Split, check_size, filled_up, index_blocks
from ctde_jax.devices import PyTree, replica

T = TypeVar("T")
_PLACES = 2**20
"""So many indices, of all devices together, are put on the devices at once where they hold the examples; 4 MiB."""


class Span(NamedTuple):
    """Steps that are computed without a break: rounds of so many steps, which make up rows, which make up pieces."""

    start: int
    stop: int
    round_steps: int
    row_rounds: int = 1
    """Of a row of the history."""

    piece_rounds: int = 1
    """Of what reaches the devices at once: whole rows."""

    @property
    def pieces(self) -> int:
        """How many there are; the last is filled up with empty steps."""
        return ceil((self.stop - self.start) / (self.piece_rounds * self.round_steps))


Piece: TypeAlias = tuple[PyTree, jax.Array, int]
"""A `Split` or `Drawn` on the devices, the indices `int32[replica, most, round_steps, per_replica]` into it, and how
many of these rounds there are."""

Feed: TypeAlias = Callable[[Iterable[Span]], AbstractContextManager[Iterator[Piece]]]
"""Opens the pieces of spans that follow each other, and closes them with what draws them."""


def make_feed(batches: Batches | Arrivals, devices: Sequence[jax.Device]) -> Feed:
    """Puts on the devices what stays there, and makes what gives them every piece.

    Of what is on disk, a host reads only what its own devices get.
    """
    if isinstance(batches, Batches) and not batches.is_on_disk:
        place = replica.replicate if batches.axis is None else replica.shard
        held = place(batches.split, devices)
        return lambda spans: prefetched((held, replica.shard(own, devices), n) for own, n in _indices(batches, spans))
    read = partial(_from_stream if isinstance(batches, Arrivals) else _from_disk, batches, replica.own(devices))
    return lambda spans: prefetched((*replica.shard(each, devices), n) for *each, n in read(spans))


def steps_a_piece(batches: Batches | Arrivals) -> int:
    """Says of how many steps indices may be put on the devices at once; 1 where their examples travel with them."""
    if isinstance(batches, Arrivals) or batches.is_on_disk:
        return 1
    return max(1, _PLACES // batches.steps(0, 1).size)


def shapes(batches: Batches | Arrivals, span: Span) -> tuple[PyTree, jax.ShapeDtypeStruct]:
    """Says what shapes and types the arrays of a piece have."""
    if isinstance(batches, Arrivals):
        replicas, per_replica, split = batches.replicas, batches.batch_size // batches.replicas, batches.stream.like
    else:
        (_, replicas, per_replica), split = batches.steps(0, 1).shape, batches.split
    indices = jax.ShapeDtypeStruct((replicas, span.piece_rounds, span.round_steps, per_replica), np.int32)
    if isinstance(batches, Batches) and not batches.is_on_disk:
        return jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype), split), indices
    own = (replicas, span.piece_rounds * span.round_steps * per_replica)
    like = [(split.inputs.shape[1:], split.inputs.dtype), (split.labels.shape[1:], split.labels.dtype), ((), np.int32)]
    leaves = [jax.ShapeDtypeStruct((*own, *shape), dtype) for shape, dtype in like]
    return Drawn._make(leaves), indices


@contextmanager
def prefetched(items: Generator[T]) -> Iterator[Iterator[T]]:
    """Draws items in a thread, one ahead of who takes them.

    What goes wrong in the thread is raised where its item would have been taken. With the context the thread ends,
    after the item at hand; only a KeyboardInterrupt does not wait for that.
    """
    ready: SimpleQueue[tuple[T | None, BaseException | None]] = SimpleQueue()
    wanted, is_over = threading.Semaphore(1), threading.Event()

    def draw() -> None:
        try:
            while wanted.acquire() and not is_over.is_set():
                ready.put((next(items), None))
            items.close()
        except BaseException as error:  # whatever it is, it is the taker's
            ready.put((None, error))

    def taken() -> Iterator[T]:
        while True:
            item, error = ready.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            wanted.release()
            yield item  # pyright: ignore[reportReturnType]

    thread = threading.Thread(target=draw, name="feed", daemon=True)
    thread.start()
    waits = True
    try:
        yield taken()
    except KeyboardInterrupt:
        waits = False
        raise
    finally:
        is_over.set()
        wanted.release()
        if waits:
            thread.join()


def _indices(batches: Batches, spans: Iterable[Span]) -> Iterator[tuple[np.ndarray, int]]:
    for span in spans:
        yield from index_blocks(batches, span.round_steps, span.piece_rounds, span.start, span.stop)


def _from_disk(batches: Batches, here: list[int], spans: Iterable[Span]) -> Iterator[tuple[Drawn, np.ndarray, int]]:
    """Reads the examples that these replicas have of each piece."""
    for indices, rounds in _indices(batches, spans):
        indices = indices[here]
        numbers = np.where(indices >= 0, indices, ~indices).reshape(len(indices), -1)
        drawn = Drawn(batches.split.inputs[numbers], batches.split.labels[numbers], numbers)
        yield drawn, _places(indices >= 0), rounds


def _from_stream(arrivals: Arrivals, here: list[int], spans: Iterable[Span]) -> Iterator[tuple[Drawn, np.ndarray, int]]:
    """Draws the batches of each piece, and keeps what these replicas have of them."""
    spans = list(spans)
    steps = arrivals.stream.steps(spans[0].start if spans else 0)
    for span in spans:
        size = span.piece_rounds * span.round_steps
        for first in range(span.start, span.stop, size):
            dealt = [_dealt(next(steps), arrivals) for _ in range(min(size, span.stop - first))]
            rounds = ceil(len(dealt) / span.round_steps)
            empty = (dealt[0][0], np.zeros_like(dealt[0][1]))
            dealt += [empty] * (size - len(dealt))
            drawn, is_example = jax.tree.map(lambda *own: np.concatenate(own, axis=1)[here], *dealt)
            yield drawn, _places(is_example.reshape(len(here), span.piece_rounds, span.round_steps, -1)), rounds


def _dealt(batch: Split, arrivals: Arrivals) -> tuple[Drawn, np.ndarray]:
    """Deals a batch as `data.deal` deals arrays, filled up with itself, and says which places are examples."""
    check_size(len(batch.inputs), arrivals.batch_size)
    order = filled_up(np.arange(len(batch.inputs)), arrivals.batch_size).reshape(-1, arrivals.replicas).T
    numbers = np.where(order >= 0, order, ~order)
    return Drawn(batch.inputs[numbers], batch.labels[numbers], numbers), order >= 0


def _places(is_example: np.ndarray) -> np.ndarray:
    """Counts the places that each replica has; `[replica, rounds, round_steps, per_replica]`."""
    places = np.arange(is_example[0].size, dtype=np.int32).reshape(is_example.shape[1:])
    return np.where(is_example, places, ~places)
