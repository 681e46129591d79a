"""The replica axis: where arrays live, and the one function that runs code on every device.

What is equal on all devices is *replicated* (axis `None`); what is a device's own is *sharded* along a leading axis of
one row per replica (axis 0). Code inside `parallel` sees its own row, and talks to the other replicas by the
collectives of `jax.lax` over `AXIS`. The same code runs under `jax.vmap(..., axis_name=AXIS)`, where a forgotten
reduction is an error instead of a silent use of the first device's value; that is how it is tested.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeAlias

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

AXIS = "replica"

SHARD = "shard"
"""The axis of the shards that a replica cuts its batch into; see `gradient.py`."""

_SMALL = 2**14  # numbers
PyTree: TypeAlias = Any
"""Any nesting of containers with arrays at its leaves."""


def parallel(
    function: Callable[..., PyTree],
    devices: Sequence[jax.Device],
    in_axes: tuple[PyTree, ...],
    out_axes: PyTree,
    donate: tuple[int, ...] = (),
) -> jax.stages.Wrapped:
    """Runs a per-replica function on every device at once.

    Args:
        function: Sees one replica's part of every argument.
        devices: One replica on each.
        in_axes: A prefix of the arguments: `None` for what is replicated, 0 for what has a row per replica.
        out_axes: The same for the results. A result under `None` must be equal on all replicas.
        donate: Positions of the arguments whose memory the results may take over.
    """
    return jax.pmap(
        function,
        axis_name=AXIS,
        in_axes=in_axes,
        out_axes=out_axes,
        devices=devices,
        donate_argnums=donate,
    )


def lowered(function: jax.stages.Wrapped, *like: PyTree) -> jax.stages.Lowered:
    """Lowers what `parallel` has made, for arrays of all hosts, or shapes and types, such as these."""
    leaves, structure = jax.tree.flatten(like)
    abstract = jax.make_jaxpr(lambda *leaves: leaves)(
        *leaves
    ).in_avals  # of which pmap knows that they are global
    return function.lower(*structure.unflatten(abstract))


def compiled(
    lowered: jax.stages.Lowered, devices: Sequence[jax.Device], exact: bool = False
) -> "Program":
    """Compiles what `parallel` has made, lowered for its arguments.

    Several fake devices take one thread each, for they share the cores; one alone takes all of them, unless the bits
    must be exactly those of several. Where these are of several hosts, a call waits for its result, as two programs at
    once would wait for each other for ever.
    """
    is_fake = devices[0].platform == "cpu"
    options: dict[str, str | bool] = {}
    if is_fake and (exact or len(devices) > 1):
        options["xla_cpu_multi_thread_eigen"] = False
    if is_fake and exact:
        options["xla_disable_hlo_passes"] = (
            "algsimp"  # which rewrites divisions on one device, and not on several
        )
    program = lowered.compile(compiler_options=options or None)
    return Waiting(program) if is_fake and is_spread(devices) else program


def compiled_once(
    function: jax.stages.Wrapped, devices: Sequence[jax.Device]
) -> Callable[..., PyTree]:
    """Compiles what `parallel` has made at its first call, for arguments like those of this call."""
    program: list[Program] = []

    def call(*arguments: PyTree) -> PyTree:
        if not program:
            program.append(compiled(lowered(function, *arguments), devices))
        return program[0](*arguments)

    return call


def is_spread(devices: Sequence[jax.Device]) -> bool:
    """Says whether the devices are those of several hosts."""
    return len({device.process_index for device in devices}) > 1


def own(devices: Sequence[jax.Device]) -> list[int]:
    """Returns which replicas are on this host."""
    return [
        replica
        for replica, device in enumerate(devices)
        if device.process_index == jax.process_index()
    ]


def replicate(tree: PyTree, devices: Sequence[jax.Device]) -> PyTree:
    """Puts a tree onto every device, where it may share memory with the original: it is not to be donated.

    Every host gives the whole tree.
    """
    return _put(tree, devices, PartitionSpec())


def shard(tree: PyTree, devices: Sequence[jax.Device]) -> PyTree:
    """Puts onto every device its own row of each array `[replica, ...]`, which is not to be donated either.

    Every host gives the rows of all replicas, or those alone that are its `own`.
    """
    return _put(tree, devices, PartitionSpec(AXIS))


def gathered(leaf: jax.typing.ArrayLike) -> np.ndarray:
    """Copies an array to every host, where each has the whole of it or some rows."""
    if (
        isinstance(leaf, jax.Array)
        and not leaf.is_fully_addressable
        and not leaf.is_fully_replicated
    ):
        return multihost_utils.process_allgather(leaf, tiled=True)
    return np.array(leaf)


def add_up(tree: PyTree) -> PyTree:
    """Sums float32 arrays over the replicas, in one all-reduce.

    A replica that is alone copies nothing. Small arrays travel in one piece, as fake devices meet once for every piece.
    """
    if lax.axis_size(AXIS) == 1:
        return tree
    leaves, structure = jax.tree.flatten(tree)
    small = [leaf for leaf in leaves if leaf.size <= _SMALL]
    large = [leaf for leaf in leaves if leaf.size > _SMALL]
    together, large = lax.psum(
        (jnp.concatenate([jnp.ravel(leaf) for leaf in [*small, jnp.zeros(0)]]), large), AXIS
    )
    parts, wholes = iter(jnp.split(together, np.cumsum([leaf.size for leaf in small]))), iter(large)
    return structure.unflatten(
        next(parts).reshape(leaf.shape) if leaf.size <= _SMALL else next(wholes) for leaf in leaves
    )


def weighted_mean(tree: PyTree, weight: jax.typing.ArrayLike, axis: str = AXIS) -> PyTree:
    """Averages over the replicas, or the shards of one, each counted as often as its weight says.

    Replicas with weight 0 are ignored, even if they hold NaN. If all weights are 0, the mean is 0. Counters and other
    integers, which have no mean, become the largest of all.
    """
    weight = jnp.asarray(weight, jnp.float32)
    leaves, structure = jax.tree.flatten(as_real(tree))
    floats = [leaf for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.floating)]
    if axis == AXIS and lax.axis_size(AXIS) == 1:
        means = iter([jnp.where(weight > 0, leaf, 0) for leaf in floats])
    else:
        weighted = [jnp.where(weight > 0, leaf * weight, 0) for leaf in floats]
        sums, total = (
            add_up((weighted, weight)) if axis == AXIS else lax.psum((weighted, weight), axis)
        )
        share = 1 / jnp.where(
            total > 0, total, 1
        )  # a product, unlike a quotient, is fused with what reads it
        means = iter([x * share for x in sums])
    mean = structure.unflatten(
        next(means).astype(leaf.dtype)
        if jnp.issubdtype(leaf.dtype, jnp.floating)
        else lax.pmax(leaf, axis)
        for leaf in leaves
    )
    return as_complex(mean, tree)


def as_real(tree: PyTree) -> PyTree:
    """Views each complex leaf as its real and imaginary parts, `[2, ...]`; other leaves stay as they are."""
    return jax.tree.map(lambda x: jnp.stack([x.real, x.imag]) if jnp.iscomplexobj(x) else x, tree)


def as_complex(tree: PyTree, like: PyTree) -> PyTree:
    """Inverts `as_real` where the leaf of another tree is complex."""
    return jax.tree.map(
        lambda x, other: lax.complex(*x) if jnp.iscomplexobj(other) else x, tree, like
    )


def agreed_state(
    after: PyTree, before: PyTree, weight: jax.typing.ArrayLike, axis: str = AXIS
) -> PyTree:
    """Merges what the replicas, or the shards of one, have made of a model's state.

    A number that none of them has changed keeps its bits. Other floats become the weighted mean, and integers, booleans
    and keys the largest. Replicas with weight 0 are ignored; if all weights are 0, the state stays as it was.

    Args:
        after: The state of this replica.
        before: The state that all replicas began with.
        weight: The number of examples behind `after`.
        axis: `AXIS` or `SHARD`.
    """
    if not jax.tree.leaves(after):
        return after
    weight = jnp.asarray(weight, jnp.float32)
    counts = weight > 0
    if axis == AXIS and lax.axis_size(AXIS) == 1:
        return jax.tree.map(lambda new, old: jnp.where(counts, new, old), after, before)

    new_leaves, structure = jax.tree.flatten(after)
    old_leaves = jax.tree.leaves(before)
    is_mean = [jnp.issubdtype(leaf.dtype, jnp.inexact) for leaf in new_leaves]
    new_floats = [_as_real(new) for new, mean in zip(new_leaves, is_mean, strict=True) if mean]
    old_floats = [_as_real(old) for old, mean in zip(old_leaves, is_mean, strict=True) if mean]
    summed = (
        weight,
        [jnp.where(counts, leaf * weight, 0) for leaf in new_floats],
        [
            (counts & is_changed(*pair)).astype(jnp.float32)
            for pair in zip(new_floats, old_floats, strict=True)
        ],
    )
    total, sums, changes = add_up(summed) if axis == AXIS else lax.psum(summed, axis)
    means = iter(zip(sums, changes, strict=True))

    def merge(new: jax.Array, old: jax.Array) -> jax.Array:
        if not jnp.issubdtype(new.dtype, jnp.inexact):
            return jnp.where(total > 0, largest(new, counts, axis), old)
        sum_of_all, change = next(means)
        mean = sum_of_all / jnp.maximum(
            total, 1
        )  # a quotient, so that counters of equal value stay whole
        if jnp.iscomplexobj(new):
            mean, change = lax.complex(mean[0], mean[1]), change.max(axis=0)
        return jnp.where(change > 0, mean.astype(new.dtype), old)

    return structure.unflatten(map(merge, new_leaves, old_leaves))


def is_changed(new: jax.Array, old: jax.Array) -> jax.Array:
    """Whether a float differs from another; NaN does not differ from NaN."""
    return (new != old) & ~(jnp.isnan(new) & jnp.isnan(old))


def _as_real(x: jax.Array) -> jax.Array:
    return jnp.stack([x.real, x.imag]) if jnp.iscomplexobj(x) else x


def largest(leaf: jax.Array, counts: jax.Array, axis: str | None = None) -> jax.Array:
    """Returns the largest integer, boolean or key of those that count, over an axis by name or the first one.

    Of keys each word is compared by itself.
    """
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        words = jax.random.key_data(leaf)
        counts = jnp.expand_dims(counts, range(counts.ndim, words.ndim)) if counts.ndim else counts
        return jax.random.wrap_key_data(
            largest(words, counts, axis), impl=jax.random.key_impl(leaf)
        )
    if leaf.dtype == jnp.bool_:
        return largest(leaf.astype(jnp.uint8), counts, axis).astype(jnp.bool_)
    candidates = jnp.where(counts, leaf, jnp.iinfo(leaf.dtype).min)
    return candidates.max(axis=0) if axis is None else lax.pmax(candidates, axis)


class Waiting:
    """A program that several hosts run at once; a call waits for its result."""

    def __init__(self, program: jax.stages.Compiled):
        self._program = program

    def __call__(self, *arguments: PyTree) -> PyTree:
        """Runs the program to its end."""
        return jax.block_until_ready(self._program(*arguments))

    def as_text(self) -> str | None:
        """Returns the program as XLA has optimized it."""
        return self._program.as_text()


Program: TypeAlias = jax.stages.Compiled | Waiting
"""What runs on the devices; called with arrays, and of several hosts by all of them in the same order."""


def _put(tree: PyTree, devices: Sequence[jax.Device], spec: PartitionSpec) -> PyTree:
    sharding = NamedSharding(Mesh(np.asarray(devices), (AXIS,)), spec)
    if not is_spread(devices):
        return jax.device_put(tree, sharding)
    return jax.tree.map(partial(_put_leaf, sharding=sharding, devices=devices), tree)


def _put_leaf(
    leaf: jax.typing.ArrayLike, sharding: NamedSharding, devices: Sequence[jax.Device]
) -> jax.Array:
    """Puts an array onto the devices of this host, which do not see the others' rows."""
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        raw = _put_leaf(jax.random.key_data(leaf), sharding, devices)
        return jax.random.wrap_key_data(raw, impl=jax.random.key_impl(leaf))
    rows = np.asarray(leaf)
    if sharding.spec == PartitionSpec():
        return jax.make_array_from_process_local_data(sharding, rows, rows.shape)
    here = own(devices)
    return jax.make_array_from_process_local_data(
        sharding, rows if len(rows) == len(here) else rows[here], (len(devices), *rows.shape[1:])
    )
