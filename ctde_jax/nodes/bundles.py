"""The bundle of the trained model, which the server sends to its nodes."""

import re
from collections.abc import Sequence
from pathlib import Path

from ctde_jax.bundle import open_bundle, read_small
from ctde_jax.checkpoint import written_whole
from ctde_jax.errors import InputError, writing_to

FOLDER = "bundle"
_NAME = re.compile(r"\w[\w.-]{0,80}")


def read_bundle(folder: Path) -> tuple[list[str], list[bytes]]:
    """Returns the names and the contents of the files of a bundle."""
    paths = sorted(path for path in folder.iterdir() if path.is_file())
    return [path.name for path in paths], [read_small(path) for path in paths]


def write_received(folder: Path, names: Sequence[str], contents: Sequence[bytes]) -> None:
    """Writes a bundle that a node has received, which replaces an older one.

    Args:
        folder: Folder of the bundle.
        names: Names of its files.
        contents: Their contents.

    Raises:
        InputError: A name is not that of a file, a file differs from its checksum, or the folder
            cannot be written to. An older bundle remains unchanged.
    """
    for name in names:
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise InputError("bundle", f"must have names of files, got {name!r:.40}.")
    if len(names) != len(contents):
        raise InputError("bundle", f"must have {len(names)} files, got {len(contents)}.")
    with writing_to(folder, "folder"), written_whole(folder) as partial:
        for name, content in zip(names, contents, strict=True):
            (partial / name).write_bytes(content)
        # Opening it checks the card, and reading the other files their checksums.
        opened = open_bundle(partial)
        for name in opened.card.files:
            opened.read(name)
