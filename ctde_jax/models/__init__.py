"""Networks, and the two doors through which a network of the user's own comes in."""

from ctde_jax.models.base import Model, count_params, in_bfloat16, unscaled, with_raw_inputs
from ctde_jax.models.batch_statistics import BatchStatistics
from ctde_jax.models.cnn import CNN, cnn
from ctde_jax.models.linen_modules import from_linen
from ctde_jax.models.mlp import MLP, mlp
from ctde_jax.models.modules import as_model
from ctde_jax.models.nnx_modules import from_nnx
from ctde_jax.models.resnet import ResNet, resnet
from ctde_jax.models.rnn import RNNClassifier, RNNLanguageModel, rnn_classifier, rnn_language_model
from ctde_jax.models.transformer import Transformer, transformer

__all__ = [
    "CNN",
    "MLP",
    "BatchStatistics",
    "Model",
    "RNNClassifier",
    "RNNLanguageModel",
    "ResNet",
    "Transformer",
    "as_model",
    "cnn",
    "count_params",
    "from_linen",
    "from_nnx",
    "in_bfloat16",
    "mlp",
    "resnet",
    "rnn_classifier",
    "rnn_language_model",
    "transformer",
    "unscaled",
    "with_raw_inputs",
]
