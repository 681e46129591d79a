"""How encoded messages travel: by way of the owner of each slice, or from everybody to everybody.

A message, whatever its tree, travels as one vector of float32, the leaves one after another. With it travels its
weight, as 4 more bytes.
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
from ctde_jax.replica import AXIS, PyTree


class TwoPhaseState(NamedTuple):
    """What the codec and the rule remember, each replica its own."""

    sender: PyTree  # of the codec, for the slices that are sent to their owners
    owner: PyTree  # of the codec, for the replica's own slice
    combine: PyTree


def two_phase(codec: Codec = exact(), combine: Combine = average()) -> optax.GradientTransformationExtraArgs:
    """Sends each slice of the message to its owner, which combines what it gets and tells everybody.

    The message of n numbers is cut into R slices, one owned by each of the R replicas: encode, all-to-all, decode,
    combine the own slice in float32, encode, all-gather, decode. A slice has `ceil(n / R)` numbers, rounded up to whole
    blocks of the codec; with `b` the bytes that it becomes, every replica sends `(R - 1) * (b + 4)` bytes and then
    `(R - 1) * b`.
    """

    def slice_size(tree: PyTree) -> int:
        return codec.block * ceil(_count(tree) / lax.axis_size(AXIS) / codec.block)

    def init(params: PyTree) -> TwoPhaseState:
        size = slice_size(params)
        return TwoPhaseState(codec.init((lax.axis_size(AXIS), size)), codec.init((size,)), combine.init(size))

    def update(updates, state, params=None, *, weight=1.0, key, **extra_args):
        size = slice_size(updates)
        slices = as_vector(updates, size * lax.axis_size(AXIS)).reshape(-1, size)
        if len(slices) == 1:  # who is alone sends nothing, so nothing has to be written
            own, combine_state = combine.update(slices, jnp.asarray(weight, jnp.float32)[None], state.combine)
            return as_tree(own, updates), state._replace(combine=combine_state)

        payload, _, sender = codec.encode(slices, state.sender, key)
        payload, weights = split_weights(lax.all_to_all(with_weight(payload, weight), AXIS, 0, 0, tiled=True))
        own, combine_state = combine.update(codec.decode(payload, size, key), weights, state.combine)

        payload, _, owner = codec.encode(own, state.owner, key)
        agreed = codec.decode(lax.all_gather(payload, AXIS), size, key)
        if combine.weighted:  # then nobody has heard what a replica without weight has said
            sender = optax.tree.where(jnp.asarray(weight) > 0, sender, state.sender)
        return as_tree(agreed.ravel(), updates), TwoPhaseState(sender, owner, combine_state)

    return reducer(init, update, independent=not combine.weighted)


def recut(state: TwoPhaseState, like: TwoPhaseState) -> TwoPhaseState:
    """Cuts the state of all replicas anew for another number of replicas, who own other slices.

    A sender's residual becomes the mean of all, so that what all together have yet to say stays the same; what an owner
    remembers goes along with its numbers.

    Args:
        state: Arrays `[replica, ...]` of what was.
        like: Arrays, or shapes and types, of what is to be.
    """

    def owned(x: np.ndarray, like: jax.ShapeDtypeStruct) -> np.ndarray:
        return np.moveaxis(_slices(np.moveaxis(x, 0, -2), like.shape[0], like.shape[-1]), -2, 0)

    def sent(x: np.ndarray, like: jax.ShapeDtypeStruct) -> np.ndarray:
        mean = _slices(x.mean(axis=0, dtype=np.float32), *like.shape[-2:])
        return np.broadcast_to(mean, like.shape)

    return TwoPhaseState(
        jax.tree.map(sent, state.sender, like.sender),
        jax.tree.map(owned, state.owner, like.owner),
        jax.tree.map(owned, state.combine, like.combine),
    )


def _slices(x: np.ndarray, count: int, size: int) -> np.ndarray:
    """Cuts the vectors `[..., slice, size]` into so many slices of another size, filled up with zeros."""
    vectors = x.reshape(*x.shape[:-2], -1)[..., : count * size]
    missing = count * size - vectors.shape[-1]
    return np.pad(vectors, [(0, 0)] * (vectors.ndim - 1) + [(0, missing)]).reshape(*x.shape[:-2], count, size)


def gathered(codec: Codec) -> optax.GradientTransformationExtraArgs:
    """Sends the encoded message to everybody, and everybody averages the messages by their weights.

    With `b` the bytes that the codec makes of the n numbers, rounded up to whole blocks of the codec, every replica
    sends `(R - 1) * (b + 4)` bytes.
    """

    def padded_size(tree: PyTree) -> int:
        return codec.block * ceil(_count(tree) / codec.block)

    def update(updates, state, params=None, *, weight=1.0, key, **extra_args):
        if lax.axis_size(AXIS) == 1:
            return updates, state
        size = padded_size(updates)
        payload, _, sender = codec.encode(as_vector(updates, size), state, key)
        payloads, weights = split_weights(lax.all_gather(with_weight(payload, weight), AXIS))
        shares = weights / jnp.where(weights.sum() > 0, weights.sum(), 1)

        def add(total: jax.Array, message: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
            payload, share = message
            return total + jnp.where(share > 0, codec.decode(payload, size, key) * share, 0), None

        agreed, _ = lax.scan(add, jnp.zeros(size), (payloads, shares))
        return as_tree(agreed, updates), optax.tree.where(jnp.asarray(weight) > 0, sender, state)

    return reducer(lambda params: codec.init((padded_size(params),)), update)


def as_vector(tree: PyTree, size: int | None = None) -> jax.Array:
    """Writes the leaves one after another and fills up with zeros, float32[size]."""
    missing = [jnp.zeros((size or _count(tree)) - _count(tree))]
    return jnp.concatenate([leaf.ravel().astype(jnp.float32) for leaf in jax.tree.leaves(tree)] + missing)


def as_tree(vector: jax.Array, like: PyTree) -> PyTree:
    """Undoes `as_vector`, with shapes and types as in another tree."""
    leaves, structure = jax.tree.flatten(like)
    borders = [0, *accumulate(leaf.size for leaf in leaves)]
    parts = [vector[start:stop] for start, stop in pairwise(borders)]
    return structure.unflatten(
        [part.reshape(leaf.shape).astype(leaf.dtype) for part, leaf in zip(parts, leaves, strict=True)]
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
