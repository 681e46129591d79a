"""Published data sets: the location of their files, and a check of local files against them."""

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from platformdirs import user_cache_path

from ctde_jax.errors import InputError


@dataclass(frozen=True)
class Published:
    """The files of a published data set, and the mirrors that provide them."""

    name: str
    classes: tuple[str, ...]
    mirrors: tuple[str, ...]
    sha256: Mapping[str, str]
    """SHA-256 of each file's decompressed content, in the order in which the data set uses them."""

    def folder(self, data_dir: Path | str | None) -> Path:
        """Returns the folder for the files: `data_dir`, or by default one in the user's cache.

        Raises:
            InputError: If there is no such folder.
        """
        cache = user_cache_path("ctde_jax") / self.name
        if data_dir is None:
            return cache
        folder = Path(os.path.expanduser(data_dir))
        if not os.path.isdir(folder):
            raise InputError(
                "data_dir",
                f"must be an existing folder, got {folder}; create it to download {self.name} into "
                f"it, or omit this option to use {cache}.",
            )
        return folder

    def notes(self, folder: Path, contents: Mapping[str, bytes]) -> tuple[str, ...]:
        """Returns a note on the files that differ from the published ones, or () if none does.

        Args:
            folder: Folder of the files.
            contents: Decompressed content of each file, keyed by its name.
        """
        # Checksums are those of the decompressed content, as a local file may be plain or .gz.
        differing = [
            name
            for name in contents
            if hashlib.sha256(contents[name]).hexdigest() != self.sha256[name]
        ]
        if not differing:
            return ()
        return (
            f"{', '.join(differing)} in {folder} differ from the published {self.name} (by "
            "checksum).",
        )
