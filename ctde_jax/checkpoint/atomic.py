"""Folders that are complete or absent: written beside their place, flushed to disk and renamed."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """Yields an empty folder to fill, which then takes the place of `folder`.

    If the body raises, `folder` stays as it was. If the process is killed between the two renames
    of a replacement, `put_back` undoes the first.

    Raises:
        OSError: If the parent folder cannot be written to.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    replaced = _replaced(folder)

    # Remove what an interrupted call left behind.
    put_back(folder)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        # Flush the contents before the rename: the final name must never refer to lost data.
        for path in (*partial.rglob("*"), partial):
            bring_to_disk(path)
        # A folder that is not empty cannot be replaced by a single rename.
        if folder.exists():
            folder.rename(replaced)
        partial.rename(folder)
        bring_to_disk(folder.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        put_back(folder)


def put_back(folder: Path) -> None:
    """Undoes an interrupted replacement of a folder, or removes what a completed one replaced."""
    replaced = _replaced(folder)
    if replaced.exists() and not folder.exists():
        replaced.rename(folder)
    shutil.rmtree(replaced, ignore_errors=True)


def _replaced(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.replaced")


def bring_to_disk(path: Path) -> None:
    """Waits until the contents of a file, or the entries of a folder, are on disk (`fsync`)."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
