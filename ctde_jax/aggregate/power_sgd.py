"""Low-rank agreement: matrices travel as two thin factors that the replicas can average as they are."""

from math import prod
from typing import NamedTuple

import jax
import optax
from jax import lax
from jax import numpy as jnp

from ctde_jax.aggregate.exchange import as_tree, as_vector
from ctde_jax.aggregate.reducer import reducer
from ctde_jax.aggregate.scaling import relative
from ctde_jax.devices import AXIS
from ctde_jax.errors import check_at_least


class PowerSGDState(NamedTuple):
    """For each leaf that travels as factors, a matrix `[rows, columns]`, in the order of the tree."""

    residual: list[jax.Array]  # what this replica could not say so far, float32[rows, columns]
    q: list[jax.Array]  # the last right factor, float32[columns, rank], equal on all replicas


def power_sgd(rank: int) -> optax.GradientTransformationExtraArgs:
    """Sends matrices as factors of a low rank, with error feedback and warm start (Vogels et al., 2019).

    A round is one step of power iteration that starts from the last round's right factor: `P = M Q`, averaged and
    orthogonalized, then `Q = M^T P`, averaged, and all agree on `P Q^T`. What a replica's own `P Q^T` does not say
    stays in its residual for the next round. All P travel in one all-reduce, all Q and the other leaves in a second.

    A leaf is seen as the matrix of all its axes but the last, and the last. It travels whole where the factors would
    be no smaller, as biases do; with a rank that high this is `mean`. For leaves of m x n as factors and k numbers in
    whole leaves, every replica sends `2 (R - 1) / R * 4 * (sum(rank * (m + n) + 1) + k + 1)` bytes: with each pair of
    factors one number that is 0 if all replicas send zeros, and once the weight.

    A leaf that every replica sends as zeros is agreed on as exactly zero, and its residual stays.

    Args:
        rank: Of the factors; the paper uses 1 to 4.

    Raises:
        InputError: The rank is less than 1.
    """
    check_at_least(1, rank=rank)

    def travels_as_factors(leaf: jax.Array) -> bool:
        rows, columns = _matrix_shape(leaf)
        return rank * (rows + columns) < rows * columns

    def init(params):
        shapes = [
            _matrix_shape(leaf) for leaf in jax.tree.leaves(params) if travels_as_factors(leaf)
        ]
        return PowerSGDState(
            residual=[jnp.zeros(shape) for shape in shapes],
            q=[jnp.zeros((columns, rank)) for _, columns in shapes],
        )

    @jax.default_matmul_precision("highest")  # what is sent and what is kept must add up
    def update(
        updates,
        state,
        params=None,
        *,
        weight: jax.typing.ArrayLike = 1.0,
        key: jax.Array,
        **extra_args,
    ):
        leaves, structure = jax.tree.flatten(updates)
        matrices = [
            leaf.reshape(_matrix_shape(leaf)) for leaf in leaves if travels_as_factors(leaf)
        ]
        whole = [leaf.astype(jnp.float32) for leaf in leaves if not travels_as_factors(leaf)]
        weight = jnp.asarray(weight, jnp.float32)

        def sum_weighted(arrays: list[jax.Array]) -> list[jax.Array]:
            vector = as_vector(arrays)
            return as_tree(lax.psum(jnp.where(weight > 0, vector * weight, 0), AXIS), arrays)

        moves = [jnp.any(matrix != 0).astype(jnp.float32) for matrix in matrices]
        wanted = [
            matrix + residual for matrix, residual in zip(matrices, state.residual, strict=True)
        ]
        starts = [_start(q, jax.random.fold_in(key, i)) for i, q in enumerate(state.q)]

        *sums, total = sum_weighted([*map(jnp.matmul, wanted, starts), *moves, jnp.ones(())])
        sums, moving = sums[: len(matrices)], [x > 0 for x in sums[len(matrices) :]]
        bases = [jnp.linalg.qr(p).Q for p in sums]
        own_q = [matrix.T @ basis for matrix, basis in zip(wanted, bases, strict=True)]
        averages = [x / jnp.where(total > 0, total, 1) for x in sum_weighted(own_q + whole)]
        q, whole = averages[: len(own_q)], averages[len(own_q) :]

        unsaid = [m - basis @ own.T for m, basis, own in zip(wanted, bases, own_q, strict=True)]
        unsaid = list(map(jnp.where, moving, unsaid, state.residual))
        residual = optax.tree.where(
            weight > 0, unsaid, state.residual
        )  # a message without weight is not heard

        agreed = [basis @ right.T for basis, right in zip(bases, q, strict=True)]
        agreed = iter(
            [jnp.where(is_moving, x, 0) for is_moving, x in zip(moving, agreed, strict=True)]
        )
        others = iter(whole)
        answer = [next(agreed if travels_as_factors(leaf) else others) for leaf in leaves]
        answer = [
            x.reshape(leaf.shape).astype(leaf.dtype) for x, leaf in zip(answer, leaves, strict=True)
        ]
        return structure.unflatten(answer), PowerSGDState(residual, q)

    return reducer(init, update)


def _matrix_shape(leaf: jax.Array) -> tuple[int, int]:
    """Returns rows and columns; a vector is one row."""
    return prod(leaf.shape[:-1]), leaf.shape[-1] if leaf.ndim else 1


def _start(q: jax.Array, key: jax.Array) -> jax.Array:
    """Scales the columns, so that products with large messages do not overflow; the basis of a product is the same.

    A column of zeros, as in the first round or after a message of too low a rank, is drawn at random.
    """
    largest = jnp.max(jnp.abs(q), axis=0, keepdims=True)
    return jnp.where(largest > 0, relative(q, largest), jax.random.normal(key, q.shape))
