"""The computation on the devices: state, gradient, round, evaluation."""

from ctde_jax.rounds import digests, exact, many, state
from ctde_jax.rounds.digests import make_digests
from ctde_jax.rounds.evaluate import Averages, make_evaluate
from ctde_jax.rounds.feed import Feed, Piece, Span, prefetched
from ctde_jax.rounds.gradient import Place, make_gradient, step_keys
from ctde_jax.rounds.reestimate import make_reestimate, of_first_steps
from ctde_jax.rounds.round import (
    make_gradient_for,
    make_local_steps,
    outer_step,
    parallel_rounds,
    replicated_gradient,
)
from ctde_jax.rounds.schedule import (
    Phase,
    count_rounds,
    cut,
    make_phases,
    rows_per_dispatch,
    unfinished,
)
from ctde_jax.rounds.sources import (
    ExampleSource,
    OnDisk,
    Resident,
    Streamed,
    indices_of,
    make_source,
)
from ctde_jax.rounds.state import named
from ctde_jax.rounds.sums import OF_THE_OPTIMIZER, Sums

__all__ = [
    "OF_THE_OPTIMIZER",
    "Averages",
    "ExampleSource",
    "Feed",
    "OnDisk",
    "Phase",
    "Piece",
    "Place",
    "Resident",
    "Span",
    "Streamed",
    "Sums",
    "count_rounds",
    "cut",
    "digests",
    "exact",
    "indices_of",
    "make_digests",
    "make_evaluate",
    "make_gradient",
    "make_gradient_for",
    "make_local_steps",
    "make_phases",
    "make_reestimate",
    "make_source",
    "many",
    "named",
    "of_first_steps",
    "outer_step",
    "parallel_rounds",
    "prefetched",
    "replicated_gradient",
    "rows_per_dispatch",
    "state",
    "step_keys",
    "unfinished",
]
