"""The state of training between rounds, and the parts of it that differ between replicas.

The *central parameters* are those to evaluate, return and export; `evaluated_point` computes them.
A *center* is a pair of central parameters and model state.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import jax
import numpy as np
import optax
from jax import lax
from jax import numpy as jnp

from ctde_jax.aggregate import CutByOwner, Strategy, adapted
from ctde_jax.aggregate import evaluated_point as _evaluated_point
from ctde_jax.aggregate import has_evaluated_point as _has_evaluated_point
from ctde_jax.devices import AXIS, PyTree, groups, replica
from ctde_jax.errors import InputError
from ctde_jax.models import fine_tuning


class TrainState(NamedTuple):
    """The state of training; `params` differ between replicas only if the strategy diverges.

    In fine-tuning, `params` and all states that depend on them contain the trained part only.
    """

    step: PyTree  # int32[], number of steps taken, including those without examples
    params: PyTree
    model_state: PyTree  # state of the model besides its parameters, such as batch statistics
    opt_state: PyTree  # state of the optimizer; with inner steps, one per replica
    reduce_state: PyTree  # state of the strategy's reducer, one per replica
    outer_state: PyTree  # state of the strategy's outer optimizer; one per replica if it diverges
    ema_params: PyTree = ()  # exponential moving average of the parameters, if one is kept
    frozen: PyTree = ()  # parameters that are not trained; see `models.fine_tuning`


def axes(strategy: Strategy) -> TrainState:
    """Returns the axis of each part of the state: 0 if it differs between replicas, None if not."""
    # In local steps, each replica updates an optimizer state. If replicas diverge, each also has
    # parameters, an outer optimizer state and a moving average.
    local = 0 if strategy.inner_steps else None
    diverging = 0 if strategy.diverges else None
    return TrainState(
        step=None,
        params=diverging,
        model_state=None,
        opt_state=local,
        reduce_state=0,
        outer_state=diverging,
        ema_params=diverging,
        frozen=None,
    )


def check(params: PyTree, strategy: Strategy, replicas: int) -> None:
    """Raises InputError if a strategy cannot run on this number of replicas; compiles nothing.

    Args:
        params: Parameters, of which only shapes and dtypes are read.
        strategy: Strategy to check.
        replicas: Number of replicas.
    """
    groups.check_per_host(strategy.per_host, replicas)

    # Reducers check the number of replicas in `init`, which needs the axis.
    on_replicas = jax.vmap(strategy.reduce.init, in_axes=None, axis_name=AXIS, axis_size=replicas)
    jax.eval_shape(on_replicas, params)


def create(
    params: PyTree,
    model_state: PyTree,
    frozen: PyTree = (),
    *,
    optimizer: optax.GradientTransformation,
    strategy: Strategy,
    ema: bool = False,
) -> TrainState:
    """Makes the initial state of one replica.

    It runs under the replica axis, as reducers may read the size of this axis. `ema` adds a moving
    average of the parameters, which starts at `params`. `params` are those that are trained, and
    `frozen` all others.
    """
    return TrainState(
        step=jnp.int32(0),
        params=params,
        model_state=model_state,
        opt_state=strategy.local(optimizer).init(params),
        reduce_state=strategy.reduce.init(params),
        outer_state=adapted(strategy.outer).init(params),
        ema_params=params if ema else (),
        frozen=frozen,
    )


def like_created(
    params: PyTree,
    model_state: PyTree,
    optimizer: optax.GradientTransformation,
    strategy: Strategy,
    replicas: int,
    ema: bool = False,
    frozen: PyTree = (),
) -> TrainState:
    """Returns the shapes and dtypes of the result of `create` on all replicas, `[replica, ...]`."""
    # The axis is that of vmap, so that no devices are needed.
    make = partial(create, optimizer=optimizer, strategy=strategy, ema=ema)
    on_replicas = jax.vmap(make, in_axes=None, axis_name=AXIS, axis_size=replicas)
    return jax.eval_shape(on_replicas, params, model_state, frozen)


def place(
    params: PyTree,
    model_state: PyTree,
    optimizer: optax.GradientTransformation,
    strategy: Strategy,
    devices: Sequence[jax.Device],
    ema: bool = False,
    frozen: PyTree = (),
) -> TrainState:
    """Copies parameters and model state to the devices, and makes the initial state there."""
    # Reducers read the number of replicas, so their state is made on the devices.
    make = partial(create, optimizer=optimizer, strategy=strategy, ema=ema)
    parts = replica.replicate((params, model_state, frozen), devices)
    making = _on_replicas(make, parts, (None, None, None), axes(strategy), devices)
    return _run(making, parts, devices)


def change_strategy(
    state: TrainState, before: Strategy, after: Strategy, devices: Sequence[jax.Device]
) -> TrainState:
    """Converts a state of the strategy `before` to one of the strategy `after`.

    The optimizer's state is kept. The states of the reducer, of the outer optimizer and of the
    transformation `inner` are kept if both strategies have inner steps and states of the same
    structure, shapes and dtypes; otherwise they are initialized.
    """
    return _run(_lower_change(state, before, after, devices), (state,), devices)


def like_changed(
    state: TrainState, before: Strategy, after: Strategy, devices: Sequence[jax.Device]
) -> TrainState:
    """Returns shapes and dtypes of the result of `change_strategy`; reads only those of `state`."""
    return _lower_change(state, before, after, devices).out_info


def changed(state: TrainState, before: Strategy, after: Strategy) -> TrainState:
    """Converts the state of one replica to the strategy `after`; see `change_strategy`."""
    # Gradients and outer gradients differ in size, so no residual of the one fits the other.
    are_local = before.inner_steps > 0 and after.inner_steps > 0

    def kept(part: PyTree, initial: PyTree) -> PyTree:
        return part if are_local and _is_like(part, initial) else initial

    # `Strategy.local` chains `inner` and the optimizer.
    of_inner, opt_state = state.opt_state
    return state._replace(
        opt_state=(kept(of_inner, adapted(after.inner).init(state.params)), opt_state),
        reduce_state=kept(state.reduce_state, after.reduce.init(state.params)),
        outer_state=kept(state.outer_state, adapted(after.outer).init(state.params)),
    )


def _is_like(tree: PyTree, other: PyTree) -> bool:
    """Returns whether two trees have the same structure, shapes and dtypes."""

    def shapes(tree: PyTree) -> PyTree:
        return jax.tree.map(lambda x: (jnp.shape(x), jnp.result_type(x)), tree)

    return shapes(tree) == shapes(other)


def _lower_change(
    state: TrainState, before: Strategy, after: Strategy, devices: Sequence[jax.Device]
) -> jax.stages.Lowered:
    begin = partial(changed, before=before, after=after)
    return _on_replicas(begin, (state,), (axes(before),), axes(after), devices)


def is_computed(state: TrainState, strategy: Strategy) -> bool:
    """Returns whether the central parameters must be computed on the devices.

    If not, they are parts of the state: `params` or `ema_params`, and `frozen`. Only the structure
    of the state is read.
    """
    return fine_tuning.has_low_rank(state.params) or has_evaluated_point(state, strategy)


def has_evaluated_point(state: TrainState, strategy: Strategy) -> bool:
    """Returns whether the evaluated parameters are other numbers than those in the state.

    They are computed from the state of the optimizer, or are a mean over the replicas. Only the
    structure of the state is read.
    """
    return strategy.diverges or _has_evaluated_point(_central_optimizer(state, strategy))


def evaluated_point(state: TrainState, strategy: Strategy) -> PyTree:
    """Returns the central parameters, which are evaluated, returned and exported.

    They are the moving average of the parameters if the state has one. Otherwise they are `params`,
    or the point at which an optimizer such as `optax.contrib.schedule_free` is evaluated. If
    replicas diverge, the result is the mean over the replicas, computed by a collective. Frozen
    parameters are included, and low-rank changes are added to their kernels.
    """
    # An empty tree means that there is no moving average.
    if jax.tree.leaves(state.ema_params):
        params = state.ema_params
    else:
        params = _evaluated_point(_central_optimizer(state, strategy), state.params)
    if strategy.diverges:
        params = _mean_of_replicas(params)
    return fine_tuning.merge(params, state.frozen)


def _mean_of_replicas(params: PyTree) -> PyTree:
    """Averages parameters over the replicas; elements equal on all replicas keep their bits."""
    # A mean may round, so equal parameters are not averaged.
    real = replica.as_real(params)
    mean = replica.weighted_mean(real, 1.0)

    def choose(x: jax.Array, mean: jax.Array) -> jax.Array:
        # Not `x` itself, which `vmap` regards as different on each replica.
        highest = lax.pmax(x, AXIS)
        return jnp.where(lax.pmin(x, AXIS) == highest, highest, mean)

    return replica.as_complex(jax.tree.map(choose, real, mean), params)


def of_optimizer(state: TrainState) -> PyTree:
    """Copies the state of a run's optimizer to this host, as numpy arrays and JAX keys.

    Leaves that differ between replicas have a leading axis `[replica, ...]`.
    """
    # `Strategy.local` chains `inner` and the optimizer.
    _, opt_state = state.opt_state

    def on_host(leaf: jax.Array) -> np.ndarray | jax.Array:
        raw = _raw(leaf)
        rows = np.asarray(raw) if raw.is_fully_addressable else replica.gathered(raw)
        return rows if raw is leaf else _as_key(jnp.asarray(rows), leaf)

    return jax.tree.map(on_host, opt_state)


def _central_optimizer(state: TrainState, strategy: Strategy) -> PyTree:
    """Returns the state of the optimizer that updates the central parameters.

    This is the outer optimizer if there are local steps.
    """
    return state.outer_state if strategy.inner_steps else state.opt_state


def to_tensors(tree: PyTree) -> dict[str, np.ndarray]:
    """Copies a tree to every host, as numpy arrays by name; PRNG keys become their integers.

    Leaves that differ between replicas have a leading axis `[replica, ...]`.
    """
    return {name: replica.gathered(_raw(leaf)) for name, leaf in named(tree).items()}


def from_tensors(
    tensors: Mapping[str, np.ndarray],
    like: TrainState,
    strategy: Strategy,
    replicas: int,
    devices: Sequence[jax.Device],
    option: str,
) -> TrainState:
    """Restores a state from the result of `to_tensors`, and places it on the devices.

    If the number of replicas has changed, each part that differs between replicas, such as
    optimizer moments or residuals, starts on all replicas from its mean over the saved replicas
    (integers from the maximum). A `CutByOwner` part of a reducer's state is cut again instead.

    Args:
        tensors: Arrays by name.
        like: A state of the same model, optimizer and strategy on these devices; only shapes and
            dtypes are read.
        strategy: Strategy of the saved state.
        replicas: Number of replicas of the saved state.
        devices: Devices, with one replica on each.
        option: Name of the argument that the tensors come from, for error messages.

    Raises:
        InputError: If names, shapes or dtypes differ from those of `like`; lists all differences.
    """
    raw = jax.tree.map(_raw_shape, like)

    # Find each leaf by its name, and convert it to this number of replicas.
    saved = in_place(tensors, raw, option)
    if replicas != len(devices):
        saved = _redistribute(saved, raw, strategy)

    # The error lists all leaves that differ, not the first one only.
    _check_shapes(saved, raw, option)

    # Put it onto the devices. Keys travel as raw integers.
    placed = TrainState(
        *(
            replica.replicate(part, devices) if axis is None else replica.shard(part, devices)
            for part, axis in zip(saved, axes(strategy), strict=True)
        )
    )
    return copied(jax.tree.map(_as_key, placed, like))


def tree_from_tensors(tensors: Mapping[str, np.ndarray], like: PyTree, option: str) -> PyTree:
    """Restores a tree from the result of `to_tensors`, as arrays on the host and JAX keys.

    Args:
        tensors: Arrays by name.
        like: A tree of the same structure; only shapes and dtypes are read.
        option: Name of the argument that the tensors come from, for error messages.

    Raises:
        InputError: If names, shapes or dtypes differ from those of `like`; lists the differences.
    """
    raw = jax.tree.map(_raw_shape, like)
    saved = in_place(tensors, raw, option)
    _check_shapes(saved, raw, option)
    return jax.tree.map(_as_key, saved, like)


def merged_params(tensors: Mapping[str, np.ndarray], part: str) -> dict[str, np.ndarray]:
    """Returns all parameters by name, given the result of `to_tensors`.

    Args:
        tensors: Arrays by name.
        part: `params` or `ema_params`, the part with the trained parameters.
    """
    return fine_tuning.merge_by_name(below(tensors, f"{part}/"), below(tensors, "frozen/"))


def below(tensors: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """Returns the tensors whose names begin with a prefix, which is removed."""
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }


def in_place(tensors: Mapping[str, np.ndarray], like: PyTree, option: str) -> PyTree:
    """Returns the tree with the structure of `like` whose leaves are the tensors of their names.

    Args:
        tensors: Arrays by name.
        like: A tree whose structure determines the names; shapes and dtypes are not compared.
        option: Name of the argument that the tensors come from, for error messages.

    Raises:
        InputError: If names are missing or unknown.
    """
    wanted = named(like)
    missing = [f"{name} is missing" for name in wanted if name not in tensors]
    unknown = [f"{name} is not expected" for name in tensors if name not in wanted]
    _raise_if(missing + unknown, option)
    return jax.tree.structure(like).unflatten([tensors[name] for name in wanted])


def _check_shapes(saved: PyTree, like: PyTree, option: str) -> None:
    differences = [
        f"{name} is {tensor.dtype}{list(tensor.shape)} instead of {leaf.dtype}{list(leaf.shape)}"
        for (name, leaf), tensor in zip(named(like).items(), jax.tree.leaves(saved), strict=True)
        if (tensor.shape, tensor.dtype) != (leaf.shape, leaf.dtype)
    ]
    _raise_if(differences, option)


def _raise_if(differences: Sequence[str], option: str) -> None:
    if differences:
        rule = "must refer to a checkpoint of the same model, optimizer and strategy"
        more = f"; and {len(differences) - 10:,} more" if len(differences) > 10 else ""
        raise InputError(option, f"{rule}, but {'; '.join(differences[:10])}{more}.")


def named(tree: PyTree) -> dict[str, jax.Array]:
    """Returns the leaves of a tree by their paths, such as `params/layers/0/kernel`."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _raw(leaf: jax.Array) -> jax.Array:
    """Returns the integers of a PRNG key; returns any other array unchanged."""
    return jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf


def _raw_shape(leaf: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.eval_shape(_raw, leaf)


def _as_key(raw: jax.Array, like: jax.Array) -> jax.Array:
    if not jnp.issubdtype(like.dtype, jax.dtypes.prng_key):
        return raw
    return jax.random.wrap_key_data(jnp.asarray(raw), impl=jax.random.key_impl(like))


def _redistribute(saved: TrainState, like: TrainState, strategy: Strategy) -> TrainState:
    """Converts the parts that differ between replicas to the number of replicas of `like`."""

    def is_cut(part: PyTree) -> bool:
        return isinstance(part, CutByOwner)

    def redistribute(part: PyTree, like: PyTree) -> PyTree:
        # A reducer's state that is cut by owner is recut as a whole, not leaf by leaf.
        return part.recut(like) if is_cut(part) else _mean_of_all(part, like)

    return TrainState(
        *(
            part if axis is None else jax.tree.map(redistribute, part, target, is_leaf=is_cut)
            for part, target, axis in zip(saved, like, axes(strategy), strict=True)
        )
    )


def _mean_of_all(rows: np.ndarray, like: jax.ShapeDtypeStruct) -> np.ndarray:
    # Wrong shapes are reported later, together with all other differences.
    if rows.shape[1:] != like.shape[1:]:
        return rows
    if not jnp.issubdtype(rows.dtype, jnp.inexact):
        return np.broadcast_to(rows.max(axis=0), like.shape)

    # A mean may round, so numbers that are equal on all replicas are not averaged.
    mean = rows.mean(axis=0, dtype=jnp.promote_types(rows.dtype, np.float32)).astype(rows.dtype)
    is_equal = (rows == rows[:1]).all(axis=0)
    return np.broadcast_to(np.where(is_equal, rows[0], mean), like.shape)


def _on_replicas(
    make: Callable[..., TrainState],
    like: tuple[PyTree, ...],
    in_axes: tuple[PyTree, ...],
    out_axes: TrainState,
    devices: Sequence[jax.Device],
) -> jax.stages.Lowered:
    # pmap needs at least one argument with a row for each replica.
    row = jax.ShapeDtypeStruct((len(devices),), np.int32)
    on_replicas = replica.parallel(lambda _, *rest: make(*rest), devices, (0, *in_axes), out_axes)
    return replica.lowered(on_replicas, row, *like)


def _run(
    making: jax.stages.Lowered, arguments: tuple[PyTree, ...], devices: Sequence[jax.Device]
) -> TrainState:
    """Runs a program that makes a state, and copies the result.

    Leaves of a result may share memory, but rounds donate the whole state.
    """
    rows = replica.shard(np.arange(len(devices), dtype=np.int32), devices)
    return copied(replica.compiled(making, devices)(rows, *arguments))


def copied(state: TrainState) -> TrainState:
    """Copies a state and keeps the sharding of each leaf."""
    # Without `out_shardings`, `jit` would replicate an array without elements.
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    return jax.jit(lambda state: jax.tree.map(jnp.copy, state), out_shardings=shardings)(state)
