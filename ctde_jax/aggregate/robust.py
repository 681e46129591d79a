"""Rules for replicas of which some send nonsense, by a broken sensor, bad data or intent.

Every replica counts once: a weight is only a claim, and must not buy influence. So a replica without examples, whose
message is no change at all, counts as a vote for no change. A message that is not finite has no effect on any of these
rules, as long as there are no more such messages than the rule bears.

A rule protects against messages. It does not protect against a replica that lies as the owner of a slice, nor does it
see batch statistics or losses, which are averaged elsewhere.

The coordinate-wise rules need no further word between the replicas. The rules for whole vectors add up what each owner
knows of the distances between messages: 3 R x R floats for Krum, 3 R floats in each iteration for the others.
"""

from math import inf

import jax
from jax import lax
from jax import numpy as jnp

from ctde_jax.aggregate.combine import Combine
from ctde_jax.aggregate.scaling import norm
from ctde_jax.devices import AXIS
from ctde_jax.errors import InputError, check_at_least


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
        return _mean(jnp.sort(rows, axis=0)[byzantine : len(rows) - byzantine]), state

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
            raise InputError(
                "selected",
                f"must be at most {honest}, the replicas that are not bad, got {selected}.",
            )
        return ()

    def update(rows, weights, state):
        honest = len(rows) - byzantine
        own_part = lax.map(lambda row: _squares(rows - row[None]), rows)
        distances = _summed_over_owners(own_part)  # [replica, replica]
        scores = norm(
            jnp.sort(distances, axis=1)[:, :honest]
        )  # in the order of the sums of squares
        return _mean(rows[jnp.argsort(scores)[: selected or honest]]), state

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
            distances = jnp.maximum(_distances(rows, center), smoothing)
            pulls = (
                distances.min() / distances
            )  # relative to the largest, which may itself be too small
            heard = jnp.where(pulls[:, None] > 0, rows, 0)
            return jnp.sum(heard * (pulls / pulls.sum())[:, None], axis=0)

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
            return center + _mean(clipped)

        agreed = lax.fori_loop(0, iterations, follow, last_agreed)
        return agreed, agreed

    return Combine(jnp.zeros, update)


def _distances(rows: jax.Array, center: jax.Array) -> jax.Array:
    """Measures whole messages from a point, float32[replica]; infinite for a message that is not finite."""
    return _summed_over_owners(_squares(rows - center[None]))


_SCALES = (2.0**75, 1.0, 2.0**-75)


def _squares(slices: jax.Array) -> jax.Array:
    """Sums the squares of each slice at three scales, float32[3, replica]: one has neither overflow nor underflow.

    These are the three accumulators of Blue (1978), which need one all-reduce; a common scale would need two.
    """
    return jnp.stack([jnp.sum((slices * scale) ** 2, axis=1) for scale in _SCALES])


def _summed_over_owners(squares: jax.Array) -> jax.Array:
    """Turns each owner's `_squares`, `[..., 3, replica]`, into norms of whole messages; infinite if not finite."""
    small, middle, large = jnp.moveaxis(lax.psum(squares, AXIS), -2, 0)
    of_large = jnp.where(jnp.isfinite(middle), jnp.sqrt(middle), jnp.sqrt(large) / _SCALES[2])
    norms = jnp.where(middle < 2.0**-60, jnp.sqrt(small) / _SCALES[0], of_large)
    return jnp.where(jnp.isnan(norms), jnp.inf, norms)


def _mean(rows: jax.Array) -> jax.Array:
    """Averages rows; divides first, so that the sum of large numbers does not overflow."""
    return jnp.sum(rows / len(rows), axis=0)


def _check_replicas(rule: str, byzantine: int, least: int) -> None:
    """Raises InputError if the axis has fewer than `2 * byzantine + least` replicas."""
    replicas, needed = lax.axis_size(AXIS), 2 * byzantine + least
    if replicas >= needed:
        return
    bad = f"{byzantine} bad device{'' if byzantine == 1 else 's'}"
    rule = f"must be at least {needed} for {rule} to withstand {bad} (2 * byzantine + {least}), got {replicas}"
    most = (replicas - least) // 2
    way_out = (
        f"set byzantine to at most {most}"
        if most >= 0
        else "choose another rule, such as the median"
    )
    raise InputError("devices", f"{rule}; use more devices, or {way_out}.")


def _check_positive(**options: float) -> None:
    for option, value in options.items():
        if not 0 < value < inf:
            raise InputError(option, f"must be greater than 0 and finite, got {value}.")
