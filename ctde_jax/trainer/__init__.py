"""Training on the host: checks of the arguments, the training loop, logs and results."""

from ctde_jax.trainer import picture, stopwatch, trackers
from ctde_jax.trainer.callbacks import Callback
from ctde_jax.trainer.fit import fit, train
from ctde_jax.trainer.log import Row, console, plot_curves, read_rows
from ctde_jax.trainer.plan import plan
from ctde_jax.trainer.rollback import SCALED
from ctde_jax.trainer.stopwatch import Profile, Spread
from ctde_jax.trainer.trained import Trained, accepts
from ctde_jax.trainer.training import Saving, Training, in_stored_units

__all__ = [
    "SCALED",
    "Callback",
    "Profile",
    "Row",
    "Saving",
    "Spread",
    "Trained",
    "Training",
    "accepts",
    "console",
    "fit",
    "in_stored_units",
    "picture",
    "plan",
    "plot_curves",
    "read_rows",
    "stopwatch",
    "trackers",
    "train",
]
