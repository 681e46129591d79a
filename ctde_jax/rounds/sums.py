"""Sums over the examples of a step, by name: `Task.summed`, and the number of examples."""

from jax import numpy as jnp
from jaxtyping import Array, Float32

from ctde_jax.aggregate import learning_rate
from ctde_jax.devices import PyTree, replica

Sums = dict[str, Float32[Array, "..."]]
"""Sums over examples, by name: `Task.summed`, and `examples`, the number of examples.

There is an `objective` only if the task minimizes another function than the reported loss, and a
`learning_rate` (times the number of examples) only if the state of the optimizer holds it.
"""

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


def with_learning_rate(sums: Sums, opt_state: PyTree) -> Sums:
    """Adds `learning_rate`, times the number of examples, if `opt_state` holds a learning rate."""
    rate = learning_rate(opt_state)
    # As for all other sums, division by `examples` gives the mean.
    return sums if rate is None else {**sums, "learning_rate": rate * sums["examples"]}
