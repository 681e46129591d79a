"""Exchanges of encoded messages: through the owner of each slice, or from each replica to all.

A message is sent as one float32 vector, the concatenation of its leaves, in encoded form. It is
followed by one flag bit for each leaf, which is set if the leaf has a nonzero element, and by the
weight in 4 bytes. A leaf *moves* if the flag of any replica is set; if the weights are used, of any
replica with a positive weight.
"""

from itertools import accumulate, pairwise
from math import ceil
from typing import NamedTuple, TypeAlias

import jax
import numpy as np
import optax
from jax import lax
from jax import numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, Float32, Shaped, UInt8

from ctde_jax.aggregate.codec import Codec, Payload, exact, from_bytes, to_bytes
from ctde_jax.aggregate.combine import Combine, average
from ctde_jax.aggregate.reducer import reducer
from ctde_jax.devices import AXIS, PyTree

Vector: TypeAlias = Float32[Array, " size"]
"""The concatenated leaves of a message."""


class TwoPhaseState(NamedTuple):
    """The state of the codec and of the combination rule on one replica."""

    sender: PyTree  # codec state for the slices sent to their owners, [slice, size]
    owner: PyTree  # codec state for the slice that this replica owns, [size]
    combine: PyTree  # state of the combination rule for the slice that this replica owns

    def recut(self, like: "TwoPhaseState") -> "TwoPhaseState":
        """Converts the state of all replicas to a different number of replicas, and so of slices.

        The residual of each sender becomes the mean over all senders, so that the mean of the
        residuals is preserved. The state of an owner is reassigned with the elements of its slice.

        Args:
            like: Arrays or `ShapeDtypeStruct`s `[replica, ...]`, shaped like the state to return.
        """

        def owned(x: np.ndarray, like: jax.ShapeDtypeStruct) -> np.ndarray:
            # [replica, ..., size] -> [..., slice, size] -> other slices -> [replica, ..., size]
            return np.moveaxis(_slices(np.moveaxis(x, 0, -2), like.shape[0], like.shape[-1]), -2, 0)

        def sent(x: np.ndarray, like: jax.ShapeDtypeStruct) -> np.ndarray:
            # [sender, slice, size] -> [slice, size] -> other slices, equal for all senders
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
    """Sends each slice to its owner, which combines it and sends the result to all replicas.

    The message of n elements is cut into R slices, one owned by each of the R replicas: encode,
    all-to-all, decode, combine the owned slice in float32, encode, all-gather, decode. A slice has
    `ceil(n / R)` elements, rounded up to whole blocks of the codec. If it is encoded in `b` bytes
    and the flags take `f = ceil(leaves / 8)` bytes, every replica sends `(R - 1) * (b + f + 4)`
    bytes to the owners and `(R - 1) * (b + f)` bytes as an owner.

    If every replica sends zeros for a leaf, the result is exactly zero and the residuals of the
    leaf do not change, so a frozen layer does not change even if the codec cannot represent zero.
    Zeros in a leaf with nonzero elements are encoded like all other elements, so `sign` and
    statistical levels decode them as nonzero.

    Args:
        codec: Codec of the slices; by default float32, 4 bytes per element.
        combine: Rule that combines the messages; by default their mean, weighted by examples.

    Raises:
        InputError: At initialization, if there are too few replicas for `combine`.

    Examples:
        >>> codec = ctde.aggregate.error_feedback(ctde.aggregate.quantize(bits=4))
        >>> compressed = ctde.Strategy(reduce=ctde.aggregate.two_phase(codec))
        >>> robust = ctde.Strategy(reduce=ctde.aggregate.two_phase(combine=ctde.aggregate.median()))
    """

    def slice_size(tree: PyTree) -> int:
        return codec.block * ceil(_count(tree) / lax.axis_size(AXIS) / codec.block)

    def init(params: PyTree) -> TwoPhaseState:
        size = slice_size(params)
        return TwoPhaseState(
            codec.init((lax.axis_size(AXIS), size)), codec.init((size,)), combine.init(size)
        )

    def update(updates, state, params=None, *, weight=1.0, key, **extra_args):
        size = slice_size(updates)
        replicas = lax.axis_size(AXIS)
        slices = as_vector(updates, size * replicas).reshape(-1, size)
        moves = _moves(updates)

        # A single replica sends nothing, so nothing is encoded.
        if replicas == 1:
            own, combine_state = combine.update(
                slices, jnp.asarray(weight, jnp.float32)[None], state.combine
            )
            own = jnp.where(_of_each_number(moves, updates, size), own, 0)
            return as_tree(own, updates), state._replace(combine=combine_state)

        # Phase 1: encode all slices, and send each with the flags and the weight to its owner.
        payload, _, sender = codec.encode(slices, state.sender, key)
        sent = lax.all_to_all(
            with_weight(_with_flags(payload, moves), weight), AXIS, 0, 0, tiled=True
        )
        payload, weights = split_weights(sent)
        payload, moves = _split_flags(payload, len(moves))

        # A leaf moves if any replica, except those that the rule ignores, sends a nonzero element
        # for it. All owners receive the same flags, so they agree on this.
        is_used = weights > 0 if combine.weighted else jnp.ones(replicas, bool)
        moves = jnp.any(moves & is_used[:, None], axis=0)
        own_moving = _of_each_number(moves, updates, slices.size).reshape(-1, size)[
            lax.axis_index(AXIS)
        ]

        # Combine the owned slice, from rows float32[replica, size].
        rows = jnp.where(own_moving[None], codec.decode(payload, size, key), 0)
        own, combine_state = combine.update(rows, weights, state.combine)
        own = jnp.where(own_moving, own, 0)

        # Phase 2: encode the result, and send it to all replicas. Every replica decodes all slices.
        payload, _, owner = codec.encode(own, state.owner, key)
        payload, moves = _split_flags(lax.all_gather(_with_flags(payload, moves), AXIS), len(moves))
        moving = _of_each_number(jnp.any(moves, axis=0), updates, slices.size).reshape(-1, size)
        agreed = jnp.where(moving, codec.decode(payload, size, key), 0)

        # Elements of leaves that do not move keep their codec state. A weighted rule ignores
        # messages with weight 0, so their senders keep all of it.
        sender = _where(moving, sender, state.sender)
        owner = _where(own_moving, owner, state.owner)
        if combine.weighted:
            sender = optax.tree.where(jnp.asarray(weight) > 0, sender, state.sender)
        return as_tree(agreed.ravel(), updates), TwoPhaseState(sender, owner, combine_state)

    return reducer(init, update, independent=not combine.weighted)


def _slices(
    x: Shaped[np.ndarray, "... slices slice_size"], count: int, size: int
) -> Shaped[np.ndarray, "... count size"]:
    """Recuts vectors, given as slices, into `count` slices of `size`, padded with zeros."""
    # Elements beyond the new slices are padding of the old ones.
    vectors = x.reshape(*x.shape[:-2], -1)[..., : count * size]
    missing = count * size - vectors.shape[-1]
    return np.pad(vectors, [(0, 0)] * (vectors.ndim - 1) + [(0, missing)]).reshape(
        *x.shape[:-2], count, size
    )


def gathered(codec: Codec) -> optax.GradientTransformationExtraArgs:
    """Sends the encoded message to all replicas, each of which computes the weighted average.

    If the n elements, rounded up to whole blocks of the codec, are encoded in `b` bytes, every
    replica sends `(R - 1) * (b + ceil(leaves / 8) + 4)` bytes. If every replica sends zeros for a
    leaf, the result is exactly zero, as in `two_phase`.

    Args:
        codec: Codec of the whole message, a vector of its n elements in float32.

    Examples:
        >>> codec = ctde.aggregate.error_feedback(ctde.aggregate.top_k(k=128))
        >>> strategy = ctde.Strategy(inner_steps=16, reduce=ctde.aggregate.gathered(codec))
    """

    def padded_size(tree: PyTree) -> int:
        return codec.block * ceil(_count(tree) / codec.block)

    def update(updates, state, params=None, *, weight=1.0, key, **extra_args):
        # A single replica sends nothing; without weight, its message is ignored as any other.
        if lax.axis_size(AXIS) == 1:
            has_weight = jnp.asarray(weight) > 0
            return optax.tree.where(has_weight, updates, optax.tree.zeros_like(updates)), state

        # Encode the message, and gather those of all replicas with their flags and weights.
        size = padded_size(updates)
        moves = _moves(updates)
        payload, _, sender = codec.encode(as_vector(updates, size), state, key)
        sent = lax.all_gather(with_weight(_with_flags(payload, moves), weight), AXIS)
        payloads, weights = split_weights(sent)
        payloads, moves = _split_flags(payloads, len(moves))

        # Average by weight. The scan decodes one message at a time, so memory holds one decoded
        # vector and not R of them.
        shares = weights / jnp.where(weights.sum() > 0, weights.sum(), 1)
        moving = _of_each_number(jnp.any(moves & (weights > 0)[:, None], axis=0), updates, size)

        def add(
            total: Vector, message: tuple[UInt8[Array, " bytes"], Float32[Array, ""]]
        ) -> tuple[Vector, None]:
            payload, share = message
            return total + jnp.where(share > 0, codec.decode(payload, size, key) * share, 0), None

        agreed, _ = lax.scan(add, jnp.zeros(size), (payloads, shares))

        # As in `two_phase`, elements that do not move and messages with weight 0 keep their state.
        sender = optax.tree.where(jnp.asarray(weight) > 0, _where(moving, sender, state), state)
        return as_tree(jnp.where(moving, agreed, 0), updates), sender

    return reducer(lambda params: codec.init((padded_size(params),)), update)


def as_vector(tree: PyTree, size: int | None = None) -> Vector:
    """Concatenates the leaves of a tree to one vector, padded with zeros to `size`, if given."""
    missing = [jnp.zeros((size or _count(tree)) - _count(tree))]
    return jnp.concatenate(
        [leaf.ravel().astype(jnp.float32) for leaf in jax.tree.leaves(tree)] + missing
    )


def as_tree(vector: Vector, like: PyTree) -> PyTree:
    """Inverts `as_vector`; shapes and dtypes are those of `like`."""
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


def with_weight(payload: Payload, weight: Float[ArrayLike, ""]) -> Payload:
    """Appends a weight to each row of a payload, as a float32."""
    written = to_bytes(jnp.asarray(weight, jnp.float32)[None])
    return jnp.concatenate([payload, jnp.broadcast_to(written, (*payload.shape[:-1], 4))], axis=-1)


def split_weights(payload: Payload) -> tuple[Payload, Float32[Array, "..."]]:
    """Inverts `with_weight`: returns the payload and the weights."""
    return payload[..., :-4], from_bytes(payload[..., -4:])[..., 0]


def _with_flags(payload: Payload, flags: Bool[Array, " leaves"]) -> Payload:
    """Appends flags, packed into `ceil(leaves / 8)` bytes, to each row of a payload."""
    written = jnp.packbits(flags)
    return jnp.concatenate(
        [payload, jnp.broadcast_to(written, (*payload.shape[:-1], len(written)))], axis=-1
    )


def _split_flags(payload: Payload, count: int) -> tuple[Payload, Bool[Array, "... count"]]:
    """Inverts `_with_flags`: returns the payload and the flags."""
    end = payload.shape[-1] - ceil(count / 8)
    return payload[..., :end], jnp.unpackbits(payload[..., end:], axis=-1, count=count) > 0


def _moves(tree: PyTree) -> Bool[Array, " leaves"]:
    """Returns whether each leaf has a nonzero element; NaN is nonzero."""
    return jnp.stack([jnp.any(leaf != 0) for leaf in jax.tree.leaves(tree)])


def _of_each_number(moves: Bool[Array, " leaves"], tree: PyTree, size: int) -> Bool[Array, " size"]:
    """Repeats each leaf's flag for each of its elements, in the order of `as_vector`.

    Args:
        moves: Flags of the leaves.
        tree: The message.
        size: Size of the result; the flags of the padding are False.
    """
    flags = [
        jnp.broadcast_to(flag, leaf.size)
        for flag, leaf in zip(moves, jax.tree.leaves(tree), strict=True)
    ]
    # The padding does not move.
    return jnp.concatenate([*flags, jnp.zeros(size - _count(tree), bool)])


def _where(moving: Bool[Array, "... size"], new: PyTree, old: PyTree) -> PyTree:
    """Selects the codec state elementwise: `new` for elements that move, `old` for the others.

    All arrays of a codec state have the shape of the values; see `Codec.init`.
    """
    return jax.tree.map(lambda x, y: jnp.where(moving, x, y), new, old)
