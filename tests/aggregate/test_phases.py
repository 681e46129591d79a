"""Phases that follow the learning rate."""

import numpy as np
import optax
import pytest

from ctde_jax.aggregate import Strategy, by_learning_rate, quadratic_synchronization
from ctde_jax.errors import InputError

COSINE = optax.cosine_decay_schedule(0.02, 1000)
WARM = optax.warmup_cosine_decay_schedule(0.0, 0.3, 100, 997)


def lengths(strategy: Strategy) -> dict[int, int]:
    return {start: each.inner_steps for start, each in strategy.phases.items()}


@pytest.mark.parametrize(("learning_rate", "steps"), [(COSINE, 1000), (WARM, 997)])
@pytest.mark.parametrize(("growth", "doublings"), [(1.0, 5), (0.6, 3), (0.2, 2)])
def test_rounds_follow_the_quadratic_rule(learning_rate, steps, growth, doublings):
    """Each round is the longest allowed one, except for at most one round before a phase."""
    rates = np.array([float(learning_rate(step)) for step in range(steps)])
    growing = quadratic_synchronization(Strategy(3), learning_rate, steps, growth, doublings)
    phases = lengths(growing)
    for step in range(steps):
        # Warmup counts as the peak: the rate is the largest from here on.
        allowed = (
            3 * (growth * rates.max() / rates[step:].max()) ** 2 if rates[step:].any() else 1e9
        )
        wanted = 3 * 2 ** int(np.clip(np.floor(np.log2(allowed / 3) + 1e-5), 0, doublings))
        start = max(each for each in phases if each <= step)
        assert phases[start] <= wanted
        if phases[start] < wanted:
            later = [each for each in phases if each > step]
            next_start = later[0] if later else steps
            assert next_start - step <= 3 * 2**doublings


def test_phases_begin_at_fractions_of_the_learning_rate():
    linear = optax.linear_schedule(0.5, 0.0, 100)
    strategies = {1.0: Strategy(), 0.5: Strategy(4), 0.25: Strategy(10)}
    # 0.5 is reached at step 50, and 0.25 at step 75.
    assert lengths(by_learning_rate(linear, 100, strategies)) == {0: 0, 52: 4, 80: 10}
    # A constant rate never falls.
    assert lengths(by_learning_rate(lambda step: 0.1, 100, strategies)) == {0: 0}


def test_phase_without_steps_is_replaced_by_the_next():
    halved = optax.piecewise_constant_schedule(1.0, {40: 0.1})
    strategies = {1.0: Strategy(2), 0.5: Strategy(4), 0.2: Strategy(8), 0.01: Strategy(16)}
    assert lengths(by_learning_rate(halved, 100, strategies)) == {0: 2, 40: 8}
    # Rounds of 10 steps would begin at step 60, and those of 6 steps, too.
    linear = optax.linear_schedule(0.5, 0.0, 100)
    due_together = {1.0: Strategy(2), 0.49: Strategy(10), 0.45: Strategy(6)}
    assert lengths(by_learning_rate(linear, 100, due_together)) == {0: 2, 60: 6}
    # A phase that would begin after the end is left out.
    assert lengths(by_learning_rate(halved, 42, {1.0: Strategy(2), 0.5: Strategy(64)})) == {0: 2}


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        (
            lambda: by_learning_rate(COSINE, 100, {0.5: Strategy()}),
            "strategies must have fractions from 0 to 1 as keys, and 1 among them, got [0.5]",
        ),
        (
            lambda: by_learning_rate(lambda step: 0.0 * step, 100, {1.0: Strategy()}),
            "learning_rate must be finite, and positive in at least one step",
        ),
        (
            lambda: by_learning_rate(COSINE, 1000, {1.0: Strategy(4), 0.5: Strategy()}),
            "later must have inner steps in all phases after the first one with inner steps",
        ),
        (
            lambda: by_learning_rate(COSINE, 9, {1.0: Strategy(4, later={8: Strategy(8)})}),
            "later must be empty in a strategy that becomes a phase",
        ),
        (
            lambda: quadratic_synchronization(Strategy(), COSINE, 1000),
            "inner_steps must be at least 1, got 0",
        ),
        (
            lambda: quadratic_synchronization(Strategy(4), COSINE, 1000, growth=1.5),
            "growth must be at most 1, got 1.5",
        ),
        (
            lambda: quadratic_synchronization(Strategy(4), COSINE, 1000, doublings=0),
            "doublings must be at least 1, got 0",
        ),
        (
            lambda: quadratic_synchronization(Strategy(4, later={8: Strategy(8)}), COSINE, 1000),
            "later must be empty in a strategy that becomes a phase",
        ),
    ],
)
def test_invalid_phases_are_refused(build, sentence):
    with pytest.raises(InputError) as caught:
        build()
    assert str(caught.value).startswith(sentence)
