"""The folder of a run: made where it is not there, and written to by one trainer at a time."""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from ctde_jax.errors import InputError, shortened

METRICS, CHECKPOINTS, LOCK = "metrics.jsonl", "checkpoints", ".lock"
_OF_A_RUN = ("bundle", "config.json", "curves.png", "partition.png", METRICS, CHECKPOINTS)
"""What a run and its export write to the folder; moved in this order, so that checkpoints stay until the last."""

OWN = frozenset({LOCK, *_OF_A_RUN} - {"bundle"})
"""What a trainer writes into the folder of a run."""

_MOVING = ".previous.partial"


def named(option: str, path: Path | str) -> Path:
    """Returns the folder that the user named, with ~ expanded; raises InputError for an empty name."""
    if not str(path):
        raise InputError(option, "must name a folder, got an empty name.")
    return Path(os.path.expanduser(path))


@contextmanager
def claimed(folder: Path) -> Iterator[Path]:
    """Creates a folder if it does not exist, and keeps every other process from it; the lock dies with its owner.

    A process that has claimed a folder may claim it again. If the body raises before the folder has metrics or a
    checkpoint, the run was refused: what this claim and its body created is removed again, parent folders included.

    Raises:
        InputError: Another trainer is writing to the folder, or it cannot be written to.
    """
    lock = FileLock(folder / LOCK, timeout=0, is_singleton=True)
    with writing_to(folder):
        created = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        with writing_to(folder):
            folder.mkdir(parents=True, exist_ok=True)
            before = {name for name in OWN if (folder / name).exists()}
            try:
                lock.acquire()
            except Timeout as error:
                rule = f"must not be used by two trainers at once, but another one is writing to {folder}"
                raise InputError(
                    "run_dir", f"{rule}; wait for its end, or name another folder."
                ) from error
        try:
            yield folder
        except BaseException:
            with suppress(OSError):
                _remove(folder, (OWN if is_new(folder) else {LOCK}) - before)
            raise
        finally:
            lock.release()
    except BaseException:
        for path in created:
            with suppress(OSError):  # it holds files of somebody else
                path.rmdir()
        raise


def _remove(folder: Path, names: Iterable[str]) -> None:
    """Removes what a run that has not begun may have written."""
    for path in (folder / name for name in names):
        if path.is_dir():
            path.rmdir()
        else:
            path.unlink(missing_ok=True)


def is_new(folder: Path) -> bool:
    """Says whether no run has written metrics or a checkpoint to the folder yet."""
    metrics, checkpoints = folder / METRICS, folder / CHECKPOINTS
    return not (metrics.exists() and metrics.stat().st_size) and not (
        checkpoints.exists() and any(checkpoints.glob("step-*"))
    )


def check_outside(path: Path, folder: Path) -> None:
    """Raises InputError if initial parameters are among the files that the run in a folder writes, and may change."""
    own, source = folder.resolve(), path.expanduser().resolve()
    if source == own or any(source.is_relative_to(own / name) for name in _OF_A_RUN):
        rule = "must not be in the folder of this run, whose checkpoints change as it trains"
        raise InputError(
            "init_from", f"{rule}, got {shortened(str(path))}; name another folder for this run."
        )


def make_way(folder: Path, resume: bool, say: Callable[[str], None]) -> None:
    """Moves the run that a folder holds into its subfolder `previous-1`, or the next number, unless it is to continue.

    The files gather under a temporary name, which then becomes the final one. A move that was interrupted is completed
    by the next call, whatever `resume` is. The folder must be claimed.

    Args:
        folder: The folder of the run.
        resume: Whether the run is to continue.
        say: Prints a line if something was moved.

    Raises:
        InputError: The folder cannot be written to.
    """
    moving = folder / _MOVING
    if not moving.exists() and (resume or is_new(folder)):
        return
    with writing_to(folder):
        moving.mkdir(exist_ok=True)
        for path in (folder / name for name in _OF_A_RUN):
            if path.exists():
                path.rename(moving / path.name)
        number = 1
        while (folder / f"previous-{number}").exists():
            number += 1
        moved = moving.rename(folder / f"previous-{number}")
    say(f"previous   the run that {folder} held is now in {moved}")


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
            f"must be a folder that can be written to and has room, but writing to {shortened(str(folder))} failed: "
            f"{error.strerror}; "
            "choose another folder.",
        ) from error
