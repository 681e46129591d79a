"""The schedule of a run."""

import pytest

from ctde_jax.rounds import rows_per_dispatch


@pytest.mark.parametrize(("row_seconds", "rows"), [(10.0, 1), (0.1, 1), (0.06, 1), (0.02, 5)])
def test_dispatch_has_as_many_rows_as_take_a_tenth_of_a_second(row_seconds, rows):
    assert rows_per_dispatch(row_seconds) == rows
