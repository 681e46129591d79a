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
from jax.sharding import Mesh, NamedSharding, PartitionSpec

AXIS = "replica"

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
    """Copies a tree onto every device."""
    return jax.device_put(tree, _sharding(devices, PartitionSpec()), may_alias=False)


def shard(tree: PyTree, devices: Sequence[jax.Device]) -> PyTree:
    """Gives every device its own row of each array `[replica, ...]`."""
    return jax.device_put(tree, _sharding(devices, PartitionSpec(AXIS)), may_alias=False)


def _sharding(devices: Sequence[jax.Device], spec: PartitionSpec) -> NamedSharding:
    return NamedSharding(Mesh(np.asarray(devices), (AXIS,)), spec)
