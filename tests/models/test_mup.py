"""At the base width nothing changes; at other widths, activations change equally in a step."""

import jax
import numpy as np
import optax
import pytest
from flax import linen
from jax import numpy as jnp

from ctde_jax import models
from ctde_jax.errors import InputError
from ctde_jax.models.initializers import leaves_with_path
from ctde_jax.models.mup import mup, scale_learning_rates

INPUTS = jax.random.normal(jax.random.key(7), (64, 16))
TOKENS = jax.random.randint(jax.random.key(7), (4, 6), 0, 5)
BASE = 64


def perceptron(width: int) -> models.Model:
    return models.mlp([16, width, width, width, 10], "relu")


def deviation(leaf: jax.Array) -> float:
    return float(jnp.sqrt((leaf**2).mean()))


@pytest.mark.parametrize("ratio", [1, 4])
def test_initial_deviations_are_those_of_the_table(ratio, key):
    params, _ = mup(perceptron(BASE * ratio), perceptron(BASE)).init(key, INPUTS)
    first, *hidden, last = (deviation(params["layers"][i]["kernel"]) for i in range(4))
    assert first == pytest.approx(1 / 16**0.5, rel=0.05)
    assert hidden == pytest.approx([1 / (BASE * ratio) ** 0.5] * 2, rel=0.05)
    assert last == pytest.approx(1 / BASE**0.5 / ratio, rel=0.05)


def test_learning_rates_are_those_of_the_table(key):
    params, _ = perceptron(BASE * 4).init(key, INPUTS)
    optimizer = optax.chain(optax.sgd(1.0), scale_learning_rates(perceptron(BASE), INPUTS[:1]))
    updates, _ = optimizer.update(
        jax.tree.map(jnp.ones_like, params), optimizer.init(params), params
    )
    kernels, biases = (
        [float(-updates["layers"][i][name].mean()) for i in range(4)] for name in ("kernel", "bias")
    )
    assert kernels == [1, 1 / 4, 1 / 4, 1 / 4]
    assert biases == [1, 1, 1, 1]


NETWORKS = {
    "mlp": (perceptron, INPUTS),
    "resnet": (
        lambda width: models.resnet((8, 8), 4, channels=(width // 8, width // 4)),
        jnp.ones((1, 8, 8)),
    ),
    "lstm": (lambda width: models.rnn_language_model(5, width, layers=1), TOKENS),
    "transformer": (
        lambda width: models.transformer(5, 6, width, blocks=1, heads=width // 8),
        TOKENS,
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_base_width_is_the_standard_parametrization(name, key):
    build, inputs = NETWORKS[name]
    network = build(BASE)
    params, _ = mup(network, build(BASE)).init(key, inputs)
    jax.tree.map(np.testing.assert_array_equal, params, network.init(key, inputs)[0])

    scale = scale_learning_rates(build(BASE), inputs)
    jax.tree.map(np.testing.assert_array_equal, scale.update(params, scale.init(params))[0], params)


@pytest.mark.parametrize("name", ["lstm", "transformer"])
def test_embeddings_have_the_scale_of_the_base_and_logits_shrink(name, key):
    build, inputs = NETWORKS[name]
    wide, base = (
        dict(leaves_with_path(mup(build(w), build(BASE)).init(key, inputs)[0]))
        for w in (4 * BASE, BASE)
    )
    sizes = {
        path: deviation(wide[path]) / deviation(base[path]) for path in base if base[path].any()
    }
    assert sizes["tokens", "embedding"] == pytest.approx(1, rel=1e-5)
    assert sizes["out", "kernel"] == pytest.approx(1 / 4, rel=1e-5)
    hidden = [size for path, size in sizes.items() if path[-1] == "kernel" and path[0] != "out"]
    assert hidden == pytest.approx([1 / 2] * len(hidden), rel=1e-5)


def slopes(build, key) -> np.ndarray:
    """Returns the exponent of each layer's change over width in eight steps of Adam."""
    widths = np.array([64, 128, 256, 512])
    labels = jax.random.randint(jax.random.key(8), (64,), 0, 10)

    def sizes(width: int) -> list[float]:
        model, scale = build(int(width))
        optimizer = optax.chain(optax.adam(0.002), scale)
        params, _ = model.init(key, INPUTS)
        before, state = model.layers(params, {}, INPUTS), optimizer.init(params)

        def loss(params):
            outputs, _ = model.apply(params, {}, INPUTS, None)
            return optax.softmax_cross_entropy_with_integer_labels(outputs, labels).mean()

        @jax.jit
        def step(params, state):
            updates, state = optimizer.update(jax.grad(loss)(params), state, params)
            return optax.apply_updates(params, updates), state

        for _ in range(8):
            params, state = step(params, state)
        after = model.layers(params, {}, INPUTS)
        return [float(jnp.abs(after[path] - before[path]).mean()) for path in after]

    logs = np.log2([sizes(width) for width in widths])
    return np.polyfit(np.log2(widths), logs, 1)[0]


@pytest.mark.slow
def test_activations_change_equally_at_all_widths_only_with_mup(key):
    """The coordinate check (Yang et al., 2022, Appendix D.1)."""
    base = perceptron(BASE)
    flat = slopes(
        lambda width: (mup(perceptron(width), base), scale_learning_rates(base, INPUTS)), key
    )
    steep = slopes(lambda width: (perceptron(width), optax.identity()), key)
    assert np.abs(flat).max() < 0.2
    assert (steep[1:] > 0.4).all()


@pytest.mark.parametrize("other", [models.mlp([16, 64, 10]), models.from_linen(linen.Dense(10))])
def test_base_of_another_structure_is_refused(other, key):
    with pytest.raises(
        InputError, match="base must differ from the model only in width, but its parameters have"
    ):
        mup(perceptron(64), other).init(key, INPUTS)
    with pytest.raises(InputError, match="base must differ from the model only in width"):
        scale_learning_rates(other, INPUTS).update(
            perceptron(64).init(key, INPUTS)[0], optax.EmptyState()
        )
