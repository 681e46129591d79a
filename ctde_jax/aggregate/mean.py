"""The plainest agreement: everybody gets the average."""

import jax
import optax
from jax import lax
from jax import numpy as jnp

from ctde_jax.replica import AXIS, PyTree


def weighted_mean(tree: PyTree, weight: jax.typing.ArrayLike) -> PyTree:
    """Averages over the replicas, each counted as often as its weight says; zero where nobody has any weight."""
    total = lax.psum(weight, AXIS)
    sums = lax.psum(jax.tree.map(lambda x: x * weight, tree), AXIS)
    return jax.tree.map(lambda x, total_x: (total_x / jnp.where(total > 0, total, 1)).astype(x.dtype), tree, sums)


def mean() -> optax.GradientTransformationExtraArgs:
    """Averages the messages, weighted by the number of examples behind each.

    For gradients of mean losses this is the gradient of the mean over all examples, also when the last batch is short;
    for outer gradients it is federated averaging (McMahan et al., 2017).
    """

    def update(updates, state, params=None, *, weight: jax.typing.ArrayLike = 1.0):
        return weighted_mean(updates, weight), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
