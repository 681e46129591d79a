"""Streaming DiLoCo: fragments of a model are aggregated in turn, during the next local steps."""

from functools import partial
from typing import NamedTuple

import jax
import optax
from jax import lax
from jax import numpy as jnp

from ctde_jax.aggregate.exchange import two_phase
from ctde_jax.aggregate.reducer import reducer
from ctde_jax.aggregate.vector import cut, whole
from ctde_jax.devices import PyTree
from ctde_jax.errors import InputError, check_at_least


class StreamingState(NamedTuple):
    """The central fragments, equal on all replicas, and this replica's message in flight."""

    rounds: jax.Array  # int32[], number of rounds since the start
    center: PyTree  # each leaf float32[fragment, size]
    message: PyTree  # each leaf float32[size], for the fragment of the last round
    weight: jax.Array  # float32[], number of examples of the replica in the last round
    reduce: PyTree  # state of the reducer, one row per fragment
    outer: PyTree  # state of the outer optimizer, one row per fragment


def streaming(
    fragments: int,
    reduce: optax.GradientTransformation | None = None,
    outer: optax.GradientTransformation | None = None,
    mix: float = 0.5,
) -> optax.GradientTransformationExtraArgs:
    """Aggregates one fragment per round, while the next local steps run (Douillard et al., 2025).

    It requires `Strategy.diverges`. Every leaf, as a vector, is cut into equal fragments. Besides
    its parameters, each replica holds the central parameters, which are equal on all replicas. At
    the end of round t, the message of a replica is the outer gradient of its fragment with index
    `t mod fragments`. It is reduced during the local steps of round t + 1; then the central
    fragment takes its outer step, and the fragment of the replica becomes
    `mix * own + (1 - mix) * central`. A round sends the bytes of `reduce` for
    `ceil(n / fragments)` elements of each leaf of n elements.

    Args:
        fragments: Number of fragments.
        reduce: Any reducer except `mean()`, whose all-reduce a compiler may merge with that of the
            metrics, which waits for the local steps; by default `two_phase()`.
        outer: Outer optimizer; by default SGD with learning rate 0.7 and Nesterov momentum 0.9.
        mix: Weight of a replica's fragment in the mixture with the central one, from 0 to 1.

    Raises:
        InputError: `fragments` is less than 1, or `mix` is not from 0 to 1.

    Examples:
        >>> reduce = ctde.aggregate.streaming(fragments=4)
        >>> strategy = ctde.Strategy(inner_steps=8, reduce=reduce, diverges=True)
    """
    check_at_least(1, fragments=fragments)
    if not 0 <= mix <= 1:
        raise InputError("mix", f"must be from 0 to 1, got {mix}.")
    exchange = optax.with_extra_args_support(reduce or two_phase())
    optimizer = outer or optax.sgd(0.7, momentum=0.9, nesterov=True)

    fragments_of = partial(cut, fragments)

    def mixture(own: jax.Array, center: jax.Array) -> jax.Array:
        # Equal numbers keep their bits, which the weighted sum may round.
        return jnp.where(own == center, own, mix * own + (1 - mix) * center)

    def init(params: PyTree) -> StreamingState:
        center = jax.tree.map(fragments_of, params)
        first = jax.tree.map(lambda x: x[0], center)

        return StreamingState(
            rounds=jnp.int32(0),
            center=center,
            message=optax.tree.zeros_like(first),
            weight=jnp.float32(0),
            reduce=jax.vmap(exchange.init)(center),
            outer=jax.vmap(optimizer.init)(center),
        )

    def update(updates, state, params=None, *, weight=1.0, key, **extra_args):
        # The replica's parameters after its local steps, cut into fragments; the updates are its
        # outer gradient.
        before = jax.tree.map(lambda p: p.astype(jnp.float32), params)
        own = jax.tree.map(lambda p, d: fragments_of(p - d.astype(jnp.float32)), before, updates)
        sent = (state.rounds - 1) % fragments
        sending = state.rounds % fragments

        # The message of the last round arrives: reduce it, and take the outer step of its fragment.
        at_sent = _row(state.center, sent)
        agreed, reduce_state = exchange.update(
            state.message, _row(state.reduce, sent), at_sent, weight=state.weight, key=key
        )
        step, outer_state = optimizer.update(agreed, _row(state.outer, sent), at_sent)
        received = StreamingState(
            rounds=state.rounds,
            center=_with_row(state.center, sent, optax.tree.add(at_sent, step)),
            message=state.message,
            weight=state.weight,
            reduce=_with_row(state.reduce, sent, reduce_state),
            outer=_with_row(state.outer, sent, outer_state),
        )

        # Mix the fragment with the central one. In the first round no message is in flight, so
        # nothing changes.
        mixed = jax.tree.map(mixture, _row(own, sent), _row(received.center, sent))
        is_first = state.rounds == 0
        received, own = optax.tree.where(
            is_first, (state, own), (received, _with_row(own, sent, mixed))
        )

        # Return the change of the parameters as an outer gradient, and send the next fragment's
        # message.
        moved = jax.tree.map(
            lambda p, x, d: (p - whole(x, p)).astype(d.dtype), before, own, updates
        )
        return moved, received._replace(
            rounds=state.rounds + 1,
            message=optax.tree.sub(_row(received.center, sending), _row(own, sending)),
            weight=jnp.asarray(weight, jnp.float32),
        )

    return reducer(init, update)


def _row(tree: PyTree, index: jax.Array) -> PyTree:
    return jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, index, keepdims=False), tree)


def _with_row(tree: PyTree, index: jax.Array, row: PyTree) -> PyTree:
    return jax.tree.map(lambda x, r: lax.dynamic_update_index_in_dim(x, r, index, 0), tree, row)
