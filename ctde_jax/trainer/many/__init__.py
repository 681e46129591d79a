"""Training of many runs in one program: seeds, sweeps and folds."""

from ctde_jax.trainer.many import learning_rate_finder
from ctde_jax.trainer.many.arguments import name_of
from ctde_jax.trainer.many.family import Family, Outcome, Variant, describe
from ctde_jax.trainer.many.fit_many import fit_many
from ctde_jax.trainer.many.halving import train_best
from ctde_jax.trainer.many.sweep import RUNS, Sweep
from ctde_jax.trainer.many.train_many import train_many

__all__ = [
    "RUNS",
    "Family",
    "Outcome",
    "Sweep",
    "Variant",
    "describe",
    "fit_many",
    "learning_rate_finder",
    "name_of",
    "train_best",
    "train_many",
]
