"""Bytes on the link between two hosts of four devices, and within the hosts."""

from math import ceil

import optax
import pytest
from conftest import ALL_DEVICES

from ctde_jax import Strategy, data, models
from ctde_jax.aggregate import error_feedback, hierarchical_mean, quantize, two_phase
from ctde_jax.cost import targets, traffic
from ctde_jax.models.tasks import classification
from ctde_jax.rounds import Resident

HOSTS = [0] * 4 + [1] * 4
MODEL = models.mlp([64, 8, 10])
LEAVES = (64 * 8, 8, 8 * 10, 10)
PARAMS = sum(LEAVES)
PART = sum(ceil(size / 4) for size in LEAVES)
STEPS = 3

INT4 = two_phase(error_feedback(quantize(4)), per_host=4)
RING = 2 * 3 / 4
"""Bytes that each of the four devices of a host sends in an all-reduce, per byte."""


def measured(strategy: Strategy, digits) -> traffic.Traffic:
    """Counts the bytes of a round on eight fake devices, as two hosts of four."""
    batches = data.deal(digits.train, 8, 16, seed=0)
    model = models.with_raw_inputs(MODEL, digits.shift, digits.scale)
    program = targets.compile_rounds(
        model, digits, classification, optax.adam(0.01), strategy, Resident(batches), ALL_DEVICES
    )
    return traffic.measure(program.as_text(), strategy.inner_steps, HOSTS)


def int4_bytes(n: int) -> int:
    return ceil(n / 256) * (256 // 2 + 4)


INT4_ACROSS = 2 * int4_bytes(ceil(PART / 2)) + 4 + 1 + 1
"""Both directions between two peers, with the weight and the flags of four leaves."""

INT4_WITHIN = 3 * 4 * (PART + 1 + PART)
"""The reduce-scatter with the weight, and the all-gather of the result."""

SUMS = 3
"""Loss, accuracy and number of examples, which the replicas of a host sum in each local step."""

STEP_WITHIN = RING * 4 * (PARAMS + 1 + SUMS)

PADDED = 4 * ceil((PARAMS + 1) / 4)

EXPECTED = {
    "gradients in int4": (Strategy(reduce=INT4), INT4_ACROSS, INT4_WITHIN),
    "parameters in int4": (Strategy(STEPS, INT4), INT4_ACROSS, INT4_WITHIN),
    "synchronous within hosts, parameters in int4": (
        Strategy(STEPS, INT4, per_host=4),
        INT4_ACROSS,
        INT4_WITHIN + STEPS * STEP_WITHIN,
    ),
    "synchronous within hosts, mean": (
        Strategy(STEPS, hierarchical_mean(4), per_host=4),
        4 * PADDED / 4,
        RING * 4 * PADDED + STEPS * STEP_WITHIN,
    ),
}
"""Strategy, and the bytes that each device sends to the other host and within its host."""


@pytest.mark.parametrize("name", EXPECTED)
def test_bytes_across_and_within_hosts_match_the_formulas(name, digits):
    strategy, across, within = EXPECTED[name]

    counted = measured(strategy, digits)

    assert counted.across == len(HOSTS) * across
    assert counted.within == len(HOSTS) * within
    assert counted.sent == across + within
    assert counted.certain
    steps = [one for one in traffic.in_local_steps(counted) if one.across]
    assert not steps


def test_plain_average_sends_the_whole_message_across(digits):
    """Two of the eight links of the ring cross hosts, each with 2 * 7 / 8 of the message."""
    counted = measured(Strategy(STEPS), digits)
    assert counted.across == 2 * (2 * 7 / 8 * 4 * (PARAMS + 1))
    assert counted.across > 6 * 8 * INT4_ACROSS / 8
