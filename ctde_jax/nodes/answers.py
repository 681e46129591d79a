"""The answers of the last rounds, in the folder of the server, from which absent nodes catch up.

Each is a file, `answers/round-00000012`, an envelope. A file is written before the checkpoint that
follows it, so after a kill there may be a file of a round that the checkpoint does not know; the
same round is then closed again, and replaces it.
"""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import NamedTuple

from ctde_jax.checkpoint import ANSWERS, write_whole
from ctde_jax.errors import InputError, writing_to
from ctde_jax.nodes.center import Answer
from ctde_jax.nodes.envelope import pack, unpack


class Entry(NamedTuple):
    """The answer of a round, and the nodes whose messages it contains."""

    answer: Answer
    taken: Collection[str]
    """Identities of these nodes."""


class Answers:
    """The answers of the last rounds.

    Args:
        folder: Folder of the server.
        keep: Number of rounds whose answers are kept.
        end: Round after the last one that the checkpoint contains; later answers are ignored.
    """

    def __init__(self, folder: Path, keep: int, end: int):
        self._folder = folder / ANSWERS
        self._keep = keep
        self._entries: dict[int, Entry] = {}
        with writing_to(folder):
            self._folder.mkdir(exist_ok=True)
            for number in range(max(0, end - keep), end):
                # A missing or damaged file costs nothing but a snapshot.
                try:
                    self._entries[number] = _read(self._path(number))
                except (FileNotFoundError, InputError):
                    self._entries.clear()

    def add(self, number: int, entry: Entry) -> None:
        """Adds the answer of a round, on disk before the call returns.

        Raises:
            InputError: The folder cannot be written to.
        """
        header = {"value": entry.answer.value, "taken": sorted(entry.taken)}
        written = pack(header, [entry.answer.reduced, entry.answer.model_state])
        with writing_to(self._folder):
            write_whole(self._path(number), written)
            self._entries[number] = entry
            old = number - self._keep
            self._entries.pop(old, None)
            self._path(old).unlink(missing_ok=True)

    def since(self, first: int, end: int) -> Mapping[int, Entry] | None:
        """Returns the answers of the rounds in `range(first, end)`; None if one is not kept."""
        if not all(number in self._entries for number in range(first, end)):
            return None
        return {number: self._entries[number] for number in range(first, end)}

    def taken_from(self, identity: str) -> list[int]:
        """Returns the kept rounds that have taken a message of a node."""
        return [number for number, entry in self._entries.items() if identity in entry.taken]

    def _path(self, number: int) -> Path:
        return self._folder / f"round-{number:08d}"


def _read(path: Path) -> Entry:
    found = unpack(path.read_bytes())
    if len(found.parts) != 2:
        raise InputError("run_dir", f"must have two arrays in {path}, got {len(found.parts)}.")
    reduced, model_state = found.parts
    answer = Answer(reduced, model_state, found.value("value", float))
    return Entry(answer, found.value("taken", list))
