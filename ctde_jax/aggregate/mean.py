"""The plainest agreement: everybody gets the average."""

import jax
import optax
from jax import lax
from jax import numpy as jnp

from ctde_jax.aggregate.exchange import as_tree, as_vector
from ctde_jax.aggregate.reducer import reducer
from ctde_jax.devices import AXIS, weighted_mean
from ctde_jax.errors import InputError, check_at_least


def mean() -> optax.GradientTransformationExtraArgs:
    """Averages the messages, weighted by the number of examples behind each.

    For gradients of mean losses this is the gradient of the mean over all examples, also when the last batch is short;
    for outer gradients it is federated averaging (McMahan et al., 2017). In one all-reduce, every replica sends
    `2 (R - 1) / R * 4 n` bytes for n numbers and as much for one more, the weight.
    """

    def update(updates, state, params=None, *, weight: jax.typing.ArrayLike = 1.0, **extra_args):
        return weighted_mean(updates, weight), state

    return reducer(lambda params: optax.EmptyState(), update)


def hierarchical_mean(per_host: int) -> optax.GradientTransformationExtraArgs:
    """Averages within each host first, then across, so that hosts exchange each number once and not once a device.

    A reduce-scatter in each host, an all-reduce among the devices of the same place in all hosts, an all-gather in each
    host. With L devices on each of h hosts and n numbers, the weight among them and rounded up to a multiple of L, a
    replica sends `2 (L - 1) / L * 4 n` bytes within its host and `2 (h - 1) / h * 4 n / L` across.

    Args:
        per_host: Devices of a host; replicas that follow each other are on one host.

    Raises:
        InputError: per_host is less than 1, or when first used, the replicas are not a multiple of it.
    """
    check_at_least(1, per_host=per_host)

    def init(params):
        if lax.axis_size(AXIS) % per_host:
            raise InputError(
                "per_host", f"must divide the {lax.axis_size(AXIS)} devices, got {per_host}."
            )
        return optax.EmptyState()

    def update(updates, state, params=None, *, weight: jax.typing.ArrayLike = 1.0, **extra_args):
        replicas = lax.axis_size(AXIS)
        hosts = [list(range(first, first + per_host)) for first in range(0, replicas, per_host)]
        peers = [list(place) for place in zip(*hosts, strict=True)]
        message, weight = as_vector(updates), jnp.asarray(weight, jnp.float32)
        vector = jnp.append(jnp.where(weight > 0, message * weight, 0), weight)

        padded = jnp.pad(vector, (0, -len(vector) % per_host))
        own = lax.psum_scatter(padded, AXIS, axis_index_groups=hosts, tiled=True)
        own = lax.psum(own, AXIS, axis_index_groups=peers)
        vector = lax.all_gather(own, AXIS, axis_index_groups=hosts, tiled=True)[: len(vector)]

        return as_tree(vector[:-1] / jnp.where(vector[-1] > 0, vector[-1], 1), updates), state

    return reducer(init, update)
