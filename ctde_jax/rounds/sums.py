"""Sums over the examples of a step: the loss, the metrics, and what is computed from them."""

from jax import numpy as jnp
from jaxtyping import Array, Float32

from ctde_jax.aggregate import learning_rate
from ctde_jax.devices import PyTree, replica

Sums = dict[str, Float32[Array, "..."]]
"""Sums over examples: `loss`, each metric, `examples`, and `objective`.

`examples` is the number of examples; `objective` exists only if it is not the loss.
"""

StepSums = dict[str, Float32[Array, " steps"]]
"""`Sums` of each step of a round."""


def mean_objective(sums: Sums, over_replicas: bool = False) -> Float32[Array, ""]:
    """Returns the mean objective over the examples of all steps; 0 if there are none.

    Args:
        sums: Sums of the replica.
        over_replicas: Whether to average over the examples of all replicas, with a collective.
    """
    objective = jnp.sum(sums.get("objective", sums["loss"]))
    total = {"objective": objective, "examples": jnp.sum(sums["examples"])}
    if over_replicas:
        total = replica.add_up(total)
    return total["objective"] / jnp.maximum(total["examples"], 1)


def with_learning_rate(sums: Sums, opt_state: PyTree) -> Sums:
    """Adds the learning rate, times the number of examples, if the optimizer's state holds it."""
    rate = learning_rate(opt_state)
    # As for all other sums, division by `examples` gives the mean.
    return sums if rate is None else {**sums, "learning_rate": rate * sums["examples"]}
