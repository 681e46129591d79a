"""Training of many runs in one program: seeds, sweeps and folds."""

from ctde_jax.trainer.many import learning_rate_finder
from ctde_jax.trainer.many.family import Family, Outcome, Variant, describe
from ctde_jax.trainer.many.fit_many import check_seeds, combine, fit_many, name_of, train_many
from ctde_jax.trainer.many.sweep import RUNS, Sweep

__all__ = [
    "RUNS",
    "Family",
    "Outcome",
    "Sweep",
    "Variant",
    "check_seeds",
    "combine",
    "describe",
    "fit_many",
    "learning_rate_finder",
    "name_of",
    "train_many",
]
