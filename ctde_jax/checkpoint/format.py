"""Checkpoints: one folder per step, in which every corrupted bit is detected.

    checkpoints/step-00000460/
        tensors.safetensors   arrays by name
        manifest.json         step, other facts to resume from, versions, SHA-256 of every tensor
        SHA256SUMS            digests of these two files, as `sha256sum --check` reads them

A checkpoint is written under a temporary name, flushed to disk and then renamed, so a folder with
the final name is complete, no matter when the process was killed. `rounds/state.py` defines the
meaning of the arrays.
"""

import json
import os
import re
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from hashlib import file_digest, sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ctde_jax.bundle import open_regular, read_small
from ctde_jax.checkpoint.atomic import bring_to_disk, put_back, written_whole
from ctde_jax.errors import InputError, on_one_line, shortened, writing_to

TENSORS = "tensors.safetensors"
MANIFEST = "manifest.json"
SUMS = "SHA256SUMS"
# Checkpoints with a greater number are refused.
FORMAT = 1
_ROOM = 2**20
"""Bytes of disk space to leave free for the manifest, metrics and curves."""

_OWN = ("format", "versions", "tensors")
"""Keys of every manifest; all other keys are facts of the run."""

Tensors = dict[str, np.ndarray]
Facts = dict[str, Any]
"""Facts of a run: values besides its arrays that it needs to continue; serializable as JSON."""

BEST = "best"
"""Prefix of the names of early stopping's best parameters and model state."""

INPUTS = "inputs/"
"""Prefix of the names of the shift and the scale of the inputs."""

OTHER_POINT = "evaluated_at_another_point"
"""Key of a fact: whether the optimizer is evaluated at a point other than the saved parameters."""

MEASURED = "measured"
"""Key of a fact: the history row of the checkpoint's evaluation, or None if there was none."""

Choose = Callable[[Sequence[Facts]], int | None]
"""Returns the index of the best history row (ties resolve to the first), or None without rows."""

Offer = Callable[[Path, Path | None], set[Path]]
"""Receives the newest and the best checkpoint to upload them; returns those that must be kept."""


class Damaged(Exception):
    """Raised if a checkpoint is incomplete or corrupted; names the damaged files or tensors."""

    def __init__(self, sentence: str):
        super().__init__(on_one_line(sentence))


class Checkpoint(NamedTuple):
    """The contents of a checkpoint."""

    path: Path
    tensors: Tensors
    facts: Facts


def path_of(folder: Path, step: int) -> Path:
    """Returns the path of the checkpoint of a step."""
    return folder / f"step-{step:08d}"


def steps(folder: Path) -> list[int]:
    """Returns the steps that have a checkpoint in a folder, newest first.

    Raises:
        InputError: If the folder exists but cannot be read.
    """
    try:
        names = os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        names = []
    except OSError as error:
        raise InputError(
            "run_dir", f"has checkpoints in {folder} that cannot be read: {error.strerror}."
        ) from error
    # Temporary folders have names that start with a period, which do not match.
    found = [re.fullmatch(r"step-(\d{8,})", name) for name in names]
    return sorted((int(match[1]) for match in found if match), reverse=True)


def newest(folder: Path) -> Path:
    """Returns the path of the newest checkpoint of a folder.

    Raises:
        IndexError: If the folder has no checkpoint.
        InputError: If the folder cannot be read.
    """
    return path_of(folder, steps(folder)[0])


def write(path: Path, tensors: Mapping[str, np.ndarray], facts: Facts) -> None:
    """Writes a checkpoint, which replaces an existing one at the same path.

    Args:
        path: Folder of the checkpoint.
        tensors: Arrays by name, of any shape and dtype that safetensors supports.
        facts: Entries of the manifest.

    Raises:
        OSError: If the folder cannot be written to or has too little space. An existing checkpoint
            remains unchanged.
    """
    # safetensors writes the buffer of an array as it is, so its order must be C.
    tensors = {name: np.asarray(tensor, order="C") for name, tensor in tensors.items()}

    # Refuse before anything is written if the disk has too little space.
    path.parent.mkdir(parents=True, exist_ok=True)
    _check_room(path.parent, sum(tensor.nbytes for tensor in tensors.values()) + _ROOM)

    # The checksums come last, as they cover the other two files.
    with written_whole(path) as folder:
        try:
            save_file(tensors, folder / TENSORS)
        except SafetensorError as error:
            # safetensors wraps the errors of the operating system.
            raise OSError(None, str(error)) from error
        manifest = {
            "format": FORMAT,
            **facts,
            "versions": {
                name: version(name) for name in ("ctde_jax", "jax", "flax", "optax", "numpy")
            },
            "tensors": {name: describe(tensor) for name, tensor in sorted(tensors.items())},
        }
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        # safetensors creates files that only their owner can read.
        shutil.copymode(folder / MANIFEST, folder / TENSORS)
        (folder / SUMS).write_text(_sums(folder), encoding="utf-8")


def remove(path: Path) -> None:
    """Removes a checkpoint."""
    # Rename first: a final name must never refer to a half-removed checkpoint.
    shutil.rmtree(path.rename(path.with_name(f".{path.name}.partial")))


def read(path: Path) -> Checkpoint:
    """Reads a checkpoint and verifies its checksums.

    Raises:
        Damaged: If the path is not a folder, or a file is missing, malformed or differs from its
            checksum.
        InputError: If the checkpoint was written by a newer version of this library, or a file
            cannot be opened, for example because of its permissions.
    """
    # `isdir` also returns False for a path that cannot exist, such as one with a null byte.
    if not os.path.isdir(path):
        raise Damaged(f"{path} is not a folder")
    with _reading(path):
        # Verify both files before either of them is parsed.
        if _sums(path) != read_small(path / SUMS).decode():
            raise Damaged(f"{path}: SHA-256 mismatch in {_find_damage(path)}")
        facts, _ = parse(read_small(path / MANIFEST), path)
        with safe_open(path / TENSORS, framework="numpy") as file:
            tensors = {name: _tensor(file, name) for name in file.keys()}  # noqa: SIM118
    return Checkpoint(path, tensors, facts)


def parse(manifest: bytes, path: Path) -> tuple[Facts, dict[str, Facts]]:
    """Returns the facts, and the description of each tensor by name, of a manifest.

    Args:
        manifest: Content of the manifest.
        path: Path of the checkpoint, for messages.

    Raises:
        Damaged: If the content is not a manifest.
        InputError: If the checkpoint was written by a newer version of this library.
    """
    try:
        content = json.loads(manifest)
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{path}: {MANIFEST} is not valid JSON ({error})") from error
    if not (
        isinstance(content, dict)
        and isinstance(content.get("format"), int)
        and isinstance(content.get("tensors"), dict)
    ):
        raise Damaged(f"{path}: {MANIFEST} is not the manifest of a checkpoint")
    if content["format"] > FORMAT:
        raise InputError(
            "run_dir",
            f"contains the checkpoint {path} of format {content['format']}, but this version reads "
            f"formats up to {FORMAT}; install a newer ctde_jax.",
        )
    facts = {name: fact for name, fact in content.items() if name not in _OWN}
    return facts, content["tensors"]


def describe(tensor: np.ndarray) -> Facts:
    """Returns the description of a tensor: its shape, its dtype and the SHA-256 of its bytes."""
    # Without a copy; the view as bytes also works for dtypes such as bfloat16.
    digest = sha256(tensor.reshape(-1).view(np.uint8).data).hexdigest()
    return {"shape": list(tensor.shape), "dtype": str(tensor.dtype), "sha256": digest}


def newest_intact(folder: Path, say: Callable[[str], None]) -> Checkpoint | None:
    """Reads the newest intact checkpoint of a folder, and reports newer ones that are damaged.

    Args:
        folder: Folder of the checkpoints.
        say: Prints a line for each damaged checkpoint.

    Returns:
        The checkpoint, or None if the folder has none.

    Raises:
        InputError: If the folder has checkpoints, but none is intact, or one cannot be read.
    """
    # A folder that is only readable stays as it is.
    with suppress(OSError):
        _put_back_all(folder)
    found = steps(folder)
    for step in found:
        try:
            return read(path_of(folder, step))
        except Damaged as error:
            say(f"damaged    {error}; falling back to an older checkpoint")
    if found:
        raise InputError("run_dir", f"has no intact checkpoint in {folder}; choose another folder.")
    return None


def read_facts(path: Path) -> Facts:
    """Reads the facts of a checkpoint, and verifies the checksum of the manifest only.

    Raises:
        Damaged: If a file is missing or malformed, or the manifest differs from its checksum.
        InputError: If the checkpoint was written by a newer version of this library, or a file
            cannot be opened.
    """
    with _reading(path):
        if _sum(path, MANIFEST) not in read_small(path / SUMS).decode().splitlines():
            raise Damaged(f"{path}: SHA-256 mismatch in {MANIFEST} or its line in {SUMS}")
        return parse(read_small(path / MANIFEST), path)[0]


def read_measured(path: Path) -> Facts | None:
    """Returns the history row of a checkpoint's evaluation; None without one, or if damaged."""
    # Only the manifest is read and verified, as the tensors may be large.
    with suppress(Damaged):
        return read_facts(path).get(MEASURED)
    return None


def best_step(measured: Mapping[int, Facts | None], choose: Choose) -> int | None:
    """Returns the best step by its history row; ties: the oldest; None if no step has a row."""
    # Oldest first, as the first of equal rows is chosen.
    rows = {step: row for step, row in sorted(measured.items()) if row is not None}
    place = choose([*rows.values()])
    return None if place is None else [*rows][place]


class Saver:
    """Writes checkpoints in a thread, one at a time; created by `open_saver`."""

    def __init__(
        self,
        folder: Path,
        keep: int,
        choose: Choose | None,
        metrics: Path,
        offer: Offer | None,
        thread: ThreadPoolExecutor,
    ):
        self._folder = folder
        self._keep = keep
        self._choose = choose
        self._metrics = metrics
        self._offer = offer
        self._thread = thread
        self._last: Future[None] | None = None
        self.completed: deque[Path] = deque()
        """Paths of the checkpoints that were written; the caller removes those it has read."""

    def save(self, step: int, tensors: Tensors, facts: Facts) -> None:
        """Waits for the previous checkpoint, then starts to write the next one in the thread.

        The arrays must not be modified afterwards, because the thread reads them.

        Raises:
            InputError: If the previous checkpoint could not be written.
        """
        self.wait()
        self._last = self._thread.submit(self._write, step, tensors, facts)

    def check(self) -> None:
        """Raises InputError if a checkpoint could not be written; does not wait."""
        if self._last is not None and self._last.done():
            self.wait()

    def wait(self) -> None:
        """Waits for the checkpoint that is being written; raises InputError if that failed."""
        if self._last is not None:
            # Forget it first, so that a failure is raised only once.
            last = self._last
            self._last = None
            last.result()

    @property
    def best(self) -> Path | None:
        """Path of the best checkpoint, after a wait; None without `choose` or without evaluations.

        Raises:
            InputError: If the last checkpoint could not be written.
        """
        self.wait()
        return self._best(steps(self._folder))

    def _write(self, step: int, tensors: Tensors, facts: Facts) -> None:
        with writing_to(self._folder):
            # The facts count the lines of this file, so they must be on disk first.
            if self._metrics.exists():
                bring_to_disk(self._metrics)
            write(path_of(self._folder, step), tensors, facts)
            self.completed.append(path_of(self._folder, step))

            # Keep the newest checkpoints and the best one. If there are checkpoints of later steps,
            # they were damaged, and the run resumed from an older one: remove them.
            there = steps(self._folder)
            past = [number for number in there if number <= step]
            best = self._best(past)
            kept = {path_of(self._folder, number) for number in past[: self._keep]} | {best}
            if self._offer is not None:
                kept |= self._offer(path_of(self._folder, step), best)
            for number in there:
                old = path_of(self._folder, number)
                if old not in kept:
                    remove(old)

    def _best(self, among: Sequence[int]) -> Path | None:
        """Returns the best of the checkpoints `among` by their evaluations; ties: the oldest.

        Returns None without `choose`, or if no checkpoint has an evaluation.
        """
        if self._choose is None:
            return None
        measured = {number: read_measured(path_of(self._folder, number)) for number in among}
        best = best_step(measured, self._choose)
        return None if best is None else path_of(self._folder, best)


@contextmanager
def open_saver(
    folder: Path,
    keep: int,
    choose: Choose | None,
    metrics: Path,
    offer: Offer | None = None,
) -> Iterator[Saver]:
    """Starts the thread that writes checkpoints, and waits for the last one on exit.

    Removes the incomplete checkpoints of a killed process, so no other process may use the folder.

    Args:
        folder: Folder of the checkpoints.
        keep: Number of newest checkpoints to keep.
        choose: Function that selects the best of several evaluations, whose checkpoint is kept as
            well; None keeps only the newest checkpoints.
        metrics: File of the history rows, which is flushed to disk before each checkpoint.
        offer: Receives each new checkpoint and the best one, for a mirror; None without a mirror.

    Raises:
        InputError: If the folder cannot be written to, or, on exit, if the last checkpoint could
            not be written.
    """
    # Clean up after a process that was killed while it wrote or removed a checkpoint.
    with writing_to(folder):
        _put_back_all(folder)
        for left in folder.glob(".step-*") if folder.is_dir() else ():
            shutil.rmtree(left)
    # If the body raises, the executor still waits for the checkpoint that is being written.
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint") as thread:
        saver = Saver(folder, keep, choose, metrics, offer, thread)
        yield saver
        saver.wait()


def _put_back_all(folder: Path) -> None:
    """Calls `put_back` for every checkpoint in the folder whose replacement was interrupted."""
    for replaced in folder.glob(".step-*.replaced"):
        put_back(replaced.with_name(replaced.name.removeprefix(".").removesuffix(".replaced")))


def _check_room(folder: Path, size: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < size:
        raise OSError(None, f"a checkpoint needs {size:,} bytes, but only {free:,} are free")


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Converts exceptions of the body, which reads the files of a checkpoint.

    Raises:
        Damaged: If a file is missing or malformed.
        InputError: If a file cannot be opened for another reason.
    """
    try:
        yield
    except FileNotFoundError as error:
        raise Damaged(f"{path}: {Path(str(error.filename)).name} is missing") from error
    # Other errors of the file system, such as missing permissions, are no damage.
    except OSError as error:
        raise InputError(
            "run_dir", f"has a checkpoint {path} that cannot be read: {error.strerror}."
        ) from error
    except UnicodeDecodeError as error:
        raise Damaged(f"{path}: {SUMS} is not valid UTF-8") from error
    except SafetensorError as error:
        raise Damaged(f"{path}: {TENSORS} is malformed ({shortened(str(error))})") from error


def _tensor(file: safe_open, name: str) -> np.ndarray:
    try:
        return file.get_tensor(name)
    except (AttributeError, TypeError, ValueError) as error:
        # numpy does not support the dtype or the shape.
        raise SafetensorError(str(error)) from error


def _sums(path: Path) -> str:
    return "".join(f"{_sum(path, name)}\n" for name in (TENSORS, MANIFEST))


def _sum(path: Path, name: str) -> str:
    with open_regular(path / name) as file:
        return f"{file_digest(file, 'sha256').hexdigest()}  {name}"


def _find_damage(path: Path) -> str:
    """Returns the names of the damaged tensors or files of a checkpoint, for a message."""
    # Compare the files; `_sums` lists the tensors first and the manifest second.
    recorded = (path / SUMS).read_text(encoding="utf-8").splitlines()
    found = _sums(path).splitlines()
    if found[1] not in recorded:
        return f"{MANIFEST} or its line in {SUMS}"
    if found[0] in recorded:
        return SUMS

    # The manifest is intact, so its digests identify the tensors that differ.
    _, described = parse((path / MANIFEST).read_bytes(), path)
    try:
        with safe_open(path / TENSORS, framework="numpy") as file:
            tensors = [
                name for name in described if describe(_tensor(file, name)) != described[name]
            ]
    except SafetensorError:
        return f"the header or the length of {TENSORS}"
    if not tensors:
        return f"the header of {TENSORS} or its line in {SUMS}"
    return f"{', '.join(tensors)} in {TENSORS}"
