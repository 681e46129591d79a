"""Re-estimation of batch statistics with the current parameters (precise batch normalization).

Running averages, in contrast, include batches that were computed with parameters of earlier steps.
"""

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

`batches` contains indices into `split`, `int32[replica, ..., per_replica]`, negative for padding.
"""


def of_first_steps(
    model: Model,
    feed: Feed,
    devices: Sequence[jax.Device],
    split_axis: int | None,
    steps: int,
    key: jax.Array,
) -> Callable[[PyTree, PyTree], PyTree]:
    """Makes the function that re-estimates batch statistics over the first batches of a run.

    Args:
        model: Model whose state has running averages.
        feed: Feed of the training examples of the run.
        devices: Devices, with one replica on each.
        split_axis: None if every device holds the whole split, 0 if each holds one row of it.
        steps: Number of steps whose batches are used; 0 leaves the model state unchanged.
        key: PRNG key for applying the model in training mode, replicated.

    Returns:
        `reestimate(params, model_state) -> model_state`, for replicated arrays.
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
    """Makes the function that replaces running averages by means of batch statistics.

    This is the precise batch normalization of Wu and Johnson (2021). For a batch with the statistic
    `b`, a module of momentum `m` updates a running average `s` to `m s + (1 - m) b`, so its results
    for `s = 0` and `s = 1` determine `m` and `b`. Batches are weighted by their numbers of
    examples, without padding. Every float in the state is treated as a running average. Floats that
    no batch updates, and leaves of all other dtypes, are returned bit for bit.

    Args:
        model: Model whose state has running averages.
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
