"""Compares the bytes that strategies send, and their losses, with synchronous training.

    python benchmarks/communication.py --task transformer --steps 600
    python benchmarks/communication.py --task mnist --arm "averaging, Muon, H=128, int2"
    python benchmarks/communication.py --report      # tables and figures of earlier measurements

All strategies train on the same examples in the same number of steps, with 8 replicas on one
device. An arm is an optimizer and a strategy with a small grid of settings. Seed 0 tries all
settings, if there are several, in one program; seeds 1, 2 and 3 repeat the best one in another, and
only these three are reported. Bytes are counted in the program of 8 devices. Runs in the log are
not trained again, so several processes can train different arms at a time.
"""

import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
import optax
from arms import ARMS, BASELINES, PER_HOST, REFERENCE, Arm, Number, Settings, schedule
from harness import RESULTS, Log, Row, Table, command_line, console, publish
from matplotlib import pyplot

import ctde_jax as ctde
from ctde_jax.rounds import count_rounds
from ctde_jax.wire import measure_phase

REPLICAS = 8
TUNING_SEED = 0


class Problem(NamedTuple):
    """Model and data of a training; equal for all arms."""

    model: ctde.models.Model
    data: ctde.data.Dataset
    task: ctde.Task
    batch_size: int
    # For each replica, the indices of its examples; None shuffles all examples in every epoch.
    partition: Sequence[np.ndarray] | None = None


def learn_text(folder: Path, length: int, hidden_size: int) -> Problem:
    """Next-character prediction on Shakespeare, with 64 windows of `length` characters per step."""
    data = ctde.data.from_text(folder / "text" / "tinyshakespeare.txt", length=length, stride=16)
    model = ctde.models.transformer(len(data.vocabulary), length, hidden_size)
    return Problem(model, data, ctde.tasks.language_modeling, batch_size=64)


def learn_digits(folder: Path) -> Problem:
    """Classification of MNIST; 1,152 steps are ten epochs."""
    data = ctde.data.mnist(folder / "mnist")
    model = ctde.models.mlp([784, 128, 10])
    return Problem(model, data, ctde.tasks.classification, batch_size=512)


def learn_unequal_digits(folder: Path) -> Problem:
    """Classification of MNIST by a CNN, with images of two to four digits on each replica."""
    data = ctde.data.mnist(folder / "mnist")
    parts = ctde.data.partition.by_label(np.asarray(data.train.labels), REPLICAS, shards=2)
    model = ctde.models.cnn((28, 28), 10)
    return Problem(model, data, ctde.tasks.classification, batch_size=64, partition=parts)


PROBLEMS: dict[str, Callable[[Path], Problem]] = {
    "transformer": lambda folder: learn_text(folder, length=32, hidden_size=48),
    "transformer-241k": lambda folder: learn_text(folder, length=64, hidden_size=96),
    "mnist": learn_digits,
    "cnn": learn_unequal_digits,
}
# The metric that compares the arms of a task, and the sign of a worse one.
MEASURES = {
    "transformer": ("loss", 1),
    "transformer-241k": ("loss", 1),
    "mnist": ("accuracy", -1),
    "cnn": ("accuracy", -1),
}


class Job(NamedTuple):
    """An arm that is trained for a number of steps."""

    task: str
    steps: int
    arm: str

    @property
    def value(self) -> Arm:
        """The optimizer, the strategy and the grid of the arm."""
        return ARMS[self.task][self.steps][self.arm]

    def find(self, log: Log, **wanted: Any) -> list[Row]:
        """Returns the rows of this job that contain these entries."""
        return log.find(**self._asdict(), **wanted)


def jobs() -> list[Job]:
    """Returns all jobs: those of a task together, and from long to short trainings."""
    return [
        Job(task, steps, arm)
        for task, lengths in ARMS.items()
        for steps in sorted(lengths, reverse=True)
        for arm in lengths[steps]
    ]


def sent_bytes(trained: ctde.Trained) -> float:
    """Returns the bytes that each device sends in a training, in all phases."""
    return [row for row in trained.history if row["split"] == "train"][-1]["bytes_sent"]


def sent_between_hosts(training: ctde.Training) -> float:
    """Returns the bytes that each device sends to the other one of two hosts, on average."""
    hosts = [replica // PER_HOST for replica in range(REPLICAS)]
    total = 0.0
    for phase in training.phases(row_steps=100):
        traffic = measure_phase(training, phase.strategy, hosts)
        total += traffic.across / REPLICAS * count_rounds(phase.spans)
    return total


def train(
    job: Job, problem: Problem, settings: Sequence[Settings], seeds: Sequence[int]
) -> list[Row]:
    """Trains all settings with all seeds in one program, and returns a row for each run.

    The metrics are those of the test split after the last step; they are None if the run has
    diverged. The seconds are those of the whole program, divided by the number of runs.
    """
    steps = job.steps

    def optimizer(learning_rate: Number) -> optax.GradientTransformation:
        return job.value.optimizer(schedule(learning_rate, steps))

    def strategy(
        learning_rate: Number,
        outer_learning_rate: Number = 1.0,
        outer_momentum: Number | None = None,
    ) -> ctde.Strategy:
        # The learning rate is that of the optimizer.
        return job.value.strategy(steps, outer_learning_rate, outer_momentum)

    def measured(trained: ctde.Trained | None) -> Row:
        if trained is None:
            return {"loss": None, "accuracy": None, "bytes": None, "between_hosts": None}
        tested = trained.tested
        return {
            "loss": tested["loss"],
            "accuracy": tested.get("accuracy"),
            "bytes": sent_bytes(trained),
            "between_hosts": between_hosts,
        }

    devices = ctde.devices.start(1, replicas=REPLICAS)
    parts = {"batch_size": problem.batch_size, "partition": problem.partition, "steps": steps}
    first = optimizer(settings[0]["learning_rate"]), strategy(**settings[0])
    between_hosts = sent_between_hosts(
        ctde.Training(
            problem.model,
            problem.data,
            *first,
            problem.task,
            ctde.devices.one_for_each(devices),
            **parts,
        )
    )

    begin = time.perf_counter()
    try:
        sweep = ctde.fit_many(
            problem.model,
            problem.data,
            optimizer,
            strategy,
            seeds=seeds,
            sweep=settings,
            task=problem.task,
            devices=devices[:1],
            replicas=REPLICAS,
            **parts,
            eval_every=steps,  # a single evaluation, after the last step
            log_every=100,
            show=False,
        )
    except ctde.NonFiniteLoss:  # of all runs
        results = [(values, seed, None) for values, seed in product(settings, seeds)]
    else:
        if sweep.interrupted:
            raise KeyboardInterrupt
        results = [(each.values, each.seed, each.trained) for each in sweep.outcomes]
    seconds = round((time.perf_counter() - begin) / len(results), 1)
    return [
        {"seed": seed, "settings": {**values}, **measured(trained), "seconds": seconds}
        for values, seed, trained in results
    ]


def best_settings(log: Log, job: Job) -> Settings | None:
    """Returns the best settings on the tuning seed, or None if some have not been tried.

    None is also returned if all have diverged. A grid of one needs no trial.
    """
    if len(job.value.grid) == 1:
        return job.value.grid[0]
    name, worse = MEASURES[job.task]
    values = []
    for settings in job.value.grid:
        tried = job.find(log, settings=settings, seed=TUNING_SEED)
        if not tried:
            return None
        # A metric is None if the training diverged.
        metric = tried[0][name]
        values.append(math.inf if metric is None else worse * metric)
    best = min(values)
    return None if best == math.inf else job.value.grid[values.index(best)]


def make(job: Job, seeds: Sequence[int], problem: Problem, log: Log) -> None:
    """Trains the runs of a job that the log does not have."""

    def run(settings: Sequence[Settings], seeds: Sequence[int]) -> None:
        for row in train(job, problem, settings, seeds) if settings and seeds else []:
            log.append({**job._asdict(), **row})
            console.print(json.dumps({**job._asdict(), **row}))
        # Each call of `fit_many` compiles programs, which JAX would keep.
        jax.clear_caches()

    # Tune on one seed, then repeat the best settings on the others.
    if TUNING_SEED in seeds and len(job.value.grid) > 1:
        tried = [row["settings"] for row in job.find(log, seed=TUNING_SEED)]
        run([settings for settings in job.value.grid if settings not in tried], [TUNING_SEED])
    best = best_settings(log, job)
    if best is not None:
        repeated = [TUNING_SEED, *(row["seed"] for row in job.find(log, settings=best))]
        run([best], [seed for seed in seeds if seed not in repeated])


class Rung(NamedTuple):
    """Result of an arm over its seeds."""

    arm: str
    settings: Settings
    values: Mapping[int, float]  # the metric by seed, without the tuning seed
    tuned: float | None  # the metric of the tuning seed, if that was trained
    bytes: float  # sent by each device in a training
    between_hosts: float | None  # the part that goes to the other one of two hosts

    @property
    def value(self) -> float:
        """Mean of the metric over seeds."""
        return mean(self.values.values())

    @property
    def spread(self) -> float:
        """Standard deviation of the metric over seeds."""
        return deviation([*self.values.values()])


def deviation(values: Sequence[float]) -> float:
    """Returns the sample standard deviation, NaN for a single value."""
    return stdev(values) if len(values) > 1 else math.nan


def ladder(log: Log, task: str, steps: int) -> list[Rung]:
    """Returns the results of finished arms, from the most bytes to the least."""
    rungs = []
    for arm in ARMS[task][steps]:
        job = Job(task, steps, arm)
        best = best_settings(log, job)
        if best is None:
            continue
        runs = [row for row in job.find(log, settings=best) if row["bytes"] is not None]
        values = {row["seed"]: row[MEASURES[task][0]] for row in runs}
        tuned = values.pop(TUNING_SEED, None)
        if values:
            sent = runs[0]["bytes"], runs[0].get("between_hosts")
            rungs.append(Rung(arm, best, values, tuned, *sent))
    return sorted(rungs, key=lambda rung: -rung.bytes)


def difference(task: str, value: float, baseline: float) -> str:
    """Compares losses by their ratio, and accuracies by their difference."""
    if MEASURES[task][0] == "loss":
        return f"{value / baseline - 1:+.2%}"
    return f"{100 * (value - baseline):+.2f} points"


def make_table(task: str, steps: int, rungs: list[Rung]) -> Table:
    """Compares every arm with the synchronous ones."""
    name, _ = MEASURES[task]
    baselines = [rung for rung in rungs if rung.arm in BASELINES]
    header = ["arm", f"test {name}", "spread", "seeds", "sent", "times fewer", "between hosts"]
    header += [*(f"to {baseline.arm}" for baseline in baselines), "settings"]
    rows = [
        [
            rung.arm,
            f"{rung.value:.4f}",
            f"{rung.spread:.4f}",
            f"{len(rung.values)}",
            f"{rung.bytes / 1e6:,.3f} MB",
            f"{baselines[0].bytes / rung.bytes:,.0f}",
            "" if rung.between_hosts is None else f"{rung.between_hosts / 1e6:,.3f} MB",
            *(difference(task, rung.value, baseline.value) for baseline in baselines),
            ", ".join(f"{name} {value}" for name, value in rung.settings.items()),
        ]
        for rung in rungs
    ]
    return Table(f"{task}, {steps:,} steps", header, rows)


def make_seed_table(task: str, steps: int, rungs: list[Rung]) -> Table:
    """Compares every run with synchronous Muon of the same seed."""

    def by_seed(rung: Rung) -> dict[int, float]:
        tuned = {} if rung.tuned is None else {TUNING_SEED: rung.tuned}
        return {**dict(sorted(rung.values.items())), **tuned}

    reference = by_seed(next(rung for rung in rungs if rung.arm == REFERENCE))

    def compared(rung: Rung) -> Iterator[str]:
        values = by_seed(rung)
        for seed, baseline in reference.items():
            yield difference(task, values[seed], baseline) if seed in values else ""

    rows = [[rung.arm, *compared(rung)] for rung in rungs if rung.arm not in BASELINES]
    header = ["arm", *(f"seed {seed}" for seed in reference)]
    return Table(f"{task}, {steps:,} steps, to {REFERENCE}", header, rows)


def draw(ladders: Mapping[tuple[str, int], list[Rung]], file: Path) -> None:
    """Draws the metric of each task over bytes, with dotted lines at the synchronous arms."""
    figure, panels = pyplot.subplots(
        1, len(ladders), figsize=(7 * len(ladders), 7), squeeze=False, layout="tight"
    )
    for axes, ((task, steps), rungs) in zip(panels[0], ladders.items(), strict=True):
        axes.set_prop_cycle(color=pyplot.get_cmap("tab20").colors)
        for rung in rungs:
            axes.errorbar(
                rung.bytes, rung.value, yerr=rung.spread, fmt="o", capsize=3, label=rung.arm
            )
            if rung.arm in BASELINES:
                axes.axhline(rung.value, color="gray", linewidth=0.8, linestyle="dotted")
        axes.set(
            xscale="log",
            title=f"{task}, {steps:,} steps",
            xlabel="bytes that a device sends",
            ylabel=f"test {MEASURES[task][0]}",
        )
        # Below the panel, because the arms would cover most of it.
        axes.legend(
            loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2, fontsize=8, frameon=False
        )
    figure.savefig(file, dpi=120)


class Gap(NamedTuple):
    """Loss of an arm above that of the reference, in percent."""

    steps: int
    percent: float  # mean over seeds
    spread: float  # standard deviation over seeds


def find_gaps(ladders: Mapping[tuple[str, int], list[Rung]], task: str) -> dict[str, list[Gap]]:
    """Returns the gaps to synchronous Muon, from short to long trainings, of each arm of a task.

    An arm of a single length is left out. Runs are compared with those of the same seed, which
    start from the same parameters.
    """
    gaps: dict[str, list[Gap]] = {}
    for (of_task, steps), rungs in sorted(ladders.items()):
        reference = {rung.arm: rung.values for rung in rungs}.get(REFERENCE, {})
        for rung in rungs if of_task == task else []:
            percents = [
                100 * (value / reference[seed] - 1)
                for seed, value in rung.values.items()
                if seed in reference
            ]
            if percents and rung.arm not in BASELINES:
                gap = Gap(steps, mean(percents), deviation(percents))
                gaps.setdefault(rung.arm, []).append(gap)
    return {arm: points for arm, points in gaps.items() if len(points) > 1}


def draw_gaps(gaps: Mapping[str, list[Gap]], title: str, file: Path) -> None:
    """Draws the gap of each arm over the number of steps, with lines at 1 % and 2 %."""
    figure, axes = pyplot.subplots(figsize=(7, 5), layout="tight")
    for arm, points in gaps.items():
        steps, percents, spreads = zip(*points, strict=True)
        axes.errorbar(steps, percents, yerr=spreads, fmt="o-", capsize=3, label=arm)
    for percent in (1, 2):
        axes.axhline(percent, color="gray", linewidth=0.8, linestyle="dashed")
    lengths = sorted({gap.steps for points in gaps.values() for gap in points})
    axes.set(
        xscale="log",
        title=title,
        xlabel="steps",
        ylabel=f"test loss above {REFERENCE}, %",
    )
    axes.set_xticks(lengths, [f"{steps:,}" for steps in lengths])
    axes.minorticks_off()
    axes.legend(frameon=False)
    figure.savefig(file, dpi=120)


def publish_results(log: Log, results: Path) -> None:
    """Writes the tables and figures of all finished arms."""
    # A table needs a synchronous arm, which sends the most bytes, and another one.
    lengths = dict.fromkeys((job.task, job.steps) for job in jobs())
    ladders = {
        (task, steps): rungs
        for task, steps in lengths
        if len(rungs := ladder(log, task, steps)) > 1 and rungs[0].arm in BASELINES
    }
    if not ladders:
        console.print("nothing to compare yet: a synchronous arm and another one must be finished")
        return
    tables = [make_table(task, steps, rungs) for (task, steps), rungs in ladders.items()]
    tables += [
        make_seed_table(task, steps, rungs)
        for (task, steps), rungs in ladders.items()
        if any(rung.arm == REFERENCE for rung in rungs)
    ]
    publish(results / "communication.md", tables)

    # The lengths of a task are in descending order.
    longest: dict[str, int] = {}
    for task, steps in ladders:
        longest.setdefault(task, steps)
    draw({each: ladders[each] for each in longest.items()}, results / "communication.png")
    if gaps := find_gaps(ladders, "transformer"):
        draw_gaps(gaps, "transformer", results / "communication_gap.png")


def main(
    task: Literal["transformer", "transformer-241k", "mnist", "cnn"] | None = None,
    steps: int | None = None,
    arm: str | None = None,
    seeds: tuple[int, ...] = (TUNING_SEED, 1, 2, 3),
    report: bool = False,
    data_dir: Path = Path("data"),
    results: Path = RESULTS,
) -> None:
    """Runs the trainings that the log does not have, and reports all.

    Args:
        task: Task to run; by default all.
        steps: Length of the trainings to run; by default all, from long to short ones.
        arm: Arm to run; by default all.
        seeds: Random seeds; 0 tries all settings, and the others repeat the best ones.
        report: Show earlier results without training.
        data_dir: Folder of `text/tinyshakespeare.txt` and `mnist/`.
        results: Folder for communication.jsonl, .md, .png, and communication_gap.png.
    """
    log = Log(results / "communication.jsonl")
    wanted = [
        job
        for job in jobs()
        if task in (None, job.task) and steps in (None, job.steps) and arm in (None, job.arm)
    ]
    if not wanted:
        sys.exit(f"no arm {arm or ''} with task {task} and {steps} steps; see ARMS in arms.py")
    problems: dict[str, Problem] = {}
    for job in [] if report else wanted:
        if job.task not in problems:
            problems[job.task] = PROBLEMS[job.task](data_dir)
        make(job, seeds, problems[job.task], log)
    publish_results(log, results)


if __name__ == "__main__":
    command_line(main)
