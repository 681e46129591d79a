"""Fine-tuning: some parameters are trained, and all others are frozen.

The parameters are split into two trees with the structure of the whole: the trained and the frozen
ones, each with None in place of the leaves of the other. A frozen kernel may be changed by a
low-rank product, whose two factors are then trained (LoRA; Hu et al., 2022).
"""

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from math import prod
from typing import NamedTuple

import jax
import numpy as np
from jax import numpy as jnp
from jaxtyping import Array, Key

from ctde_jax.devices import PyTree
from ctde_jax.errors import InputError, did_you_mean, quoted
from ctde_jax.models.base import Model, count_params


class LowRank(NamedTuple):
    """The factors of a change of a frozen kernel, which is their product over the rank.

    The axes of a kernel are divided into those of the rows and those of the columns of a matrix, so
    that the matrix is as close to a square as possible. An attention kernel `[inputs, heads, size]`
    has the rows `inputs` and the columns `heads` and `size`.
    """

    down: jax.Array  # float[*rows, rank]
    up: jax.Array  # float[rank, *columns]


def split(
    params: PyTree, patterns: Sequence[str] | None, rank: int | None, seed: int
) -> tuple[PyTree, PyTree]:
    """Splits parameters into those that are trained and those that are frozen.

    With a rank, each frozen parameter with two or more axes gets a `LowRank` in the trained tree,
    unless that would have as many numbers as the parameter. `down` is drawn from a normal
    distribution with variance `1 / rows`, and `up` is 0, so that `merge` returns `params`.

    Args:
        params: All parameters.
        patterns: Patterns of the names of the frozen parameters, such as `encoder/*`, in the syntax
            of `fnmatch`. By default none are frozen, or with a rank all.
        rank: Rank of the low-rank changes; None for none.
        seed: Random seed of the low-rank changes.

    Returns:
        The trained and the frozen parameters; an empty tuple for the latter if there are none.

    Raises:
        InputError: A pattern matches no parameter, or nothing would be trained.

    Examples:
        >>> params = {"body": jax.numpy.ones((3, 4)), "head": jax.numpy.ones((4, 2))}
        >>> trained, frozen = ctde.models.fine_tuning.split(params, ["body"], rank=1, seed=0)
        >>> jax.tree.map(np.shape, trained)
        {'body': LowRank(down=(3, 1), up=(1, 4)), 'head': (4, 2)}
        >>> frozen["head"] is None
        True
    """
    if patterns is None:
        if rank is None:
            return params, ()
        patterns = ["*"]
    leaves, structure = jax.tree.flatten(params)
    names = names_of(params)
    chosen = find_matches("freeze", patterns, names)

    # Each parameter has a key of its position, so that it does not depend on the patterns. The
    # initialization and the training have the keys that `fold_in` returns for 0 and 1.
    key = jax.random.fold_in(jax.random.key(seed), 2)
    trained: list[PyTree] = []
    frozen: list[PyTree] = []
    for number, (name, leaf) in enumerate(zip(names, leaves, strict=True)):
        is_frozen = name in chosen
        frozen.append(leaf if is_frozen else None)
        change = _draw(leaf, rank, jax.random.fold_in(key, number)) if is_frozen and rank else None
        trained.append(change if is_frozen else leaf)
    if not jax.tree.leaves(trained):
        raise InputError(
            "lora_rank" if rank else "freeze",
            "must leave parameters to train: "
            + (
                f"no frozen kernel is large enough for a low-rank change of rank {rank}; lower it."
                if rank
                else "the patterns match all of them; set lora_rank, or match fewer."
            ),
        )
    return structure.unflatten(trained), structure.unflatten(frozen)


def merge(trained: PyTree, frozen: PyTree) -> PyTree:
    """Returns all parameters, given the result of `split` or trained parameters that replace it.

    Args:
        trained: The trained parameters.
        frozen: The frozen parameters, or an empty tuple if all are trained.
    """
    if not jax.tree.leaves(frozen):
        return trained

    def join(kept: PyTree, own: PyTree) -> PyTree:
        if kept is None:
            return own
        return kept if own is None else _changed(kept, own)

    return jax.tree.map(join, frozen, trained, is_leaf=lambda leaf: leaf is None)


def low_rank_kernels(trained: PyTree, frozen: PyTree) -> list[jax.Array]:
    """Returns the kernels that have a low-rank change, with the change added."""
    if not has_low_rank(trained):
        return []

    def join(kept: PyTree, own: PyTree) -> PyTree:
        return _changed(kept, own) if is_low_rank(own) else None

    return jax.tree.leaves(jax.tree.map(join, frozen, trained, is_leaf=lambda leaf: leaf is None))


def merge_by_name(
    trained: Mapping[str, np.ndarray], frozen: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Merges parameters as `merge` does, given the names of their leaves.

    Arrays of `trained` may have a leading replica axis, over which factors are averaged first.
    """
    whole = {**frozen, **trained}
    for name, kernel in frozen.items():
        names = f"{name}/down", f"{name}/up"
        if names[0] not in trained:
            continue
        down, up = (jnp.asarray(whole.pop(name)) for name in names)
        # The two factors together have two axes more than the kernel.
        if down.ndim + up.ndim > kernel.ndim + 2:
            down, up = down.mean(axis=0), up.mean(axis=0)
        whole[name] = np.asarray(_changed(kernel, LowRank(down, up)))
    return whole


def merged(model: Model, frozen: PyTree) -> Model:
    """Returns the model as a function of its trained parameters alone, for `Model.apply`."""
    if not jax.tree.leaves(frozen):
        return model

    def apply(params, model_state, inputs, key, *mask):
        return model.apply(merge(params, frozen), model_state, inputs, key, *mask)

    return model._replace(apply=apply)


def has_low_rank(trained: PyTree) -> bool:
    """Returns whether a tree of trained parameters contains a `LowRank`."""
    return bool(_changes(trained))


def names_of(params: PyTree) -> list[str]:
    """Returns the names of parameters, such as `layers/0/kernel`, in the order of the leaves.

    A `LowRank` has one name, that of its kernel.
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(params, is_low_rank)
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]


def is_low_rank(node: PyTree) -> bool:
    """Returns whether a node of a tree is a `LowRank`."""
    return isinstance(node, LowRank)


def find_matches(option: str, patterns: Sequence[str], names: Iterable[str]) -> set[str]:
    """Returns the names that match at least one pattern, in the syntax of `fnmatch`.

    Args:
        option: Argument that the patterns come from, for error messages.
        patterns: Patterns of names, such as `encoder/*`.
        names: Names of the parameters of the model.

    Raises:
        InputError: There are no patterns, or one matches nothing; suggests the most similar name.
    """
    names = list(names)
    if not patterns:
        raise InputError(option, "must contain at least one pattern, such as 'encoder/*'.")
    found: set[str] = set()
    for pattern in patterns:
        matches = {name for name in names if fnmatchcase(name, pattern)}
        # A pattern that matches nothing is probably a typo.
        if not matches:
            suggestion = did_you_mean(pattern, names)
            raise InputError(
                option, f"must match parameters of the model, got {quoted(pattern)}{suggestion}"
            )
        found |= matches
    return found


def describe(params: PyTree, trained: PyTree) -> str:
    """Returns a phrase with the numbers of trained and frozen parameters, for the plan."""
    changes = _changes(trained)
    frozen = count_params(params) - (count_params(trained) - count_params(changes))
    words = f"{count_params(trained):,} parameters, {frozen:,} frozen"
    if changes:
        kernels = f"{len(changes)} kernel{'s' * (len(changes) > 1)}"
        words += f"; low-rank changes of {kernels}, rank {changes[0].down.shape[-1]}"
    return words


def _changes(trained: PyTree) -> list[LowRank]:
    return [node for node in jax.tree.leaves(trained, is_leaf=is_low_rank) if is_low_rank(node)]


def _draw(leaf: jax.Array, rank: int, key: Key[Array, ""]) -> LowRank | None:
    """Returns the first low-rank change of a parameter, whose product is 0; or None without one."""
    if leaf.ndim < 2 or not jnp.issubdtype(leaf.dtype, jnp.floating):
        return None

    # Rows plus columns are fewest if the matrix is closest to a square.
    shape = leaf.shape
    cut = min(range(1, leaf.ndim), key=lambda cut: prod(shape[:cut]) + prod(shape[cut:]))
    rows, columns = prod(shape[:cut]), prod(shape[cut:])
    if rank * (rows + columns) >= rows * columns:
        return None
    down = jax.random.normal(key, (*shape[:cut], rank), leaf.dtype) / np.sqrt(rows)
    return LowRank(down.astype(leaf.dtype), jnp.zeros((rank, *shape[cut:]), leaf.dtype))


@jax.jit
def _changed(kernel: jax.Array, change: LowRank) -> jax.Array:
    # Compiled in the same way on the host and in the devices' programs, so that bits are equal.
    return kernel + jnp.tensordot(change.down, change.up, axes=1).astype(kernel.dtype)
