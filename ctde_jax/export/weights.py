"""Parameters by name, and the layers of models that the numpy runtime can execute."""

from collections.abc import Mapping
from math import prod

import jax
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save

from ctde_jax.bundle import Layers, perceptron
from ctde_jax.data import Dataset
from ctde_jax.errors import InputError
from ctde_jax.rounds import named
from ctde_jax.trainer import Trained

Weights = dict[str, np.ndarray]


def gather(trained: Trained, data: Dataset) -> Weights:
    """Collects parameters, model state, and the scaling of inputs and targets by name.

    Args:
        trained: The model.
        data: The data set that it was trained on.

    Returns:
        Contiguous numpy arrays; those of the model have names such as `params/layers/0/kernel`.

    Raises:
        InputError: Two arrays have the same name, because a key contains a slash.
    """
    center = {"params": trained.params, "model_state": trained.model_state}

    # Leaves with the same name collapse in the dictionary.
    arrays = named(center)
    if len(arrays) < len(jax.tree.leaves(center)):
        raise InputError(
            "trained", "must have a different name for each parameter; use keys without slashes."
        )

    # Nodes read raw inputs, and return targets in their units, so the weights include the scaling.
    scaling = {perceptron.SHIFT: data.shift, perceptron.SCALE: data.scale}
    if trained.task.units is not None:
        scaling[perceptron.MEAN], scaling[perceptron.DEVIATION] = trained.task.units
    return {name: np.asarray(array, order="C") for name, array in {**arrays, **scaling}.items()}


def to_safetensors(weights: Mapping[str, np.ndarray]) -> bytes:
    """Serializes arrays by name in the safetensors format.

    Args:
        weights: Contiguous arrays by name.

    Returns:
        The content of the file.

    Raises:
        InputError: The format does not support the dtype of an array.
    """
    try:
        return save(dict(weights))
    except SafetensorError as error:
        dtypes = ", ".join(sorted({str(array.dtype) for array in weights.values()}))
        rule = (
            "must have parameters and state of dtypes that the safetensors format supports, "
            f"got {dtypes}"
        )
        raise InputError(
            "trained", f"{rule}; split complex arrays into real and imaginary parts."
        ) from error


def find_layers(
    trained: Trained, weights: Mapping[str, np.ndarray], inputs: np.ndarray
) -> Layers | None:
    """Detects whether a model is a chain of dense layers with one activation between them.

    `Model.layers` gives the order and the kernels of the layers. Activations are tried until the
    outputs match those of the model.

    Args:
        trained: The model.
        weights: Arrays by name, from `gather`.
        inputs: Some raw examples, `[examples, ...]`.

    Returns:
        The layers and their activation, or None if the model is not such a chain.
    """
    # A perceptron has no state, and its parameters are the kernels and biases of its layers.
    if trained.model.layers is None or jax.tree.leaves(trained.model_state):
        return None
    in_order = jax.eval_shape(trained.model.layers, trained.params, trained.model_state, inputs)
    named = ("/".join(["params", *map(str, path), "kernel"]) for path in in_order)
    kernels = tuple(name for name in named if name in weights)
    biases = {name.removesuffix("kernel") + "bias" for name in kernels}
    params = {name for name in weights if name.startswith("params/")}
    if (
        not kernels
        or not params <= {*kernels, *biases}
        or any(weights[name].ndim != 2 for name in kernels)
    ):
        return None

    # The numpy runtime computes in float32.
    if any(weights[name].dtype != np.float32 for name in params):
        return None

    # The input width of each kernel is the output width of the layer before it.
    widths = [prod(inputs.shape[1:]), *(weights[name].shape[1] for name in kernels)]
    if any(len(weights[name]) != width for name, width in zip(kernels, widths, strict=False)):
        return None

    # Try every activation. With other operations between the layers, such as a skip connection, no
    # activation matches.
    expected = trained.predict(inputs)
    mean, deviation = weights.get(perceptron.MEAN, 0), weights.get(perceptron.DEVIATION, 1)
    # Targets are compared as the network computes them; their units add the rounding of the mean.
    tolerance = 1e-4 + 1e-6 * np.abs(mean) / deviation
    for layers in (Layers(activation, kernels) for activation in perceptron.ACTIVATIONS):
        found = perceptron.make_predict(layers, weights, inputs.shape[1:])(inputs)
        if found.shape == expected.shape and np.allclose(
            (found - mean) / deviation, (expected - mean) / deviation, rtol=1e-4, atol=tolerance
        ):
            return layers
    return None
