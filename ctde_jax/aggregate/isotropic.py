"""Outer gradients with equal singular values."""

import jax
import optax
from jax import numpy as jnp

from ctde_jax.aggregate.scaling import relative


def isotropic() -> optax.GradientTransformation:
    """Sets all singular values of every matrix to their mean (Marczak et al., 2025).

    The paper applies this to merged models, whose average change is large in the few directions
    that the models share and small in all others; equal singular values preserve every direction.
    Here, it is applied to outer gradients: chain it before an outer optimizer. A leaf with more
    than two axes is a matrix `[all other axes, last axis]`; vectors are left unchanged.

    Examples:
        >>> outer = optax.chain(ctde.aggregate.isotropic(), optax.sgd(0.7, momentum=0.9))
        >>> strategy = ctde.Strategy(inner_steps=32, outer=outer)
    """

    def flatten_spectrum(leaf: jax.Array) -> jax.Array:
        if leaf.ndim < 2 or leaf.size == 0:
            return leaf
        matrix = leaf.reshape(-1, leaf.shape[-1]).astype(jnp.promote_types(leaf.dtype, jnp.float32))
        # The SVD is that of the matrix divided by its largest magnitude, whose squares do not
        # overflow.
        largest = jnp.max(jnp.abs(matrix))
        u, singular_values, v = jnp.linalg.svd(relative(matrix, largest), full_matrices=False)
        isotropic = (
            (jnp.mean(singular_values) * u @ v * largest).reshape(leaf.shape).astype(leaf.dtype)
        )

        # Zeros have no directions; they keep their bits.
        return jnp.where(largest == 0, leaf, isotropic)

    return optax.stateless(lambda updates, params: jax.tree.map(flatten_spectrum, updates))
