"""A run in progress: its dispatches, rows, evaluations and checkpoints."""

from collections.abc import Callable, Iterator, Sequence
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
    open_uploader,
    plain,
)
from ctde_jax.devices import PyTree, hosts
from ctde_jax.errors import NonFiniteLoss, Preempted
from ctde_jax.rounds import Piece, Span, Sums, cut, digests, state
from ctde_jax.trainer.beginning import Beginning
from ctde_jax.trainer.callbacks import AnyCallback, Callbacks, open_callbacks
from ctde_jax.trainer.claim import Found
from ctde_jax.trainer.history import Row
from ctde_jax.trainer.log import Log, open_log
from ctde_jax.trainer.meter import Clock, Meter
from ctde_jax.trainer.programs import PhaseProgram, Programs
from ctde_jax.trainer.stop import Stop, deferred
from ctde_jax.trainer.trained import Trained, accepts
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
    """A run in progress: the state on the devices, its log and its checkpoints.

    Made by `open_run`.

    Args:
        training: Model, data and all options that determine the result of the run.
        saving: Options of the files of the run.
        found: The checkpoint from which the run continues, if there is one.
        beginning: The first state.
        programs: The compiled programs.
        pieces: The pieces of all remaining spans, in order.
        log: The log of the rows.
        saver: The writer of checkpoints; None without a folder, and on all hosts but host 0.
        stop: The signal or callback that has asked the run to stop, if any.
        clock: The wall time by part of the run.
        callbacks: The callbacks of the user.
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
        callbacks: Callbacks,
    ):
        # The parts of the run.
        self._training = training
        self._folder = saving.folder
        self._programs = programs
        self._phase = programs.phases[0]
        self._pieces = pieces
        self._log = log
        self._saver = saver
        self._stop = stop
        self._clock = clock
        self._callbacks = callbacks
        self._keep_best = saving.keep_best
        self._facts = _facts(training, saving, found)
        self._key = beginning.key

        # The progress of the run.
        self._best = beginning.best
        self._center: tuple[PyTree, PyTree] | None = None  # parameters and state evaluated last
        self._meter = Meter(
            training.source.steps_per_epoch,
            training.task,
            saving.save_every,
            training.on_nonfinite == "skip",
            found.position,
        )
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
        if program.begins:
            self.train_state = program.phase.begin(self.train_state, self._training.devices)

        # A span ends with an evaluation, unless a signal stopped the run in the middle of it.
        for span in program.spans:
            self._dispatch_span(span)
            self._clock.lap("train")
            if self._meter.is_at_end:
                self._evaluate()
            # The checkpoint comes after the evaluation, so that it holds the evaluation's rows.
            if self._is_over or not self._meter.is_at_end or self._is_save_due(span):
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
        if self._saver is not None and self._saver.best is not None:
            self._log.say(f"best       {self._saver.best}, by {self._keep_best}")

        # A preempted run is not evaluated, as the process may be killed soon.
        is_whole = (
            self._meter.position.gone_through == self._training.total_steps or self._best.is_over
        )
        if self._folder is not None and self._stop.is_preemption and not is_whole:
            assert self._stop.asked_by is not None
            raise Preempted(self._meter.position.step, self._folder, self._stop.asked_by.name)

        # After Ctrl-C, evaluate the parameters as they are. The rows of this evaluation come after
        # the last checkpoint, so they are dropped when the run continues.
        if self._best.center is None and not self._is_evaluated:
            self._evaluate()
            self._clock.lap("evaluate")

        # With early stopping, the parameters and the step are those of the lowest validation loss.
        params, model_state = self._best.center or jax.device_get(self._center)
        training = self._training
        trained = Trained(
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
            plan=tuple(plan),
        )
        self._callbacks("on_end", trained)
        return trained

    def save(self) -> None:
        """Starts to write a checkpoint of the current state; does nothing without a folder.

        All rows up to the current step must have been logged.

        Raises:
            InputError: The previous checkpoint could not be written.
            NonFiniteLoss: A parameter is NaN or infinite.
        """
        if self._folder is None:
            return
        # All hosts take part in copying the state, and all check it.
        tensors = state.to_tensors(self.train_state)
        params = state.merged_params(tensors, "params")
        if not all(np.isfinite(tensor).all() for tensor in params.values()):
            raise NonFiniteLoss(self._meter.position.step)

        # Host 0 writes the state, the best parameters and the scaling of the inputs.
        if self._saver is not None:
            data = self._training.data
            diverges = self._phase.phase.strategy.diverges
            other_point = state.has_evaluated_point(self.train_state, self._phase.phase.strategy)
            facts = {
                "position": self._meter.position._asdict(),
                "rows": len(self._log.rows),
                "best": self._best.facts,
                MEASURED: self._measured,
                **self._facts,
                # If replicas diverge, the center is the mean of the saved parameters.
                OTHER_POINT: other_point and not diverges,
            }
            inputs = {f"{INPUTS}shift": data.shift, f"{INPUTS}scale": data.scale}
            tensors |= {**self._best.tensors, **inputs}
            self._saver.save(self._meter.position.gone_through, tensors, facts)
        self._meter.saved()

    def wait(self) -> None:
        """Waits on all hosts for the checkpoint that host 0 writes.

        Raises:
            InputError: The checkpoint could not be written.
        """
        hosts.of_the_first(lambda: None if self._saver is None else self._saver.wait())
        self._report_checkpoints()

    @property
    def _is_over(self) -> bool:
        return bool(self._stop) or self._best.is_over

    def _is_save_due(self, span: Span) -> bool:
        """Returns whether a checkpoint is due after the evaluation at the end of a span."""
        is_last = span.stop == self._training.total_steps
        return is_last or self._meter.is_save_due() or self._is_new_best

    def _dispatch_span(self, span: Span) -> None:
        """Dispatches the rounds of a span until its end or a signal, and logs their rows."""
        program = self._phase
        meter = self._meter
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
            if self._saver is not None:
                self._saver.check()
                self._report_checkpoints()
            # A checkpoint within a span holds the rows of this dispatch, so read it first.
            if self._folder is not None and not meter.is_at_end and meter.is_save_due():
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
        for row in self._meter.rows(dispatch.sums, dispatch.first, dispatch.last):
            self._add(row)

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
        # Compute all rows before any is logged: a loss that is not finite must leave none of them.
        rows = [
            self._meter.row(name, averages(params, model_state))
            for name, averages in self._programs.evaluate.items()
        ]
        for row in rows:
            self._add(row)
        self._best.update(rows[0], params, model_state)
        # Only a callback needs a copy of the parameters on the host.
        if self._callbacks.have("on_evaluation"):
            by_split = {row["split"]: row for row in rows}
            self._callbacks("on_evaluation", by_split, *jax.device_get(self._center))

    def _add(self, row: Row) -> None:
        self._log.add(row)
        self._callbacks("on_row", row)

    def _report_checkpoints(self) -> None:
        """Passes the checkpoints that the thread has completed to the callbacks."""
        while self._saver is not None and self._saver.completed:
            self._callbacks("on_checkpoint", self._saver.completed.popleft())

    @property
    def _is_evaluated(self) -> bool:
        """Whether the log has the evaluation of the current step, and `_center` its parameters."""
        return self._center is not None and self._measured is not None

    @property
    def _is_new_best(self) -> bool:
        """Whether `keep_best` is set and the last evaluation is better than all earlier ones."""
        if self._keep_best is None:
            return False
        # `best` returns the first of equal ones, so a tie is not a new best.
        judged = [row for row in self._log.rows if row["split"] == self._judge]
        return self._training.task.best(self._keep_best, judged) == len(judged) - 1

    @property
    def _judge(self) -> str:
        """The split that determines the best parameters: validation if there is one, else test."""
        return next(iter(self._programs.evaluate))

    @property
    def _measured(self) -> Row | None:
        """The row of the split `_judge` for the current step; None if the log does not have it."""
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
        run = Run(
            training,
            saving,
            found,
            beginning,
            programs,
            pieces,
            log,
            saver,
            stop,
            clock,
            opened_callbacks,
        )
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


def _facts(training: Training, saving: Saving, found: Found) -> dict[str, Any]:
    """Returns the facts that are equal in all checkpoints of a run."""
    facts = {
        "replicas": len(training.devices),
        "options": found.decided,
        "given_options": plain(saving.options),
        "classes": training.data.classes,
        "vocabulary": training.data.vocabulary,
        "platform": training.devices[0].platform,
    }
    # Digests require a trace of the program, so they are computed only for runs with checkpoints.
    if saving.folder is not None:
        facts["identity"] = training.identity.facts
    return facts
