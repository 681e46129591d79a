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
from ctde_jax.bundle import open_bundle
from ctde_jax.checkpoint import CHECKPOINTS
from ctde_jax.data import Dataset, Meaning, digests_of, with_meaning
from ctde_jax.devices import PyTree
from ctde_jax.errors import InputError, writing_to
from ctde_jax.models import tasks
from ctde_jax.nodes.bundles import FOLDER as BUNDLE
from ctde_jax.nodes.bundles import write_received
from ctde_jax.nodes.center import (
    Answer,
    Center,
    from_bytes,
    make_algorithm,
    shapes_of,
    to_bytes,
)
from ctde_jax.nodes.envelope import Envelope, pack, unpack
from ctde_jax.nodes.federation import Federation
from ctde_jax.nodes.local_steps import LocalSteps
from ctde_jax.rounds import Place, state
from ctde_jax.trainer import Training


class Setup(NamedTuple):
    """The part of a node that its user provides."""

    data: Dataset
    """Data set of the node, of which only the training split is used."""

    make: Callable[[Dataset], Federation]
    """Makes the federation, given the data with the classes of the server."""


MakeSetup = Callable[[Mapping[str, Any] | None], Setup]
"""Makes the setup from the options that the server sends, or from None if it sends none."""


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
    """The last message that no round has taken; it is added to the next message."""

    model_state: PyTree
    """State of the model after the local steps of the last message."""


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
        setup: Makes data and federation; the latter must be that of the server.
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
        setup: MakeSetup,
        devices: Sequence[jax.Device],
        name: str,
        index: int | None = None,
        say: Callable[[str], None] = lambda line: None,
    ):
        self.folder = folder
        self._setup = setup
        self._devices = devices
        self._name = name
        self._index = index
        self._say = say
        self._member: _Member | None = None
        self.is_done = False
        """Whether the run has ended and the node has its bundle."""

        self.failure: InputError | None = None
        """The reason if the node could not join the run."""

        with writing_to(folder, "folder"):
            folder.mkdir(parents=True, exist_ok=True)

    def answer(self, request: bytes) -> bytes:
        """Returns the reply to a request of the server.

        A refusal is a reply as well, with one sentence; the server reports it.
        """
        try:
            return self._answer(unpack(request))
        except InputError as error:
            refusal = error
        except (IndexError, TypeError, ValueError) as error:
            # Only a server of another version, or a hostile one, sends such requests.
            refusal = InputError("request", f"must be one of this version ({error}).")
        self._say(f"refused    {refusal}")
        return pack({"kind": "refusal", "reason": str(refusal)})

    def _answer(self, request: Envelope) -> bytes:
        kind = request.value("kind", str)
        run = request.value("run", str)
        is_member = self._member is not None and self._member.run == run
        if kind == "join":
            # The server introduces itself again after a restart.
            if self._member is None or not is_member:
                try:
                    self._member = self._join(request)
                except InputError as error:
                    self.failure = error
                    raise
            return self._member.introduction()
        if self._member is None or not is_member:
            return pack({"kind": "unknown", "run": run})
        if kind == "round":
            return self._member.take_part(request)
        if kind == "bundle":
            return self._receive_bundle(request)
        raise InputError("request", f"must be one of this version, got {kind!r:.40}.")

    def _receive_bundle(self, request: Envelope) -> bytes:
        """Writes the bundle of the trained model to the folder."""
        folder = self.folder / BUNDLE
        write_received(folder, request.value("names", list), request.parts)
        self._say(f"bundle     {folder}; run it with python -m ctde_jax.execute {folder}")
        self.is_done = request.value("is_last", bool)
        return pack({"kind": "bundle", "sha256": open_bundle(folder).sha256})

    def _join(self, request: Envelope) -> "_Member":
        """Builds the training that the server describes, and reads the state in the folder."""
        described = request.value("arrays", list)
        arrays = [
            np.frombuffer(part, dtype).reshape(shape)
            for part, (dtype, shape) in zip(request.parts, described, strict=True)
        ]
        shift, scale, *units = arrays
        classes = tuple(request.value("classes", list))
        meaning = Meaning(classes, tuple(request.value("vocabulary", list)), shift, scale)
        given = self._setup(request.header.get("options"))
        data = with_meaning(given.data, meaning)
        federation = given.make(data)
        index = request.value("index", int) if self._index is None else self._index
        for note in data.notes:
            self._say(f"note       {note}")
        training = federation.of_node(data, self._devices, tasks.Units(*units) if units else None)
        self._say(
            f"joined     {federation.rounds:,} rounds of {federation.round_steps} local steps, "
            f"{len(data.train.inputs):,} examples"
        )
        return _Member(
            self.folder,
            training,
            federation,
            Place(index, federation.nodes),
            request.value("run", str),
            self._name,
            self._say,
        )


class _Member:
    """A node that has joined a run."""

    def __init__(
        self,
        folder: Path,
        training: Training,
        federation: Federation,
        place: Place,
        run: str,
        name: str,
        say: Callable[[str], None],
    ):
        self.run = run
        self._folder = folder / CHECKPOINTS
        self._round_steps = federation.round_steps
        self._name = name
        self._place = place
        self._say = say

        # The computation of the local steps, and that of the center, which all sides share.
        self._local = LocalSteps(training, place, federation.epoch_steps)
        self._shared = make_algorithm(training, federation.strategy, federation.nodes, say)
        self._send = jax.jit(self._shared.star.send)
        self._read = jax.jit(self._shared.star.read)
        self._settle = jax.jit(self._shared.star.settle)

        # The first state, or that of the folder.
        center = self._shared.begin()
        with self._shared.place():
            sender = jax.device_get(self._shared.star.init(center.params))
        self._state = NodeState(
            center,
            self._local.init(center),
            sender,
            sender,
            message=_zeros(center.params),
            undelivered=_zeros(center.params),
            model_state=center.model_state,
        )
        self._progress = Progress()
        self._payload = b""
        self._report: dict[str, Any] = {}
        self._identity = {"run": run, "index": place.node, **digests_of(training.data, None)}
        self._resume()

    def introduction(self) -> bytes:
        """Returns the reply to the server's introduction."""
        header = {
            "kind": "joined",
            "run": self.run,
            "name": self._name,
            "index": self._place.node,
            "round": self._progress.round,
            "shapes": shapes_of(self._state.center),
        }
        return pack(header)

    def take_part(self, request: Envelope) -> bytes:
        """Returns the message of a round, and computes it unless it has been computed before."""
        number = request.value("round", int)
        refusal = request.value("refusal", str)
        if refusal:
            self._say(f"refused    the server has refused the last reply: {refusal}")
        problem = self._catch_up(request, number)
        if problem:
            self._say(f"behind     {problem}")
            return pack({"kind": "behind", "run": self.run, "reason": problem})
        if self._progress.sent != number:
            self._compute(number)
        return pack(
            {"kind": "message", "run": self.run, "round": number, **self._report},
            [self._payload, to_bytes(self._state.model_state)],
        )

    def _catch_up(self, request: Envelope, number: int) -> str:
        """Advances the center to the round of the request.

        Returns:
            A sentence if that is not possible; the server then sends a snapshot.
        """
        taken = set(request.value("taken", list))
        if request.value("snapshot", bool):
            center = Center(*from_bytes(request.parts[0], tuple(self._state.center)))
            # A node that asks for a snapshot of its round has not lost the message of this round.
            if self._progress.sent != number:
                self._settle_last(taken, None)
            self._state = self._state._replace(center=center)
            self._progress = self._progress._replace(round=number)
        else:
            # The answers from round `since` on, of which the first ones may be known.
            first = request.value("since", int)
            known = self._progress.round
            if not first <= known <= number:
                return f"the center is that of round {known}, and the answers begin at {first}"
            values = request.value("values", list)
            answers = [
                Answer(request.parts[2 * place], request.parts[2 * place + 1], float(value))
                for place, value in enumerate(values)
            ]
            for place in range(known, number):
                self._follow(place, answers[place - first], taken)
        if self._state.center.digest != request.value("center", str):
            return f"the center of round {number} differs from that of the server"
        return ""

    def _follow(self, number: int, answer: Answer, taken: set[int]) -> None:
        """Advances the center by the answer of a round."""
        self._settle_last(taken, answer if number == self._progress.sent else None)
        center = self._shared.advance(self._state.center, answer, number * self._round_steps)
        self._state = self._state._replace(center=center)
        self._progress = self._progress._replace(round=number + 1)

    def _settle_last(self, taken: set[int], answer: Answer | None) -> None:
        """Decides what happens to the last message, after its round has been closed.

        Args:
            taken: Rounds that have taken a message of this node.
            answer: The answer of the round of the last message, if it is known.
        """
        last = self._progress.sent
        if last is None:
            return
        before = self._state
        sender = before.sent
        undelivered = _zeros(before.message)
        if last not in taken:
            # Nothing that was learned is lost: the whole message is added to the next one.
            undelivered = before.message
            self._say(f"late       the message of round {last} was not taken and is kept")
        elif answer is not None:
            reduced = np.frombuffer(answer.reduced, np.uint8)
            with self._shared.place():
                sender = jax.device_get(
                    self._settle(reduced, before.center.params, before.sender, before.sent)
                )
        self._state = before._replace(
            sender=sender, sent=sender, message=_zeros(before.message), undelivered=undelivered
        )
        self._progress = self._progress._replace(sent=None)

    def _compute(self, number: int) -> None:
        """Takes the local steps of a round, encodes the message, and writes the folder.

        Raises:
            InputError: The message is not finite, or the folder cannot be written to. The state is
                then that before the call.
        """
        started = time.perf_counter()
        step = number * self._round_steps
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

        # Encode the message, and decode it as the server does.
        weight = np.float32(local.sums["examples"])
        key = self._shared.key(step)
        with self._shared.place():
            payload, sent = self._send(message, before.sender, weight, key)
            decoded, _ = self._read(payload, before.center.params, key)
        after = before._replace(
            opt_state=local.opt_state,
            sent=jax.device_get(sent),
            message=jax.device_get(decoded),
            model_state=local.model_state,
        )
        written = np.asarray(payload).tobytes()
        progress = self._progress._replace(sent=number)
        seconds = round(time.perf_counter() - started, 3)
        report = {"name": self._name, "sums": local.sums, "seconds": seconds}

        # On disk first: a message that has been sent must be known after a kill.
        self._write(after, written, progress, report)
        self._state = after
        self._payload = written
        self._progress = progress
        self._report = report

    def _write(
        self, after: NodeState, payload: bytes, progress: Progress, report: Mapping[str, Any]
    ) -> None:
        """Writes the state and the message to the folder, and removes older states.

        Raises:
            InputError: The folder cannot be written to.
        """
        facts = {**self._identity, "progress": progress._asdict(), "report": report}
        tensors = state.to_tensors(after)
        tensors[_PAYLOAD] = np.frombuffer(payload, np.uint8)
        with writing_to(self._folder, "folder"):
            checkpoint.write(checkpoint.path_of(self._folder, progress.round), tensors, facts)
            for number in checkpoint.steps(self._folder)[2:]:
                checkpoint.remove(checkpoint.path_of(self._folder, number))

    def _resume(self) -> None:
        """Reads the newest intact state of the folder, if there is one.

        Raises:
            InputError: The state belongs to another run, or to other data.
        """
        found = checkpoint.newest_intact(self._folder, self._say)
        if found is None:
            return
        differing = [
            name for name, value in self._identity.items() if found.facts.get(name) != value
        ]
        if differing:
            raise InputError(
                "folder",
                f"must be new, or that of the same run and data, but {self._folder.parent} has "
                f"another {differing[0]}; pass another folder.",
            )
        tensors = dict(found.tensors)
        self._payload = tensors.pop(_PAYLOAD).tobytes()
        self._state = state.tree_from_tensors(tensors, self._state, "folder")
        self._progress = Progress(**found.facts["progress"])
        self._report = found.facts["report"]


_PAYLOAD = "payload"
"""Name of the encoded message in a checkpoint."""


def _zeros(tree: PyTree) -> PyTree:
    return jax.tree.map(np.zeros_like, tree)
