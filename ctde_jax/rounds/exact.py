"""Exact rounds, which compute the same bits on 1, 2, 4 and 8 fake CPU devices.

This is the third kind of round, besides synchronous and local ones. A batch is always cut into 8
shards. Every replica gathers the gradients of all shards and sums them in the same order. XLA must
compile each part in the same way for any number of devices. The barriers, loops and conditionals
below achieve this; `replica.compiled(exact=True)` also turns off multi-threaded Eigen and the
algebraic simplifier.
"""

from collections.abc import Callable
from functools import partial

import jax
from jax import lax
from jax import numpy as jnp
from jaxtyping import Array, Int32, Key

from ctde_jax.data import Augment, Split
from ctde_jax.devices import AXIS, PyTree, is_changed, largest
from ctde_jax.errors import InputError
from ctde_jax.models import Model, Task, fine_tuning
from ctde_jax.rounds.gradient import (
    SHARDS,
    Gradient,
    StepIndices,
    cut_into_shards,
    make_on_shard,
    step_keys,
    uses_replica_collectives,
)
from ctde_jax.rounds.state import TrainState
from ctde_jax.rounds.sums import StepSums, mean_objective, of_the_first, with_measurements

Advance = Callable[[TrainState, Split, StepIndices, Key[Array, ""]], tuple[TrainState, StepSums]]
"""`advance(state, split, batches, key) -> (state, sums over the replica's examples)`"""

Step = Callable[..., TrainState]
"""`step(state, grads, value=value) -> state` applies the optimizer.

`value() -> float32[]` is the mean objective.
"""


def check_sizes(replicas: int, batch_size: int, accumulation_steps: int) -> None:
    """Checks the sizes of an exact training.

    Raises:
        InputError: If the number of replicas does not divide the 8 shards, the global batch size is
            not a multiple of 8, or there is more than one accumulation step.
    """
    if SHARDS % replicas:
        raise InputError(
            "devices", f"must divide the {SHARDS} shards of exact training, got {replicas}."
        )
    if batch_size % SHARDS:
        raise InputError(
            "batch_size",
            f"must be a multiple of the {SHARDS} shards of exact training, got {batch_size}.",
        )
    if accumulation_steps > 1:
        raise InputError(
            "accumulation_steps",
            "must be 1 in exact training, which computes the shards one after another, got "
            f"{accumulation_steps}.",
        )


def check_model(
    model: Model, params: PyTree, model_state: PyTree, inputs: jax.typing.ArrayLike
) -> None:
    """Raises InputError if the model uses collectives over the replicas in training.

    Synchronized batch normalization does. Only shapes and dtypes are read.
    """
    if uses_replica_collectives(
        model, params, model_state, jax.ShapeDtypeStruct(jnp.shape(inputs), jnp.result_type(inputs))
    ):
        raise InputError(
            "exact",
            'requires --batch-statistics averaged, or batch_statistics="averaged" in '
            "models.from_nnx, models.from_linen or models.resnet.",
        )


def make_exact(gradient: Gradient, step: Step) -> Advance:
    """Makes the exact round: one optimizer step with the gradient over all shards, no reducer.

    Args:
        gradient: Gradient function, made by `make_exact_gradient`.
        step: Function that applies the optimizer to the state.
    """

    def exact(
        state: TrainState,
        split: Split,
        batches: Int32[Array, "1 per_replica"],
        key: Key[Array, ""],
    ):
        # The gradient is already that of all replicas, so the reducer is not used.
        (indices,) = batches
        _, gradient_key = step_keys(key, state.step)
        grads, model_state, sums = gradient(
            state.params,
            state.model_state,
            split,
            indices,
            gradient_key,
            frozen=state.frozen,
        )

        # Every replica takes the same step, compiled separately from the gradient.
        state = state._replace(model_state=model_state)
        exact_step = partial(step, value=partial(mean_objective, sums))
        state = _compiled_apart(exact_step, sums["examples"] > 0, state, grads, otherwise=state)

        # Every replica has the sums over all examples; only the first one reports them.
        sums = of_the_first(with_measurements(sums, state.opt_state))
        return state, jax.tree.map(lambda x: x[None], sums)

    return exact


def make_exact_gradient(model: Model, task: Task, augment: Augment | None) -> Gradient:
    """Makes the gradient function of the global batch, with the same bits on any number of devices.

    A batch is always cut into `SHARDS` shards, and each replica computes its shards one after
    another. Then every replica gathers the gradients of all shards and sums them pairwise, in an
    order that never changes. The returned sums are also over the examples of all replicas. Batch
    statistics are those of a shard.

    Each of `R` replicas sends the gradients of its shards to all others: `8 (R - 1) / R * 4 n`
    bytes for `n` float32 parameters.

    Args:
        model: Model to train.
        task: Task that defines the loss and the metrics.
        augment: Augmentation of each training example, with a different key for each.
    """

    def gradient(params, model_state, split, indices, key, frozen=()):
        check_model(fine_tuning.merged(model, frozen), params, model_state, split.inputs[:1])

        # The shards of this replica, int32[shards, per_shard].
        (examples,), (numbers,) = cut_into_shards(indices, 1, SHARDS)

        def of_shard(shard):
            # Barriers keep XLA from rewriting this together with code that depends on the number of
            # devices.
            (examples, number), params, start, kept = lax.optimization_barrier((shard, *center))
            on_shard = make_on_shard(fine_tuning.merged(model, kept), task, augment)

            def objective(params):
                total, new_model_state, sums = on_shard(examples, number, params, start, split, key)
                return total, (new_model_state, sums)

            grads, (new_model_state, sums) = jax.grad(objective, has_aux=True)(params)
            return lax.optimization_barrier((grads, new_model_state, sums))

        # Compute the shards of this replica, and gather those of all: `[SHARDS, ...]`.
        center = (params, model_state, frozen)
        grads, states, sums = _of_all_shards(
            _one_after_another(of_shard, (examples, numbers), jnp.any(indices >= 0))
        )

        # Sum over the shards in a fixed order, and divide once.
        weights = sums["examples"]
        sums = jax.tree.map(_sum_in_order, sums)
        total = jnp.maximum(sums["examples"], 1)

        def mean_state(shards: jax.Array, before: jax.Array) -> jax.Array:
            # As in `replica.agreed_state`: an element that no shard has changed keeps its bits,
            # other floats become the mean weighted by examples, and integers, booleans and keys the
            # maximum.
            each = jnp.expand_dims(weights, range(1, shards.ndim))
            if jnp.issubdtype(shards.dtype, jnp.inexact):
                weighted = lax.optimization_barrier(jnp.where(each > 0, shards * each, 0))
                mean = (_sum_in_order(weighted) / total).astype(shards.dtype)
                return jnp.where(
                    jnp.any((each > 0) & is_changed(shards, before[None]), axis=0), mean, before
                )
            return jnp.where(sums["examples"] > 0, largest(shards, each > 0), before)

        agreed = (
            jax.tree.map(lambda x: _sum_in_order(x) / total, grads),
            jax.tree.map(mean_state, states, model_state),
        )
        return lax.optimization_barrier((*agreed, sums))

    return gradient


def _one_after_another(
    function: Callable[[PyTree], PyTree], arguments: PyTree, is_wanted: jax.Array
) -> PyTree:
    """Maps a function over axis 0 of the arguments in a loop; returns zeros unless `is_wanted`.

    The trip count depends on `is_wanted`, so it is not known at compile time, and XLA compiles the
    function in the same way for one iteration and for eight.
    """
    count = len(jax.tree.leaves(arguments)[0])

    def of(number: jax.Array) -> PyTree:
        return function(jax.tree.map(lambda x: x[number], arguments))

    def add(number: jax.Array, so_far: PyTree) -> PyTree:
        return jax.tree.map(
            lambda all_results, one: all_results.at[number].set(one), so_far, of(number)
        )

    # Results are collected in arrays with the shapes of an abstract call.
    empty = jax.tree.map(
        lambda like: jnp.zeros((count, *like.shape), like.dtype), jax.eval_shape(of, jnp.int32(0))
    )
    return lax.fori_loop(0, jnp.where(is_wanted, count, 0), add, empty)


def _compiled_apart(
    function: Callable[..., PyTree], has_examples: jax.Array, *arguments: PyTree, otherwise: PyTree
) -> PyTree:
    """Returns `function(*arguments)` if `has_examples`, otherwise `otherwise`.

    The condition is not known at compile time, so XLA compiles the function separately from the
    surrounding code, which depends on the number of devices. Compiled together, the results could
    be rounded differently: XLA:CPU may fuse a product and a sum in the same kernel into one
    operation. (It removes optimization barriers before it forms kernels.)
    """
    return lax.cond(has_examples, function, lambda *_: otherwise, *arguments)


def _of_all_shards(local: PyTree) -> PyTree:
    """Gathers the results of all replicas' shards, `[SHARDS, ...]`, in the order of the shards."""
    if lax.axis_size(AXIS) == 1:
        return local
    # Replica r has the shards r, r + R, r + 2 R and so on.
    by_replica = lax.all_gather(local, AXIS)
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(SHARDS, *x.shape[2:]), by_replica)


def _sum_in_order(shards: jax.Array) -> jax.Array:
    """Sums over axis 0, whose length is a power of 2, pairwise."""
    while len(shards) > 1:
        shards = shards[0::2] + shards[1::2]
    return shards[0]
