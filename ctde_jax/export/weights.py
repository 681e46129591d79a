"""The parameters by name, and how they make a perceptron, where they do."""

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
    """Names the parameters, the model's state, and what brings raw inputs to the model's scale.

    Raises:
        InputError: Two arrays have the same name, because a key contains a slash.
    """
    center = {"params": trained.params, "model_state": trained.model_state}
    arrays = named(center)
    if len(arrays) < len(jax.tree.leaves(center)):
        raise InputError(
            "trained", "must have a different name for each parameter; use keys without slashes."
        )
    scaling = {perceptron.SHIFT: data.shift, perceptron.SCALE: data.scale}
    return {name: np.asarray(array, order="C") for name, array in {**arrays, **scaling}.items()}


def to_safetensors(weights: Mapping[str, np.ndarray]) -> bytes:
    """Writes arrays by name.

    Raises:
        InputError: The format does not have the dtype of an array.
    """
    try:
        return save(dict(weights))
    except SafetensorError as error:
        dtypes = ", ".join(sorted({str(array.dtype) for array in weights.values()}))
        rule = f"must have parameters and state of dtypes that the safetensors format has, got {dtypes}"
        raise InputError(
            "trained", f"{rule}; split complex arrays into real and imaginary parts."
        ) from error


def find_layers(
    trained: Trained, weights: Mapping[str, np.ndarray], inputs: np.ndarray
) -> Layers | None:
    """Finds out whether a model is dense layers one after another, with one activation between them.

    Its layers say in which order they run and what their kernels are; which activation it is, the outputs tell.

    Args:
        trained: The model.
        weights: As `gather` names them.
        inputs: Some examples, `[examples, ...]`.

    Returns:
        How numpy computes the model, or None where it is something else.
    """
    if trained.model.layers is None or jax.tree.leaves(trained.model_state):
        return None
    in_order = jax.eval_shape(trained.model.layers, trained.params, trained.model_state, inputs)
    kernels = tuple("/".join(["params", *map(str, path), "kernel"]) for path in in_order)
    biases = {name.removesuffix("kernel") + "bias" for name in kernels}
    params = {name for name in weights if name.startswith("params/")}
    if (
        not kernels
        or not params <= {*kernels, *biases}
        or any(weights[name].ndim != 2 for name in kernels)
    ):
        return None
    if any(weights[name].dtype != np.float32 for name in params):
        return None
    widths = [prod(inputs.shape[1:]), *(weights[name].shape[1] for name in kernels)]
    if any(len(weights[name]) != width for name, width in zip(kernels, widths, strict=False)):
        return None
    right = trained.predict(inputs)
    for layers in (Layers(activation, kernels) for activation in perceptron.ACTIVATIONS):
        found = perceptron.make_predict(layers, weights, inputs.shape[1:])(inputs)
        if found.shape == right.shape and np.allclose(found, right, rtol=1e-4, atol=1e-4):
            return layers
    return None
