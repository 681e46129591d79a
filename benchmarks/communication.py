"""The ladder of bytes: what each strategy sends, and how near it comes to synchronous training on the same tokens.

    python benchmarks/communication.py --task transformer    # runs what is missing; takes hours, may be interrupted
    python benchmarks/communication.py --task mnist --arm "averaging, Muon, H=128, int2"
    python benchmarks/communication.py --report              # tables and a picture of what has been measured

An arm is a way to agree, with the few settings among which it may choose. Seed 0 tries each of them; the best goes on
to the seeds 1, 2 and 3, and only these are reported. Bytes are read off the compiled program.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Literal, NamedTuple

import jax
import optax
import tyro
from matplotlib import pyplot
from rich.console import Console
from rich.table import Table

import ctde_jax as ctde
from ctde_jax.aggregate import Codec, error_feedback, quantize, sign, top_k, two_phase
from ctde_jax.aggregate import mean as exact_mean

RESULTS = Path(__file__).parent / "results"
REPLICAS = 8
TUNING_SEED = 0

Settings = Mapping[str, Any]
Row = dict[str, Any]


class Problem(NamedTuple):
    """What is learned, and for how long; every arm sees the same examples in the same number of steps."""

    model: ctde.models.Model
    data: ctde.data.Dataset
    task: ctde.Task
    batch_size: int
    steps: int
    warmup_steps: int


def learn_text(folder: Path) -> Problem:
    """Predicts the next character of Shakespeare, 64 windows of 64 characters a step."""
    data = ctde.data.from_text(folder / "text" / "tinyshakespeare.txt", length=64, stride=16)
    model = ctde.models.transformer(len(data.vocabulary), 64)
    return Problem(model, data, ctde.tasks.language_modeling, batch_size=64, steps=600, warmup_steps=30)


def learn_digits(folder: Path) -> Problem:
    """Recognizes handwritten digits, ten times through."""
    data = ctde.data.mnist(folder / "mnist")
    model = ctde.models.mlp([784, 128, 10])
    return Problem(model, data, ctde.tasks.classification, batch_size=512, steps=1152, warmup_steps=30)


@dataclass(frozen=True)
class Measure:
    """The number by which arms of a problem are compared."""

    name: str
    sign: int
    """1 where less is better, -1 where more is."""

    def of(self, row: Row) -> float:
        """Returns it so that less is better; a run that has diverged is worse than all others."""
        return math.inf if row[self.name] is None else self.sign * row[self.name]


PROBLEMS: dict[str, tuple[Callable[[Path], Problem], Measure]] = {
    "transformer": (learn_text, Measure("loss", 1)),
    "mnist": (learn_digits, Measure("accuracy", -1)),
}


def combinations(**values: Sequence[Any]) -> list[Settings]:
    """Lists every combination of the values."""
    return [dict(zip(values, chosen, strict=True)) for chosen in product(*values.values())]


@dataclass(frozen=True)
class Arm:
    """A way to agree, and the settings among which it may choose."""

    grid: list[Settings]
    inner_steps: int = 0
    codec: Codec | None = None
    """What travels, by way of the owners of the slices; None sends float32 in one all-reduce."""

    def strategy(self, settings: Settings) -> ctde.Strategy:
        """Builds the strategy with the outer optimizer of the settings."""
        reduce = exact_mean() if self.codec is None else two_phase(self.codec)
        if not self.inner_steps:
            return ctde.Strategy(reduce=reduce)
        outer = optax.sgd(settings["outer_learning_rate"], settings["outer_momentum"] or None, nesterov=True)
        return ctde.Strategy(self.inner_steps, reduce, outer)


def optimizer(settings: Settings, problem: Problem) -> optax.GradientTransformation:
    """Builds the optimizer of every step, warmed up and then annealed to zero."""
    learning_rate = ctde.optimizers.build_schedule(
        settings["learning_rate"], "cosine", problem.warmup_steps, problem.steps
    )
    match settings["optimizer"]:
        case "adamw":
            return optax.adamw(learning_rate)
        case "muon":  # scaled to AdamW's root mean square, so that both parts have one rate (Liu et al., 2025)
            return optax.contrib.muon(learning_rate, consistent_rms=0.2, muon_weight_dimension_numbers=matrices)
        case unknown:
            raise ValueError(f"optimizer must be adamw or muon, got {unknown!r}.")


def matrices(params: ctde.devices.PyTree) -> ctde.devices.PyTree:
    """Says what Muon moves: all matrices but embeddings and the transformer's output, which are AdamW's."""

    def dimensions(path: tuple, x: jax.Array) -> optax.contrib.MuonDimensionNumbers | None:
        names = {getattr(key, "key", None) for key in path}
        if x.ndim == 2 and not names & {"tokens", "places", "out"}:
            return optax.contrib.MuonDimensionNumbers()
        return None

    return jax.tree_util.tree_map_with_path(dimensions, params)


BASELINES = ("synchronous, AdamW", "synchronous, Muon")
"""Those that send float32 gradients at every step; every arm is compared with both."""

TEXT_ADAMW = {"optimizer": ["adamw"], "learning_rate": [0.006, 0.012, 0.024]}
TEXT_MUON = {"optimizer": ["muon"], "learning_rate": [0.012, 0.024, 0.048]}
DIGITS_ADAMW = {"optimizer": ["adamw"], "learning_rate": [0.005, 0.01, 0.02]}
DIGITS_MUON = {"optimizer": ["muon"], "learning_rate": [0.003, 0.006, 0.012]}
AVERAGED = {"outer_learning_rate": [1.0], "outer_momentum": [0.0]}
NESTEROV = {"outer_learning_rate": [1.0], "outer_momentum": [0.3, 0.6]}


def int4() -> Codec:
    """Writes four bits for each number, and keeps what is left."""
    return error_feedback(quantize(4))


def int2() -> Codec:
    """Writes two bits for each number, for the best levels of normally distributed ones, and keeps what is left."""
    return error_feedback(quantize(2, "statistical"))


def one_bit() -> Codec:
    """Writes signs, and keeps what is left."""
    return error_feedback(sign())


def sparse() -> Codec:
    """Writes one number of 32 in two bits, and keeps what is left."""
    return error_feedback(top_k(32, 1024, quantize(2, "statistical", block=32)))


ARMS: dict[str, dict[str, Arm]] = {
    "transformer": {
        "synchronous, AdamW": Arm(combinations(**TEXT_ADAMW)),
        "synchronous, Muon": Arm(combinations(**TEXT_MUON)),
        "averaging, AdamW, H=15": Arm(combinations(**TEXT_ADAMW, **AVERAGED), 15),
        "DiLoCo, AdamW, H=15, int4": Arm(combinations(**TEXT_ADAMW, **NESTEROV), 15, int4()),
        "averaging, Muon, H=8, int2": Arm(combinations(**TEXT_MUON, **AVERAGED), 8, int2()),
        "averaging, Muon, H=15, int4": Arm(combinations(**TEXT_MUON, **AVERAGED), 15, int4()),
        "averaging, Muon, H=30, int2": Arm(combinations(**TEXT_MUON, **AVERAGED), 30, int2()),
    },
    "mnist": {
        "synchronous, AdamW": Arm(combinations(**DIGITS_ADAMW)),
        "synchronous, Muon": Arm(combinations(**DIGITS_MUON)),
        "averaging, AdamW, H=64": Arm(combinations(**DIGITS_ADAMW, **AVERAGED), 64),
        "DiLoCo, AdamW, H=64, int4": Arm(combinations(**DIGITS_ADAMW, **NESTEROV), 64, int4()),
        "averaging, Muon, H=64, int4": Arm(combinations(**DIGITS_MUON, **AVERAGED), 64, int4()),
        "averaging, Muon, H=128, int2": Arm(combinations(**DIGITS_MUON, **AVERAGED), 128, int2()),
        "averaging, Muon, H=288, sparse": Arm(combinations(**DIGITS_MUON, **AVERAGED), 288, sparse()),
        "averaging, Muon, H=576, sign": Arm(combinations(**DIGITS_MUON, **AVERAGED), 576, one_bit()),
        "averaging, Muon, H=1152, int2": Arm(combinations(**DIGITS_MUON, **AVERAGED), 1152, int2()),
    },
}


def train(problem: Problem, arm: Arm, settings: Settings, seed: int, devices: list[jax.Device]) -> Row:
    """Trains once; says what came out, and what each device has sent for it."""
    outcome: Row = {"loss": None, "accuracy": None, "bytes": None, "launches": None, "seconds": None}
    try:
        trained = ctde.fit(
            problem.model,
            problem.data,
            optimizer(settings, problem),
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
        return outcome
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


def measured() -> list[Row]:
    """Returns all runs that there are, in the order in which they were made."""
    file = RESULTS / "communication.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def find(rows: list[Row], task: str, arm: str, settings: Settings, seed: int) -> Row | None:
    """Returns the run of these settings, if there is one."""
    wanted = {"task": task, "arm": arm, "settings": settings, "seed": seed}
    return next((row for row in rows if wanted.items() <= row.items()), None)


def best_settings(rows: list[Row], task: str, arm: str) -> Settings | None:
    """Returns the settings with which the arm did best on the tuning seed; None where not all have been tried."""
    tried = [find(rows, task, arm, settings, TUNING_SEED) for settings in ARMS[task][arm].grid]
    finished = [row for row in tried if row is not None]
    if len(finished) < len(tried):
        return None
    return min(finished, key=PROBLEMS[task][1].of)["settings"]


def make(task: str, arm: str, seeds: Sequence[int], folder: Path) -> None:
    """Makes the runs of an arm that are still missing, and writes each down when it is done."""
    problem = PROBLEMS[task][0](folder)
    devices = ctde.devices.start(REPLICAS)

    def run(settings: Settings, seed: int) -> None:
        if find(measured(), task, arm, settings, seed) is not None:
            return
        outcome = train(problem, ARMS[task][arm], settings, seed, devices)
        row = {"task": task, "arm": arm, "seed": seed, "settings": settings, "steps": problem.steps, **outcome}
        RESULTS.mkdir(exist_ok=True)
        with (RESULTS / "communication.jsonl").open("a") as file:
            print(json.dumps(row), file=file)
        print(json.dumps(row), flush=True)

    for settings in ARMS[task][arm].grid if TUNING_SEED in seeds else []:
        run(settings, TUNING_SEED)
    best = best_settings(measured(), task, arm)
    for seed in seeds:
        if best is not None and seed != TUNING_SEED:
            run(best, seed)


class Rung(NamedTuple):
    """What the seeds of an arm come to."""

    arm: str
    settings: Settings
    values: list[float]
    """Of the problem's measure, one for each seed."""

    bytes: float

    @property
    def spread(self) -> float:
        """The standard deviation over the seeds."""
        return stdev(self.values) if len(self.values) > 1 else math.nan


def ladder(task: str) -> list[Rung]:
    """Returns the arms that are finished, from the most bytes to the least."""
    rows, measure = measured(), PROBLEMS[task][1]
    rungs = []
    for arm in ARMS[task]:
        best = best_settings(rows, task, arm)
        runs = [row for row in rows if (row["task"], row["arm"], row["settings"]) == (task, arm, best)]
        runs = [row for row in runs if row["seed"] != TUNING_SEED and row["bytes"] is not None]
        if runs:
            rungs.append(Rung(arm, best or {}, [row[measure.name] for row in runs], runs[0]["bytes"]))
    return sorted(rungs, key=lambda rung: -rung.bytes)


def table(task: str, rungs: list[Rung]) -> Table:
    """Shows what every arm has reached, beside what the two synchronous ones have."""
    measure, baselines = PROBLEMS[task][1], [rung for rung in rungs if rung.arm in BASELINES]

    def difference(rung: Rung, baseline: Rung) -> str:
        value, standard = mean(rung.values), mean(baseline.values)
        return f"{value / standard - 1:+.2%}" if measure.sign == 1 else f"{100 * (value - standard):+.2f} points"

    shown = Table("arm", f"test {measure.name}", "spread", "seeds", "sent", "times fewer", title=task)
    for baseline in baselines:
        shown.add_column(f"to {baseline.arm}")
    shown.add_column("settings")
    for rung in rungs:
        shown.add_row(
            rung.arm,
            f"{mean(rung.values):.4f}",
            f"{rung.spread:.4f}",
            f"{len(rung.values)}",
            f"{rung.bytes / 1e6:,.3f} MB",
            f"{baselines[0].bytes / rung.bytes:,.0f}",
            *(difference(rung, baseline) for baseline in baselines),
            ", ".join(f"{name} {value}" for name, value in rung.settings.items()),
        )
    return shown


def markdown(shown: Table) -> str:
    """Writes a table as Markdown."""
    columns = [[str(column.header), *column.cells] for column in shown.columns]
    header, *rows = ["| " + " | ".join(map(str, row)) + " |" for row in zip(*columns, strict=True)]
    return "\n".join([header, "|---" * len(columns) + "|", *rows])


def report() -> None:
    """Prints a table of each task, and saves them as Markdown and as a picture of the measure over bytes."""
    ladders = {task: rungs for task in ARMS if len(rungs := ladder(task)) > 1 and rungs[0].arm in BASELINES}
    if not ladders:
        print("nothing to compare yet: a synchronous arm and another one must be finished")
        return
    tables = {task: table(task, rungs) for task, rungs in ladders.items()}
    for shown in tables.values():
        Console(width=180).print(shown)
    text = [f"## {task}\n\n{markdown(shown)}\n" for task, shown in tables.items()]
    (RESULTS / "communication.md").write_text("\n".join(text))

    figure, panels = pyplot.subplots(1, len(ladders), figsize=(7 * len(ladders), 7), squeeze=False, layout="tight")
    for axes, (task, rungs) in zip(panels[0], ladders.items(), strict=True):
        axes.set_prop_cycle(color=pyplot.get_cmap("tab20").colors)
        for rung in rungs:
            value = mean(rung.values)
            axes.errorbar(rung.bytes, value, yerr=rung.spread, fmt="o", capsize=3, label=rung.arm)
            if rung.arm in BASELINES:
                axes.axhline(value, color="gray", linewidth=0.8, linestyle="dotted")
        axes.set(xscale="log", title=task, xlabel="bytes that a device sends", ylabel=f"test {PROBLEMS[task][1].name}")
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2, fontsize=8, frameon=False)
    figure.savefig(RESULTS / "communication.png", dpi=120)


@dataclass(frozen=True)
class Options:
    """Makes the runs of the ladder that are missing, or reports those that have been made."""

    task: Literal["transformer", "mnist"] | None = None
    """Only this one."""

    arm: str | None = None
    """Only this one."""

    seeds: tuple[int, ...] = (TUNING_SEED, 1, 2, 3)
    """0 tries all settings, the others repeat the best."""

    report: bool = False
    """Only show what has been measured."""

    data_dir: Path = Path("data")
    """The folder of `text/tinyshakespeare.txt` and `mnist/`."""


def main(options: Options) -> None:
    """Does what the options say."""
    for task, arms in ARMS.items() if not options.report else []:
        for arm in arms:
            if options.task in (None, task) and options.arm in (None, arm):
                make(task, arm, options.seeds, options.data_dir)
    report()


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
