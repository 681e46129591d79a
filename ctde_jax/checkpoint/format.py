"""Checkpoints: a folder for each step, in which every damaged bit is noticed.

    checkpoints/step-00000460/
        tensors.safetensors   arrays by name
        manifest.json         the step, what else a run needs to go on, versions, and the SHA-256 of every tensor
        SHA256SUMS            of the two files, as `sha256sum --check` reads it

A checkpoint is written under a temporary name, brought to the disk, and only then renamed; so a name that is there
stands for a whole checkpoint, whenever the process was killed. What the arrays mean is the business of `state.py`.
"""

import json
import os
import re
import shutil
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
from ctde_jax.checkpoint.run_folder import writing_to
from ctde_jax.errors import InputError, on_one_line, shortened

TENSORS = "tensors.safetensors"
MANIFEST = "manifest.json"
SUMS = "SHA256SUMS"
FORMAT = 1
_ROOM = 2**20
"""Bytes that are left free for the manifest, metrics and curves."""

_OWN = ("format", "versions", "tensors")
"""What every manifest has of itself."""

Tensors = dict[str, np.ndarray]
Facts = dict[str, Any]
"""What a run needs to know beside its arrays, as JSON can write it."""

BEST = "best"
"""What the names of the best parameters and model state begin with."""

INPUTS = "inputs/"
"""What the names of the shift and the scale of the inputs begin with."""

OTHER_POINT = "evaluated_at_another_point"
"""The fact whether the optimizer is evaluated at another point than the parameters that the checkpoint holds."""

MEASURED = "measured"
"""The fact that says what an evaluation has measured of a checkpoint; None where there was none."""

Choose = Callable[[Sequence[Facts]], int | None]
"""Returns the place of the best among what was measured, of equal ones the first; None where there is none."""


class Damaged(Exception):
    """A checkpoint is not what was written; says which file or which tensors differ."""

    def __init__(self, sentence: str):
        super().__init__(on_one_line(sentence))


class Checkpoint(NamedTuple):
    """What a checkpoint holds."""

    path: Path
    tensors: Tensors
    facts: Facts


def path_of(folder: Path, step: int) -> Path:
    """Names the checkpoint of a step."""
    return folder / f"step-{step:08d}"


def steps(folder: Path) -> list[int]:
    """Returns the steps that have a checkpoint, the newest first."""
    try:
        names = os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        names = []
    except OSError as error:
        raise InputError(
            "run_dir", f"has checkpoints in {folder}, which cannot be read: {error.strerror}."
        ) from error
    found = [re.fullmatch(r"step-(\d{8,})", name) for name in names]
    return sorted((int(match[1]) for match in found if match), reverse=True)


def newest(folder: Path) -> Path:
    """Names the newest checkpoint of a folder that has one."""
    return path_of(folder, steps(folder)[0])


def write(path: Path, tensors: Mapping[str, np.ndarray], facts: Facts) -> None:
    """Writes a checkpoint, in place of the one of that name where there is one.

    Raises:
        OSError: The folder cannot be written to, or has no room; then it is as it was before.
    """
    tensors = {
        name: np.asarray(tensor, order="C") for name, tensor in tensors.items()
    }  # safetensors reads memory as is
    path.parent.mkdir(parents=True, exist_ok=True)
    _check_room(path.parent, sum(tensor.nbytes for tensor in tensors.values()) + _ROOM)
    with written_whole(path) as folder:
        try:
            save_file(tensors, folder / TENSORS)
        except SafetensorError as error:  # of the operating system's, in words of its own
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
        shutil.copymode(
            folder / MANIFEST, folder / TENSORS
        )  # which safetensors makes the owner's alone
        (folder / SUMS).write_text(_sums(folder), encoding="utf-8")


def read(path: Path) -> Checkpoint:
    """Reads a checkpoint of which every bit is as it was written.

    Raises:
        Damaged: A file is missing or differs from its checksum.
        InputError: It was written by a newer version of this library.
    """
    if not os.path.isdir(path):  # False also for what no path can be
        raise Damaged(f"{path} is no folder")
    with _reading(path):
        if _sums(path) != read_small(path / SUMS).decode():
            raise Damaged(f"{path}: {_find_damage(path)} differs from its SHA-256")
        facts, _ = parse(read_small(path / MANIFEST), path)
        with safe_open(path / TENSORS, framework="numpy") as file:
            tensors = {name: _tensor(file, name) for name in file.keys()}  # noqa: SIM118
    return Checkpoint(path, tensors, facts)


def parse(manifest: bytes, path: Path) -> tuple[Facts, dict[str, Facts]]:
    """Returns the facts in the manifest of the checkpoint at `path`, and the description of each tensor.

    Raises:
        Damaged: It is no manifest.
        InputError: It was written by a newer version of this library.
    """
    try:
        says = json.loads(manifest)
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{path}: {MANIFEST} is no JSON ({error})") from error
    if not (
        isinstance(says, dict)
        and isinstance(says.get("format"), int)
        and isinstance(says.get("tensors"), dict)
    ):
        raise Damaged(f"{path}: {MANIFEST} is none of a checkpoint")
    if says["format"] > FORMAT:
        raise InputError(
            "run_dir",
            f"holds the checkpoint {path} of format {says['format']}, and this version reads up to {FORMAT}; "
            "install a newer ctde_jax.",
        )
    return {name: fact for name, fact in says.items() if name not in _OWN}, says["tensors"]


def describe(tensor: np.ndarray) -> Facts:
    """Says of a tensor what a manifest does: its shape, its type, and the SHA-256 of its bits."""
    digest = sha256(tensor.reshape(-1).view(np.uint8).data).hexdigest()
    return {"shape": list(tensor.shape), "dtype": str(tensor.dtype), "sha256": digest}


def newest_intact(folder: Path, say: Callable[[str], None]) -> Checkpoint | None:
    """Reads the newest checkpoint of a folder that is intact, and says which newer ones are not.

    Returns None where the folder has no checkpoint.

    Raises:
        InputError: None of them is intact.
    """
    with suppress(OSError):  # a folder that can only be read stays as it is
        _put_back_all(folder)
    found = steps(folder)
    for step in found:
        try:
            return read(path_of(folder, step))
        except Damaged as error:
            say(f"damaged    {error}; going back to an older checkpoint")
    if found:
        raise InputError(
            "run_dir", f"has no checkpoint that is intact in {folder}; name another folder."
        )
    return None


class Saver:
    """Writes checkpoints in a thread, one after another; keeps the newest, and the best. Made by `open_saver`."""

    def __init__(
        self,
        folder: Path,
        keep: int,
        choose: Choose | None,
        beside: Path,
        thread: ThreadPoolExecutor,
    ):
        self._folder, self._keep, self._choose, self._beside, self._thread = (
            folder,
            keep,
            choose,
            beside,
            thread,
        )
        self._last: Future[None] | None = None

    def save(self, step: int, tensors: Tensors, facts: Facts) -> None:
        """Waits for the checkpoint before this one, and begins to write this one.

        The arrays must not change any more.

        Raises:
            InputError: The one before could not be written.
        """
        self.wait()
        self._last = self._thread.submit(self._write, step, tensors, facts)

    def check(self) -> None:
        """Raises InputError where a checkpoint could not be written."""
        if self._last is not None and self._last.done():
            self.wait()

    def wait(self) -> None:
        """Waits for the checkpoint that is being written, and raises InputError where it could not be."""
        if self._last is not None:
            last, self._last = self._last, None
            last.result()

    @property
    def best(self) -> Path | None:
        """The best of the checkpoints that are there, where the best stays."""
        self.wait()
        return self._best(steps(self._folder))

    def _write(self, step: int, tensors: Tensors, facts: Facts) -> None:
        with writing_to(self._folder):
            if self._beside.exists():
                bring_to_disk(self._beside)  # a checkpoint counts its lines
            write(path_of(self._folder, step), tensors, facts)
            there = steps(self._folder)
            past = [number for number in there if number <= step]
            kept = {path_of(self._folder, number) for number in past[: self._keep]} | {
                self._best(past)
            }
            for number in there:  # also those that a damaged newer one has left behind
                old = path_of(self._folder, number)
                if old not in kept:
                    shutil.rmtree(old.rename(old.with_name(f".{old.name}.partial")))

    def _best(self, among: Sequence[int]) -> Path | None:
        """Names the best of these checkpoints, by what their manifests say was measured; of equal ones the oldest."""
        if self._choose is None:
            return None
        paths = [path_of(self._folder, number) for number in sorted(among)]
        measured = [(path, row) for path in paths if (row := _measured(path)) is not None]
        place = self._choose([row for _, row in measured])
        return None if place is None else measured[place][0]


@contextmanager
def open_saver(folder: Path, keep: int, choose: Choose | None, beside: Path) -> Iterator[Saver]:
    """Opens the thread that writes checkpoints, and waits for its last one.

    What a killed process has left half-written is removed; so the folder must be this process's own.

    Args:
        folder: Of the checkpoints.
        keep: How many of the newest stay.
        choose: Which one stays beside them as the best, by what was measured of each; None where none does.
        beside: A file that is brought to the disk before each of them.
    """
    with writing_to(folder):
        _put_back_all(folder)
        for left in folder.glob(".step-*") if folder.is_dir() else ():
            shutil.rmtree(left)
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint") as thread:
        saver = Saver(folder, keep, choose, beside, thread)
        yield saver
        saver.wait()


def _put_back_all(folder: Path) -> None:
    """Undoes a replacement of a checkpoint that was broken off, or removes what a whole one has replaced."""
    for replaced in folder.glob(".step-*.replaced"):
        put_back(replaced.with_name(replaced.name.removeprefix(".").removesuffix(".replaced")))


def _check_room(folder: Path, size: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < size:
        raise OSError(None, f"a checkpoint takes {size:,} bytes, and {free:,} are free")


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Says of a file that is missing or malformed that the checkpoint is damaged."""
    try:
        yield
    except FileNotFoundError as error:
        raise Damaged(f"{path}: {Path(str(error.filename)).name} is missing") from error
    except OSError as error:
        raise InputError(
            "run_dir", f"has the checkpoint {path}, which cannot be read: {error.strerror}."
        ) from error
    except UnicodeDecodeError as error:
        raise Damaged(f"{path}: {SUMS} is no text any more") from error
    except SafetensorError as error:
        raise Damaged(f"{path}: {TENSORS} is malformed ({shortened(str(error))})") from error


def _measured(path: Path) -> Facts | None:
    """Returns what was measured of a checkpoint, where something was and its manifest is intact."""
    with suppress(Damaged), _reading(path):
        if _sum(path, MANIFEST) in (path / SUMS).read_text(encoding="utf-8").splitlines():
            return parse((path / MANIFEST).read_bytes(), path)[0].get(MEASURED)
    return None


def _tensor(file: safe_open, name: str) -> np.ndarray:
    try:
        return file.get_tensor(name)
    except (
        AttributeError,
        TypeError,
        ValueError,
    ) as error:  # it has a type or a shape that numpy has not
        raise SafetensorError(str(error)) from error


def _sums(path: Path) -> str:
    return "".join(f"{_sum(path, name)}\n" for name in (TENSORS, MANIFEST))


def _sum(path: Path, name: str) -> str:
    with open_regular(path / name) as file:
        return f"{file_digest(file, 'sha256').hexdigest()}  {name}"


def _find_damage(path: Path) -> str:
    """Names the tensors, or the files, in which something differs from what was written."""
    said, found = (path / SUMS).read_text(encoding="utf-8").splitlines(), _sums(path).splitlines()
    if found[1] not in said:
        return f"{MANIFEST}, or what {SUMS} says of it,"
    if found[0] in said:
        return SUMS
    _, described = parse((path / MANIFEST).read_bytes(), path)
    try:
        with safe_open(path / TENSORS, framework="numpy") as file:
            tensors = [
                name for name in described if describe(_tensor(file, name)) != described[name]
            ]
    except SafetensorError:
        return f"the header or the length of {TENSORS}"
    if not tensors:
        return f"the header of {TENSORS}, or what {SUMS} says of it,"
    return f"{', '.join(tensors)} in {TENSORS}"
