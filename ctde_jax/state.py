"""What training remembers from one round to the next, and which part of it is whose."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import numpy as np
import optax
from jax import numpy as jnp

from ctde_jax import replica
from ctde_jax.aggregate import Strategy
from ctde_jax.replica import AXIS, PyTree


class TrainState(NamedTuple):
    """The whole state of training; `params` are the one central model, or where a strategy diverges a replica's own."""

    step: PyTree  # int32[], steps gone through, also such for which nobody had examples
    params: PyTree
    model_state: PyTree  # what the model keeps beside its parameters, such as batch statistics
    opt_state: PyTree  # of the optimizer: the center's, or with inner steps each replica's own
    reduce_state: PyTree  # of the strategy's reducer, each replica's own
    outer_state: PyTree  # of the strategy's outer optimizer, whose parameters it shares
    ema_params: PyTree = ()  # the exponential moving average of the parameters, where one is kept


def axes(strategy: Strategy) -> TrainState:
    """Says which parts of the state are a replica's own: 0 for those, None for what is equal on all."""
    alone = 0 if strategy.inner_steps else None
    astray = 0 if strategy.diverges else None
    return TrainState(
        step=None,
        params=astray,
        model_state=None,
        opt_state=alone,
        reduce_state=0,
        outer_state=astray,
        ema_params=astray,
    )


def check(params: PyTree, strategy: Strategy, replicas: int) -> None:
    """Raises InputError for a strategy that cannot run on so many replicas, before anything is compiled.

    Of the parameters only shapes and types are read.
    """
    on_replicas = jax.vmap(strategy.reduce.init, in_axes=None, axis_name=AXIS, axis_size=replicas)
    jax.eval_shape(on_replicas, params)


def create(
    params: PyTree,
    model_state: PyTree,
    optimizer: optax.GradientTransformation,
    strategy: Strategy,
    ema: bool = False,
) -> TrainState:
    """Makes the first state of a replica; on the replica axis, so that reducers may ask how many replicas there are."""
    return TrainState(
        step=jnp.int32(0),
        params=params,
        model_state=model_state,
        opt_state=strategy.local(optimizer).init(params),
        reduce_state=strategy.reduce.init(params),
        outer_state=strategy.outer.init(params),
        ema_params=params if ema else (),
    )


def place(
    params: PyTree,
    model_state: PyTree,
    optimizer: optax.GradientTransformation,
    strategy: Strategy,
    devices: Sequence[jax.Device],
    ema: bool = False,
) -> TrainState:
    """Sends what has been initialized at the center to the devices, and makes the first state there."""
    make = partial(create, optimizer=optimizer, strategy=strategy, ema=ema)
    center = replica.replicate((params, model_state), devices)
    return _on_replicas(make, center, (None, None), axes(strategy), devices)


def go_over(state: TrainState, before: Strategy, after: Strategy, devices: Sequence[jax.Device]) -> TrainState:
    """Goes over from one strategy's state to another's; the optimizer's state goes along."""

    def begin(state: TrainState) -> TrainState:
        _, opt_state = state.opt_state
        return state._replace(
            opt_state=(after.inner.init(state.params), opt_state),
            reduce_state=after.reduce.init(state.params),
            outer_state=after.outer.init(state.params),
        )

    return _on_replicas(begin, (state,), (axes(before),), axes(after), devices)


def _on_replicas(
    make: Callable[..., TrainState],
    arguments: tuple[PyTree, ...],
    in_axes: tuple[PyTree, ...],
    out_axes: TrainState,
    devices: Sequence[jax.Device],
) -> TrainState:
    """Makes a state of which no two leaves share the memory that is to be donated with them."""
    rows = replica.shard(np.arange(len(devices)), devices)  # pmap insists on an argument with a row for each replica
    made = replica.parallel(lambda _, *rest: make(*rest), devices, (0, *in_axes), out_axes)(rows, *arguments)
    return _copied(made)


@jax.jit
def _copied(state: TrainState) -> TrainState:
    return jax.tree.map(jnp.copy, state)
