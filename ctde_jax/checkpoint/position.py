"""Progress of a run, stored in its checkpoints."""

from typing import NamedTuple


class Position(NamedTuple):
    """Progress of a run."""

    gone_through: int = 0
    """Number of dispatched steps, including those without examples on any device."""

    step: int = 0
    """Number of optimizer steps: those with examples on at least one device."""

    sent: float = 0.0
    """Bytes sent by each device."""

    skipped: int = 0
    """Number of rounds skipped because of NaN or infinity."""

    skipped_in_a_row: int = 0
    """Number of consecutive skipped rounds up to now."""
