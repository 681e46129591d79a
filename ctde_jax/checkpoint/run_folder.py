"""The folder of a run, created if necessary and written to by one process at a time."""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from ctde_jax.errors import InputError, shortened, writing_to

CHECKPOINTS = "checkpoints"
CONFIG = "config.json"
CURVES = "curves.png"
LOCK = ".lock"
METRICS = "metrics.jsonl"
PARTITION = "partition.png"
REPORT = "report.html"
ANSWERS = "answers"
NODES = "nodes.json"
_OF_A_RUN = (
    *("bundle", CONFIG, CURVES, PARTITION, REPORT, METRICS, NODES),
    *(ANSWERS, CHECKPOINTS),
)
"""Entries that a run and its export write, in the order in which `make_way` moves them."""

OWN = frozenset({LOCK, *_OF_A_RUN} - {"bundle"})
"""Entries that a trainer or a server writes to the folder of a run."""

# Name of the subfolder in which `make_way` collects the files of a run.
_MOVING = ".previous.partial"


def named(option: str, path: Path | str) -> Path:
    """Returns the path that the user gave, with ~ expanded; raises InputError if it is empty."""
    if not str(path):
        raise InputError(option, "must be the path of a folder, got an empty string.")
    return Path(os.path.expanduser(path))


@contextmanager
def claimed(folder: Path) -> Iterator[Path]:
    """Creates a folder if necessary, and locks it until the body or this process ends.

    A process may claim the same folder again within the body. If the body raises before the folder
    or a subfolder has metrics or a checkpoint, the files in `OWN` that were created since the claim
    are removed, and new folders that are empty, including parent folders.

    Raises:
        InputError: If another process is writing to the folder, or it cannot be written to.
    """
    # A singleton, so that this process can acquire the lock of a folder again.
    lock = FileLock(folder / LOCK, timeout=0, is_singleton=True)

    # Record what exists, so that only new folders and files are removed after a failure.
    with writing_to(folder):
        created = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        with writing_to(folder):
            folder.mkdir(parents=True, exist_ok=True)
            before = {name for name in OWN if (folder / name).exists()}
            try:
                lock.acquire()
            except Timeout as error:
                raise InputError(
                    "run_dir",
                    "must not be used by two runs at once, but another process is writing to "
                    f"{folder}; wait until it ends, or choose another folder.",
                ) from error

        # Remove the files of a run that was refused before it began.
        try:
            yield folder
        except BaseException:
            with suppress(OSError):
                # A folder of many runs has those that have begun as subfolders.
                has_begun = not is_new(folder) or any(folder.glob(f"*/{METRICS}"))
                _remove(folder, ({LOCK} if has_begun else OWN) - before)
            raise
        finally:
            lock.release()
    except BaseException:
        for path in created:
            # `rmdir` fails if there are other files in the folder, which then stays.
            with suppress(OSError):
                path.rmdir()
        raise


def _remove(folder: Path, names: Iterable[str]) -> None:
    """Removes the files and empty folders of these names; ignores missing files."""
    # A folder with contents is not removed: `rmdir` raises.
    for path in (folder / name for name in names):
        if path.is_dir():
            path.rmdir()
        else:
            path.unlink(missing_ok=True)


def is_new(folder: Path) -> bool:
    """Returns whether no run has written metrics or a checkpoint to the folder yet."""
    metrics = folder / METRICS
    checkpoints = folder / CHECKPOINTS
    return not (metrics.exists() and metrics.stat().st_size) and not (
        checkpoints.exists() and any(checkpoints.glob("step-*"))
    )


def check_no_run(folder: Path) -> None:
    """Raises InputError if a single run has written to a folder that is for many runs."""
    if not is_new(folder):
        raise InputError(
            "run_dir",
            f"must not be the folder of a single run, such as {folder}, but one for many runs; "
            "choose another folder.",
        )


def check_outside(path: Path, folder: Path) -> None:
    """Checks that a run in `folder` does not start from files that it writes itself.

    Args:
        path: Path of the initial parameters.
        folder: Folder of the run.

    Raises:
        InputError: If the path is the folder, or within an entry that a run writes.
    """
    # Resolve symbolic links, so that two names of one folder are equal.
    resolved = folder.resolve()
    source = path.expanduser().resolve()
    if source == resolved or any(source.is_relative_to(resolved / name) for name in _OF_A_RUN):
        raise InputError(
            "init_from",
            "must not be in the folder of this run, because its files change during training, got "
            f"{shortened(str(path))}; choose another folder for this run.",
        )


def make_way(folder: Path, resume: bool, say: Callable[[str], None]) -> None:
    """Moves a run to its subfolder `previous-1`, or the next number, unless the run continues.

    The files are collected under a temporary name, which is then changed to the final one. If the
    move is interrupted, the next call completes it, whatever its `resume`. The caller must have
    claimed the folder.

    Args:
        folder: Folder of the run.
        resume: Whether the run continues.
        say: Prints a line if a run was moved.

    Raises:
        InputError: If the folder cannot be written to.
    """
    # The temporary folder exists only if an earlier move was interrupted.
    moving = folder / _MOVING
    if not moving.exists() and (resume or is_new(folder)):
        return
    # After an interruption, this loop moves the remaining files.
    with writing_to(folder):
        moving.mkdir(exist_ok=True)
        for path in (folder / name for name in _OF_A_RUN):
            if path.exists():
                path.rename(moving / path.name)
        number = 1
        while (folder / f"previous-{number}").exists():
            number += 1
        moved = moving.rename(folder / f"previous-{number}")
    say(f"previous   the earlier run in {folder} was moved to {moved}")


def check_new(folder: Path) -> None:
    """Raises InputError if a folder already has metrics or a checkpoint of a run."""
    if not is_new(folder):
        raise InputError(
            "run_dir",
            f"must not contain another run, but {folder} has {METRICS} or {CHECKPOINTS}; choose "
            "another folder.",
        )
