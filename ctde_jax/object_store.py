"""The command `python -m ctde_jax.object_store`: a checkpoint to another place and back, through Orbax.

    python -m ctde_jax.object_store put FOLDER PLACE    # of a run, whose newest checkpoint it is, or of a checkpoint
    python -m ctde_jax.object_store get PLACE FOLDER    # in which the same command then goes on with the run

A place is a folder, or whatever Orbax can write to, such as `gs://bucket/mine`:

    tensors/         arrays by name, as Orbax writes them
    manifest.json    the checkpoint's own, with the SHA-256 of every tensor
    metrics.jsonl    the rows up to the checkpoint
    config.json      the options, where the run has written them
    SHA256SUMS       of these three files; written last, so where it is the copy is whole

Orbax writes to object stores, and reads each device's part of an array onto it. Of large arrays it has no checksum, and
restores a damaged one as if nothing were wrong; so every tensor is compared with its SHA-256 in the manifest.
"""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple

import jax
import numpy as np

from ctde_jax import checkpoint, config
from ctde_jax.bundle import streams
from ctde_jax.checkpoint import (
    CHECKPOINTS,
    MANIFEST,
    METRICS,
    SUMS,
    Checkpoint,
    Damaged,
    Facts,
    check_facts,
    check_new,
    claimed,
    writing_to,
)
from ctde_jax.errors import InputError, check_known
from ctde_jax.trainer import console

if TYPE_CHECKING:
    from etils import epath

TENSORS, CONFIG = "tensors", "config.json"


class Copy(NamedTuple):
    """What a place holds."""

    tensors: dict[str, np.ndarray | jax.Array]
    facts: Facts
    files: dict[str, bytes]
    """By name: the manifest, the rows, and maybe the options."""


def main(arguments: Sequence[str]) -> int:
    """Does what the first argument names; returns the exit status, 2 for a mistake or a copy that is damaged."""
    if not arguments or {"-h", "--help"} & set(arguments):
        print(__doc__)
        return 0
    what, *rest = arguments
    screen = console()
    try:
        check_known("object_store", what, ("put", "get"))
        if len(rest) != 2:
            raise InputError("object_store", f"{what} wants a folder and a place, got {len(rest)} arguments.")
        if what == "put":
            screen.print(f"put        {put(Path(rest[0]), rest[1], screen.print)} to {rest[1]}")
        else:
            screen.print(f"got        {get(rest[0], Path(rest[1]))}")
    except InputError as error:
        print(f"error: {config.flag(error.option)} {error.sentence}", file=sys.stderr)
        return 2
    return 0


def put(folder: Path, place: str, say: Callable[[str], None] = print) -> Path:
    """Copies a checkpoint with the rows that go with it to a place where nothing is yet.

    Args:
        folder: Of a run that nobody is training, whose newest intact checkpoint is meant, or of one of its checkpoints.
        place: A folder, or an address that Orbax can write to.
        say: Is told which newer checkpoints are damaged.

    Returns:
        The folder of the checkpoint.

    Raises:
        InputError: There is no such checkpoint, or something is there already, or the place cannot be written to.
    """
    is_run = (folder / CHECKPOINTS).is_dir()
    if not is_run and not ((folder / MANIFEST).exists() and folder.absolute().parent.name == CHECKPOINTS):
        raise InputError(
            "run_dir", f"must be the folder of a run or of one of its checkpoints, and {folder} is neither."
        )
    run_folder = folder if is_run else folder.absolute().parents[1]
    with claimed(run_folder):
        found = checkpoint.newest_intact(folder / CHECKPOINTS, say) if is_run else _intact(folder)
        if found is None:
            raise InputError("run_dir", f"must hold a checkpoint, but {folder} has none yet.")
        check_facts(found, "run_dir")
        files = {MANIFEST: (found.path / MANIFEST).read_bytes(), METRICS: _rows(run_folder, found.facts["rows"])}
        if (run_folder / CONFIG).exists():
            files[CONFIG] = (run_folder / CONFIG).read_bytes()
    arrays = {name: tensor for name, tensor in found.tensors.items() if tensor.size}  # Orbax refuses empty ones
    orbax, there = _orbax(), _located(place)
    with _writing_to(place):
        if there.exists():
            raise InputError("place", f"must be one where nothing is yet, but there is {place}; name another one.")
        there.mkdir(parents=True)
        with orbax.PyTreeCheckpointer() as checkpointer:
            checkpointer.save(there / TENSORS, arrays)
        for name, content in files.items():
            (there / name).write_bytes(content)
        (there / SUMS).write_text("".join(_sums(files)))
    return found.path


def get(place: str, folder: Path) -> Path:
    """Copies what `put` has written to the folder of a run, new or empty, in which the same command then goes on.

    Returns:
        The folder of the checkpoint.

    Raises:
        InputError: The copy is damaged or not whole, or the folder holds a run already.
    """
    with claimed(folder):
        check_new(folder)
        try:
            copy = read(place)
        except Damaged as error:
            raise InputError("place", f"must hold an intact copy, but {error}.") from error
        tensors = {name: np.asarray(tensor) for name, tensor in copy.tensors.items()}
        path = checkpoint.path_of(folder / CHECKPOINTS, copy.facts["position"]["gone_through"])
        with writing_to(folder):
            for name in copy.files.keys() - {MANIFEST}:
                (folder / name).write_bytes(copy.files[name])
            checkpoint.write(path, tensors, copy.facts)
    return path


def read(place: str, shardings: Mapping[str, jax.sharding.Sharding] = {}) -> Copy:
    """Reads what `put` has written, where every bit is as it was.

    Args:
        place: As `put` was told it.
        shardings: By the name of a tensor, how it is spread over devices of this process, each of which reads its part;
            the other tensors are read as numpy arrays.

    Raises:
        Damaged: The copy is not whole, or something differs from its SHA-256; says what.
        InputError: Orbax is not installed, a sharding is for no tensor, or a newer version has written the manifest.
    """
    orbax, there = _orbax(), _located(place)
    with _reading(place):
        files = {name: (there / name).read_bytes() for name in (MANIFEST, METRICS, CONFIG) if (there / name).exists()}
        said = (there / SUMS).read_bytes().decode(errors="replace").splitlines(keepends=True)
    wrong = [line.split()[1] for line in _sums(files) if line not in said]
    if wrong or len(said) != len(files) or MANIFEST not in files:
        raise Damaged(f"{place}: {', '.join(wrong) or 'a file'} differs from its SHA-256, or is missing")
    facts, described = checkpoint.parse(files[MANIFEST], place)
    for name in shardings:
        check_known("shardings", name, described)
    ways = {
        name: orbax.ArrayRestoreArgs(sharding=shardings[name])
        if name in shardings
        else orbax.RestoreArgs(restore_type=np.ndarray)
        for name, says in described.items()
        if 0 not in says["shape"]
    }
    with _reading(place), orbax.PyTreeCheckpointer() as checkpointer:
        tensors = checkpointer.restore(there / TENSORS, restore_args=ways)
        tensors |= {
            name: np.zeros(says["shape"], says["dtype"]) for name, says in described.items() if name not in ways
        }
        differing = [name for name, says in described.items() if checkpoint.describe(np.asarray(tensors[name])) != says]
    if differing:
        raise Damaged(f"{place}: {', '.join(differing)} differs from its SHA-256")
    return Copy(tensors, facts, files)


def _orbax() -> ModuleType:
    try:
        import orbax.checkpoint
    except ImportError as error:
        raise InputError("object_store", "needs Orbax; pip install 'ctde_jax[orbax]' brings it.") from error
    return orbax.checkpoint


def _located(place: str) -> "epath.Path":
    from etils import epath  # which comes with Orbax

    return epath.Path(place if "://" in place else Path(place).absolute())


def _intact(path: Path) -> Checkpoint:
    try:
        return checkpoint.read(path)
    except Damaged as error:
        raise InputError("run_dir", f"must be the folder of an intact checkpoint, but {error}.") from error


def _rows(folder: Path, count: int) -> bytes:
    """Returns the first so many lines of a run's metrics."""
    metrics = folder / METRICS
    rows = metrics.read_bytes().splitlines(keepends=True)[:count] if metrics.exists() else []
    if len(rows) < count:
        raise InputError("run_dir", f"must have the {count} rows of its checkpoint in {metrics}, got {len(rows)}.")
    return b"".join(rows)


def _sums(files: Mapping[str, bytes]) -> list[str]:
    return [f"{sha256(content).hexdigest()}  {name}\n" for name, content in files.items()]


@contextmanager
def _writing_to(place: str) -> Iterator[None]:
    """Says in a sentence that a place cannot be written to, which object stores say in exceptions of their own."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise InputError("place", f"must be one that Orbax can write to, but {place} failed: {error}.") from error


@contextmanager
def _reading(place: str) -> Iterator[None]:
    """Calls damaged what cannot be read, which Orbax and object stores say in exceptions of their own."""
    try:
        yield
    except ImportError as error:  # of what an object store needs beside Orbax
        raise InputError("place", f"must be one that Orbax can read, but {place} failed: {error}.") from error
    except Exception as error:
        says = str(error).partition("\n")[0].partition(" [tensorstore_spec")[0]
        raise Damaged(f"{place}: it cannot be read ({type(error).__name__}: {says})") from error


if __name__ == "__main__":
    sys.exit(streams.run(main))
