"""Schedules have their documented values at their ends; decay and clipping work."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ctde_jax.aggregate import transformations
from ctde_jax.config import optimizers
from ctde_jax.errors import InputError


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.0, 0.5, 1.0, 1.0, 1.0]),
        ("linear", [0.0, 0.5, 1.0, 0.5, 0.0]),
        ("cosine", [0, 0.5, 1, 0.5, 0]),
    ],
)
def test_schedule_warms_up_and_decays(schedule, expected):
    rate = optimizers.build_schedule(1.0, schedule, warmup_steps=10, total_steps=30)
    assert [float(rate(step)) for step in (0, 5, 10, 20, 30)] == pytest.approx(expected, abs=1e-6)


def test_schedule_of_a_branch_starts_at_its_first_step():
    whole = optimizers.build_schedule(1.0, "cosine", warmup_steps=10, total_steps=30)
    later = optimizers.build_schedule(
        1.0, "cosine", warmup_steps=10, total_steps=130, schedule_start=100
    )
    assert [float(later(step)) for step in range(100, 131)] == [
        float(whole(step)) for step in range(31)
    ]


@pytest.mark.parametrize("name", optimizers.OPTIMIZERS)
def test_updates_equal_those_of_optax(name):
    """Storing the learning rate in the state does not change the updates."""
    params, grads = jnp.ones((3, 4)), jnp.linspace(-1, 1, 12).reshape(3, 4)
    built, plain = optimizers.build(name, 0.1), optimizers.OPTIMIZERS[name](0.1)
    expected, _ = plain.update(grads, plain.init(params), params)
    found, _ = built.update(grads, built.init(params), params)
    np.testing.assert_array_equal(found, expected)


def test_learning_rate_is_logged_only_if_there_is_one():
    """The first of several learning rates does not apply to all parameters."""
    params, adam = {"a": jnp.ones(3), "b": jnp.ones(2)}, optax.inject_hyperparams(optax.adam)
    single = optax.chain(
        optax.clip(1.0), adam(0.1), optax.inject_hyperparams(optax.clip)(max_delta=1.0)
    )
    assert float(transformations.learning_rate(single.init(params))) == pytest.approx(0.1)
    several = optax.multi_transform({"a": adam(0.1), "b": adam(0.01)}, {"a": "a", "b": "b"})
    assert transformations.learning_rate(several.init(params)) is None


def test_norm_is_logged_only_if_there_is_one():
    params, keep = {"a": jnp.ones(3), "b": jnp.ones(2)}, partial(optax.snapshot, "gradient_norm")
    single = optax.chain(optax.snapshot("other", optax.tree.sum), keep(optax.tree.norm))
    assert float(transformations.gradient_norm(single.init(params))) == pytest.approx(5**0.5)
    for several in (optax.chain(keep(optax.tree.norm), keep(optax.tree.norm)), keep(lambda x: x)):
        assert transformations.gradient_norm(several.init(params)) is None


def test_norm_before_clipping_is_kept_without_further_computation():
    params, grads = jnp.ones((3, 4)), jnp.linspace(-1, 1, 12).reshape(3, 4)
    built = optimizers.build("adam", 0.1, clip_grad_norm=0.5)
    plain = optax.chain(optax.clip_by_global_norm(0.5), optimizers.build("adam", 0.1))
    states = [optimizer.init(params) for optimizer in (built, plain)]

    compiled = [
        jax.jit(optimizer.update).lower(grads, state, params).compile()
        for optimizer, state in zip((built, plain), states, strict=True)
    ]
    found, expected = [each.cost_analysis()["flops"] for each in compiled]
    assert found == expected
    (found, kept), (expected, _) = [
        each(grads, state, params) for each, state in zip(compiled, states, strict=True)
    ]
    np.testing.assert_array_equal(found, expected)
    norm = np.linalg.norm(np.asarray(grads))
    assert float(transformations.gradient_norm(kept)) == pytest.approx(norm, rel=1e-6)


@pytest.mark.parametrize("name", optimizers.OPTIMIZERS)
def test_optimizer_minimizes_a_quadratic_function(name):
    optimizer = optimizers.build(name, 0.1)
    x, state = jnp.float32(3), optimizer.init(jnp.float32(3))
    for _ in range(100):
        updates, state = optimizer.update(2 * x, state, x)
        x = optax.apply_updates(x, updates)
    assert abs(float(x)) < 0.5


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ("adm", 0.1),
            (
                "optimizer must be one of sgd, momentum, adam, adamw, lion, muon, got 'adm'; did "
                "you mean 'adam'"
            ),
        ),
        (
            ("sgd", 0.1, "constant", 0, 0, 0.1),
            "weight_decay requires one of adamw, lion, muon, got the optimizer sgd",
        ),
        (
            ("adamw", 0.1, "constant", 0, 0, -1.0),
            "weight_decay must be at least 0 and finite, got -1.0",
        ),
        (
            ("adamw", 0.1, "constant", 0, 0, None, 0.0),
            "clip_grad_norm must be greater than 0 and finite, got 0.0",
        ),
        (("sgd", 0.1, "cosin"), "did you mean 'cosine'"),
        (("sgd", 0.0), "learning_rate must be greater than 0 and finite, got 0.0"),
        (("sgd", float("nan")), "learning_rate must be greater than 0 and finite, got nan"),
        (("sgd", 0.1, "constant", -1), "warmup_steps must be at least 0, got -1"),
        (
            ("sgd", 0.1, "cosine", 10, 10),
            "warmup_steps must be less than the 10 steps of the schedule, got 10",
        ),
    ],
)
def test_invalid_setting_is_refused(arguments, sentence):
    with pytest.raises(InputError, match=sentence):
        optimizers.build(*arguments)


@pytest.mark.parametrize("name", optimizers.DECAYING)
def test_weight_decay_applies_to_kernels_and_not_to_biases(name):
    """If the gradient is zero, the update is -learning_rate * weight_decay * weight."""
    params = {"kernel": jnp.full((3, 2), 2.0), "bias": jnp.full(2, 2.0)}
    optimizer = optimizers.build(name, 0.1, weight_decay=0.5)
    updates, _ = optimizer.update(optax.tree.zeros_like(params), optimizer.init(params), params)
    assert jnp.allclose(updates["kernel"], -0.1 * 0.5 * 2.0)
    assert not updates["bias"].any()


@pytest.mark.parametrize(("norm", "length"), [(1.0, 1.0), (10.0, 5.0)])
def test_gradients_are_clipped_to_the_global_norm(norm, length):
    optimizer = optimizers.build("sgd", 1.0, clip_grad_norm=norm)
    grads = {"a": jnp.array([3.0]), "b": jnp.array([4.0])}
    updates, _ = optimizer.update(grads, optimizer.init(grads))
    assert float(optax.tree.norm(updates)) == pytest.approx(length)
    assert jax.tree.all(
        jax.tree.map(lambda u, g: bool(jnp.allclose(u / -length, g / 5.0)), updates, grads)
    )


def test_first_pattern_that_matches_scales_the_updates():
    params = {"body": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}, "head": jnp.ones(3)}
    scales = {"body/kernel": 0.5, "body/*": 0.1}
    optimizer = optax.chain(optax.sgd(1.0), optimizers.scale_updates(scales))
    updates, _ = optimizer.update(params, optimizer.init(params), params)
    expected = {"body": {"kernel": -0.5, "bias": -0.1}, "head": -1.0}
    jax.tree.map(lambda update, value: np.testing.assert_allclose(update, value), updates, expected)


@pytest.mark.parametrize(
    ("scales", "sentence"),
    [
        ({"head": 0}, "must be positive and finite numbers, got 0 for 'head'; to keep"),
        ({"head": "0.1"}, "must be positive and finite numbers, got '0.1' for 'head'"),
        ({"heda": 0.1}, "must match parameters of the model, got 'heda'; did you mean 'head'"),
    ],
)
def test_unsuitable_scales_are_refused(scales, sentence):
    with pytest.raises(InputError, match=sentence):
        optimizers.scale_updates(scales).init({"head": jnp.ones(3)})
