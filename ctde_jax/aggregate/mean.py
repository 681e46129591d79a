"""Plain averaging, in one all-reduce or hierarchically within and across hosts."""

import jax
import optax
from jax import lax
from jax import numpy as jnp

from ctde_jax.aggregate.codec import from_bytes, to_bytes
from ctde_jax.aggregate.exchange import split_weights, with_weight
from ctde_jax.aggregate.reducer import Reducer, Star, reducer
from ctde_jax.aggregate.vector import as_tree, as_vector
from ctde_jax.devices import AXIS, groups, is_vmapped, weighted_mean
from ctde_jax.errors import check_at_least


def mean() -> Reducer:
    """Averages the messages, weighted by the number of examples of each replica in the round.

    For gradients of mean losses, this is the gradient of the mean over all examples, even if the
    last batch is short; for outer gradients, it is federated averaging (McMahan et al., 2017). In
    one all-reduce, every replica sends `2 (R - 1) / R * 4 (n + 1)` bytes for the n elements of a
    message and the weight.

    Examples:
        >>> strategy = ctde.Strategy(inner_steps=8, reduce=ctde.aggregate.mean())
    """

    def update(updates, state, params=None, *, weight: jax.typing.ArrayLike = 1.0, **extra_args):
        return weighted_mean(updates, weight), state

    return reducer(lambda params: optax.EmptyState(), update, star=lambda nodes: MEAN_STAR)


def _combine(payloads, state, params, key):
    """Sums the weighted messages and the weights, in the order of the messages."""
    vectors, weights = split_vector(payloads)
    weighted = jnp.where(weights[:, None] > 0, vectors * weights[:, None], 0)
    return with_weight(to_bytes(weighted.sum(axis=0)), weights.sum()), state


def _receive(answer, params, key):
    """Divides the sum by the weight, as `weighted_mean` does after its all-reduce."""
    total, weight = split_vector(answer)
    return as_tree(total * (1 / jnp.where(weight > 0, weight, 1)), params)


def _read(payload, params, key):
    vector, weight = split_vector(payload)
    return as_tree(vector, params), weight


def split_vector(payload):
    """Returns the vector and the weight of a message in float32."""
    written, weight = split_weights(payload)
    return from_bytes(written), weight


MEAN_STAR = Star(
    init=lambda params: (),
    init_server=lambda params: (),
    send=lambda message, state, weight, key: (
        with_weight(to_bytes(as_vector(message)), weight),
        state,
    ),
    read=_read,
    combine=_combine,
    receive=_receive,
    settle=lambda answer, params, before, after: after,
)
"""The parts of `mean` for nodes and a server; messages and answer are sent in float32."""

# A single instance, so that `Strategy.exact` and `private` recognize the default by identity.
MEAN = mean()


def hierarchical_mean(per_host: int) -> optax.GradientTransformationExtraArgs:
    """Averages within each host and then across hosts, so that hosts exchange each element once.

    The steps are a reduce-scatter within each host, an all-reduce among the devices at the same
    position of all hosts, and an all-gather within each host. With L devices on each of h hosts and
    n elements, including the weight and rounded up to a multiple of L, a replica sends
    `2 (L - 1) / L * 4 n` bytes within its host and `2 (h - 1) / h * 4 n / L` bytes across hosts.

    Args:
        per_host: Devices per host; consecutive replicas are on the same host.

    Raises:
        InputError: `per_host` is less than 1, or, at initialization, the number of replicas is not
            a multiple of it.

    Examples:
        >>> strategy = ctde.Strategy(reduce=ctde.aggregate.hierarchical_mean(per_host=8))
    """
    check_at_least(1, per_host=per_host)

    def init(params):
        groups.check_per_host(per_host, lax.axis_size(AXIS))
        return optax.EmptyState()

    def update(updates, state, params=None, *, weight: jax.typing.ArrayLike = 1.0, **extra_args):
        # The weight is summed in the same vector. A message with weight 0 is masked, even if it is
        # NaN.
        message = as_vector(updates)
        weight = jnp.asarray(weight, jnp.float32)
        vector = jnp.append(jnp.where(weight > 0, message * weight, 0), weight)

        if is_vmapped():
            # Nothing is sent under `vmap`.
            vector = lax.psum(vector, AXIS)
        else:
            # Reduce-scatter within hosts, all-reduce across hosts, all-gather within hosts.
            host = groups.hosts(per_host)
            padded = jnp.pad(vector, (0, -len(vector) % per_host))
            own = host.psum_scatter(padded.reshape(per_host, -1))
            own = groups.peers(per_host).psum(own)
            vector = host.all_gather(own).ravel()[: len(vector)]

        # One division at the end; the mean is 0 if all weights are 0.
        return as_tree(vector[:-1] / jnp.where(vector[-1] > 0, vector[-1], 1), updates), state

    return reducer(init, update)
