"""Fragments of the model that are agreed on in turn, each while the replicas already take their next steps alone."""

from typing import NamedTuple

import jax
import optax
from jax import lax
from jax import numpy as jnp

from ctde_jax.aggregate.exchange import as_tree, as_vector, two_phase
from ctde_jax.aggregate.reducer import reducer
from ctde_jax.errors import InputError, check_at_least
from ctde_jax.replica import PyTree


class StreamingState(NamedTuple):
    """The center's fragments, equal on all replicas, and the replica's message that is on its way."""

    rounds: jax.Array  # int32[]
    center: jax.Array  # float32[fragment, size]
    message: jax.Array  # float32[size], of the fragment of the last round
    weight: jax.Array  # float32[], the examples behind the message
    reduce: PyTree  # of the reducer, a row for each fragment
    outer: PyTree  # of the outer optimizer, a row for each fragment


def streaming(
    fragments: int,
    reduce: optax.GradientTransformation | None = None,
    outer: optax.GradientTransformation | None = None,
    mix: float = 0.5,
) -> optax.GradientTransformationExtraArgs:
    """Agrees on one fragment in each round, and hears the answer one round later (Douillard et al., 2025).

    For a `Strategy` that `diverges`. The parameters, as one vector, are cut into equal fragments. At the end of round t
    a replica's message is the outer gradient of fragment `t mod fragments`; it travels during the local steps of round
    t + 1, on which it does not depend, nor they on it; then the center's fragment takes its outer step, and the
    replica's becomes `mix * its own + (1 - mix) * the center's`. A fragment is sent every `fragments` rounds, so a
    round sends what `reduce` sends for `ceil(n / fragments)` numbers.

    Args:
        fragments: How many there are.
        reduce: Any reducer, `two_phase()` by default. (Not `mean()`: a compiler merges its all-reduce with that of the
            metrics, which waits for the local steps.)
        outer: The center's optimizer, SGD with a learning rate of 0.7 and Nesterov momentum of 0.9 by default.
        mix: What a replica keeps of its own fragment, which has moved on while the message traveled.

    Raises:
        InputError: There is no fragment, or mix is not from 0 to 1.
    """
    check_at_least(1, fragments=fragments)
    if not 0 <= mix <= 1:
        raise InputError("mix", f"must be from 0 to 1, got {mix}.")
    exchange = optax.with_extra_args_support(reduce or two_phase())
    optimizer = outer or optax.sgd(0.7, momentum=0.9, nesterov=True)

    def cut(vector: jax.Array) -> jax.Array:
        return jnp.pad(vector, (0, -len(vector) % fragments)).reshape(fragments, -1)

    def init(params: PyTree) -> StreamingState:
        center = cut(as_vector(params))

        def rows(tree: PyTree) -> PyTree:
            return jax.tree.map(lambda x: jnp.stack([x] * fragments), tree)

        return StreamingState(
            rounds=jnp.int32(0),
            center=center,
            message=jnp.zeros_like(center[0]),
            weight=jnp.float32(0),
            reduce=rows(exchange.init(center[0])),
            outer=rows(optimizer.init(center[0])),
        )

    def update(updates, state, params=None, *, weight=1.0, key, **extra_args):
        before = as_vector(params)
        own = cut(before - as_vector(updates))
        sent, sending = (state.rounds - 1) % fragments, state.rounds % fragments

        at_sent = _row(state.center, sent)
        agreed, reduce_state = exchange.update(
            state.message, _row(state.reduce, sent), at_sent, weight=state.weight, key=key
        )
        step, outer_state = optimizer.update(agreed, _row(state.outer, sent), at_sent)
        heard = StreamingState(
            rounds=state.rounds,
            center=_with_row(state.center, sent, at_sent + step),
            message=state.message,
            weight=state.weight,
            reduce=_with_row(state.reduce, sent, reduce_state),
            outer=_with_row(state.outer, sent, outer_state),
        )
        mixed = _with_row(own, sent, mix * _row(own, sent) + (1 - mix) * _row(heard.center, sent))
        is_first = state.rounds == 0  # when no message is on its way
        heard, own = optax.tree.where(is_first, (state, own), (heard, mixed))

        return as_tree(before - own.ravel()[: len(before)], updates), heard._replace(
            rounds=state.rounds + 1,
            message=_row(heard.center, sending) - _row(own, sending),
            weight=jnp.asarray(weight, jnp.float32),
        )

    return reducer(init, update)


def _row(tree: PyTree, index: jax.Array) -> PyTree:
    return jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, index, keepdims=False), tree)


def _with_row(tree: PyTree, index: jax.Array, row: PyTree) -> PyTree:
    return jax.tree.map(lambda x, r: lax.dynamic_update_index_in_dim(x, r, index, 0), tree, row)
