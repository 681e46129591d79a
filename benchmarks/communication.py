"""Compares the bytes that strategies send, and their losses, with synchronous training.

    python benchmarks/communication.py --task transformer    # takes hours; resumes if interrupted
    python benchmarks/communication.py --task mnist --arm "averaging, Muon, H=128, int2"
    python benchmarks/communication.py --report      # tables and a figure of earlier measurements

All strategies train on the same examples in the same number of steps. An arm is a strategy with a
small grid of settings. Seed 0 tries all of them, seeds 1, 2 and 3 repeat the best ones, and only
these three are reported. Bytes are counted in the compiled program.
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Literal, NamedTuple

import jax
import optax
from harness import RESULTS, Log, Row, Table, command_line, console, publish
from matplotlib import pyplot

import ctde_jax as ctde
from ctde_jax.aggregate import Codec, error_feedback, quantize, sign, top_k, two_phase
from ctde_jax.aggregate import mean as exact_mean
from ctde_jax.config.optimizers import build_schedule

REPLICAS = 8
TUNING_SEED = 0

Settings = Mapping[str, Any]


class Problem(NamedTuple):
    """Model, data and length of a training; equal for all arms."""

    model: ctde.models.Model
    data: ctde.data.Dataset
    task: ctde.Task
    batch_size: int
    steps: int


def learn_text(folder: Path) -> Problem:
    """Next-character prediction on Shakespeare, with 64 windows of 64 characters per step."""
    data = ctde.data.from_text(folder / "text" / "tinyshakespeare.txt", length=64, stride=16)
    model = ctde.models.transformer(len(data.vocabulary), 64)
    return Problem(model, data, ctde.tasks.language_modeling, batch_size=64, steps=600)


def learn_digits(folder: Path) -> Problem:
    """Classification of MNIST for ten epochs."""
    data = ctde.data.mnist(folder / "mnist")
    return Problem(
        ctde.models.mlp([784, 128, 10]), data, ctde.tasks.classification, batch_size=512, steps=1152
    )


PROBLEMS = {"transformer": learn_text, "mnist": learn_digits}
# The metric that compares the arms of a task, and the sign of a worse one.
MEASURES = {"transformer": ("loss", 1), "mnist": ("accuracy", -1)}


def combinations(**values: Sequence[Any]) -> list[Settings]:
    return [dict(zip(values, chosen, strict=True)) for chosen in product(*values.values())]


class Arm(NamedTuple):
    """A strategy and its grid of settings."""

    grid: list[Settings]
    inner_steps: int = 0
    # Codec of a two-phase exchange through the owners of slices; None is a float32 all-reduce.
    codec: Codec | None = None

    def strategy(self, settings: Settings) -> ctde.Strategy:
        """Builds the strategy with the outer optimizer of the settings."""
        reduce = exact_mean() if self.codec is None else two_phase(self.codec)
        if not self.inner_steps:
            return ctde.Strategy(reduce=reduce)
        outer = optax.sgd(
            settings["outer_learning_rate"], settings["outer_momentum"] or None, nesterov=True
        )
        return ctde.Strategy(self.inner_steps, reduce, outer)


def make_optimizer(settings: Settings, steps: int) -> optax.GradientTransformation:
    """Builds the optimizer of the inner steps, with 30 warmup steps and cosine decay to zero."""
    learning_rate = build_schedule(settings["learning_rate"], "cosine", 30, steps)
    if settings["optimizer"] == "adamw":
        return optax.adamw(learning_rate)
    # Scaled to AdamW's root mean square, so that both parts have one rate (Liu et al., 2025).
    return optax.contrib.muon(
        learning_rate, consistent_rms=0.2, muon_weight_dimension_numbers=matrices
    )


def matrices(params: ctde.devices.PyTree) -> ctde.devices.PyTree:
    """Selects the parameters for Muon: all matrices except embeddings and the transformer's output.

    All other parameters are updated by AdamW.
    """

    def dimensions(path: tuple, x: jax.Array) -> optax.contrib.MuonDimensionNumbers | None:
        names = {getattr(key, "key", None) for key in path}
        is_hidden = x.ndim == 2 and not names & {"tokens", "places", "out"}
        return optax.contrib.MuonDimensionNumbers() if is_hidden else None

    return jax.tree_util.tree_map_with_path(dimensions, params)


# Arms that average float32 gradients at every step; every arm is compared with both.
BASELINES = ("synchronous, AdamW", "synchronous, Muon")
TEXT_ADAMW = {"optimizer": ["adamw"], "learning_rate": [0.006, 0.012, 0.024]}
TEXT_MUON = {"optimizer": ["muon"], "learning_rate": [0.012, 0.024, 0.048]}
DIGITS_ADAMW = {"optimizer": ["adamw"], "learning_rate": [0.005, 0.01, 0.02]}
DIGITS_MUON = {"optimizer": ["muon"], "learning_rate": [0.003, 0.006, 0.012]}
AVERAGED = {"outer_learning_rate": [1.0], "outer_momentum": [0.0]}
NESTEROV = {"outer_learning_rate": [1.0], "outer_momentum": [0.3, 0.6]}

# Codecs with error feedback. "statistical" has the best 2-bit levels for normally distributed
# numbers; `sparse` keeps one number of 32, also in 2 bits.
int4, int2, one_bit = (
    error_feedback(codec) for codec in (quantize(4), quantize(2, "statistical"), sign())
)
sparse = error_feedback(top_k(32, 1024, quantize(2, "statistical", block=32)))

ARMS: dict[str, dict[str, Arm]] = {
    "transformer": {
        "synchronous, AdamW": Arm(combinations(**TEXT_ADAMW)),
        "synchronous, Muon": Arm(combinations(**TEXT_MUON)),
        "averaging, AdamW, H=15": Arm(combinations(**TEXT_ADAMW, **AVERAGED), 15),
        "DiLoCo, AdamW, H=15, int4": Arm(combinations(**TEXT_ADAMW, **NESTEROV), 15, int4),
        "averaging, Muon, H=8, int2": Arm(combinations(**TEXT_MUON, **AVERAGED), 8, int2),
        "averaging, Muon, H=15, int4": Arm(combinations(**TEXT_MUON, **AVERAGED), 15, int4),
        "averaging, Muon, H=30, int2": Arm(combinations(**TEXT_MUON, **AVERAGED), 30, int2),
    },
    "mnist": {
        "synchronous, AdamW": Arm(combinations(**DIGITS_ADAMW)),
        "synchronous, Muon": Arm(combinations(**DIGITS_MUON)),
        "averaging, AdamW, H=64": Arm(combinations(**DIGITS_ADAMW, **AVERAGED), 64),
        "DiLoCo, AdamW, H=64, int4": Arm(combinations(**DIGITS_ADAMW, **NESTEROV), 64, int4),
        "averaging, Muon, H=64, int4": Arm(combinations(**DIGITS_MUON, **AVERAGED), 64, int4),
        "averaging, Muon, H=128, int2": Arm(combinations(**DIGITS_MUON, **AVERAGED), 128, int2),
        "averaging, Muon, H=288, sparse": Arm(combinations(**DIGITS_MUON, **AVERAGED), 288, sparse),
        "averaging, Muon, H=576, sign": Arm(combinations(**DIGITS_MUON, **AVERAGED), 576, one_bit),
        "averaging, Muon, H=1152, int2": Arm(combinations(**DIGITS_MUON, **AVERAGED), 1152, int2),
    },
}


def train(
    problem: Problem, arm: Arm, settings: Settings, seed: int, devices: list[jax.Device]
) -> Row:
    """Trains once; returns test loss and accuracy, and the bytes and launches of each device."""
    # A single evaluation, after the last step.
    try:
        trained = ctde.fit(
            problem.model,
            problem.data,
            make_optimizer(settings, problem.steps),
            arm.strategy(settings),
            task=problem.task,
            devices=devices,
            batch_size=problem.batch_size,
            steps=problem.steps,
            seed=seed,
            eval_every=problem.steps,
            log_every=100,
            show=False,
        )
    except ctde.NonFiniteLoss:
        return dict.fromkeys(("loss", "accuracy", "bytes", "launches", "seconds"))
    if trained.interrupted:
        raise KeyboardInterrupt

    # Traffic is per round; a synchronous strategy has a round in every step.
    rounds = math.ceil(problem.steps / max(1, arm.inner_steps))
    return {
        "loss": trained.history[-1]["loss"],
        "accuracy": trained.history[-1].get("accuracy"),
        "bytes": trained.traffic.sent * rounds,
        "launches": trained.traffic.launches * rounds,
        "seconds": round(trained.seconds["train"], 1),
    }


def best_settings(log: Log, task: str, arm: str) -> Settings | None:
    """Returns the best settings on the tuning seed, or None if some have not been tried."""
    name, worse = MEASURES[task]
    tried = [
        log.find(task=task, arm=arm, settings=settings, seed=TUNING_SEED)
        for settings in ARMS[task][arm].grid
    ]
    if not all(tried):
        return None
    # A metric is None if the training diverged.
    values = [math.inf if row[name] is None else worse * row[name] for row, *_ in tried]
    return tried[values.index(min(values))][0]["settings"]


def make(task: str, arm: str, seeds: Sequence[int], folder: Path, log: Log) -> None:
    """Runs the trainings of an arm that the log does not have."""
    problem = PROBLEMS[task](folder)
    devices = ctde.devices.start(REPLICAS)

    def run(settings: Settings, seed: int) -> None:
        train_once = partial(train, problem, ARMS[task][arm], settings, seed, devices)
        log.make(train_once, task=task, arm=arm, seed=seed, settings=settings, steps=problem.steps)

    # Tune on one seed, then repeat the best settings on the others.
    for settings in ARMS[task][arm].grid if TUNING_SEED in seeds else []:
        run(settings, TUNING_SEED)
    best = best_settings(log, task, arm)
    for seed in seeds:
        if best is not None and seed != TUNING_SEED:
            run(best, seed)


class Rung(NamedTuple):
    """Result of an arm over its seeds."""

    arm: str
    settings: Settings
    value: float  # mean of the metric over seeds
    spread: float  # standard deviation of the metric over seeds
    seeds: int
    bytes: float  # sent by each device in a training


def ladder(log: Log, task: str) -> list[Rung]:
    """Returns the results of finished arms, from the most bytes to the least."""
    rungs = []
    for arm in ARMS[task]:
        best = best_settings(log, task, arm)
        runs = log.find(task=task, arm=arm, settings=best)
        # The tuning seed is left out, because it has chosen the settings.
        runs = [row for row in runs if row["seed"] != TUNING_SEED and row["bytes"] is not None]
        if runs:
            values = [row[MEASURES[task][0]] for row in runs]
            spread = stdev(values) if len(values) > 1 else math.nan
            rungs.append(Rung(arm, best or {}, mean(values), spread, len(values), runs[0]["bytes"]))
    return sorted(rungs, key=lambda rung: -rung.bytes)


def make_table(task: str, rungs: list[Rung]) -> Table:
    """Compares every arm with the synchronous ones."""
    name, worse = MEASURES[task]
    baselines = [rung for rung in rungs if rung.arm in BASELINES]

    # Losses are compared by their ratio, and accuracies by their difference.
    def difference(rung: Rung, baseline: Rung) -> str:
        if worse == 1:
            return f"{rung.value / baseline.value - 1:+.2%}"
        return f"{100 * (rung.value - baseline.value):+.2f} points"

    header = ["arm", f"test {name}", "spread", "seeds", "sent", "times fewer"]
    header += [*(f"to {baseline.arm}" for baseline in baselines), "settings"]
    rows = [
        [
            rung.arm,
            f"{rung.value:.4f}",
            f"{rung.spread:.4f}",
            f"{rung.seeds}",
            f"{rung.bytes / 1e6:,.3f} MB",
            f"{baselines[0].bytes / rung.bytes:,.0f}",
            *(difference(rung, baseline) for baseline in baselines),
            ", ".join(f"{name} {value}" for name, value in rung.settings.items()),
        ]
        for rung in rungs
    ]
    return Table(task, header, rows)


def draw(ladders: Mapping[str, list[Rung]], file: Path) -> None:
    """Draws the metric of each task over bytes, with dotted lines at the synchronous arms."""
    figure, panels = pyplot.subplots(
        1, len(ladders), figsize=(7 * len(ladders), 7), squeeze=False, layout="tight"
    )
    for axes, (task, rungs) in zip(panels[0], ladders.items(), strict=True):
        axes.set_prop_cycle(color=pyplot.get_cmap("tab20").colors)
        for rung in rungs:
            axes.errorbar(
                rung.bytes, rung.value, yerr=rung.spread, fmt="o", capsize=3, label=rung.arm
            )
            if rung.arm in BASELINES:
                axes.axhline(rung.value, color="gray", linewidth=0.8, linestyle="dotted")
        axes.set(
            xscale="log",
            title=task,
            xlabel="bytes that a device sends",
            ylabel=f"test {MEASURES[task][0]}",
        )
        # Below the panel, because the arms would cover most of it.
        axes.legend(
            loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2, fontsize=8, frameon=False
        )
    figure.savefig(file, dpi=120)


def main(
    task: Literal["transformer", "mnist"] | None = None,
    arm: str | None = None,
    seeds: tuple[int, ...] = (TUNING_SEED, 1, 2, 3),
    report: bool = False,
    data_dir: Path = Path("data"),
    results: Path = RESULTS,
) -> None:
    """Runs the trainings that the log does not have, and reports all.

    Args:
        task: Task to run; by default all.
        arm: Arm to run; by default all.
        seeds: Random seeds; 0 tries all settings, and the others repeat the best ones.
        report: Show earlier results without training.
        data_dir: Folder of `text/tinyshakespeare.txt` and `mnist/`.
        results: Folder for communication.jsonl, .md and .png.
    """
    log = Log(results / "communication.jsonl")
    for name, other in [
        (name, other) for name, arms in ARMS.items() for other in arms if not report
    ]:
        if task in (None, name) and arm in (None, other):
            make(name, other, seeds, data_dir, log)
    # A table needs a synchronous arm, which sends the most bytes, and another one.
    ladders = {
        name: rungs
        for name in ARMS
        if len(rungs := ladder(log, name)) > 1 and rungs[0].arm in BASELINES
    }
    if ladders:
        publish(results / "communication.md", [make_table(*each) for each in ladders.items()])
        draw(ladders, results / "communication.png")
    else:
        console.print("nothing to compare yet: a synchronous arm and another one must be finished")


if __name__ == "__main__":
    command_line(main)
