"""The replica axis: where arrays live, and the one function that runs code on every device.

What is equal on all devices is *replicated* (axis `None`); what is a device's own is *sharded* along a leading axis of
one row per replica (axis 0). Code inside `parallel` sees its own row, and talks to the other replicas by the
collectives of `jax.lax` over `AXIS`. The same code runs under `jax.vmap(..., axis_name=AXIS)`, where a forgotten
reduction is an error instead of a silent use of the first device's value; that is how it is tested.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

AXIS = "replica"

SHARD = "shard"
"""The axis of the shards that a replica cuts its batch into; see `gradient.py`."""

_SMALL = 2**14  # numbers
PyTree: TypeAlias = Any
"""Any nesting of containers with arrays at its leaves."""


def parallel(
    function: Callable[..., PyTree],
    devices: Sequence[jax.Device],
    in_axes: tuple[PyTree, ...],
    out_axes: PyTree,
    donate: tuple[int, ...] = (),
) -> jax.stages.Wrapped:
    """Runs a per-replica function on every device at once.

    Args:
        function: Sees one replica's part of every argument.
        devices: One replica on each.
        in_axes: A prefix of the arguments: `None` for what is replicated, 0 for what has a row per replica.
        out_axes: The same for the results. A result under `None` must be equal on all replicas.
        donate: Positions of the arguments whose memory the results may take over.
    """
    return jax.pmap(
        function, axis_name=AXIS, in_axes=in_axes, out_axes=out_axes, devices=devices, donate_argnums=donate
    )


def compiled(lowered: jax.stages.Lowered, devices: Sequence[jax.Device]) -> jax.stages.Compiled:
    """Compiles what `parallel` has made, lowered for its arguments.

    Several fake devices take one thread each, for they share the cores; one alone takes all of them.
    """
    share_cores = devices[0].platform == "cpu" and len(devices) > 1
    options: dict[str, str | bool] | None = {"xla_cpu_multi_thread_eigen": False} if share_cores else None
    return lowered.compile(compiler_options=options)


def replicate(tree: PyTree, devices: Sequence[jax.Device]) -> PyTree:
    """Puts a tree onto every device, where it may share memory with the original: it is not to be donated."""
    return _put(tree, devices, PartitionSpec())


def shard(tree: PyTree, devices: Sequence[jax.Device]) -> PyTree:
    """Puts onto every device its own row of each array `[replica, ...]`, which is not to be donated either."""
    return _put(tree, devices, PartitionSpec(AXIS))


def add_up(tree: PyTree) -> PyTree:
    """Sums float32 arrays over the replicas, in one all-reduce.

    A replica that is alone copies nothing. Small arrays travel in one piece, as fake devices meet once for every piece.
    """
    if lax.axis_size(AXIS) == 1:
        return tree
    leaves, structure = jax.tree.flatten(tree)
    small = [leaf for leaf in leaves if leaf.size <= _SMALL]
    large = [leaf for leaf in leaves if leaf.size > _SMALL]
    together, large = lax.psum((jnp.concatenate([jnp.ravel(leaf) for leaf in [*small, jnp.zeros(0)]]), large), AXIS)
    parts, wholes = iter(jnp.split(together, np.cumsum([leaf.size for leaf in small]))), iter(large)
    return structure.unflatten(
        next(parts).reshape(leaf.shape) if leaf.size <= _SMALL else next(wholes) for leaf in leaves
    )


def weighted_mean(tree: PyTree, weight: jax.typing.ArrayLike, axis: str = AXIS) -> PyTree:
    """Averages over the replicas, or the shards of one, each counted as often as its weight says.

    Who has no weight does not count at all, not even with a NaN; where nobody has weight the mean is zero. Counters and
    other integers, which have no mean, become the largest of all.
    """
    weight, leaves, structure = jnp.asarray(weight, jnp.float32), *jax.tree.flatten(tree)
    floats = [leaf for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.floating)]
    if axis == AXIS and lax.axis_size(AXIS) == 1:
        means = iter([jnp.where(weight > 0, leaf, 0) for leaf in floats])
    else:
        weighted = [jnp.where(weight > 0, leaf * weight, 0) for leaf in floats]
        sums, total = add_up((weighted, weight)) if axis == AXIS else lax.psum((weighted, weight), axis)
        means = iter([x / jnp.where(total > 0, total, 1) for x in sums])
    return structure.unflatten(
        next(means).astype(leaf.dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else lax.pmax(leaf, axis)
        for leaf in leaves
    )


def _put(tree: PyTree, devices: Sequence[jax.Device], spec: PartitionSpec) -> PyTree:
    return jax.device_put(tree, NamedSharding(Mesh(np.asarray(devices), (AXIS,)), spec))
