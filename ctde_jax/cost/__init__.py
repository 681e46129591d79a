"""Communication cost of a round, in bytes counted from the compiled program."""

from ctde_jax.cost import collectives, targets
from ctde_jax.cost.traffic import Traffic, measure, sentence, table

__all__ = ["Traffic", "collectives", "measure", "sentence", "table", "targets"]
