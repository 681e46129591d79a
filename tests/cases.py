"""Cases of parametrized tests."""

from collections.abc import Iterable, Sequence
from typing import Any

import pytest

from ctde_jax.config.presets import PRESETS

STRATEGY_NAMES = [name for name in PRESETS if name != "qsr"]
"""Arguments of `ctde.strategy`; the rounds of qsr depend on the learning rate of a run."""


def some(cases: Iterable[Any], *quick: Any) -> Sequence[Any]:
    """Returns all cases; all but the quick ones are slow, so the default suite leaves them out."""
    cases = list(cases)
    assert all(case in cases for case in quick), f"{quick} must be among {cases}"
    return [case if case in quick else pytest.param(case, marks=pytest.mark.slow) for case in cases]
