"""A reducer combines the messages of the replicas; usually, all replicas receive the same result.

A *message* is the pytree that a replica sends: a gradient, or the outer gradient of a local round.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol, Self, runtime_checkable

import optax
from jaxtyping import Array, Float, Key, UInt8

from ctde_jax.devices import PyTree, as_complex, as_real


class Star(NamedTuple):
    """A reducer in the parts that nodes and their server compute; see `nodes`.

    A node sends its message to the server, which combines the messages that it has received and
    answers all nodes with the same bytes. If all of R nodes answer, the result has the bits of the
    reducer on R replicas. The functions use no collectives, and can be traced.
    """

    init: Callable[[PyTree], PyTree]
    """`init(params) -> state` of a node."""

    init_server: Callable[[PyTree], PyTree]
    """`init_server(params) -> state` of the server."""

    send: Callable[
        [PyTree, PyTree, Float[Array, ""], Key[Array, ""]], tuple[UInt8[Array, " bytes"], PyTree]
    ]
    """`send(message, state, weight, key) -> (payload, state)`

    The node keeps both states until the answer comes; see `receive`.
    """

    read: Callable[[UInt8[Array, " bytes"], PyTree, Key[Array, ""]], tuple[PyTree, Array]]
    """`read(payload, params, key) -> (message, weight)` as the server understands the payload."""

    combine: Callable[
        [UInt8[Array, "messages bytes"], PyTree, PyTree, Key[Array, ""]],
        tuple[UInt8[Array, " bytes"], PyTree],
    ]
    """`combine(payloads, state, params, key) -> (answer, state)`; only shapes of `params` count."""

    receive: Callable[[UInt8[Array, " bytes"], PyTree, Key[Array, ""]], PyTree]
    """`receive(answer, params, key) -> reduced`, with the shapes and dtypes of `params`."""

    settle: Callable[[UInt8[Array, " bytes"], PyTree, PyTree, PyTree], PyTree]
    """`settle(answer, params, before, after) -> state` of a node whose message was combined.

    `before` and `after` are its states before and after `send`.
    """


class Reducer(optax.GradientTransformationExtraArgs):
    """A reducer; `star`, if it has one, returns its parts for a number of nodes."""

    star: Callable[[int], Star] | None = None

    per_host: int = 1
    """Number of consecutive replicas whose messages are averaged before they are combined."""


class IndependentReducer(Reducer):
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
    star: Callable[[int], Star] | None = None,
) -> Reducer:
    """Makes a reducer: an optax transformation that runs on every replica and uses collectives.

    Args:
        init: `init(params) -> state`, the state of one replica.
        update: `update(message, state, params=None, *, weight, key, **extra_args)`, which returns
            `(reduced, state)`. `weight`, float32[], is the number of examples of this replica in
            the round; `key` is equal on all replicas and different in every round. `reduced` has
            the shapes and dtypes of the message. Both functions receive complex leaves as their
            real and imaginary parts, real `[2, ...]`.
        independent: Whether to return an `IndependentReducer`.
        star: Function from the number of nodes to the parts of this reducer for nodes and their
            server; None if it cannot run there.

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

    made = (IndependentReducer if independent else Reducer)(init_real, update_real)
    if star is not None:
        made.star = lambda nodes: _of_real_numbers(star(nodes))
    return made


def _of_real_numbers(star: Star) -> Star:
    """Wraps the parts of a reducer, so that its messages may be complex."""

    def read(payload, params, key):
        message, weight = star.read(payload, as_real(params), key)
        return as_complex(message, params), weight

    def receive(answer, params, key):
        return as_complex(star.receive(answer, as_real(params), key), params)

    return Star(
        init=lambda params: star.init(as_real(params)),
        init_server=lambda params: star.init_server(as_real(params)),
        send=lambda message, *rest: star.send(as_real(message), *rest),
        read=read,
        combine=lambda payloads, state, params, key: star.combine(
            payloads, state, as_real(params), key
        ),
        receive=receive,
        settle=lambda answer, params, *states: star.settle(answer, as_real(params), *states),
    )
