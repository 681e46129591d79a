"""Messages of bad replicas: attacks against which the robust rules are tested.

The last replicas are the bad ones. They see the honest messages, and collude.
"""

from collections.abc import Callable

import jax
import optax
from jax import lax
from jax import numpy as jnp
from jax.flatten_util import ravel_pytree

from ctde_jax.devices.replica import AXIS

Attack = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
"""`attack(own float32[n], honest float32[replica, n], key) -> float32[n]`; `own` is honest."""


def sign_flip(strength: float = 4.0) -> Attack:
    """Sends the negated mean of the honest, so large that the plain mean changes its sign."""
    return lambda own, honest, key: -strength * honest.mean(axis=0)


def large_noise(strength: float = 100.0) -> Attack:
    """Sends independent noise of `strength` times the norm of the true message."""

    def attack(own, honest, key):
        noise = jax.random.normal(jax.random.fold_in(key, lax.axis_index(AXIS)), own.shape)
        return noise * strength * jnp.linalg.norm(own) / jnp.linalg.norm(noise)

    return attack


def a_little_is_enough(z: float = 1.5) -> Attack:
    """Stays within the spread of the honest: z standard deviations off (Baruch et al., 2019).

    By the paper's formula, 2 bad replicas of 8 control the median only up to z = 0, because 3 of
    the 6 honest ones must lie beyond them; the paper's experiments use 1.5.
    """
    return lambda own, honest, key: honest.mean(axis=0) - z * honest.std(axis=0)


def not_a_number() -> Attack:
    """Sends NaN in every second coordinate and infinity in the others."""
    return lambda own, honest, key: jnp.where(jnp.arange(len(own)) % 2 == 0, jnp.nan, jnp.inf)


def honest() -> Attack:
    """Does no harm."""
    return lambda own, honest, key: own


def flip_labels(labels: jax.Array, classes: int, attackers: int = 2) -> jax.Array:
    """Trains on wrong labels: the bad replicas replace class c by `classes - 1 - c`."""
    is_bad = lax.axis_index(AXIS) >= lax.axis_size(AXIS) - attackers
    return jnp.where(is_bad, classes - 1 - labels, labels)


def attacked(
    reduce: optax.GradientTransformationExtraArgs, attack: Attack, attackers: int = 2
) -> optax.GradientTransformationExtraArgs:
    """Wraps a reducer so that the last replicas send the output of the attack."""

    def update(updates, state, params=None, *, weight, key, **extra_args):
        own, restore = ravel_pytree(updates)
        honest = lax.axis_size(AXIS) - attackers
        bad = attack(own, lax.all_gather(own, AXIS)[:honest], key)
        sent = restore(jnp.where(lax.axis_index(AXIS) < honest, own, bad))
        return reduce.update(sent, state, params, weight=weight, key=key, **extra_args)

    return optax.GradientTransformationExtraArgs(reduce.init, update)
