"""Exchanges across hosts: a host averages its messages, and its devices exchange a part each."""

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp

from ctde_jax.aggregate.reducer import CutByOwner, IndependentReducer, Reducer, reducer
from ctde_jax.aggregate.vector import as_tree, as_vector, cut, whole
from ctde_jax.devices import AXIS, PyTree, groups, is_vmapped
from ctde_jax.errors import check_at_least


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class AcrossHostsState:
    """The state of an exchange between the devices at the same position of all hosts."""

    exchange: PyTree  # state of the exchange on this replica, for its part of the message
    per_host: int = field(metadata={"static": True})

    def recut(self, like: "AcrossHostsState") -> "AcrossHostsState":
        """Converts the state of all replicas to another number of hosts with as many replicas each.

        The peers at each position have the same part as before. A state that is not cut by owner
        starts on all of them from their mean.

        Args:
            like: Arrays or `ShapeDtypeStruct`s `[replica, ...]`, shaped like the state to return.
        """

        def is_cut(part: PyTree) -> bool:
            return isinstance(part, CutByOwner)

        def convert(part: Any, like: Any) -> Any:
            if is_cut(part):
                return part.recut(like)
            return np.broadcast_to(part.mean(axis=0, dtype=np.float32), like.shape)

        def at(position: int, tree: PyTree) -> PyTree:
            return jax.tree.map(lambda x: _at(position, self.per_host, x), tree)

        of_positions = [
            jax.tree.map(
                convert, at(position, self.exchange), at(position, like.exchange), is_leaf=is_cut
            )
            for position in range(self.per_host)
        ]
        # [position][host, ...] -> [replica, ...]
        rows = jax.tree.map(
            lambda *parts: np.stack(parts, axis=1).reshape(-1, *parts[0].shape[1:]), *of_positions
        )
        return AcrossHostsState(rows, self.per_host)


def _at(position: int, per_host: int, x: Any) -> Any:
    """Returns the rows `[host, ...]` of the replicas at a position, or their shape and dtype."""
    if isinstance(x, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct((x.shape[0] // per_host, *x.shape[1:]), x.dtype)
    return x[position::per_host]


def across_hosts(exchange: Reducer, per_host: int) -> Reducer:
    """Wraps an exchange between peers, the replicas at the same position of all hosts.

    Each leaf of a message is cut into `per_host` equal parts. A reduce-scatter computes the
    weighted mean within each host in float32, of which each replica receives one part. The peers
    exchange it as the message of their host, whose weight is the sum of the weights there. An
    all-gather within each host completes the result.

    With L replicas on each host and n elements after padding each leaf to a multiple of L, a
    replica sends `(L - 1) * 4 * (n / L + 1)` bytes to the sum and `(L - 1) * 4 * n / L` bytes to
    the result, all within its host; across hosts, it sends the bytes of the exchange for `n / L`
    elements.

    Args:
        exchange: Reducer whose `update` communicates within `groups.peers(per_host)`. If this is 1,
            it is returned as it is.
        per_host: Number of consecutive replicas on a host.

    Raises:
        InputError: `per_host` is less than 1, or, at initialization, does not divide the number of
            replicas.
    """
    check_at_least(1, per_host=per_host)
    if per_host == 1:
        return exchange

    def parts_of(tree: PyTree) -> PyTree:
        return jax.tree.map(partial(cut, per_host), tree)

    def init(params: PyTree) -> PyTree:
        # The replica axis of the exchange has one replica for each host. Initially, all are equal.
        part = jax.tree.map(lambda rows: rows[0], parts_of(params))
        hosts = groups.peers(per_host).size
        make = jax.vmap(exchange.init, in_axes=None, axis_name=AXIS, axis_size=hosts)
        return AcrossHostsState(jax.tree.map(lambda rows: rows[0], make(part)), per_host)

    def update(updates, state, params=None, *, weight=1.0, key, **extra_args):
        host = groups.hosts(per_host)
        weight = jnp.asarray(weight, jnp.float32)

        # Sum within the host, and receive one part. Each part is followed by the weight.
        parts = parts_of(updates)
        rows = jax.vmap(as_vector)(parts)
        rows = jnp.where(weight > 0, rows * weight, 0)
        rows = jnp.concatenate([rows, jnp.full((per_host, 1), weight)], axis=1)
        own = host.psum_scatter(rows)
        total = own[-1]
        mean = own[:-1] / jnp.where(total > 0, total, 1)

        # Exchange this part of the message between the hosts.
        part = jax.tree.map(lambda rows: rows[0], parts)
        reduced, exchanged = exchange.update(
            as_tree(mean, part), state.exchange, weight=total, key=key, **extra_args
        )

        # Complete the message. `vmap` only regards a gather over all replicas as equal on all.
        own = as_vector(reduced)
        rows = lax.all_gather(own, AXIS)[:per_host] if is_vmapped() else host.all_gather(own)
        parts = jax.vmap(partial(as_tree, like=part))(rows)
        completed = jax.tree.map(lambda x, y: whole(x, y).astype(y.dtype), parts, updates)
        return completed, AcrossHostsState(exchanged, per_host)

    made = reducer(init, update, independent=isinstance(exchange, IndependentReducer))
    made.per_host = per_host
    return made
