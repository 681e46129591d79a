"""Codecs: `decode` returns the values that `encode` predicts, with known errors."""

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from ctde_jax.aggregate import error_feedback, exact, quantize, random_k, sign, top_k
from ctde_jax.aggregate.quantize import _largest, normal_levels, pack, unpack
from ctde_jax.aggregate.sparse import pack_integers, unpack_integers

KEY = jax.random.key(3)
SIZE = 512
CODECS = {
    "exact": exact(),
    "int8": quantize(8),
    "int4": quantize(4, block=32),
    "int2": quantize(2, "statistical"),
    "sign": sign(64),
    "top-k": top_k(3, 64),
    "top-k in 4 bits": top_k(8, 64, quantize(4, block=8)),
    "random-k": random_k(10, 64),
}


def round_trip(codec, values):
    payload, predicted, _ = codec.encode(values, codec.init(values.shape), KEY)
    decoded = codec.decode(payload, values.shape[-1], KEY)
    assert payload.dtype == jnp.uint8
    np.testing.assert_array_equal(decoded, predicted)
    return decoded


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_packed_codes_are_unpacked(bits):
    codes = jnp.asarray(np.random.default_rng(bits).integers(0, 2**bits, (3, 2, 64)), jnp.uint8)
    packed = pack(codes, bits)
    assert packed.shape == (3, 2, 8 * bits)
    np.testing.assert_array_equal(unpack(packed, bits), codes)


@pytest.mark.parametrize(("bits", "count"), [(1, 9), (7, 33), (12, 5), (13, 64)])
def test_packed_integers_are_unpacked(bits, count):
    integers = jnp.asarray(np.random.default_rng(bits).integers(0, 2**bits, (2, count)))
    packed = pack_integers(integers, bits)
    assert packed.shape == (2, -(-count * bits // 8))
    np.testing.assert_array_equal(unpack_integers(packed, bits, count), integers)


@pytest.mark.parametrize("name", CODECS)
def test_rows_are_encoded_independently(name, key):
    """Each row of a matrix is encoded independently."""
    codec, values = CODECS[name], jax.random.normal(key, (3, SIZE))
    separate = jnp.stack([round_trip(codec, row) for row in values])
    np.testing.assert_allclose(round_trip(codec, values), separate, rtol=1e-6)


@pytest.mark.parametrize("name", CODECS)
def test_zeros_stay_zeros(name):
    assert not round_trip(CODECS[name], jnp.zeros(SIZE)).any()


# The root mean square of decoded int2 differs from that of its input.
@pytest.mark.parametrize("name", [name for name in CODECS if name != "int2"])
def test_decoded_values_are_encoded_without_loss(name, key):
    """Decoded values are encoded without further loss, except for the rounded mean of signs."""
    decoded = round_trip(CODECS[name], jax.random.normal(key, (SIZE,)))
    np.testing.assert_allclose(round_trip(CODECS[name], decoded), decoded, rtol=1e-5)


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_nan_and_infinity_are_not_hidden(name, bad):
    codec = CODECS[name]
    values = jnp.full(SIZE, bad) if name == "random-k" else jnp.ones(SIZE).at[7].set(bad)
    payload, _, _ = codec.encode(values, codec.init(values.shape), KEY)
    assert not np.isfinite(codec.decode(payload, SIZE, KEY)).all()


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_error_of_linear_levels_is_at_most_half_a_step(bits, key):
    values = jax.random.normal(key, (4, 256))
    largest = jnp.abs(values).max(axis=1, keepdims=True)
    step = largest / (2 ** (bits - 1) - 1)
    assert (jnp.abs(round_trip(quantize(bits), values) - values) <= step * 0.5001).all()


def test_statistical_levels_are_those_of_the_paper():
    """Max (1960), table I: the levels for 4 and 8 outputs."""
    np.testing.assert_allclose(normal_levels(2), [-1.510, -0.4528, 0.4528, 1.510], atol=6e-4)
    np.testing.assert_allclose(normal_levels(3)[4:], [0.2451, 0.7560, 1.344, 2.152], atol=6e-4)


@pytest.mark.parametrize(("bits", "error"), [(2, 0.1175), (4, 0.009497)])
def test_error_of_statistical_levels_is_that_of_the_paper(bits, error, key):
    """Mean squared error of standard normal numbers, Max (1960), table I."""
    values = jax.random.normal(key, (256 * 2000,))
    measured = jnp.mean((round_trip(quantize(bits, "statistical"), values) - values) ** 2)
    assert measured == pytest.approx(error, rel=0.03)


@pytest.mark.slow
def test_error_of_statistical_levels_is_smaller_than_of_linear_levels(key):
    values = jax.random.normal(key, (256 * 100,))

    def loss(levels, bits):
        return float(jnp.mean((round_trip(quantize(bits, levels), values) - values) ** 2))

    assert loss("statistical", 2) < 0.5 * loss("linear", 2)
    assert loss("statistical", 4) < loss("linear", 4)


def test_sign_keeps_the_mean_magnitude(key):
    values = jax.random.normal(key, (64,))
    np.testing.assert_allclose(
        round_trip(sign(64), values), jnp.sign(values) * jnp.abs(values).mean(), rtol=1e-6
    )


def test_top_k_keeps_the_largest_of_each_chunk(key):
    values = jax.random.normal(key, (128,))
    kept = np.zeros(128, np.float32)
    for start in (0, 64):
        largest = start + np.argsort(-np.abs(values[start : start + 64]))[:3]
        kept[largest] = values[largest]
    np.testing.assert_array_equal(round_trip(top_k(3, 64), values), kept)


def test_random_k_draws_every_value_equally_often(key):
    codec, values = random_k(10, 40), jnp.ones(40)

    def send(key):
        return codec.decode(codec.encode(values, (), key)[0], 40, key)

    drawn = jax.vmap(send)(jax.random.split(key, 2000))
    np.testing.assert_array_equal(drawn.sum(axis=1), np.full(2000, 10.0))
    np.testing.assert_allclose(
        drawn.mean(axis=0), np.full(40, 0.25), atol=5 * np.sqrt(0.1875 / 2000)
    )


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("decay", [1.0, 0.9])
def test_sent_values_and_residual_add_up_to_the_target(name, decay, key):
    """At every step of a sequence of different messages."""
    codec = error_feedback(CODECS[name], decay)
    state = codec.init((3, SIZE))
    for step_key in jax.random.split(key, 5):
        values = jax.random.normal(step_key, (3, SIZE))
        target = values + decay * state.residual
        payload, _, state = codec.encode(values, state, step_key)
        np.testing.assert_allclose(
            codec.decode(payload, SIZE, step_key) + state.residual, target, atol=1e-5
        )


@pytest.mark.parametrize("largest", [1.5e-30, 1.8e19, 1e30, float(jnp.finfo(jnp.float32).max)])
@pytest.mark.parametrize("name", CODECS)
def test_magnitude_changes_nothing_but_the_scale(name, largest, key):
    """The decoded values scale with the input, up to the largest float32."""
    values = np.asarray(jax.random.normal(key, (SIZE,)), np.float64)
    values /= np.abs(values).max()
    scaled = (values * largest).astype(np.float32)
    codec = CODECS[name]
    # Both are compiled, so that they round equally.
    encode = jax.jit(lambda values: codec.encode(values, codec.init(values.shape), KEY)[:2])
    payload, predicted = encode(scaled)
    decoded = jax.jit(lambda payload: codec.decode(payload, SIZE, KEY))(payload)
    np.testing.assert_array_equal(decoded, predicted)
    bound = float(jnp.finfo(jnp.float32).max)
    expected = np.clip(
        np.asarray(encode(values.astype(np.float32))[1], np.float64) * largest, -bound, bound
    )
    np.testing.assert_allclose(
        np.asarray(decoded, np.float64), expected, rtol=1e-5, atol=0.01 * largest / 127
    )


@pytest.mark.parametrize(("block", "reduced"), [(16, 16), (64, 16), (24, 12), (40, 10), (15, 15)])
def test_maximum_of_a_block_is_taken_over_halves(block, reduced):
    """Elementwise maxima of halves, until 16 elements or an odd number are left."""
    blocks = jnp.ones((3, block))
    equations = jax.make_jaxpr(_largest)(blocks).eqns
    (reduction,) = [eqn for eqn in equations if eqn.primitive.name == "reduce_max"]
    assert reduction.invars[0].aval.shape == (3, reduced)
