"""Rules for replicas of which some send nonsense, by a broken sensor, bad data or intent.

Every replica counts once: a weight is only a claim, and must not buy influence. So a replica without examples, whose
message is no change at all, counts as a vote for no change. A message that is not finite has no effect on any of these
rules, as long as there are no more such messages than the rule bears.

A rule protects against messages. It does not protect against a replica that lies as the owner of a slice, nor does it
see batch statistics or losses, which are averaged elsewhere.

The coordinate-wise rules need no further word between the replicas. The rules for whole vectors add up what each owner
knows of the distances between messages: R x R floats for Krum, R floats in each iteration for the others.
"""

from math import inf

import jax
from jax import lax
from jax import numpy as jnp

from ctde_jax.aggregate.combine import Combine
from ctde_jax.errors import InputError, check_at_least
from ctde_jax.replica import AXIS


def median() -> Combine:
    """Takes the median of each coordinate; for an even number of replicas the middle of the two (Yin et al., 2018)."""

    def update(rows, weights, state):
        ordered = jnp.sort(rows, axis=0)  # what is not a number comes last
        replicas = len(rows)
        return 0.5 * ordered[(replicas - 1) // 2] + 0.5 * ordered[replicas // 2], state

    return Combine(lambda size: (), update)


def trimmed_mean(byzantine: int) -> Combine:
    """Averages each coordinate without its largest and smallest values (Yin et al., 2018).

    Args:
        byzantine: The paper's f: so many values are left out at either end. 0 is the mean.

    Raises:
        InputError: It is negative or, as soon as the number of replicas is known, half of them or more.
    """
    check_at_least(0, byzantine=byzantine)

    def init(size):
        _check_replicas("the trimmed mean", byzantine, least=1)
        return ()

    def update(rows, weights, state):
        return jnp.sort(rows, axis=0)[byzantine : len(rows) - byzantine].mean(axis=0), state

    return Combine(init, update)


def krum(byzantine: int) -> Combine:
    """Follows the one replica that is nearest to its neighbors (Blanchard et al., 2017).

    A replica's neighbors are the R - f messages nearest to its own, which is one of them, and its score is the sum of
    the squared distances to them; the least score wins. This is ByzFL's definition; the paper has one neighbor less.

    Args:
        byzantine: The paper's f, how many replicas may be bad.

    Raises:
        InputError: It is negative or, as soon as the number of replicas is known, there are no more than 2 f + 2.
    """
    return multi_krum(byzantine, selected=1)


def multi_krum(byzantine: int, selected: int | None = None) -> Combine:
    """Averages the replicas of least score, where `krum` follows only the one (Blanchard et al., 2017).

    Args:
        byzantine: The paper's f, how many replicas may be bad.
        selected: The paper's m, how many replicas are averaged; by default all but f, as in ByzFL.

    Raises:
        InputError: As `krum`, or `selected` is not from 1 to the replicas that are not bad.
    """
    check_at_least(0, byzantine=byzantine)
    check_at_least(1, selected=selected)

    def init(size):
        _check_replicas("Krum", byzantine, least=3)
        honest = lax.axis_size(AXIS) - byzantine
        if selected is not None and selected > honest:
            raise InputError("selected", f"must be at most {honest}, the replicas that are not bad, got {selected}.")
        return ()

    def update(rows, weights, state):
        honest = len(rows) - byzantine
        own_part = lax.map(lambda row: jnp.sum((rows - row[None]) ** 2, axis=1), rows)
        squared_distances = _nan_to_inf(lax.psum(own_part, AXIS))  # [replica, replica]
        scores = jnp.sort(squared_distances, axis=1)[:, :honest].sum(axis=1)
        return rows[jnp.argsort(scores)[: selected or honest]].mean(axis=0), state

    return Combine(init, update)


def geometric_median(smoothing: float = 1e-6, iterations: int = 8) -> Combine:
    """Goes towards the point whose distances to all messages have the least sum (Pillutla et al., 2022).

    This is the smoothed algorithm of Weiszfeld (1937): starting from zero, every iteration averages the messages, each
    weighted by one over its distance from the last average.

    Args:
        smoothing: The paper's nu; a smaller distance counts as this one. Messages that all differ by less are averaged.
        iterations: How often to average.

    Raises:
        InputError: The smoothing is not positive, or there are no iterations.
    """
    _check_positive(smoothing=smoothing)
    check_at_least(1, iterations=iterations)

    def update(rows, weights, state):
        def average(_, center):
            pulls = 1 / jnp.maximum(_distances(rows, center), smoothing)
            heard = jnp.where(pulls[:, None] > 0, rows, 0)
            return jnp.sum(heard * pulls[:, None], axis=0) / pulls.sum()

        return lax.fori_loop(0, iterations, average, jnp.zeros_like(rows[0])), state

    return Combine(lambda size: (), update)


def centered_clipping(radius: float, iterations: int = 1) -> Combine:
    """Follows each replica no farther than a radius from what was agreed last (Karimireddy et al., 2021).

    Every iteration moves the center by the average of the differences from it, each clipped to the radius; the center
    starts from the last agreed message, in the first round from zero.

    Args:
        radius: The paper's tau, in the units of the whole message's norm. One that is larger than all differences
            gives the mean; a small one bounds what a bad replica can do, and how fast the center can follow.
        iterations: The paper's L.

    Raises:
        InputError: The radius is not positive, or there are no iterations.
    """
    _check_positive(radius=radius)
    check_at_least(1, iterations=iterations)

    def update(rows, weights, last_agreed):
        def follow(_, center):
            scales = jnp.minimum(1, radius / _distances(rows, center))
            clipped = jnp.where(scales[:, None] > 0, rows - center[None], 0) * scales[:, None]
            return center + clipped.mean(axis=0)

        agreed = lax.fori_loop(0, iterations, follow, last_agreed)
        return agreed, agreed

    return Combine(jnp.zeros, update)


def _distances(rows: jax.Array, center: jax.Array) -> jax.Array:
    """Measures whole messages from a point, float32[replica]; infinite for a message that is not finite."""
    own_part = jnp.sum((rows - center[None]) ** 2, axis=1)
    return jnp.sqrt(_nan_to_inf(lax.psum(own_part, AXIS)))


def _nan_to_inf(x: jax.Array) -> jax.Array:
    return jnp.where(jnp.isnan(x), jnp.inf, x)


def _check_replicas(rule: str, byzantine: int, least: int) -> None:
    """Raises InputError where the axis has fewer replicas than twice the bad ones and these."""
    replicas = lax.axis_size(AXIS)
    if replicas < least:
        raise InputError("devices", f"must be at least {least} for {rule}, got {replicas}.")
    most = (replicas - least) // 2
    if byzantine > most:
        raise InputError("byzantine", f"must be at most {most} for {rule} of {replicas} replicas, got {byzantine}.")


def _check_positive(**options: float) -> None:
    for option, value in options.items():
        if not 0 < value < inf:
            raise InputError(option, f"must be greater than 0 and finite, got {value}.")
