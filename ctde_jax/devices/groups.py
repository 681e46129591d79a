"""The replica axis, and groups of replicas that communicate among themselves.

Consecutive replicas are on the same host. The *peers* of a replica are the replicas at the same
position of all hosts, including itself.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp

from ctde_jax.errors import InputError

AXIS = "replica"


def is_vmapped() -> bool:
    """Returns whether the code that is traced runs under `jax.vmap`, and not on one device each."""
    return AXIS not in jax.sharding.get_abstract_mesh().manual_axes


class Groups(NamedTuple):
    """A division of all replicas into groups of equal size, within which the methods communicate.

    `jax.vmap` does not support groups, and nothing is sent there: each replica computes its result
    from the values of all.
    """

    members: tuple[tuple[int, ...], ...]
    """The replicas of each group, in the order of their positions."""

    @property
    def size(self) -> int:
        """Number of replicas in a group."""
        return len(self.members[0])

    @property
    def place(self) -> tuple[jax.Array, jax.Array]:
        """The group of this replica, and its position there; int32[] each."""
        replica = lax.axis_index(AXIS)
        if len(self.members) == 1:
            return jnp.int32(0), replica
        places = jnp.asarray(np.argsort(np.ravel(self.members)), jnp.int32)[replica]
        return places // self.size, places % self.size

    def psum(self, tree: Any) -> Any:
        """Sums arrays over the group."""
        return self._reduce(tree, lax.psum, lambda rows: rows.sum(axis=1))

    def pmax(self, tree: Any) -> Any:
        """Returns the elementwise maximum over the group."""
        return self._reduce(tree, lax.pmax, lambda rows: rows.max(axis=1))

    def psum_scatter(self, rows: jax.Array) -> jax.Array:
        """Sums rows `[size, ...]` over the group, and returns that of this replica's position."""
        if self.size == 1:
            return rows[0]
        if self._is_emulated:
            group, position = self.place
            return self._of_all(rows).sum(axis=1)[group, position]
        return lax.psum_scatter(rows, AXIS, axis_index_groups=self._indices)

    def all_gather(self, x: jax.Array) -> jax.Array:
        """Returns the arrays of all replicas of the group by position, `[size, ...]`."""
        if self.size == 1:
            return x[None]
        if self._is_emulated:
            return self._of_all(x)[self.place[0]]
        return lax.all_gather(x, AXIS, axis_index_groups=self._indices)

    def all_to_all(self, rows: jax.Array) -> jax.Array:
        """Sends row i of `[size, ...]` to the replica at position i; returns the rows received."""
        if self.size == 1:
            return rows
        if self._is_emulated:
            group, position = self.place
            return self._of_all(rows)[group, :, position]
        return lax.all_to_all(rows, AXIS, 0, 0, axis_index_groups=self._indices, tiled=True)

    @property
    def _indices(self) -> list[list[int]] | None:
        """The argument `axis_index_groups` of collectives; None if all replicas are one group."""
        return None if len(self.members) == 1 else [list(group) for group in self.members]

    @property
    def _is_emulated(self) -> bool:
        return len(self.members) > 1 and is_vmapped()

    def _reduce(self, tree: Any, collective: Callable[..., Any], of_rows: Callable) -> Any:
        if self.size == 1:
            return tree
        if self._is_emulated:
            group, _ = self.place
            return jax.tree.map(lambda x: of_rows(self._of_all(x))[group], tree)
        return collective(tree, AXIS, axis_index_groups=self._indices)

    def _of_all(self, x: jax.Array) -> jax.Array:
        """Returns the arrays of all replicas, `[groups, size, ...]`, which are not mapped."""
        return lax.all_gather(x, AXIS)[np.asarray(self.members)]


Axis: TypeAlias = str | Groups
"""A mapped axis by its name, or groups of the replica axis."""


def hosts(per_host: int) -> Groups:
    """Returns the groups of the replicas on each host, for code under the replica axis.

    Args:
        per_host: Number of consecutive replicas on a host.

    Raises:
        InputError: `per_host` does not divide the number of replicas.
    """
    replicas = lax.axis_size(AXIS)
    check_per_host(per_host, replicas)
    return Groups(
        tuple(tuple(range(first, first + per_host)) for first in range(0, replicas, per_host))
    )


def peers(per_host: int) -> Groups:
    """Returns the groups of the replicas at the same position of all hosts; see `hosts`."""
    return Groups(tuple(zip(*hosts(per_host).members, strict=True)))


def check_per_host(per_host: int, replicas: int) -> None:
    """Raises InputError if hosts with `per_host` replicas each do not have `replicas` in all."""
    if replicas % per_host:
        raise InputError("per_host", f"must divide the {replicas} devices, got {per_host}.")


def axis_size(axis: Axis) -> int:
    """Returns the number of participants on an axis or in a group."""
    return axis.size if isinstance(axis, Groups) else lax.axis_size(axis)


def psum(tree: Any, axis: Axis) -> Any:
    """Sums arrays over an axis, or within groups."""
    return axis.psum(tree) if isinstance(axis, Groups) else lax.psum(tree, axis)


def pmax(tree: Any, axis: Axis) -> Any:
    """Returns the elementwise maximum over an axis, or within groups."""
    return axis.pmax(tree) if isinstance(axis, Groups) else lax.pmax(tree, axis)
