"""How examples reach the devices: in pieces, which a thread draws one ahead while the devices compute."""

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
