"""Ways for replicas to agree: a strategy, and the reducers that it is made of."""

from ctde_jax.aggregate.base import Strategy
from ctde_jax.aggregate.mean import mean

__all__ = ["Strategy", "mean"]
