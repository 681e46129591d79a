"""An outer gradient that moves the model as far along every direction as along any other."""

import jax
import optax
from jax import numpy as jnp

from ctde_jax.aggregate.scaling import relative


def isotropic() -> optax.GradientTransformation:
    """Gives every matrix singular values that are all equal to their mean (Marczak et al., 2025, for merged models).

    The average of many replicas' changes is large in the few directions that they share and small in all others; made
    isotropic, no direction is lost. To be chained before an outer optimizer. A leaf of more than two axes is the matrix
    of its last axis by all others; vectors stay as they are.
    """

    def flatten_spectrum(leaf: jax.Array) -> jax.Array:
        if leaf.ndim < 2 or leaf.size == 0:
            return leaf
        matrix = leaf.reshape(-1, leaf.shape[-1]).astype(jnp.promote_types(leaf.dtype, jnp.float32))
        largest = jnp.max(jnp.abs(matrix))
        u, singular_values, v = jnp.linalg.svd(relative(matrix, largest), full_matrices=False)
        isotropic = (
            (jnp.mean(singular_values) * u @ v * largest).reshape(leaf.shape).astype(leaf.dtype)
        )
        return jnp.where(largest == 0, leaf, isotropic)  # zeros stay zeros

    return optax.stateless(lambda updates, params: jax.tree.map(flatten_spectrum, updates))
