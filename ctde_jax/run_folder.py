"""The folder of a run: made where it is not there, and written to by one trainer at a time."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from ctde_jax.errors import InputError

METRICS, CHECKPOINTS = "metrics.jsonl", "checkpoints"


@contextmanager
def claimed(folder: Path) -> Iterator[Path]:
    """Makes a folder where it is not there, and keeps every other process from it; the lock dies with its owner.

    A process that has claimed a folder may claim it again.

    Raises:
        InputError: Another trainer is writing to it, or it cannot be written to.
    """
    lock = FileLock(folder / ".lock", timeout=0, is_singleton=True)
    with writing_to(folder):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire()
        except Timeout as error:
            rule = f"must not be used by two trainers at once, but another one is writing to {folder}"
            raise InputError("run_dir", f"{rule}; wait for its end, or name another folder.") from error
    try:
        yield folder
    finally:
        lock.release()


def is_new(folder: Path) -> bool:
    """Says whether no run has written metrics or a checkpoint to the folder yet."""
    metrics, checkpoints = folder / METRICS, folder / CHECKPOINTS
    return not (metrics.exists() and metrics.stat().st_size) and not (
        checkpoints.exists() and any(checkpoints.glob("step-*"))
    )


def check_new(folder: Path) -> None:
    """Raises InputError for a folder that holds a run already."""
    if not is_new(folder):
        fault = f"but {folder} has {METRICS} or {CHECKPOINTS}"
        raise InputError("run_dir", f"must not hold a run already, {fault}; name another folder.")


@contextmanager
def writing_to(folder: Path) -> Iterator[None]:
    """Says in a sentence that a folder cannot be written to, or is full.

    Raises:
        InputError: Instead of any OSError.
    """
    try:
        yield
    except OSError as error:
        raise InputError(
            "run_dir",
            f"must be a folder that can be written to and has room, but writing to {folder} failed: {error.strerror}; "
            "choose another folder.",
        ) from error
