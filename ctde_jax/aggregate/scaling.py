"""Quotients and norms of float32 numbers whose squares or reciprocals overflow or underflow."""

import jax
from jax import numpy as jnp


def power_towards_one(magnitude: jax.Array) -> jax.Array:
    """Returns 2**-64 for magnitudes greater than 1, else 2**64; a product with it is exact."""
    return jnp.where(magnitude > 1, jnp.float32(2.0**-64), jnp.float32(2.0**64))


def relative(x: jax.Array, largest: jax.Array) -> jax.Array:
    """Divides `x` by `largest`, its largest magnitude (broadcastable); if that is 0, returns zeros.

    XLA multiplies by the reciprocal of a divisor that is broadcast. The reciprocal of a number
    greater than 8.5e37 is less than the smallest normal float32, which a CPU flushes to zero, so
    both operands are brought nearer to 1 first.
    """
    power = power_towards_one(largest)
    return x * power / jnp.where(largest > 0, largest * power, 1)


def norm(x: jax.Array) -> jax.Array:
    """Returns the Euclidean norm over the last axis; NaN if a number is not finite."""
    largest = jnp.max(jnp.abs(x), axis=-1, initial=0)
    return largest * jnp.sqrt(jnp.sum(relative(x, largest[..., None]) ** 2, axis=-1))
