"""The networks of Flax's tutorials and the operations of other common networks run in ONNX Runtime.

Each one is converted separately, without training, and compared with Flax at batch sizes of 1, 3,
7 and 64.
"""

from dataclasses import replace

import jax
import numpy as np
import optax
import pytest
from cases import some
from flax import linen, nnx
from jax import lax
from jax import numpy as jnp

import ctde_jax as ctde
from ctde_jax import bundle as node
from ctde_jax.bundle.parity import relative_difference
from ctde_jax.errors import InputError
from ctde_jax.export import weights
from ctde_jax.export.onnx import to_onnx
from ctde_jax.export.program import make_program
from ctde_jax.models.base import Model

PICTURE, SEQUENCE, VECTOR, TOKENS = (8, 8, 3), (6, 5), (7,), (6,)


def layer(module, shape=PICTURE, dtype: type = np.float32, **options):
    """Returns the shape, dtype and function of a linen layer."""
    rngs = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    variables = module.init(rngs, jnp.zeros((2, *shape), dtype), **options)
    return shape, dtype, lambda x: module.apply(variables, x, **options)


def stack(make, shape=PICTURE, dtype: type = np.float32):
    """Returns the shape, dtype and function of an nnx module; each trace merges a new copy."""
    graph, state = nnx.split(make(nnx.Rngs(0)))
    return shape, dtype, lambda x: nnx.merge(graph, state, copy=True)(x)


def plain(function, shape=VECTOR, dtype: type = np.float32):
    return shape, dtype, function


class TutorialCNN(nnx.Module):
    """The network of https://flax.readthedocs.io/en/stable/mnist_tutorial.html."""

    def __init__(self, rngs):
        self.conv1, self.conv2 = (
            nnx.Conv(1, 8, (3, 3), rngs=rngs),
            nnx.Conv(8, 16, (3, 3), rngs=rngs),
        )
        self.norm1, self.norm2 = nnx.BatchNorm(8, rngs=rngs), nnx.BatchNorm(16, rngs=rngs)
        self.dropout1, self.dropout2 = nnx.Dropout(0.025, rngs=rngs), nnx.Dropout(0.025, rngs=rngs)
        self.linear1, self.linear2 = nnx.Linear(784, 32, rngs=rngs), nnx.Linear(32, 10, rngs=rngs)
        self.eval()

    def __call__(self, x):
        x = nnx.avg_pool(nnx.relu(self.norm1(self.dropout1(self.conv1(x)))), (2, 2), strides=(2, 2))
        x = nnx.avg_pool(nnx.relu(self.norm2(self.conv2(x))), (2, 2), strides=(2, 2))
        return self.linear2(nnx.relu(self.dropout2(self.linear1(x.reshape(x.shape[0], -1)))))


class LinenCNN(linen.Module):
    """The network of https://github.com/google/flax/tree/main/examples/mnist, with max pooling."""

    @linen.compact
    def __call__(self, x):
        x = linen.max_pool(linen.relu(linen.Conv(8, (3, 3))(x)), (2, 2), strides=(2, 2))
        x = linen.max_pool(
            linen.relu(linen.Conv(16, (3, 3))(x)), (3, 3), strides=(2, 2), padding="SAME"
        )
        x = x.reshape((x.shape[0], -1))
        return linen.log_softmax(linen.Dense(10)(linen.relu(linen.Dense(32)(x))))


class Block(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(9, 8, rngs=rngs)
        self.norm1, self.norm2 = nnx.LayerNorm(8, rngs=rngs), nnx.LayerNorm(8, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(num_heads=2, in_features=8, decode=False, rngs=rngs)
        self.wide, self.narrow = nnx.Linear(8, 16, rngs=rngs), nnx.Linear(16, 8, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens)
        x = x + self.attention(self.norm1(x), mask=nnx.make_causal_mask(tokens))
        x = x + self.narrow(nnx.gelu(self.wide(self.norm2(x))))
        return self.embed.attend(x)  # with the tied weights


class Decoder(linen.Module):
    @linen.compact
    def __call__(self, x):
        x = linen.relu(linen.Dense(4 * 4 * 8)(x)).reshape(-1, 4, 4, 8)
        x = linen.relu(linen.ConvTranspose(4, (3, 3), strides=(2, 2))(x))
        return linen.sigmoid(linen.ConvTranspose(1, (4, 4), strides=(2, 2))(x))


def pooled(pool, window, strides, padding, shape=PICTURE):
    return plain(lambda x: pool(x, window, strides=strides, padding=padding), shape)


def windows(initial, reducer, window=(1, 2, 2, 1), **options):
    defaults = {"window_strides": (1, 2, 2, 1), "padding": "SAME"}
    return plain(
        lambda x: lax.reduce_window(x, initial, reducer, window, **(defaults | options)), PICTURE
    )


CASES = {
    "nnx tutorial CNN": lambda: stack(TutorialCNN, (28, 28, 1)),
    "linen tutorial CNN": lambda: layer(LinenCNN(), (28, 28, 1)),
    "transformer block": lambda: stack(Block, TOKENS, np.int32),
    "nnx LSTM": lambda: stack(lambda rngs: nnx.RNN(nnx.LSTMCell(5, 4, rngs=rngs)), SEQUENCE),
    "nnx GRU": lambda: stack(lambda rngs: nnx.RNN(nnx.GRUCell(5, 4, rngs=rngs)), SEQUENCE),
    "linen LSTM": lambda: layer(linen.RNN(linen.LSTMCell(4)), SEQUENCE),
    "linen GRU": lambda: layer(linen.RNN(linen.GRUCell(4)), SEQUENCE),
    "linen ConvLSTM": lambda: layer(linen.RNN(linen.ConvLSTMCell(2, (3, 3))), (3, 4, 4, 2)),
    "bidirectional GRU": lambda: layer(
        linen.Bidirectional(linen.RNN(linen.GRUCell(4)), linen.RNN(linen.GRUCell(4))), SEQUENCE
    ),
    "VAE decoder": lambda: layer(Decoder(), VECTOR),
    "depthwise convolution": lambda: layer(linen.Conv(6, (3, 3), feature_group_count=3)),
    "dilated convolution": lambda: layer(linen.Conv(4, (3, 3), kernel_dilation=2, padding="VALID")),
    "causal convolution": lambda: layer(linen.Conv(4, (3,), padding="CAUSAL"), SEQUENCE),
    "group norm": lambda: layer(linen.GroupNorm(None, 3)),
    "instance norm": lambda: layer(linen.InstanceNorm()),
    "RMS norm": lambda: layer(linen.RMSNorm()),
    "attention with normalized keys": lambda: layer(
        linen.MultiHeadAttention(num_heads=2, normalize_qk=True), (5, 16)
    ),
    **{
        f"{name} pool {window} {strides} {padding}": (
            lambda arguments=(pool, window, strides, padding): pooled(*arguments)
        )
        for name, pool in {"max": nnx.max_pool, "avg": nnx.avg_pool, "min": nnx.min_pool}.items()
        for window, strides, padding in [
            ((2, 2), None, "VALID"),
            ((3, 3), (2, 2), "SAME"),
            ((3, 2), (1, 2), ((1, 0), (1, 1))),
            ((8, 8), None, "VALID"),
        ]
    },
    "average pool that excludes padding": lambda: plain(
        lambda x: linen.avg_pool(x, (3, 3), (2, 2), "SAME", count_include_pad=False), PICTURE
    ),
    "max pool of sequences": lambda: pooled(nnx.max_pool, (3,), (2,), "SAME", SEQUENCE),
    "max pool of volumes": lambda: pooled(nnx.max_pool, (2, 2, 2), (2, 2, 2), "SAME", (5, 4, 6, 2)),
    "avg pool of volumes": lambda: pooled(nnx.avg_pool, (2, 2, 2), (2, 2, 2), "SAME", (5, 4, 6, 2)),
    "max pool with initial value 0": lambda: windows(0.0, lax.max),
    "product pool": lambda: windows(1.0, lax.mul),
    "log-sum-exp pool": lambda: windows(-jnp.inf, jnp.logaddexp),
    "dilated max pool": lambda: windows(
        -jnp.inf, lax.max, base_dilation=(1, 2, 1, 1), window_dilation=(1, 2, 3, 1), padding="VALID"
    ),
    "sums over channels": lambda: windows(0.0, lax.add, (1, 1, 1, 3), window_strides=(1, 1, 1, 1)),
    "max pool of integers": lambda: plain(
        lambda x: lax.reduce_window(x, -(2**31), lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID"),
        PICTURE,
        np.int32,
    ),
    "max pool in a loop": lambda: plain(
        lambda x: lax.fori_loop(
            0, 3, lambda i, y: linen.max_pool(y, (3, 3), (1, 1), "SAME") * 0.9 + i, x
        ),
        PICTURE,
    ),
    "max pool under remat": lambda: plain(
        jax.checkpoint(lambda x: linen.max_pool(x, (2, 2), (2, 2))), PICTURE
    ),
    "cumsum": lambda: plain(lambda x: jnp.cumsum(x, 1), SEQUENCE),
    "cumprod": lambda: plain(lambda x: jnp.cumprod(x, 1), SEQUENCE),
    "cumprod in reverse": lambda: plain(lambda x: lax.cumprod(x, 1, reverse=True), SEQUENCE),
    "associative scan": lambda: plain(
        lambda x: lax.associative_scan(jnp.multiply, x, axis=1), SEQUENCE
    ),
    "one hot": lambda: plain(lambda x: jax.nn.one_hot(x % 5, 5), TOKENS, np.int32),
    "mod": lambda: plain(lambda x: jnp.mod(x, 0.7)),
    "padding": lambda: plain(lambda x: jnp.pad(x, ((0, 0), (2, 1), (0, 2))), SEQUENCE),
    "edge padding": lambda: plain(
        lambda x: jnp.pad(x, ((0, 0), (2, 1), (1, 2)), mode="edge"), SEQUENCE
    ),
    "padding, negative and inside": lambda: plain(
        lambda x: lax.pad(x, 0.5, ((0, 0, 0), (-1, 2, 1), (1, -1, 2))), SEQUENCE
    ),
    "stack": lambda: plain(lambda x: jnp.stack([x, 2 * x], 1)),
    "tile": lambda: plain(lambda x: jnp.tile(x, (1, 3))),
    "slice at a computed index": lambda: plain(
        jax.vmap(lambda row: lax.dynamic_slice_in_dim(row, jnp.argmax(row), 3))
    ),
    "branch by example": lambda: plain(
        jax.vmap(lambda row: lax.switch(jnp.argmax(row) % 3, [jnp.sin, jnp.cos, jnp.tanh], row))
    ),
    "interpolation": lambda: plain(lambda x: jnp.interp(x, jnp.arange(4.0), jnp.arange(4.0) ** 2)),
    "sort": lambda: plain(lambda x: jnp.sort(x, -1)),
    "top k": lambda: plain(lambda x: lax.top_k(x, 3)[0]),
    "resize": lambda: plain(
        lambda x: jax.image.resize(x, (x.shape[0], 16, 5, 3), "bilinear"), PICTURE
    ),
    "minus the batch mean": lambda: plain(lambda x: x - x.mean(0, keepdims=True)),
    "scalar inputs": lambda: plain(lambda x: jnp.stack([x, x**2], -1), ()),
    "scalar outputs": lambda: plain(lambda x: x.sum(-1)),
}


@pytest.mark.parametrize("name", some(CASES, "linen tutorial CNN", "max pool in a loop", "cumprod"))
def test_onnx_runtime_computes_the_same_as_flax(name):
    runtime = pytest.importorskip("onnxruntime")
    shape, dtype, function = CASES[name]()
    program = make_program(lambda x: [function(x)], jax.ShapeDtypeStruct(shape, dtype))
    content = to_onnx(program, ["inputs"], ["outputs"], {})
    session = runtime.InferenceSession(content, providers=["CPUExecutionProvider"])
    rng, reference = np.random.default_rng(0), jax.jit(function)
    for examples in (1, 3, 7, 64):
        size = (examples, *shape)
        x = (
            rng.normal(size=size).astype(dtype)
            if dtype == np.float32
            else rng.integers(0, 9, size).astype(dtype)
        )
        (found,) = session.run(None, {"inputs": x})
        assert relative_difference(found, np.asarray(reference(x))) <= 1e-5


@pytest.mark.parametrize(
    "formats", [["onnx"], pytest.param(["onnx", "onnx-int8"], marks=pytest.mark.slow)]
)
def test_max_pool_is_exported_to_onnx_and_runs_from_its_bundle(formats, tmp_path):

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.conv, self.out = nnx.Conv(1, 4, (3, 3), rngs=rngs), nnx.Linear(64, 3, rngs=rngs)

        def __call__(self, x):
            x = nnx.max_pool(nnx.relu(self.conv(x)), (2, 2), strides=(2, 2))
            return self.out(x.reshape(x.shape[0], -1))

    rng = np.random.default_rng(0)
    data = ctde.data.from_arrays(
        rng.integers(0, 255, (200, 8, 8, 1)).astype(np.uint8), rng.integers(0, 3, 200)
    )
    trained = _fit(ctde.models.from_nnx(lambda rngs: Net(rngs)), data)
    written = ctde.write_bundle(trained, data, tmp_path / "bundle", formats, show=False)
    assert written.left_out == {}
    inputs = np.asarray(data.test.inputs)
    np.testing.assert_allclose(
        node.load(written.bundle, "onnx")(inputs), trained.predict(inputs), atol=1e-5
    )


def _fit(model, data, **options):
    options = {
        "devices": ctde.devices.start(1),
        "batch_size": 20,
        "steps": 3,
        "show": False,
    } | options
    return ctde.fit(model, data, optax.adam(0.01), **options)


@pytest.fixture(scope="module")
def perceptron():
    rng = np.random.default_rng(0)
    data = ctde.data.from_arrays(
        rng.normal(size=(100, 4)).astype(np.float32), rng.integers(0, 3, 100)
    )
    return _fit(ctde.models.mlp([4, 3]), data), data


def _with(trained, change):
    """Returns the trained model with changed outputs."""
    apply = trained.model.apply

    def changed(params, model_state, inputs, key):
        outputs, model_state = apply(params, model_state, inputs, key)
        return change(outputs), model_state

    return replace(trained, model=Model(trained.model.init, changed))


def _measured(trained, data):
    """Adds the test row with which an export compares."""
    row = {"split": "test", "step": trained.step, **trained.evaluate(data.test)}
    return replace(trained, history=[row])


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            lambda y: {"logits": y, "hidden": y},
            "must return one array to be exported, got a dict of 2 arrays",
        ),
        (lambda y: (y,), "must return one array to be exported, got a tuple of 1 arrays"),
        (
            lambda y: y.argmax(-1),
            r"must return float32 \[examples, ...\] to be exported, got int32 \[2\] for 2",
        ),
        (
            lambda y: y.sum(0),
            r"must return float32 \[examples, ...\] to be exported, got float32 \[3\] for 2",
        ),
    ],
)
def test_unsupported_outputs_are_refused(change, sentence, perceptron, tmp_path):
    trained, data = perceptron
    with pytest.raises(InputError, match=sentence):
        ctde.write_bundle(_with(trained, change), data, tmp_path / "bundle", show=False)
    assert not [*tmp_path.iterdir()]


@pytest.mark.slow
def test_inaccurate_or_unsupported_format_is_omitted_with_a_reason(perceptron, tmp_path):
    """The inverse error function is less accurate in ONNX; singular values cannot be converted."""
    trained, data = perceptron
    inexact = _measured(_with(trained, lambda y: lax.erf_inv(jnp.tanh(3 * y))), data)
    written = ctde.write_bundle(inexact, data, tmp_path / "wrong", ["onnx", "jax"], show=False)
    assert "jax" in written.bundle.card.artifacts
    assert "onnx" in written.bundle.card.artifacts or "differs by" in written.left_out["onnx"]
    unsupported = _with(
        trained,
        lambda y: jnp.linalg.svd(y[:, :, None] * y[:, None] + jnp.eye(3)[None], compute_uv=False),
    )
    written = ctde.write_bundle(
        _measured(unsupported, data), data, tmp_path / "none", ["onnx", "jax"], show=False
    )
    assert written.left_out == {
        "onnx": "jax2onnx cannot convert the model (svd currently supports rank-2 inputs only)"
    }


def test_exported_parameters_keep_their_shapes_and_dtypes(perceptron, tmp_path):
    """Scalars have no axes; integers, bfloat16 and complex numbers keep their dtype."""
    trained, data = perceptron
    params = {
        "gain": np.float32(2),
        "table": np.arange(4, dtype=np.int32).reshape(2, 2).T,
        "half": np.ones(3, jnp.bfloat16),
        "phase": np.ones(2, np.complex64),
        "odd name, with \u00fc": np.zeros(1, np.float32),
    }

    def apply(params, model_state, inputs, key):
        weight = (
            params["gain"] + params["half"].sum().astype(jnp.float32) + params["phase"].real.sum()
        )
        return (inputs * weight)[:, :3] + params["table"].sum(), model_state

    other = _measured(
        replace(trained, params=params, model_state={}, model=Model(trained.model.init, apply)),
        data,
    )
    written = ctde.write_bundle(other, data, tmp_path / "bundle", ["onnx", "jax"], show=False)
    assert written.left_out == {}
    stored = weights.gather(other, data)
    for name, array in params.items():
        assert (stored[f"params/{name}"].shape, stored[f"params/{name}"].dtype) == (
            array.shape,
            array.dtype,
        )
        np.testing.assert_array_equal(stored[f"params/{name}"], array)


def test_parameters_with_the_same_name_are_refused(perceptron, tmp_path):
    trained, data = perceptron
    one = np.ones(1, np.float32)
    other = replace(
        trained, params={"a/b": one, "a": {"b": one}}, model=Model(trained.model.init, _three)
    )
    other = _measured(other, data)
    with pytest.raises(
        InputError, match="must have a different name for each parameter; use keys without slashes"
    ):
        ctde.write_bundle(other, data, tmp_path / "bundle", ["jax"], show=False)


def _three(params, model_state, inputs, key):
    return inputs[:, :3] * params["a/b"][None], model_state
