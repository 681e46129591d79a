"""The schedule of a run."""

import pytest

from ctde_jax.aggregate import Strategy
from ctde_jax.rounds import cut, make_phases, rows_per_dispatch


@pytest.mark.parametrize(("row_seconds", "rows"), [(10.0, 1), (0.1, 1), (0.06, 1), (0.02, 5)])
def test_dispatch_has_as_many_rows_as_take_a_tenth_of_a_second(row_seconds, rows):
    assert rows_per_dispatch(row_seconds) == rows


@pytest.mark.parametrize(
    ("strategy", "total_steps", "phases"),
    [
        (Strategy(4), 10, [(4, 0, 10)]),
        (Strategy(later={8: Strategy(4)}), 20, [(0, 0, 8), (4, 8, 20)]),
        (Strategy(later={8: Strategy(4)}), 6, [(0, 0, 6)]),
        # Equal numbers, but different objects.
        (Strategy(later={1000: Strategy(4)}), int("1000"), [(0, 0, 1000)]),
        (
            Strategy(2, later={16: Strategy(8), 4: Strategy(4), 40: Strategy(8)}),
            33,
            [(2, 0, 4), (4, 4, 16), (8, 16, 33)],
        ),
    ],
)
def test_phases_follow_each_other_until_the_end(strategy, total_steps, phases):
    made = make_phases(strategy, total_steps, eval_every=4, row_steps=1, piece_steps=1)
    assert [(p.strategy.inner_steps, p.start, p.spans[-1].stop) for p in made] == phases
    before = [made[0], *made[:-1]]
    assert [each.before.inner_steps for each in made] == [e.strategy.inner_steps for e in before]


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
