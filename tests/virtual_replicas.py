"""Replicas under vmap, on one device, where a missing reduction is an error."""

from functools import partial

import jax
import optax
from jax import numpy as jnp

from ctde_jax.devices import replica
from ctde_jax.rounds import state

REPLICAS, FEATURES = 4, 5
OPTIMIZER = optax.sgd(0.05, momentum=0.9)


def initial_state(
    model, strategy, key, optimizer=OPTIMIZER, replicas=REPLICAS, ema=False
) -> state.TrainState:
    """Returns the initial state of virtual replicas."""
    create = partial(state.create, optimizer=optimizer, strategy=strategy, ema=ema)
    on_replicas = jax.vmap(
        create,
        in_axes=None,
        out_axes=state.axes(strategy),
        axis_name=replica.AXIS,
        axis_size=replicas,
    )
    return on_replicas(*model.init(key, jnp.zeros((1, FEATURES))))


def under_vmap(function, strategy):
    """Runs per-replica code under vmap over the rows, where a missing reduction is an error."""
    axes = state.axes(strategy)
    return jax.jit(
        jax.vmap(
            function, in_axes=(axes, None, 0, None), out_axes=(axes, 0), axis_name=replica.AXIS
        )
    )
