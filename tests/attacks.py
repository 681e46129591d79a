"""What bad replicas send: the attack zoo against which the robust rules are held.

The last replicas are the bad ones. They know what the honest ones send, and agree among themselves.
"""

from collections.abc import Callable

import jax
import optax
from jax import lax
from jax import numpy as jnp
from jax.flatten_util import ravel_pytree

from ctde_jax.devices.replica import AXIS

Attack = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
"""`attack(own float32[n], honest float32[replica, n], key) -> float32[n]`; `own` is what it should have sent."""


def sign_flip(strength: float = 4.0) -> Attack:
    """Pulls back: against the average of the honest, and so much harder that the plain mean goes backwards."""
    return lambda own, honest, key: -strength * honest.mean(axis=0)


def large_noise(strength: float = 100.0) -> Attack:
    """Sends noise, each of the bad its own, of so many times the norm of what it should have sent."""

    def attack(own, honest, key):
        noise = jax.random.normal(jax.random.fold_in(key, lax.axis_index(AXIS)), own.shape)
        return noise * strength * jnp.linalg.norm(own) / jnp.linalg.norm(noise)

    return attack


def a_little_is_enough(z: float = 1.5) -> Attack:
    """Hides inside the spread of the honest, each coordinate z deviations off (Baruch et al., 2019).

    By the paper's formula the bad are sure of the median only up to z = 0 where they are 2 of 8, as 3 of the 6 honest
    must lie beyond them; its experiments use 1.5.
    """
    return lambda own, honest, key: honest.mean(axis=0) - z * honest.std(axis=0)


def not_a_number() -> Attack:
    """Sends what no sensor should: a NaN in every second coordinate, infinity in the others."""
    return lambda own, honest, key: jnp.where(jnp.arange(len(own)) % 2 == 0, jnp.nan, jnp.inf)


def honest() -> Attack:
    """Does no harm."""
    return lambda own, honest, key: own


def flip_labels(labels: jax.Array, classes: int, attackers: int = 2) -> jax.Array:
    """Trains in good faith on wrong labels: the bad replicas take class c for class `classes - 1 - c`."""
    is_bad = lax.axis_index(AXIS) >= lax.axis_size(AXIS) - attackers
    return jnp.where(is_bad, classes - 1 - labels, labels)


def attacked(
    reduce: optax.GradientTransformationExtraArgs, attack: Attack, attackers: int = 2
) -> optax.GradientTransformationExtraArgs:
    """Lets the last replicas send what the attack makes of their messages."""

    def update(updates, state, params=None, *, weight, key, **extra_args):
        own, restore = ravel_pytree(updates)
        honest = lax.axis_size(AXIS) - attackers
        bad = attack(own, lax.all_gather(own, AXIS)[:honest], key)
        sent = restore(jnp.where(lax.axis_index(AXIS) < honest, own, bad))
        return reduce.update(sent, state, params, weight=weight, key=key, **extra_args)

    return optax.GradientTransformationExtraArgs(reduce.init, update)
