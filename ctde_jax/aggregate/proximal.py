"""A pull towards the center while a replica is alone."""

import jax
import optax

from ctde_jax.devices import PyTree
from ctde_jax.errors import InputError


def proximal(strength: float) -> optax.GradientTransformationExtraArgs:
    """Adds `strength * (params - anchor)` to a replica's gradients: FedProx's proximal term (Li et al., 2020).

    It is the gradient of `strength / 2 * |params - anchor|^2`, where the anchor are the parameters with which the round
    began.

    Raises:
        InputError: The strength is negative.
    """
    if not strength >= 0:
        raise InputError("strength", f"must be at least 0, got {strength}.")

    def update(updates, state, params=None, *, anchor: PyTree = None, **extra_args):
        return jax.tree.map(lambda g, p, a: g + strength * (p - a), updates, params, anchor), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
