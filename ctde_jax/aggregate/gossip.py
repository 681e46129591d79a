"""No center: every replica keeps parameters of its own, and mixes them with those of its neighbors."""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import jax
import optax
from jax import lax
from jax import numpy as jnp

from ctde_jax.aggregate.exchange import as_tree, as_vector
from ctde_jax.aggregate.reducer import reducer
from ctde_jax.devices import AXIS, PyTree
from ctde_jax.errors import InputError, check_known

Graph = Literal["ring", "exponential", "pairs"]


class GossipState(NamedTuple):
    """Where the exponential graph stands."""

    rounds: jax.Array  # int32[]


def gossip(graph: Graph = "ring", pull: float = 1.0) -> optax.GradientTransformationExtraArgs:
    """Mixes with the neighbors in a graph, for a `Strategy` that `diverges`.

    With W the symmetric or circulant, doubly stochastic mixing matrix, p the parameters before the round and d the
    outer gradients, replica i gets `sum_j W_ij d_j + pull * (p_i - sum_j W_ij p_j)`. With `pull=1` and the plain
    average as the outer optimizer its parameters become `sum_j W_ij (p_j - d_j)`: gossip (Lian et al., 2017), and their
    mean over the replicas is that of the local steps. The spread shrinks in every round by

    - `ring`, both neighbors and oneself in thirds: `(1 + 2 cos(2 pi / R)) / 3` for R of 3 and more;
    - `exponential`, in round t half of oneself and half of whoever is `2**(t mod log2 R)` further (Ying et al., 2021):
      nothing is left after log2 R rounds where R is a power of two;
    - `pairs`, halves with one random partner, drawn from the shared key in every round (Kolehmainen et al., 2025):
      the squared spread by `(1 - 1 / (R - 1)) / 2` in expectation, for even R.

    Every replica sends its n numbers in float32 to each neighbor: `2 * 4 n` bytes in a ring of 3 and more, else `4 n`.
    Replicas mix by differences from their neighbors, so parameters that are equal on all and do not move keep their
    bits.

    Args:
        graph: Who mixes with whom.
        pull: How strongly the replicas' parameters are drawn to those of their neighbors; NoLoCo's gamma over beta.

    Raises:
        InputError: The graph is not known, or pull is not from 0 to 1; when first used, there is only one replica.
    """
    check_known("graph", graph, ("ring", "exponential", "pairs"))
    if not 0 <= pull <= 1:
        raise InputError("pull", f"must be from 0 to 1, got {pull}.")

    def init(params: PyTree) -> GossipState:
        if lax.axis_size(AXIS) < 2:
            raise InputError(
                "devices", "must be at least 2 for gossip, which needs a neighbor, got 1."
            )
        return GossipState(jnp.int32(0))

    def update(updates, state, params=None, *, key, **extra_args):
        wanted = jax.tree.map(lambda d, p: d - pull * p, updates, params)
        away = as_tree(_AWAY[graph](as_vector(wanted), state.rounds, key), updates)
        return optax.tree.add(updates, away), GossipState(state.rounds + 1)

    return reducer(init, update)


def _ring(vector: jax.Array, rounds: jax.Array, key: jax.Array) -> jax.Array:
    replicas = lax.axis_size(AXIS)
    if replicas == 2:
        return (_from(vector, [1, 0]) - vector) / 2
    left = _from(vector, [(i - 1) % replicas for i in range(replicas)])
    right = _from(vector, [(i + 1) % replicas for i in range(replicas)])
    return ((left - vector) + (right - vector)) / 3


def _exponential(vector: jax.Array, rounds: jax.Array, key: jax.Array) -> jax.Array:
    replicas = lax.axis_size(AXIS)
    hops = [2**j for j in range((replicas - 1).bit_length())]
    return _one_of(
        [[(i + hop) % replicas for i in range(replicas)] for hop in hops],
        rounds % len(hops),
        vector,
    )


def _pairs(vector: jax.Array, rounds: jax.Array, key: jax.Array) -> jax.Array:
    rounds_of_all = tournament(lax.axis_size(AXIS))
    return _one_of(rounds_of_all, jax.random.randint(key, (), 0, len(rounds_of_all)), vector)


_AWAY: dict[str, Callable[[jax.Array, jax.Array, jax.Array], jax.Array]] = {
    "ring": _ring,
    "exponential": _exponential,
    "pairs": _pairs,
}
"""`away(vector, rounds, key)`: the mixed vector minus the replica's own."""


def tournament(replicas: int) -> list[list[int]]:
    """Returns rounds in which everybody meets everybody once; `rounds[t][i]` is the partner of i, or i itself if none.

    All but the last player turn in a circle (the circle method); with an odd number the last one is nobody.
    """
    players = replicas + replicas % 2
    rounds = []
    for turn in range(players - 1):
        partner = {
            (turn + j) % (players - 1): (turn - j) % (players - 1) for j in range(players - 1)
        }
        partner |= {turn: players - 1, players - 1: turn}
        rounds.append([partner[i] if partner[i] < replicas else i for i in range(replicas)])
    return rounds


def _one_of(choices: Sequence[Sequence[int]], choice: jax.Array, vector: jax.Array) -> jax.Array:
    """Returns the way to the average with the chosen source; the choice is the same on all replicas."""

    def away(sources: Sequence[int]) -> Callable[[jax.Array], jax.Array]:
        return lambda vector: (_from(vector, sources) - vector) / 2

    return lax.switch(choice, [away(sources) for sources in choices], vector)


def _from(vector: jax.Array, sources: Sequence[int]) -> jax.Array:
    """Returns to replica i the vector of `sources[i]`."""
    return lax.ppermute(vector, AXIS, [(source, i) for i, source in enumerate(sources)])
