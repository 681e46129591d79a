"""The gradient of the mean loss over a replica's examples, which are cut into shards.

If a model draws random numbers, a batch is cut into *shards*, each with a different key, so dropout
masks do not depend on the number of devices. The shards of a replica are computed at once, or in
*groups* (microbatches) one after another.

All random numbers of a run follow from its seed, the number of the step (from 0, counted over the
whole run, local steps included), the number of the shard and the number of the example:

    init_key, train_key = split(key(seed))
    reduce_key, gradient_key = split(fold_in(train_key, step))
    augment_key, model_key = split(gradient_key)
    key of the model on a shard = fold_in(model_key, shard)
    key of an example's augmentation = fold_in(augment_key, its index in the training split)

A reducer receives the `reduce_key` of the first step of its round. Of `S` shards, shard `s` has the
examples whose position in the global batch is `s` modulo `S`; of `R` replicas, replica `r` has the
shards that are `r` modulo `R`. `S` is 8 if the model draws random numbers, or synchronizes batch
statistics and `accumulation_steps > 1`; otherwise it is 1. It is raised to the least common
multiple with `R * accumulation_steps`, so that all replicas and groups have the same number of
shards. If the batch size is not a multiple of that, `S` is `R * accumulation_steps`.

`from_nnx` and `from_linen` document how the RNG streams of a module follow from the key of a shard.
"""

from collections.abc import Callable
from math import lcm
from typing import NamedTuple, TypeAlias

import jax
import optax
from jax import lax
from jax import numpy as jnp
from jax.extend.core import ClosedJaxpr  # pyright: ignore[reportPrivateImportUsage]
from jaxtyping import Array, Float32, Int32, Key, Shaped

from ctde_jax.aggregate import depends_on
from ctde_jax.data import Augment, Drawn, TrainingSplit, apply_to
from ctde_jax.devices import AXIS, SHARD, PyTree, agreed_state, weighted_mean
from ctde_jax.models import Model, Task, fine_tuning
from ctde_jax.rounds.sums import Sums, of_the_first

SHARDS = 8
"""Number of shards of a batch, if the model draws random numbers and the batch size allows it.

Otherwise there is one shard for each replica and group; see the module's docstring.
"""

StepIndices: TypeAlias = Int32[Array, "steps per_replica"]
"""Examples of a replica in each step, as indices into its split; negative for padding."""


class Place(NamedTuple):
    """The place of the replicas of one node among those of all nodes; see `nodes`."""

    node: int = 0
    """Index of the node."""

    nodes: int = 1
    """Number of nodes, each with the same number of replicas."""


Gradient = Callable[..., tuple[PyTree, PyTree, Sums]]
"""`gradient(params, model_state, split, indices, key, ...) -> (grads, model_state, sums)`

The gradient is that of `params`; `frozen` contains the parameters that are not trained, see
`models.fine_tuning`.

`indices` is `int32[per_replica]`, negative for padding; the key is the same on all replicas. The
sums are over the replica's examples. If `alone` is True, as in local steps, a model with a state
uses no collectives, so its batch statistics are those of the replica's examples. If `merges` is
True, the gradient is that of the mean over the examples of all replicas; `vmap` then computes it at
once for a model without state, and all sums are those of the first replica.

If the losses of other replicas depend on a replica's examples, as through synchronized batch
statistics, its gradient includes these losses. Only the mean over the replicas, weighted by
examples, is then the gradient of the mean loss.
"""


def make_gradient(
    model: Model,
    task: Task,
    augment: Augment | None = None,
    accumulation_steps: int = 1,
    place: Place = Place(),
) -> Gradient:
    """Makes the gradient function of the mean objective over a replica's examples.

    Args:
        model: Model to train.
        task: Task that defines the loss and the metrics.
        augment: Augmentation of each training example, with a different key for each.
        accumulation_steps: Number of microbatches for gradient accumulation. The gradient is that
            of all of them together; activations take the memory of one.
        place: Place of these replicas among those of all nodes.
    """

    def gradient(params, model_state, split, indices, key, alone=False, merges=False, frozen=()):
        network = fine_tuning.merged(model, frozen)

        # Trace the model on a microbatch: does it use collectives, does it draw random numbers?
        size = len(indices) // accumulation_steps
        inputs = jax.ShapeDtypeStruct((size, *split.inputs.shape[1:]), split.inputs.dtype)
        uses_collectives = uses_replica_collectives(network, params, model_state, inputs)
        is_random = draws(network, params, model_state, inputs)

        # Products of the whole batch take less time than those of each replica and their sum. Under
        # `vmap`, gathered indices are not mapped; position p of the batch is of replica p modulo R.
        merges_examples = merges and not uses_collectives and not jax.tree.leaves(model_state)
        if merges_examples:
            indices = lax.all_gather(indices, AXIS, axis=1).ravel()

        # Cut the examples: int32[accumulation_steps, shards, per_shard]. Without random numbers,
        # shards only determine which examples form a group; each group is computed as one shard.
        examples, shards = cut_into_shards(
            indices,
            accumulation_steps,
            SHARDS if is_random or (uses_collectives and accumulation_steps > 1) else 1,
            is_global=merges_examples,
            place=place,
        )
        if not is_random:
            examples = examples.reshape(accumulation_steps, 1, -1)
            shards = shards[:, :1]
        local_examples = jnp.maximum(jnp.sum(indices >= 0, dtype=jnp.float32), 1)

        # Alone, a model that synchronizes batch statistics uses those of this replica.
        keeps_statistics = uses_collectives and bool(jax.tree.leaves(model_state))
        on_shard = make_on_shard(
            _alone(network) if alone and keeps_statistics else network, task, augment
        )

        # The transpose of a `psum` sums the cotangents of all replicas. So if the losses of other
        # replicas depend on these examples, all replicas first divide by the same number, and only
        # after differentiation by the number of their examples.
        is_shared = uses_collectives and not alone and lax.axis_size(AXIS) > 1
        divisor = len(indices) if is_shared else local_examples

        def add_group(so_far, group):
            grads, model_state, sums = so_far
            examples, shards = group

            def objective(params):
                total, new_model_state, group_sums = _on_shards(
                    on_shard, examples, shards, params, model_state, split, key
                )
                return total / divisor, (new_model_state, group_sums)

            group_grads, (new_model_state, group_sums) = jax.grad(objective, has_aux=True)(params)

            # A group without examples does not change the state. If replicas share statistics, a
            # group without examples on this replica still changes it, by those of other replicas.
            examples = group_sums["examples"]
            if is_shared and accumulation_steps > 1:
                examples = lax.psum(examples, AXIS)
            model_state = optax.tree.where(examples > 0, new_model_state, model_state)
            return (
                optax.tree.add(grads, group_grads),
                model_state,
                optax.tree.add(sums, group_sums),
            ), None

        # Accumulate over the groups; the gradient and the sums add up.
        start = (optax.tree.zeros_like(params), model_state, _no_sums(task, split))
        (grads, model_state, sums), _ = lax.scan(add_group, start, (examples, shards))
        if is_shared:
            grads = optax.tree.scale(divisor / local_examples, grads)

        # All replicas have the sums of all examples, which must count once.
        if merges_examples:
            sums = of_the_first(sums)
        elif merges:
            grads = weighted_mean(grads, sums["examples"])
        return grads, model_state, sums

    return gradient


def _on_shards(
    on_shard,
    indices: Int32[Array, "shards per_shard"],
    shards: Int32[Array, " shards"],
    params,
    model_state,
    *common,
) -> tuple[Float32[Array, ""], PyTree, Sums]:
    """Sums the objective and the results of a group's shards, which are computed at once."""
    # A mapped axis of size 1 would make XLA transpose.
    if len(shards) == 1:
        return on_shard(indices[0], shards[0], params, model_state, *common)

    def on_each(indices, shard) -> tuple[Float32[Array, ""], PyTree, Sums]:
        objective, new_model_state, sums = on_shard(indices, shard, params, model_state, *common)
        new_model_state = agreed_state(new_model_state, model_state, sums["examples"], SHARD)
        return lax.psum(objective, SHARD), new_model_state, lax.psum(sums, SHARD)

    return jax.vmap(on_each, out_axes=None, axis_name=SHARD)(indices, shards)


def step_keys(key: Key[Array, ""], step: Int32[Array, ""]) -> tuple[Key[Array, ""], Key[Array, ""]]:
    """Returns the keys of a step for the reducer and for the gradient, equal on all replicas."""
    reduce_key, gradient_key = jax.random.split(jax.random.fold_in(key, step))
    return reduce_key, gradient_key


def draws(model: Model, params: PyTree, model_state: PyTree, inputs: jax.ShapeDtypeStruct) -> bool:
    """Returns whether outputs or new state of `model.apply` in training depend on its PRNG key.

    The model is only traced.
    """
    program = _in_training(model, params, model_state, inputs)
    return depends_on(program, program.jaxpr.invars[-1:])


def uses_replica_collectives(
    model: Model, params: PyTree, model_state: PyTree, inputs: jax.ShapeDtypeStruct
) -> bool:
    """Returns whether `model.apply` in training uses collectives over the replica axis.

    Synchronized batch normalization does. The model is only traced.
    """
    program = _in_training(model, params, model_state, inputs)
    return any(getattr(effect, "name", None) == AXIS for effect in program.jaxpr.effects)


def _in_training(
    model: Model, params: PyTree, model_state: PyTree, inputs: jax.ShapeDtypeStruct
) -> ClosedJaxpr:
    """Traces `model.apply` in training mode; the key is the last input of the jaxpr."""
    key = jax.eval_shape(jax.random.key, 0)
    # The axis is bound, so that collectives over the replicas can be traced.
    return jax.make_jaxpr(model.apply, axis_env=[(AXIS, 1)])(params, model_state, inputs, key)


def make_on_shard(
    model: Model, task: Task, augment: Augment | None
) -> Callable[..., tuple[Float32[Array, ""], PyTree, Sums]]:
    """Makes the function that applies the model to one shard and sums over its examples.

    Returns:
        `on_shard(indices, shard, params, model_state, split, key)`, which returns the sum of the
        objective, the new model state, and the `Sums`. `shard` is the number of the shard, and
        `indices` are its examples, `int32[per_shard]`, negative for padding.
    """

    def on_shard(
        indices: Int32[Array, " per_shard"],
        shard: Int32[Array, ""],
        params,
        model_state,
        split,
        key: Key[Array, ""],
    ) -> tuple[Float32[Array, ""], PyTree, Sums]:
        # A negative index ~i is padding: example i is computed and masked.
        is_example = indices >= 0
        rows = jnp.where(is_example, indices, ~indices)
        inputs = _take(split.inputs, rows)
        labels = _take(split.labels, rows)
        weights = None if split.weights is None else _take(split.weights, rows)

        # Augment by the index of each example in the training split (of a stream, in its batch).
        augment_key, model_key = jax.random.split(key)
        if augment is not None:
            inputs = apply_to(
                augment,
                augment_key,
                inputs,
                split.numbers[rows] if isinstance(split, Drawn) else rows,
            )

        # Apply the model; only one that has a state receives the mask.
        mask = (is_example,) if jax.tree.leaves(model_state) else ()
        outputs, model_state = model.apply(
            params, model_state, inputs, jax.random.fold_in(model_key, shard), *mask
        )

        # Sums and not means, because shards and replicas may have different numbers of examples.
        measured = {
            **task.measure(outputs, labels),
            "examples": jnp.ones(len(indices), jnp.float32),
        }
        sums = {name: jnp.sum(values, where=is_example) for name, values in measured.items()}
        minimized = task.minimized(outputs, labels, measured)
        if weights is not None:
            minimized *= weights
        objective = jnp.sum(minimized, where=is_example)
        if _minimizes_another(task, split):
            sums["objective"] = objective
        return objective, model_state, sums

    return on_shard


def _no_sums(task: Task, split: TrainingSplit | Drawn) -> Sums:
    """Returns the sums over no examples."""
    objective_too = ["objective"] if _minimizes_another(task, split) else []
    return {name: jnp.float32(0) for name in (*task.summed, "examples", *objective_too)}


def _minimizes_another(task: Task, split: TrainingSplit | Drawn) -> bool:
    """Returns whether another function than the reported loss is minimized."""
    return task.objective is not None or split.weights is not None


def _alone(model: Model) -> Model:
    """Returns a model whose collectives span only one replica."""
    return model._replace(
        apply=jax.vmap(model.apply, in_axes=None, out_axes=None, axis_name=AXIS, axis_size=1)
    )


def _take(
    array: Shaped[Array, "examples ..."], rows: Int32[Array, " rows"]
) -> Shaped[Array, "rows ..."]:
    """Takes rows of an array, without a check of bounds.

    The array is flattened to two axes, so that XLA needs no division to locate each element.
    """
    flat = array.reshape(len(array), -1).at[rows].get(mode="promise_in_bounds")
    return flat.reshape(len(rows), *array.shape[1:])


def cut_into_shards(
    indices: Int32[Array, " examples"],
    groups: int,
    wanted: int,
    is_global: bool = False,
    place: Place = Place(),
) -> tuple[Int32[Array, "groups shards per_shard"], Int32[Array, "groups shards"]]:
    """Cuts a replica's examples into shards; replica r of R gets the shards r, r + R and so on.

    The number of shards of the global batch is the least common multiple of `wanted` and
    `replicas * groups`, or `replicas * groups` if the batch size is not a multiple of that.

    Args:
        indices: Examples of the replica, or of the global batch.
        groups: Number of groups (microbatches).
        wanted: Desired number of shards of the global batch.
        is_global: Whether `indices` are the global batch.
        place: Place of these replicas among those of all nodes.

    Returns:
        The examples and the numbers of this replica's shards, or of all shards.
    """
    local_replicas = lax.axis_size(AXIS)
    replicas = local_replicas * place.nodes
    shards = lcm(wanted, replicas * groups)
    owners = 1 if is_global else replicas
    if len(indices) * owners % shards:
        shards = replicas * groups
    local_shards = shards // owners
    first = 0 if is_global else place.node * local_replicas + lax.axis_index(AXIS)
    numbers = jnp.arange(local_shards) * owners + first
    examples = indices.reshape(-1, local_shards).T
    return (
        examples.reshape(groups, local_shards // groups, -1),
        numbers.reshape(groups, -1),
    )
