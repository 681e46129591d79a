"""A run in progress: its dispatches, rows, evaluations and checkpoints."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import jax
import numpy as np

from ctde_jax.checkpoint import (
    CHECKPOINTS,
    INPUTS,
    MEASURED,
    METRICS,
    OTHER_POINT,
    Saver,
    make_way,
    open_saver,
    plain,
)
from ctde_jax.devices import PyTree, hosts
from ctde_jax.errors import NonFiniteLoss, Preempted
from ctde_jax.rounds import Piece, Span, Sums, cut, guard, state
from ctde_jax.trainer.beginning import Beginning
from ctde_jax.trainer.claim import Found
from ctde_jax.trainer.log import Log, Row, open_log
from ctde_jax.trainer.meter import Clock, Meter
from ctde_jax.trainer.programs import PhaseProgram, Programs
from ctde_jax.trainer.stop import Stop, deferred
from ctde_jax.trainer.trained import Trained, accepts
from ctde_jax.trainer.training import Saving, Training

Describe = Callable[[PyTree, PyTree], str]
"""From parameters and model state, numpy arrays, to a text that is printed at every evaluation."""


class _Dispatch(NamedTuple):
    """Rounds that have been dispatched, and the steps before and after them."""

    sums: Sums
    digests: jax.Array
    first: int
    last: int
    since: int
    until: int


class Run:
    """A run in progress: the state on the devices, and what is logged and saved of it. Made by `open_run`.

    Args:
        training: What determines the numbers.
        saving: Where the files are.
        found: The checkpoint from which the run continues, if there is one.
        beginning: The first state.
        programs: What the devices compute.
        pieces: The examples of all spans, one after another.
        log: Where rows go.
        saver: What writes checkpoints; None on hosts other than the first, and without a folder.
        stop: Which signal has asked for the end.
        clock: The wall time by part.
        describe: What to print of the parameters at every evaluation.
    """

    def __init__(
        self,
        training: Training,
        saving: Saving,
        found: Found,
        beginning: Beginning,
        programs: Programs,
        pieces: Iterator[Piece],
        log: Log,
        saver: Saver | None,
        stop: Stop,
        clock: Clock,
        describe: Describe | None,
    ):
        self._training = training
        self._folder = saving.folder
        self._programs = programs
        self._phase = programs.phases[0]
        self._pieces = pieces
        self._log = log
        self._saver = saver
        self._stop = stop
        self._clock = clock
        self._describe = describe
        self._keep_best = saving.keep_best
        self._facts = _facts(training, saving, found)
        self._key = beginning.key
        self._best = beginning.best
        self._center: tuple[PyTree, PyTree] | None = None  # what was evaluated last
        self._meter = Meter(
            training.source.steps_per_epoch,
            training.task,
            saving.save_every,
            training.on_nonfinite == "skip",
            found.position,
        )
        self.train_state = beginning.train_state

    def advance(self, program: PhaseProgram) -> None:
        """Computes what is left of a phase, with its evaluations and checkpoints, or until the run is over."""
        if self._is_over:
            return
        self._phase = program
        if program.begins:
            self.train_state = program.phase.begin(self.train_state, self._training.devices)
        for span in program.spans:
            self._go_through(span)
            self._clock.lap("train")
            if self._meter.is_at_end:
                self._evaluate()
            if self._is_over or not self._meter.is_at_end or self._is_save_due(span):
                self.save()
            self._clock.lap("evaluate")
            if self._is_over:
                break

    def result(self) -> Trained:
        """Waits for the last checkpoint, and returns what was trained.

        Raises:
            Preempted: SIGTERM or SIGHUP has ended the run, and its checkpoint is written.
        """
        self.wait()
        if self._saver is not None and self._saver.best is not None:
            self._log.say(f"best       {self._saver.best}, by {self._keep_best}")
        is_whole = (
            self._meter.position.gone_through == self._training.total_steps or self._best.is_over
        )
        if self._folder is not None and self._stop.is_preemption and not is_whole:
            assert self._stop.asked_by is not None
            raise Preempted(self._meter.position.step, self._folder, self._stop.asked_by.name)

        # After Ctrl-C the rows of this evaluation are dropped again when the run continues.
        if self._best.center is None and not self._is_evaluated:
            self._evaluate()
            self._clock.lap("evaluate")
        params, model_state = self._best.center or jax.device_get(self._center)
        training = self._training
        return Trained(
            model=training.raw_model,
            params=params,
            model_state=model_state,
            opt_state=state.of_optimizer(self.train_state),
            step=self._best.step or self._log.rows[-1]["step"],
            history=self._log.rows,
            seconds=self._clock.seconds,
            interrupted=bool(self._stop) and not is_whole,
            stopped_early=self._best.is_over,
            task=training.task,
            devices=training.devices,
            traffic=self._programs.phases[-1].traffic,
            accepts=accepts(training.data),
            platform=training.devices[0].platform,
        )

    def save(self) -> None:
        """Begins to write a checkpoint; all rows up to here have been logged.

        Raises:
            NonFiniteLoss: The last step has made a parameter NaN or infinite.
        """
        if self._folder is None:
            return
        tensors = state.to_tensors(self.train_state)
        params = [tensor for name, tensor in tensors.items() if name.startswith("params/")]
        if not all(np.isfinite(tensor).all() for tensor in params):
            raise NonFiniteLoss(self._meter.position.step)
        if self._saver is not None:
            data, diverges = self._training.data, self._phase.phase.strategy.diverges
            other_point = state.has_evaluated_point(self.train_state, self._phase.phase.strategy)
            facts = {
                "position": self._meter.position._asdict(),
                "rows": len(self._log.rows),
                "best": self._best.facts,
                MEASURED: self._measured,
                **self._facts,
                OTHER_POINT: other_point and not diverges,
            }
            inputs = {f"{INPUTS}shift": data.shift, f"{INPUTS}scale": data.scale}
            tensors |= {**self._best.tensors, **inputs}
            self._saver.save(self._meter.position.gone_through, tensors, facts)
        self._meter.saved()

    def wait(self) -> None:
        """Waits on all hosts for the checkpoint that host 0 is writing; raises InputError if it failed."""
        hosts.of_the_first(lambda: None if self._saver is None else self._saver.wait())

    @property
    def _is_over(self) -> bool:
        return bool(self._stop) or self._best.is_over

    def _is_save_due(self, span: Span) -> bool:
        """Returns whether a checkpoint is due after the evaluation at the end of a span."""
        is_last = span.stop == self._training.total_steps
        return is_last or self._meter.is_save_due() or self._is_new_best

    def _go_through(self, span: Span) -> None:
        """Computes the dispatches of a span, or those until it is stopped, and logs their rows."""
        program, meter = self._phase, self._meter
        meter.start(span, program.traffic.sent)
        unread: list[_Dispatch] = []  # fetched while the next dispatch is computed
        pieces = islice(self._pieces, span.pieces)
        for examples, indices, first, last in cut(pieces, meter.pace):
            self.train_state, sums = program.train_rounds(
                self.train_state, examples, indices, np.int32(first), np.int32(last), self._key
            )
            since = meter.position.gone_through
            meter.dispatched(last - first)
            sums, digests = program.look(sums, self.train_state)
            until = meter.position.gone_through
            unread.append(_Dispatch(sums, digests, first, last, since, until))
            if len(unread) > 1:
                self._read(unread.pop(0))
            if self._saver is not None:
                self._saver.check()
            if self._folder is not None and not meter.is_at_end and meter.is_save_due():
                self._read(unread.pop())
                self.save()
            self._stop.agree()
            if self._stop:
                break
        for dispatch in unread:
            self._read(dispatch)

    def _read(self, dispatch: _Dispatch) -> None:
        digests = jax.device_get(dispatch.digests)
        guard.check(digests, self._phase.shared, dispatch.since, dispatch.until)
        for row in self._meter.rows(dispatch.sums, dispatch.first, dispatch.last):
            self._log.add(row)

    def _evaluate(self) -> None:
        """Averages over the splits at the central parameters, and logs it if the log does not have it yet."""
        params = self._phase.center_of(self.train_state)
        model_state = self._programs.reestimate(params, self.train_state.model_state)
        self._center = (params, model_state)
        if self._is_evaluated:
            return
        rows = [
            self._meter.row(name, averages(params, model_state))
            for name, averages in self._programs.evaluate.items()
        ]
        for row in rows:
            self._log.add(row)
        self._best.update(rows[0], params, model_state)
        if self._describe is not None:
            self._log.say(self._describe(*jax.device_get(self._center)))

    @property
    def _is_evaluated(self) -> bool:
        """Whether the log has the averages of the parameters as they are, and these are at hand."""
        return self._center is not None and self._measured is not None

    @property
    def _is_new_best(self) -> bool:
        """Whether no evaluation before the last was as good, if the best checkpoint is kept."""
        if self._keep_best is None:
            return False
        judged = [row for row in self._log.rows if row["split"] == self._judge]
        return self._training.task.best(self._keep_best, judged) == len(judged) - 1

    @property
    def _judge(self) -> str:
        """The split that determines what is best: validation, or else test."""
        return next(iter(self._programs.evaluate))

    @property
    def _measured(self) -> Row | None:
        """The row of that split for the parameters as they are, if the log has it."""
        rows = reversed(self._log.rows)
        last = next((row for row in rows if row["split"] == self._judge), None)
        return None if last is None or last["step"] != self._meter.position.step else last


@contextmanager
def open_run(
    training: Training,
    saving: Saving,
    found: Found,
    beginning: Beginning,
    programs: Programs,
    clock: Clock,
    show: bool,
    describe: Describe | None,
) -> Iterator[Run]:
    """Opens the log, the examples and the writer of checkpoints of a run, and closes them however it ends.

    From here on the first signal is noted only, and ends the run after the dispatch that is being computed. A new run
    with a folder has a checkpoint before its first row.
    """
    folder = saving.folder
    is_first = hosts.index() == 0
    spans = [span for program in programs.phases for span in program.spans]
    kept = 0 if found.is_new or found.checkpoint is None else found.checkpoint.facts["rows"]
    with ExitStack() as stack:
        stop = stack.enter_context(deferred(saves=folder is not None))
        log = stack.enter_context(open_log(training.total_steps, folder, show, kept))
        pieces = stack.enter_context(beginning.feed(spans))
        saver = None
        if folder is not None and is_first:
            keep_best = saving.keep_best
            choose = None if keep_best is None else partial(training.task.best, keep_best)
            opened = open_saver(
                folder / CHECKPOINTS, saving.keep_checkpoints, choose, folder / METRICS
            )
            saver = stack.enter_context(opened)
        shown = describe if is_first else None
        run = Run(
            training, saving, found, beginning, programs, pieces, log, saver, stop, clock, shown
        )
        if folder is not None and found.is_new:
            run.save()
            run.wait()
        yield run


def prepare_folder(saving: Saving, found: Found, say: Callable[[str], None]) -> None:
    """Moves an earlier run out of the folder of a new one, and lets the caller write files there.

    Only after the programs are compiled, as a module that does not compile must not move anything.
    """
    folder = saving.folder
    if folder is None:
        return
    if not saving.resume:
        hosts.of_the_first(partial(make_way, folder, saving.resume, say))
    if saving.prepare is not None and found.is_new:
        hosts.of_the_first(partial(saving.prepare, folder))


def _facts(training: Training, saving: Saving, found: Found) -> dict[str, Any]:
    """Returns what is the same in every checkpoint of a run."""
    facts = {
        "replicas": len(training.devices),
        "options": found.decided,
        "given_options": plain(saving.options),
        "classes": training.data.classes,
        "vocabulary": training.data.vocabulary,
        "platform": training.devices[0].platform,
    }
    if saving.folder is not None:
        facts["identity"] = training.identity.facts
    return facts
