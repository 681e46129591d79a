"""Robust rules: their definitions in numpy, breakdown points, and training under attack."""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import attacks
import jax
import numpy as np
import optax
import pytest
from cases import some
from jax import lax
from jax import numpy as jnp

from ctde_jax import data, models
from ctde_jax.aggregate.combine import Combine, average
from ctde_jax.aggregate.exchange import two_phase
from ctde_jax.aggregate.robust import (
    centered_clipping,
    geometric_median,
    krum,
    median,
    multi_krum,
    trimmed_mean,
)
from ctde_jax.devices.replica import AXIS
from ctde_jax.errors import InputError


def numpy_trimmed_mean(rows: np.ndarray, byzantine: int) -> np.ndarray:
    columns = [sorted(column)[byzantine : len(column) - byzantine] for column in rows.T]
    return np.array([sum(column) / len(column) for column in columns])


def numpy_multi_krum(rows: np.ndarray, byzantine: int, selected: int) -> np.ndarray:
    scores = []
    for row in rows:
        squared = sorted(float((row - other) @ (row - other)) for other in rows)
        # The first distance is that to itself.
        scores.append(sum(squared[1 : len(rows) - byzantine]))
    return rows[np.argsort(scores)[:selected]].mean(axis=0)


def numpy_geometric_median(rows: np.ndarray, smoothing: float, iterations: int) -> np.ndarray:
    center = np.zeros(rows.shape[1])
    for _ in range(iterations):
        pulls = [1 / max(np.linalg.norm(row - center), smoothing) for row in rows]
        center = np.average(rows, axis=0, weights=pulls)
    return center


def numpy_centered_clipping(rows: np.ndarray, radius: float, iterations: int) -> np.ndarray:
    center = np.zeros(rows.shape[1])
    for _ in range(iterations):
        center = center + np.mean(
            [(x - center) * min(1, radius / np.linalg.norm(x - center)) for x in rows], axis=0
        )
    return center


class Rule(NamedTuple):
    """A rule that tolerates 2 bad replicas of 8, and a reference from its definition."""

    combine: Combine
    reference: Callable[[np.ndarray], np.ndarray]


RULES = {
    "median": Rule(median(), lambda rows: np.median(rows, axis=0)),
    "trimmed mean": Rule(trimmed_mean(2), lambda rows: numpy_trimmed_mean(rows, 2)),
    "Krum": Rule(krum(2), lambda rows: numpy_multi_krum(rows, 2, 1)),
    "multi-Krum": Rule(multi_krum(2), lambda rows: numpy_multi_krum(rows, 2, len(rows) - 2)),
    "multi-Krum of 3": Rule(multi_krum(2, selected=3), lambda rows: numpy_multi_krum(rows, 2, 3)),
    "geometric median": Rule(
        geometric_median(), lambda rows: numpy_geometric_median(rows, 1e-6, 8)
    ),
    "smooth geometric median": Rule(
        geometric_median(2.5, 3), lambda rows: numpy_geometric_median(rows, 2.5, 3)
    ),
    "centered clipping": Rule(
        centered_clipping(0.1), lambda rows: numpy_centered_clipping(rows, 0.1, 1)
    ),
    "wider centered clipping": Rule(
        centered_clipping(1.5, 3), lambda rows: numpy_centered_clipping(rows, 1.5, 3)
    ),
}


@cache
def compiled(combine: Combine):
    def on_replica(slice_):
        return combine.update(slice_, jnp.ones(len(slice_)), combine.init(slice_.shape[1]))[0]

    return jax.jit(jax.vmap(on_replica, axis_name=AXIS))


def combined(combine: Combine, rows: np.ndarray) -> np.ndarray:
    """Returns the combined message; each replica owns a slice, and the last ones are padded."""
    replicas, size = rows.shape
    slices = (
        np.pad(rows, ((0, 0), (0, -size % replicas))).reshape(replicas, replicas, -1).swapaxes(0, 1)
    )
    return np.asarray(compiled(combine)(jnp.asarray(slices, jnp.float32))).ravel()[:size]


@pytest.mark.parametrize(("replicas", "size"), [(8, 50), (7, 1), (13, 40)])
@pytest.mark.parametrize("name", RULES)
def test_rule_equals_its_definition_for_any_slicing(name, replicas, size):
    rows = np.random.default_rng(replicas).normal(1.0, 1.0, (replicas, size))
    expected = RULES[name].reference(rows)
    np.testing.assert_allclose(combined(RULES[name].combine, rows), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", RULES)
def test_rule_is_invariant_to_the_order_of_replicas(name):
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(8, 20))
    shuffled = combined(RULES[name].combine, rng.permutation(rows))
    np.testing.assert_allclose(shuffled, combined(RULES[name].combine, rows), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", RULES)
def test_weights_have_no_influence(name, key):
    """A replica that claims a million examples counts once."""
    rows = jax.random.normal(key, (8, 20))
    reduce = two_phase(combine=RULES[name].combine)

    def reduced(weights):
        def update(message, weight):
            return reduce.update(message, reduce.init(message), weight=weight, key=key)[0]

        return jax.jit(jax.vmap(update, axis_name=AXIS, out_axes=None))(rows, weights)

    np.testing.assert_array_equal(reduced(jnp.ones(8)), reduced(jnp.full(8, 1.0).at[3].set(1e6)))
    np.testing.assert_allclose(
        reduced(jnp.ones(8)), RULES[name].reference(np.asarray(rows)), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("nonsense", some([1e6, -1e30, np.nan, np.inf], 1e6, np.nan))
@pytest.mark.parametrize("name", RULES)
def test_two_bad_replicas_of_eight_have_a_bounded_influence(name, nonsense):
    """The bound is the distance of the farthest honest replica, or of zero for clipping."""
    rows = np.random.default_rng(0).uniform(1.0, 2.0, (8, 20))
    rows[[2, 5]] = nonsense
    honest = np.delete(rows, [2, 5], axis=0)
    center = honest.mean(axis=0)
    bound = np.linalg.norm(center if "clipping" in name else honest - center[None], axis=-1).max()
    assert np.linalg.norm(combined(RULES[name].combine, rows) - center) <= bound


@pytest.mark.parametrize("name", ["median", "trimmed mean"])
def test_coordinates_stay_within_the_range_of_honest_replicas(name):
    rows = np.random.default_rng(0).uniform(1.0, 2.0, (8, 20))
    rows[[2, 5]] = [[1e6], [-np.inf]]
    honest = np.delete(rows, [2, 5], axis=0)
    reduced = combined(RULES[name].combine, rows)
    assert ((honest.min(axis=0) <= reduced) & (reduced <= honest.max(axis=0))).all()


def test_average_is_moved_by_one_bad_replica():
    rows = np.random.default_rng(0).uniform(1.0, 2.0, (8, 20))
    rows[2] = 1e6
    assert (combined(average(), rows) > 1e5).all()


def test_trimming_zero_replicas_is_the_mean():
    rows = np.random.default_rng(0).normal(size=(8, 20))
    np.testing.assert_allclose(combined(trimmed_mean(0), rows), rows.mean(axis=0), atol=1e-6)


def test_selecting_all_replicas_is_the_mean():
    rows = np.random.default_rng(0).normal(size=(8, 20))
    np.testing.assert_allclose(combined(multi_krum(0), rows), rows.mean(axis=0), atol=1e-6)


def test_clipping_to_a_large_radius_is_the_mean():
    rows = np.random.default_rng(0).normal(size=(8, 20))
    np.testing.assert_allclose(combined(centered_clipping(1e3), rows), rows.mean(axis=0), atol=1e-6)


def test_krum_returns_one_of_the_messages():
    rows = np.random.default_rng(0).normal(size=(8, 20)).astype(np.float32)
    assert any(np.array_equal(combined(krum(2), rows), row) for row in rows)


def test_geometric_median_has_the_least_sum_of_distances():
    """At the optimum the unit vectors towards the messages cancel."""
    rows = np.random.default_rng(0).normal(size=(8, 3))
    center = combined(geometric_median(iterations=200), rows)
    directions = rows - center
    np.testing.assert_allclose(
        np.sum(directions / np.linalg.norm(directions, axis=1)[:, None], axis=0), 0, atol=1e-3
    )


def test_centered_clipping_starts_from_the_last_result():
    """The center moves by the radius in every round until it reaches the distant message."""
    combine = centered_clipping(2.0)
    # At a distance of 3 sqrt(20) = 13.4, because each of the 4 replicas owns 5 numbers.
    far = jnp.full((4, 5), 3.0)

    def rounds(slice_):
        def one(state, _):
            reduced, state = combine.update(slice_, jnp.ones(4), state)
            return state, reduced

        return lax.scan(one, combine.init(5), length=8)[1]

    reduced = jax.vmap(rounds, axis_name=AXIS, axis_size=4, in_axes=None)(far)
    norms = np.linalg.norm(np.moveaxis(reduced, 0, 1).reshape(8, -1), axis=1)
    np.testing.assert_allclose(norms, [2, 4, 6, 8, 10, 12, 3 * 20**0.5, 3 * 20**0.5], rtol=1e-5)


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        (lambda: trimmed_mean(-1), "byzantine must be at least 0, got -1"),
        (lambda: krum(-1), "byzantine must be at least 0, got -1"),
        (lambda: multi_krum(2, selected=0), "selected must be at least 1, got 0"),
        (
            lambda: geometric_median(smoothing=0.0),
            "smoothing must be greater than 0 and finite, got 0.0",
        ),
        (lambda: geometric_median(iterations=0), "iterations must be at least 1, got 0"),
        (lambda: centered_clipping(-1.0), "radius must be greater than 0 and finite, got -1.0"),
        (lambda: centered_clipping(1.0, iterations=0), "iterations must be at least 1, got 0"),
    ],
)
def test_invalid_rule_is_refused(build, sentence):
    with pytest.raises(InputError, match=sentence):
        build()


@pytest.mark.parametrize(
    ("combine", "replicas", "sentence"),
    [
        (
            trimmed_mean(4),
            8,
            r"devices must be at least 9 .* for the trimmed mean with 4 Byzantine devices, got 8",
        ),
        (
            trimmed_mean(1),
            2,
            "devices must be at least 3 .* got 2; .* or set byzantine to at most 0",
        ),
        (
            krum(3),
            8,
            (
                "devices must be at least 9 .* for Krum with 3 Byzantine devices, got 8; .* "
                "byzantine to at most 2"
            ),
        ),
        (
            krum(0),
            2,
            (
                "devices must be at least 3 .* for Krum .* got 2; use more devices .*, or use "
                "another rule"
            ),
        ),
        (
            multi_krum(2, selected=7),
            8,
            "selected must be at most 6, the number of replicas that are not Byzantine, got 7",
        ),
    ],
)
def test_too_few_replicas_are_refused_at_initialization(combine, replicas, sentence):
    """Shapes suffice for the check, so the error comes before any compilation."""
    init = jax.vmap(two_phase(combine=combine).init, axis_name=AXIS)
    with pytest.raises(InputError, match=sentence):
        jax.eval_shape(init, jax.ShapeDtypeStruct((replicas, 20), jnp.float32))


ATTACKS = {
    "none": attacks.honest(),
    "sign flip": attacks.sign_flip(),
    "large noise": attacks.large_noise(),
    "not a number": attacks.not_a_number(),
    "a little is enough": attacks.a_little_is_enough(),
    "label flip": attacks.honest(),
}
MODEL = models.mlp([64, 32, 10])
TRAINED_RULES = [
    "median",
    "trimmed mean",
    "Krum",
    "multi-Krum",
    "geometric median",
    "centered clipping",
]


def accuracies(
    combine: Combine, digits: data.Dataset, rounds: int = 300, per_replica: int = 128
) -> dict[str, float]:
    """Trains with 2 bad replicas of 8; returns test accuracies in percent by attack."""
    reduce = two_phase(combine=combine)
    inputs, test_inputs = (
        jnp.asarray(split.inputs.reshape(-1, 64), jnp.float32) / 16
        for split in (digits.train, digits.test)
    )
    labels = jnp.asarray(digits.train.labels)

    def train(attack_index: jax.Array) -> jax.Array:
        attacked = attacks.attacked(
            reduce, lambda *known: lax.switch(attack_index, list(ATTACKS.values()), *known)
        )
        flips = attack_index == list(ATTACKS).index("label flip")
        replica_labels = jnp.where(flips, attacks.flip_labels(labels, classes=10), labels)

        def loss(params, rows):
            outputs, _ = MODEL.apply(params, {}, inputs[rows], None)
            return optax.softmax_cross_entropy_with_integer_labels(
                outputs, replica_labels[rows]
            ).mean()

        def step(center, key):
            params, reduce_state = center
            replica_key = jax.random.fold_in(key, lax.axis_index(AXIS))
            rows = jax.random.randint(replica_key, (per_replica,), 0, len(labels))
            grads = jax.grad(loss)(params, rows)
            reduced, reduce_state = attacked.update(
                grads, reduce_state, weight=jnp.float32(per_replica), key=key
            )
            return (optax.tree.sub(params, reduced), reduce_state), None

        params, _ = MODEL.init(jax.random.key(0), inputs[:1])
        (params, _), _ = lax.scan(
            step, (params, reduce.init(params)), jax.random.split(jax.random.key(1), rounds)
        )
        outputs, _ = MODEL.apply(params, {}, test_inputs, None)
        return 100 * jnp.mean(outputs.argmax(-1) == digits.test.labels)

    compiled_once = jax.jit(
        jax.vmap(train, axis_name=AXIS, axis_size=8, in_axes=None, out_axes=None)
    )
    return {name: float(compiled_once(attack_index)) for attack_index, name in enumerate(ATTACKS)}


@pytest.fixture(scope="module")
def mean_accuracies(digits) -> dict[str, float]:
    return accuracies(average(), digits)


@pytest.mark.slow
@pytest.mark.parametrize("attack", ["sign flip", "large noise", "not a number"])
def test_mean_fails_with_two_bad_replicas_of_eight(mean_accuracies, attack):
    assert mean_accuracies["none"] > 96
    assert mean_accuracies[attack] < 70


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINED_RULES)
def test_training_tolerates_two_bad_replicas_of_eight(mean_accuracies, digits, name):
    """Every accuracy is at most 2 points below that of the mean without an attack."""
    under_attack = accuracies(RULES[name].combine, digits)
    assert {
        name: value for name, value in under_attack.items() if value < mean_accuracies["none"] - 2
    } == {}


@pytest.mark.parametrize("magnitude", some([1e-25, 1e25, 1e37], 1e37))
@pytest.mark.parametrize("name", RULES)
def test_rule_equals_its_definition_if_squares_leave_the_range_of_float32(name, magnitude):
    """The definition is computed in float64."""
    rows = magnitude * np.random.default_rng(1).normal(1.0, 1.0, (8, 20))
    expected = RULES[name].reference(rows)
    np.testing.assert_allclose(
        combined(RULES[name].combine, rows), expected, rtol=1e-4, atol=1e-5 * magnitude
    )


@pytest.mark.parametrize("name", TRAINED_RULES)
def test_one_enormous_message_does_not_hide_the_distances_between_the_others(name):
    rows = 1e-12 * np.random.default_rng(1).normal(1.0, 1.0, (8, 20))
    rows[3] = 1e28
    expected = RULES[name].reference(rows)
    np.testing.assert_allclose(combined(RULES[name].combine, rows), expected, rtol=1e-4, atol=1e-17)
