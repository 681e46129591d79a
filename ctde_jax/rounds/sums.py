"""Sums over the examples of a step, by name: `Task.summed`, and the number of examples."""

import jax
from jax import lax
from jax import numpy as jnp
from jaxtyping import Array, Float32

from ctde_jax.aggregate import gradient_norm, learning_rate
from ctde_jax.devices import PyTree, groups, replica

Sums = dict[str, Float32[Array, "..."]]
"""Sums over examples, by name: `Task.summed`, and `examples`, the number of examples.

There is an `objective` only if another function than the reported loss is minimized, because of the
task or of sample weights, and the entries of `OF_THE_OPTIMIZER` (times the number of examples) only
if its state holds them.
"""

OF_THE_OPTIMIZER = {"learning_rate": learning_rate, "gradient_norm": gradient_norm}
"""Functions from the state of an optimizer to a number of its last update, or to None."""

StepSums = dict[str, Float32[Array, " steps"]]
"""`Sums` of each step of a round."""


def mean_objective(sums: Sums, over_replicas: bool = False) -> Float32[Array, ""]:
    """Returns the mean of the minimized objective over the examples of all steps; 0 without any.

    Args:
        sums: Sums of this replica.
        over_replicas: Whether to average over the examples of all replicas, with a collective.
    """
    objective = jnp.sum(sums.get("objective", sums["loss"]))
    total = {"objective": objective, "examples": jnp.sum(sums["examples"])}
    if over_replicas:
        total = replica.add_up(total)
    return total["objective"] / jnp.maximum(total["examples"], 1)


def of_the_first(sums: StepSums, per_host: int | None = None) -> StepSums:
    """Returns zeros on all replicas but the first of each host, if the sums are those of the host.

    Args:
        sums: Sums of the host.
        per_host: Number of consecutive replicas on a host (default: all).
    """
    host = groups.hosts(per_host or lax.axis_size(replica.AXIS))
    if host.size == 1:
        return sums
    is_first = host.place[1] == 0
    return jax.tree.map(lambda x: jnp.where(is_first, x, 0), sums)


def with_measurements(sums: Sums, opt_state: PyTree) -> Sums:
    """Adds the entries of `OF_THE_OPTIMIZER` that `opt_state` holds, times the examples."""
    values = {name: read(opt_state) for name, read in OF_THE_OPTIMIZER.items()}
    # As for all other sums, division by `examples` gives the mean.
    return sums | {
        name: value * sums["examples"] for name, value in values.items() if value is not None
    }
