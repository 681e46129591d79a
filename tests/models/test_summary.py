"""A summary has the exact numbers of parameters, shapes and FLOPs of a network."""

import jax
import numpy as np
import pytest
from flax import linen, nnx

import ctde_jax as ctde
from ctde_jax.errors import InputError
from ctde_jax.models.summary import Layer, Summary

X, Y = np.zeros((10, 8, 8, 1), np.float32), np.arange(10) % 3
IMAGES = ctde.data.from_arrays(X, Y)


class Net(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.conv = nnx.Conv(1, 3, (3, 3), padding="VALID", use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(3, rngs=rngs)
        self.out = nnx.Linear(108, 5, rngs=rngs)
        self.scale = nnx.Param(np.ones(5, np.float32))

    def __call__(self, x):
        return self.out(self.norm(self.conv(x)).reshape(len(x), -1)) * self.scale[None]


class LinenNet(linen.Module):
    @linen.compact
    def __call__(self, x, train: bool):
        x = linen.Conv(3, (3, 3), padding="VALID", use_bias=False, name="conv")(x)
        x = linen.BatchNorm(use_running_average=not train, name="norm")(x)
        x = linen.Dense(5, name="out")(x.reshape(len(x), -1))
        return x * self.param("scale", linen.initializers.ones, 5)[None]


def test_flops_and_parameters_of_an_mlp_are_a_closed_form(digits):
    found = ctde.summary(ctde.models.mlp([64, 32, 10]), digits)
    assert found.layers == [
        Layer("layers/0", "32", 64 * 32 + 32),
        Layer("layers/1", "10", 32 * 10 + 10),
    ]
    assert (found.inputs, found.output, found.state) == ("uint8[8, 8]", "10", 0)
    assert found.params == 64 * 32 + 32 + 32 * 10 + 10
    # A product and a sum for each weight, a sum for each bias, and the scaling of 64 pixels.
    assert found.flops == 2 * (64 * 32 + 32 * 10) + 32 + 10 + 2 * 64


@pytest.mark.parametrize("model", [Net, Net(rngs=nnx.Rngs(0)), LinenNet()])
def test_layers_of_a_module_have_shapes_and_parameters(model):
    found = ctde.summary(model, IMAGES)
    assert found.layers == [
        Layer("conv", "6 x 6 x 3", 27),
        Layer("norm", "6 x 6 x 3", 6),
        Layer("out", "5", 545),
        Layer("(top level)", "5", 5),
    ]
    assert found.params == sum(layer.params for layer in found.layers) == 583
    assert found.state == 6


def test_flops_of_a_convolution_are_a_closed_form():
    """3 x 3 weights at each of 6 x 6 places for each of 3 channels."""
    model = ctde.models.from_linen(linen.Conv(3, (3, 3), padding="VALID", use_bias=False))
    assert ctde.summary(model, IMAGES).flops == 2 * 9 * 36 * 3


def test_loops_are_not_counted():
    """The cost analysis counts the body of a loop once."""
    sequences = ctde.data.from_arrays(X[..., 0], Y)
    found = ctde.summary(ctde.models.rnn_classifier(8, 3, 4), sequences)
    assert found.flops is None
    assert "FLOPs not counted, because the program has loops" in str(found)
    assert "dense_h" in str(found)


class Remat(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.block = nnx.Linear(8, 8, rngs=rngs)

    def __call__(self, x):
        return nnx.remat(lambda block, x: block(x))(self.block, x[..., 0]).sum((1, 2))


class LinenScan(linen.Module):
    @linen.compact
    def __call__(self, x):
        class Step(linen.Module):
            @linen.compact
            def __call__(self, carry, x):
                return linen.Dense(8)(x) + carry, None

        scan = linen.scan(
            linen.remat(Step), variable_broadcast="params", split_rngs={"params": False}, in_axes=1
        )
        carry, _ = scan()(x[:, 0, :, 0], x[..., 0])
        return carry


@pytest.mark.parametrize(("model", "output"), [(Remat, "8 x 8"), (LinenScan(), "8")])
def test_layers_in_loops_and_under_remat_are_listed(model, output):
    """Their outputs are values of an inner trace."""
    (layer,) = ctde.summary(model, IMAGES).layers
    assert (layer.output, layer.params) == (output, 72)


def test_wrapped_models_have_the_same_layers(digits):
    network = ctde.models.mlp([64, 10])
    expected = ctde.summary(network, digits).layers
    for model in (
        ctde.models.in_bfloat16(network),
        ctde.initializers.he(network),
        ctde.models.with_raw_inputs(network, digits.shift, digits.scale),
    ):
        assert ctde.summary(model, digits).layers == expected


def test_model_of_functions_has_layers_without_shapes(digits):
    def init(key, inputs):
        return {"a": {"kernel": np.zeros((64, 1)), "bias": np.zeros(1)}, "b": np.zeros(2)}, {}

    def apply(params, model_state, inputs, key):
        return (inputs.reshape(len(inputs), -1) @ params["a"]["kernel"])[:, 0], model_state

    found = ctde.summary(ctde.models.Model(init, apply), digits)
    assert found.layers == [Layer("a", "", 65), Layer("(top level)", "", 2)]
    assert found.output == "scalar"


def test_table_has_at_most_100_columns(digits):
    layer = Layer("block/" * 40 + "[red]<b>", "3", 1_000_000)
    found = Summary([layer], "uint8[8, 8]", "3", 1_000_000, 2, 3_000)
    lines = str(found).splitlines()
    assert max(map(len, lines)) <= 100
    assert repr(found) == str(found)
    name = "".join(line.split("│")[1].strip() for line in lines if line.startswith("│"))
    assert name == f"{layer.path}model"
    assert lines[-2:] == [
        "one example, uint8[8, 8]: 3,000 FLOPs in inference (cost analysis of XLA)",
        "2 further values are model state",
    ]


def test_notebooks_show_an_html_table():
    found = Summary([Layer("<b>", "3", 1_000)], "uint8[8, 8]", "3", 1_000, 0, None)
    assert found._repr_html_() == (
        "<table><thead><tr><th>layer</th><th>output</th><th>parameters</th></tr></thead><tbody>"
        "<tr><td>&lt;b&gt;</td><td>3</td><td>1,000</td></tr>"
        "<tr><td>model</td><td>3</td><td>1,000</td></tr></tbody></table>"
        "<p>one example, uint8[8, 8]: FLOPs not counted, because the program has loops or kernels "
        "of other libraries</p>"
    )


def test_parameters_are_those_of_the_trained_model(digits):
    model = ctde.models.mlp([64, 4, 10])
    params, _ = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 64), np.float32))
    assert ctde.summary(model, digits).params == ctde.models.count_params(params)


def test_data_of_another_type_are_refused():
    with pytest.raises(InputError) as caught:
        ctde.summary(ctde.models.mlp([64, 10]), X)
    assert str(caught.value) == (
        "data must be a Dataset, such as data.digits() or data.from_arrays(...), got ndarray."
    )
