"""Folders that are whole or not there: written beside their place, brought to the disk, and only then renamed."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """Yields an empty folder to fill, which then takes this place, and that of what is there.

    Where it cannot be filled, all is as it was. Where the process is killed between the two renames of a replacement,
    `put_back` undoes the first.

    Raises:
        OSError: The folder around it cannot be written to.
    """
    partial, replaced = folder.with_name(f".{folder.name}.partial"), _replaced(folder)
    put_back(folder)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        for path in (*partial.rglob("*"), partial):
            bring_to_disk(path)
        if folder.exists():
            folder.rename(replaced)
        partial.rename(folder)
        bring_to_disk(folder.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        put_back(folder)


def put_back(folder: Path) -> None:
    """Undoes a replacement of this folder that was broken off, or removes what a whole one has replaced."""
    replaced = _replaced(folder)
    if replaced.exists() and not folder.exists():
        replaced.rename(folder)
    shutil.rmtree(replaced, ignore_errors=True)


def _replaced(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.replaced")


def bring_to_disk(path: Path) -> None:
    """Waits until the disk has what was written to a file, or which names a folder has."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
