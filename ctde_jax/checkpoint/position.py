"""How far a run is; checkpoints hold it."""

from typing import NamedTuple


class Position(NamedTuple):
    """How far a run is."""

    gone_through: int = 0
    """Steps, also such for which nobody had examples."""

    step: int = 0
    """Those for which somebody had: optimizer steps."""

    sent: float = 0.0
    """Bytes by each device."""

    skipped: int = 0
    """Rounds that were left out because they were not finite."""

    skipped_in_a_row: int = 0
    """How many of them came last."""
