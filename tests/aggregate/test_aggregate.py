"""The contract of all reducers, the bytes that they send, and the properties of each."""

from functools import partial
from math import ceil
from typing import NamedTuple

import jax
import numpy as np
import optax
import pytest
from cases import some
from jax import numpy as jnp

from ctde_jax import aggregate
from ctde_jax.aggregate import (
    Strategy,
    error_feedback,
    exact,
    gathered,
    hierarchical_mean,
    mean,
    power_sgd,
    quantize,
    random_k,
    sign,
    top_k,
    two_phase,
)
from ctde_jax.cost import collectives
from ctde_jax.devices import replica
from ctde_jax.errors import InputError

REPLICAS = 4
WEIGHTS = jnp.asarray([3.0, 0.0, 1.0, 4.0])
KEY = jax.random.key(7)


class Contract(NamedTuple):
    """A reducer, and its tolerance for messages that are equal on all replicas."""

    reduce: optax.GradientTransformation
    tolerance: float


REDUCERS = {
    "mean": Contract(mean(), 1e-6),
    "two-phase f32": Contract(two_phase(), 1e-6),
    "gathered f32": Contract(gathered(exact()), 1e-6),
    "int8": Contract(two_phase(quantize(8)), 15 / 127),
    "int4": Contract(two_phase(quantize(4)), 15 / 7),
    "int4, statistical": Contract(two_phase(quantize(4, "statistical")), 4),
    "top-k with k = chunk size": Contract(two_phase(top_k(16, 16)), 1e-6),
    "random-k with k = chunk size": Contract(gathered(random_k(16, 16)), 1e-6),
    "full-rank power-sgd": Contract(power_sgd(2), 1e-5),
    "median": Contract(two_phase(combine=aggregate.median()), 1e-6),
    "trimmed mean": Contract(two_phase(combine=aggregate.trimmed_mean(1)), 1e-6),
    "multi-krum": Contract(two_phase(combine=aggregate.multi_krum(0)), 1e-6),
    "geometric median": Contract(two_phase(combine=aggregate.geometric_median()), 1e-4),
    "centered clipping": Contract(two_phase(combine=aggregate.centered_clipping(1e6)), 1e-5),
    "two-phase f32 across hosts": Contract(two_phase(per_host=2), 1e-6),
    "gathered f32 across hosts": Contract(gathered(exact(), per_host=2), 1e-6),
    "int8 across hosts": Contract(two_phase(quantize(8), per_host=2), 15 / 127),
    "median across hosts": Contract(two_phase(combine=aggregate.median(), per_host=2), 1e-6),
}

LOSSLESS = [
    "two-phase f32",
    "gathered f32",
    "top-k with k = chunk size",
    "random-k with k = chunk size",
    "two-phase f32 across hosts",
    "gathered f32 across hosts",
]
"""Lossless reducers, which compute the weighted mean."""

ACROSS_HOSTS = [name for name in REDUCERS if name.endswith("across hosts")]

NEED_SEVERAL_REPLICAS = ["trimmed mean", "multi-krum", *ACROSS_HOSTS]
"""Reducers that need more than one replica."""

ROBUST = [
    *("median", "trimmed mean", "multi-krum", "geometric median", "centered clipping"),
    "median across hosts",
]
"""Reducers that tolerate Byzantine replicas."""

LOSSY = {
    "int2": quantize(2),
    "int2, statistical": quantize(2, "statistical"),
    "sign": sign(8),
    "top-k": top_k(2, 8),
    "top-k in 2 bits": top_k(8, 16, quantize(2, "statistical", 8)),
    "random-k": random_k(4, 8),
}
"""Codecs with large errors, which are used with error feedback."""


def messages(key: jax.Array) -> dict[str, jax.Array]:
    """Returns one message for each replica, as rows."""
    return {
        "w": jax.random.normal(key, (REPLICAS, 3, 2)),
        "b": jnp.arange(4.0 * REPLICAS).reshape(REPLICAS, 4),
    }


def average(rows, weights: jax.Array = WEIGHTS):
    return jax.tree.map(lambda x: np.average(x, axis=0, weights=weights), rows)


def run_reducer(reduce: optax.GradientTransformation, rows, weights: jax.Array = WEIGHTS):
    """Runs one round on virtual replicas, whose results must be equal."""

    def update(message, weight):
        extra = {"weight": weight, "key": KEY}
        return optax.with_extra_args_support(reduce).update(message, reduce.init(message), **extra)[
            0
        ]

    return jax.jit(jax.vmap(update, axis_name=replica.AXIS, out_axes=None))(rows, weights)


def assert_close(tree, other, rtol=1e-5, atol=1e-6):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), tree, other)


@pytest.mark.parametrize("name", REDUCERS)
def test_equal_messages_are_a_fixed_point(name, key):
    """If all replicas send the same message, the result is that message."""
    message = jax.tree.map(lambda rows: rows[0], messages(key))
    same = jax.tree.map(lambda x: jnp.stack([x] * REPLICAS), message)
    reduced = run_reducer(REDUCERS[name].reduce, same)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, atol=REDUCERS[name].tolerance),
        reduced,
        message,
    )


@pytest.mark.parametrize("name", REDUCERS)
def test_equal_complex_messages_are_a_fixed_point(name, key):
    message = jax.tree.map(lambda rows: rows[0] - 0.5j * rows[1], messages(key))
    same = jax.tree.map(lambda x: jnp.stack([x] * REPLICAS), message)
    reduced = run_reducer(REDUCERS[name].reduce, same)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, atol=2 * REDUCERS[name].tolerance),
        reduced,
        message,
    )


@pytest.mark.parametrize("name", ["mean", *LOSSLESS])
def test_complex_mean_equals_numpy(name, key):
    rows = jax.tree.map(lambda x: x - 0.5j * x[::-1], messages(key))
    assert_close(run_reducer(REDUCERS[name].reduce, rows), average(rows))


@pytest.mark.parametrize("dtype", some(["bfloat16", "float16", "complex64"], "bfloat16"))
@pytest.mark.parametrize("name", REDUCERS)
def test_result_keeps_shapes_and_dtypes(name, dtype, key):
    rows = jax.tree.map(lambda x: x.astype(dtype), messages(key))
    reduced = run_reducer(REDUCERS[name].reduce, rows)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), reduced) == jax.tree.map(
        lambda x: (x.shape[1:], x.dtype), rows
    )


@pytest.mark.parametrize("name", REDUCERS)
def test_result_has_the_same_bits_on_all_devices(name, key):
    reduce = optax.with_extra_args_support(REDUCERS[name].reduce)
    on_devices = replica.parallel(
        lambda message, weight: reduce.update(
            message, reduce.init(message), weight=weight, key=KEY
        )[0],
        jax.devices()[:REPLICAS],
        in_axes=(0, 0),
        out_axes=0,
    )
    rows = messages(key)
    reduced = jax.device_get(on_devices(rows, WEIGHTS))
    jax.tree.map(lambda x: np.testing.assert_array_equal(x, np.stack([x[0]] * REPLICAS)), reduced)
    assert_close(jax.tree.map(lambda x: x[0], reduced), run_reducer(reduce, rows))


@pytest.mark.parametrize("name", LOSSLESS)
def test_lossless_reducer_computes_the_mean(name, key):
    rows = messages(key)
    assert_close(run_reducer(REDUCERS[name].reduce, rows), average(rows))


@pytest.mark.parametrize("name", [name for name in LOSSLESS if "f32" in name])
def test_replica_with_weight_zero_is_ignored(name, key):
    """Weight 0 excludes a replica, even one with NaN; if all weights are 0, the mean is 0."""
    rows = messages(key)
    with_nan = jax.tree.map(lambda x: x.at[1].set(jnp.nan), rows)
    assert_close(run_reducer(REDUCERS[name].reduce, with_nan), average(rows))
    reduced = run_reducer(REDUCERS[name].reduce, rows, jnp.zeros(REPLICAS))
    assert not any(leaf.any() for leaf in jax.tree.leaves(reduced))


@pytest.mark.parametrize(
    "name", [name for name in (*REDUCERS, *LOSSY) if name not in NEED_SEVERAL_REPLICAS]
)
def test_one_replica_keeps_its_message(name, key):
    """A single replica sends nothing, so the codec loses nothing."""
    reduce = REDUCERS[name].reduce if name in REDUCERS else two_phase(error_feedback(LOSSY[name]))
    rows = jax.tree.map(lambda x: x[:1], messages(key))

    def update(message):
        return reduce.update(message, reduce.init(message), weight=1.0, key=KEY)[0]

    assert_close(jax.vmap(update, axis_name=replica.AXIS)(rows), rows, atol=1e-5)


def test_mean_weights_replicas_by_their_examples(key):
    rows = messages(key)
    assert_close(run_reducer(mean(), rows), average(rows))


def test_hierarchical_mean_is_the_mean(key):
    """On devices, because vmap does not support axis groups; replica 1 has weight 0 and NaN."""
    rows = messages(key)
    with_nan = jax.tree.map(lambda x: x.at[1].set(jnp.nan), rows)
    hierarchical = replica.parallel(
        lambda message, weight: hierarchical_mean(2).update(
            message, optax.EmptyState(), weight=weight
        )[0],
        jax.devices()[:REPLICAS],
        in_axes=(0, 0),
        out_axes=0,
    )

    # The negated messages change the sign of every sum, but not that of the weights.
    for factor in (1, -1):
        result = hierarchical(optax.tree.scale(factor, with_nan), WEIGHTS)
        expected = average(optax.tree.scale(factor, rows))
        for index in range(REPLICAS):
            assert_close(
                jax.tree.map(lambda x, index=index: np.asarray(x)[index], result), expected
            )

    # If all weights are zero, the mean is zero.
    result = hierarchical(with_nan, np.zeros(REPLICAS, np.float32))
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(result))


def test_mean_ignores_nan_of_a_replica_with_weight_zero(key):
    rows = messages(key)
    with_nan = jax.tree.map(lambda x: x.at[1].set(jnp.nan), rows)
    jax.tree.map(
        np.testing.assert_array_equal, run_reducer(mean(), with_nan), run_reducer(mean(), rows)
    )


def test_mean_of_equal_integers_is_exact():
    counters = jnp.full(REPLICAS, 16_777_217)  # not representable in float32
    mean_of = jax.vmap(replica.weighted_mean, axis_name=replica.AXIS, out_axes=None)
    assert mean_of(counters, WEIGHTS) == 16_777_217


@pytest.mark.parametrize("name", [name for name in REDUCERS if name not in ROBUST])
def test_result_is_zero_if_all_weights_are_zero(name, key):
    """Robust rules do not use weights, which a Byzantine replica could choose."""
    reduced = run_reducer(REDUCERS[name].reduce, messages(key), jnp.zeros(REPLICAS))
    assert not any(leaf.any() for leaf in jax.tree.leaves(reduced))


@pytest.mark.parametrize(
    "name", [name for name in REDUCERS if name not in (*ROBUST, *ACROSS_HOSTS)]
)
def test_single_replica_with_weight_zero_or_without_a_change_results_in_zeros(name, key):
    alone = jax.tree.map(lambda x: x[:1], messages(key))
    unchanged = {**alone, "w": jnp.zeros_like(alone["w"])}
    reduce = optax.with_extra_args_support(REDUCERS[name].reduce)

    def update(message, weight):
        return reduce.update(message, reduce.init(message), weight=weight, key=KEY)[0]

    update = jax.vmap(update, in_axes=(0, None), axis_name=replica.AXIS)
    result = update(alone, 0.0)
    assert not any(leaf.any() for leaf in jax.tree.leaves(result))
    result = update(unchanged, 1.0)
    assert not result["w"].any()
    assert result["b"].any()


@pytest.mark.parametrize("name", REDUCERS)
def test_default_weight_is_one(name, key):
    reduce = optax.with_extra_args_support(REDUCERS[name].reduce)

    def update(message, **weight):
        return reduce.update(message, reduce.init(message), key=KEY, **weight)[0]

    results = [
        jax.jit(jax.vmap(partial(update, **weight), axis_name=replica.AXIS, out_axes=None))
        for weight in ({}, {"weight": 1.0})
    ]
    default, explicit = (result(messages(key)) for result in results)
    assert any(leaf.any() for leaf in jax.tree.leaves(explicit))
    jax.tree.map(np.testing.assert_array_equal, default, explicit)


@pytest.mark.parametrize("exchange", [two_phase, gathered])
@pytest.mark.parametrize("name", LOSSY)
def test_error_feedback_sends_everything_eventually(name, exchange, key):
    """The sum of T results is T times the mean, up to an error that does not grow with T."""
    reduce, rows, weights = (
        exchange(error_feedback(LOSSY[name])),
        messages(key),
        jnp.ones(REPLICAS),
    )

    @partial(jax.jit, donate_argnums=0)
    @partial(jax.vmap, in_axes=((0, None), None, 0), out_axes=(0, None), axis_name=replica.AXIS)
    def one_round(carry, key, message):
        state, total = carry
        reduced, state = reduce.update(message, state, weight=1.0, key=key)
        return state, optax.tree.add(total, reduced)

    state = jax.vmap(reduce.init, axis_name=replica.AXIS)(rows)
    total = jax.tree.map(lambda x: jnp.zeros(x.shape[1:]), rows)
    for number in range(400):
        if number == 200:
            after_200 = jax.device_get(total)
        state, total = one_round((state, total), jax.random.fold_in(key, number), rows)
    after_400 = jax.device_get(total)

    expected = average(rows, weights)
    assert_close(
        optax.tree.scale(1 / 200, optax.tree.sub(after_400, after_200)),
        expected,
        rtol=0.05,
        atol=0.5,
    )
    assert_close(optax.tree.scale(1 / 400, after_400), expected, rtol=0.05, atol=0.5)


@pytest.mark.slow
def test_replica_with_weight_zero_keeps_its_residual(key):
    """The residual does not change in a round in which the weight is 0."""
    reduce, rows = two_phase(error_feedback(sign(8))), messages(key)

    def twice(message, weights):
        _, first = reduce.update(message, reduce.init(message), weight=weights[0], key=KEY)
        _, second = reduce.update(message, first, weight=weights[1], key=KEY)
        return first.sender.residual, second.sender.residual

    weights = jnp.ones((REPLICAS, 2)).at[1, 1].set(0.0)
    first, second = jax.vmap(twice, axis_name=replica.AXIS)(rows, weights)
    np.testing.assert_array_equal(first[1], second[1])
    assert (first[0] != second[0]).any()


def test_unweighted_rule_updates_every_residual(key):
    """The median has no weights: a replica without examples counts, and its residual changes."""
    reduce, rows = two_phase(error_feedback(sign(8)), aggregate.median()), messages(key)

    def once(message, weight):
        return reduce.update(message, reduce.init(message), weight=weight, key=KEY)[
            1
        ].sender.residual

    residual = jax.vmap(once, axis_name=replica.AXIS)(rows, WEIGHTS)
    assert residual[1].any()


def int_bytes(bits: int, block: int = 256):
    return lambda n: ceil(n / block) * (block * bits // 8 + 4)


def sparse_bytes(k: int, chunk: int, position_bits: int, values):
    return lambda n: ceil(ceil(n / chunk) * k * position_bits / 8) + values(ceil(n / chunk) * k)


def two_phase_bytes(codec_bytes):
    """Adds 4 bytes for the weight and, in each direction, one byte of flags for the two leaves."""
    return lambda n, replicas: (replicas - 1) * (2 * codec_bytes(ceil(n / replicas)) + 4 + 1 + 1)


def gathered_bytes(codec_bytes):
    return lambda n, replicas: (replicas - 1) * (codec_bytes(n) + 4 + 1)


def across_hosts_bytes(exchange_bytes, per_host: int):
    """Adds the sum and the result within each host; the parts of leaves are padded."""

    def of_replica(n: int, replicas: int) -> float:
        part = ceil((n - 7) / per_host) + ceil(7 / per_host)
        within = (per_host - 1) * 4 * (part + 1 + part)
        return within + exchange_bytes(part, replicas // per_host)

    return of_replica


def f32_bytes(n: int) -> int:
    return 4 * n


def ring(n: float, replicas: int) -> float:
    return 2 * (replicas - 1) / replicas * n


def hierarchical_bytes(n: int, replicas: int) -> float:
    """Assumes two devices per host."""
    padded = 2 * ceil((n + 1) / 2)
    return ring(4 * padded, 2) + ring(4 * padded / 2, replicas // 2)


BYTES = {
    "mean": (mean(), lambda n, r: ring(4 * (n + 1), r)),
    "hierarchical mean": (hierarchical_mean(2), hierarchical_bytes),
    "int4 across hosts": (
        two_phase(error_feedback(quantize(4)), per_host=4),
        across_hosts_bytes(two_phase_bytes(int_bytes(4)), 4),
    ),
    "gathered sign across hosts": (
        gathered(sign(), per_host=2),
        across_hosts_bytes(gathered_bytes(int_bytes(1)), 2),
    ),
    "two-phase f32": (two_phase(), two_phase_bytes(f32_bytes)),
    "gathered f32": (gathered(exact()), gathered_bytes(f32_bytes)),
    **{f"int{b}": (two_phase(quantize(b)), two_phase_bytes(int_bytes(b))) for b in (8, 4, 2)},
    "int4 in small blocks": (
        two_phase(error_feedback(quantize(4, block=64))),
        two_phase_bytes(int_bytes(4, 64)),
    ),
    "int2, statistical": (gathered(quantize(2, "statistical")), gathered_bytes(int_bytes(2))),
    "sign": (two_phase(sign()), two_phase_bytes(int_bytes(1))),
    "top-k": (two_phase(top_k(5, 100)), two_phase_bytes(sparse_bytes(5, 100, 7, f32_bytes))),
    "sparse-loco": (
        gathered(error_feedback(top_k(32, 1024, quantize(2, "statistical", 32)))),
        gathered_bytes(sparse_bytes(32, 1024, 10, int_bytes(2, 32))),
    ),
    "random-k": (two_phase(random_k(5, 100)), two_phase_bytes(sparse_bytes(5, 100, 0, f32_bytes))),
    "median": (two_phase(combine=aggregate.median()), two_phase_bytes(f32_bytes)),
    "krum": (
        two_phase(combine=aggregate.krum(1)),
        lambda n, r: two_phase_bytes(f32_bytes)(n, r) + ring(3 * 4 * r * r, r),
    ),
    "geometric median": (
        two_phase(combine=aggregate.geometric_median(iterations=8)),
        lambda n, r: two_phase_bytes(f32_bytes)(n, r) + 8 * ring(3 * 4 * r, r),
    ),
    "centered clipping": (
        two_phase(combine=aggregate.centered_clipping(1.0, iterations=3)),
        lambda n, r: two_phase_bytes(f32_bytes)(n, r) + 3 * ring(3 * 4 * r, r),
    ),
    "power-sgd": (power_sgd(2), lambda n, r: ring(4 * (2 * (50 + (n - 7) // 50) + 1 + 7 + 1), r)),
    "private": (aggregate.private(1.0, 1.0), lambda n, r: ring(4 * (n + 1), r)),
    "ring": (aggregate.gossip("ring"), lambda n, r: 2 * 4 * n),
    "exponential": (aggregate.gossip("exponential"), lambda n, r: 4 * n),
    "pairs": (aggregate.gossip("pairs"), lambda n, r: 4 * n),
    "streaming int4": (
        aggregate.streaming(3, two_phase(quantize(4))),
        lambda n, r: two_phase_bytes(int_bytes(4))(ceil((n - 7) / 3) + ceil(7 / 3), r),
    ),
}


def sent_bytes(reduce: optax.GradientTransformation, n: int, replicas: int) -> float:
    """Returns the bytes that a device sends in one round, counted in the compiled program."""
    reduce = optax.with_extra_args_support(reduce)

    def update(message, params, state, weight):
        return reduce.update(message, state, params, weight=weight, key=KEY)

    devices = jax.devices()[:replicas]
    columns = (n - 7) // 50
    rows = {"w": jnp.zeros((replicas, 50, columns)), "b": jnp.zeros((replicas, n - 50 * columns))}
    init = replica.parallel(reduce.init, devices, in_axes=(0,), out_axes=0)
    compiled = (
        replica.parallel(update, devices, in_axes=(0, 0, 0, 0), out_axes=0)
        .lower(rows, rows, jax.eval_shape(init, rows), jnp.zeros(replicas))
        .compile()
    )
    return sum(one.sent * one.times for one in collectives.read(compiled.as_text()))


QUICK_BYTES = (
    "mean",
    "hierarchical mean",
    "int4 across hosts",
    "int4",
    "int2, statistical",
    "sparse-loco",
    "krum",
    "power-sgd",
    "pairs",
    "streaming int4",
)


@pytest.mark.parametrize("name", some(BYTES, *QUICK_BYTES))
def test_compiled_bytes_match_the_formula(name):
    reduce, formula = BYTES[name]
    assert sent_bytes(reduce, 5007, 8) == pytest.approx(formula(5007, 8), rel=1e-12)


def test_int8_sends_a_quarter_of_f32():
    """On 8 devices: 1.75 bytes per parameter and the scales, compared with 7.00."""
    n = 8 * 256 * 5
    scales, weights = 2 * 7 * 5 * 4, 7 * 4
    flags = 2 * 7 * 1
    assert sent_bytes(two_phase(quantize(8)), n, 8) == 1.75 * n + scales + weights + flags
    assert sent_bytes(mean(), n, 8) == pytest.approx(7.00 * (n + 1))


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        (lambda: Strategy(inner_steps=-1), "inner_steps must be at least 0, got -1"),
        (
            lambda: Strategy(outer=optax.sgd(0.7)),
            "outer requires inner_steps of at least 1; with inner_steps=0, the optimizer updates",
        ),
        (
            lambda: Strategy(inner=aggregate.proximal(1.0)),
            "inner requires inner_steps of at least 1; with inner_steps=0, there are no local",
        ),
        (
            lambda: Strategy(diverges=True),
            "diverges requires inner_steps of at least 1; with inner_steps=0, replicas cannot",
        ),
        (
            lambda: Strategy(later={40: Strategy(16)}),
            "later must begin a phase at a multiple of its 16 inner steps and of those before it",
        ),
        (
            lambda: Strategy(3, later={8: Strategy(4)}),
            "later must begin a phase at a multiple of its 3 inner steps and of those before it",
        ),
        (
            lambda: Strategy(4, later={8: Strategy()}),
            "later must have inner steps in all phases after the first one with inner steps, got 0",
        ),
        (
            lambda: Strategy(4, aggregate.gossip(), diverges=True, later={8: Strategy(4)}),
            "later must diverge in all phases after the first one that diverges",
        ),
        (
            lambda: Strategy(later={0: Strategy(4)}),
            "later must have steps of at least 1 as keys, got 0",
        ),
        (
            lambda: Strategy(later={8: 4}),
            "later must have strategies as values, got 4 at step 8",
        ),
        (
            lambda: Strategy(later={8: Strategy(4, later={16: Strategy(8)})}),
            "later must have strategies that are not exact and have no later phases, got another",
        ),
        (
            lambda: Strategy(exact=True, later={8: Strategy(4)}),
            "exact requires a single phase without shared batches",
        ),
        (
            lambda: Strategy(4, shared_batches=True),
            "shared_batches requires inner_steps=0, got 4",
        ),
        (
            lambda: Strategy(reduce=two_phase(), shared_batches=True),
            "shared_batches requires the default reducer, because nothing is sent",
        ),
        (lambda: quantize(3), "bits must be 8, 4 or 2, got 3"),
        (lambda: quantize(4, "cubic"), "levels must be one of linear, statistical, got 'cubic'"),
        (lambda: quantize(4, block=12), "block must be a multiple of 8, got 12"),
        (lambda: sign(4), "block must be at least 8, got 4"),
        (lambda: top_k(0), "k must be from 1 to 4096, the chunk size, got 0"),
        (
            lambda: top_k(12, 64, sign(8)),
            "k must be a multiple of 8, the block size of the values, got 12",
        ),
        (lambda: random_k(9, 8), "k must be from 1 to 8, the chunk size, got 9"),
        (lambda: error_feedback(sign(), 1.5), "decay must be from 0 to 1, got 1.5"),
        (lambda: hierarchical_mean(0), "per_host must be at least 1, got 0"),
        (lambda: two_phase(per_host=0), "per_host must be at least 1, got 0"),
        (lambda: gathered(exact(), per_host=-1), "per_host must be at least 1, got -1"),
        (lambda: power_sgd(0), "rank must be at least 1, got 0"),
        (lambda: aggregate.proximal(-1.0), "strength must be at least 0, got -1.0"),
        (lambda: aggregate.streaming(0), "fragments must be at least 1, got 0"),
        (lambda: aggregate.streaming(2, mix=2.0), "mix must be from 0 to 1, got 2.0"),
        (
            lambda: aggregate.gossip("star"),
            "graph must be one of ring, exponential, pairs, got 'star'",
        ),
        (lambda: aggregate.gossip(pull=-1), "pull must be from 0 to 1, got -1"),
    ],
)
def test_invalid_strategy_is_refused(build, sentence):
    with pytest.raises(InputError, match=sentence):
        build()


@pytest.mark.parametrize(
    ("reduce", "replicas", "sentence"),
    [
        (
            aggregate.gossip(),
            1,
            "devices must be at least 2 for gossip, which needs a neighbor, got 1",
        ),
        (
            two_phase(combine=aggregate.krum(1)),
            4,
            "devices must be at least 5 .* for Krum with 1 Byzantine device, got 4",
        ),
        (
            two_phase(combine=aggregate.trimmed_mean(2)),
            4,
            "devices must be at least 5 .* got 4; .* byzantine to at most 1",
        ),
        (hierarchical_mean(3), 4, "per_host must divide the 4 devices, got 3"),
        (two_phase(per_host=3), 4, "per_host must divide the 4 devices, got 3"),
        (gathered(exact(), per_host=8), 4, "per_host must divide the 4 devices, got 8"),
    ],
)
def test_too_few_replicas_are_refused(reduce, replicas, sentence):
    with pytest.raises(InputError, match=sentence):
        jax.eval_shape(jax.vmap(reduce.init, axis_name=replica.AXIS), jnp.zeros((replicas, 8)))
