"""A reducer combines the messages of the replicas; usually, all replicas receive the same result.

A *message* is the pytree that a replica sends: a gradient, or the outer gradient of a local round.
"""

from collections.abc import Callable
from typing import Protocol, Self, runtime_checkable

import optax

from ctde_jax.devices import PyTree, as_complex, as_real


class IndependentReducer(optax.GradientTransformationExtraArgs):
    """A reducer that requires each message to depend only on the examples of its replica.

    Robust rules and private averages do, so batch statistics are then not synchronized.
    """


@runtime_checkable
class CutByOwner(Protocol):
    """A part of a reducer's state that is cut into slices, one owned by each replica."""

    def recut(self, like: Self) -> Self:
        """Converts the state of all replicas to a different number of replicas, and so of slices.

        Args:
            like: Arrays or `ShapeDtypeStruct`s `[replica, ...]`, shaped like the state to return.
        """
        ...


def reducer(
    init: optax.TransformInitFn,
    update: Callable[..., tuple[PyTree, PyTree]],
    independent: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Makes a reducer: an optax transformation that runs on every replica and uses collectives.

    Args:
        init: `init(params) -> state`, the state of one replica.
        update: `update(message, state, params=None, *, weight, key, **extra_args)`, which returns
            `(reduced, state)`. `weight`, float32[], is the number of examples of this replica in
            the round; `key` is equal on all replicas and different in every round. `reduced` has
            the shapes and dtypes of the message. Both functions receive complex leaves as their
            real and imaginary parts, real `[2, ...]`.
        independent: Whether to return an `IndependentReducer`.

    Examples:
        >>> def update(message, state, params=None, **extra_args):
        ...     return jax.lax.pmax(message, ctde.devices.AXIS), state
        >>> largest = ctde.aggregate.reducer(lambda params: optax.EmptyState(), update)
        >>> strategy = ctde.Strategy(reduce=largest)
    """

    # Complex leaves are converted here, so that reducers and codecs handle real numbers only.
    def init_real(params: PyTree) -> PyTree:
        return init(as_real(params))

    def update_real(updates, state, params=None, **extra_args):
        agreed, state = update(as_real(updates), state, as_real(params), **extra_args)
        return as_complex(agreed, updates), state

    kind = IndependentReducer if independent else optax.GradientTransformationExtraArgs
    return kind(init_real, update_real)
