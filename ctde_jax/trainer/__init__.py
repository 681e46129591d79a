"""Training on the host: checks of the arguments, the training loop, logs and results."""

from ctde_jax.trainer import batch_size_finder, picture, stopwatch, trackers
from ctde_jax.trainer.beginning import init_arguments, train_key, warmed
from ctde_jax.trainer.best import Best
from ctde_jax.trainer.callbacks import AnyCallback, Callback, open_callbacks
from ctde_jax.trainer.claim import claim
from ctde_jax.trainer.contestant import Spread
from ctde_jax.trainer.fit import fit, train
from ctde_jax.trainer.history import Row, read_rows
from ctde_jax.trainer.loading import load
from ctde_jax.trainer.log import console, open_log, plot_curves
from ctde_jax.trainer.many import (
    RUNS,
    Family,
    Outcome,
    Sweep,
    Variant,
    describe,
    fit_many,
    learning_rate_finder,
    name_of,
    train_best,
    train_many,
)
from ctde_jax.trainer.meter import Clock
from ctde_jax.trainer.plan import line, plan, plan_rows
from ctde_jax.trainer.record import Record
from ctde_jax.trainer.reports import Calibration, ClassMetrics, Estimate, Report, TargetMetrics
from ctde_jax.trainer.rollback import SCALED
from ctde_jax.trainer.run import prepare_folder
from ctde_jax.trainer.stop import Stop, deferred
from ctde_jax.trainer.stopwatch import Profile
from ctde_jax.trainer.trained import Trained, accepts
from ctde_jax.trainer.training import Saving, Training, in_stored_units

__all__ = [
    "RUNS",
    "SCALED",
    "AnyCallback",
    "Best",
    "Calibration",
    "Callback",
    "ClassMetrics",
    "Clock",
    "Estimate",
    "Family",
    "Outcome",
    "Profile",
    "Record",
    "Report",
    "Row",
    "Saving",
    "Spread",
    "Stop",
    "Sweep",
    "TargetMetrics",
    "Trained",
    "Training",
    "Variant",
    "accepts",
    "batch_size_finder",
    "claim",
    "console",
    "deferred",
    "describe",
    "fit",
    "fit_many",
    "in_stored_units",
    "init_arguments",
    "learning_rate_finder",
    "line",
    "load",
    "name_of",
    "open_callbacks",
    "open_log",
    "picture",
    "plan",
    "plan_rows",
    "plot_curves",
    "prepare_folder",
    "read_rows",
    "stopwatch",
    "trackers",
    "train",
    "train_best",
    "train_key",
    "train_many",
    "warmed",
]
