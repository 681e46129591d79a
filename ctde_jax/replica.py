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


def replicate(tree: PyTree, devices: Sequence[jax.Device]) -> PyTree:
    """Copies a tree onto every device; no copy shares memory with the original or with another leaf."""
    return _put(tree, devices, PartitionSpec())


def shard(tree: PyTree, devices: Sequence[jax.Device]) -> PyTree:
    """Copies to every device its own row of each array `[replica, ...]`."""
    return _put(tree, devices, PartitionSpec(AXIS))


def weighted_mean(tree: PyTree, weight: jax.typing.ArrayLike, axis: str = AXIS) -> PyTree:
    """Averages over the replicas, or the shards of one, each counted as often as its weight says.

    Who has no weight does not count at all, not even with a NaN; where nobody has weight the mean is zero. Counters and
    other integers, which have no mean, become the largest of all.
    """
    total = lax.psum(weight, axis)

    def mean(x: jax.Array) -> jax.Array:
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return lax.pmax(x, axis)
        weighted = jnp.where(jnp.asarray(weight) > 0, x * weight, 0)
        return (lax.psum(weighted, axis) / jnp.where(total > 0, total, 1)).astype(x.dtype)

    return jax.tree.map(mean, tree)


def _put(tree: PyTree, devices: Sequence[jax.Device], spec: PartitionSpec) -> PyTree:
    # device_put shares memory where it can, whatever may_alias says; a donated leaf must not be shared.
    copies = jax.tree.map(lambda x: x.copy() if isinstance(x, np.ndarray) else jnp.copy(x), tree)
    return jax.device_put(copies, NamedSharding(Mesh(np.asarray(devices), (AXIS,)), spec))
