"""Initializers: variances, orthogonality and zeros as published, and their effects."""

from functools import partial
from itertools import pairwise

import flax.linen
import jax
import numpy as np
import optax
import pytest
from flax import nnx
from jax import lax
from jax import numpy as jnp

from ctde_jax import models
from ctde_jax.errors import InputError
from ctde_jax.models.initializers import INITIALIZERS, find_kernels, initialize, leaves_with_path


class OneCell(nnx.Module):
    """A recurrent network with any cell of nnx."""

    def __init__(self, cell: type[nnx.RNNCellBase], rngs: nnx.Rngs):
        self.rnn = nnx.RNN(cell(8, 8, rngs=rngs), rngs=rngs)
        self.out = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, inputs):
        return self.out(self.rnn(inputs)[:, -1])


class Linen(flax.linen.Module):
    """Has an embedding, attention, a recurrent cell and a convolution of linen."""

    @flax.linen.compact
    def __call__(self, tokens):
        x = flax.linen.Embed(5, 8)(tokens)
        x = flax.linen.MultiHeadDotProductAttention(2)(x, x)
        x = flax.linen.RNN(flax.linen.LSTMCell(8))(x)
        x = flax.linen.LayerNorm()(flax.linen.Conv(8, (3,))(x))
        return flax.linen.Dense(3)(x.mean(axis=1))


def noise(*shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(7), shape)


TOKENS = jax.random.randint(jax.random.key(7), (32, 6), 0, 5)
MODELS = {
    "mlp": (models.mlp([16, *[12] * 9, 4]), noise(64, 16)),
    "cnn": (models.cnn((4, 4), 4), noise(32, 4, 4)),
    "resnet": (models.resnet((8, 8), 4, channels=(8, 16)), noise(16, 8, 8)),
    "transformer": (models.transformer(5, 6, hidden_size=8, heads=2), TOKENS),
    "lstm": (models.rnn_language_model(5, 8, layers=1), TOKENS),
    "gru": (models.rnn_classifier(6, 4, 8, cell="gru"), noise(16, 6, 6)),
    "lstm cell": (models.from_nnx(partial(OneCell, nnx.LSTMCell)), noise(16, 6, 8)),
    "simple cell": (models.from_nnx(partial(OneCell, nnx.SimpleCell)), noise(16, 6, 8)),
    "linen": (models.from_linen(Linen()), TOKENS),
}
SUITABLE = {
    "delta_orthogonal": {"cnn", "resnet", "linen"},
    "recurrent": {"lstm", "gru", "lstm cell", "simple cell", "linen"},
    "residual": {"resnet", "transformer"},
}


def initial_params(model: str, name: str, seed: int = 0):
    """Returns the parameters of a model, drawn by an initializer."""
    network, inputs = MODELS[model]
    return initialize(network, name).init(jax.random.key(seed), inputs)[0]


def matrices(params) -> dict[tuple, list[np.ndarray]]:
    """Returns the kernel of each layer as the matrices of its gates, `[taps * inputs, outputs]`."""
    leaves = dict(leaves_with_path(params))
    return {
        path: np.split(
            np.reshape(leaves[*path, "kernel"], (-1, kernel.gates * kernel.outputs)),
            kernel.gates,
            axis=1,
        )
        for path, kernel in find_kernels(params).items()
    }


def assert_orthonormal(matrix: np.ndarray):
    """Checks the rows or the columns, whichever are fewer."""
    short = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    np.testing.assert_allclose(short @ short.T, np.eye(len(short)), atol=1e-5)


def assert_equal(first, second):
    jax.tree.map(np.testing.assert_array_equal, first, second)


@pytest.mark.slow
@pytest.mark.parametrize("name", INITIALIZERS)
def test_parameters_depend_on_the_key(name):
    model = "lstm" if name == "recurrent" else "resnet"
    first, second, other = (initial_params(model, name, seed) for seed in (1, 1, 2))
    assert_equal(first, second)
    assert jax.tree.map(jnp.shape, first) == jax.tree.map(jnp.shape, initial_params(model, "flax"))
    assert any(
        (x != y).any() for x, y in zip(jax.tree.leaves(first), jax.tree.leaves(other), strict=True)
    )


@pytest.mark.parametrize("model", MODELS)
def test_initializer_flax_keeps_every_bit(model, key):
    assert_equal(initial_params(model, "flax"), MODELS[model][0].init(key, MODELS[model][1])[0])


def test_only_kernels_and_their_biases_are_redrawn():
    before, after = (
        dict(leaves_with_path(initial_params("transformer", name))) for name in ("flax", "he")
    )
    changed = {path[-1] for path in before if (before[path] != after[path]).any()}
    assert changed == {"kernel"}
    assert {path[-1] for path in before} == {"kernel", "bias", "scale", "embedding"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "variance"),
    [
        ("glorot", lambda inputs, outputs: 2 / (inputs + outputs)),
        ("he", lambda inputs, outputs: 2 / inputs),
    ],
)
def test_variance_is_that_of_the_paper(name, variance, key):
    dense = models.mlp([300, 200])
    kernel = initialize(dense, name).init(key, jnp.ones((1, 300)))[0]["layers"][0]["kernel"]
    assert float(kernel.var()) == pytest.approx(variance(300, 200), rel=0.03)
    assert abs(float(kernel.mean())) < 0.001

    convolution = models.from_linen(flax.linen.Conv(64, (3, 3)))
    kernel = initialize(convolution, name).init(key, jnp.ones((1, 8, 8, 32)))[0]["kernel"]
    assert float(kernel.var()) == pytest.approx(variance(9 * 32, 9 * 64), rel=0.03)

    heads = models.from_linen(
        flax.linen.MultiHeadDotProductAttention(4, qkv_features=128, out_features=192)
    )
    layers = initialize(heads, name).init(key, jnp.ones((1, 5, 64)))[0]
    for layer, fans in {
        "query": (64, 128),
        "key": (64, 128),
        "value": (64, 128),
        "out": (128, 192),
    }.items():
        assert float(layers[layer]["kernel"].var()) == pytest.approx(variance(*fans), rel=0.04)


@pytest.mark.slow
def test_he_preserves_the_variance_through_relus_and_flax_halves_it(key):
    model, inputs = models.mlp([256] * 21, "relu"), noise(64, 256)

    def power(name: str) -> np.ndarray:
        params, _ = initialize(model, name).init(key, inputs)
        return np.array(
            [(outputs**2).mean() for outputs in model.layers(params, {}, inputs).values()]
        )

    assert 0.5 < power("he")[-1] / power("he")[0] < 2
    assert 0.5 < power("flax")[-1] / power("flax")[0] * 2**19 < 2


@pytest.mark.parametrize("model", MODELS)
def test_kernels_are_orthogonal_for_each_gate(model):
    for gates in matrices(initial_params(model, "orthogonal")).values():
        for matrix in gates:
            assert_orthonormal(matrix)


@pytest.mark.parametrize(("model", "gates"), [("lstm", 4), ("gru", 3), ("simple cell", 1)])
def test_gates_of_a_fused_kernel_are_counted(model, gates):
    found = {
        path[-1]: kernel.gates
        for path, kernel in find_kernels(initial_params(model, "flax")).items()
    }
    assert found == {"dense_h": gates, "dense_i": gates, "out": 1}


@pytest.mark.parametrize("model", sorted(SUITABLE["delta_orthogonal"]))
def test_delta_orthogonal_kernel_is_orthogonal_in_the_center_and_zero_elsewhere(model):
    params = initial_params(model, "delta_orthogonal")
    leaves = dict(leaves_with_path(params))
    for path, kernel in find_kernels(params).items():
        taps = np.array(leaves[*path, "kernel"]).reshape(
            *kernel.taps, kernel.inputs, kernel.outputs
        )
        center = tuple((size - 1) // 2 for size in kernel.taps)
        assert_orthonormal(taps[center])
        taps[center] = 0
        assert not taps.any()


def test_delta_orthogonal_convolution_preserves_the_norm_of_an_image(key):
    model = initialize(
        models.from_nnx(lambda rngs: nnx.Conv(8, 16, (3, 3), rngs=rngs)), "delta_orthogonal"
    )
    image = noise(1, 6, 6, 8)
    params, model_state = model.init(key, image)
    outputs, _ = model.apply(params, model_state, image, None)
    assert float(jnp.linalg.norm(outputs)) == pytest.approx(float(jnp.linalg.norm(image)), rel=1e-5)


@pytest.mark.parametrize("model", sorted(SUITABLE["recurrent"]))
def test_recurrent_kernels_are_orthogonal_and_other_kernels_are_glorot(model):
    params = initial_params(model, "recurrent")
    kernels, by_path = find_kernels(params), matrices(params)
    assert any(kernel.recurrent for kernel in kernels.values())
    for path, kernel in kernels.items():
        for matrix in by_path[path]:
            if kernel.recurrent:
                assert matrix.shape == (8, 8)
                assert_orthonormal(matrix)
            else:
                taps = int(np.prod(kernel.taps))
                assert np.abs(matrix).max() <= np.sqrt(
                    6 / (taps * (kernel.inputs + kernel.outputs))
                )


def test_forget_gates_start_open():
    closed, opened = np.zeros(8), np.ones(8)
    cell = initial_params("lstm", "recurrent")["recurrent"]["layers"][0]["cell"]
    np.testing.assert_array_equal(
        cell["dense_h"]["bias"], np.concatenate([closed, opened, closed, closed])
    )
    for cell in (
        initial_params("lstm cell", "recurrent")["rnn"]["cell"],
        initial_params("linen", "recurrent")["LSTMCell_0"],
    ):
        assert [float(cell[name]["bias"].mean()) for name in ("hi", "hf", "hg", "ho")] == [
            0,
            1,
            0,
            0,
        ]


def test_open_forget_gate_is_the_second_of_four(key):
    """The cell keeps its memory if only the bias of that gate is large."""
    cell = nnx.OptimizedLSTMCell(2, 3, rngs=nnx.Rngs(0))
    cell.dense_i.kernel[...], cell.dense_h.kernel[...] = jnp.zeros((2, 12)), jnp.zeros((3, 12))
    cell.dense_h.bias[...] = jnp.zeros(12).at[3:6].set(100)
    (memory, _), _ = cell((jnp.ones((1, 3)), jnp.zeros((1, 3))), jnp.ones((1, 2)))
    np.testing.assert_allclose(memory, 1)


@pytest.mark.slow
@pytest.mark.parametrize("model", sorted(SUITABLE["residual"]))
def test_residual_branches_are_zero_at_initialization(model, key):
    network, inputs = MODELS[model]
    params, model_state = initialize(network, "residual").init(key, inputs)
    ends = {
        path: outputs
        for path, outputs in network.layers(params, model_state, inputs).items()
        if "blocks" in path
    }
    ends = {
        path: outputs for path, outputs in ends.items() if path[-1] in ("mix", "contract", "second")
    }
    assert len(ends) == {"transformer": 4, "resnet": 2}[model]
    assert not any(outputs.any() for outputs in ends.values())


def test_transformer_blocks_with_zero_branches_are_the_identity(key):
    network = initialize(MODELS["transformer"][0], "residual")
    params, _ = network.init(key, TOKENS)
    x = params["tokens"]["embedding"][TOKENS] + params["places"]["embedding"][None]
    normed = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-6)
    outputs, _ = network.apply(params, {}, TOKENS, None)
    np.testing.assert_allclose(outputs, normed @ params["out"]["kernel"], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["mlp", "cnn", "resnet", "transformer", "linen"])
def test_lsuv_gives_every_layer_unit_variance(model, key):
    network, inputs = MODELS[model]
    params, model_state = jax.jit(initialize(network, "lsuv").init)(key, inputs)
    layer_outputs = network.layers(params, model_state, inputs)
    kernels = {path for path in find_kernels(params) if "LSTMCell_0" not in path}
    assert kernels <= set(layer_outputs)
    for path in kernels:
        assert float(layer_outputs[path].var()) == pytest.approx(1, abs=1e-3), path


def test_lsuv_uses_normalized_inputs(key):
    """`initialize` and `with_raw_inputs` can be applied in either order."""
    network, inputs = models.mlp([4, 8, 3]), 100 + 50 * noise(64, 4)
    raw = models.with_raw_inputs(initialize(network, "lsuv"), np.float32(100), np.float32(1 / 50))
    wrapped = initialize(
        models.with_raw_inputs(network, np.float32(100), np.float32(1 / 50)), "lsuv"
    )
    assert_equal(raw.init(key, inputs), wrapped.init(key, inputs))
    for outputs in wrapped.layers(*wrapped.init(key, inputs), inputs).values():
        assert float(outputs.var()) == pytest.approx(1, abs=1e-3)


def test_layers_are_listed_in_the_order_of_execution(key):
    network, inputs = MODELS["mlp"]
    params, _ = network.init(key, inputs)
    layer_outputs = jax.jit(network.layers)(params, {}, inputs)
    assert list(layer_outputs) == [("layers", i) for i in range(10)]
    for before, after in pairwise(layer_outputs):
        layer = params["layers"][after[1]]
        expected = jnp.tanh(layer_outputs[before]) @ layer["kernel"] + layer["bias"][None]
        np.testing.assert_allclose(layer_outputs[after], expected, rtol=1e-4, atol=1e-5)
    outputs, _ = network.apply(params, {}, inputs, None)
    np.testing.assert_allclose(layer_outputs["layers", 9], outputs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("model", "listed"),
    [
        ("lstm", ["tokens", "out"]),
        ("simple cell", ["out"]),
        (
            "linen",
            ["Embed_0", "query", "key", "value", "out", "Conv_0", "LayerNorm_0", "Dense_0"],
        ),
    ],
)
def test_layers_in_recurrent_cells_are_not_listed(model, listed, key):
    network, inputs = MODELS[model]
    layer_outputs = network.layers(*network.init(key, inputs), inputs)
    assert [path[-1] for path in layer_outputs] == listed


@pytest.mark.slow
def test_fifty_layers_are_trained_with_orthogonal_and_lsuv_and_not_with_flax(digits):
    """300 steps of SGD with 32 tanh units: 50 random matrices lose almost all directions."""
    inputs = jnp.asarray((digits.train.inputs - digits.shift) * digits.scale, jnp.float32).reshape(
        -1, 64
    )
    tests = jnp.asarray((digits.test.inputs - digits.shift) * digits.scale, jnp.float32).reshape(
        -1, 64
    )
    labels, optimizer = jnp.asarray(digits.train.labels), optax.sgd(0.003)
    network = models.mlp([64, *[32] * 50, 10])
    names = ("flax", "orthogonal", "lsuv")
    starts = [initialize(network, name).init(jax.random.key(0), inputs[:256])[0] for name in names]

    def step(carry, key):
        params, state = carry
        chosen = jax.random.randint(key, (128,), 0, len(labels))

        def loss(params):
            outputs, _ = network.apply(params, {}, inputs[chosen], None)
            return optax.softmax_cross_entropy_with_integer_labels(outputs, labels[chosen]).mean()

        updates, state = optimizer.update(jax.grad(loss)(params), state)
        return (optax.apply_updates(params, updates), state), None

    @jax.jit
    @jax.vmap
    def train(params):
        (params, _), _ = lax.scan(
            step, (params, optimizer.init(params)), jax.random.split(jax.random.key(1), 300)
        )
        return network.apply(params, {}, tests, None)[0].argmax(-1)

    found = train(jax.tree.map(lambda *leaves: jnp.stack(leaves), *starts))
    accuracy = dict(zip(names, (found == digits.test.labels[None]).mean(axis=1), strict=True))
    assert accuracy["flax"] < 0.3
    assert accuracy["orthogonal"] > 0.5
    assert accuracy["lsuv"] > 0.5


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        (
            "delta_orthogonal",
            "init must not be delta_orthogonal for a model without a convolution; use orthogonal",
        ),
        (
            "recurrent",
            "init must not be recurrent for a model without a recurrent cell; use orthogonal",
        ),
        (
            "residual",
            (
                "init must not be residual for a model without residual branches, which are "
                "elements of a list"
            ),
        ),
    ],
)
def test_unsuitable_initializer_is_refused(name, sentence, key):
    network = initialize(MODELS["mlp"][0], name)
    with pytest.raises(InputError, match=sentence):
        jax.eval_shape(network.init, key, MODELS["mlp"][1])


def test_invalid_initializer_is_refused():
    network = MODELS["mlp"][0]
    with pytest.raises(
        InputError,
        match=r"init must be one of flax, .*, got 'orthoganal'; did you mean 'orthogonal'",
    ):
        initialize(network, "orthoganal")
    with pytest.raises(
        InputError, match="init must not be lsuv for a model that does not expose its layers"
    ):
        initialize(models.Model(network.init, network.apply), "lsuv")
