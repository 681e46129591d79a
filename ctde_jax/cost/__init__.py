"""Communication cost of a round, in bytes counted from the compiled program."""

from ctde_jax.cost import collectives, targets
from ctde_jax.cost.traffic import Traffic, measure, sentence, sentence_of_run, table

__all__ = ["Traffic", "collectives", "measure", "sentence", "sentence_of_run", "table", "targets"]
