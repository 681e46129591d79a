"""The schedule of a run."""

import pytest

from ctde_jax.aggregate import Strategy
from ctde_jax.rounds import cut, make_phases, rows_per_dispatch


@pytest.mark.parametrize(("row_seconds", "rows"), [(10.0, 1), (0.1, 1), (0.06, 1), (0.02, 5)])
def test_dispatch_has_as_many_rows_as_take_a_tenth_of_a_second(row_seconds, rows):
    assert rows_per_dispatch(row_seconds) == rows


@pytest.mark.parametrize(
    ("synchronous_steps", "total_steps", "phases"),
    [
        (0, 10, [(4, 0, 10)]),
        (8, 20, [(0, 0, 8), (4, 8, 20)]),
        (8, 6, [(0, 0, 6)]),
        # Equal numbers, but different objects.
        (1000, int("1000"), [(0, 0, 1000)]),
    ],
)
def test_phase_without_steps_is_left_out(synchronous_steps, total_steps, phases):
    strategy = Strategy(inner_steps=4, synchronous_steps=synchronous_steps)
    made = make_phases(strategy, total_steps, eval_every=4, row_steps=1, piece_steps=1)
    assert [(p.strategy.inner_steps, p.start, p.spans[-1].stop) for p in made] == phases


def test_dispatches_cover_every_round_of_a_piece_once():
    """The pace changes between dispatches, and a dispatch ends with its piece."""
    pieces = [("first", "indices", 5), ("second", "indices", 2)]
    pace = iter([2, 1, 4, 3])
    assert [(piece, first, last) for piece, _, first, last in cut(pieces, lambda: next(pace))] == [
        ("first", 0, 2),
        ("first", 2, 3),
        ("first", 3, 5),
        ("second", 0, 2),
    ]
