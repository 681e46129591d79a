"""FedProx: local steps are pulled towards the parameters at the start of the round."""

import jax
import optax

from ctde_jax.devices import PyTree
from ctde_jax.errors import InputError


def proximal(strength: float) -> optax.GradientTransformationExtraArgs:
    """Adds `strength * (params - anchor)` to a replica's gradients (Li et al., 2020).

    This is the gradient of FedProx's proximal term, `strength / 2 * |params - anchor|^2`. The
    anchor is the parameters at the start of the round.

    Args:
        strength: The paper's mu, at least 0.

    Raises:
        InputError: `strength` is negative.

    Examples:
        >>> fedprox = ctde.Strategy(inner_steps=20, inner=ctde.aggregate.proximal(0.01))
    """
    # `not >=` also rejects NaN.
    if not strength >= 0:
        raise InputError("strength", f"must be at least 0, got {strength}.")

    def update(updates, state, params=None, *, anchor: PyTree = None, **extra_args):
        return jax.tree.map(lambda g, p, a: g + strength * (p - a), updates, params, anchor), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
