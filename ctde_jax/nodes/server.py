"""The server of a federation: it asks the nodes for messages, and closes rounds.

The folder of the server is that of a run: rows, curves, checkpoints. A round is *closed* when its
messages are combined. Before any node learns its result, its answer and a checkpoint are on disk,
so the same command continues after a kill at any time. Rows of the training split have an entry
`round`:

- `nodes`: names of the nodes whose messages the round has taken;
- `late`, `refused`: names of nodes whose messages came after the round had been closed, or were
  refused;
- `norms`: norm of each message, by name; `far_out`: names of nodes with a norm of more than five
  times the median;
- `received`, `sent`: bytes of all messages and of all requests since the last round;
- `seconds`: time since the last round; `node_seconds`: the longest time that a node has computed.
  The rest is transport, the server, and waiting for nodes.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import numpy as jnp

from ctde_jax.bundle import open_bundle
from ctde_jax.devices import AXIS, PyTree, agreed_state
from ctde_jax.errors import InputError, NonFiniteLoss, writing_to
from ctde_jax.nodes.answers import Answers, Entry
from ctde_jax.nodes.bundles import read_bundle
from ctde_jax.nodes.center import Algorithm, Answer, Center, from_bytes, shapes_of, to_bytes
from ctde_jax.nodes.envelope import Envelope, pack, unpack
from ctde_jax.nodes.federation import Federation
from ctde_jax.nodes.members import Member, Members
from ctde_jax.rounds import Averages, state
from ctde_jax.trainer import Record

_FAR_OUT = 5.0
"""A norm of more than this many times the median is reported."""

_RETRY = 0.5
"""Seconds before a node that was lost is asked again."""

_PAUSE = 5.0
"""Seconds before a node that has refused a request is asked again."""


class Message(NamedTuple):
    """The message of a node, checked and decoded."""

    payload: np.ndarray  # uint8[bytes]
    model_state: PyTree
    sums: Mapping[str, float]
    seconds: float
    norm: float


@dataclass
class Open:
    """The open round: the messages that have come."""

    messages: dict[str, Message] = field(default_factory=dict)
    late: set[str] = field(default_factory=set)
    refused: set[str] = field(default_factory=set)
    since: float = field(default_factory=time.monotonic)
    """Time at which the round before was closed."""

    received: int = 0
    """Bytes."""

    sent: int = 0
    """Bytes."""


class Server:
    """A server, made by `open_server`; it exchanges bytes with nodes, which it knows by identity.

    Args:
        federation: The federation.
        record: Rows, position and checkpoints of the run.
        algorithm: The computation that the server and its nodes share.
        begun: Center, reducer state and moving average, from the start or from a checkpoint.
        members: The nodes that the server knows.
        answers: The answers of the last rounds.
        introduction: Header and arrays of the first request to each node.
        evaluate: Functions from parameters and model state to averages, by split.
        quorum: Minimum number of messages in a round.
        say: Prints a line.
    """

    def __init__(
        self,
        federation: Federation,
        record: Record,
        algorithm: Algorithm,
        begun: "ServerState",
        members: Members,
        answers: Answers,
        introduction: tuple[Mapping[str, Any], list[bytes]],
        evaluate: Mapping[str, Callable[[PyTree, PyTree], Averages]],
        quorum: int,
        say: Callable[[str], None],
    ):
        self.federation = federation
        self.record = record
        self.state = begun
        self._algorithm = algorithm
        self._members = members
        self._answers = answers
        self._introduction = introduction
        self._evaluate = evaluate
        self._quorum = quorum
        self.say = say
        self._open = Open()
        self._bundle: _Bundle | None = None
        self._digest = begun.center.digest
        self._snapshot_size = sum(leaf.nbytes for leaf in jax.tree.leaves(begun.center))
        self._shapes = shapes_of(begun.center)
        self._read = jax.jit(algorithm.star.read)
        self._combine = jax.jit(algorithm.star.combine)
        self._payload_size = self._expected_size()

    @property
    def round(self) -> int:
        """Number of closed rounds."""
        return self.record.meter.position.gone_through // self.federation.round_steps

    @property
    def is_complete(self) -> bool:
        """Whether the last round is closed, or early stopping has ended the run."""
        return self.record.is_whole

    @property
    def has_quorum(self) -> bool:
        """Whether the open round has enough messages."""
        return len(self._open.messages) >= self._quorum

    @property
    def lacks_bundle(self) -> bool:
        """Whether the run is complete, and a node that has joined it lacks its bundle."""
        return any(map(self._sends_bundle, self._members.admitted()))

    def wants(self, identity: str, now: float) -> bool:
        """Returns whether to send a request to a node that has none at present."""
        member = self._members.find(identity)
        if member.waits_until > now:
            return False
        if self.is_complete:
            return not member.has_joined or self._sends_bundle(member)
        return identity not in self._open.messages

    def offer(self, folder: Path) -> None:
        """Sends the bundle in a folder to each node, before its next message.

        Raises:
            InputError: The bundle cannot be read.
        """
        with writing_to(folder):
            names, contents = read_bundle(folder)
        self._bundle = _Bundle(open_bundle(folder).sha256, names, contents)

    def name(self, identity: str) -> str:
        """Returns the name of a node."""
        return self._members.find(identity).name

    def request(self, identity: str) -> bytes:
        """Returns the request for a node: the introduction, or the open round."""
        member = self._members.find(identity)
        if not member.has_joined:
            header, parts = self._introduction
            request = pack({**header, "run": self._members.run, "index": member.index}, parts)
        elif self._bundle is not None and self._sends_bundle(member):
            header = {
                "kind": "bundle",
                "run": self._members.run,
                "names": self._bundle.names,
                "is_last": self.is_complete,
            }
            request = pack(header, self._bundle.contents)
        else:
            request = self._request_message(identity, member)
        self._open.sent += len(request)
        return request

    def accept(self, identity: str, reply: bytes, now: float) -> None:
        """Accepts a reply. A reply that breaks a rule is refused and reported, and has no effect.

        Args:
            identity: The node.
            reply: Its reply to a request.
            now: Time in seconds, for the pause after a refusal.
        """
        self._open.received += len(reply)
        member = self._members.find(identity)
        try:
            self._accept(identity, member, unpack(reply))
        except InputError as error:
            member.waits_until = now + _PAUSE
            member.refusal = str(error)
            self._open.refused.add(identity)
            self.say(f"refused    {member.name}: {error.option} {error.sentence}")

    def report(self, identity: str, sentence: str, now: float) -> None:
        """Reports that a node cannot reply to its request.

        Args:
            identity: The node.
            sentence: The reason.
            now: Time in seconds, for the pause until the next request.
        """
        member = self._members.find(identity)
        # A new process of the node would not understand a request that may be long.
        member.has_joined = False
        member.waits_until = now + _RETRY
        self.say(f"lost       {member.name}: {sentence}")

    def close(self) -> None:
        """Closes the round: combines its messages, and writes the answer and a checkpoint.

        Raises:
            InputError: The folder cannot be written to.
            NonFiniteLoss: The loss or the center became NaN or infinite.
        """
        # In the order of the nodes' indices, so that sums do not depend on who answered first.
        ordered = sorted(self._open.messages, key=lambda each: self._members.find(each).index)
        messages = [self._open.messages[identity] for identity in ordered]
        number = self.round
        step = number * self.federation.round_steps
        answer, reducer_state = self._aggregate(messages, step)
        center = self._algorithm.advance(self.state.center, answer, step)
        advanced = ServerState(center, reducer_state, self._averaged(center))
        if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(center.params)):
            raise NonFiniteLoss(step + self.federation.round_steps)

        # On disk first: the answer, the rows and the checkpoint. Then nodes may learn of it.
        self._answers.add(number, Entry(answer, ordered))
        self.state = advanced
        self._digest = center.digest
        self._add_rows(ordered, messages)
        self._open = Open()
        self.save()

    def save(self) -> None:
        """Writes a checkpoint, on disk before the call returns.

        Raises:
            InputError: The folder cannot be written to.
        """
        train_state = self.state.as_train_state(self.record.meter.position.step)
        tensors = state.to_tensors(train_state)
        is_other = state.is_computed(train_state, self.federation.strategy)
        self.record.save(tensors, diverges=False, other_point=is_other)
        if self.record.saver is not None:
            self.record.saver.wait()
        self.record.report_checkpoints()

    def evaluate(self) -> None:
        """Evaluates the center, and adds the rows; does nothing if the last rows are of it.

        Raises:
            NonFiniteLoss: The loss is NaN or infinite.
        """
        if self.record.measured is None:
            params, model_state = self.evaluated_center()
            averages = {name: of(params, model_state) for name, of in self._evaluate.items()}
            self.record.evaluated(averages, params, model_state)

    def evaluated_center(self) -> tuple[PyTree, PyTree]:
        """Returns the parameters to evaluate and the model state, on the host."""
        train_state = self.state.as_train_state(self.record.meter.position.step)
        params = state.evaluated_point(train_state, self.federation.strategy)
        return jax.device_get((params, train_state.model_state))

    def _request_message(self, identity: str, member: Member) -> bytes:
        """Returns the request for the message of the open round, with what the node has missed."""
        number = self.round
        entries = None if member.round is None else self._answers.since(member.round, number)
        header = {
            "kind": "round",
            "run": self._members.run,
            "round": number,
            "center": self._digest,
            "taken": self._answers.taken_from(identity),
            "refusal": member.refusal,
        }
        member.refusal = ""

        # The entries of the log, unless they are longer than the center itself.
        if entries is not None:
            parts = [
                part
                for entry in entries.values()
                for part in (entry.answer.reduced, entry.answer.model_state)
            ]
            if sum(map(len, parts)) <= self._snapshot_size:
                values = [entry.answer.value for entry in entries.values()]
                taken = [each for each in header["taken"] if each in entries]
                more = {"since": member.round, "values": values, "taken": taken}
                return pack({**header, **more, "snapshot": False}, parts)
        return pack({**header, "snapshot": True}, [to_bytes(tuple(self.state.center))])

    def _sends_bundle(self, member: Member) -> bool:
        return self._bundle is not None and member.bundle != self._bundle.sha256

    def _accept(self, identity: str, member: Member, reply: Envelope) -> None:
        match reply.header.get("kind"):
            case "joined":
                self._check_run(reply)
                if reply.header.get("shapes") != self._shapes:
                    raise InputError(
                        "model",
                        "must have the parameters of the server's; start the node with the model, "
                        "the optimizer and the strategy of the server.",
                    )
                name = reply.value("name", str)[:80]
                self._members.admit(identity, reply.value("index", int), name)
                member.round = reply.value("round", int)
                self.say(f"joined     {name}, index {member.index}, at round {member.round}")
            case "unknown":
                member.has_joined = False
            case "behind":
                member.round = None
                self.say(f"behind     {member.name}: {reply.value('reason', str)[:200]}")
            case "bundle":
                member.bundle = reply.value("sha256", str)
            case "refusal":
                raise InputError("request", f"was refused: {reply.value('reason', str)[:300]}")
            case "message":
                self._check_run(reply)
                self._take(identity, member, reply)
            case kind:
                raise InputError("message", f"must be a reply of this version, got {kind!r:.40}.")

    def _check_run(self, reply: Envelope) -> None:
        if reply.value("run", str) != self._members.run:
            raise InputError("run", f"must be {self._members.run}, got another one.")

    def _take(self, identity: str, member: Member, reply: Envelope) -> None:
        """Checks a message, and adds it to the open round.

        Raises:
            InputError: The message is invalid.
        """
        number = reply.value("round", int)
        if 0 <= number < self.round:
            self._open.late.add(identity)
            # It has the center from which it took its steps, so it is not sent again.
            if member.was_admitted:
                member.round = max(number, member.round or 0)
            return
        if number != self.round:
            raise InputError("round", f"must be {self.round}, got {number}.")
        if not member.was_admitted:
            raise InputError("message", "must come from a node that has joined.")
        # A message that comes twice counts once.
        if identity in self._open.messages:
            return
        self._open.messages[identity] = self._read_message(reply)
        member.round = number

    def _read_message(self, reply: Envelope) -> Message:
        if len(reply.parts) != 2:
            raise InputError("message", f"must have two arrays, got {len(reply.parts)}.")
        payload = np.frombuffer(reply.parts[0], np.uint8)
        if payload.size != self._payload_size:
            raise InputError(
                "message", f"must have {self._payload_size:,} bytes, got {payload.size:,}."
            )
        model_state = from_bytes(reply.parts[1], self.state.center.model_state)
        sums = self._check_sums(reply.value("sums", dict))

        # Decode it: its numbers must be finite, and its weight the number of examples.
        key = self._algorithm.key(self.round * self.federation.round_steps)
        with self._algorithm.place():
            decoded, weight = jax.device_get(self._read(payload, self.state.center.params, key))
        leaves = [np.asarray(leaf) for leaf in jax.tree.leaves((decoded, model_state))]
        if not all(np.isfinite(leaf).all() for leaf in leaves):
            raise InputError("message", "must be finite, got NaN or infinity.")
        if float(weight) not in (sums["examples"], 1.0):
            raise InputError(
                "weight", f"must be the {sums['examples']:,.0f} examples, got {weight:,}."
            )
        squares = sum(
            float(np.sum(np.abs(leaf.astype(np.complex128)) ** 2))
            for leaf in jax.tree.leaves(decoded)
        )
        seconds = reply.value("seconds", float)
        return Message(payload, model_state, sums, seconds, float(np.sqrt(squares)))

    def _check_sums(self, sums: Mapping[str, Any]) -> Mapping[str, float]:
        """Checks the sums over the examples of a node: names, finite numbers, and examples."""
        for name in (*self.record.training.task.summed, "examples"):
            value = sums.get(name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise InputError("sums", f"must have a number for {name}, got {value!r:.40}.")
            if not np.isfinite(value):
                raise InputError("sums", f"must be finite, got {name} {value}.")
        most = self.federation.batch_size // self.federation.nodes * self.federation.round_steps
        if not 0 <= sums["examples"] <= most:
            raise InputError(
                "examples", f"must be from 0 to {most:,} in a round, got {sums['examples']:,}."
            )
        return sums

    def _aggregate(self, messages: list[Message], step: int) -> tuple[Answer, PyTree]:
        """Combines messages; returns the answer and the new state of the reducer."""
        payloads = np.stack([message.payload for message in messages])
        weights = np.array([message.sums["examples"] for message in messages], np.float32)
        before = self.state.center
        with self._algorithm.place():
            reduced, reducer_state = jax.device_get(
                self._combine(
                    payloads, self.state.reducer, before.params, self._algorithm.key(step)
                )
            )
            model_state = before.model_state
            if jax.tree.leaves(model_state):
                rows = jax.tree.map(
                    lambda *leaves: jnp.stack(leaves),
                    *[message.model_state for message in messages],
                )
                model_state = jax.device_get(_merge(rows, model_state, weights))

        # The mean objective, in float32 as on replicas.
        objectives = [message.sums.get("objective", message.sums["loss"]) for message in messages]
        value = float(np.array(objectives, np.float32).sum() / max(weights.sum(), np.float32(1)))
        return Answer(np.asarray(reduced).tobytes(), to_bytes(model_state), value), reducer_state

    def _averaged(self, center: Center) -> PyTree:
        """Returns the moving average of the parameters after a round."""
        decay = self.record.training.ema_decay
        if decay is None:
            return ()
        rate = np.float32(1 - decay)
        return jax.tree.map(
            lambda ema, x: ema + rate * (x - ema), self.state.ema_params, center.params
        )

    def _add_rows(self, ordered: list[str], messages: list[Message]) -> None:
        """Adds the row of the round, and evaluates if that is due.

        Raises:
            NonFiniteLoss: The loss is NaN or infinite.
        """
        meter = self.record.meter
        names = [self.name(identity) for identity in ordered]
        norms = dict(zip(names, [message.norm for message in messages], strict=True))
        median = float(np.median([*norms.values()]))
        far_out = [name for name, norm in norms.items() if norm > _FAR_OUT * median]
        if far_out:
            self.say(f"far out    {', '.join(far_out)}: norms over {_FAR_OUT:g} times the median")
        others = {"late": self._open.late, "refused": self._open.refused}
        about = {
            "nodes": names,
            **{kind: sorted(map(self.name, some)) for kind, some in others.items()},
            "norms": norms,
            "far_out": far_out,
            "received": self._open.received,
            "sent": self._open.sent,
            "seconds": round(time.monotonic() - self._open.since, 3),
            "node_seconds": max(message.seconds for message in messages),
        }
        totals = {
            name: sum(float(message.sums[name]) for message in messages)
            for name in (*self.record.training.task.summed, "examples")
        }
        steps = self.federation.round_steps
        sent = sum(message.payload.size for message in messages) / len(messages)
        self.record.add({**meter.row_of_round(totals, steps, sent), "round": about})

        # Evaluate at the end of an interval, and at the end of the run.
        position = meter.position.gone_through
        interval = -(-self.record.training.interval // steps) * steps
        if position % interval == 0 or position == self.federation.steps:
            self.evaluate()

    def _expected_size(self) -> int:
        """Returns the number of bytes of a payload."""
        star = self._algorithm.star
        params = self.state.center.params

        def send(params: PyTree, key: jax.Array) -> jax.Array:
            return star.send(params, star.init(params), jnp.float32(1), key)[0]

        return jax.eval_shape(send, params, self._algorithm.key(0)).size


class _Bundle(NamedTuple):
    """The bundle that nodes receive."""

    sha256: str
    """SHA-256 of its card."""

    names: list[str]
    contents: list[bytes]


_merge = jax.jit(jax.vmap(agreed_state, (0, None, 0), None, axis_name=AXIS))
"""`merge(rows, before, weights) -> model_state`, with a row for each message."""


class ServerState(NamedTuple):
    """The state of the server between rounds, as numpy arrays."""

    center: Center
    reducer: PyTree
    ema_params: PyTree

    def as_train_state(self, step: int) -> state.TrainState:
        """Returns the state as that of a run, for its checkpoint and evaluation."""
        return state.TrainState(
            step=np.int32(step),
            params=self.center.params,
            model_state=self.center.model_state,
            opt_state=(),
            reduce_state=self.reducer,
            outer_state=self.center.outer_state,
            ema_params=self.ema_params,
            frozen=self.center.frozen,
        )
