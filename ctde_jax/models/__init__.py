"""Networks, and the adapters for user-defined nnx and linen modules."""

from ctde_jax.models import fine_tuning, initializers, tasks
from ctde_jax.models.base import (
    Model,
    count_params,
    in_bfloat16,
    in_units,
    unscaled,
    with_raw_inputs,
)
from ctde_jax.models.batch_statistics import BatchStatistics
from ctde_jax.models.cnn import CNN, cnn
from ctde_jax.models.generation import generate
from ctde_jax.models.linen_modules import from_linen, split_variables
from ctde_jax.models.mlp import MLP, mlp
from ctde_jax.models.modules import as_model, module_of
from ctde_jax.models.nnx_modules import from_nnx, is_random, is_trained
from ctde_jax.models.resnet import ResNet, resnet
from ctde_jax.models.rnn import RNNClassifier, RNNLanguageModel, rnn_classifier, rnn_language_model
from ctde_jax.models.summary import Summary, summary
from ctde_jax.models.tasks import RESERVED, Task, focal, for_data, smoothed, weighted
from ctde_jax.models.transformer import Transformer, transformer
from ctde_jax.models.user_code import describe

__all__ = [
    "CNN",
    "MLP",
    "RESERVED",
    "BatchStatistics",
    "Model",
    "RNNClassifier",
    "RNNLanguageModel",
    "ResNet",
    "Summary",
    "Task",
    "Transformer",
    "as_model",
    "cnn",
    "count_params",
    "describe",
    "fine_tuning",
    "focal",
    "for_data",
    "from_linen",
    "from_nnx",
    "generate",
    "in_bfloat16",
    "in_units",
    "initializers",
    "is_random",
    "is_trained",
    "mlp",
    "module_of",
    "resnet",
    "rnn_classifier",
    "rnn_language_model",
    "smoothed",
    "split_variables",
    "summary",
    "tasks",
    "transformer",
    "unscaled",
    "weighted",
    "with_raw_inputs",
]
