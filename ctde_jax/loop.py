"""The walk from a model and data to a trained model: `fit`."""

import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from math import ceil
from pathlib import Path
from types import FrameType
from typing import NamedTuple

import jax
import numpy as np
import optax
from jax import lax
from jax.experimental import multihost_utils

from ctde_jax import devices as available
from ctde_jax import replica, state
from ctde_jax.aggregate import Strategy
from ctde_jax.augment import Augment
from ctde_jax.checks import check_run, check_types
from ctde_jax.data import Dataset, Split, count_steps, deal, deal_stream
from ctde_jax.errors import InputError, NonFiniteLoss
from ctde_jax.evaluate import Averages, make_evaluate
from ctde_jax.feed import Feed, Piece, Span, make_feed, shapes, steps_a_piece
from ctde_jax.gradient import Sums, make_gradient
from ctde_jax.log import Row, console, make_run_folder, open_log
from ctde_jax.models import Model, count_params, with_raw_inputs
from ctde_jax.reestimate import make_reestimate
from ctde_jax.replica import AXIS, PyTree
from ctde_jax.round import add_up_sums, parallel_rounds
from ctde_jax.tasks import Task, classification, language_modeling
from ctde_jax.traffic import Traffic, measure, summary

_DISPATCH_SECONDS = 0.1
"""What a dispatch should take: long beside the millisecond that it costs, short for who waits or stops it."""


@dataclass(frozen=True, repr=False)
class Trained:
    """The aggregated model, and what was measured while it was trained."""

    model: Model
    """Takes inputs as the data set stores them."""

    params: PyTree  # numpy arrays
    model_state: PyTree  # numpy arrays
    step: int  # optimizer steps that these parameters have seen
    history: list[Row]
    """One row for each measurement, as `log.py` describes it."""

    seconds: dict[str, float]
    """Wall time by part: `start-up`, `compile`, `train`, `evaluate`."""

    interrupted: bool
    """Whether Ctrl-C ended the training before its last step."""

    stopped_early: bool
    """Whether its patience ended the training; with patience the parameters are those of the lowest validation loss."""

    task: Task
    devices: Sequence[jax.Device]
    traffic: Traffic
    """What each device sends in a round, counted in the compiled program."""

    def __repr__(self) -> str:
        says = ", ".join(f"{name} {value:.4g}" for name, value in self.tested.items() if name != "split")
        return f"Trained({'interrupted, ' if self.interrupted else ''}{says})"

    @property
    def tested(self) -> Row:
        """The row of the history with the test averages of these parameters."""
        return next(row for row in self.history if row["split"] == "test" and row["step"] == self.step)

    def predict(self, inputs: np.ndarray) -> np.ndarray:
        """Runs the model alone on one device: `[examples, ...]` to its outputs, float32."""
        outputs, _ = jax.jit(self.model.apply)(self.params, self.model_state, np.asarray(inputs), None)
        return np.asarray(outputs)

    def evaluate(self, split: Split) -> Averages:
        """Averages loss and metrics over all examples of a split, on all devices of the training."""
        params, model_state = replica.replicate((self.params, self.model_state), self.devices)
        return make_evaluate(self.model, self.task, split, self.devices, params, model_state)(params, model_state)


def fit(
    model: Model,
    data: Dataset,
    optimizer: optax.GradientTransformation,
    strategy: Strategy = Strategy(),
    *,
    task: Task | None = None,
    batch_size: int,
    epochs: int | None = None,
    steps: int | None = None,
    devices: Sequence[jax.Device] | None = None,
    partition: Sequence[np.ndarray] | None = None,
    seed: int = 0,
    augment: Augment | None = None,
    accumulate: int = 1,
    ema_decay: float | None = None,
    reestimate_batches: int = 0,
    patience: int | None = None,
    eval_every: int | None = None,
    log_every: int = 20,
    run_dir: Path | str | None = None,
    show: bool = True,
    describe: Callable[[PyTree, PyTree], str] | None = None,
) -> Trained:
    """Trains one central model on many devices.

    Ctrl-C ends the training after the dispatch at hand, and what has been trained is returned; a second Ctrl-C ends at
    once.

    Args:
        model: Such as `models.mlp`, or a module of the user's own through `models.from_nnx` or `models.from_linen`.
        data: Training and test examples.
        optimizer: Any optax transformation.
        strategy: How the devices agree.
        task: What is minimized and what is reported; by default classification, or language modeling of a text.
        batch_size: The global one, over all devices together.
        epochs: How often to go through the data; give this or `steps`.
        steps: How many optimizer steps to take.
        devices: One replica on each; by default what `devices.start()` returns.
        partition: For each device the indices of the examples that never leave it. With more parts than devices the
            parts are clients, of whom as many as there are devices are drawn for every round. By default all examples
            are dealt anew in every epoch.
        seed: Of the model's start, the data order, augmentation and dropout.
        augment: Changes every training example before the model sees it; see `augment.py`.
        accumulate: Groups in which a device computes its part of a batch, one after another, to save memory.
        ema_decay: Keeps an exponential moving average of the parameters, whose own share in every aggregation this is;
            then that average is evaluated and returned. It starts at the first parameters, so it needs several times
            1 / (1 - ema_decay) aggregations to forget them. Batch statistics are those of the parameters themselves,
            unless they are estimated anew.
        reestimate_batches: Training batches over which batch statistics are estimated anew before every evaluation.
        patience: Training ends after so many evaluations in a row that have not lowered the validation loss. However
            it ends, the parameters of the lowest are returned. Needs data with a validation split.
        eval_every: Steps between two evaluations, which come at the end of a round; by default an epoch.
        log_every: At most so many steps, or a round where that is longer, lie between two rows of the history. One
            dispatch computes as many rows as take a tenth of a second, at least one.
        run_dir: The folder for `metrics.jsonl` and `curves.png`, made where it is not there; None writes no files.
        show: Whether to show progress.
        describe: What to print of the parameters and model state (numpy arrays) at every evaluation, such as a text
            that the model has written.

    Raises:
        InputError: An argument breaks a rule; nothing has been computed yet.
        NonFiniteLoss: The loss became NaN or infinite; the metrics until then are in the folder.
    """
    clock = _Clock()
    check_types(model=model, data=data, optimizer=optimizer, strategy=strategy)
    devices = list(devices or available.start())
    available.check(devices)
    task = _default_task(data) if task is None else task
    if data.stream is not None:
        batches = deal_stream(data.stream, len(devices), batch_size, partition)
    else:
        batches = deal(data.train, len(devices), batch_size, seed, partition, max(1, strategy.inner_steps))
    total_steps = count_steps(batches.steps_per_epoch, epochs, steps)
    eval_every = batches.steps_per_epoch if eval_every is None else eval_every
    check_run(
        model,
        data,
        strategy,
        task,
        len(devices),
        batch_size=batch_size,
        seed=seed,
        augment=augment,
        accumulate=accumulate,
        ema_decay=ema_decay,
        reestimate_batches=reestimate_batches,
        patience=patience,
        eval_every=eval_every,
        log_every=log_every,
    )
    phases = make_phases(strategy, total_steps, eval_every, log_every, steps_a_piece(batches))
    best, keeps_average = _Best(patience), ema_decay is not None

    model = with_raw_inputs(model, data.shift, data.scale)
    run_dir = None if run_dir is None else make_run_folder(Path(run_dir))
    init_key, train_key = jax.random.split(jax.random.key(seed))
    params, model_state = jax.jit(model.init)(init_key, batches.inputs(0))
    train_state = state.place(params, model_state, optimizer, phases[0].strategy, devices, keeps_average)
    feed, key = make_feed(batches, devices), replica.replicate(train_key, devices)
    clock.lap("start-up")

    gradient = make_gradient(model, task, augment, accumulate)
    programs, like = [], train_state
    for phase in phases:
        if programs:
            like = jax.eval_shape(lambda state, phase=phase: phase.begin(state, devices), like)
        rounds = parallel_rounds(gradient, optimizer, phase.strategy, devices, batches.axis, ema_decay)
        lowered = rounds.lower(like, *shapes(batches, phase.spans[0]), np.int32(0), np.int32(0), key)
        add_up = add_up_sums(devices).lower(lowered.out_info[1])
        programs.append((replica.compiled(lowered, devices), replica.compiled(add_up, devices)))
    center = replica.replicate((params, model_state), devices)
    splits = {"validation": data.validation, "test": data.test}
    evaluate = {
        name: make_evaluate(model, task, split, devices, *center) for name, split in splits.items() if split is not None
    }
    reestimate = _make_reestimate(model, feed, devices, batches.axis, reestimate_batches, key)
    hosts = [device.process_index for device in devices]
    traffic = [
        measure(program.as_text(), phase.strategy.inner_steps, hosts)
        for (program, _), phase in zip(programs, phases, strict=True)
    ]
    at_first = f", after {phases[1].start} synchronous steps" if len(phases) > 1 else ""
    says = summary(traffic[-1], count_params(params), len(devices)) + at_first
    console(quiet=not show).print(f"wire       {says}")
    clock.lap("compile")

    meter = _Meter(batches.steps_per_epoch, task)
    spans = [span for phase in phases for span in phase.spans]
    with _deferred_interrupt() as interrupted, open_log(total_steps, run_dir, show) as log, feed(spans) as pieces:
        for phase, (train_rounds, add_up), sent in zip(phases, programs, traffic, strict=True):
            if phase.start:
                train_state = phase.begin(train_state, devices)
            center_of = phase.make_center(devices)
            for span in phase.spans:
                meter.start(span, sent.sent)
                unread: list[tuple[Sums, int, int]] = []  # the sums of a dispatch are fetched while the next one runs
                for examples, indices, first, last in _cut(islice(pieces, span.pieces), meter.pace):
                    train_state, sums = train_rounds(
                        train_state, examples, indices, np.int32(first), np.int32(last), key
                    )
                    unread.append((add_up(sums), first, last))
                    if len(unread) > 1:
                        for row in meter.rows(*unread.pop(0)):
                            log.add(row)
                    if interrupted.is_set():
                        break
                for row in meter.rows(*unread.pop()):
                    log.add(row)
                clock.lap("train")

                params = center_of(train_state.ema_params if keeps_average else train_state.params)
                model_state = reestimate(params, train_state.model_state)
                rows = [meter.row(name, averages(params, model_state)) for name, averages in evaluate.items()]
                for row in rows:
                    log.add(row)
                best.update(rows[0], params, model_state)
                if describe is not None:
                    log.say(describe(*jax.device_get((params, model_state))))
                clock.lap("evaluate")
                if interrupted.is_set() or best.is_over:
                    break
            if interrupted.is_set() or best.is_over:
                break

    params, model_state = best.center or jax.device_get((params, model_state))
    return Trained(
        model=model,
        params=params,
        model_state=model_state,
        step=best.step or log.rows[-1]["step"],
        history=log.rows,
        seconds=clock.seconds,
        interrupted=interrupted.is_set(),
        stopped_early=best.is_over,
        task=task,
        devices=devices,
        traffic=traffic[-1],
    )


def _default_task(data: Dataset) -> Task:
    if data.vocabulary:
        return language_modeling
    if data.classes:
        return classification
    raise InputError("task", "must be a loss of your own where labels are neither classes nor a text, got none.")


def _make_reestimate(
    model: Model, feed: Feed, devices: Sequence[jax.Device], split_axis: int | None, steps: int, key: jax.Array
) -> Callable[[PyTree, PyTree], PyTree]:
    """Makes the function from central parameters and the model state to the state to evaluate them with."""
    if not steps:
        return lambda params, model_state: model_state
    with feed([Span(0, steps, steps)]) as pieces:
        examples, indices, _ = next(pieces)
    run = make_reestimate(model, devices, split_axis)
    return lambda params, model_state: run(params, model_state, examples, indices, key)


class _Best:
    """Keeps the parameters of the lowest validation loss where there is patience, and says when it has run out."""

    def __init__(self, patience: int | None):
        self._patience, self._loss, self._in_vain = patience, np.inf, 0
        self.center: tuple[PyTree, PyTree] | None = None
        self.step = 0

    @property
    def is_over(self) -> bool:
        """Whether too many evaluations in a row were in vain."""
        return self._patience is not None and self._in_vain >= self._patience

    def update(self, validated: Row, params: PyTree, model_state: PyTree) -> None:
        """Takes note of an evaluation."""
        if self._patience is None:
            return
        if validated["loss"] < self._loss:
            self._loss, self.step, self._in_vain = validated["loss"], validated["step"], 0
            self.center = jax.device_get((params, model_state))
        else:
            self._in_vain += 1


class Phase(NamedTuple):
    """A part of a run in which one strategy is at work."""

    strategy: Strategy
    start: int
    spans: list[Span]
    """From one evaluation to the next, all cut alike."""

    def begin(self, train_state: state.TrainState, devices: Sequence[jax.Device]) -> state.TrainState:
        """Goes over from the synchronous phase before this one."""
        return state.go_over(train_state, Strategy(), self.strategy, devices)

    def make_center(self, devices: Sequence[jax.Device]) -> Callable[[PyTree], PyTree]:
        """Makes the function from the state's parameters to the central ones, replicated."""
        if not self.strategy.diverges:
            return lambda params: params
        return replica.parallel(lambda own: lax.pmean(own, AXIS), devices, in_axes=(0,), out_axes=None)


def make_phases(strategy: Strategy, total_steps: int, eval_every: int, log_every: int, piece_steps: int) -> list[Phase]:
    """Cuts a run into its phases: where a strategy is synchronous at first, two.

    The names and meanings are those of `fit`; a piece has at most so many steps, or those of a row.
    """
    switch = min(strategy.synchronous_steps, total_steps)
    phases = [(Strategy(), 0, switch), (strategy, switch, total_steps)]
    return [
        Phase(own, start, _spans(own.inner_steps, eval_every, log_every, piece_steps, start, stop))
        for own, start, stop in phases
        if start < stop
    ]


def _spans(inner_steps: int, eval_every: int, log_every: int, piece_steps: int, start: int, stop: int) -> list[Span]:
    round_steps = max(1, inner_steps)
    rounds = ceil(min(eval_every, stop - start) / round_steps)
    rows = ceil(rounds / max(1, log_every // round_steps))
    row_rounds = ceil(rounds / rows)
    piece_rounds = row_rounds * min(rows, max(1, piece_steps // (row_rounds * round_steps)))
    interval = rounds * round_steps
    return [
        Span(first, min(first + interval, stop), round_steps, row_rounds, piece_rounds)
        for first in range(start, stop, interval)
    ]


def _cut(pieces: Iterable[Piece], pace: Callable[[], int]) -> Iterator[tuple[PyTree, jax.Array, int, int]]:
    """Cuts pieces into dispatches, of so many rounds as the pace says: from a first one up to a last, not included."""
    for examples, indices, rounds in pieces:
        first = 0
        while first < rounds:
            last = min(first + pace(), rounds)
            yield examples, indices, first, last
            first = last


class _Clock:
    """Splits the wall time into named parts."""

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, part: str) -> None:
        """Counts the time since the last lap towards this part."""
        now = time.perf_counter()
        self.seconds[part] = self.seconds.get(part, 0.0) + now - self._last
        self._last = now


def rows_a_dispatch(seconds: float) -> int:
    """Returns how many rows of so many seconds one dispatch computes; on several hosts all do as the first says."""
    return max(1, int(_DISPATCH_SECONDS / multihost_utils.broadcast_one_to_all(np.float32(seconds))))


class _Meter:
    """Turns the sums of dispatches into rows of the history, and says how long dispatches should be."""

    def __init__(self, steps_per_epoch: int, task: Task):
        self._step, self._steps_per_epoch, self._task, self._sent = 0, steps_per_epoch, task, 0.0
        self._last, self._rows_a_dispatch = 0.0, 1

    def start(self, span: Span, sent: float) -> None:
        """Begins a span, in whose rounds each device sends so many bytes."""
        self._span, self._sent_a_round, self._dispatches, self._last = span, sent, 0, time.perf_counter()

    def pace(self) -> int:
        """Returns how many rounds the next dispatch should have."""
        return self._rows_a_dispatch * self._span.row_rounds

    def row(self, split: str, averages: Averages) -> Row:
        """Raises NonFiniteLoss where the last step, whose loss was finite, has spoilt the parameters."""
        if not np.isfinite(averages["loss"]):
            raise NonFiniteLoss(self._step)
        return {"split": split, **self._position(), **averages}

    def rows(self, sums: Sums, first: int, last: int) -> Iterator[Row]:
        """Waits for the dispatch that computes these rounds of a piece, and yields its rows, all of the same speed.

        Raises:
            NonFiniteLoss: The loss of one of its steps is NaN or infinite.
        """
        round_steps, row_rounds = self._span.round_steps, self._span.row_rounds
        sums = {name: all_sums[first * round_steps :] for name, all_sums in jax.device_get(sums).items()}
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        self._dispatches += 1
        if self._dispatches == 2:  # the first one waited for an evaluation, or for threads to start
            self._rows_a_dispatch = rows_a_dispatch(seconds / ceil((last - first) / row_rounds))

        speed = round(float(sums["examples"].sum(dtype=np.float64)) / seconds, 1)
        for start in range(0, last - first, row_rounds):
            yield self._row(sums, round_steps * start, min(row_rounds, last - first - start), speed)

    def _row(self, sums: Sums, start: int, rounds: int, speed: float) -> Row:
        """Makes a row of so many rounds, whose sums begin at this place."""
        sums = {name: all_sums[start : start + rounds * self._span.round_steps] for name, all_sums in sums.items()}
        bad = ~np.isfinite(sums["loss"])
        if bad.any():
            raise NonFiniteLoss(self._step + int(np.argmax(bad)) + 1)

        self._step += int((sums["examples"] > 0).sum())
        totals = {name: float(values.sum(dtype=np.float64)) for name, values in sums.items()}
        means = self._task.averages(totals, totals["examples"])
        self._sent += rounds * self._sent_a_round
        counts = {"examples": int(totals["examples"]), "examples_per_second": speed, "bytes_sent": round(self._sent)}
        return {"split": "train", **self._position(), **means, **counts}

    def _position(self) -> Row:
        return {"step": self._step, "epoch": round(self._step / self._steps_per_epoch, 4)}


@contextmanager
def _deferred_interrupt() -> Iterator[threading.Event]:
    """Lets the first Ctrl-C set the event instead of breaking off the work at hand; a second one ends at once."""
    interrupted = threading.Event()

    def note(signal_number: int, frame: FrameType | None) -> None:
        if interrupted.is_set():
            raise KeyboardInterrupt
        interrupted.set()

    if threading.current_thread() is not threading.main_thread():  # Python delivers signals to the main thread only
        yield interrupted
        return
    previous = signal.signal(signal.SIGINT, note)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, previous)
