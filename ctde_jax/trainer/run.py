"""A run in progress: its dispatches, rows, evaluations and checkpoints."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import islice
from typing import NamedTuple

import jax
import numpy as np

from ctde_jax.checkpoint import (
    CHECKPOINTS,
    METRICS,
    make_way,
    open_saver,
    open_uploader,
)
from ctde_jax.devices import PyTree, hosts
from ctde_jax.errors import Preempted
from ctde_jax.rounds import Piece, Span, Sums, cut, digests, state
from ctde_jax.trainer.beginning import Beginning
from ctde_jax.trainer.callbacks import AnyCallback, open_callbacks
from ctde_jax.trainer.claim import Found
from ctde_jax.trainer.log import open_log
from ctde_jax.trainer.meter import Clock
from ctde_jax.trainer.programs import PhaseProgram, Programs
from ctde_jax.trainer.record import Record
from ctde_jax.trainer.stop import Stop, deferred
from ctde_jax.trainer.trained import Trained
from ctde_jax.trainer.training import Saving, Training


class _Dispatch(NamedTuple):
    """Results of dispatched rounds, and the position of the rounds in the piece and in the run."""

    sums: Sums  # over all replicas, each float32[steps of the piece]
    digests: jax.Array  # uint32[replica, leaf]
    first: int  # first round of the dispatch, counted in the piece
    last: int  # end of its rounds, exclusive
    since: int  # number of steps of the run before the dispatch
    until: int  # number of steps of the run after the dispatch


class Run:
    """A run in progress: the state on the devices, and its record on the host.

    Made by `open_run`.

    Args:
        record: The rows, the position, the best parameters and the checkpoints.
        beginning: The first state.
        programs: The compiled programs.
        pieces: The pieces of all remaining spans, in order.
        stop: The signal or callback that has asked the run to stop, if any.
        clock: The wall time by part of the run.
        say: Prints a line.
    """

    def __init__(
        self,
        record: Record,
        beginning: Beginning,
        programs: Programs,
        pieces: Iterator[Piece],
        stop: Stop,
        clock: Clock,
        say: Callable[[str], None],
    ):
        self._record = record
        self._key = beginning.key
        self._programs = programs
        self._phase = programs.phases[0]
        self._pieces = pieces
        self._stop = stop
        self._clock = clock
        self._say = say
        self._center: tuple[PyTree, PyTree] | None = None  # parameters and state evaluated last
        self.train_state = beginning.train_state

    def advance(self, program: PhaseProgram) -> None:
        """Trains the remaining spans of a phase, with evaluations and checkpoints.

        It returns early if a signal, a callback or early stopping ends the run.

        Raises:
            InputError: A file of the run cannot be written.
            NonFiniteLoss: A loss or a parameter is NaN or infinite.
            ReplicasDiverged: Values that must be equal on all devices differ.
        """
        if self._is_over:
            return
        self._phase = program
        meter = self._record.meter
        if program.begins:
            self.train_state = program.phase.begin(self.train_state, self._record.training.devices)

        # A span ends with an evaluation, unless a signal stopped the run in the middle of it.
        for span in program.spans:
            self._dispatch_span(span)
            self._clock.lap("train")
            if meter.is_at_end:
                self._evaluate()
            # The checkpoint comes after the evaluation, so that it holds the evaluation's rows.
            if self._is_over or not meter.is_at_end or self._is_save_due(span):
                self.save()
            self._clock.lap("evaluate")
            if self._is_over:
                break

    def result(self, plan: Sequence[tuple[str, str]]) -> Trained:
        """Waits for the last checkpoint, evaluates if necessary, and returns the trained model.

        Args:
            plan: The rows of the plan, for reports.

        Raises:
            InputError: The last checkpoint could not be written.
            NonFiniteLoss: The loss of the evaluation is NaN or infinite.
            Preempted: SIGTERM or SIGHUP ended the run, and its checkpoint is written.
        """
        self.wait()
        record = self._record
        if record.saver is not None and record.saver.best is not None:
            self._say(f"best       {record.saver.best}, by {record.keep_best}")

        # A preempted run is not evaluated, as the process may be killed soon.
        if record.folder is not None and self._stop.is_preemption and not record.is_whole:
            assert self._stop.asked_by is not None
            raise Preempted(record.meter.position.step, record.folder, self._stop.asked_by.name)

        # After Ctrl-C, evaluate the parameters as they are. The rows of this evaluation come after
        # the last checkpoint, so they are dropped when the run continues.
        if record.best.center is None and not self._is_evaluated:
            self._evaluate()
            self._clock.lap("evaluate")

        trained = record.result(
            jax.device_get(self._center),
            state.of_optimizer(self.train_state),
            self._programs.phases[-1].traffic,
            self._clock.seconds,
            bool(self._stop),
            plan,
        )
        record.callbacks("on_end", trained)
        return trained

    def save(self) -> None:
        """Starts to write a checkpoint of the current state; does nothing without a folder.

        All rows up to the current step must have been logged.

        Raises:
            InputError: The previous checkpoint could not be written.
            NonFiniteLoss: A parameter is NaN or infinite.
        """
        if self._record.folder is None:
            return
        # All hosts take part in copying the state, and all check it.
        strategy = self._phase.phase.strategy
        tensors = state.to_tensors(self.train_state)
        other_point = state.has_evaluated_point(self.train_state, strategy)
        self._record.save(tensors, strategy.diverges, other_point)

    def wait(self) -> None:
        """Waits on all hosts for the checkpoint that host 0 writes.

        Raises:
            InputError: The checkpoint could not be written.
        """
        saver = self._record.saver
        hosts.of_the_first(lambda: None if saver is None else saver.wait())
        self._record.report_checkpoints()

    @property
    def _is_over(self) -> bool:
        return bool(self._stop) or self._record.best.is_over

    def _is_save_due(self, span: Span) -> bool:
        """Returns whether a checkpoint is due after the evaluation at the end of a span."""
        record = self._record
        is_last = span.stop == record.training.total_steps
        return is_last or record.meter.is_save_due() or record.is_new_best

    def _dispatch_span(self, span: Span) -> None:
        """Dispatches the rounds of a span until its end or a signal, and logs their rows."""
        program = self._phase
        record = self._record
        meter = record.meter
        meter.start(span, program.sent)
        unread: list[_Dispatch] = []  # the rows of these are not logged yet
        pieces = islice(self._pieces, span.pieces)
        for examples, indices, first, last in cut(pieces, meter.pace):
            # Dispatch the rounds, to which the memory of the old state is donated.
            self.train_state, sums = program.train_rounds(
                self.train_state, examples, indices, np.int32(first), np.int32(last), self._key
            )

            # Sum over the replicas and digest the state, once for all rounds of the dispatch.
            since = meter.position.gone_through
            meter.dispatched(last - first)
            sums, found = program.digest(sums, self.train_state)
            until = meter.position.gone_through
            unread.append(_Dispatch(sums, found, first, last, since, until))

            # Read the previous dispatch while this one is computed.
            if len(unread) > 1:
                self._read(unread.pop(0))
            # A failed write ends the run here, not only at the next checkpoint.
            if record.saver is not None:
                record.saver.check()
                record.report_checkpoints()
            # A checkpoint within a span holds the rows of this dispatch, so read it first.
            if record.folder is not None and not meter.is_at_end and meter.is_save_due():
                self._read(unread.pop())
                self.save()
            # Hosts agree after every dispatch, so that all of them leave the loop at the same one.
            self._stop.agree()
            if self._stop:
                break
        for dispatch in unread:
            self._read(dispatch)

    def _read(self, dispatch: _Dispatch) -> None:
        # Check the replicas first: if they differ, the rows are not valid.
        found = jax.device_get(dispatch.digests)
        digests.check(found, self._phase.shared, dispatch.since, dispatch.until)
        self._record.read(dispatch.sums, dispatch.first, dispatch.last)

    def _evaluate(self) -> None:
        """Evaluates the central parameters on all splits and logs the rows.

        If the log of a resumed run already has these rows, it only computes the center.

        Raises:
            NonFiniteLoss: A loss is NaN or infinite.
        """
        params = self._phase.center_of(self.train_state)
        model_state = self._programs.reestimate(params, self.train_state.model_state)
        self._center = (params, model_state)
        # The log of a resumed run may already have these rows.
        if self._is_evaluated:
            return
        averages = {
            name: evaluate(params, model_state)
            for name, evaluate in self._programs.evaluate.items()
        }
        rows = self._record.evaluated(averages, params, model_state)
        # Only a callback needs a copy of the parameters on the host.
        callbacks = self._record.callbacks
        if callbacks.have("on_evaluation"):
            callbacks("on_evaluation", rows, *jax.device_get(self._center))

    @property
    def _is_evaluated(self) -> bool:
        """Whether the log has the evaluation of the current step, and `_center` its parameters."""
        return self._center is not None and self._record.measured is not None


@contextmanager
def open_run(
    training: Training,
    saving: Saving,
    found: Found,
    beginning: Beginning,
    programs: Programs,
    clock: Clock,
    show: bool,
    callbacks: Sequence[AnyCallback],
) -> Iterator[Run]:
    """Opens the log, the feed, the callbacks and the writer of checkpoints of a run.

    All of them are closed on exit, also after an exception. Within the body, the first signal is
    only recorded; it ends the run after the current dispatch. For a new run with a folder, a
    checkpoint of the first state is written before the body.

    Args:
        training: Model, data and all options that determine the result of the run.
        saving: Options of the files of the run.
        found: The checkpoint from which the run continues, if there is one.
        beginning: The first state.
        programs: The compiled programs.
        clock: The wall time by part of the run.
        show: Whether to show progress.
        callbacks: The callbacks of the user.

    Raises:
        InputError: The folder cannot be written to, or lacks rows of the checkpoint.
    """
    folder = saving.folder
    is_first = hosts.index() == 0
    spans = [span for program in programs.phases for span in program.spans]

    # The order matters: contexts close in reverse, so the last checkpoint is written and the feed
    # ends before the log draws the curves, and signals are deferred until all of that is done.
    kept = 0 if found.is_new or found.checkpoint is None else found.checkpoint.facts["rows"]
    with ExitStack() as stack:
        stop = stack.enter_context(deferred(saves=folder is not None))
        opened_callbacks = stack.enter_context(open_callbacks(callbacks, stop))
        log = stack.enter_context(open_log(training.total_steps, folder, show, kept))
        pieces = stack.enter_context(beginning.feed(spans))
        # Host 0 alone writes checkpoints.
        saver = None
        if folder is not None and is_first:
            choose = saving.choose(training)
            keep = saving.keep_checkpoints
            uploader = stack.enter_context(open_uploader(found.mirror, keep, log.say))
            offer = None if uploader is None else uploader.offer
            saver = stack.enter_context(
                open_saver(folder / CHECKPOINTS, keep, choose, folder / METRICS, offer)
            )
            # The previous start may have ended before the mirror had its last checkpoint.
            if uploader is not None and found.checkpoint is not None and not found.is_new:
                uploader.offer(found.checkpoint.path, saver.best)

        # Save the first state, so that even a run that fails at once can be continued.
        best = beginning.best
        record = Record(training, saving, found, best, log, saver, opened_callbacks)
        run = Run(record, beginning, programs, pieces, stop, clock, log.say)
        opened_callbacks("on_start", found.decided, log.rows)
        if folder is not None and found.is_new:
            run.save()
            run.wait()
        yield run


def prepare_folder(saving: Saving, found: Found, say: Callable[[str], None]) -> None:
    """Moves an earlier run out of the folder of a new one, and calls `saving.prepare`.

    Call it after the programs are compiled: if a model fails to compile, no file may be moved.
    """
    folder = saving.folder
    if folder is None:
        return
    if not saving.resume:
        hosts.of_the_first(partial(make_way, folder, saving.resume, say))
    if saving.prepare is not None and found.is_new:
        hosts.of_the_first(partial(saving.prepare, folder))
