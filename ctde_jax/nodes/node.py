"""A node of a federation: it answers the requests of the server, and keeps its state in a folder.

The folder has the newest state as a checkpoint. It is written before a message is sent, and
contains the message, so a node that was killed at any time sends the same message again. The data
stay on the node; it sends its messages, and sums of the loss and the metrics over its examples.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from ctde_jax import checkpoint
from ctde_jax.checkpoint import CHECKPOINTS, writing_to
from ctde_jax.data import Dataset, Meaning, digests_of, with_meaning
from ctde_jax.devices import PyTree
from ctde_jax.errors import InputError
from ctde_jax.models import tasks
from ctde_jax.nodes.center import Answer, Center, from_bytes, make_algorithm, to_bytes
from ctde_jax.nodes.envelope import Envelope, pack, unpack
from ctde_jax.nodes.federation import Federation
from ctde_jax.nodes.local_steps import LocalSteps
from ctde_jax.rounds import Place, named, state

MakeFederation = Callable[[Mapping[str, Any] | None, Dataset], Federation]
"""`make(options, data) -> federation`, from the options that the server sends, if it sends any."""


class NodeState(NamedTuple):
    """The state of a node, which its folder has."""

    center: Center
    opt_state: PyTree
    sender: PyTree
    """State of the reducer before the last message, or after it if the message is settled."""

    sent: PyTree
    """State of the reducer after the last message."""

    message: PyTree
    """The last message as the server decodes it, with zeros if it is settled."""

    undelivered: PyTree
    """Sum of the messages that no round has taken; it is added to the next message."""


class Progress(NamedTuple):
    """The progress of a node."""

    round: int = 0
    """Number of rounds whose answers the center contains."""

    sent: int | None = None
    """The round of the last message, if it is not settled yet."""


class Node:
    """A node, made at its start; it learns from the server what to train.

    Args:
        folder: Folder of the node, created if necessary. No other process may use it.
        data: Data set of the node.
        make: Makes the federation, which must be that of the server.
        devices: Devices of the node.
        name: Name of the node in the rows of the server.
        index: Index of the node among all nodes, which determines the order of its examples; by
            default, the server assigns the first free one.
        say: Prints a line.

    Raises:
        InputError: The folder cannot be written to.
    """

    def __init__(
        self,
        folder: Path,
        data: Dataset,
        make: MakeFederation,
        devices: Sequence[jax.Device],
        name: str,
        index: int | None = None,
        say: Callable[[str], None] = lambda line: None,
    ):
        self.folder = folder
        self._data = data
        self._make = make
        self._devices = devices
        self._name = name
        self._index = index
        self._say = say
        self._member: _Member | None = None
        with writing_to(folder, "folder"):
            folder.mkdir(parents=True, exist_ok=True)

    def answer(self, request: bytes) -> bytes:
        """Returns the reply to a request of the server.

        A refusal is a reply as well, with one sentence; the server reports it.
        """
        try:
            return self._answer(unpack(request))
        except InputError as error:
            self._say(f"refused    {error}")
            return pack({"kind": "refusal", "name": self._name, "reason": str(error)})

    def _answer(self, request: Envelope) -> bytes:
        kind = request.header.get("kind")
        if kind == "join":
            self._member = self._join(request)
            return self._member.introduction()
        if self._member is None or self._member.run != request.header.get("run"):
            # This process has just started; the server introduces itself again.
            return pack({"kind": "unknown", "name": self._name, "index": self._index})
        if kind == "round":
            return self._member.take_part(request)
        raise InputError("message", f"must be a request of this version, got {kind!r:.40}.")

    def _join(self, request: Envelope) -> "_Member":
        """Builds the training that the server describes, and reads the state in the folder."""
        header = request.header
        arrays = [
            np.frombuffer(part, dtype).reshape(shape)
            for part, (dtype, shape) in zip(request.parts, header["arrays"], strict=True)
        ]
        shift, scale, *units = arrays
        meaning = Meaning(tuple(header["classes"]), tuple(header["vocabulary"]), shift, scale)
        data = with_meaning(self._data, meaning)
        federation = self._make(header["options"], data)
        place = Place(header["index"] if self._index is None else self._index, federation.nodes)
        return _Member(
            self.folder,
            federation,
            data,
            self._devices,
            place,
            header["run"],
            self._name,
            tasks.Units(*units) if units else None,
            self._say,
        )


class _Member:
    """A node that has joined a run."""

    def __init__(
        self,
        folder: Path,
        federation: Federation,
        data: Dataset,
        devices: Sequence[jax.Device],
        place: Place,
        run: str,
        name: str,
        units: tasks.Units | None,
        say: Callable[[str], None],
    ):
        self.run = run
        self._folder = folder / CHECKPOINTS
        self._federation = federation
        self._name = name
        self._place = place
        self._say = say

        # The computation of the local steps, and that of the center, which all sides share.
        training = federation.of_node(data, devices, units)
        self._local = LocalSteps(training, place, federation.epoch_steps)
        self._shared = make_algorithm(
            training, federation.nodes, federation.strategy
        )
        self._send = jax.jit(self._shared.star.send)
        self._read = jax.jit(self._shared.star.read)
        self._settle = jax.jit(self._shared.star.settle)

        # The first state, or that of the folder.
        self._identity = {"run": run, "index": place.node, **digests_of(data, None)}
        center = self._shared.begin()
        with self._shared.place():
            sender = jax.device_get(self._shared.star.init(center.params))
        nothing = jax.tree.map(np.zeros_like, center.params)
        self._state = NodeState(
            center, self._local.init(center), sender, sender, nothing, nothing
        )
        self._progress = Progress()
        self._payload = b""
        self._report: dict[str, Any] = {}
        self._resume()

    def introduction(self) -> bytes:
        """Returns the reply to the server's introduction."""
        shapes = {
            name: f"{leaf.dtype}{list(leaf.shape)}"
            for name, leaf in named(self._state.center).items()
        }
        header = {
            "kind": "joined",
            "run": self.run,
            "name": self._name,
            "index": self._place.node,
            "round": self._progress.round,
            "shapes": shapes,
        }
        return pack(header)

    def take_part(self, request: Envelope) -> bytes:
        """Returns the message of a round, and computes it unless the folder has it already."""
        header = request.header
        number = header["round"]
        problem = self._catch_up(header, request.parts)
        if problem:
            self._say(f"snapshot   {problem}")
            return pack({"kind": "behind", "run": self.run, "round": -1, "reason": problem})
        if self._progress.sent != number:
            self._compute(number)
        return pack(
            {"kind": "message", "run": self.run, "round": number, **self._report},
            [self._payload, to_bytes(self._model_state)],
        )

    def _catch_up(self, header: Mapping[str, Any], parts: Sequence[bytes]) -> str:
        """Advances the center to the round of the request.

        Returns:
            A sentence if that is not possible; the server then sends a snapshot.
        """
        number = header["round"]
        taken = set(header["taken"])
        if header["snapshot"]:
            center = Center(*from_bytes(parts[0], tuple(self._state.center)))
            self._settle_last(taken, None)
            self._state = self._state._replace(center=center)
            self._progress = self._progress._replace(round=number)
        else:
            # The entries of the log, from round `since` on; those that are known are skipped.
            first = header["since"]
            known = self._progress.round
            if not first <= known <= number:
                return f"the center is that of round {known}, and the entries begin at {first}"
            entries = [
                Answer(parts[place], parts[place + 1], value)
                for place, value in zip(range(0, len(parts), 2), header["values"], strict=True)
            ]
            for place, entry in enumerate(entries[known - first :], known):
                self._settle_last(taken, entry if place == self._progress.sent else None)
                step = place * self._federation.round_steps
                center = self._shared.advance(self._state.center, entry, step)
                self._state = self._state._replace(center=center)
                self._progress = self._progress._replace(round=place + 1)
        if self._state.center.digest != header["center"]:
            return f"the center of round {number} differs from that of the server"
        return ""

    def _settle_last(self, taken: set[int], entry: Answer | None) -> None:
        """Decides what happens to the last message, given the rounds that have taken one.

        Args:
            taken: Rounds that have taken a message of this node.
            entry: The answer of the round of the last message, if it is known.
        """
        last = self._progress.sent
        if last is None:
            return
        before = self._state
        undelivered = before.undelivered
        sender = before.sent
        if last not in taken:
            # Nothing that was learned is lost: the whole message is added to the next one.
            undelivered = before.message
            self._say(f"late       the message of round {last} was not taken and is kept")
        else:
            undelivered = jax.tree.map(np.zeros_like, undelivered)
            if entry is not None:
                answer = np.frombuffer(entry.reduced, np.uint8)
                with self._shared.place():
                    sender = jax.device_get(
                        self._settle(answer, before.center.params, before.sender, before.sent)
                    )
        self._state = before._replace(
            sender=sender,
            sent=sender,
            message=jax.tree.map(np.zeros_like, before.message),
            undelivered=undelivered,
        )
        self._progress = self._progress._replace(sent=None)

    def _compute(self, number: int) -> None:
        """Takes the local steps of a round, encodes the message, and writes the folder."""
        started = time.perf_counter()
        step = number * self._federation.round_steps
        before = self._state
        local = self._local(before.center, before.opt_state, step)
        if not local.is_finite:
            raise InputError(
                "learning_rate",
                f"must be lower, as the loss or the message of round {number} is NaN or infinite.",
            )
        message = local.message
        if any(leaf.any() for leaf in jax.tree.leaves(before.undelivered)):
            message = jax.tree.map(np.add, message, before.undelivered)

        # Encode, and decode as the server does.
        weight = np.float32(local.sums["examples"])
        key = self._shared.key(step)
        with self._shared.place():
            payload, sent = self._send(message, before.sender, weight, key)
            decoded, _ = self._read(payload, before.center.params, key)
        self._payload = np.asarray(payload).tobytes()
        self._model_state = local.model_state
        self._state = before._replace(
            opt_state=local.opt_state, sent=jax.device_get(sent), message=jax.device_get(decoded)
        )
        self._progress = self._progress._replace(sent=number)
        self._report = {
            "name": self._name,
            "sums": local.sums,
            "seconds": round(time.perf_counter() - started, 3),
        }
        self._write()

    def _write(self) -> None:
        """Writes the state and the message to the folder, and removes the state before."""
        facts = {
            **self._identity,
            "progress": self._progress._asdict(),
            "report": self._report,
        }
        tensors = state.to_tensors(
            {
                "state": self._state,
                "payload": np.frombuffer(self._payload, np.uint8),
                "model_state": self._model_state,
            }
        )
        number = self._progress.round
        with writing_to(self._folder, "folder"):
            checkpoint.write(checkpoint.path_of(self._folder, number), tensors, facts)
            checkpoint.prune(self._folder, keep=2)

    def _resume(self) -> None:
        """Reads the newest intact state of the folder, if there is one.

        Raises:
            InputError: The state belongs to another run, or to other data.
        """
        found = checkpoint.newest_intact(self._folder, self._say)
        if found is None:
            return
        before = {name: found.facts.get(name) for name in self._identity}
        differing = [name for name, value in self._identity.items() if before[name] != value]
        if differing:
            raise InputError(
                "folder",
                f"must be new, or that of the same run and data, but {', '.join(differing)} differ "
                f"in {self._folder.parent}; pass another folder.",
            )
        like = {
            "state": self._state,
            "payload": found.tensors["payload"],
            "model_state": self._state.center.model_state,
        }
        read = state.tree_from_tensors(found.tensors, like, "folder")
        self._state = read["state"]
        self._payload = read["payload"].tobytes()
        self._model_state = read["model_state"]
        self._progress = Progress(**found.facts["progress"])
        self._report = found.facts["report"]
