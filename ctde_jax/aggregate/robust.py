"""Robust rules tolerate bad messages of some replicas, due to faults, bad data or attacks.

All messages have equal weight, because a faulty replica could claim any number of examples. So a
replica without examples contributes a message of zeros. With `per_host`, a message is the mean of a
host, so the rules count hosts. A message that is not finite has no effect on any of these rules, as
long as there are no more such messages than the rule tolerates.

A rule protects against messages. It does not protect against a replica that sends a wrong result as
the owner of a slice, and it does not cover batch statistics or losses, which are averaged
elsewhere.

The coordinate-wise rules (median and trimmed mean) need no further communication between the
replicas. The rules for whole vectors sum the squared distances that the owners compute on their
slices: 3 R x R floats for Krum, 3 R floats per iteration for the others.
"""

from jax import lax
from jax import numpy as jnp
from jaxtyping import Array, Float32

from ctde_jax.aggregate.combine import Combine, Rows
from ctde_jax.aggregate.scaling import norm
from ctde_jax.devices import AXIS
from ctde_jax.errors import InputError, check_at_least, check_positive


def median() -> Combine:
    """Takes the median of each coordinate (Yin et al., 2018).

    If the number of replicas is even, this is the mean of the middle two.

    Examples:
        >>> rule = ctde.aggregate.median()
        >>> combined, _ = rule.update(np.float32([[1, 2], [3, 4], [90, -70]]), np.ones(3), ())
        >>> combined
        Array([3., 2.], dtype=float32)
        >>> strategy = ctde.Strategy(reduce=ctde.aggregate.two_phase(combine=rule))
    """

    def update(rows, weights, state):
        # NaN is sorted last. The middle values are halved before they are added, so that the sum
        # does not overflow.
        ordered = jnp.sort(rows, axis=0)
        replicas = len(rows)
        return 0.5 * ordered[(replicas - 1) // 2] + 0.5 * ordered[replicas // 2], state

    return Combine(lambda size: (), update)


def trimmed_mean(byzantine: int) -> Combine:
    """Averages each coordinate without its largest and smallest values (Yin et al., 2018).

    Args:
        byzantine: Number of values that are left out at each end; 0 gives the mean.

    Raises:
        InputError: `byzantine` is negative, or, at initialization, half of the replicas or more.

    Examples:
        >>> rule = ctde.aggregate.trimmed_mean(byzantine=1)
        >>> strategy = ctde.Strategy(reduce=ctde.aggregate.two_phase(combine=rule))
    """
    check_at_least(0, byzantine=byzantine)

    def init(size):
        _check_replicas("the trimmed mean", byzantine, least=1)
        return ()

    def update(rows, weights, state):
        # NaN is sorted last, so up to `byzantine` of them are left out.
        return _mean(jnp.sort(rows, axis=0)[byzantine : len(rows) - byzantine]), state

    return Combine(init, update)


def krum(byzantine: int) -> Combine:
    """Selects the message with the nearest neighbors (Blanchard et al., 2017).

    The neighbors of a message are the R - f messages nearest to it, including itself. Its score is
    the sum of the squared distances to them, and the message with the lowest score is selected.
    This is the definition of ByzFL; the paper has one neighbor fewer.

    Args:
        byzantine: The paper's f, the number of replicas whose messages may be arbitrary.

    Raises:
        InputError: `byzantine` is negative, or, at initialization, there are fewer than 2 f + 3
            replicas.

    Examples:
        >>> rule = ctde.aggregate.krum(byzantine=1)
        >>> strategy = ctde.Strategy(reduce=ctde.aggregate.two_phase(combine=rule))
    """
    return multi_krum(byzantine, selected=1)


def multi_krum(byzantine: int, selected: int | None = None) -> Combine:
    """Averages the messages with the lowest scores of `krum` (Blanchard et al., 2017).

    Args:
        byzantine: The paper's f, the number of replicas whose messages may be arbitrary.
        selected: The paper's m, the number of messages that are averaged; by default R - f, as in
            ByzFL.

    Raises:
        InputError: As for `krum`, or `selected` is not from 1 to R - f.

    Examples:
        >>> rule = ctde.aggregate.multi_krum(byzantine=1, selected=4)
        >>> strategy = ctde.Strategy(reduce=ctde.aggregate.two_phase(combine=rule))
    """
    check_at_least(0, byzantine=byzantine)
    check_at_least(1, selected=selected)

    def init(size):
        _check_replicas("Krum", byzantine, least=3)
        honest = lax.axis_size(AXIS) - byzantine
        if selected is not None and selected > honest:
            raise InputError(
                "selected",
                f"must be at most {honest}, the number of replicas that are not Byzantine, got "
                f"{selected}.",
            )
        return ()

    def update(rows, weights, state):
        honest = len(rows) - byzantine

        # The map holds the differences from one message at a time, [replica, size].
        own_part = lax.map(lambda row: _squares(rows - row[None]), rows)
        distances = _summed_over_owners(own_part)  # float32[replica, replica]

        # The root of a sum of squares ranks messages as the sum does, and does not overflow. NaN is
        # ranked last.
        scores = norm(jnp.sort(distances, axis=1)[:, :honest])
        return _mean(rows[jnp.argsort(scores)[: selected or honest]]), state

    return Combine(init, update)


def geometric_median(smoothing: float = 1e-6, iterations: int = 8) -> Combine:
    """Approximates the geometric median, the point of least total distance to all messages.

    This is the smoothed algorithm of Weiszfeld (1937; Pillutla et al., 2022): starting from zero,
    every iteration averages the messages, each weighted by the inverse of its distance from the
    last average.

    Args:
        smoothing: The paper's nu, a lower bound of the distances. Messages that are all closer than
            this are averaged with equal weights.
        iterations: Number of iterations.

    Raises:
        InputError: `smoothing` is not positive and finite, or `iterations` is less than 1.

    Examples:
        >>> rule = ctde.aggregate.geometric_median()
        >>> strategy = ctde.Strategy(reduce=ctde.aggregate.two_phase(combine=rule))
    """
    check_positive(smoothing=smoothing)
    check_at_least(1, iterations=iterations)

    def update(rows, weights, state):
        def average(_, center):
            distances = jnp.maximum(_distances(rows, center), smoothing)

            # Weights relative to the largest one, which as an inverse distance might underflow. A
            # message that is not finite has weight 0 and is masked, as 0 * NaN is NaN.
            pulls = distances.min() / distances
            finite = jnp.where(pulls[:, None] > 0, rows, 0)
            return jnp.sum(finite * (pulls / pulls.sum())[:, None], axis=0)

        return lax.fori_loop(0, iterations, average, jnp.zeros_like(rows[0])), state

    return Combine(lambda size: (), update)


def centered_clipping(radius: float, iterations: int = 1) -> Combine:
    """Moves the last result by the average of clipped differences (Karimireddy et al., 2021).

    Every iteration moves the center by the average of the messages' differences from it, each
    clipped to the radius. The center starts from the last result, and in the first round from zero.

    Args:
        radius: The paper's tau, in the units of the norm of the whole message. A radius larger than
            all differences gives the mean; a small one limits the influence of a bad replica, and
            how fast the center can move.
        iterations: The paper's L, the number of iterations.

    Raises:
        InputError: `radius` is not positive and finite, or `iterations` is less than 1.

    Examples:
        >>> rule = ctde.aggregate.centered_clipping(radius=1.0)
        >>> strategy = ctde.Strategy(reduce=ctde.aggregate.two_phase(combine=rule))
    """
    check_positive(radius=radius)
    check_at_least(1, iterations=iterations)

    def update(rows, weights, last_agreed):
        def follow(_, center):
            scales = jnp.minimum(1, radius / _distances(rows, center))
            # A message that is not finite has scale 0 and is masked, as 0 * NaN is NaN.
            clipped = jnp.where(scales[:, None] > 0, rows - center[None], 0) * scales[:, None]
            return center + _mean(clipped)

        agreed = lax.fori_loop(0, iterations, follow, last_agreed)
        return agreed, agreed

    return Combine(jnp.zeros, update)


def _distances(rows: Rows, center: Float32[Array, " size"]) -> Float32[Array, " replicas"]:
    """Returns the distances of whole messages from a point, of which each owner holds a slice.

    The distance of a message that is not finite is infinite.
    """
    return _summed_over_owners(_squares(rows - center[None]))


# Powers of 2, so that multiplication is exact.
_SCALES = (2.0**75, 1.0, 2.0**-75)


def _squares(slices: Rows) -> Float32[Array, "3 replicas"]:
    """Sums the squares of each slice at three scales.

    At one of the scales, the sum neither overflows nor underflows. These are the three accumulators
    of Blue (1978), which need one all-reduce; a common scale would need two.
    """
    return jnp.stack([jnp.sum((slices * scale) ** 2, axis=1) for scale in _SCALES])


def _summed_over_owners(
    squares: Float32[Array, "... 3 replicas"],
) -> Float32[Array, "... replicas"]:
    """Sums the results of `_squares` over all owners, and returns the norms of whole messages.

    The norm of a message that is not finite is infinite.
    """
    small, middle, large = jnp.moveaxis(lax.psum(squares, AXIS), -2, 0)
    # Use the unscaled sum unless it has overflowed or is so small that its terms may have
    # underflowed.
    of_large = jnp.where(jnp.isfinite(middle), jnp.sqrt(middle), jnp.sqrt(large) / _SCALES[2])
    norms = jnp.where(middle < 2.0**-60, jnp.sqrt(small) / _SCALES[0], of_large)
    return jnp.where(jnp.isnan(norms), jnp.inf, norms)


def _mean(rows: Rows) -> Float32[Array, " size"]:
    """Averages rows; divides first, so that the sum of large numbers does not overflow."""
    return jnp.sum(rows / len(rows), axis=0)


def _check_replicas(rule: str, byzantine: int, least: int) -> None:
    """Raises InputError if the axis has fewer than `2 * byzantine + least` replicas."""
    replicas = lax.axis_size(AXIS)
    needed = 2 * byzantine + least
    if replicas >= needed:
        return
    bad = f"{byzantine} Byzantine device{'' if byzantine == 1 else 's'}"
    requirement = (
        f"must be at least {needed} (2 * byzantine + {least}) for {rule} with {bad}, got {replicas}"
    )

    # With fewer than `least` replicas, not even byzantine=0 is possible.
    most = (replicas - least) // 2
    way_out = (
        f"set byzantine to at most {most}" if most >= 0 else "use another rule, such as the median"
    )
    more = "use more devices (with per_host, more hosts)"
    raise InputError("devices", f"{requirement}; {more}, or {way_out}.")
