"""A reducer turns every replica's message into the one that all agree on."""

from collections.abc import Callable
from typing import Protocol, Self, runtime_checkable

import optax

from ctde_jax.devices import PyTree, as_complex, as_real


class IndependentReducer(optax.GradientTransformationExtraArgs):
    """A reducer that judges each message by itself, as robust rules and private averages do.

    So no message may depend on the examples of another replica, and batch statistics are not synchronized.
    """


@runtime_checkable
class CutByOwner(Protocol):
    """A part of a reducer's state that is cut into slices, one owned by each replica."""

    def recut(self, like: Self) -> Self:
        """Returns the state of all replicas for another number of them, who own other slices.

        Args:
            like: Arrays, or shapes and dtypes, `[replica, ...]`, of the state to return.
        """
        ...


def reducer(
    init: optax.TransformInitFn,
    update: Callable[..., tuple[PyTree, PyTree]],
    independent: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Makes a reducer, which is an optax transformation whose functions run on every replica and talk over the axis.

    Args:
        init: `init(params) -> state`; each replica's own.
        update: `update(message, state, params=None, *, weight, key, **extra_args) -> (agreed, state)`. `weight`,
            float32[], is the number of examples behind this replica's message; `key` is equal on all replicas and new
            in every round. What is agreed has the shapes and types of the message. Both functions get complex leaves
            as their real and imaginary parts, real `[2, ...]`.
        independent: Whether to return an `IndependentReducer`.
    """

    def init_real(params: PyTree) -> PyTree:
        return init(as_real(params))

    def update_real(updates, state, params=None, **extra_args):
        agreed, state = update(as_real(updates), state, as_real(params), **extra_args)
        return as_complex(agreed, updates), state

    kind = IndependentReducer if independent else optax.GradientTransformationExtraArgs
    return kind(init_real, update_real)
