"""Differential privacy: an average that hardly depends on the messages of any single replica.

The guarantee is central differential privacy at the level of clients. It covers a replica's whole
message in every round: an observer of the trained model can hardly distinguish whether the replica
sent its messages or zeros. The replicas themselves are trusted, because they see each other's sums
and all draw the noise from the seed of the run. The seed must stay among them, as anyone who has it
(it is in the run's config.json) can subtract the noise. Only messages are protected, not batch
statistics, nor the losses and metrics that a run prints. If examples are redistributed to the
replicas in every epoch, the guarantee does not cover individuals; use a partition, so that each
replica keeps its data.
"""

import math
import os
from collections.abc import Callable

import jax
import numpy as np
import optax
from jax import lax
from jax import numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Key

from ctde_jax.aggregate.codec import to_bytes
from ctde_jax.aggregate.exchange import with_weight
from ctde_jax.aggregate.mean import MEAN, MEAN_STAR, split_vector
from ctde_jax.aggregate.reducer import Star, reducer
from ctde_jax.aggregate.scaling import relative
from ctde_jax.devices import AXIS, PyTree
from ctde_jax.errors import InputError, check_at_least, check_not_negative, check_positive


def private(
    clip_norm: float,
    noise_multiplier: float,
    reduce: optax.GradientTransformationExtraArgs = MEAN,
) -> optax.GradientTransformationExtraArgs:
    """Averages clipped messages and adds Gaussian noise (McMahan et al., 2018).

    A message is scaled down to the norm `clip_norm` if it is longer. All messages have equal
    weight, whatever the number of examples, so a replica changes the average of R by at most
    `clip_norm / R`. The noise on each element of the average has the standard deviation
    `noise_multiplier * clip_norm / R`, and is the same on all replicas. A message that is not
    finite is replaced by zeros.

    Noise is added to every leaf, even if all replicas send zeros for it, since that fact must be
    hidden too. With inner steps, the noise therefore moves a frozen layer; without, the optimizer
    that freezes the layer comes after the noise and leaves the layer unchanged.

    Between nodes, each node clips its message, and the server adds the noise, which it draws from a
    secret key in its folder. The nodes trust the server, but neither each other nor anyone who sees
    the model.

    Args:
        clip_norm: The paper's S, a bound of the norm of the whole message.
        noise_multiplier: The paper's z; `epsilon` computes the resulting guarantee.
        reduce: Reducer that averages the clipped messages. The result of `epsilon` holds for an
            exact average; with a reducer that rounds, selects or has a state, a replica can change
            the result by more.

    Raises:
        InputError: `clip_norm` is not positive, `noise_multiplier` is negative, or one of them is
            not finite.

    Examples:
        >>> reduce = ctde.aggregate.private(clip_norm=1.0, noise_multiplier=1.0)
        >>> strategy = ctde.Strategy(inner_steps=20, reduce=reduce)
    """
    check_positive(clip_norm=clip_norm)
    check_not_negative(noise_multiplier=noise_multiplier)

    def update(
        updates,
        state,
        params=None,
        *,
        weight: Float[ArrayLike, ""] = 1.0,
        key: Key[Array, ""],
        **extra_args,
    ):
        # All messages have the weight 1: with a larger one, a replica could change the average by
        # more.
        reduce_key, noise_key = jax.random.split(key)
        clipped = _clipped(updates, clip_norm)
        average, state = reduce.update(
            clipped, state, params, weight=jnp.float32(1), key=reduce_key, **extra_args
        )

        # Add noise, drawn from the key that all replicas share, so that the result is equal on all.
        leaves, structure = jax.tree.flatten(average)
        deviation = noise_multiplier * clip_norm / lax.axis_size(AXIS)
        keys = jax.random.split(noise_key, len(leaves))
        noise = [
            deviation * jax.random.normal(k, leaf.shape)
            for k, leaf in zip(keys, leaves, strict=True)
        ]
        noisy = [
            (x.astype(jnp.float32) + z).astype(x.dtype) for x, z in zip(leaves, noise, strict=True)
        ]
        return structure.unflatten(noisy), state

    # Between nodes, only the exact average has the guarantee that `epsilon` computes.
    star = _make_star(clip_norm, noise_multiplier) if reduce is MEAN else None
    return reducer(reduce.init, update, independent=True, star=star)


def _make_star(clip_norm: float, noise_multiplier: float) -> Callable[[int], Star]:
    """Makes the parts of the private average for nodes and a server."""

    def star(nodes: int) -> Star:
        parts = MEAN_STAR

        def send(message, state, weight, key):
            return parts.send(_clipped(message, clip_norm), state, jnp.float32(1), key)

        def init_server(params):
            # The key of the noise is secret, and not that of the run, which all nodes have.
            return jnp.asarray(np.frombuffer(os.urandom(8), np.uint32))

        def combine(payloads, words, params, key):
            # Clipped once more, as a node might send a message that is longer.
            payloads = jax.vmap(lambda payload: clip_again(payload, params, key))(payloads)
            answer, _ = parts.combine(payloads, (), params, key)
            total, messages = split_vector(answer)
            next_key, noise_key = jax.random.split(jax.random.wrap_key_data(words))
            noise = noise_multiplier * clip_norm * jax.random.normal(noise_key, total.shape)
            return with_weight(to_bytes(total + noise), messages), jax.random.key_data(next_key)

        def clip_again(payload, params, key):
            message, _ = parts.read(payload, params, key)
            return send(message, (), 1.0, key)[0]

        return parts._replace(init_server=init_server, send=send, combine=combine)

    return star


def _clipped(message: PyTree, clip_norm: float) -> PyTree:
    """Scales a message down to the norm `clip_norm`; returns zeros if an element is not finite."""
    largest = jnp.stack(
        [jnp.max(jnp.abs(x.astype(jnp.float32)), initial=0) for x in jax.tree.leaves(message)]
    ).max()

    # The norm relative to the largest magnitude has no overflow or underflow: it is 0, or from 1 to
    # the root of the size of the message. If its product with `largest` overflows, infinity still
    # exceeds `clip_norm`.
    parts = jax.tree.map(lambda x: relative(x.astype(jnp.float32), largest), message)
    parts_norm = optax.tree.norm(parts)

    def clip(x: jax.Array, part: jax.Array) -> jax.Array:
        shorter = jnp.where(parts_norm * largest > clip_norm, part * (clip_norm / parts_norm), x)
        return jnp.where(jnp.isfinite(largest), shorter, 0).astype(x.dtype)

    return jax.tree.map(clip, message, parts)


def epsilon(
    noise_multiplier: float, rounds: int, sampling_rate: float = 1.0, delta: float = 1e-5
) -> float:
    """Returns the epsilon of the (epsilon, delta)-differential privacy of `rounds` aggregations.

    The aggregations are those of `private`. Epsilon is computed with the privacy loss distributions
    of Google's dp-accounting, which are tight: `pip install 'ctde_jax[privacy]'`.

    Args:
        noise_multiplier: As in `private`, at least 0.1.
        rounds: Number of aggregations.
        sampling_rate: Probability that a client takes part in a round, independently of all others;
            1 if all clients take part in every round. (If a fixed number of clients is drawn, as
            `fit` does, this is an approximation.)
        delta: Probability with which the guarantee may fail; should be much less than one over the
            number of clients.

    Raises:
        InputError: An argument is out of range, or dp-accounting is not installed.

    Examples:
        >>> round(ctde.aggregate.epsilon(noise_multiplier=1.0, rounds=100, sampling_rate=0.1), 1)
        7.0
    """
    check_at_least(1, rounds=rounds)
    if not 0.1 <= noise_multiplier < math.inf:
        raise InputError(
            "noise_multiplier",
            f"must be at least 0.1 and finite for the accountant, got {noise_multiplier}.",
        )
    if not 0 < sampling_rate <= 1:
        raise InputError(
            "sampling_rate", f"must be greater than 0 and at most 1, got {sampling_rate}."
        )
    if not 0 < delta < 1:
        raise InputError("delta", f"must be between 0 and 1, got {delta}.")

    # An optional dependency, imported here because the import takes seconds.
    try:
        import dp_accounting
        from dp_accounting.pld import PLDAccountant
    except ImportError:
        raise InputError(
            "noise_multiplier",
            "requires the package dp-accounting, which is not installed; run "
            "pip install 'ctde_jax[privacy]'.",
        ) from None

    # A round is a Gaussian mechanism on a Poisson sample of the clients.
    one_round = dp_accounting.PoissonSampledDpEvent(
        sampling_rate, dp_accounting.GaussianDpEvent(noise_multiplier)
    )
    return float(PLDAccountant().compose(one_round, rounds).get_epsilon(delta))
