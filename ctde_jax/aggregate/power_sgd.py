"""PowerSGD: matrices are sent as two low-rank factors, which an all-reduce can average."""

from math import prod
from typing import NamedTuple

import jax
import optax
from jax import lax
from jax import numpy as jnp

from ctde_jax.aggregate.reducer import reducer
from ctde_jax.aggregate.scaling import relative
from ctde_jax.aggregate.vector import as_tree, as_vector
from ctde_jax.devices import AXIS
from ctde_jax.errors import check_at_least


class PowerSGDState(NamedTuple):
    """One matrix for each leaf that is sent as factors, in the order of the tree."""

    residual: list[jax.Array]  # error feedback of this replica, float32[rows, columns]
    q: list[jax.Array]  # last right factor, float32[columns, rank], equal on all replicas


def power_sgd(rank: int) -> optax.GradientTransformationExtraArgs:
    """Sends matrices as low-rank factors, with error feedback and warm start (Vogels et al., 2019).

    A round is one step of power iteration that starts from the right factor of the last round:
    `P = M Q`, averaged and orthogonalized, then `Q = M^T P`, averaged; the result is `P Q^T`. The
    difference between a replica's message and its approximation is kept in its residual and added
    to the next message. All P are sent in one all-reduce, all Q and the other leaves in another.

    A leaf is treated as the matrix `[all other axes, last axis]`. It is sent whole if the factors
    would not be smaller, as for biases; if that is so for all leaves, the result is that of `mean`.
    For factored leaves of shape m x n and k elements in whole leaves, every replica sends
    `2 (R - 1) / R * 4 * (sum(rank * (m + n) + 1) + k + 1)` bytes: with each pair of factors, a flag
    that is 0 if all replicas send zeros, and the weight once.

    If every replica sends zeros for a leaf, the result is exactly zero and its residual does not
    change.

    Args:
        rank: Rank of the factors; the paper uses 1 to 4.

    Raises:
        InputError: `rank` is less than 1.

    Examples:
        >>> strategy = ctde.Strategy(reduce=ctde.aggregate.power_sgd(rank=2))
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

    # Full float32 products: the factors and the residual must add up to the message.
    @jax.default_matmul_precision("highest")
    def update(
        updates,
        state,
        params=None,
        *,
        weight: jax.typing.ArrayLike = 1.0,
        key: jax.Array,
        **extra_args,
    ):
        # Split the leaves into matrices and those that are sent whole.
        leaves, structure = jax.tree.flatten(updates)
        matrices = [
            leaf.reshape(_matrix_shape(leaf)) for leaf in leaves if travels_as_factors(leaf)
        ]
        whole = [leaf.astype(jnp.float32) for leaf in leaves if not travels_as_factors(leaf)]
        weight = jnp.asarray(weight, jnp.float32)

        def sum_weighted(arrays: list[jax.Array]) -> list[jax.Array]:
            vector = as_vector(arrays)
            return as_tree(lax.psum(jnp.where(weight > 0, vector * weight, 0), AXIS), arrays)

        # The target of the approximation is the message plus the residual.
        moves = [jnp.any(matrix != 0).astype(jnp.float32) for matrix in matrices]
        targets = [
            matrix + residual for matrix, residual in zip(matrices, state.residual, strict=True)
        ]
        starts = [_start(q, jax.random.fold_in(key, i)) for i, q in enumerate(state.q)]

        # First all-reduce: P, the flags of nonzero leaves, and the weight. The sum of P need not be
        # divided, as its orthogonal basis is the same.
        *sums, total = sum_weighted([*map(jnp.matmul, targets, starts), *moves, jnp.ones(())])
        sums, moving = sums[: len(matrices)], [x > 0 for x in sums[len(matrices) :]]
        bases = [jnp.linalg.qr(p).Q for p in sums]

        # Second all-reduce: Q, and the leaves that are sent whole.
        own_q = [matrix.T @ basis for matrix, basis in zip(targets, bases, strict=True)]
        averages = [x / jnp.where(total > 0, total, 1) for x in sum_weighted(own_q + whole)]
        q = averages[: len(own_q)]
        whole = averages[len(own_q) :]

        # Error feedback. The residual does not change if all replicas send zeros for the leaf, or
        # if the message has weight 0 and was ignored.
        errors = [m - basis @ own.T for m, basis, own in zip(targets, bases, own_q, strict=True)]
        errors = list(map(jnp.where, moving, errors, state.residual))
        residual = optax.tree.where(weight > 0, errors, state.residual)

        # Restore the tree: the product of the factors, or zeros, for matrices, and the mean for
        # whole leaves.
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
    """Returns the numbers of rows and columns; a vector is one row."""
    return prod(leaf.shape[:-1]), leaf.shape[-1] if leaf.ndim else 1


def _start(q: jax.Array, key: jax.Array) -> jax.Array:
    """Scales the columns of `q`, so that its products with large messages do not overflow.

    Scaling does not change the basis of a product. A column of zeros, as in the first round or
    after a message of too low a rank, is replaced by random numbers.
    """
    largest = jnp.max(jnp.abs(q), axis=0, keepdims=True)
    return jnp.where(largest > 0, relative(q, largest), jax.random.normal(key, q.shape))
