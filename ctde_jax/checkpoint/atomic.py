"""Atomic writes: under a temporary name, flushed to disk and renamed."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """Yields an empty temporary folder, which replaces `folder` after the body has filled it.

    If the body raises, `folder` remains unchanged. A replacement takes two renames; if the process
    is killed between them, `put_back` undoes the first.

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


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file, which replaces an existing one; after a kill, it is the old or the new one.

    Raises:
        OSError: If the folder cannot be written to. An existing file remains unchanged.
    """
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(content)
    bring_to_disk(partial)
    os.replace(partial, path)
    bring_to_disk(path.parent)


def put_back(folder: Path) -> None:
    """Cleans up after an interrupted `written_whole`.

    If the old folder was renamed, it is renamed back, or removed if the new folder is in its place.
    """
    replaced = _replaced(folder)
    if replaced.exists() and not folder.exists():
        replaced.rename(folder)
    shutil.rmtree(replaced, ignore_errors=True)


def _replaced(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.replaced")


def bring_to_disk(path: Path) -> None:
    """Flushes the contents of a file, or the entries of a folder, to disk (`fsync`)."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
