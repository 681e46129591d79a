"""Differential privacy: an aggregate that hardly depends on what any single replica has sent.

What is protected is one replica's whole message in every round: whoever sees the trained model can hardly tell whether
the replica has sent its messages or zeros (central differential privacy on the level of clients). The replicas
themselves are trusted, as they see each other's sums and all draw the noise from the run's seed, which must stay among
them: whoever knows it (it is in a run's config.json) can take the noise away. Only messages are protected, not batch
statistics, nor the losses and metrics that a run prints. Nor does it say anything about a single person where the data
are dealt anew to the replicas: let every replica keep its own.
"""

import math

import jax
import optax
from jax import lax
from jax import numpy as jnp

from ctde_jax.aggregate.mean import mean
from ctde_jax.aggregate.reducer import reducer
from ctde_jax.aggregate.scaling import relative
from ctde_jax.devices import AXIS, PyTree
from ctde_jax.errors import InputError, check_at_least


def private(
    clip_norm: float,
    noise_multiplier: float,
    reduce: optax.GradientTransformationExtraArgs = mean(),
) -> optax.GradientTransformationExtraArgs:
    """Averages clipped messages and adds Gaussian noise (McMahan et al., 2018).

    Each message is scaled down to the norm `clip_norm` where it is longer. Each counts once, however many examples are
    behind it, so a replica moves the average of R by at most `clip_norm / R`. The noise on each number of the average
    has the standard deviation `noise_multiplier * clip_norm / R`, and is the same on all replicas. A message that is
    not finite counts as zeros.

    The noise is added to every leaf, also to one that all replicas send as zeros: that nothing was sent is itself
    something that must be hidden. So with inner steps a frozen layer moves by the noise; at every step, the optimizer
    that freezes it comes after the noise and keeps it.

    Args:
        clip_norm: The paper's S, in the units of the message's norm over the whole tree.
        noise_multiplier: The paper's z; `epsilon` says what it buys.
        reduce: Averages the clipped messages. What `epsilon` says holds for an exact average; a reducer that rounds,
            remembers or selects can let a replica move the answer by more.

    Raises:
        InputError: The norm is not positive, or the multiplier is negative.
    """
    if not 0 < clip_norm < math.inf:
        raise InputError("clip_norm", f"must be greater than 0 and finite, got {clip_norm}.")
    if not 0 <= noise_multiplier < math.inf:
        raise InputError(
            "noise_multiplier", f"must be at least 0 and finite, got {noise_multiplier}."
        )

    def update(
        updates,
        state,
        params=None,
        *,
        weight: jax.typing.ArrayLike = 1.0,
        key: jax.Array,
        **extra_args,
    ):
        reduce_key, noise_key = jax.random.split(key)
        clipped = _clipped(updates, clip_norm)
        average, state = reduce.update(
            clipped, state, params, weight=jnp.float32(1), key=reduce_key, **extra_args
        )

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

    return reducer(reduce.init, update, independent=True)


def _clipped(message: PyTree, clip_norm: float) -> PyTree:
    """Scales a message down to the norm if it is longer; zeros if a number is not finite."""
    largest = jnp.stack(
        [jnp.max(jnp.abs(x.astype(jnp.float32)), initial=0) for x in jax.tree.leaves(message)]
    ).max()
    parts = jax.tree.map(lambda x: relative(x.astype(jnp.float32), largest), message)
    parts_norm = optax.tree.norm(
        parts
    )  # from 1 to the root of their number; times `largest` it may overflow

    def clip(x: jax.Array, part: jax.Array) -> jax.Array:
        shorter = jnp.where(parts_norm * largest > clip_norm, part * (clip_norm / parts_norm), x)
        return jnp.where(jnp.isfinite(largest), shorter, 0).astype(x.dtype)

    return jax.tree.map(clip, message, parts)


def epsilon(
    noise_multiplier: float, rounds: int, sampling_rate: float = 1.0, delta: float = 1e-5
) -> float:
    """Returns the epsilon for which so many rounds of `private` are (epsilon, delta)-differentially private.

    Accounted by the privacy loss distributions of Google's dp-accounting, which are tight: `pip install
    'ctde_jax[privacy]'`.

    Args:
        noise_multiplier: As in `private`, at least 0.1: below that nothing is protected worth accounting.
        rounds: How often the replicas agree.
        sampling_rate: The probability with which a client takes part in a round, independently of all others; 1 where
            all take part in all. (Where a fixed number of clients is drawn, as `fit` does, this is an approximation.)
        delta: The probability with which the promise may fail; should be much less than one over the clients.

    Raises:
        InputError: An argument breaks its rule, or dp-accounting is not installed.
    """
    check_at_least(1, rounds=rounds)
    if not 0.1 <= noise_multiplier < math.inf:
        raise InputError(
            "noise_multiplier",
            f"must be at least 0.1 and finite to be accounted, got {noise_multiplier}.",
        )
    if not 0 < sampling_rate <= 1:
        raise InputError(
            "sampling_rate", f"must be greater than 0 and at most 1, got {sampling_rate}."
        )
    if not 0 < delta < 1:
        raise InputError("delta", f"must be between 0 and 1, got {delta}.")
    try:
        import dp_accounting  # an extra, which takes seconds to import
        from dp_accounting.pld import PLDAccountant
    except ImportError:
        raise InputError(
            "noise_multiplier",
            "is accounted by dp-accounting, which is not installed: pip install 'ctde_jax[privacy]'.",
        ) from None
    one_round = dp_accounting.PoissonSampledDpEvent(
        sampling_rate, dp_accounting.GaussianDpEvent(noise_multiplier)
    )
    return float(PLDAccountant().compose(one_round, rounds).get_epsilon(delta))
