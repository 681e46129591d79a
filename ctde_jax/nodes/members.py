"""The nodes that a server knows, by identity."""

import json
import secrets
from dataclasses import dataclass
from pathlib import Path

from ctde_jax.bundle import read_small
from ctde_jax.checkpoint import NODES, write_whole
from ctde_jax.errors import InputError, writing_to


@dataclass
class Member:
    """A node as the server knows it."""

    index: int
    """Index of the node, which determines the order of its examples."""

    name: str
    was_admitted: bool = False
    """Whether the node has joined the run at any time."""

    has_joined: bool = False
    """Whether the node has answered the introduction since the start of the server."""

    round: int | None = 0
    """Number of rounds whose answers the node has; None if it needs a snapshot."""

    bundle: str = ""
    """SHA-256 of the card of the bundle that the node has."""

    refusal: str = ""
    """Why the last reply of the node was refused, for its next request; empty if it was not."""

    waits_until: float = 0.0
    """Time before which the node is not asked again, after it has refused a request."""


class Members:
    """The nodes that a server knows, and the name of the run; in `nodes.json` of its folder.

    Args:
        folder: Folder of the server.

    Raises:
        InputError: The file is damaged or cannot be read.
    """

    def __init__(self, folder: Path):
        self._path = folder / NODES
        self.run = secrets.token_hex(8)
        self._known: dict[str, Member] = {}
        if self._path.exists():
            try:
                found = json.loads(read_small(self._path))
                self.run = str(found["run"])
                self._known = {
                    identity: Member(int(index), str(name), was_admitted=True)
                    for identity, (index, name) in found["nodes"].items()
                }
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise InputError(
                    "run_dir", f"must have an intact {NODES}, but {self._path} is not."
                ) from error
        else:
            self._write()

    def find(self, identity: str) -> Member:
        """Returns a node, for which the first free index is reserved if it is new."""
        if identity not in self._known:
            used = {member.index for member in self._known.values()}
            index = next(number for number in range(len(used) + 1) if number not in used)
            self._known[identity] = Member(index, f"node {index}")
        return self._known[identity]

    def admit(self, identity: str, index: int, name: str) -> None:
        """Records the index and the name of a node that has joined.

        Raises:
            InputError: Another node has joined with the index, or the file cannot be written.
        """
        member = self.find(identity)
        for other, known in list(self._known.items()):
            if known.index != index or other == identity:
                continue
            if known.was_admitted:
                raise InputError(
                    "index", f"must be that of one node only, but {known.name} has {index}."
                )
            # Only reserved: it gets another index at its next introduction.
            del self._known[other]
        is_changed = (member.index, member.name) != (index, name) or not member.was_admitted
        member.index = index
        member.name = name
        member.was_admitted = True
        member.has_joined = True
        if is_changed:
            self._write()

    def admitted(self) -> list[Member]:
        """Returns the nodes that have joined the run at any time."""
        return [member for member in self._known.values() if member.was_admitted]

    def _write(self) -> None:
        nodes = {
            identity: [member.index, member.name]
            for identity, member in self._known.items()
            if member.was_admitted
        }
        content = json.dumps({"run": self.run, "nodes": nodes}) + "\n"
        with writing_to(self._path.parent):
            write_whole(self._path, content.encode())
