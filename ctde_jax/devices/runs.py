"""The run axis: many runs in one program, each with all its replicas on one device.

Arrays that differ between runs have a leading axis with one row for each run. The devices have
equal numbers of consecutive runs, and never communicate. Within a run, the replica axis is that of
`replica.py`, so that the same per-replica functions run here.
"""

from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ctde_jax.devices.replica import AXIS, PyTree, distinct, with_one_row

RUN = "run"


def over_runs(
    function: Callable[..., PyTree],
    devices: Sequence[jax.Device],
    replicas: int,
    in_axes: tuple[PyTree, ...],
    out_axes: PyTree,
    shared: tuple[int, ...] = (),
    donate: tuple[int, ...] = (),
) -> jax.stages.Wrapped:
    """Maps a per-replica function over all replicas of all runs.

    On a CPU, a device computes its runs one after another, as the caches hold the state of one run;
    an accelerator computes them together, by `jax.vmap`. The number of runs must be a multiple of
    the number of devices.

    Args:
        function: Function of one replica's part of every argument.
        devices: Devices over which the runs are divided; repetitions are ignored.
        replicas: Number of replicas of each run.
        in_axes: Prefix tree of the arguments within a run: `None` if replicated, 0 if sharded.
        out_axes: Prefix tree of the results within a run, as `in_axes`. All results have a leading
            run axis.
        shared: Positions of the arguments that are equal in all runs; the others have a leading run
            axis.
        donate: Positions of the arguments whose memory the results may reuse.
    """
    # A single replica needs no mapped axis, only its name, so its arrays stay as in a single run.
    if replicas == 1:
        mesh = Mesh(np.asarray(distinct(devices)).reshape(-1, 1), (RUN, AXIS))
        one_run = with_one_row(function, in_axes, out_axes)
    else:
        mesh = Mesh(np.asarray(distinct(devices)), (RUN,))
        one_run = jax.vmap(function, in_axes, out_axes, axis_name=AXIS, axis_size=replicas)

    def on_device(*arguments: PyTree) -> PyTree:
        def compute(own: Sequence[PyTree]) -> PyTree:
            parts = iter(own)
            return one_run(
                *(
                    argument if place in shared else next(parts)
                    for place, argument in enumerate(arguments)
                )
            )

        own = [part for place, part in enumerate(arguments) if place not in shared]
        compute_all = _one_by_one if devices[0].platform == "cpu" else _together
        return compute_all(compute, own)

    specs = tuple(
        PartitionSpec() if place in shared else PartitionSpec(RUN) for place in range(len(in_axes))
    )
    mapped = jax.shard_map(
        on_device, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(RUN), check_vma=False
    )
    return jax.jit(
        mapped,
        in_shardings=tuple(NamedSharding(mesh, spec) for spec in specs),
        donate_argnums=donate,
    )


def _one_by_one(compute: Callable[[Sequence[PyTree]], PyTree], own: Sequence[PyTree]) -> PyTree:
    return lax.map(compute, own)


def _together(compute: Callable[[Sequence[PyTree]], PyTree], own: Sequence[PyTree]) -> PyTree:
    return jax.vmap(compute)(own)


def divide(tree: PyTree, devices: Sequence[jax.Device]) -> PyTree:
    """Places the rows `[run, ...]` of all arrays on the devices of their runs."""
    mesh = Mesh(np.asarray(distinct(devices)), (RUN,))
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec(RUN)))
