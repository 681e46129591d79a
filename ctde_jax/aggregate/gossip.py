"""Decentralized averaging: each replica mixes its parameters with those of its neighbors."""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import jax
import optax
from jax import lax
from jax import numpy as jnp
from jaxtyping import Array, Int32, Key

from ctde_jax.aggregate.reducer import reducer
from ctde_jax.aggregate.vector import Vector, as_tree, as_vector
from ctde_jax.devices import AXIS, PyTree
from ctde_jax.errors import InputError, check_known

Graph = Literal["ring", "exponential", "pairs"]


class GossipState(NamedTuple):
    """The position in the cycle of exponential graphs."""

    rounds: Int32[Array, ""]  # rounds since the start


def gossip(graph: Graph = "ring", pull: float = 1.0) -> optax.GradientTransformationExtraArgs:
    """Mixes parameters with those of the neighbors in a graph; requires `Strategy.diverges`.

    With W the symmetric or circulant, doubly stochastic mixing matrix, p the parameters before the
    round and d the outer gradients, replica i gets
    `sum_j W_ij d_j + pull * (p_i - sum_j W_ij p_j)`. With `pull=1` and plain averaging as the outer
    optimizer, its parameters become `sum_j W_ij (p_j - d_j)`. This is gossip (Lian et al., 2017),
    which preserves the mean of the parameters over the replicas. Their deviation from the mean
    contracts as follows:

    - `ring`: weights of 1/3 for both neighbors and for the replica itself; a factor of
      `(1 + 2 cos(2 pi / R)) / 3` per round if R >= 3;
    - `exponential`: in round t, weights of 1/2 for the replica itself and for the one
      `2**(t mod ceil(log2 R))` further on (Ying et al., 2021); zero after log2 R rounds if R is a
      power of two;
    - `pairs`: weights of 1/2 for the replica itself and for a random partner, drawn from the shared
      key in every round (Kolehmainen et al., 2025); a factor of `(1 - 1 / (R - 1)) / 2` per round
      for the expected squared deviation, if R is even.

    Every replica sends its n parameters in float32 to each neighbor: `2 * 4 n` bytes in a ring of 3
    or more, otherwise `4 n`. Mixing adds differences from the neighbors, so parameters that are
    equal on all replicas, with a zero outer gradient, keep their bits.

    Args:
        graph: Mixing graph: `ring`, `exponential` or `pairs`.
        pull: Strength of the pull of parameters towards those of the neighbors, from 0 to 1;
            NoLoCo's gamma over beta.

    Raises:
        InputError: `graph` is unknown, `pull` is not from 0 to 1, or, at initialization, there is
            only one replica.

    Examples:
        >>> ring = ctde.aggregate.gossip("ring")
        >>> strategy = ctde.Strategy(inner_steps=1, reduce=ring, diverges=True)
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
        # Mixing is linear, so `d - pull * p` is mixed at once: `d_i` plus its change by mixing is
        # the formula above.
        wanted = jax.tree.map(lambda d, p: d - pull * p, updates, params)
        away = as_tree(_AWAY[graph](as_vector(wanted), state.rounds, key), updates)
        return optax.tree.add(updates, away), GossipState(state.rounds + 1)

    return reducer(init, update)


def _ring(vector: Vector, rounds: Int32[Array, ""], key: Key[Array, ""]) -> Vector:
    replicas = lax.axis_size(AXIS)
    # Both neighbors are the same replica, so the ring is a pair.
    if replicas == 2:
        return (_from(vector, [1, 0]) - vector) / 2
    left = _from(vector, [(i - 1) % replicas for i in range(replicas)])
    right = _from(vector, [(i + 1) % replicas for i in range(replicas)])
    # Differences are added, not weighted values: equal values give exactly 0.
    return ((left - vector) + (right - vector)) / 3


def _exponential(vector: Vector, rounds: Int32[Array, ""], key: Key[Array, ""]) -> Vector:
    replicas = lax.axis_size(AXIS)
    hops = [2**j for j in range((replicas - 1).bit_length())]
    return _one_of(
        [[(i + hop) % replicas for i in range(replicas)] for hop in hops],
        rounds % len(hops),
        vector,
    )


def _pairs(vector: Vector, rounds: Int32[Array, ""], key: Key[Array, ""]) -> Vector:
    # In a random round of a tournament, all partners of a replica are equally likely.
    rounds_of_all = tournament(lax.axis_size(AXIS))
    return _one_of(rounds_of_all, jax.random.randint(key, (), 0, len(rounds_of_all)), vector)


_AWAY: dict[str, Callable[[Vector, Int32[Array, ""], Key[Array, ""]], Vector]] = {
    "ring": _ring,
    "exponential": _exponential,
    "pairs": _pairs,
}
"""`away(vector, rounds, key)`, the change of the vector by mixing: the mixed vector minus it."""


def tournament(replicas: int) -> list[list[int]]:
    """Returns the rounds of a tournament; `rounds[t][i]` is the partner of i, or i if it has none.

    Every two players meet once, by the circle method: all players but the last rotate. If
    `replicas` is odd, the last player is a dummy.
    """
    players = replicas + replicas % 2
    rounds = []
    for turn in range(players - 1):
        # Positions at equal distance from `turn` meet. That of `turn` is itself, so it meets the
        # last player.
        partner = {
            (turn + j) % (players - 1): (turn - j) % (players - 1) for j in range(players - 1)
        }
        partner |= {turn: players - 1, players - 1: turn}
        rounds.append([partner[i] if partner[i] < replicas else i for i in range(replicas)])
    return rounds


def _one_of(choices: Sequence[Sequence[int]], choice: Int32[Array, ""], vector: Vector) -> Vector:
    """Returns the change of a vector if it is averaged with that of its source replica.

    Args:
        choices: For each choice, the source of every replica.
        choice: Index of the choice, equal on all replicas.
        vector: Vector of this replica.
    """

    def away(sources: Sequence[int]) -> Callable[[Vector], Vector]:
        return lambda vector: (_from(vector, sources) - vector) / 2

    # Branches contain collectives: all replicas must take the same one.
    return lax.switch(choice, [away(sources) for sources in choices], vector)


def _from(vector: Vector, sources: Sequence[int]) -> Vector:
    """Returns the vector of replica `sources[i]` on each replica i."""
    return lax.ppermute(vector, AXIS, [(source, i) for i, source in enumerate(sources)])
