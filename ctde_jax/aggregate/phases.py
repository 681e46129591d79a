"""Strategies with phases that follow the learning rate: growing rounds, or fewer bits."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import ceil, lcm

import jax
import numpy as np
import optax
from jaxtyping import Float32

from ctde_jax.aggregate.base import Strategy
from ctde_jax.errors import InputError, check_at_least, check_positive


def by_learning_rate(
    learning_rate: optax.Schedule, steps: int, strategies: Mapping[float, Strategy]
) -> Strategy:
    """Builds a strategy whose phases begin when the learning rate has fallen to given fractions.

    A phase begins at the first step from which on the learning rate is at most its fraction of the
    peak, rounded up to a multiple of the inner steps of the phase and of the phase before it.
    Warmup therefore belongs to the first phase. A phase without steps is left out.

    Args:
        learning_rate: Schedule of the learning rate, a function of the step; only its ratio to the
            peak matters.
        steps: Number of steps of the run.
        strategies: Strategies by fraction of the peak; the largest fraction must be 1.

    Returns:
        The strategy of fraction 1, with the others in `later`.

    Raises:
        InputError: The fractions are invalid, a strategy has phases already, or one strategy cannot
            follow another; see `Strategy.later`.

    Examples:
        >>> cosine = optax.cosine_decay_schedule(0.01, 1000)
        >>> fractions = {1.0: ctde.Strategy(inner_steps=4), 0.5: ctde.Strategy(inner_steps=20)}
        >>> phases = ctde.aggregate.by_learning_rate(cosine, 1000, fractions).phases
        >>> list(phases)
        [0, 500]
    """
    check_at_least(1, steps=steps)
    order = sorted(strategies, reverse=True)
    if not order or order[0] != 1.0 or order[-1] <= 0:
        rule = "must have fractions from 0 to 1 as keys, and 1 among them"
        raise InputError("strategies", f"{rule}, got {order!r:.60}.")

    _check_without_phases(*strategies.values())

    # The largest rate from each step on falls monotonically, also after a warmup.
    rates = _largest_later(learning_rate, steps)
    phases: list[tuple[int, Strategy]] = []
    for fraction in order:
        strategy = strategies[fraction]
        first = int(np.argmax(rates <= fraction)) if rates[-1] <= fraction else steps
        start = _first_whole_round(first, phases, strategy)
        # A phase that would have no steps is left out.
        while phases and start <= phases[-1][0]:
            phases.pop()
            start = _first_whole_round(first, phases, strategy)
        if start < steps:
            phases.append((start, strategy))
    (_, strategy), *later = phases
    return replace(strategy, later=dict(later))


def quadratic_synchronization(
    strategy: Strategy,
    learning_rate: optax.Schedule,
    steps: int,
    growth: float = 1.0,
    doublings: int = 5,
) -> Strategy:
    """Lets rounds grow with the inverse square of the learning rate (QSR, Gu et al., 2024).

    With H inner steps, a round has `H (growth * peak / learning rate)**2` steps, at least H and at
    most `2**doublings H`, rounded down to H times a power of two, so that few programs are
    compiled. The coefficient of the paper is `growth * peak * sqrt(H)`.

    Args:
        strategy: Strategy with the inner steps of the first rounds.
        learning_rate: Schedule of the learning rate, a function of the step; only its ratio to the
            peak matters.
        steps: Number of steps of the run.
        growth: Number up to 1; with 1, rounds grow as soon as the learning rate decays.
        doublings: Maximum number of doublings of the inner steps.

    Returns:
        The strategy, with the longer rounds in `later`.

    Raises:
        InputError: `growth` is not positive or exceeds 1, `doublings` is less than 1, or the
            strategy has no inner steps or has phases already.

    Examples:
        >>> cosine = optax.cosine_decay_schedule(0.01, 1000)
        >>> local_sgd = ctde.Strategy(inner_steps=4)
        >>> growing = ctde.aggregate.quadratic_synchronization(local_sgd, cosine, 1000)
        >>> {start: each.inner_steps for start, each in growing.phases.items()}
        {0: 4, 368: 8, 512: 16, 608: 32, 704: 64, 768: 128}
    """
    check_positive(growth=growth)
    if growth > 1:
        raise InputError("growth", f"must be at most 1, got {growth:g}.")
    check_at_least(1, doublings=doublings)
    check_at_least(1, inner_steps=strategy.inner_steps)
    _check_without_phases(strategy)
    longer = {
        growth * 2 ** (-number / 2): replace(strategy, inner_steps=2**number * strategy.inner_steps)
        for number in range(1, doublings + 1)
    }
    return by_learning_rate(learning_rate, steps, {1.0: strategy, **longer})


def _first_whole_round(
    first: int, phases: Sequence[tuple[int, Strategy]], strategy: Strategy
) -> int:
    """Returns the first step from `first` on at which a phase may follow the last one."""
    before = phases[-1][1] if phases else strategy
    period = lcm(max(1, before.inner_steps), max(1, strategy.inner_steps))
    return period * ceil(first / period)


def _check_without_phases(*strategies: Strategy) -> None:
    if any(each.later for each in strategies):
        raise InputError("later", "must be empty in a strategy that becomes a phase.")


def _largest_later(learning_rate: optax.Schedule, steps: int) -> Float32[np.ndarray, " steps"]:
    """Returns the largest learning rate from each step on, as a fraction of the peak."""
    rates = np.asarray(jax.vmap(learning_rate)(np.arange(steps)), np.float32)
    if not np.isfinite(rates).all() or rates.max() <= 0:
        raise InputError("learning_rate", "must be finite, and positive in at least one step.")
    return np.maximum.accumulate(rates[::-1])[::-1] / rates.max()
