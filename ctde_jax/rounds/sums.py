"""What a step sums over its examples: the loss, the metrics, and what follows from them."""

import jax
from jax import numpy as jnp

from ctde_jax.aggregate import learning_rate
from ctde_jax.devices import PyTree, replica

Sums = dict[str, jax.Array]
"""Over examples: `loss`, each metric, their number `examples`, and `objective` if that is not the loss; float32."""


def mean_objective(sums: Sums, over_replicas: bool = False) -> jax.Array:
    """Returns what is minimized, averaged over the examples of all steps; 0 if there are none."""
    objective = jnp.sum(sums.get("objective", sums["loss"]))
    total = {"objective": objective, "examples": jnp.sum(sums["examples"])}
    if over_replicas:
        total = replica.add_up(total)
    return total["objective"] / jnp.maximum(total["examples"], 1)


def with_learning_rate(sums: Sums, opt_state: PyTree) -> Sums:
    """Adds the learning rate, once for each example, if the optimizer's state holds it."""
    rate = learning_rate(opt_state)
    return sums if rate is None else {**sums, "learning_rate": rate * sums["examples"]}
