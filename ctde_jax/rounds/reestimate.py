"""Batch statistics of the final parameters, instead of running averages over past parameters."""

from collections.abc import Callable, Sequence

import jax
from jax import lax
from jax import numpy as jnp

from ctde_jax.data import Split
from ctde_jax.devices import SHARD, PyTree, agreed_state, replica
from ctde_jax.models import Model
from ctde_jax.rounds.feed import Feed, Span

Reestimate = Callable[[PyTree, PyTree, Split, jax.Array, jax.Array], PyTree]
"""`reestimate(params, model_state, split, batches, key) -> model_state`

`batches` is `int32[replica, ..., per_replica]`, negative for padding.
"""


def of_first_steps(
    model: Model,
    feed: Feed,
    devices: Sequence[jax.Device],
    split_axis: int | None,
    steps: int,
    key: jax.Array,
) -> Callable[[PyTree, PyTree], PyTree]:
    """Makes the function from central parameters and model state to the state for evaluation.

    That state is estimated over the batches of the first `steps` steps of a run; if `steps` is 0,
    it is left unchanged.
    """
    if not steps:
        return lambda params, model_state: model_state
    with feed([Span(0, steps, steps)]) as pieces:
        examples, indices, _ = next(pieces)
    run = make_reestimate(model, devices, split_axis)
    return lambda params, model_state: run(params, model_state, examples, indices, key)


def make_reestimate(
    model: Model, devices: Sequence[jax.Device], split_axis: int | None
) -> Reestimate:
    """Makes the function that re-estimates batch statistics as their mean over batches.

    This is the precise batch normalization of Wu and Johnson (2021). In a batch with the statistic
    `b`, any module updates a running average `s` to `m s + (1 - m) b`. So two starts, 0 and 1,
    determine both `m` and `b`. Each batch is weighted by its number of examples, and padding does
    not count. State that is not a running average keeps its bits.

    Args:
        model: Any model whose state has running averages.
        devices: Devices, with one replica on each.
        split_axis: None if every device holds the whole split, 0 if each holds one row of it.
    """

    def of_batch(params, model_state, inputs, key, mask) -> PyTree:
        def after(start: float) -> PyTree:
            state = jax.tree.map(
                lambda x: jnp.full_like(x, start) if _is_average(x) else x, model_state
            )
            return model.apply(params, state, inputs, key, mask)[1]

        def statistic(before, from_zero, from_one):
            # From 0 the average becomes (1 - m) b, and from 1, m + (1 - m) b. If m is 1, the batch
            # does not update it.
            kept = from_one - from_zero
            return (
                jnp.where(kept < 0.9999, from_zero / (1 - kept), before)
                if _is_average(before)
                else before
            )

        return jax.tree.map(statistic, model_state, after(0), after(1))

    def reestimate(center, split, batches, key):
        params, model_state = center

        def of_step(indices):
            rows = jnp.where(indices >= 0, indices, ~indices)
            return of_batch(params, model_state, split.inputs[rows], key, indices >= 0)

        # One estimate per batch; each leaf is [batch, ...].
        batches = batches.reshape(-1, batches.shape[-1])
        every_step = lax.map(of_step, batches)
        examples = jnp.sum(batches >= 0, axis=-1)

        # Average over the batches of this replica, then over the replicas, both weighted by
        # examples.
        def merge(new: PyTree, before: PyTree, weight: jax.Array) -> PyTree:
            return agreed_state(new, before, weight, SHARD)

        mean = jax.vmap(merge, in_axes=(0, None, 0), out_axes=None, axis_name=SHARD)
        return agreed_state(mean(every_step, model_state, examples), model_state, jnp.sum(examples))

    mean = replica.parallel(reestimate, devices, in_axes=(None, split_axis, 0, None), out_axes=None)
    run = replica.compiled_once(mean, devices)
    return lambda params, model_state, split, batches, key: run(
        (params, model_state), split, batches, key
    )


def _is_average(x: jax.Array) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating)
