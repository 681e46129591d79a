"""A replica's own gradient: of the mean loss over its examples, cut into shards that know nothing of devices.

Where a model draws random numbers, a batch is cut into *shards*, and they are drawn for each shard from (seed, step,
shard): so the number of devices changes no dropout mask. The shards of a replica are computed at once, or in groups one
after another.

The rule, for a plain loop that has to draw the same numbers: shard `s` has the examples `batch[s::SHARDS]` of the
global batch, and the model's key

    train_key = jax.random.split(jax.random.key(seed))[1]
    step_key = jax.random.split(jax.random.fold_in(train_key, step))[1]
    shard_key = jax.random.fold_in(jax.random.split(step_key)[1], shard)

`from_nnx` and `from_linen` state how a module's random streams follow from it.
"""

from collections.abc import Callable
from math import lcm

import jax
import optax
from jax import lax
from jax import numpy as jnp

from ctde_jax.augment import Augment, apply_to
from ctde_jax.data import Drawn, Split
from ctde_jax.models import Model
from ctde_jax.replica import AXIS, SHARD, PyTree, weighted_mean
from ctde_jax.tasks import Task
from ctde_jax.transformations import depends_on

SHARDS = 8
"""A batch is cut into so many shards where the model draws random numbers, and devices, groups and batch size allow;
else into one for each device and group."""

Sums = dict[str, jax.Array]
"""Over examples: `loss`, each metric, their number `examples`, and `objective` if that is not the loss; float32."""

Gradient = Callable[[PyTree, PyTree, Split, jax.Array, jax.Array], tuple[PyTree, PyTree, Sums]]
"""`gradient(params, model_state, split, indices, key) -> (grads, model_state, sums over the replica's own examples)`

`indices` is `int32[per_replica]`, negative where there is no example; the key is the same on all replicas.
"""


def make_gradient(
    model: Model, task: Task, augment: Augment | None = None, accumulate: int = 1, exact: bool = False
) -> Gradient:
    """Makes the function that differentiates the mean loss over a replica's examples.

    Args:
        model: What is trained.
        task: What for.
        augment: Changes each training example, by a key of its own, before the model sees it.
        accumulate: Groups that a replica's examples are computed in, one after another. The gradient is that of all
            of them together; the memory that activations take is that of one group.
        exact: Whether to differentiate the mean loss over the examples of all replicas instead, to the same bits on any
            number of them.
    """
    if exact:
        return _make_exact_gradient(model, task, augment)
    on_shard = _make_on_shard(model, task, augment)

    def on_shards(indices, shards, *common) -> tuple[jax.Array, PyTree, Sums]:
        if len(shards) == 1:  # an axis of one shard would make XLA transpose
            return on_shard(indices[0], shards[0], *common)

        def on_each(indices, shard) -> tuple[jax.Array, PyTree, Sums]:
            objective, model_state, sums = on_shard(indices, shard, *common)
            model_state = weighted_mean(model_state, sums["examples"], SHARD)
            return lax.psum(objective, SHARD), model_state, lax.psum(sums, SHARD)

        return jax.vmap(on_each, out_axes=None, axis_name=SHARD)(indices, shards)

    def gradient(params, model_state, split, indices, key):
        inputs = jax.ShapeDtypeStruct((len(indices) // accumulate, *split.inputs.shape[1:]), split.inputs.dtype)
        shards = SHARDS if draws(model, params, model_state, inputs) else 1
        own_examples = jnp.maximum(jnp.sum(indices >= 0, dtype=jnp.float32), 1)

        def add_group(so_far, group):
            grads, model_state, sums = so_far
            examples, shards = group

            def objective(params):
                total, new_model_state, group_sums = on_shards(examples, shards, params, model_state, split, key)
                return total / own_examples, (new_model_state, group_sums)

            group_grads, (new_model_state, group_sums) = jax.grad(objective, has_aux=True)(params)
            model_state = optax.tree.where(group_sums["examples"] > 0, new_model_state, model_state)
            return (optax.tree.add(grads, group_grads), model_state, optax.tree.add(sums, group_sums)), None

        objective_too = [] if task.objective is None else ["objective"]
        zeros = dict.fromkeys(["loss", *task.metrics, "examples", *objective_too], jnp.float32(0))
        start = (optax.tree.zeros_like(params), model_state, zeros)
        (grads, model_state, sums), _ = lax.scan(add_group, start, _cut(indices, accumulate, shards))
        return grads, model_state, sums

    return gradient


def compiled_apart(
    function: Callable[..., PyTree], has_examples: jax.Array, *arguments: PyTree, otherwise: PyTree
) -> PyTree:
    """Calls a function where there are examples, and returns something like its result where there are none.

    The compiler, which cannot know where, compiles the function apart from what stands around it, and that differs with
    the number of devices. Together they would be rounded otherwise: of a product and a sum that meet in one kernel a
    CPU makes one operation. (For CPUs, XLA takes optimization barriers away before it makes kernels.)
    """
    return lax.cond(has_examples, function, lambda *_: otherwise, *arguments)


def draws(model: Model, params: PyTree, model_state: PyTree, inputs: jax.ShapeDtypeStruct) -> bool:
    """Says whether anything that the model returns in training depends on its key."""
    key = jax.eval_shape(jax.random.key, 0)
    program = jax.make_jaxpr(model.apply)(params, model_state, inputs, key)
    return depends_on(program, program.jaxpr.invars[-1:])


def _make_on_shard(model: Model, task: Task, augment: Augment | None) -> Callable[..., tuple[jax.Array, PyTree, Sums]]:
    """Makes the function that sums what is minimized, and all that is measured, over a shard."""

    def on_shard(indices, shard, params, model_state, split, key) -> tuple[jax.Array, PyTree, Sums]:
        is_example = indices >= 0
        rows = jnp.where(is_example, indices, ~indices)
        inputs, labels = _take(split.inputs, rows), _take(split.labels, rows)
        augment_key, model_key = jax.random.split(key)
        if augment is not None:
            inputs = apply_to(augment, augment_key, inputs, split.numbers[rows] if isinstance(split, Drawn) else rows)

        outputs, model_state = model.apply(params, model_state, inputs, jax.random.fold_in(model_key, shard))
        measured = {**task.measure(outputs, labels), "examples": jnp.ones(len(indices), jnp.float32)}
        sums = {name: jnp.sum(values, where=is_example) for name, values in measured.items()}
        objective = jnp.sum(task.minimized(outputs, labels, measured), where=is_example)
        if task.objective is not None:
            sums["objective"] = objective
        return objective, model_state, sums

    return on_shard


def _make_exact_gradient(model: Model, task: Task, augment: Augment | None) -> Gradient:
    """Makes the gradient of the examples of all replicas, whose bits do not depend on how many there are.

    A batch is always cut into `SHARDS` shards, of which a replica computes its own, one after another. Then every
    replica gets the gradients of all and sums them by pairs, so in an order that never changes. The sums over examples
    are those of all replicas, too. Batch statistics are those of a shard.

    Each replica sends its shards' gradients to all others: `8 (R - 1) / R * 4 n` bytes for n numbers.
    """
    on_shard = _make_on_shard(model, task, augment)

    def gradient(params, model_state, split, indices, key):
        (examples,), (numbers,) = _cut(indices, 1, SHARDS)

        def of_shard(shard):
            # the barriers keep XLA from rewriting this together with what differs on more devices
            (examples, number), params, start = lax.optimization_barrier((shard, *center))

            def objective(params):
                total, new_model_state, sums = on_shard(examples, number, params, start, split, key)
                return total, (new_model_state, sums)

            grads, (new_model_state, sums) = jax.grad(objective, has_aux=True)(params)
            return lax.optimization_barrier((grads, new_model_state, sums))

        center = (params, model_state)
        compute = _alone(of_shard) if jax.tree.leaves(model_state) else of_shard  # alone, nothing is synchronized
        grads, states, sums = _of_all_shards(_one_after_another(compute, (examples, numbers), jnp.any(indices >= 0)))
        weights, sums = sums["examples"], jax.tree.map(_sum_in_order, sums)
        total = jnp.maximum(sums["examples"], 1)

        def mean_state(shards: jax.Array, before: jax.Array) -> jax.Array:
            if jnp.issubdtype(shards.dtype, jnp.inexact):
                each = jnp.expand_dims(weights, range(1, shards.ndim))
                weighted = lax.optimization_barrier(jnp.where(each > 0, shards * each, 0))
                mean = (_sum_in_order(weighted) / total).astype(shards.dtype)
            else:
                mean = shards.max(axis=0)
            return jnp.where(sums["examples"] > 0, mean, before)

        agreed = jax.tree.map(lambda x: _sum_in_order(x) / total, grads), jax.tree.map(mean_state, states, model_state)
        return lax.optimization_barrier((*agreed, sums))

    return gradient


def _one_after_another(function: Callable[[PyTree], PyTree], arguments: PyTree, is_wanted: jax.Array) -> PyTree:
    """Maps a function over the first axis, or returns zeros.

    XLA does not know how often the loop turns, so it compiles the function in the same way for one turn and for eight.
    """
    count = len(jax.tree.leaves(arguments)[0])

    def of(number: jax.Array) -> PyTree:
        return function(jax.tree.map(lambda x: x[number], arguments))

    def add(number: jax.Array, so_far: PyTree) -> PyTree:
        return jax.tree.map(lambda all_results, one: all_results.at[number].set(one), so_far, of(number))

    empty = jax.tree.map(lambda like: jnp.zeros((count, *like.shape), like.dtype), jax.eval_shape(of, jnp.int32(0)))
    return lax.fori_loop(0, jnp.where(is_wanted, count, 0), add, empty)


def _alone(function: Callable[[PyTree], PyTree]) -> Callable[[PyTree], PyTree]:
    """Makes a replica that computes this the only one on its axis."""

    def call(argument: PyTree) -> PyTree:
        own_row = jax.tree.map(lambda x: x[None], argument)
        return jax.tree.map(lambda x: x[0], jax.vmap(function, axis_name=AXIS)(own_row))

    return call


def _of_all_shards(own: PyTree) -> PyTree:
    """Gathers what the replicas have of each of their shards, in the order of their numbers; `[SHARDS, ...]`."""
    if lax.axis_size(AXIS) == 1:
        return own
    by_replica = lax.all_gather(own, AXIS)
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(SHARDS, *x.shape[2:]), by_replica)


def _sum_in_order(shards: jax.Array) -> jax.Array:
    """Sums over the first axis, whose length is a power of 2, by pairs, pairs of pairs, and so on."""
    while len(shards) > 1:
        shards = shards[0::2] + shards[1::2]
    return shards[0]


def _take(array: jax.Array, rows: jax.Array) -> jax.Array:
    """Takes rows of an array `[examples, ...]`.

    As flat ones, for which XLA needs no division to find each number, and without a look whether there are such rows.
    """
    flat = array.reshape(len(array), -1).at[rows].get(mode="promise_in_bounds")
    return flat.reshape(len(rows), *array.shape[1:])


def _cut(indices: jax.Array, groups: int, wanted: int) -> tuple[jax.Array, jax.Array]:
    """Cuts a replica's examples into shards, of which it has every one whose number leaves its own.

    In all there are `wanted` shards, or as few more as give each replica and group as many.

    Returns:
        The examples `int32[groups, shards, per_shard]`, and the numbers of the shards `int32[groups, shards]`.
    """
    replicas = lax.axis_size(AXIS)
    shards = lcm(wanted, replicas * groups)
    if len(indices) * replicas % shards:
        shards = replicas * groups
    own = shards // replicas
    numbers = jnp.arange(own) * replicas + lax.axis_index(AXIS)
    return indices.reshape(-1, own).T.reshape(groups, own // groups, -1), numbers.reshape(groups, -1)
