"""Strategies, and the reducers, exchanges, codecs and combination rules that they consist of."""

from ctde_jax.aggregate import transformations
from ctde_jax.aggregate.base import AVERAGE, MEAN, UNCHANGED, Strategy
from ctde_jax.aggregate.codec import Codec, error_feedback, exact
from ctde_jax.aggregate.combine import Combine, average
from ctde_jax.aggregate.exchange import gathered, two_phase
from ctde_jax.aggregate.gossip import gossip
from ctde_jax.aggregate.isotropic import isotropic
from ctde_jax.aggregate.mean import hierarchical_mean, mean
from ctde_jax.aggregate.phases import by_learning_rate, quadratic_synchronization
from ctde_jax.aggregate.power_sgd import power_sgd
from ctde_jax.aggregate.private import epsilon, private
from ctde_jax.aggregate.proximal import proximal
from ctde_jax.aggregate.quantize import quantize, sign
from ctde_jax.aggregate.reducer import CutByOwner, Star, reducer
from ctde_jax.aggregate.robust import (
    centered_clipping,
    geometric_median,
    krum,
    median,
    multi_krum,
    trimmed_mean,
)
from ctde_jax.aggregate.smooth import smooth
from ctde_jax.aggregate.sparse import random_k, top_k
from ctde_jax.aggregate.streaming import streaming
from ctde_jax.aggregate.transformations import (
    Value,
    adapted,
    as_transformation,
    depends_on,
    evaluated_point,
    gradient_norm,
    has_evaluated_point,
    learning_rate,
    with_hyperparams_of,
)

__all__ = [
    "AVERAGE",
    "MEAN",
    "UNCHANGED",
    "Codec",
    "Combine",
    "CutByOwner",
    "Star",
    "Strategy",
    "Value",
    "adapted",
    "as_transformation",
    "average",
    "by_learning_rate",
    "centered_clipping",
    "depends_on",
    "epsilon",
    "error_feedback",
    "evaluated_point",
    "exact",
    "gathered",
    "geometric_median",
    "gossip",
    "gradient_norm",
    "has_evaluated_point",
    "hierarchical_mean",
    "isotropic",
    "krum",
    "learning_rate",
    "mean",
    "median",
    "multi_krum",
    "power_sgd",
    "private",
    "proximal",
    "quadratic_synchronization",
    "quantize",
    "random_k",
    "reducer",
    "sign",
    "smooth",
    "streaming",
    "top_k",
    "transformations",
    "trimmed_mean",
    "two_phase",
    "with_hyperparams_of",
]
