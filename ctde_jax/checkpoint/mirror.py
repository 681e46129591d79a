"""Mirrors: the checkpoints of a run in a store such as S3, reached through fsspec.

    s3://bucket/run/checkpoints/step-00000460/
        metrics.jsonl         the rows up to this checkpoint
        config.json           the options, if the run folder has them
        tensors.safetensors   these and the next two are the files of the checkpoint
        SHA256SUMS
        manifest.json         written last and removed first

A checkpoint without a manifest is incomplete and is ignored. Files of one step are never shared
with another step, so an interrupted upload cannot damage an earlier checkpoint.
"""

import json
import logging
import os
import re
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ctde_jax.checkpoint.atomic import bring_to_disk, written_whole
from ctde_jax.checkpoint.format import (
    MANIFEST,
    MEASURED,
    SUMS,
    TENSORS,
    Checkpoint,
    Choose,
    Damaged,
    Facts,
    best_step,
    path_of,
    read,
    read_facts,
    read_measured,
)
from ctde_jax.checkpoint.run_folder import CHECKPOINTS, CONFIG, METRICS
from ctde_jax.errors import InputError, on_one_line, shortened, writing_to

_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}
"""Extras of this package that install the package for a protocol."""

Check = Callable[[Checkpoint], None]
"""Raises InputError if a checkpoint belongs to another run; reads only its facts."""


class Unavailable(Exception):
    """Raised if a mirror cannot be read, or must not or cannot be written to."""


class Mirror:
    """The checkpoints of a run in a store; made by `open_mirror`.

    Args:
        filesystem: The fsspec file system of the store.
        root: Path of the mirror in the file system.
        address: Address of the mirror, without a password, for messages.
        choose: Function that selects the best of several evaluations, or None; see `open_saver`.
    """

    def __init__(self, filesystem: Any, root: str, address: str, choose: Choose | None = None):
        self.address = address
        self.is_closed = threading.Event()
        """If set, an upload stops before its next file."""

        self._files = filesystem
        self._folder = f"{root}/{CHECKPOINTS}"
        self._choose = choose
        # Paths in object stores begin with a bucket, and these have no folders.
        self._has_folders = root.startswith("/")
        self._damaged: set[int] = set()
        self._check: Check | None = None
        self._is_compared = False

    def check_new(self) -> None:
        """Raises InputError if the mirror has a checkpoint or cannot be reached."""
        with self._required("before a run starts from the beginning"):
            there = self._complete()
        if there:
            raise InputError(
                "mirror",
                "must not have a checkpoint if the run starts from the beginning, but "
                f"{self._name(there[0])} exists; pass another address.",
            )
        self._is_compared = True

    def fetch(
        self, folder: Path, local: Checkpoint | None, check: Check, say: Callable[[str], None]
    ) -> Checkpoint | None:
        """Downloads the newest intact checkpoint of the mirror if it is newer than the local one.

        Also replaces `metrics.jsonl` and `config.json` of the run folder by those of the
        checkpoint. With `choose`, the best checkpoint of the mirror is downloaded as well, if the
        folder does not have it, as the next upload keeps only the best one of the folder. If the
        mirror cannot be reached, a run with a local checkpoint continues.

        Args:
            folder: Folder of the run.
            local: Newest intact checkpoint in the folder, or None.
            check: Function that raises InputError if a checkpoint belongs to another run.
            say: Prints a line.

        Returns:
            The downloaded checkpoint, or None if the mirror has no newer one.

        Raises:
            InputError: If the mirror contains another run, or the folder cannot be written to; or
                if there is no local checkpoint, and the mirror cannot be reached or has checkpoints
                of which none is intact.
        """
        self._check = check
        if local is None:
            with self._required(f"while {folder} has no checkpoint"):
                found = self._newest_intact(folder, -1, say)
            if found is None and self._damaged:
                raise InputError(
                    "mirror", f"has no intact checkpoint in {self.address}; pass another address."
                )
        else:
            try:
                found = self._newest_intact(folder, local.facts["position"]["gone_through"], say)
            except Unavailable as error:
                warn(f"{error}; this run continues from {local.path}")
                return None
        self._is_compared = True
        return found

    def upload(self, newest: Path, best: Path | None, keep: int) -> None:
        """Uploads the newest and the best checkpoint, and then removes old ones from the mirror.

        Args:
            newest: Newest checkpoint of the run.
            best: Best checkpoint of the run, or None.
            keep: Number of newest checkpoints to keep in the mirror.

        Raises:
            Unavailable: If the mirror cannot be written to, or contains another run or a newer
                checkpoint that the run has not seen at its start.
        """
        there = self._complete()
        if not self._is_compared:
            self._compare_late(there, newest)
        wanted = [newest] if best in (None, newest) else [newest, best]
        with self._contact():
            for path in wanted:
                step = _step(path)
                # A run computes the same bits for the same step, so only damage is replaced.
                if step not in there or step in self._damaged:
                    self._put(path)
            self._remove_others(wanted, keep)

    def _list(self) -> dict[int, set[str]]:
        """Returns the names of the files of each step, including incomplete checkpoints."""
        found: dict[int, set[str]] = {}
        with self._contact():
            # fsspec caches listings, but other processes may have changed them.
            self._files.invalidate_cache()
            try:
                paths = self._files.find(self._folder)
            except FileNotFoundError:
                # In an object store, it is the bucket that does not exist.
                if not self._has_folders:
                    raise
                paths = []
            for path in paths:
                name = path.removeprefix(f"{self._folder}/")
                # Files in other folders, such as those of another mirror, do not match.
                if match := re.fullmatch(r"step-(\d{8,})/([^/]+)", name):
                    found.setdefault(int(match[1]), set()).add(match[2])
        return found

    def _complete(self) -> list[int]:
        """Returns the steps that have a complete checkpoint, newest first."""
        listed = self._list().items()
        return sorted((step for step, names in listed if MANIFEST in names), reverse=True)

    def _newest_intact(
        self, folder: Path, since: int, say: Callable[[str], None]
    ) -> Checkpoint | None:
        """Downloads the newest intact checkpoint after step `since`, if there is one.

        Otherwise only checks that the newest checkpoint belongs to this run. Before that, downloads
        the best intact checkpoint that is not in the folder.
        """
        left = self._complete()
        measured = self._measured(left)
        there = [step for step in left if read_measured(path_of(folder / CHECKPOINTS, step))]
        while left:
            best = None if self._choose is None else best_step(measured, self._choose)
            is_missing = best is not None and best not in there
            # The best first: if this process is killed in between, the folder is still older than
            # the mirror, so that the next start fetches the newest.
            step = best if best is not None and is_missing else left[0]
            try:
                if step <= since and not is_missing:
                    self._compare(step)
                    return None
                found = self._download(step, folder, since)
                there.append(step)
                say(f"mirror     {found.path.name} was fetched from {self.address}")
                if step == left[0] and step > since:
                    return found
            except Damaged as error:
                say(f"damaged    {error}; falling back to an older checkpoint")
                self._damaged.add(step)
                left.remove(step)
                measured.pop(step, None)
        return None

    def _measured(self, among: list[int]) -> dict[int, Facts | None]:
        """Returns the history row of each step's evaluation, which is only needed to choose."""
        measured: dict[int, Facts | None] = {}
        for step in among if self._choose is not None else ():
            # A damaged manifest is reported if its checkpoint is downloaded.
            with suppress(Damaged):
                measured[step] = self._compare(step).get(MEASURED)
        return measured

    def _download(self, step: int, folder: Path, since: int) -> Checkpoint:
        """Downloads a checkpoint into the run folder, if it is intact and of this run.

        The rows and the options in the folder are replaced only after step `since`.
        """
        path = path_of(folder / CHECKPOINTS, step)
        about_the_run = (METRICS, CONFIG) if step > since else ()
        with writing_to(folder), written_whole(path) as partial:
            self._get(step, (*about_the_run, TENSORS, SUMS, MANIFEST), partial)
            with self._named(step, partial):
                found = read(partial)
                assert self._check is not None
                self._check(found)
                if about_the_run:
                    _check_rows(partial, found.facts["rows"])
            # If this process is killed between these renames and that of the checkpoint, the rows
            # and options are still those of this run, and the next start fetches it again.
            for name in about_the_run:
                if (partial / name).exists():
                    bring_to_disk(partial / name)
                    (partial / name).replace(folder / name)
        return found._replace(path=path)

    def _compare(self, step: int) -> Facts:
        """Returns the facts of a checkpoint; raises InputError if it belongs to another run."""
        with TemporaryDirectory() as name:
            partial = Path(name)
            self._get(step, (SUMS, MANIFEST), partial)
            with self._named(step, partial):
                facts = read_facts(partial)
        assert self._check is not None
        self._check(Checkpoint(Path(self._name(step)), {}, facts))
        return facts

    def _get(self, step: int, names: Iterable[str], folder: Path) -> None:
        """Downloads files of a checkpoint that exist."""
        for name in names:
            with self._contact(), suppress(FileNotFoundError):
                self._files.get_file(self._path(step, name), str(folder / name))

    @contextmanager
    def _named(self, step: int, folder: Path) -> Iterator[None]:
        """Replaces a temporary folder in the message of Damaged by the name in the mirror."""
        try:
            yield
        except Damaged as error:
            raise Damaged(str(error).replace(str(folder), self._name(step))) from error

    def _compare_late(self, there: list[int], newest: Path) -> None:
        """Compares the mirror with the run, if it could not be reached at the start of the run."""
        if not there:
            return
        if there[0] > _step(newest):
            raise Unavailable(
                f"{self._name(there[0])} is newer than this run, so nothing is uploaded; stop this "
                "run, and start it again to continue from there"
            )
        try:
            self._compare(there[0])
        except (InputError, Damaged) as error:
            raise Unavailable(str(error).rstrip(".")) from error
        self._is_compared = True

    def _put(self, path: Path) -> None:
        """Uploads a checkpoint, with its manifest last."""
        step = _step(path)
        rows = json.loads((path / MANIFEST).read_bytes())["rows"]
        run_folder = path.parent.parent

        # A damaged checkpoint is replaced, and must not look complete in between.
        if self._files.exists(self._path(step, MANIFEST)):
            self._files.rm_file(self._path(step, MANIFEST))
        if self._has_folders:
            self._files.makedirs(os.path.dirname(self._path(step, MANIFEST)), exist_ok=True)

        # Later rows are not part of this checkpoint.
        with open(run_folder / METRICS, "rb") as file:
            lines = b"".join(file.readline() for _ in range(rows))
        self._files.pipe_file(self._path(step, METRICS), lines)
        sources = [path / TENSORS, path / SUMS, path / MANIFEST]
        if (run_folder / CONFIG).exists():
            sources.insert(0, run_folder / CONFIG)
        for source in sources:
            if self.is_closed.is_set():
                raise Unavailable("the upload was stopped")
            self._files.put_file(str(source), self._path(step, source.name))
        self._damaged.discard(step)

    def _remove_others(self, wanted: list[Path], keep: int) -> None:
        """Removes all checkpoints except the `keep` newest up to that of the run and `wanted`."""
        listed = self._list()
        newest = _step(wanted[0])
        past = [
            step
            for step, names in listed.items()
            if MANIFEST in names and step <= newest and step not in self._damaged
        ]
        kept = {*sorted(past, reverse=True)[:keep], *map(_step, wanted)}
        for step in listed.keys() - kept:
            # A checkpoint must not be complete while its other files are removed.
            for name in sorted(listed[step], key=lambda name: name != MANIFEST):
                # `rm` would read `?`, `*` and `[` of the address as a pattern.
                self._files.rm_file(self._path(step, name))
            if self._has_folders:
                # A folder with other contents is not removed: `rmdir` raises.
                with suppress(OSError):
                    self._files.rmdir(os.path.dirname(self._path(step, MANIFEST)))

    def _path(self, step: int, name: str) -> str:
        return f"{self._folder}/{path_of(Path(), step)}/{name}"

    def _name(self, step: int) -> str:
        return f"{self.address}/{CHECKPOINTS}/{path_of(Path(), step)}"

    @contextmanager
    def _contact(self) -> Iterator[None]:
        """Converts exceptions of the body, which reads or writes the store, to Unavailable."""
        try:
            yield
        except Unavailable:
            raise
        # Every store has its exceptions: OSError, those of botocore, aiohttp, google.auth, ...
        except Exception as error:
            raise Unavailable(f"{self.address} {_reason(error)}") from error

    @contextmanager
    def _required(self, condition: str) -> Iterator[None]:
        """Converts Unavailable to InputError, at the start of a run."""
        try:
            yield
        except Unavailable as error:
            raise InputError(
                "mirror",
                f"must be reachable {condition}, because it may contain a checkpoint of this run, "
                f"but {error}; check the address and the credentials, or repeat the command later.",
            ) from error


def open_mirror(address: str, folder: Path, choose: Choose | None = None) -> Mirror:
    """Returns the mirror at an address, which is not contacted yet; creates a local folder.

    Args:
        address: Address that fsspec reads, such as `s3://bucket/run`.
        folder: Folder of the run.
        choose: Function that selects the best of several evaluations, whose checkpoint is
            downloaded as well; None downloads only the newest.

    Raises:
        InputError: If a package for the protocol is missing, the address is invalid or in the
            folder of the run, or a local mirror contains that folder or cannot be written to.
    """
    protocol = address.split("://")[0]
    shown = re.sub(r"://[^/@]*@", "://", address).rstrip("/")  # without a password
    if "::" in address:
        raise InputError(
            "mirror",
            f"must be a single address, because chains of fsspec are not supported, got {shown}; "
            "pass an address without ::.",
        )
    try:
        # An extra: only runs with a mirror need it.
        from fsspec.core import url_to_fs
        from fsspec.implementations.local import LocalFileSystem

        # These libraries log every failed request, in addition to the exception.
        for name in ("fsspec", "gcsfs", "s3fs"):
            logging.getLogger(name).addHandler(logging.NullHandler())
        filesystem, root = url_to_fs(address)
    except ImportError as error:
        extra = _EXTRAS.get(protocol)
        package = f"'ctde_jax[{extra}]'" if extra else "fsspec"
        hint = "" if extra else f" and the package of this protocol ({error})"
        raise InputError(
            "mirror", f"{shown} requires other packages; run pip install {package}{hint}."
        ) from error
    except Exception as error:
        raise InputError(
            "mirror", f"must be an address that fsspec can open, but {shown} {_reason(error)}."
        ) from error
    if isinstance(filesystem, LocalFileSystem):
        _prepare_local(Path(root), folder, shown)
    return Mirror(filesystem, root.rstrip("/"), shown, choose)


def _prepare_local(root: Path, folder: Path, shown: str) -> None:
    """Creates the folder of a local mirror, if it does not overlap with the folder of the run.

    Raises:
        InputError: If it does, or cannot be created.
    """
    if root.resolve().is_relative_to(folder.resolve()):
        raise InputError(
            "mirror",
            f"must be outside of the run folder {folder}, got {shown}; change one of them.",
        )
    checkpoints = root / CHECKPOINTS
    if folder.resolve().is_relative_to(checkpoints.resolve()):
        raise InputError(
            "mirror",
            f"must not contain the run folder {folder} in its folder {checkpoints}; change one of "
            "them.",
        )
    with writing_to(root, "mirror"):
        checkpoints.mkdir(parents=True, exist_ok=True)


def warn(sentence: str) -> None:
    """Prints a warning about the mirror on standard error, also if the run prints nothing else."""
    # A closed standard error must not end the run.
    with suppress(OSError, ValueError):
        print(f"warning: mirror {sentence}.", file=sys.stderr, flush=True)


def _step(path: Path) -> int:
    """Returns the step of a checkpoint, given its path."""
    return int(path.name.removeprefix("step-"))


def _check_rows(folder: Path, count: int) -> None:
    """Raises Damaged if `metrics.jsonl` in a folder has fewer than `count` intact rows."""
    try:
        lines = (folder / METRICS).read_bytes().split(b"\n")[:-1]
        intact = [json.loads(line) for line in lines[:count]]
    except (OSError, ValueError, RecursionError) as error:
        raise Damaged(f"{folder}: {METRICS} is missing or malformed") from error
    if len(intact) < count:
        raise Damaged(f"{folder}: {METRICS} has {len(intact)} instead of {count} rows")


def _reason(error: Exception) -> str:
    return f"failed with {shortened(on_one_line(f'{type(error).__name__}: {error}'))}".rstrip(".")
