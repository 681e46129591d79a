"""What the start of the weights is worth: steps to a target for each initializer, and one learning rate for all widths.

    python benchmarks/initialization.py --data-dir FOLDER              # runs what is missing, may be interrupted
    python benchmarks/initialization.py --models mlp-50 transformer    # only these
    python benchmarks/initialization.py --report                       # tables and pictures of what has been measured

Seed 0 tries every learning rate of a model's grid with every initializer that suits it; the one that reaches the target
in the fewest steps goes on to the seeds 1, 2 and 3, and only these are reported. A run ends at the target, at its last
step, or where the loss is no longer finite. One device, constant learning rates, no regularization.

The second part trains a perceptron of several widths over a grid of learning rates, in the standard and in the maximal
update parametrization: in the second one the best learning rate should stay where it is. Means of seeds 1, 2 and 3.
"""

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
import optax
import tyro
from jax import lax
from jax import numpy as jnp
from matplotlib import pyplot
from rich.console import Console
from rich.table import Table

import ctde_jax as ctde
from ctde_jax.models.initializers import initialize
from ctde_jax.models.mup import mup, scale_learning_rates

RESULTS = Path(__file__).parent / "results"
TUNING_SEED = 0
SEEDS = (1, 2, 3)
ANY = ("flax", "glorot", "he", "orthogonal", "lsuv")

Row = dict[str, Any]
ModelName = Literal["mlp-2", "mlp-10", "mlp-50", "cnn", "lstm", "transformer", "mup"]


class Problem(NamedTuple):
    """What is learned, how well, and with what."""

    model: ctde.models.Model
    data: ctde.data.Dataset
    task: ctde.Task
    measure: str
    target: float
    """Of the measure, averaged over the test split: an accuracy to rise to, or a loss to fall to."""

    initializers: tuple[str, ...]
    optimizer: optax.GradientTransformation
    """Without a learning rate."""

    learning_rates: tuple[float, ...]
    batch_size: int
    steps: int
    """After so many a run is given up."""

    every: int
    """Steps between two looks at the test split."""

    def reaches(self, measured: jax.typing.ArrayLike) -> jax.Array:
        """Says whether the target is reached."""
        return jnp.asarray(measured >= self.target if self.measure == "accuracy" else measured <= self.target)


@cache
def small_digits() -> ctde.data.Dataset:
    """Scikit-learn's digits, 8 x 8."""
    return ctde.data.digits()


@cache
def small_mnist(folder: Path) -> ctde.data.Dataset:
    """The first 6,000 training and 500 test pictures of MNIST, each 2 x 2 pixels averaged: 14 x 14."""
    data = ctde.data.mnist(folder / "mnist")

    def shrink(split: ctde.data.Split, examples: int) -> ctde.data.Split:
        pixels = split.inputs[:examples].reshape(examples, 14, 2, 14, 2).mean(axis=(2, 4))
        return ctde.data.Split(pixels.astype(np.uint8), split.labels[:examples])

    return replace(data, train=shrink(data.train, 6000), test=shrink(data.test, 500))


@cache
def small_text(folder: Path) -> ctde.data.Dataset:
    """Shakespeare in windows of 32 characters, tested on every tenth of the test windows."""
    data = ctde.data.from_text(folder / "text" / "tinyshakespeare.txt", length=32)
    return replace(data, test=ctde.data.Split(*(array[::10] for array in data.test)))


def perceptron(depth: int, folder: Path) -> Problem:
    """Hidden layers of 64 tanh units on the small digits, by SGD with momentum."""
    return Problem(
        model=ctde.models.mlp([64] * (depth + 1) + [10]),
        data=small_digits(),
        task=ctde.tasks.classification,
        measure="accuracy",
        target=0.95,
        initializers=ANY,
        optimizer=optax.trace(0.9),
        learning_rates=(0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0),
        batch_size=128,
        steps=600,
        every=5,
    )


def convolutional(folder: Path) -> Problem:
    """The network of federated averaging on small pictures, by SGD with momentum."""
    return Problem(
        model=ctde.models.cnn((14, 14), 10),
        data=small_mnist(folder),
        task=ctde.tasks.classification,
        measure="accuracy",
        target=0.9,
        initializers=(*ANY, "delta_orthogonal"),
        optimizer=optax.trace(0.9),
        learning_rates=(0.01, 0.03, 0.1, 0.3),
        batch_size=64,
        steps=120,
        every=5,
    )


def recurrent(folder: Path) -> Problem:
    """Long short-term memory that reads small pictures row by row, by Adam."""
    return Problem(
        model=ctde.models.rnn_classifier(14, 10, width=64),
        data=small_mnist(folder),
        task=ctde.tasks.classification,
        measure="accuracy",
        target=0.9,
        initializers=(*ANY, "recurrent"),
        optimizer=optax.scale_by_adam(),
        learning_rates=(0.001, 0.003, 0.01, 0.03, 0.1),
        batch_size=64,
        steps=600,
        every=5,
    )


def transformer(folder: Path) -> Problem:
    """Four blocks of width 64 that predict the next character of Shakespeare, by Adam."""
    data = small_text(folder)
    return Problem(
        model=ctde.models.transformer(len(data.vocabulary), 32, width=64, blocks=4),
        data=data,
        task=ctde.tasks.language_modeling,
        measure="loss",
        target=2.4,
        initializers=(*ANY, "residual"),
        optimizer=optax.scale_by_adam(),
        learning_rates=(0.001, 0.003, 0.01),
        batch_size=32,
        steps=300,
        every=10,
    )


PROBLEMS: dict[str, Callable[[Path], Problem]] = {
    "mlp-2": partial(perceptron, 2),
    "mlp-10": partial(perceptron, 10),
    "mlp-50": partial(perceptron, 50),
    "cnn": convolutional,
    "lstm": recurrent,
    "transformer": transformer,
}

WIDTHS = (64, 128, 256, 512, 1024)
WIDE_LEARNING_RATES = tuple(2.0**exponent for exponent in range(-12, -2))
WIDE_STEPS = 150
LAST_STEPS = 20
"""The training loss is averaged over so many at the end."""


def normalized(data: ctde.data.Dataset) -> tuple[ctde.data.Split, ctde.data.Split]:
    """Returns the training and the test split, as the model sees them."""
    return tuple(split._replace(inputs=(split.inputs - data.shift) * data.scale) for split in (data.train, data.test))


def make_step(
    model: ctde.models.Model,
    task: ctde.Task,
    optimizer: optax.GradientTransformation,
    split: ctde.data.Split,
    batch_size: int,
) -> Callable[..., Any]:
    """Makes one step on examples that the key draws, for `lax.scan`; it gives the loss."""
    inputs, labels = map(jnp.asarray, split)

    def step(learning_rate: jax.Array, carry: tuple[Any, Any], key: jax.Array) -> tuple[tuple[Any, Any], jax.Array]:
        params, state = carry
        chosen = jax.random.randint(key, (batch_size,), 0, len(inputs))

        def loss(params: ctde.devices.PyTree) -> jax.Array:
            outputs, _ = model.apply(params, {}, inputs[chosen], None)
            return task.loss(outputs, labels[chosen]).mean()

        value, grads = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(grads, state, params)
        updates = jax.tree.map(lambda update: -learning_rate * update, updates)
        return (optax.apply_updates(params, updates), state), value

    return step


def make_race(problem: Problem) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """Makes the function from a start to how many steps were taken and what was measured then."""
    train, test = normalized(problem.data)
    step = make_step(problem.model, problem.task, problem.optimizer, train, problem.batch_size)

    def measure(params: ctde.devices.PyTree) -> tuple[jax.Array, jax.Array]:
        outputs, _ = problem.model.apply(params, {}, jnp.asarray(test.inputs), None)
        measured = problem.task.measure(outputs, jnp.asarray(test.labels))
        return measured[problem.measure].mean(), measured["loss"].mean()

    @jax.jit
    def race(params: ctde.devices.PyTree, learning_rate: float, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        def goes_on(carry: tuple[Any, ...]) -> jax.Array:
            steps, _, measured, loss = carry
            return (steps < problem.steps) & ~problem.reaches(measured) & jnp.isfinite(loss)

        def advance(carry: tuple[Any, ...]) -> tuple[Any, ...]:
            steps, trained, _, _ = carry
            keys = jax.random.split(jax.random.fold_in(key, steps), problem.every)
            trained, _ = lax.scan(partial(step, learning_rate), trained, keys)
            return steps + problem.every, trained, *measure(trained[0])

        begin = (jnp.int32(0), (params, problem.optimizer.init(params)), *measure(params))
        steps, _, measured, _ = lax.while_loop(goes_on, advance, begin)
        return steps, measured

    return race


@dataclass(frozen=True)
class Log:
    """All runs that there are, each written down when it is done."""

    file: Path

    def rows(self) -> list[Row]:
        """Returns them in the order in which they were made."""
        return [json.loads(line) for line in self.file.read_text().splitlines()] if self.file.exists() else []

    def find(self, **wanted: Any) -> list[Row]:
        """Returns those with these entries."""
        return [row for row in self.rows() if wanted.items() <= row.items()]

    def make(self, run: Callable[[], Row], **settings: Any) -> None:
        """Makes a run, unless there is one of these settings."""
        if self.find(**settings):
            return
        begin = time.perf_counter()
        row = {**settings, **run(), "seconds": round(time.perf_counter() - begin, 1)}
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a") as file:
            print(json.dumps(row), file=file)
        print(json.dumps(row), flush=True)


def compare_initializers(name: str, folder: Path, log: Log) -> None:
    """Makes the runs of a model that are still missing."""
    problem = PROBLEMS[name](folder)
    race = make_race(problem)
    first = jnp.asarray(normalized(problem.data)[0].inputs[:256])

    for initializer in problem.initializers:
        start = jax.jit(initialize(problem.model, initializer).init)

        def run(learning_rate: float, seed: int, start: Callable[..., Any] = start) -> Row:
            init_key, train_key = jax.random.split(jax.random.key(seed))
            steps, measured = race(start(init_key, first)[0], learning_rate, train_key)
            found = float(measured) if math.isfinite(measured) else None
            return {"steps": int(steps) if problem.reaches(measured) else None, problem.measure: found}

        arm = {"model": name, "init": initializer}
        for rate in problem.learning_rates:
            log.make(partial(run, rate, TUNING_SEED), **arm, seed=TUNING_SEED, learning_rate=rate)
        best = best_rate(log.find(**arm, seed=TUNING_SEED), problem.measure)
        for seed in SEEDS:
            log.make(partial(run, best, seed), **arm, seed=seed, learning_rate=best)


def best_rate(tried: Sequence[Row], measure: str) -> float:
    """Returns the learning rate with the fewest steps to the target, or where none has reached it came nearest."""

    def rank(row: Row) -> tuple[float, float]:
        measured = math.inf if row[measure] is None else row[measure] * (-1 if measure == "accuracy" else 1)
        return (math.inf if row["steps"] is None else row["steps"], measured)

    return min(tried, key=rank)["learning_rate"]


def compare_widths(folder: Path, log: Log) -> None:
    """Makes the runs of wide perceptrons that are still missing."""
    train, _ = normalized(small_mnist(folder))
    first = jnp.asarray(train.inputs[:1])

    def build(width: int) -> ctde.models.Model:
        return ctde.models.mlp([196, width, width, width, 10], "relu")

    base = build(WIDTHS[0])
    ways = {
        "standard": (lambda model: model, optax.scale_by_adam()),
        "mup": (partial(mup, base=base), optax.chain(optax.scale_by_adam(), scale_learning_rates(base, first))),
    }
    for way, (parametrized, optimizer) in ways.items():
        for width in WIDTHS:
            model = parametrized(build(width))
            step = make_step(model, ctde.tasks.classification, optimizer, train, batch_size=128)

            @jax.jit
            def losses(
                rate: float, seed: int, model: Any = model, step: Any = step, optimizer: Any = optimizer
            ) -> jax.Array:
                init_key, train_key = jax.random.split(jax.random.key(seed))
                params, _ = model.init(init_key, first)
                keys = jax.random.split(train_key, WIDE_STEPS)
                return lax.scan(partial(step, rate), (params, optimizer.init(params)), keys)[1]

            def run(rate: float, seed: int, losses: Callable[[float, int], jax.Array] = losses) -> Row:
                final = float(losses(rate, seed)[-LAST_STEPS:].mean())
                return {"loss": final if math.isfinite(final) else None}

            for rate, seed in product(WIDE_LEARNING_RATES, SEEDS):
                log.make(partial(run, rate, seed), model="mup", way=way, width=width, learning_rate=rate, seed=seed)


class Arm(NamedTuple):
    """What the seeds of an initializer come to."""

    model: str
    init: str
    learning_rate: float
    steps: list[int]
    """Of the runs that reached the target."""

    @property
    def says(self) -> str:
        """The mean and the range of the steps, and the learning rate."""
        if not self.steps:
            return "not reached"
        some = "" if len(self.steps) == len(SEEDS) else f", {len(self.steps)} of {len(SEEDS)} runs"
        return f"{mean(self.steps):.0f} ({min(self.steps)}-{max(self.steps)}{some}) at {self.learning_rate:g}"


def arms(log: Log, folder: Path) -> Iterator[Arm]:
    """Returns the arms all of whose seeds are there."""
    for model, build in PROBLEMS.items():
        problem = build(folder)
        for init in problem.initializers if log.find(model=model) else ():
            tried = log.find(model=model, init=init, seed=TUNING_SEED)
            if len(tried) < len(problem.learning_rates):
                continue
            best = best_rate(tried, problem.measure)
            runs = [row for row in log.find(model=model, init=init, learning_rate=best) if row["seed"] in SEEDS]
            if len(runs) == len(SEEDS):
                yield Arm(model, init, best, [row["steps"] for row in runs if row["steps"] is not None])


def saving(arm: Arm, found: Sequence[Arm]) -> str:
    """Says how many times fewer steps an initializer takes than flax's own start, if all runs of both arrive."""
    others = [other for other in found if (other.model, other.init) == (arm.model, "flax")]
    whole = all(len(each.steps) == len(SEEDS) for each in (arm, *others))
    if arm.init == "flax" or not others or not whole:
        return ""
    return f"; {mean(others[0].steps) / mean(arm.steps):.2f} x"


def report_initializers(found: Sequence[Arm], results: Path, folder: Path) -> None:
    """Prints a table of the steps to the target, and saves it as Markdown and as a picture."""
    models = list(dict.fromkeys(arm.model for arm in found))
    inits = list(dict.fromkeys(arm.init for arm in found))
    cells = {(arm.init, arm.model): arm.says + saving(arm, found) for arm in found}
    problems = {model: PROBLEMS[model](folder) for model in models}
    goals = {
        model: f"{problem.measure} {problem.target:g} in {problem.steps} steps" for model, problem in problems.items()
    }
    shown = Table("start", *(f"{model}, {goals[model]}" for model in models), title="Steps to the target")
    for init in inits:
        shown.add_row(init, *(cells.get((init, model), "-") for model in models))
    Console(width=200).print(shown)
    columns = [[str(column.header), *column.cells] for column in shown.columns]
    header, *rows = ["| " + " | ".join(map(str, row)) + " |" for row in zip(*columns, strict=True)]
    text = "\n".join([header, "|---" * len(columns) + "|", *rows])
    note = (
        "Mean (and range) over three seeds, at the best learning rate of seed 0; x says how many times fewer than flax."
    )
    (results / "initialization.md").write_text(f"{text}\n\n{note}\n")

    figure, panels = pyplot.subplots(
        1, len(models), figsize=(3.2 * len(models), 3.5), sharey=True, squeeze=False, layout="tight"
    )
    for panel, model in zip(panels[0], models, strict=True):
        for arm in (arm for arm in found if arm.model == model and arm.steps):
            panel.plot(arm.steps, [arm.init] * len(arm.steps), "o", alpha=0.7, clip_on=False)
        panel.set(title=f"{model}\n{goals[model]}", xlabel="steps", xlim=(0, None), yticks=inits)
        panel.grid(alpha=0.3)
    figure.savefig(results / "initialization.png", dpi=120)
    pyplot.close(figure)


def mean_losses(rows: Sequence[Row]) -> dict[float, float]:
    """Returns the mean loss of each learning rate all of whose seeds stayed finite."""
    by_rate = {rate: [row["loss"] for row in rows if row["learning_rate"] == rate] for rate in WIDE_LEARNING_RATES}
    return {rate: mean(losses) for rate, losses in by_rate.items() if len(losses) == len(SEEDS) and None not in losses}


def report_widths(rows: Sequence[Row], results: Path) -> None:
    """Prints the best learning rate of every width, and draws the final loss over the learning rates."""
    ways = {"standard": "standard", "mup": "maximal update"}
    shown = Table("width", *ways.values(), title="Best learning rate, and the training loss there")
    figure, panels = pyplot.subplots(1, len(ways), figsize=(10, 4), sharey=True, layout="tight")
    best: dict[int, list[str]] = {width: [] for width in WIDTHS}
    for panel, (way, title) in zip(panels, ways.items(), strict=True):
        for width in WIDTHS:
            means = mean_losses([row for row in rows if (row["way"], row["width"]) == (way, width)])
            panel.plot(means.keys(), means.values(), "o-", label=str(width))
            least = min(means, key=lambda rate: means[rate])
            best[width].append(f"2^{math.log2(least):.0f}, {means[least]:.4f}")
        panel.set(title=title, xlabel="learning rate")
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.grid(alpha=0.3)
    panels[0].set(ylabel="final training loss")
    panels[0].legend(title="width")
    figure.savefig(results / "mup.png", dpi=120)
    pyplot.close(figure)
    for width, cells in best.items():
        shown.add_row(str(width), *cells)
    Console().print(shown)


@dataclass(frozen=True)
class Options:
    """What to run."""

    models: tuple[ModelName, ...] = (*PROBLEMS, "mup")
    """Which ones; mup is the comparison of widths."""

    data_dir: Path = Path("data")
    """The folder of `mnist/` and `text/tinyshakespeare.txt`."""

    results: Path = RESULTS
    """The folder for initialization.jsonl, .md and .png, and mup.png."""

    report: bool = False
    """Only show what has been measured."""


def main(options: Options) -> None:
    """Does what the options say."""
    log = Log(options.results / "initialization.jsonl")
    for name in options.models if not options.report else ():
        if name == "mup":
            compare_widths(options.data_dir, log)
        else:
            compare_initializers(name, options.data_dir, log)
    found = list(arms(log, options.data_dir))
    if found:
        report_initializers(found, options.results, options.data_dir)
    if wide := log.find(model="mup"):
        report_widths(wide, options.results)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
