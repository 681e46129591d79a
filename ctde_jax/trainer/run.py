"""A run under way: its dispatches, evaluations and checkpoints."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np

from ctde_jax.checkpoint import MEASURED, Checkpoint, Choose, Saver, Tensors
from ctde_jax.devices import Program, PyTree, hosts
from ctde_jax.errors import NonFiniteLoss
from ctde_jax.rounds import Averages, Piece, Sums, cut, guard, state
from ctde_jax.trainer.log import Log, Row
from ctde_jax.trainer.meter import Meter
from ctde_jax.trainer.stop import Stop

BEST = "best"
"""What the names of the best parameters and model state begin with in a checkpoint."""

INPUTS = "inputs/"
"""What the names of the shift and the scale of the inputs begin with in a checkpoint."""

OTHER_POINT = "evaluated_at_another_point"
"""The fact that tells whether a run's optimizer is evaluated at another point than the parameters in a checkpoint."""


class Best:
    """Keeps the parameters of the lowest validation loss where there is patience, and says when it has run out."""

    def __init__(self, patience: int | None):
        self._patience, self._loss, self._in_vain = patience, np.inf, 0
        self.center: tuple[PyTree, PyTree] | None = None
        self.step = 0

    @property
    def is_over(self) -> bool:
        """Whether too many evaluations in a row were in vain."""
        return self._patience is not None and self._in_vain >= self._patience

    @property
    def facts(self) -> dict[str, Any] | None:
        """What a checkpoint says of it, beside the tensors."""
        if self.center is None:
            return None
        return {"loss": self._loss, "step": self.step, "in_vain": self._in_vain}

    @property
    def tensors(self) -> Tensors:
        """What a checkpoint has of it."""
        return {} if self.center is None else state.to_tensors({BEST: self.center})

    def restore(self, found: Checkpoint, like: tuple[PyTree, PyTree]) -> None:
        """Goes on from a checkpoint of this run."""
        own = {name: tensor for name, tensor in found.tensors.items() if name.startswith(BEST)}
        if own:
            facts = found.facts["best"]
            self._loss, self.step, self._in_vain = facts["loss"], facts["step"], facts["in_vain"]
            _, self.center = state.center_from_tensors(own, {BEST: like}).popitem()

    def update(self, validated: Row, params: PyTree, model_state: PyTree) -> None:
        """Takes note of an evaluation."""
        if self._patience is None:
            return
        if validated["loss"] < self._loss:
            self._loss, self.step, self._in_vain = validated["loss"], validated["step"], 0
            self.center = jax.device_get((params, model_state))
        else:
            self._in_vain += 1


class _Dispatch(NamedTuple):
    """Rounds of a piece that have been dispatched, and the steps that they begin after and end with."""

    sums: Sums
    digests: jax.Array
    first: int
    last: int
    since: int
    until: int


@dataclass
class Run:
    """A run under way: the state on the devices, and what has to be told of it."""

    train_state: state.TrainState
    key: jax.Array
    meter: Meter
    best: Best
    log: Log
    saves: bool
    """Whether there are checkpoints."""

    saver: Saver | None
    """What writes them, on host 0."""

    facts: Mapping[str, Any]
    stop: Stop
    averages: Mapping[str, Callable[[PyTree, PyTree], Averages]]
    """By split, validation first where there is one."""

    reestimate: Callable[[PyTree, PyTree], PyTree]
    describe: Callable[[PyTree, PyTree], str] | None
    choose: Choose | None
    """Which of all evaluations is the best, where its checkpoint stays."""

    inputs: Tensors
    """The shift and the scale of the inputs, which a checkpoint keeps for inference."""

    center: tuple[PyTree, PyTree] | None = None
    """The central parameters and model state that were evaluated last."""

    def go_through(
        self,
        pieces: Iterable[Piece],
        train_rounds: Program,
        look: Program,
        shared: Sequence[str],
    ) -> None:
        """Computes the dispatches of a span, or those until it is stopped, and logs their rows.

        Args:
            pieces: Of the span.
            train_rounds: The program of the phase.
            look: Adds up what a dispatch has summed, and digests what it leaves behind.
            shared: The names of what must be equal on all devices.
        """
        unread: list[_Dispatch] = []  # what a dispatch has to tell is fetched while the next one runs
        for examples, indices, first, last in cut(pieces, self.meter.pace):
            self.train_state, sums = train_rounds(
                self.train_state, examples, indices, np.int32(first), np.int32(last), self.key
            )
            since = self.meter.position.gone_through
            self.meter.dispatched(last - first)
            until = self.meter.position.gone_through
            sums, digests = look(sums, self.train_state)
            unread.append(_Dispatch(sums, digests, first, last, since, until))
            if len(unread) > 1:
                self._read(unread.pop(0), shared)
            if self.saver is not None:
                self.saver.check()
            if self.saves and not self.meter.is_at_end and self.meter.is_save_due():
                self._read(unread.pop(), shared)
                self.save()
            self.stop.agree()
            if self.stop:
                break
        for dispatch in unread:
            self._read(dispatch, shared)

    @property
    def is_evaluated(self) -> bool:
        """Whether the log has the averages of the parameters as they are, and these are at hand."""
        return self.center is not None and self._measured is not None

    @property
    def is_best(self) -> bool:
        """Whether no evaluation before the last was as good, where the best checkpoint stays."""
        if self.choose is None:
            return False
        judged = [row for row in self.log.rows if row["split"] == self._judge]
        return self.choose(judged) == len(judged) - 1

    def evaluate(self, center_of: Callable[[state.TrainState], PyTree]) -> None:
        """Averages over the splits at the central parameters, and logs it if the log does not have it yet."""
        params = center_of(self.train_state)
        self.center = (params, self.reestimate(params, self.train_state.model_state))
        if self.is_evaluated:
            return
        rows = [self.meter.row(name, averages(*self.center)) for name, averages in self.averages.items()]
        for row in rows:
            self.log.add(row)
        self.best.update(rows[0], *self.center)
        if self.describe is not None:
            self.log.say(self.describe(*jax.device_get(self.center)))

    def save(self) -> None:
        """Begins to write a checkpoint; all rows up to here have been logged.

        Raises:
            NonFiniteLoss: The last step has spoilt the parameters.
        """
        if not self.saves:
            return
        tensors = state.to_tensors(self.train_state)
        if not all(np.isfinite(tensor).all() for name, tensor in tensors.items() if name.startswith("params/")):
            raise NonFiniteLoss(self.meter.position.step)
        facts = {"position": self.meter.position._asdict(), "rows": len(self.log.rows), "best": self.best.facts}
        facts[MEASURED] = self._measured
        if self.saver is not None:
            tensors |= {**self.best.tensors, **self.inputs}
            self.saver.save(self.meter.position.gone_through, tensors, {**facts, **self.facts})
        self.meter.saved()

    def wait(self) -> None:
        """Waits on all hosts for the checkpoint that host 0 is writing; raises InputError where it could not be."""
        hosts.of_the_first(lambda: None if self.saver is None else self.saver.wait())

    @property
    def _judge(self) -> str:
        """The split by which the best is told: validation, or where there is none, test."""
        return next(iter(self.averages))

    @property
    def _measured(self) -> Row | None:
        """What the log has of the parameters as they are on that split."""
        last = next((row for row in reversed(self.log.rows) if row["split"] == self._judge), None)
        return None if last is None or last["step"] != self.meter.position.step else last

    def _read(self, dispatch: _Dispatch, shared: Sequence[str]) -> None:
        guard.check(jax.device_get(dispatch.digests), shared, dispatch.since, dispatch.until)
        for row in self.meter.rows(dispatch.sums, dispatch.first, dispatch.last):
            self.log.add(row)
