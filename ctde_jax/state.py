"""What training remembers from one round to the next, and which part of it is whose."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import optax
from jax import numpy as jnp

from ctde_jax import replica
from ctde_jax.aggregate import Strategy
from ctde_jax.models import Model
from ctde_jax.replica import PyTree


class TrainState(NamedTuple):
    """The whole state of training; `params` are the one central model."""

    step: PyTree  # int32[], optimizer steps taken
    params: PyTree
    model_state: PyTree  # what the model keeps beside its parameters, such as batch statistics
    opt_state: PyTree  # of the optimizer: the center's, or with inner steps each replica's own
    reduce_state: PyTree  # of the strategy's reducer, each replica's own
    outer_state: PyTree  # of the strategy's outer optimizer


def axes(strategy: Strategy) -> TrainState:
    """Says which parts of the state are a replica's own: 0 for those, None for what is equal on all."""
    own = 0 if strategy.inner_steps else None
    return TrainState(step=None, params=None, model_state=None, opt_state=own, reduce_state=0, outer_state=None)


def create(
    model: Model,
    optimizer: optax.GradientTransformation,
    strategy: Strategy,
    inputs: jax.typing.ArrayLike,
    key: jax.Array,
) -> TrainState:
    """Initializes the model and everything around it once, at the center.

    Args:
        model: Its `init` is run with the key and the inputs.
        optimizer: The optimizer of every step.
        strategy: Has states of its own.
        inputs: `[examples, ...]`, one example will do.
        key: Of the model's start.
    """
    params, model_state = jax.jit(model.init)(key, inputs)
    return TrainState(
        step=jnp.int32(0),
        params=params,
        model_state=model_state,
        opt_state=optimizer.init(params),
        reduce_state=strategy.reduce.init(params),
        outer_state=strategy.outer.init(params),
    )


def stack(state: TrainState, strategy: Strategy, replicas: int) -> TrainState:
    """Gives every replica its own copy of what is to be its own, as rows of a leading axis."""

    def copies(part: PyTree, axis: int | None) -> PyTree:
        return part if axis is None else jax.tree.map(lambda x: jnp.stack([x] * replicas), part)

    return TrainState(*map(copies, state, axes(strategy)))


def place(state: TrainState, strategy: Strategy, devices: Sequence[jax.Device]) -> TrainState:
    """Puts a stacked state on the devices."""

    def put(part: PyTree, axis: int | None) -> PyTree:
        return replica.replicate(part, devices) if axis is None else replica.shard(part, devices)

    return TrainState(*map(put, state, axes(strategy)))
