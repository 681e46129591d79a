"""Checks that replicas agree: shared leaves are digested on every device and compared.

Otherwise a reduction that is missing in a strategy, or a device that computes wrong results, would
go unnoticed, since replicated arrays are only ever read from the first device.
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
    """Sums a hash of the bits and the position of each number, modulo 2^32; uint32[].

    The hash is the finalizer of MurmurHash3 (Appleby, 2011), which is one-to-one, so a single
    different number always changes the digest. If several numbers differ, the probability that the
    digest does not change is about one in four billion, whatever they have in common.
    """
    bits = _words(leaf)
    # Mix in the position, so that equal numbers at different positions have different hashes.
    hashed = bits ^ (lax.iota(jnp.uint32, bits.size) * jnp.uint32(0x9E3779B1))
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        hashed = (hashed ^ (hashed >> shift)) * jnp.uint32(factor)
    return jnp.sum(hashed ^ (hashed >> 16), dtype=jnp.uint32)


def _words(leaf: jax.Array) -> jax.Array:
    """Views the bits of a leaf as uint32[words]; numbers of more than 32 bits have several."""
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
    """Makes the program that examines the result of a dispatch.

    `compare(sums, state) -> (sums, digests)` adds up the sums `[replica, steps]` to `[steps]`, and
    returns the digests `uint32[replica, leaf]` of the shared leaves. If there is only one replica,
    nothing is digested.
    """

    def compare(sums: Sums, state: TrainState) -> tuple[Sums, jax.Array]:
        leaves = shared(state, strategy).values() if len(devices) > 1 else ()
        # `stack` needs at least one array, so a zero precedes the digests.
        own = jnp.stack([jnp.uint32(0), *map(digest, leaves)])[1:]
        return replica.add_up(sums), lax.all_gather(own, AXIS)

    return replica.parallel(compare, devices, in_axes=(0, axes(strategy)), out_axes=None)


def check(digests: np.ndarray, names: Sequence[str], since: int, until: int) -> None:
    """Raises ReplicasDiverged if the digests of a leaf differ between devices.

    Args:
        digests: Digests, `uint32[replica, leaf]`.
        names: Names of the leaves.
        since: Step after which they were last compared.
        until: Step after which the digests were computed.
    """
    differs = (digests != digests[0]).any(axis=0)
    if not differs.any():
        return

    # Group the replicas by their digests of the first leaf that differs, the largest group first.
    own = digests[:, np.argmax(differs)]
    groups = [np.flatnonzero(own == value).tolist() for value in np.unique(own)]
    leaves = [name for name, is_one in zip(names, differs, strict=True) if is_one]
    raise ReplicasDiverged(leaves, sorted(groups, key=len, reverse=True), since, until)
