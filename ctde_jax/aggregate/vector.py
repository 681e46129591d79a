"""Messages as vectors, and in equal parts."""

from itertools import accumulate, pairwise
from typing import TypeAlias

import jax
from jax import numpy as jnp
from jaxtyping import Array, Float32

from ctde_jax.devices import PyTree

Vector: TypeAlias = Float32[Array, " size"]
"""The concatenated leaves of a message."""


def as_vector(tree: PyTree, size: int | None = None) -> Vector:
    """Concatenates the leaves of a tree to one vector, padded with zeros to `size`, if given."""
    missing = [jnp.zeros((size or count(tree)) - count(tree))]
    return jnp.concatenate(
        [leaf.ravel().astype(jnp.float32) for leaf in jax.tree.leaves(tree)] + missing
    )


def as_tree(vector: Vector, like: PyTree) -> PyTree:
    """Inverts `as_vector`; shapes and dtypes are those of `like`."""
    leaves, structure = jax.tree.flatten(like)
    borders = [0, *accumulate(leaf.size for leaf in leaves)]
    parts = [vector[start:stop] for start, stop in pairwise(borders)]
    return structure.unflatten(
        [
            part.reshape(leaf.shape).astype(leaf.dtype)
            for part, leaf in zip(parts, leaves, strict=True)
        ]
    )


def count(tree: PyTree) -> int:
    """Returns the number of elements of all leaves."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def cut(parts: int, leaf: jax.Array) -> Float32[Array, "parts size"]:
    """Cuts a leaf into equal parts; the last is padded with zeros."""
    vector = leaf.ravel().astype(jnp.float32)
    return jnp.pad(vector, (0, -vector.size % parts)).reshape(parts, -1)


def whole(parts: Float32[Array, "parts size"], like: jax.Array) -> Float32[Array, "..."]:
    """Inverts `cut`: returns the leaf with the shape of `like`, in float32."""
    return parts.ravel()[: like.size].reshape(like.shape)
