"""Whether the replicas still agree: every leaf that they share is digested on every device, and the digests compared.

A reduction that was forgotten in a strategy, or a device that computes wrongly, would otherwise go on unnoticed: what
is replicated is only ever read from the first device.
"""

from collections.abc import Sequence

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp

from ctde_jax.aggregate import Strategy
from ctde_jax.devices import AXIS, replica
from ctde_jax.errors import ReplicasDiverged
from ctde_jax.rounds.state import TrainState, axes, named
from ctde_jax.rounds.sums import Sums


def shared(state: TrainState, strategy: Strategy) -> dict[str, jax.Array]:
    """Returns, by name, the leaves that must be equal on all replicas."""
    parts = zip(state._fields, state, axes(strategy), strict=True)
    return {
        name: leaf
        for field, part, axis in parts
        if axis is None
        for name, leaf in named({field: part}).items()
    }


def digest(leaf: jax.Array) -> jax.Array:
    """Sums a hash of the bits of each number and its place, modulo 2^32; uint32[].

    The hash is MurmurHash3's last step (Appleby, 2011), which is one-to-one: a number that differs is always seen.
    Several that differ escape with a chance of about one in four billions, whatever they have in common.
    """
    bits = _words(leaf)
    hashed = bits ^ (lax.iota(jnp.uint32, bits.size) * jnp.uint32(0x9E3779B1))
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        hashed = (hashed ^ (hashed >> shift)) * jnp.uint32(factor)
    return jnp.sum(hashed ^ (hashed >> 16), dtype=jnp.uint32)


def _words(leaf: jax.Array) -> jax.Array:
    """Sees the bits of a leaf as uint32[numbers], or as several where a number has more bits."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
        leaf = jnp.stack([leaf.real, leaf.imag])
    if jnp.issubdtype(leaf.dtype, jnp.bool_) or leaf.dtype in (
        jnp.int4,
        jnp.uint4,
        jnp.int2,
        jnp.uint2,
    ):
        leaf = leaf.astype(jnp.int8)
    word = jnp.dtype(f"uint{8 * min(4, leaf.dtype.itemsize)}")
    return lax.bitcast_convert_type(leaf, word).ravel().astype(jnp.uint32)


def make_look(devices: Sequence[jax.Device], strategy: Strategy) -> jax.stages.Wrapped:
    """Makes the program that looks at what a dispatch has left behind.

    `look(sums [replica, steps], state) -> (sums [steps] over all replicas, digests uint32[replica, leaf])`; alone, a
    replica digests nothing.
    """

    def look(sums: Sums, state: TrainState) -> tuple[Sums, jax.Array]:
        leaves = shared(state, strategy).values() if len(devices) > 1 else ()
        own = jnp.stack([jnp.uint32(0), *map(digest, leaves)])[1:]
        return replica.add_up(sums), lax.all_gather(own, AXIS)

    return replica.parallel(look, devices, in_axes=(0, axes(strategy)), out_axes=None)


def check(digests: np.ndarray, names: Sequence[str], since: int, until: int) -> None:
    """Raises ReplicasDiverged where the digests of a leaf are not the same on all devices.

    Args:
        digests: `uint32[replica, leaf]`.
        names: Of the leaves.
        since: The step after which they were last compared.
        until: The step after which they were made.
    """
    differs = (digests != digests[0]).any(axis=0)
    if not differs.any():
        return
    own = digests[:, np.argmax(differs)]
    groups = [np.flatnonzero(own == value).tolist() for value in np.unique(own)]
    leaves = [name for name, is_one in zip(names, differs, strict=True) if is_one]
    raise ReplicasDiverged(leaves, sorted(groups, key=len, reverse=True), since, until)
