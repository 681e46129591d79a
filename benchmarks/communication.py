"""The ladder of bytes: what each strategy sends, and how near it comes to synchronous training on the same tokens.

    python benchmarks/communication.py --task transformer    # runs what is missing; takes hours, may be interrupted
    python benchmarks/communication.py --task mnist --arm "averaging, Muon, H=128, int2"
    python benchmarks/communication.py --report              # tables and a picture of what has been measured

An arm is a strategy, with the few settings among which it may choose. Seed 0 tries each of them; the best goes on
to the seeds 1, 2 and 3, and only these are reported. Bytes are read off the compiled program.
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

REPLICAS, TUNING_SEED = 8, 0

Settings = Mapping[str, Any]


class Problem(NamedTuple):
    """What is learned, and for how long; every arm sees the same examples in the same number of steps."""

    model: ctde.models.Model
    data: ctde.data.Dataset
    task: ctde.Task
    batch_size: int
    steps: int


def learn_text(folder: Path) -> Problem:
    """Predicts the next character of Shakespeare, 64 windows of 64 characters a step."""
    data = ctde.data.from_text(folder / "text" / "tinyshakespeare.txt", length=64, stride=16)
    model = ctde.models.transformer(len(data.vocabulary), 64)
    return Problem(model, data, ctde.tasks.language_modeling, batch_size=64, steps=600)


def learn_digits(folder: Path) -> Problem:
    """Recognizes handwritten digits, ten times through."""
    data = ctde.data.mnist(folder / "mnist")
    return Problem(
        ctde.models.mlp([784, 128, 10]), data, ctde.tasks.classification, batch_size=512, steps=1152
    )


PROBLEMS = {"transformer": learn_text, "mnist": learn_digits}
MEASURES = {
    "transformer": ("loss", 1),
    "mnist": ("accuracy", -1),
}  # by which arms are compared, and the sign of worse


def combinations(**values: Sequence[Any]) -> list[Settings]:
    return [dict(zip(values, chosen, strict=True)) for chosen in product(*values.values())]


class Arm(NamedTuple):
    """A strategy, and the settings among which it may choose."""

    grid: list[Settings]
    inner_steps: int = 0
    codec: Codec | None = (
        None  # sent by way of the owners of the slices; None sends float32 in one all-reduce
    )

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
    """Builds the optimizer of every step, warmed up and then annealed to zero."""
    learning_rate = build_schedule(settings["learning_rate"], "cosine", 30, steps)
    if settings["optimizer"] == "adamw":
        return optax.adamw(learning_rate)
    # Scaled to AdamW's root mean square, so that both parts have one rate (Liu et al., 2025).
    return optax.contrib.muon(
        learning_rate, consistent_rms=0.2, muon_weight_dimension_numbers=matrices
    )


def matrices(params: ctde.devices.PyTree) -> ctde.devices.PyTree:
    """Selects what Muon updates: all matrices but embeddings and the transformer's output, which are AdamW's."""

    def dimensions(path: tuple, x: jax.Array) -> optax.contrib.MuonDimensionNumbers | None:
        names = {getattr(key, "key", None) for key in path}
        is_hidden = x.ndim == 2 and not names & {"tokens", "places", "out"}
        return optax.contrib.MuonDimensionNumbers() if is_hidden else None

    return jax.tree_util.tree_map_with_path(dimensions, params)


BASELINES = (
    "synchronous, AdamW",
    "synchronous, Muon",
)  # float32 gradients at every step; all are compared with both
TEXT_ADAMW = {"optimizer": ["adamw"], "learning_rate": [0.006, 0.012, 0.024]}
TEXT_MUON = {"optimizer": ["muon"], "learning_rate": [0.012, 0.024, 0.048]}
DIGITS_ADAMW = {"optimizer": ["adamw"], "learning_rate": [0.005, 0.01, 0.02]}
DIGITS_MUON = {"optimizer": ["muon"], "learning_rate": [0.003, 0.006, 0.012]}
AVERAGED = {"outer_learning_rate": [1.0], "outer_momentum": [0.0]}
NESTEROV = {"outer_learning_rate": [1.0], "outer_momentum": [0.3, 0.6]}

# Codecs with error feedback: the best levels for normally distributed numbers in 2 bits; one number of 32 in 2 bits.
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
    """Trains once; returns what came out, and what each device has sent for it."""
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
    rounds = math.ceil(problem.steps / max(1, arm.inner_steps))
    return {
        "loss": trained.history[-1]["loss"],
        "accuracy": trained.history[-1].get("accuracy"),
        "bytes": trained.traffic.sent * rounds,
        "launches": trained.traffic.launches * rounds,
        "seconds": round(trained.seconds["train"], 1),
    }


def best_settings(log: Log, task: str, arm: str) -> Settings | None:
    """Returns the settings with which the arm did best on the tuning seed; None if not all have been tried."""
    name, worse = MEASURES[task]
    tried = [
        log.find(task=task, arm=arm, settings=settings, seed=TUNING_SEED)
        for settings in ARMS[task][arm].grid
    ]
    if not all(tried):
        return None
    values = [
        math.inf if row[name] is None else worse * row[name] for row, *_ in tried
    ]  # None: has diverged
    return tried[values.index(min(values))][0]["settings"]


def make(task: str, arm: str, seeds: Sequence[int], folder: Path, log: Log) -> None:
    """Makes the runs of an arm that are missing."""
    problem, devices = PROBLEMS[task](folder), ctde.devices.start(REPLICAS)

    def run(settings: Settings, seed: int) -> None:
        train_once = partial(train, problem, ARMS[task][arm], settings, seed, devices)
        log.make(train_once, task=task, arm=arm, seed=seed, settings=settings, steps=problem.steps)

    for settings in ARMS[task][arm].grid if TUNING_SEED in seeds else []:
        run(settings, TUNING_SEED)
    best = best_settings(log, task, arm)
    for seed in seeds:
        if best is not None and seed != TUNING_SEED:
            run(best, seed)


class Rung(NamedTuple):
    """What the seeds of an arm come to."""

    arm: str
    settings: Settings
    value: float  # of the measure, averaged over seeds
    spread: float  # its standard deviation
    seeds: int
    bytes: float


def ladder(log: Log, task: str) -> list[Rung]:
    """Returns the arms that are finished, from the most bytes to the least."""
    rungs = []
    for arm in ARMS[task]:
        best = best_settings(log, task, arm)
        runs = log.find(task=task, arm=arm, settings=best)
        runs = [row for row in runs if row["seed"] != TUNING_SEED and row["bytes"] is not None]
        if runs:
            values = [row[MEASURES[task][0]] for row in runs]
            spread = stdev(values) if len(values) > 1 else math.nan
            rungs.append(Rung(arm, best or {}, mean(values), spread, len(values), runs[0]["bytes"]))
    return sorted(rungs, key=lambda rung: -rung.bytes)


def make_table(task: str, rungs: list[Rung]) -> Table:
    """Shows what every arm has reached, beside what the two synchronous ones have."""
    (name, worse), baselines = MEASURES[task], [rung for rung in rungs if rung.arm in BASELINES]

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
    """Draws the measure of each task over bytes."""
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
    """Makes the runs of the ladder that are missing, and reports all.

    Args:
        task: Only this one.
        arm: Only this one.
        seeds: 0 tries all settings, the others repeat the best.
        report: Only show what has been measured.
        data_dir: Folder of `text/tinyshakespeare.txt` and `mnist/`.
        results: Folder for communication.jsonl, .md and .png.
    """
    log = Log(results / "communication.jsonl")
    for name, other in [
        (name, other) for name, arms in ARMS.items() for other in arms if not report
    ]:
        if task in (None, name) and arm in (None, other):
            make(name, other, seeds, data_dir, log)
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
