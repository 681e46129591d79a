"""What the host does: checks, the loop, logs, results."""

from ctde_jax.trainer import picture
from ctde_jax.trainer.checks import check_exact, check_run
from ctde_jax.trainer.fit import fit
from ctde_jax.trainer.log import Row, console, plot_curves, read_rows
from ctde_jax.trainer.rollback import SCALED
from ctde_jax.trainer.run import BEST, INPUTS
from ctde_jax.trainer.trained import Trained, accepts

__all__ = [
    "BEST",
    "INPUTS",
    "SCALED",
    "Row",
    "Trained",
    "accepts",
    "check_exact",
    "check_run",
    "console",
    "fit",
    "picture",
    "plot_curves",
    "read_rows",
]
