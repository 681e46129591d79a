"""The training of a family: one program advances all its runs, which keep separate records."""

from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import islice
from typing import Any, NamedTuple

import jax
import numpy as np

from ctde_jax.checkpoint import CHECKPOINTS, METRICS, open_saver
from ctde_jax.devices import PyTree, divide
from ctde_jax.errors import NonFiniteLoss, Preempted
from ctde_jax.rounds import Piece, Span, cut, indices_of, prefetched, state
from ctde_jax.trainer.callbacks import Callbacks
from ctde_jax.trainer.claim import Found
from ctde_jax.trainer.history import Row, open_history
from ctde_jax.trainer.log import Log, open_log
from ctde_jax.trainer.many.family import Family, Outcome
from ctde_jax.trainer.many.preparing import PhasePrograms, Prepared, Say, batches_of, prepare
from ctde_jax.trainer.meter import Clock, Meter
from ctde_jax.trainer.plan import plan_rows
from ctde_jax.trainer.record import Record
from ctde_jax.trainer.run import prepare_folder
from ctde_jax.trainer.stop import Stop, deferred


class _Dispatch(NamedTuple):
    """Results of dispatched rounds, and the position of the rounds in the piece."""

    sums: PyTree  # of each run over its replicas, float32[run, steps of the piece]
    first: int  # first round of the dispatch, counted in the piece
    last: int  # end of its rounds, exclusive
    places: list[int]  # places of the runs that were active


def train_together(
    family: Family,
    found: Sequence[Found],
    devices: Sequence[jax.Device],
    show: bool,
    say: Say,
    until: int | None = None,
) -> list[Outcome]:
    """Trains the runs of a family, all of which have gone through the same number of steps.

    Args:
        family: The runs.
        found: The checkpoint from which each run continues, if there is one.
        devices: Devices over which the runs are divided.
        show: Whether to show progress.
        say: Prints a line or a table.
        until: Step after which the runs stop, the end of an evaluation interval; by default their
            last step.

    Returns:
        The result of each run, in order.

    Raises:
        InputError: The runs exceed the memory, or a file cannot be read or written.
        Preempted: SIGTERM or SIGHUP ended the training, and checkpoints are written.
    """
    clock = Clock()
    prepared = prepare(family, found, devices, say)
    for variant, each in zip(family.variants, found, strict=True):
        prepare_folder(variant.saving, each, say)
    clock.lap("compile")
    with _open(family, found, prepared, clock, show, until) as together:
        for program in prepared.programs:
            together.advance(program)
        return together.outcomes()


class Together:
    """Runs in progress: their states on the devices, and their records on the host.

    A run whose loss becomes NaN or infinite, or that early stopping ends, is inactive from then on.

    Args:
        family: The runs.
        prepared: Their states, and the programs.
        records: The record of each run.
        pieces: The pieces of all remaining spans, in order.
        log: The progress on the screen.
        stop: The signal that has asked the runs to stop, if any.
        clock: The wall time by part.
        until: Step after which the runs stop; None for their last step.
    """

    def __init__(
        self,
        family: Family,
        prepared: Prepared,
        records: Sequence[Record],
        pieces: Iterator[Piece],
        log: Log,
        stop: Stop,
        clock: Clock,
        until: int | None,
    ):
        self._family = family
        self._prepared = prepared
        self._arrays = prepared.arrays
        self._program = prepared.programs[0]
        self._train_state = prepared.train_state
        self._records = records
        self._pieces = pieces
        self._log = log
        self._stop = stop
        self._clock = clock
        self._until = until
        self._failures: dict[int, NonFiniteLoss] = {}  # by place
        self._active = self._unfinished  # places of the runs that are trained
        self._center: PyTree = None  # parameters and model states, [run, ...], once evaluated

    def advance(self, program: PhasePrograms) -> None:
        """Trains the remaining spans of a phase, with evaluations and checkpoints.

        It returns early if a signal ends the training, or no run is active.

        Raises:
            InputError: A file of a run cannot be written.
        """
        if self._is_over:
            return
        self._program = program
        if program.begins:
            begun = program.change(self._arrays.numbers, self._train_state)
            # Leaves may share memory, but rounds donate the whole state.
            self._train_state = state.copied(begun)
        for span in program.spans:
            self._dispatch_span(span)
            self._clock.lap("train")
            trained = [*self._active]
            if trained and self._lead.is_at_end:
                self._evaluate()
            # The checkpoint comes after the evaluation, so that it holds the evaluation's rows.
            self.save([place for place in trained if self._is_save_due(place)])
            self._active = self._unfinished
            self._clock.lap("evaluate")
            if self._is_over:
                break

    def outcomes(self) -> list[Outcome]:
        """Waits for the last checkpoints, evaluates if necessary, and returns the results.

        Raises:
            InputError: A checkpoint could not be written.
            Preempted: SIGTERM or SIGHUP ended the training, and the checkpoints are written.
        """
        for record in self._records:
            if record.saver is not None:
                record.saver.wait()

        # Preempted runs are not evaluated, as the process may be killed soon.
        folder = self._records[0].folder
        if folder is not None and self._stop.is_preemption and self._unfinished:
            assert self._stop.asked_by is not None
            step = self._records[self._unfinished[0]].meter.position.step
            raise Preempted(step, folder.parent, self._stop.asked_by.name)

        # After Ctrl-C, evaluate the parameters as they are; completed runs have their rows already.
        if self._center is None:
            self._evaluate()
            self._clock.lap("evaluate")
        centers = jax.device_get(self._center)
        opt_states = state.of_optimizer(self._train_state)
        return [self._outcome(place, centers, opt_states) for place in range(len(self._records))]

    def _outcome(self, place: int, centers: PyTree, opt_states: PyTree) -> Outcome:
        """Returns the result of the run at this place."""
        record = self._records[place]
        training = record.training
        values = self._family.variants[place].values
        if place in self._failures:
            error = self._failures[place]
            return Outcome(values, training.seed, None, error.step, str(error))
        trained = record.result(
            _row_of(centers, place),
            _row_of(opt_states, place),
            self._program.traffic,
            self._clock.seconds,
            bool(self._stop),
            plan_rows(record.training),
        )
        return Outcome(values, record.training.seed, trained, trained.step)

    @property
    def _unfinished(self) -> list[int]:
        """Places of the runs that have steps left, and have not failed or stopped early."""
        return [
            place
            for place, record in enumerate(self._records)
            if place not in self._failures and not record.is_whole
        ]

    @property
    def _is_over(self) -> bool:
        return bool(self._stop) or not self._active or self._is_far_enough

    @property
    def _is_far_enough(self) -> bool:
        """Whether the active runs have reached the step after which they stop."""
        return self._until is not None and self._lead.position.gone_through >= self._until

    @property
    def _lead(self) -> Meter:
        """The meter of the first active run, which paces all."""
        return self._records[self._active[0]].meter

    def _is_save_due(self, place: int) -> bool:
        """Returns whether a checkpoint of a run is due after a span."""
        record = self._records[place]
        return place not in self._failures and (
            bool(self._stop)
            or self._is_far_enough
            or record.is_whole
            or not record.meter.is_at_end
            or record.meter.is_save_due()
            or record.is_new_best
        )

    def _dispatch_span(self, span: Span) -> None:
        """Dispatches the rounds of a span until its end or a signal, and adds their rows."""
        for place in self._active:
            self._records[place].meter.start(span, self._program.traffic.sent)
        unread: list[_Dispatch] = []  # the rows of these are not added yet
        pieces = islice(self._pieces, span.pieces)
        for examples, indices, first, last in cut(pieces, lambda: self._lead.pace()):
            # Dispatch the rounds, to which the memory of the old states is donated.
            places = [*self._active]
            self._center = None
            is_active = np.isin(np.arange(len(self._prepared.trainings)), places)
            self._train_state, sums = self._program.train_rounds(
                self._arrays.numbers,
                is_active,
                self._train_state,
                examples,
                indices,
                np.int32(first),
                np.int32(last),
                self._arrays.keys,
            )
            lead = self._lead
            for place in places:
                self._records[place].meter.dispatched(last - first)
            unread.append(_Dispatch(sums, first, last, places))

            # Read the previous dispatch while this one is computed.
            if len(unread) > 1:
                self._read(unread.pop(0))
            # A failed write ends the training here, not only at the next checkpoint.
            for record in self._records:
                if record.saver is not None:
                    record.saver.check()
            # A checkpoint within a span holds the rows of this dispatch, so read it first.
            has_folder = self._records[0].folder is not None
            if has_folder and not lead.is_at_end and lead.is_save_due():
                self._read(unread.pop())
                self.save([*self._active])
            self._stop.agree()
            if self._is_over:
                break
        for dispatch in unread:
            self._read(dispatch)

    def _read(self, dispatch: _Dispatch) -> None:
        """Adds the rows of a dispatch to the records, and shows their mean."""
        sums = jax.device_get(dispatch.sums)
        new: list[list[Row]] = []
        for place in dispatch.places:
            if place in self._failures:
                continue
            record = self._records[place]
            count = len(record.log.rows)
            try:
                record.read(_row_of(sums, place), dispatch.first, dispatch.last)
            except NonFiniteLoss as error:
                self._fail(place, error)
            else:
                new.append(record.log.rows[count:])
        self._show(new)

    def _evaluate(self) -> None:
        """Evaluates the runs, and adds the rows to the records that do not have them yet."""
        arrays = self._arrays
        self._center, sums = self._program.evaluate(arrays.numbers, self._train_state, arrays.parts)
        sums = jax.device_get(sums)
        new: list[list[Row]] = []
        centers: PyTree = None
        for place, record in enumerate(self._records):
            if place in self._failures or record.measured is not None or record.best.is_over:
                continue
            averages = {}
            for name in ("validation", "test"):
                if name not in sums:
                    continue
                of_run = {key: float(values[place]) for key, values in sums[name].items()}
                examples = int(of_run["examples"])
                averages[name] = record.training.task.averages(of_run, examples)
                averages[name] |= {"examples": examples}
            # Early stopping keeps a copy of the best parameters on the host.
            if centers is None and record.training.patience is not None:
                centers = jax.device_get(self._center)
            center = (None, None) if centers is None else _row_of(centers, place)
            try:
                new.append([*record.evaluated(averages, *center).values()])
            except NonFiniteLoss as error:
                self._fail(place, error)
        self._show(new)

    def save(self, places: Sequence[int]) -> None:
        """Starts to write checkpoints of the runs at these places; does nothing without folders.

        Raises:
            InputError: A previous checkpoint could not be written.
        """
        if not places or self._records[0].folder is None:
            return
        strategy = self._program.phase.strategy
        tensors = state.to_tensors(self._train_state)
        other_point = state.has_evaluated_point(self._train_state, strategy)
        for place in places:
            of_run = {name: tensor[place] for name, tensor in tensors.items()}
            try:
                self._records[place].save(of_run, strategy.diverges, other_point)
            except NonFiniteLoss as error:
                self._fail(place, error)

    def _fail(self, place: int, error: NonFiniteLoss) -> None:
        """Records that a run has failed."""
        self._failures[place] = error
        self._active = [each for each in self._active if each != place]
        variant = self._family.variants[place]
        name = ", ".join(f"{key} {value}" for key, value in variant.values.items())
        self._log.say(f"failed     {name}{', ' * bool(name)}seed {variant.training.seed}: {error}")

    def _show(self, rows: Sequence[Sequence[Row]]) -> None:
        """Shows the means over the runs of their new rows."""
        for of_runs in zip(*rows, strict=False):
            self._log.add(_mean_of(of_runs))


@contextmanager
def _open(
    family: Family,
    found: Sequence[Found],
    prepared: Prepared,
    clock: Clock,
    show: bool,
    until: int | None,
) -> Iterator[Together]:
    """Opens the records of all runs, the feed and the progress; closes them on exit.

    Args:
        family: The runs.
        found: The checkpoint from which each run continues, if there is one.
        prepared: The states of the runs, and the programs.
        clock: The wall time by part.
        show: Whether to show progress.
        until: Step after which the runs stop; None for their last step.

    Raises:
        InputError: A folder cannot be written to, or lacks rows of its checkpoint.
    """
    training = prepared.trainings[0]
    has_folder = family.variants[0].saving.folder is not None
    with ExitStack() as stack:
        stop = stack.enter_context(deferred(saves=has_folder))
        log = stack.enter_context(open_log(training.total_steps, None, show))
        records: list[Record] = []
        for variant, each, best in zip(family.variants, found, prepared.bests, strict=True):
            folder = variant.saving.folder
            kept = 0 if each.checkpoint is None else each.checkpoint.facts["rows"]
            history = stack.enter_context(open_history(folder, kept))
            saver = None
            if folder is not None:
                choose = variant.saving.choose(variant.training)
                keep = variant.saving.keep_checkpoints
                saver = stack.enter_context(
                    open_saver(folder / CHECKPOINTS, keep, choose, folder / METRICS)
                )
            callbacks = Callbacks([], stop)
            record = Record(variant.training, variant.saving, each, best, history, saver, callbacks)
            records.append(record)

        # Save the first states, so that even runs that fail at once can be continued.
        spans = [span for program in prepared.programs for span in program.spans]
        pieces = stack.enter_context(prefetched(_pieces(prepared, spans)))
        together = Together(family, prepared, records, pieces, log, stop, clock, until)
        together.save([place for place, each in enumerate(found) if each.is_new])
        yield together


def _pieces(prepared: Prepared, spans: Sequence[Span]) -> Generator[Piece]:
    """Yields the pieces of all runs: the examples, and the indices of each run."""
    for span in spans:
        blocks = [indices_of(batches_of(training), [span]) for training in prepared.trainings]
        for of_runs in zip(*blocks, strict=True):
            indices = np.stack([indices for indices, _ in of_runs])
            _, rounds = of_runs[0]
            yield prepared.arrays.examples, divide(indices, prepared.devices), rounds


def _mean_of(rows: Sequence[Row]) -> Row:
    """Returns the mean of rows of several runs; `examples_per_second` is their sum."""
    mean: dict[str, Any] = {
        name: value if isinstance(value, str) else float(np.mean([row[name] for row in rows]))
        for name, value in rows[0].items()
        if all(name in row for row in rows)
    }
    mean["step"] = max(row["step"] for row in rows)
    if "examples_per_second" in mean:
        mean["examples_per_second"] *= len(rows)
    return mean


def _row_of(tree: PyTree, place: int) -> PyTree:
    """Returns the row of one run of every array."""
    return jax.tree.map(lambda leaf: leaf[place], tree)
