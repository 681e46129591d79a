"""Schedules have their documented values at their corners."""

import jax.numpy as jnp
import optax
import pytest

from ctde_jax import optimizers
from ctde_jax.errors import InputError


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [("constant", [0.0, 0.5, 1.0, 1.0, 1.0]), ("linear", [0.0, 0.5, 1.0, 0.5, 0.0]), ("cosine", [0, 0.5, 1, 0.5, 0])],
)
def test_schedule_rises_to_the_peak_and_goes_on_as_named(schedule, expected):
    rate = optimizers.build_schedule(1.0, schedule, warmup_steps=10, total_steps=30)
    assert [float(rate(step)) for step in (0, 5, 10, 20, 30)] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("name", optimizers.OPTIMIZERS)
def test_optimizer_goes_downhill(name):
    optimizer = optimizers.build(name, 0.1)
    x, state = jnp.float32(3), optimizer.init(jnp.float32(3))
    for _ in range(100):
        updates, state = optimizer.update(2 * x, state, x)
        x = optax.apply_updates(x, updates)
    assert abs(float(x)) < 0.5


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("adm", 0.1), "optimizer must be one of sgd, momentum, adam, adamw, muon, got 'adm'; did you mean 'adam'"),
        (("sgd", 0.1, "cosin"), "did you mean 'cosine'"),
        (("sgd", 0.0), "learning_rate must be greater than 0 and finite, got 0.0"),
        (("sgd", float("nan")), "learning_rate must be greater than 0 and finite, got nan"),
        (("sgd", 0.1, "constant", -1), "warmup_steps must be at least 0, got -1"),
        (("sgd", 0.1, "cosine", 10, 10), "warmup_steps must be fewer than the 10 steps of the run, got 10"),
    ],
)
def test_wrong_setting_is_refused_in_a_sentence(arguments, sentence):
    with pytest.raises(InputError, match=sentence):
        optimizers.build(*arguments)
