"""The replica axis: placement of arrays, and the one function that runs code on every replica.

`devices` lists the device of each replica, so its length is the number of replicas. If a device
occurs several times in a row, its replicas are *virtual*: one program computes them together.

Arrays that are equal on all replicas are *replicated* (axis `None`); arrays that differ between
replicas are *sharded* along a leading axis with one row per replica (axis 0). Code inside
`parallel` receives one row and communicates through the collectives of `jax.lax` over `AXIS`. Under
`jax.vmap`, which computes virtual replicas and runs in tests, a forgotten reduction is an error;
`pmap` silently returns the value of the first device.
"""

import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeAlias

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ctde_jax.devices.groups import AXIS, Axis, axis_size, pmax, psum
from ctde_jax.errors import check_known

SHARD = "shard"
"""Axis of the shards, the equal parts into which a replica cuts its part of a batch.

See `rounds/gradient.py`.
"""

# Up to this number of elements, `add_up` concatenates arrays.
_SMALL = 2**14
PyTree: TypeAlias = Any
"""Any nesting of containers with arrays at its leaves."""


def parallel(
    function: Callable[..., PyTree],
    devices: Sequence[jax.Device],
    in_axes: tuple[PyTree, ...],
    out_axes: PyTree,
    donate: tuple[int, ...] = (),
) -> jax.stages.Wrapped:
    """Maps a per-replica function over all replicas.

    This is `jax.pmap` if each device has one replica. Virtual replicas are computed by `jax.vmap`;
    if there are several devices, XLA partitions that program along the replica axis. With the
    environment variable CTDE_JAX_ENGINE=shard_map, `jax.shard_map` replaces `jax.pmap`.

    Args:
        function: Function of one replica's part of every argument.
        devices: Device of each replica, on all hosts.
        in_axes: Prefix tree of the arguments: `None` if replicated, 0 if sharded.
        out_axes: Prefix tree of the results, as `in_axes`. A result under `None` must be equal on
            all replicas.
        donate: Positions of the arguments whose memory the results may reuse.
    """
    engine = os.environ.get("CTDE_JAX_ENGINE", "pmap")
    check_known("CTDE_JAX_ENGINE", engine, ("pmap", "shard_map"))
    if is_virtual(devices):
        mapped = jax.vmap(function, in_axes, out_axes, axis_name=AXIS, axis_size=len(devices))
    elif engine == "shard_map":
        mapped = _shard_mapped(function, devices, in_axes, out_axes)
    else:
        return jax.pmap(
            function,
            axis_name=AXIS,
            in_axes=in_axes,
            out_axes=out_axes,
            devices=devices,
            donate_argnums=donate,
        )
    return jax.jit(
        mapped,
        in_shardings=_shardings(in_axes, devices),
        out_shardings=_shardings(out_axes, devices),
        donate_argnums=donate,
    )


def _shard_mapped(
    function: Callable[..., PyTree],
    devices: Sequence[jax.Device],
    in_axes: tuple[PyTree, ...],
    out_axes: PyTree,
) -> Callable[..., PyTree]:
    """Maps a function by `jax.shard_map`."""
    return jax.shard_map(
        with_one_row(function, in_axes, out_axes),
        mesh=Mesh(np.asarray(devices), (AXIS,)),
        in_specs=_specs(in_axes),
        out_specs=_specs(out_axes),
        check_vma=False,
    )


def with_one_row(
    function: Callable[..., PyTree], in_axes: tuple[PyTree, ...], out_axes: PyTree
) -> Callable[..., PyTree]:
    """Wraps a per-replica function, so that sharded arguments and results have one row, `[1, ...]`.

    `jax.shard_map` keeps the mapped axis, as an axis of size 1.
    """

    def on_device(*arguments: PyTree) -> PyTree:
        rows = _where_sharded(lambda x: x.reshape(x.shape[1:]), in_axes, arguments)
        return _where_sharded(lambda x: jnp.asarray(x)[None], out_axes, function(*rows))

    return on_device


def _where_sharded(change: Callable[[Any], Any], axes: PyTree, tree: PyTree) -> PyTree:
    """Applies a function to the leaves of the parts of a tree whose axis is 0."""
    return jax.tree.map(
        lambda axis, part: part if axis is None else jax.tree.map(change, part),
        axes,
        tree,
        is_leaf=lambda axis: axis is None,
    )


def lowered(function: jax.stages.Wrapped, *like: PyTree) -> jax.stages.Lowered:
    """Lowers a function made by `parallel`.

    Args:
        function: The function.
        *like: Global arrays or `ShapeDtypeStruct`s of the arguments; only shapes and dtypes are
            read.
    """
    # pmap takes the shapes of abstract values as global, which several hosts require.
    leaves, structure = jax.tree.flatten(like)
    abstract = jax.make_jaxpr(lambda *leaves: leaves)(*leaves).in_avals
    return function.lower(*structure.unflatten(abstract))


def compiled(
    lowered: jax.stages.Lowered,
    devices: Sequence[jax.Device],
    exact: bool = False,
    one_thread: bool = False,
) -> "Program":
    """Compiles a function made by `parallel`.

    Several fake devices use one thread each, since they share the cores. A single fake device uses
    all cores, unless `exact` or `one_thread` is set. If fake devices belong to several hosts, the
    program waits for its result, since two concurrent programs would deadlock.

    Args:
        lowered: Result of `lowered`.
        devices: Devices of all hosts.
        exact: Whether fake devices must compute the same bits for any number of devices; this also
            disables XLA's algebraic simplifier.
        one_thread: Whether a single fake device uses one thread, too. Products of matrices then
            have the same bits as on several fake devices.
    """
    is_fake = devices[0].platform == "cpu"
    options: dict[str, str | bool] = {}
    if is_fake and (exact or one_thread or len(distinct(devices)) > 1):
        options["xla_cpu_multi_thread_eigen"] = False
    if is_fake and exact:
        # The algebraic simplifier rewrites divisions on one device, but not on several.
        options["xla_disable_hlo_passes"] = "algsimp"
    program = lowered.compile(compiler_options=options or None)
    return Waiting(program) if is_fake and is_spread(devices) else program


def compiled_once(
    function: jax.stages.Wrapped, devices: Sequence[jax.Device], one_thread: bool = False
) -> Callable[..., PyTree]:
    """Compiles a function made by `parallel` at its first call, for the shapes of its arguments."""
    program: list[Program] = []

    def call(*arguments: PyTree) -> PyTree:
        if not program:
            program.append(compiled(lowered(function, *arguments), devices, one_thread=one_thread))
        return program[0](*arguments)

    return call


def distinct(devices: Sequence[jax.Device]) -> list[jax.Device]:
    """Returns every device once, in order."""
    return list(dict.fromkeys(devices))


def is_virtual(devices: Sequence[jax.Device]) -> bool:
    """Returns whether several replicas share a device."""
    return len(devices) > len(distinct(devices))


def is_spread(devices: Sequence[jax.Device]) -> bool:
    """Returns whether the devices belong to several hosts."""
    return len({device.process_index for device in devices}) > 1


def local_replicas(devices: Sequence[jax.Device]) -> list[int]:
    """Returns the indices of the replicas on this host."""
    return [
        replica
        for replica, device in enumerate(devices)
        if device.process_index == jax.process_index()
    ]


def replicate(tree: PyTree, devices: Sequence[jax.Device]) -> PyTree:
    """Places a tree on every device; every host passes the whole tree.

    The result must not be donated, since it may share memory with the original.
    """
    return _put(tree, devices, PartitionSpec())


def shard(tree: PyTree, devices: Sequence[jax.Device]) -> PyTree:
    """Places row i of each array `[replica, ...]` on the device of replica i.

    Every host passes the rows of all replicas, or only those of its `local_replicas`. The result
    must not be donated, since it may share memory with the original.
    """
    return _put(tree, devices, PartitionSpec(AXIS))


def gathered(leaf: jax.typing.ArrayLike) -> np.ndarray:
    """Returns all rows of an array as a numpy array on every host; all hosts must call it."""
    # Only an array with rows on other hosts needs communication.
    if (
        isinstance(leaf, jax.Array)
        and not leaf.is_fully_addressable
        and not leaf.is_fully_replicated
    ):
        return multihost_utils.process_allgather(leaf, tiled=True)
    return np.array(leaf)


def add_up(tree: PyTree, axis: Axis = AXIS) -> PyTree:
    """Sums a tree of float32 arrays over the replicas, or within groups of them, with one `psum`.

    Small arrays are concatenated, because fake devices synchronize once per array. With a single
    replica, `tree` itself is returned.
    """
    if axis_size(axis) == 1:
        return tree
    leaves, structure = jax.tree.flatten(tree)
    small = [leaf for leaf in leaves if leaf.size <= _SMALL]
    large = [leaf for leaf in leaves if leaf.size > _SMALL]

    # The empty array is there for `concatenate`, which needs at least one.
    together, large = psum(
        (jnp.concatenate([jnp.ravel(leaf) for leaf in [*small, jnp.zeros(0)]]), large), axis
    )
    parts = iter(jnp.split(together, np.cumsum([leaf.size for leaf in small])))
    wholes = iter(large)
    return structure.unflatten(
        next(parts).reshape(leaf.shape) if leaf.size <= _SMALL else next(wholes) for leaf in leaves
    )


def weighted_mean(tree: PyTree, weight: jax.typing.ArrayLike, axis: Axis = AXIS) -> PyTree:
    """Returns the weighted mean over a mapped axis; of integers, the unweighted maximum.

    Participants with weight 0 are ignored in the mean, even if they hold NaN. If all weights are 0,
    the mean is 0.

    Args:
        tree: Arrays of this participant: floats, complex numbers or integers.
        weight: Weight of this participant, a scalar.
        axis: Axis to average over, `AXIS` or `SHARD`, or groups of replicas.
    """
    weight = jnp.asarray(weight, jnp.float32)
    leaves, structure = jax.tree.flatten(as_real(tree))
    floats = [leaf for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.floating)]

    # A single replica needs no collective.
    if axis != SHARD and axis_size(axis) == 1:
        means = iter([jnp.where(weight > 0, leaf, 0) for leaf in floats])
    else:
        # The product of NaN and a weight of 0 is NaN, hence `where`.
        weighted = [jnp.where(weight > 0, leaf * weight, 0) for leaf in floats]
        summed = weighted, weight
        sums, total = lax.psum(summed, axis) if axis == SHARD else add_up(summed, axis)
        # Unlike a quotient, a product is fused with the operation that reads it.
        share = 1 / jnp.where(total > 0, total, 1)
        means = iter([x * share for x in sums])

    # Floats are cast back to their dtypes; integers, such as counters, become the maximum.
    mean = structure.unflatten(
        next(means).astype(leaf.dtype)
        if jnp.issubdtype(leaf.dtype, jnp.floating)
        else pmax(leaf, axis)
        for leaf in leaves
    )
    return as_complex(mean, tree)


def as_real(tree: PyTree) -> PyTree:
    """Stacks the real and imaginary parts of complex leaves, `[2, ...]`; keeps other leaves."""
    return jax.tree.map(lambda x: jnp.stack([x.real, x.imag]) if jnp.iscomplexobj(x) else x, tree)


def as_complex(tree: PyTree, like: PyTree) -> PyTree:
    """Inverts `as_real` for each leaf that is complex in `like`."""
    return jax.tree.map(
        lambda x, other: lax.complex(*x) if jnp.iscomplexobj(other) else x, tree, like
    )


def agreed_state(
    after: PyTree, before: PyTree, weight: jax.typing.ArrayLike, axis: Axis = AXIS
) -> PyTree:
    """Merges the model states of the participants of a mapped axis.

    A float element that differs from `before` on any participant with a positive weight becomes the
    weighted mean; all other float elements are returned bit for bit from `before`. Integers and
    booleans become the maximum, and PRNG keys the maximum of each word. Participants with weight 0
    are ignored; if all weights are 0, the result is `before`.

    Args:
        after: Model state of this participant after its update.
        before: Model state before the update, equal on all participants.
        weight: Number of examples that this participant has processed, a scalar.
        axis: Axis to merge over: `AXIS` for replicas, groups of them, or `SHARD` for the shards of
            one replica.
    """
    if not jax.tree.leaves(after):
        return after
    weight = jnp.asarray(weight, jnp.float32)
    has_weight = weight > 0

    # A single replica has nothing to merge.
    if axis != SHARD and axis_size(axis) == 1:
        return jax.tree.map(lambda new, old: jnp.where(has_weight, new, old), after, before)

    # Floats are averaged, complex ones as pairs of real numbers; other dtypes are not.
    new_leaves, structure = jax.tree.flatten(after)
    old_leaves = jax.tree.leaves(before)
    is_mean = [jnp.issubdtype(leaf.dtype, jnp.inexact) for leaf in new_leaves]
    new_floats = [_as_real(new) for new, mean in zip(new_leaves, is_mean, strict=True) if mean]
    old_floats = [_as_real(old) for old, mean in zip(old_leaves, is_mean, strict=True) if mean]

    # One collective sums the weights, the weighted floats, and the flags of changed elements.
    summed = (
        weight,
        [jnp.where(has_weight, leaf * weight, 0) for leaf in new_floats],
        [
            (has_weight & is_changed(*pair)).astype(jnp.float32)
            for pair in zip(new_floats, old_floats, strict=True)
        ],
    )
    total, sums, changes = lax.psum(summed, axis) if axis == SHARD else add_up(summed, axis)
    means = iter(zip(sums, changes, strict=True))

    # Unchanged elements come from `before`, as a mean of equal floats may differ by rounding.
    def merge(new: jax.Array, old: jax.Array) -> jax.Array:
        if not jnp.issubdtype(new.dtype, jnp.inexact):
            return jnp.where(total > 0, largest(new, has_weight, axis), old)
        sum_of_all, change = next(means)
        # A quotient keeps float counters that are equal on all participants whole; a product with
        # the reciprocal may not.
        mean = sum_of_all / jnp.maximum(total, 1)
        if jnp.iscomplexobj(new):
            mean = lax.complex(mean[0], mean[1])
            change = change.max(axis=0)
        return jnp.where(change > 0, mean.astype(new.dtype), old)

    return structure.unflatten(map(merge, new_leaves, old_leaves))


def is_changed(new: jax.Array, old: jax.Array) -> jax.Array:
    """Returns elementwise whether floats differ, bool `[...]`; NaN does not differ from NaN."""
    return (new != old) & ~(jnp.isnan(new) & jnp.isnan(old))


def _as_real(x: jax.Array) -> jax.Array:
    return jnp.stack([x.real, x.imag]) if jnp.iscomplexobj(x) else x


def largest(leaf: jax.Array, included: jax.Array, axis: Axis | None = None) -> jax.Array:
    """Returns the elementwise maximum over a mapped axis; for PRNG keys, that of each word.

    Args:
        leaf: Integers, booleans or keys of this participant, or of all participants along the first
            axis if `axis` is None.
        included: Whether the participant is included, bool[]; if `axis` is None, bool with one
            element per participant along the first axis, broadcastable to `leaf`.
        axis: Mapped axis or groups of replicas, or None for the first axis.

    Returns:
        The maximum; the smallest value of the dtype if no participant is included.
    """
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        words = jax.random.key_data(leaf)
        # With one flag per row, append axes for the words of a key.
        if included.ndim:
            included = jnp.expand_dims(included, range(included.ndim, words.ndim))
        return jax.random.wrap_key_data(
            largest(words, included, axis), impl=jax.random.key_impl(leaf)
        )
    if leaf.dtype == jnp.bool_:
        return largest(leaf.astype(jnp.uint8), included, axis).astype(jnp.bool_)
    candidates = jnp.where(included, leaf, jnp.iinfo(leaf.dtype).min)
    return candidates.max(axis=0) if axis is None else pmax(candidates, axis)


class Waiting:
    """Wraps a compiled program so that a call waits for its result."""

    def __init__(self, program: jax.stages.Compiled):
        self._program = program

    def __call__(self, *arguments: PyTree) -> PyTree:
        """Runs the program and waits for its result."""
        return jax.block_until_ready(self._program(*arguments))

    def as_text(self) -> str | None:
        """Returns the optimized HLO of the program."""
        return self._program.as_text()

    def memory_analysis(self) -> Any:
        """Returns the sizes of the program's arrays, as the compiler reports them."""
        return self._program.memory_analysis()


Program: TypeAlias = jax.stages.Compiled | Waiting
"""A compiled program over arrays; several hosts must call their programs in the same order."""


def _shardings(axes: PyTree, devices: Sequence[jax.Device]) -> PyTree:
    """Returns the sharding of each axis in a prefix tree of `None` and 0."""
    return jax.tree.map(partial(_sharding, devices), _specs(axes))


def _specs(axes: PyTree) -> PyTree:
    return jax.tree.map(
        lambda axis: PartitionSpec() if axis is None else PartitionSpec(AXIS),
        axes,
        is_leaf=lambda axis: axis is None,
    )


def _sharding(devices: Sequence[jax.Device], spec: PartitionSpec) -> NamedSharding:
    return NamedSharding(Mesh(np.asarray(distinct(devices)), (AXIS,)), spec)


def _put(tree: PyTree, devices: Sequence[jax.Device], spec: PartitionSpec) -> PyTree:
    sharding = _sharding(devices, spec)
    # If there are several hosts, each contributes only its rows.
    if not is_spread(devices):
        return jax.device_put(tree, sharding)
    return jax.tree.map(partial(_put_leaf, sharding=sharding, devices=devices), tree)


def _put_leaf(
    leaf: jax.typing.ArrayLike, sharding: NamedSharding, devices: Sequence[jax.Device]
) -> jax.Array:
    """Places an array on the devices of this host: all of it if replicated, else their rows."""
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        # NumPy has no dtype for keys.
        raw = _put_leaf(jax.random.key_data(leaf), sharding, devices)
        return jax.random.wrap_key_data(raw, impl=jax.random.key_impl(leaf))
    rows = np.asarray(leaf)
    if sharding.spec == PartitionSpec():
        return jax.make_array_from_process_local_data(sharding, rows, rows.shape)
    # The host may have passed the rows of all replicas.
    here = local_replicas(devices)
    return jax.make_array_from_process_local_data(
        sharding, rows if len(rows) == len(here) else rows[here], (len(devices), *rows.shape[1:])
    )
