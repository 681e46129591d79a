"""A data set as it is published: where its files are kept, and whether those that are there are the published ones."""

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from platformdirs import user_cache_path

from ctde_jax.errors import InputError


@dataclass(frozen=True)
class Published:
    """The files that make up a data set, and where they can be had."""

    name: str
    classes: tuple[str, ...]
    mirrors: tuple[str, ...]
    sha256: Mapping[str, str]
    """Of each file's decompressed content, in the order that the data set is made of."""

    def folder(self, data_dir: Path | str | None) -> Path:
        """Returns the folder for the files: the user's, or by default one in the user's cache.

        Raises:
            InputError: There is no such folder.
        """
        cache = user_cache_path("ctde_jax") / self.name
        if data_dir is None:
            return cache
        folder = Path(os.path.expanduser(data_dir))
        if not os.path.isdir(folder):
            raise InputError(
                "data_dir",
                f"must be an existing folder, got {folder}; create it to have {self.name} downloaded into it, "
                f"or leave the option out to use {cache}.",
            )
        return folder

    def notes(self, folder: Path, contents: Mapping[str, bytes]) -> tuple[str, ...]:
        """Says which files of the folder, given by their decompressed contents, are the user's own."""
        differing = [
            name
            for name in contents
            if hashlib.sha256(contents[name]).hexdigest() != self.sha256[name]
        ]
        if not differing:
            return ()
        return (
            f"{', '.join(differing)} in {folder} differ by checksum from the published {self.name}.",
        )
