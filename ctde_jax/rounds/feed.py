"""Transfer of training examples to the devices in pieces, which a thread prefetches.

A *span* consists of consecutive steps, usually those between two evaluations. Its steps form
*rounds*, its rounds form *rows* of the history, and its rows form *pieces*. The indices of a piece,
and its examples if the devices do not hold them already, are transferred together.
"""

import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from math import ceil
from queue import SimpleQueue
from typing import NamedTuple, TypeAlias, TypeVar

import jax

from ctde_jax.devices import PyTree

T = TypeVar("T")


class Span(NamedTuple):
    """Steps from `start` up to but not including `stop`, and their division into pieces."""

    start: int
    stop: int
    round_steps: int
    """Number of steps in a round; the last round may have fewer."""

    row_rounds: int = 1
    """Number of rounds in a row of the history; the last row may have fewer."""

    piece_rounds: int = 1
    """Number of rounds in a piece, a multiple of `row_rounds`; the last piece may have fewer."""

    is_shared: bool = False
    """Whether all replicas train on the examples of the first one."""

    @property
    def pieces(self) -> int:
        """Number of pieces in the span, including a shorter one at its end."""
        return ceil((self.stop - self.start) / (self.piece_rounds * self.round_steps))


Piece: TypeAlias = tuple[PyTree, jax.Array, int]
"""`(examples, indices, rounds)`, with examples and indices on the devices.

The examples are a `Split` or `Drawn`. The indices into them are
`int32[replica, piece_rounds, round_steps, per_replica]`, negative for padding. Only the first
`rounds` rounds contain examples.
"""

Feed: TypeAlias = Callable[[Iterable[Span]], AbstractContextManager[Iterator[Piece]]]
"""`feed(spans)` returns a context manager that yields an iterator over the pieces of the spans.

Its exit ends the thread that prefetches them.
"""


@contextmanager
def prefetched(items: Generator[T]) -> Iterator[Iterator[T]]:
    """Yields an iterator over `items` that a thread prefetches, one item ahead of the consumer.

    An exception of the generator is raised in the consumer, in place of an item. On exit, the
    thread ends after its current item and closes the generator. The exit waits for that, unless the
    body raises KeyboardInterrupt.
    """
    ready: SimpleQueue[tuple[T | None, BaseException | None]] = SimpleQueue()

    # One permit at first: the thread draws the first item at once, and another one for each item
    # taken.
    wanted = threading.Semaphore(1)
    is_over = threading.Event()

    def draw() -> None:
        try:
            while wanted.acquire() and not is_over.is_set():
                ready.put((next(items), None))
            items.close()
        except BaseException as error:
            # All exceptions go to the consumer, also StopIteration, which marks the end.
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
        # Wake the thread, so that it reads `is_over` and closes the generator.
        is_over.set()
        wanted.release()
        if waits:
            thread.join()
