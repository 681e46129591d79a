"""Attacks of Byzantine replicas, against which the robust rules are tested.

The last replicas are Byzantine. They have access to the honest messages, and collude.
"""

from collections.abc import Callable

import jax
import optax
from jax import lax
from jax import numpy as jnp
from jax.flatten_util import ravel_pytree

from ctde_jax.devices.replica import AXIS

Attack = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
"""`attack(message float32[n], honest float32[replica, n], key) -> float32[n]`."""


def sign_flip(strength: float = 4.0) -> Attack:
    """Sends the negated and scaled mean of the honest messages; the plain mean changes its sign."""
    return lambda message, honest, key: -strength * honest.mean(axis=0)


def large_noise(strength: float = 100.0) -> Attack:
    """Sends independent noise of `strength` times the norm of the true message."""

    def attack(message, honest, key):
        noise = jax.random.normal(jax.random.fold_in(key, lax.axis_index(AXIS)), message.shape)
        return noise * strength * jnp.linalg.norm(message) / jnp.linalg.norm(noise)

    return attack


def a_little_is_enough(z: float = 1.5) -> Attack:
    """Sends the honest mean minus z standard deviations (Baruch et al., 2019).

    By the paper's formula, 2 Byzantine replicas of 8 control the median only up to z = 0, because
    3 of the 6 honest values must lie beyond theirs; the paper's experiments use 1.5.
    """
    return lambda message, honest, key: honest.mean(axis=0) - z * honest.std(axis=0)


def not_a_number() -> Attack:
    """Sends NaN in every second coordinate and infinity in the others."""
    return lambda message, honest, key: jnp.where(
        jnp.arange(len(message)) % 2 == 0, jnp.nan, jnp.inf
    )


def honest() -> Attack:
    """Sends the honest message."""
    return lambda message, honest, key: message


def flip_labels(labels: jax.Array, classes: int, attackers: int = 2) -> jax.Array:
    """Replaces class c by `classes - 1 - c` in the labels of the Byzantine replicas."""
    is_byzantine = lax.axis_index(AXIS) >= lax.axis_size(AXIS) - attackers
    return jnp.where(is_byzantine, classes - 1 - labels, labels)


def attacked(
    reduce: optax.GradientTransformationExtraArgs, attack: Attack, attackers: int = 2
) -> optax.GradientTransformationExtraArgs:
    """Wraps a reducer so that the last replicas send the output of the attack."""

    def update(updates, state, params=None, *, weight, key, **extra_args):
        message, restore = ravel_pytree(updates)
        honest = lax.axis_size(AXIS) - attackers
        malicious = attack(message, lax.all_gather(message, AXIS)[:honest], key)
        sent = restore(jnp.where(lax.axis_index(AXIS) < honest, message, malicious))
        return reduce.update(sent, state, params, weight=weight, key=key, **extra_args)

    return optax.GradientTransformationExtraArgs(reduce.init, update)
