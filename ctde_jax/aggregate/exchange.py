"""How encoded messages travel: by way of the owner of each slice, or from everybody to everybody.

A message, whatever its tree, travels as one vector of float32, the leaves one after another. Behind it travel one bit
for each leaf, whether any of its numbers is not zero, and the weight, in 4 bytes.
"""

from itertools import accumulate, pairwise
from math import ceil
from typing import NamedTuple

import jax
import numpy as np
import optax
from jax import lax
from jax import numpy as jnp

from ctde_jax.aggregate.codec import Codec, exact, from_bytes, to_bytes
from ctde_jax.aggregate.combine import Combine, average
from ctde_jax.aggregate.reducer import reducer
from ctde_jax.devices import AXIS, PyTree


class TwoPhaseState(NamedTuple):
    """What the codec and the rule remember, each replica its own."""

    sender: PyTree  # of the codec, for the slices that are sent to their owners
    owner: PyTree  # of the codec, for the replica's own slice
    combine: PyTree

    def recut(self, like: "TwoPhaseState") -> "TwoPhaseState":
        """Returns the state of all replicas for another number of them, who own other slices.

        The residual of each sender becomes the mean over all senders, which keeps the sum of what is still to be sent.
        What an owner remembers moves with its numbers.

        Args:
            like: Arrays, or shapes and dtypes, `[replica, ...]`, of the state to return.
        """

        def owned(x: np.ndarray, like: jax.ShapeDtypeStruct) -> np.ndarray:
            return np.moveaxis(_slices(np.moveaxis(x, 0, -2), like.shape[0], like.shape[-1]), -2, 0)

        def sent(x: np.ndarray, like: jax.ShapeDtypeStruct) -> np.ndarray:
            mean = _slices(x.mean(axis=0, dtype=np.float32), *like.shape[-2:])
            return np.broadcast_to(mean, like.shape)

        return TwoPhaseState(
            jax.tree.map(sent, self.sender, like.sender),
            jax.tree.map(owned, self.owner, like.owner),
            jax.tree.map(owned, self.combine, like.combine),
        )


def two_phase(
    codec: Codec = exact(), combine: Combine = average()
) -> optax.GradientTransformationExtraArgs:
    """Sends each slice of the message to its owner, which combines what it gets and sends the result to everybody.

    The message of n numbers is cut into R slices, one owned by each of the R replicas: encode, all-to-all, decode,
    combine the own slice in float32, encode, all-gather, decode. A slice has `ceil(n / R)` numbers, rounded up to whole
    blocks of the codec; with `b` the bytes that it becomes and `f = ceil(leaves / 8)`, every replica sends
    `(R - 1) * (b + f + 4)` bytes and then `(R - 1) * (b + f)`.

    A leaf that every replica sends as zeros is agreed on as exactly zero, and its residuals stay: codecs without a zero
    do not move a frozen layer. That is one bit for each leaf; single zeros in a leaf that moves are as exact as the
    codec, so `sign` and statistical levels move them.
    """

    def slice_size(tree: PyTree) -> int:
        return codec.block * ceil(_count(tree) / lax.axis_size(AXIS) / codec.block)

    def init(params: PyTree) -> TwoPhaseState:
        size = slice_size(params)
        return TwoPhaseState(
            codec.init((lax.axis_size(AXIS), size)), codec.init((size,)), combine.init(size)
        )

    def update(updates, state, params=None, *, weight=1.0, key, **extra_args):
        size, replicas = slice_size(updates), lax.axis_size(AXIS)
        slices, moves = as_vector(updates, size * replicas).reshape(-1, size), _moves(updates)
        if replicas == 1:  # nothing is sent, so nothing has to be written
            own, combine_state = combine.update(
                slices, jnp.asarray(weight, jnp.float32)[None], state.combine
            )
            own = jnp.where(_of_each_number(moves, updates, size), own, 0)
            return as_tree(own, updates), state._replace(combine=combine_state)

        # To the owners.
        payload, _, sender = codec.encode(slices, state.sender, key)
        sent = lax.all_to_all(
            with_weight(_with_flags(payload, moves), weight), AXIS, 0, 0, tiled=True
        )
        payload, weights = split_weights(sent)
        payload, moves = _split_flags(payload, len(moves))
        is_heard = weights > 0 if combine.weighted else jnp.ones(replicas, bool)
        moves = jnp.any(moves & is_heard[:, None], axis=0)
        own_moving = _of_each_number(moves, updates, slices.size).reshape(-1, size)[
            lax.axis_index(AXIS)
        ]
        rows = jnp.where(own_moving[None], codec.decode(payload, size, key), 0)
        own, combine_state = combine.update(rows, weights, state.combine)
        own = jnp.where(own_moving, own, 0)

        # From the owners.
        payload, _, owner = codec.encode(own, state.owner, key)
        payload, moves = _split_flags(lax.all_gather(_with_flags(payload, moves), AXIS), len(moves))
        moving = _of_each_number(jnp.any(moves, axis=0), updates, slices.size).reshape(-1, size)
        agreed = jnp.where(moving, codec.decode(payload, size, key), 0)

        sender, owner = _where(moving, sender, state.sender), _where(own_moving, owner, state.owner)
        if combine.weighted:  # the owners ignore a replica without weight, so its residual stays
            sender = optax.tree.where(jnp.asarray(weight) > 0, sender, state.sender)
        return as_tree(agreed.ravel(), updates), TwoPhaseState(sender, owner, combine_state)

    return reducer(init, update, independent=not combine.weighted)


def _slices(x: np.ndarray, count: int, size: int) -> np.ndarray:
    """Cuts the vectors `[..., slice, size]` into so many slices of another size, filled up with zeros."""
    vectors = x.reshape(*x.shape[:-2], -1)[..., : count * size]
    missing = count * size - vectors.shape[-1]
    return np.pad(vectors, [(0, 0)] * (vectors.ndim - 1) + [(0, missing)]).reshape(
        *x.shape[:-2], count, size
    )


def gathered(codec: Codec) -> optax.GradientTransformationExtraArgs:
    """Sends the encoded message to everybody, and everybody averages the messages by their weights.

    With `b` the bytes that the codec makes of the n numbers, rounded up to whole blocks of the codec, every replica
    sends `(R - 1) * (b + ceil(leaves / 8) + 4)` bytes. A leaf that every replica sends as zeros is agreed on as exactly
    zero, as in `two_phase`.
    """

    def padded_size(tree: PyTree) -> int:
        return codec.block * ceil(_count(tree) / codec.block)

    def update(updates, state, params=None, *, weight=1.0, key, **extra_args):
        if lax.axis_size(AXIS) == 1:
            return updates, state
        size, moves = padded_size(updates), _moves(updates)
        payload, _, sender = codec.encode(as_vector(updates, size), state, key)
        sent = lax.all_gather(with_weight(_with_flags(payload, moves), weight), AXIS)
        payloads, weights = split_weights(sent)
        payloads, moves = _split_flags(payloads, len(moves))
        shares = weights / jnp.where(weights.sum() > 0, weights.sum(), 1)
        moving = _of_each_number(jnp.any(moves & (weights > 0)[:, None], axis=0), updates, size)

        def add(total: jax.Array, message: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
            payload, share = message
            return total + jnp.where(share > 0, codec.decode(payload, size, key) * share, 0), None

        agreed, _ = lax.scan(add, jnp.zeros(size), (payloads, shares))
        sender = optax.tree.where(jnp.asarray(weight) > 0, _where(moving, sender, state), state)
        return as_tree(jnp.where(moving, agreed, 0), updates), sender

    return reducer(lambda params: codec.init((padded_size(params),)), update)


def as_vector(tree: PyTree, size: int | None = None) -> jax.Array:
    """Writes the leaves one after another and fills up with zeros, float32[size]."""
    missing = [jnp.zeros((size or _count(tree)) - _count(tree))]
    return jnp.concatenate(
        [leaf.ravel().astype(jnp.float32) for leaf in jax.tree.leaves(tree)] + missing
    )


def as_tree(vector: jax.Array, like: PyTree) -> PyTree:
    """Undoes `as_vector`, with shapes and types as in another tree."""
    leaves, structure = jax.tree.flatten(like)
    borders = [0, *accumulate(leaf.size for leaf in leaves)]
    parts = [vector[start:stop] for start, stop in pairwise(borders)]
    return structure.unflatten(
        [
            part.reshape(leaf.shape).astype(leaf.dtype)
            for part, leaf in zip(parts, leaves, strict=True)
        ]
    )


def _count(tree: PyTree) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def with_weight(payload: jax.Array, weight: jax.typing.ArrayLike) -> jax.Array:
    """Writes the weight behind each row of `uint8[..., bytes]`."""
    written = to_bytes(jnp.asarray(weight, jnp.float32)[None])
    return jnp.concatenate([payload, jnp.broadcast_to(written, (*payload.shape[:-1], 4))], axis=-1)


def split_weights(payload: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Undoes `with_weight`."""
    return payload[..., :-4], from_bytes(payload[..., -4:])[..., 0]


def _with_flags(payload: jax.Array, flags: jax.Array) -> jax.Array:
    """Writes `bool[n]` behind each row of `uint8[..., bytes]`."""
    written = jnp.packbits(flags)
    return jnp.concatenate(
        [payload, jnp.broadcast_to(written, (*payload.shape[:-1], len(written)))], axis=-1
    )


def _split_flags(payload: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """Inverts `_with_flags`: returns the payload, and the flags `bool[..., count]`."""
    end = payload.shape[-1] - ceil(count / 8)
    return payload[..., :end], jnp.unpackbits(payload[..., end:], axis=-1, count=count) > 0


def _moves(tree: PyTree) -> jax.Array:
    """Returns which leaves are not all zeros, bool[leaf]; NaN is not zero."""
    return jnp.stack([jnp.any(leaf != 0) for leaf in jax.tree.leaves(tree)])


def _of_each_number(moves: jax.Array, tree: PyTree, size: int) -> jax.Array:
    """Repeats the flag of each leaf for its numbers, in the order of `as_vector`; bool[size]."""
    flags = [
        jnp.broadcast_to(flag, leaf.size)
        for flag, leaf in zip(moves, jax.tree.leaves(tree), strict=True)
    ]
    return jnp.concatenate([*flags, jnp.zeros(size - _count(tree), bool)])


def _where(moving: jax.Array, new: PyTree, old: PyTree) -> PyTree:
    """Keeps a codec's state, whose arrays are shaped like the values, for the numbers that do not move."""
    return jax.tree.map(lambda x, y: jnp.where(moving, x, y), new, old)
