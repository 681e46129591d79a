"""Checks that the *shared* leaves of the training state are equal on all replicas.

Each device computes a digest of every shared leaf, and the digests are compared. Otherwise a
reduction that is missing in a strategy, or a device that computes wrong results, would go
unnoticed, since replicated arrays are only ever read from the first device.
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
    """Returns the leaves of a state that must be equal on all replicas, by name."""
    parts = zip(state._fields, state, axes(strategy), strict=True)
    return {
        name: leaf
        for field, part, axis in parts
        if axis is None
        for name, leaf in named({field: part}).items()
    }


def digest(leaf: jax.Array) -> jax.Array:
    """Returns the sum modulo 2^32 of a hash of each word of an array, uint32[].

    A word consists of the bits of an element, or of 32 of them if it has more; the hash depends on
    its value and its position. It is the finalizer of MurmurHash3 (Appleby, 2011), which is
    one-to-one, so a change of one word always changes the digest. If several words change, the
    digest stays the same with a probability of about 2^-32.
    """
    bits = _words(leaf)
    # Mix in the position, so that equal words at different positions have different hashes.
    hashed = bits ^ (lax.iota(jnp.uint32, bits.size) * jnp.uint32(0x9E3779B1))
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        hashed = (hashed ^ (hashed >> shift)) * jnp.uint32(factor)
    return jnp.sum(hashed ^ (hashed >> 16), dtype=jnp.uint32)


def _words(leaf: jax.Array) -> jax.Array:
    """Returns the bits of an array as uint32[words]; an element of 64 bits becomes two words."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
        leaf = jnp.stack([leaf.real, leaf.imag])

    # Types narrower than a byte are widened, because a bitcast keeps the number of bits.
    if jnp.issubdtype(leaf.dtype, jnp.bool_) or leaf.dtype in (
        jnp.int4,
        jnp.uint4,
        jnp.int2,
        jnp.uint2,
    ):
        leaf = leaf.astype(jnp.int8)
    word = jnp.dtype(f"uint{8 * min(4, leaf.dtype.itemsize)}")
    return lax.bitcast_convert_type(leaf, word).ravel().astype(jnp.uint32)


def make_digests(devices: Sequence[jax.Device], strategy: Strategy) -> jax.stages.Wrapped:
    """Makes the program that sums over the replicas and digests the state after a dispatch.

    `compare(sums, state) -> (sums, digests)` sums each `[replica, steps]` to `[steps]`, and returns
    the digests `uint32[replica, leaf]` of the shared leaves. If there is only one replica, there
    are no digests: `uint32[1, 0]`.
    """

    def compare(sums: Sums, state: TrainState) -> tuple[Sums, jax.Array]:
        leaves = shared(state, strategy).values() if len(devices) > 1 else ()
        # `stack` needs at least one array, so a zero precedes the digests.
        local = jnp.stack([jnp.uint32(0), *map(digest, leaves)])[1:]
        return replica.add_up(sums), lax.all_gather(local, AXIS)

    return replica.parallel(compare, devices, in_axes=(0, axes(strategy)), out_axes=None)


def check(digests: np.ndarray, names: Sequence[str], since: int, until: int) -> None:
    """Checks that every replica has the same digests.

    Args:
        digests: Digests of the shared leaves, `uint32[replica, leaf]`.
        names: Names of these leaves.
        since: Number of steps before the dispatch, after which the replicas agreed.
        until: Number of steps after the dispatch, when the digests were computed.

    Raises:
        ReplicasDiverged: If the digests of a leaf differ between replicas.
    """
    differs = (digests != digests[0]).any(axis=0)
    if not differs.any():
        return

    # Group the replicas by their digests of the first leaf that differs, the largest group first.
    column = digests[:, np.argmax(differs)]
    groups = [np.flatnonzero(column == value).tolist() for value in np.unique(column)]
    leaves = [name for name, is_one in zip(names, differs, strict=True) if is_one]
    raise ReplicasDiverged(leaves, sorted(groups, key=len, reverse=True), since, until)
