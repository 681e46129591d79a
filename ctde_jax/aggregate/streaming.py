"""Fragments of the model that are agreed on in turn, each while the replicas already take their next steps alone."""

from typing import NamedTuple

import jax
import optax
from jax import lax
from jax import numpy as jnp

from ctde_jax.aggregate.exchange import two_phase
from ctde_jax.aggregate.reducer import reducer
from ctde_jax.devices import PyTree
from ctde_jax.errors import InputError, check_at_least


class StreamingState(NamedTuple):
    """The center's fragments, equal on all replicas, and the replica's message that is on its way."""

    rounds: jax.Array  # int32[]
    center: PyTree  # each leaf float32[fragment, size]
    message: PyTree  # each leaf float32[size], of the fragment of the last round
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

    For a `Strategy` that `diverges`. Every leaf, as a vector, is cut into equal pieces, one for each fragment. At the
    end of round t a replica's message is the outer gradient of fragment `t mod fragments`; it travels during the local
    steps of round t + 1, on which it does not depend, nor they on it; then the center's fragment takes its outer step,
    and the
    replica's becomes `mix * its own + (1 - mix) * the center's`. A fragment is sent every `fragments` rounds, so a
    round sends what `reduce` sends for the `ceil(n / fragments)` numbers of each leaf of n.

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

    def cut(leaf: jax.Array) -> jax.Array:
        vector = leaf.ravel().astype(jnp.float32)
        return jnp.pad(vector, (0, -vector.size % fragments)).reshape(fragments, -1)

    def mixture(own: jax.Array, center: jax.Array) -> jax.Array:
        return jnp.where(own == center, own, mix * own + (1 - mix) * center)  # equal numbers keep their bits

    def whole(pieces: jax.Array, like: jax.Array) -> jax.Array:
        return pieces.ravel()[: like.size].reshape(like.shape)

    def init(params: PyTree) -> StreamingState:
        center = jax.tree.map(cut, params)
        first = jax.tree.map(lambda x: x[0], center)

        def rows(tree: PyTree) -> PyTree:
            return jax.tree.map(lambda x: jnp.stack([x] * fragments), tree)

        return StreamingState(
            rounds=jnp.int32(0),
            center=center,
            message=optax.tree.zeros_like(first),
            weight=jnp.float32(0),
            reduce=rows(exchange.init(first)),
            outer=rows(optimizer.init(first)),
        )

    def update(updates, state, params=None, *, weight=1.0, key, **extra_args):
        before = jax.tree.map(lambda p: p.astype(jnp.float32), params)
        own = jax.tree.map(lambda p, d: cut(p - d.astype(jnp.float32)), before, updates)
        sent, sending = (state.rounds - 1) % fragments, state.rounds % fragments

        at_sent = _row(state.center, sent)
        agreed, reduce_state = exchange.update(
            state.message, _row(state.reduce, sent), at_sent, weight=state.weight, key=key
        )
        step, outer_state = optimizer.update(agreed, _row(state.outer, sent), at_sent)
        heard = StreamingState(
            rounds=state.rounds,
            center=_with_row(state.center, sent, optax.tree.add(at_sent, step)),
            message=state.message,
            weight=state.weight,
            reduce=_with_row(state.reduce, sent, reduce_state),
            outer=_with_row(state.outer, sent, outer_state),
        )
        mixed = jax.tree.map(mixture, _row(own, sent), _row(heard.center, sent))
        is_first = state.rounds == 0  # when no message is on its way
        heard, own = optax.tree.where(is_first, (state, own), (heard, _with_row(own, sent, mixed)))

        moved = jax.tree.map(lambda p, x, d: (p - whole(x, p)).astype(d.dtype), before, own, updates)
        return moved, heard._replace(
            rounds=state.rounds + 1,
            message=optax.tree.sub(_row(heard.center, sending), _row(own, sending)),
            weight=jnp.asarray(weight, jnp.float32),
        )

    return reducer(init, update)


def _row(tree: PyTree, index: jax.Array) -> PyTree:
    return jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, index, keepdims=False), tree)


def _with_row(tree: PyTree, index: jax.Array, row: PyTree) -> PyTree:
    return jax.tree.map(lambda x, r: lax.dynamic_update_index_in_dim(x, r, index, 0), tree, row)
