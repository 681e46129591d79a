"""Exchanges of encoded messages: through the owner of each slice, or from each replica to all.

A message is sent as one float32 vector, the concatenation of its leaves, in encoded form. It is
followed by one flag bit for each leaf, which is set if the leaf has a nonzero element, and by the
weight in 4 bytes. A leaf *moves* if the flag of any replica is set; if the weights are used, of any
replica with a positive weight.
"""

from math import ceil
from typing import NamedTuple

import jax
import numpy as np
import optax
from jax import lax
from jax import numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, Float32, Key, Shaped, UInt8

from ctde_jax.aggregate.across_hosts import across_hosts
from ctde_jax.aggregate.codec import Codec, Payload, exact, from_bytes, to_bytes
from ctde_jax.aggregate.combine import Combine, average
from ctde_jax.aggregate.reducer import Reducer, Star, reducer
from ctde_jax.aggregate.vector import Vector, as_tree, as_vector, count
from ctde_jax.devices import AXIS, PyTree, groups


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


def two_phase(codec: Codec = exact(), combine: Combine = average(), per_host: int = 1) -> Reducer:
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
        per_host: Number of consecutive replicas, such as the devices of a host, whose messages are
            averaged in float32 first, weighted by examples. Only hosts then exchange encoded
            messages, of which each replica sends a part. In the formula, R is the number of hosts
            and n that of elements in a part, the sum of `ceil(size / per_host)` over the leaves;
            every replica also sends `(per_host - 1) * 4 * (2 n + 1)` bytes within its host.

    Raises:
        InputError: `per_host` is less than 1, or, at initialization, does not divide the number of
            replicas, or there are too few messages for `combine`.

    Examples:
        >>> codec = ctde.aggregate.error_feedback(ctde.aggregate.quantize(bits=4))
        >>> compressed = ctde.Strategy(reduce=ctde.aggregate.two_phase(codec))
        >>> robust = ctde.Strategy(reduce=ctde.aggregate.two_phase(combine=ctde.aggregate.median()))
        >>> across = ctde.Strategy(reduce=ctde.aggregate.two_phase(codec, per_host=8))
    """
    parts = _TwoPhase(codec, combine, per_host)
    exchange = reducer(parts.init, parts.update, independent=not combine.weighted, star=parts.star)
    return across_hosts(exchange, per_host)


class _TwoPhase(NamedTuple):
    """The parts of `two_phase`."""

    codec: Codec
    rule: Combine
    per_host: int = 1

    def init(self, params: PyTree) -> TwoPhaseState:
        """Returns the state of one replica."""
        owner, of_rule = self.init_owner(params)
        return TwoPhaseState(self.init_sender(params, lax.axis_size(AXIS)), owner, of_rule)

    def update(self, updates, state: TwoPhaseState, params=None, *, weight=1.0, key, **extra_args):
        """Reduces the messages of all replicas, or of the hosts; see `across_hosts`."""
        peers = groups.peers(self.per_host)
        replicas = peers.size
        moves = _moves(updates)

        # A single replica sends nothing, so nothing is encoded.
        if replicas == 1:
            vector = as_vector(updates, self.slice_size(updates, 1))
            weights = jnp.asarray(weight, jnp.float32)[None]
            own, of_rule = self.rule.update(vector[None], weights, state.combine)
            own = jnp.where(_of_each_number(moves, updates, own.size), own, 0)
            return as_tree(own, updates), state._replace(combine=of_rule)

        # Phase 1: encode all slices, and send each with the flags and the weight to its owner.
        payload, sender = self.encode(updates, state.sender, replicas, key)
        sent = peers.all_to_all(with_weight(_with_flags(payload, moves), weight))
        payload, weights = split_weights(sent)
        payload, moves_of_all = _split_flags(payload, len(moves))

        # Phase 2: combine the owned slice, and send the result to all replicas, which decode it.
        owned = state.owner, state.combine
        payload, moves, (owner, of_rule) = self.combine_slice(
            payload, moves_of_all, weights, owned, updates, key
        )
        payload, moves = _split_flags(peers.all_gather(_with_flags(payload, moves)), len(moves))
        moves = jnp.any(moves, axis=0)
        agreed = self.decode(payload, moves, updates, key)

        # A weighted rule ignores messages with weight 0, so their senders keep their state.
        sender = _where(self.moving(moves, updates, replicas), sender, state.sender)
        if self.rule.weighted:
            sender = optax.tree.where(jnp.asarray(weight) > 0, sender, state.sender)
        return agreed, TwoPhaseState(sender, owner, of_rule)

    def star(self, nodes: int) -> Star:
        """Returns the parts for nodes and a server, which is the owner of all slices."""

        def split(payload, like):
            payload, moves = _split_flags(payload, len(jax.tree.leaves(like)))
            return payload.reshape(*payload.shape[:-1], nodes, -1), moves

        def init_server(params):
            make = jax.vmap(self.init_owner, in_axes=None, axis_name=AXIS, axis_size=nodes)
            return make(params)

        def send(message, state, weight, key):
            payload, state = self.encode(message, state, nodes, key)
            return with_weight(_with_flags(payload.ravel(), _moves(message)), weight), state

        def read(payload, like, key):
            payload, weight = split_weights(payload)
            return self.decode(*split(payload, like), like, key), weight

        def combine(payloads, state, like, key):
            payloads, weights = split_weights(payloads)
            slices, moves = split(payloads, like)
            on_owners = jax.vmap(
                lambda *owned: self.combine_slice(owned[0], moves, weights, owned[1], like, key),
                in_axes=(1, 0),
                axis_name=AXIS,
            )
            answer, moves, state = on_owners(slices, state)
            return _with_flags(answer.ravel(), moves[0]), state

        def receive(answer, like, key):
            return self.decode(*split(answer, like), like, key)

        def settle(answer, like, before, after):
            return _where(self.moving(split(answer, like)[1], like, nodes), after, before)

        return Star(
            lambda params: self.init_sender(params, nodes),
            *(init_server, send, read, combine, receive, settle),
        )

    def init_sender(self, params: PyTree, slices: int) -> PyTree:
        """Returns the codec state of a sender."""
        return self.codec.init((slices, self.slice_size(params, slices)))

    def init_owner(self, params: PyTree) -> tuple[PyTree, PyTree]:
        """Returns the states of the codec and of the rule for an owned slice."""
        size = self.slice_size(params, lax.axis_size(AXIS))
        return self.codec.init((size,)), self.rule.init(size)

    def encode(self, message: PyTree, sender: PyTree, slices: int, key: Key[Array, ""]):
        """Encodes the slices of a message; returns uint8[slice, bytes] and the sender's state."""
        vector = as_vector(message, slices * self.slice_size(message, slices))
        payload, _, sender = self.codec.encode(vector.reshape(slices, -1), sender, key)
        return payload, sender

    def combine_slice(
        self,
        payloads: UInt8[Array, "messages bytes"],
        moves: Bool[Array, "messages leaves"],
        weights: Float32[Array, " messages"],
        owned: tuple[PyTree, PyTree],
        like: PyTree,
        key: Key[Array, ""],
    ) -> tuple[Payload, Bool[Array, " leaves"], tuple[PyTree, PyTree]]:
        """Combines the payloads of the slice that this replica owns, and encodes the result.

        Returns:
            The payload, the leaves that move, and the new states of the codec and the rule.
        """
        # A leaf moves if any replica, except those that the rule ignores, sends a nonzero element
        # for it. All owners receive the same flags, so they agree on this.
        is_used = weights > 0 if self.rule.weighted else jnp.ones(len(weights), bool)
        moves = jnp.any(moves & is_used[:, None], axis=0)
        peers = groups.peers(self.per_host)
        own_moving = self.moving(moves, like, peers.size)[peers.place[1]]

        # Combine the owned slice, from rows float32[message, size].
        owner, of_rule = owned
        rows = jnp.where(own_moving[None], self.codec.decode(payloads, own_moving.size, key), 0)
        own, of_rule = self.rule.update(rows, weights, of_rule)

        # Elements of leaves that do not move keep their codec state.
        payload, _, encoded = self.codec.encode(jnp.where(own_moving, own, 0), owner, key)
        return payload, moves, (_where(own_moving, encoded, owner), of_rule)

    def decode(
        self,
        payloads: UInt8[Array, "slices bytes"],
        moves: Bool[Array, " leaves"],
        like: PyTree,
        key: Key[Array, ""],
    ) -> PyTree:
        """Decodes all slices to a message with the shapes and dtypes of `like`."""
        moving = self.moving(moves, like, len(payloads))
        vectors = jnp.where(moving, self.codec.decode(payloads, moving.shape[1], key), 0)
        return as_tree(vectors.ravel(), like)

    def moving(
        self, moves: Bool[Array, " leaves"], like: PyTree, slices: int
    ) -> Bool[Array, "slices size"]:
        """Returns whether each element of each slice belongs to a leaf that moves."""
        size = slices * self.slice_size(like, slices)
        return _of_each_number(moves, like, size).reshape(slices, -1)

    def slice_size(self, like: PyTree, slices: int) -> int:
        """Returns the number of elements of a slice, a multiple of the block of the codec."""
        return self.codec.block * ceil(count(like) / slices / self.codec.block)


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


def gathered(codec: Codec, per_host: int = 1) -> Reducer:
    """Sends the encoded message to all replicas, each of which computes the weighted average.

    If the n elements, rounded up to whole blocks of the codec, are encoded in `b` bytes, every
    replica sends `(R - 1) * (b + ceil(leaves / 8) + 4)` bytes. If every replica sends zeros for a
    leaf, the result is exactly zero, as in `two_phase`.

    Args:
        codec: Codec of the whole message, a vector of its n elements in float32.
        per_host: Number of consecutive replicas whose messages are averaged first, as in
            `two_phase`.

    Raises:
        InputError: `per_host` is less than 1, or, at initialization, does not divide the number of
            replicas.

    Examples:
        >>> codec = ctde.aggregate.error_feedback(ctde.aggregate.top_k(k=128))
        >>> strategy = ctde.Strategy(inner_steps=16, reduce=ctde.aggregate.gathered(codec))
    """
    parts = _Gathered(codec, per_host)
    return across_hosts(reducer(parts.init, parts.update, star=parts.star), per_host)


class _Gathered(NamedTuple):
    """The parts of `gathered`."""

    codec: Codec
    per_host: int = 1

    def init(self, params: PyTree) -> PyTree:
        """Returns the codec state of one replica."""
        return self.codec.init((self.padded_size(params),))

    def update(self, updates, state, params=None, *, weight=1.0, key, **extra_args):
        """Reduces the messages of all replicas, or of the hosts; see `across_hosts`."""
        peers = groups.peers(self.per_host)

        # A single replica sends nothing; without weight, its message is ignored as any other.
        has_weight = jnp.asarray(weight) > 0
        if peers.size == 1:
            return optax.tree.where(has_weight, updates, optax.tree.zeros_like(updates)), state

        # Encode the message, and gather those of all replicas with their flags and weights.
        sent, sender = self.encode(updates, state, weight, key)
        sent = peers.all_gather(sent)

        # As in `two_phase`, elements that do not move and messages with weight 0 keep their state.
        sender = _where(self.moving(sent, updates), sender, state)
        return self.average(sent, updates, key), optax.tree.where(has_weight, sender, state)

    def star(self, nodes: int) -> Star:
        """Returns the parts for nodes and a server, which passes on all messages.

        The answer is the concatenation of the messages, from which every node computes the average.
        """

        def split(answer, like):
            sent, _ = jax.eval_shape(self.encode, like, self.init(like), 1.0, jax.random.key(0))
            return answer.reshape(-1, sent.size)

        def read(payload, like, key):
            _, weight = split_weights(payload)
            # The average of a single message of any positive weight is the message.
            alone = with_weight(payload[:-4], 1.0)[None]
            return self.average(alone, like, key), weight

        def settle(answer, like, before, after):
            return _where(self.moving(split(answer, like), like), after, before)

        return Star(
            init=self.init,
            init_server=lambda params: (),
            send=self.encode,
            read=read,
            combine=lambda payloads, state, like, key: (payloads.ravel(), state),
            receive=lambda answer, like, key: self.average(split(answer, like), like, key),
            settle=settle,
        )

    def encode(self, message: PyTree, state: PyTree, weight, key: Key[Array, ""]):
        """Encodes a message with its flags and weight; returns uint8[bytes] and the new state."""
        vector = as_vector(message, self.padded_size(message))
        payload, _, state = self.codec.encode(vector, state, key)
        return with_weight(_with_flags(payload, _moves(message)), weight), state

    def average(
        self, sent: UInt8[Array, "messages bytes"], like: PyTree, key: Key[Array, ""]
    ) -> PyTree:
        """Averages messages by weight, with the shapes and dtypes of `like`."""
        size = self.padded_size(like)
        payloads, weights = split_weights(sent)
        payloads, _ = _split_flags(payloads, len(jax.tree.leaves(like)))
        shares = weights / jnp.where(weights.sum() > 0, weights.sum(), 1)

        # The scan decodes one message at a time, so memory holds one decoded vector and not R.
        def add(
            total: Vector, message: tuple[UInt8[Array, " bytes"], Float32[Array, ""]]
        ) -> tuple[Vector, None]:
            payload, share = message
            vector = self.codec.decode(payload, size, key)
            return total + jnp.where(share > 0, vector * share, 0), None

        agreed, _ = lax.scan(add, jnp.zeros(size), (payloads, shares))
        return as_tree(jnp.where(self.moving(sent, like), agreed, 0), like)

    def moving(self, sent: UInt8[Array, "messages bytes"], like: PyTree) -> Bool[Array, " size"]:
        """Returns whether each element belongs to a leaf that moves in a message with weight."""
        payloads, weights = split_weights(sent)
        _, moves = _split_flags(payloads, len(jax.tree.leaves(like)))
        moves = jnp.any(moves & (weights > 0)[:, None], axis=0)
        return _of_each_number(moves, like, self.padded_size(like))

    def padded_size(self, like: PyTree) -> int:
        """Returns the number of elements, rounded up to whole blocks of the codec."""
        return self.codec.block * ceil(count(like) / self.codec.block)


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
    return jnp.concatenate([*flags, jnp.zeros(size - count(tree), bool)])


def _where(moving: Bool[Array, "... size"], new: PyTree, old: PyTree) -> PyTree:
    """Selects the codec state elementwise: `new` for elements that move, `old` for the others.

    All arrays of a codec state have the shape of the values; see `Codec.init`.
    """
    return jax.tree.map(lambda x, y: jnp.where(moving, x, y), new, old)
