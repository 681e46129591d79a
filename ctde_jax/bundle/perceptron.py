"""Runs a multilayer perceptron, a chain of dense layers, with numpy alone."""

from collections.abc import Callable, Mapping, Sequence
from math import prod

import numpy as np

from ctde_jax.bundle.card import Activation, Layers

SHIFT = "inputs/shift"
SCALE = "inputs/scale"
"""Names of the input scaling in the weights.

`(inputs - shift) * scale` is computed in the dtype of the scale, int32 for integer features.
"""

MEAN = "targets/mean"
DEVIATION = "targets/deviation"
"""Names of the output scaling in the weights, float32 `[1, targets]`; only of regression.

The outputs are those of the last layer, times the deviation, plus the mean.
"""


def _gelu(x: np.ndarray) -> np.ndarray:
    # The tanh approximation, the default of `jax.nn.gelu`; 0.79788... is sqrt(2 / pi).
    return (
        np.float32(0.5)
        * x
        * (1 + np.tanh(np.float32(0.7978845608028654) * (x + np.float32(0.044715) * x**3)))
    )


def _silu(x: np.ndarray) -> np.ndarray:
    # In float32, exp overflows from 89 on.
    return x / (1 + np.exp(-np.maximum(x, -80)))


ACTIVATIONS: Mapping[Activation, Callable[[np.ndarray], np.ndarray]] = {
    "tanh": np.tanh,
    "relu": lambda x: np.maximum(x, 0),
    "gelu": _gelu,
    "silu": _silu,
}


def make_predict(
    layers: Layers, weights: Mapping[str, np.ndarray], input_shape: Sequence[int]
) -> Callable[[np.ndarray], np.ndarray]:
    """Returns the function from raw inputs to outputs, float32 `[examples, outputs]`.

    Args:
        layers: Activation and names of the kernels.
        weights: Arrays by name: kernels, biases, and the scaling of inputs and outputs.
        input_shape: Shape of one example.

    Raises:
        KeyError: If the weights lack the scaling or a kernel.
        ValueError: If the scaling does not match `input_shape` or the outputs, or a layer does not
            match the previous one.
    """
    activate = ACTIVATIONS[layers.activation]
    shift = weights[SHIFT]
    scale = weights[SCALE]
    dense = [(weights[name], weights.get(_bias(name))) for name in layers.kernels]

    # Check all shapes here and not in `predict`; broadcasting would hide some mismatches.
    if any(
        np.broadcast_shapes(each.shape, (1, *input_shape)) != (1, *input_shape)
        for each in (shift, scale)
    ):
        raise ValueError("the shape of the inputs does not match that of the shift or the scale")
    width = outputs = prod(input_shape)
    for kernel, bias in dense:
        if (
            kernel.ndim != 2
            or len(kernel) != outputs
            or (bias is not None and bias.shape != kernel.shape[1:])
        ):
            raise ValueError("the shape of a layer does not match the previous layer")
        outputs = kernel.shape[1]
    units = [weights[name] for name in (DEVIATION, MEAN) if name in weights]
    if units and [each.shape for each in units] != 2 * [(1, outputs)]:
        raise ValueError("the shape of the units of the targets does not match the last layer")

    def predict(inputs: np.ndarray) -> np.ndarray:
        scaled = (inputs.astype(scale.dtype) - shift) * scale
        x = scaled.astype(np.float32, copy=False).reshape(len(inputs), width)
        # The activation is between two layers, so there is none before the first.
        for number, (kernel, bias) in enumerate(dense):
            x = (activate(x) if number else x) @ kernel
            x = x if bias is None else x + bias
        return x * units[0] + units[1] if units else x

    return predict


def _bias(kernel: str) -> str:
    return kernel.removesuffix("kernel") + "bias"
