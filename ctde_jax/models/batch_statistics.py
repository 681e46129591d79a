"""Over which examples batch normalization takes its mean and variance in training."""

from typing import Literal

from jax import lax

from ctde_jax.replica import AXIS, SHARD

BatchStatistics = Literal["averaged", "synchronized"]
"""Over which examples batch normalization takes its mean and variance in training.

`averaged`: over those of a device; the running averages are averaged at every aggregation. `synchronized`: over the
whole batch, so that the number of devices changes nothing; devices then talk in the midst of every step, also in steps
that they otherwise take alone. Where a batch is computed in groups, one after another, a group stands for the batch.
"""


def axes(batch_statistics: BatchStatistics) -> tuple[str, ...] | None:
    """Names the axes over which examples lie that share statistics, of those that exist where a model is applied."""

    def exists(axis: str) -> bool:
        try:
            lax.axis_size(axis)
        except NameError:
            return False
        return True

    axes = (SHARD, AXIS) if batch_statistics == "synchronized" else (SHARD,)
    return tuple(filter(exists, axes)) or None
