"""The computation of many runs in one program; the runs differ in seeds and numbers alone.

Each program has the numbers of a run as its first argument, scalars by name, and makes optimizer,
strategy and task from them. The structure of these parts must not depend on the numbers.
"""

from collections.abc import Callable, Mapping, Sequence
from math import ceil
from typing import NamedTuple

import jax
import numpy as np
import optax
from jax import lax
from jax import numpy as jnp

from ctde_jax.aggregate import Strategy
from ctde_jax.data import Augment, Split
from ctde_jax.devices import PyTree, over_runs, replica
from ctde_jax.models import Model, Task
from ctde_jax.rounds import state
from ctde_jax.rounds.evaluate import MaskedSplit, default_batch_size, make_sum
from ctde_jax.rounds.round import BLOCK_STEPS, make_gradient_for, make_round, make_rounds, skipping

Numbers = Mapping[str, jax.typing.ArrayLike]
"""The numbers of a run by name, scalars."""


class Parts(NamedTuple):
    """The parts of a run that depend on its numbers."""

    optimizer: optax.GradientTransformation
    strategy: Strategy
    task: Task
    """The task to minimize and to evaluate."""


Make = Callable[[Numbers], Parts]
"""Makes the parts of a run from its numbers, which may be traced."""


class Runs(NamedTuple):
    """The parts of many runs that are equal in all of them, and where the runs are computed."""

    model: Model
    make: Make
    like: Strategy
    """The strategy of one of the runs; only its structure is read."""

    devices: Sequence[jax.Device]
    """Devices over which the runs are divided."""

    replicas: int
    """Number of replicas of each run."""

    keeps_average: bool
    """Whether the state has a moving average of the parameters."""

    @property
    def axes(self) -> state.TrainState:
        """The axis of each part of the state of a run; see `state.axes`."""
        return state.axes(self.like)


def make_create(runs: Runs) -> jax.stages.Wrapped:
    """Makes `create(numbers, rows, params, model_state, frozen) -> state`.

    `rows` are any numbers `[run, replica]`.
    """

    def create(numbers: Numbers, row: PyTree, params: PyTree, model_state: PyTree, frozen: PyTree):
        optimizer, strategy, _ = runs.make(numbers)
        return state.create(
            params,
            model_state,
            frozen,
            optimizer=optimizer,
            strategy=strategy,
            ema=runs.keeps_average,
        )

    in_axes = (None, 0, None, None, None)
    return over_runs(create, runs.devices, runs.replicas, in_axes, runs.axes)


def make_change(before: Runs, after: Runs) -> jax.stages.Wrapped:
    """Makes `change(numbers, state) -> state`, which begins the phase of another strategy."""

    def change(numbers: Numbers, train_state: state.TrainState) -> state.TrainState:
        strategies = (each.make(numbers).strategy for each in (before, after))
        return state.changed(train_state, *strategies)

    return over_runs(change, after.devices, after.replicas, (None, before.axes), after.axes)


def make_many_rounds(
    runs: Runs,
    split_axis: int | None,
    is_split_shared: bool,
    augment: Augment | None,
    accumulation_steps: int,
    ema_decay: float | None,
    skips: bool,
    weigh: Callable[[Task], Task],
) -> jax.stages.Wrapped:
    """Makes the program that computes several rounds of all active runs; it donates the state.

    `train_rounds(numbers, is_active, state, split, batches, first, last, key) -> (state, sums)` is
    `Rounds` for every run. The sums, over the replicas, are `float32[run, rounds * steps]`. An
    inactive run keeps its state, and its sums are zero; `is_active` is bool[run].

    Args:
        runs: The runs.
        split_axis: None if every replica uses the whole split, 0 if each uses one row of it.
        is_split_shared: Whether all runs have the same split, and the argument has no run axis.
        augment: Augmentation of each training example.
        accumulation_steps: Number of microbatches for gradient accumulation.
        ema_decay: Decay per round of the moving average of the parameters; None for no average.
        skips: Whether a run skips rounds that would make its state or its loss non-finite.
        weigh: Adds the weights of classes to a task.
    """
    # The replicas of a run share a device; with a whole split, their mean gradient is one gradient.
    merges = runs.replicas > 1 and split_axis is None

    def train_rounds(numbers, is_active, train_state, split, batches, first, last, key):
        optimizer, strategy, task = runs.make(numbers)
        gradient = make_gradient_for(strategy, runs.model, weigh(task), augment, accumulation_steps)
        train_round = make_round(gradient, optimizer, strategy, ema_decay, merges)
        block_steps = BLOCK_STEPS if runs.devices[0].platform == "gpu" else 1
        rounds = make_rounds(skipping(train_round) if skips else train_round, block_steps)
        arguments = (train_state, split, batches, first, last, key)
        _, shapes = jax.eval_shape(rounds, *arguments)

        def keep(train_state: state.TrainState, *_: PyTree):
            return train_state, jax.tree.map(lambda like: jnp.zeros(like.shape, like.dtype), shapes)

        train_state, sums = lax.cond(is_active, rounds, keep, *arguments)
        return train_state, replica.add_up(sums)

    shared = (3, 5, 6) if is_split_shared else (5, 6)
    return over_runs(
        train_rounds,
        runs.devices,
        runs.replicas,
        (None, None, runs.axes, split_axis, 0, None, None, None),
        (runs.axes, None),
        shared=shared,
        donate=(2,),
    )


def make_many_evaluate(runs: Runs, is_shared: bool) -> jax.stages.Wrapped:
    """Makes the program that computes the central parameters of every run, and evaluates them.

    `evaluate(numbers, state, parts) -> (params, model_state), sums` returns sums over the examples
    by split; `parts` are the results of `in_batches` by split.

    Args:
        runs: The runs.
        is_shared: Whether all runs have the same splits, and the argument has no run axis.
    """

    def evaluate(numbers: Numbers, train_state: state.TrainState, parts: dict[str, MaskedSplit]):
        _, strategy, task = runs.make(numbers)
        params = state.evaluated_point(train_state, strategy)
        sum_over = make_sum(runs.model, task)
        sums = {name: sum_over(params, train_state.model_state, parts[name]) for name in parts}
        return (params, train_state.model_state), sums

    shared = (2,) if is_shared else ()
    in_axes = (None, runs.axes, None)
    return over_runs(evaluate, runs.devices, runs.replicas, in_axes, None, shared)


def in_batches(split: Split, like: Split) -> tuple[Split, np.ndarray]:
    """Divides a split into the batches of an evaluation, `[batches, examples, ...]`.

    Args:
        split: Examples in memory.
        like: The longest split of all runs, which determines the shapes.
    """
    size = min(default_batch_size(like), len(like.labels))
    numbers = np.arange(ceil(len(like.labels) / size) * size).reshape(-1, size)

    # Positions after the last example repeat the first examples, and are masked.
    places = numbers % len(split.labels)
    inputs, labels = (np.asarray(array)[places] for array in (split.inputs, split.labels))
    return Split(inputs, labels), numbers < len(split.labels)
