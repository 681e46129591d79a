"""Compares initializers by steps to a target, and muP with the standard parametrization.

    python benchmarks/initialization.py --data-dir FOLDER             # resumes if interrupted
    python benchmarks/initialization.py --models mlp-50 transformer   # only these
    python benchmarks/initialization.py --report           # tables and figures of earlier results

Seed 0 tries every learning rate of a model's grid with every initializer that suits the model.
Seeds 1, 2 and 3 repeat the learning rate that reaches the target in the fewest steps, and only
these three are reported. A run ends at the target, at its last step, or if the loss is not finite.
All runs use one device, a constant learning rate and no regularization.

The second part trains a perceptron of several widths over a grid of learning rates, in the standard
and in the maximal update parametrization (muP). Under muP, the best learning rate should not depend
on the width. Losses are means of seeds 1, 2 and 3.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any, Literal, NamedTuple, get_args

import jax
import numpy as np
import optax
from harness import RESULTS, Log, Row, Table, command_line, print_table, publish
from jax import lax
from jax import numpy as jnp
from matplotlib import pyplot

import ctde_jax as ctde
from ctde_jax.models.initializers import initialize
from ctde_jax.models.mup import mup, scale_learning_rates

TUNING_SEED = 0
SEEDS = (1, 2, 3)
# Initializers that suit every model.
ANY = ("flax", "glorot", "he", "orthogonal", "lsuv")

ModelName = Literal["mlp-2", "mlp-10", "mlp-50", "cnn", "lstm", "transformer", "mup"]


class Problem(NamedTuple):
    """Model, data, target and hyperparameters of a comparison."""

    model: ctde.models.Model
    data: ctde.data.Dataset
    initializers: tuple[str, ...]
    optimizer: optax.GradientTransformation  # without a learning rate
    learning_rates: tuple[float, ...]
    batch_size: int
    steps: int  # limit after which a run has failed
    target: float  # of the mean of `measure` over the test split
    measure: str = "accuracy"
    task: ctde.Task = ctde.tasks.classification
    every: int = 5  # steps between two evaluations

    def reaches(self, measured: jax.typing.ArrayLike) -> jax.Array:
        """Returns whether an accuracy is at least the target, or a loss at most the target."""
        return jnp.asarray(
            measured >= self.target if self.measure == "accuracy" else measured <= self.target
        )


@cache
def small_mnist(folder: Path) -> ctde.data.Dataset:
    """First 6,000 training and 500 test images of MNIST, reduced to 14 x 14 by averaging."""
    data = ctde.data.mnist(folder / "mnist")

    def shrink(split: ctde.data.Split, examples: int) -> ctde.data.Split:
        # [examples, 28, 28] to [examples, 14, 14], by the mean of 2 x 2 pixels
        pixels = split.inputs[:examples].reshape(examples, 14, 2, 14, 2).mean(axis=(2, 4))
        return ctde.data.Split(pixels.astype(np.uint8), split.labels[:examples])

    return replace(data, train=shrink(data.train, 6000), test=shrink(data.test, 500))


@cache
def small_text(folder: Path) -> ctde.data.Dataset:
    """Shakespeare in windows of 32 characters, with every tenth of the test windows."""
    data = ctde.data.from_text(folder / "text" / "tinyshakespeare.txt", length=32)
    return replace(data, test=ctde.data.Split(*(array[::10] for array in data.test)))


def perceptron(depth: int, folder: Path) -> Problem:
    """`depth` hidden layers of 64 tanh units on scikit-learn's digits, by SGD with momentum."""
    return Problem(
        model=ctde.models.mlp([64] * (depth + 1) + [10]),
        data=ctde.data.digits(),
        initializers=ANY,
        optimizer=optax.trace(0.9),
        learning_rates=(0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0),
        batch_size=128,
        steps=600,
        target=0.95,
    )


# Functions of the data folder, so that only the data of the requested models are read.
PROBLEMS: dict[str, Callable[[Path], Problem]] = {
    "mlp-2": partial(perceptron, 2),
    "mlp-10": partial(perceptron, 10),
    "mlp-50": partial(perceptron, 50),
    "cnn": lambda folder: Problem(
        model=ctde.models.cnn((14, 14), 10),
        data=small_mnist(folder),
        initializers=(*ANY, "delta_orthogonal"),
        optimizer=optax.trace(0.9),
        learning_rates=(0.01, 0.03, 0.1, 0.3),
        batch_size=64,
        steps=120,
        target=0.9,
    ),
    "lstm": lambda folder: Problem(
        model=ctde.models.rnn_classifier(14, 10, hidden_size=64),
        data=small_mnist(folder),
        initializers=(*ANY, "recurrent"),
        optimizer=optax.scale_by_adam(),
        learning_rates=(0.001, 0.003, 0.01, 0.03, 0.1),
        batch_size=64,
        steps=600,
        target=0.9,
    ),
    "transformer": lambda folder: Problem(
        model=ctde.models.transformer(
            len(small_text(folder).vocabulary), 32, hidden_size=64, blocks=4
        ),
        data=small_text(folder),
        initializers=(*ANY, "residual"),
        optimizer=optax.scale_by_adam(),
        learning_rates=(0.001, 0.003, 0.01),
        batch_size=32,
        steps=300,
        target=2.4,
        measure="loss",
        task=ctde.tasks.language_modeling,
        every=10,
    ),
}

WIDTHS = (64, 128, 256, 512, 1024)
WIDE_LEARNING_RATES = tuple(2.0**exponent for exponent in range(-12, -2))  # 2^-12 to 2^-3
WIDE_STEPS = 150
LAST_STEPS = 20  # the training loss is averaged over the last ones
WAYS = {"standard": "standard", "mup": "maximal update"}


def normalized(data: ctde.data.Dataset) -> tuple[ctde.data.Split, ctde.data.Split]:
    """Returns the training and test splits with the inputs that the model receives."""
    return tuple(
        split._replace(inputs=(split.inputs - data.shift) * data.scale)
        for split in (data.train, data.test)
    )


def make_step(
    model: ctde.models.Model,
    task: ctde.Task,
    optimizer: optax.GradientTransformation,
    split: ctde.data.Split,
    batch_size: int,
) -> Callable[..., Any]:
    """Returns a training step for `lax.scan` on a random batch, whose output is the loss."""
    inputs, labels = map(jnp.asarray, split)

    def step(
        learning_rate: jax.Array, carry: tuple[Any, Any], key: jax.Array
    ) -> tuple[tuple[Any, Any], jax.Array]:
        params, state = carry
        # int32[batch_size], drawn with replacement
        chosen = jax.random.randint(key, (batch_size,), 0, len(inputs))

        def loss(params: ctde.devices.PyTree) -> jax.Array:
            outputs, _ = model.apply(params, {}, inputs[chosen], None)
            return task.loss(outputs, labels[chosen]).mean()

        value, grads = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(grads, state, params)
        # The learning rate is an argument, so that one program serves the whole grid.
        updates = jax.tree.map(lambda update: -learning_rate * update, updates)
        return (optax.apply_updates(params, updates), state), value

    return step


def make_race(problem: Problem) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """Returns a function that trains from given parameters until the target is reached.

    `race(params, learning_rate, key)` returns the number of steps (int32) and the last test metric.
    """
    train, test = normalized(problem.data)
    step = make_step(problem.model, problem.task, problem.optimizer, train, problem.batch_size)

    # The metric decides whether the target is reached, and the loss whether training diverged.
    def measure(params: ctde.devices.PyTree) -> tuple[jax.Array, jax.Array]:
        outputs, _ = problem.model.apply(params, {}, jnp.asarray(test.inputs), None)
        measured = problem.task.measure(outputs, jnp.asarray(test.labels))
        return measured[problem.measure].mean(), measured["loss"].mean()

    # A whole run is one program, with an evaluation after every `every` steps.
    @jax.jit
    def race(
        params: ctde.devices.PyTree, learning_rate: float, key: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        def goes_on(carry: tuple[Any, ...]) -> jax.Array:
            steps, _, measured, loss = carry
            return (steps < problem.steps) & ~problem.reaches(measured) & jnp.isfinite(loss)

        def advance(carry: tuple[Any, ...]) -> tuple[Any, ...]:
            steps, trained, _, _ = carry
            # Keys depend on the step only, so all runs of a seed draw the same batches.
            keys = jax.random.split(jax.random.fold_in(key, steps), problem.every)
            trained, _ = lax.scan(partial(step, learning_rate), trained, keys)
            return steps + problem.every, trained, *measure(trained[0])

        begin = (jnp.int32(0), (params, problem.optimizer.init(params)), *measure(params))
        steps, _, measured, _ = lax.while_loop(goes_on, advance, begin)
        return steps, measured

    return race


def compare_initializers(name: str, folder: Path, log: Log) -> None:
    """Runs the trainings of a model that the log does not have."""
    problem = PROBLEMS[name](folder)
    # LSUV measures activations on the first 256 examples.
    race = make_race(problem)
    first = jnp.asarray(normalized(problem.data)[0].inputs[:256])

    def run(start: Callable[..., Any], learning_rate: float, seed: int) -> Row:
        init_key, train_key = jax.random.split(jax.random.key(seed))
        steps, measured = race(start(init_key, first)[0], learning_rate, train_key)
        found = float(measured) if math.isfinite(measured) else None
        return {"steps": int(steps) if problem.reaches(measured) else None, problem.measure: found}

    for initializer in problem.initializers:
        start = jax.jit(initialize(problem.model, initializer).init)
        arm = {"model": name, "init": initializer}
        # Tune the learning rate on one seed, then repeat the best one on the others.
        for rate in problem.learning_rates:
            log.make(
                partial(run, start, rate, TUNING_SEED), **arm, seed=TUNING_SEED, learning_rate=rate
            )
        best = best_rate(log.find(**arm, seed=TUNING_SEED), problem.measure)
        for seed in SEEDS:
            log.make(partial(run, start, best, seed), **arm, seed=seed, learning_rate=best)


def best_rate(tried: Sequence[Row], measure: str) -> float:
    """Returns the learning rate with the fewest steps to the target, or else the best metric."""

    # None stands for a target that was not reached, or a metric that is not finite.
    def rank(row: Row) -> tuple[float, float]:
        measured = (
            math.inf
            if row[measure] is None
            else row[measure] * (-1 if measure == "accuracy" else 1)
        )
        return (math.inf if row["steps"] is None else row["steps"], measured)

    return min(tried, key=rank)["learning_rate"]


def compare_widths(folder: Path, log: Log) -> None:
    """Runs the trainings of perceptrons of several widths that the log does not have."""
    train, _ = normalized(small_mnist(folder))
    first = jnp.asarray(train.inputs[:1])

    def build(width: int) -> ctde.models.Model:
        return ctde.models.mlp([196, width, width, width, 10], "relu")

    # A function of learning rate and seed that returns the mean of the last training losses.
    def make_run(
        model: ctde.models.Model, optimizer: optax.GradientTransformation
    ) -> Callable[[float, int], Row]:
        step = make_step(model, ctde.tasks.classification, optimizer, train, batch_size=128)

        @jax.jit
        def losses(rate: float, seed: int) -> jax.Array:
            init_key, train_key = jax.random.split(jax.random.key(seed))
            params, _ = model.init(init_key, first)
            keys = jax.random.split(train_key, WIDE_STEPS)
            return lax.scan(partial(step, rate), (params, optimizer.init(params)), keys)[1]

        def run(rate: float, seed: int) -> Row:
            final = float(losses(rate, seed)[-LAST_STEPS:].mean())
            return {"loss": final if math.isfinite(final) else None}

        return run

    # All widths, learning rates and seeds, in both parametrizations.
    base = build(WIDTHS[0])
    adam = optax.scale_by_adam()
    for way, width in product(WAYS, WIDTHS):
        # At the base width, muP changes nothing.
        if way == "mup":
            run = make_run(
                mup(build(width), base=base), optax.chain(adam, scale_learning_rates(base, first))
            )
        else:
            run = make_run(build(width), adam)
        for rate, seed in product(WIDE_LEARNING_RATES, SEEDS):
            log.make(
                partial(run, rate, seed),
                model="mup",
                way=way,
                width=width,
                learning_rate=rate,
                seed=seed,
            )


def finished(
    log: Log, problems: dict[str, Problem]
) -> dict[tuple[str, str], tuple[float, list[int]]]:
    """Returns, by model and initializer, the best learning rate and the steps to the target.

    Runs that do not reach the target have no steps in the list.
    """
    found = {}
    for model, problem in problems.items():
        for init in problem.initializers:
            # Skip an initializer until all its runs are in the log.
            tried = log.find(model=model, init=init, seed=TUNING_SEED)
            if len(tried) < len(problem.learning_rates):
                continue
            best = best_rate(tried, problem.measure)
            runs = [
                row
                for row in log.find(model=model, init=init, learning_rate=best)
                if row["seed"] in SEEDS
            ]
            if len(runs) == len(SEEDS):
                found[model, init] = (
                    best,
                    [row["steps"] for row in runs if row["steps"] is not None],
                )
    return found


def cell(learning_rate: float, steps: Sequence[int], of_flax: Sequence[int]) -> str:
    """Formats mean and range of the steps, and their ratio to flax if all runs reach the target."""
    if not steps:
        return "not reached"
    # The ratio is left out for flax itself.
    some = "" if len(steps) == len(SEEDS) else f", {len(steps)} of {len(SEEDS)} runs"
    text = f"{mean(steps):.0f} ({min(steps)}-{max(steps)}{some}) at {learning_rate:g}"
    comparable = steps is not of_flax and len(steps) == len(of_flax) == len(SEEDS)
    return f"{text}; {mean(of_flax) / mean(steps):.2f} x" if comparable else text


def report_initializers(log: Log, folder: Path) -> None:
    """Writes a table of the steps to the target, and draws them."""
    problems = {name: build(folder) for name, build in PROBLEMS.items() if log.find(model=name)}
    found = finished(log, problems)
    if not found:
        return

    # The table has a row for each initializer and a column for each model.
    models, inits = ([*dict.fromkeys(names)] for names in zip(*found, strict=True))
    goals = {
        name: f"{one.measure} {one.target:g} in {one.steps} steps" for name, one in problems.items()
    }
    rows = []
    for init in inits:
        arms = [(found.get((model, init)), found.get((model, "flax"), (0, []))) for model in models]
        rows.append([init, *(cell(*arm, flax[1]) if arm else "-" for arm, flax in arms)])
    header = ["start", *(f"{model}, {goals[model]}" for model in models)]
    note = (
        "Mean (and range) over three seeds, at the best learning rate of seed 0; "
        "x is how many times fewer than flax."
    )
    publish(log.file.with_suffix(".md"), [Table("Steps to the target", header, rows)], note)

    # The figure has a panel for each model, with a point for each run.
    shape = {
        "figsize": (3.2 * len(models), 3.5),
        "sharey": True,
        "squeeze": False,
        "layout": "tight",
    }
    figure, panels = pyplot.subplots(1, len(models), **shape)
    for panel, model in zip(panels[0], models, strict=True):
        for steps, init in (
            (found[model, init][1], init) for init in inits if (model, init) in found
        ):
            panel.plot(steps, [init] * len(steps), "o", alpha=0.7, clip_on=False)
        panel.set(title=f"{model}\n{goals[model]}", xlabel="steps", xlim=(0, None), yticks=inits)
        panel.grid(alpha=0.3)
    figure.savefig(log.file.with_suffix(".png"), dpi=120)


def mean_losses(rows: Sequence[Row]) -> dict[float, float]:
    """Returns the mean loss by learning rate, for those at which no seed diverged."""
    by_rate = {
        rate: [row["loss"] for row in rows if row["learning_rate"] == rate]
        for rate in WIDE_LEARNING_RATES
    }
    return {
        rate: mean(losses)
        for rate, losses in by_rate.items()
        if len(losses) == len(SEEDS) and None not in losses
    }


def report_widths(log: Log) -> None:
    """Prints the best learning rate of every width, and draws the losses over learning rates."""
    figure, panels = pyplot.subplots(1, len(WAYS), figsize=(10, 4), sharey=True, layout="tight")
    # A panel for each parametrization, with a line for each width.
    best = {width: [str(width)] for width in WIDTHS}
    for panel, way in zip(panels, WAYS, strict=True):
        for width in WIDTHS:
            means = mean_losses(log.find(model="mup", way=way, width=width))
            panel.plot(means.keys(), means.values(), "o-", label=str(width))
            least = min(means, key=means.__getitem__)
            best[width].append(f"2^{math.log2(least):.0f}, {means[least]:.4f}")
        panel.set(title=WAYS[way], xlabel="learning rate", yscale="log")
        panel.set_xscale("log", base=2)
        panel.grid(alpha=0.3)
    panels[0].set(ylabel="final training loss")
    panels[0].legend(title="width")
    figure.savefig(log.file.with_name("mup.png"), dpi=120)
    print_table(
        Table(
            "Best learning rate, and the training loss there",
            ("width", *WAYS.values()),
            [*best.values()],
        )
    )


def main(
    models: tuple[ModelName, ...] = get_args(ModelName),
    data_dir: Path = Path("data"),
    results: Path = RESULTS,
    report: bool = False,
) -> None:
    """Runs the trainings that the log does not have, and reports all.

    Args:
        models: Models to compare; mup is the comparison of widths.
        data_dir: Folder of `mnist/` and `text/tinyshakespeare.txt`.
        results: Folder for initialization.jsonl, .md and .png, and mup.png.
        report: Show earlier results without training.
    """
    log = Log(results / "initialization.jsonl")
    for name in models if not report else ():
        if name == "mup":
            compare_widths(data_dir, log)
        else:
            compare_initializers(name, data_dir, log)
    report_initializers(log, data_dir)
    if log.find(model="mup"):
        report_widths(log)


if __name__ == "__main__":
    command_line(main)
