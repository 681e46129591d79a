"""What the devices compute: state, gradient, round, evaluation."""

from ctde_jax.rounds import guard, state
from ctde_jax.rounds.evaluate import Averages, make_evaluate
from ctde_jax.rounds.feed import Piece, Span, make_feed, shapes, steps_a_piece
from ctde_jax.rounds.gradient import SHARDS, Sums, check_exact_model, make_gradient
from ctde_jax.rounds.guard import make_look
from ctde_jax.rounds.reestimate import make_reestimate, of_first_steps
from ctde_jax.rounds.round import parallel_rounds
from ctde_jax.rounds.schedule import cut, make_phases, rows_a_dispatch, unfinished
from ctde_jax.rounds.state import named

__all__ = [
    "SHARDS",
    "Averages",
    "Piece",
    "Span",
    "Sums",
    "check_exact_model",
    "cut",
    "guard",
    "make_evaluate",
    "make_feed",
    "make_gradient",
    "make_look",
    "make_phases",
    "make_reestimate",
    "named",
    "of_first_steps",
    "parallel_rounds",
    "rows_a_dispatch",
    "shapes",
    "state",
    "steps_a_piece",
    "unfinished",
]
