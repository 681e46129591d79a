"""Examples reach the devices in pieces, which a thread prefetches while the devices compute."""

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
    """Steps that are computed without interruption.

    They form rounds of `round_steps` steps; rounds form rows, and rows form pieces.
    """

    start: int
    stop: int
    round_steps: int
    row_rounds: int = 1
    """Rounds in a row of the history."""

    piece_rounds: int = 1
    """Rounds in a piece, which reaches the devices at once; a whole number of rows."""

    @property
    def pieces(self) -> int:
        """The number of pieces; the last one is padded with empty steps."""
        return ceil((self.stop - self.start) / (self.piece_rounds * self.round_steps))


Piece: TypeAlias = tuple[PyTree, jax.Array, int]
"""A `Split` or `Drawn` on the devices, the indices into it, and the number of rounds in use.

The indices are `int32[replica, most, round_steps, per_replica]`; rounds beyond the number are
empty.
"""

Feed: TypeAlias = Callable[[Iterable[Span]], AbstractContextManager[Iterator[Piece]]]
"""A context manager over the pieces of consecutive spans; on exit, it stops what draws them."""


@contextmanager
def prefetched(items: Generator[T]) -> Iterator[Iterator[T]]:
    """Draws items in a thread, one ahead of the consumer.

    An exception in the thread is raised in the consumer, in place of its item. The thread ends with
    the context, after the current item; only a KeyboardInterrupt does not wait for that.
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
        # Wake the thread, so that it sees the end and closes the generator.
        is_over.set()
        wanted.release()
        if waits:
            thread.join()
