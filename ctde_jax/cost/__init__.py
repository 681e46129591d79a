"""What a round costs, in bytes and seconds."""

from ctde_jax.cost import collectives, stopwatch, targets
from ctde_jax.cost.stopwatch import Profile, Spread
from ctde_jax.cost.traffic import Traffic, measure, summary, table

__all__ = ["Profile", "Spread", "Traffic", "collectives", "measure", "stopwatch", "summary", "table", "targets"]
