"""Trackers: callbacks that write the rows of a run for TensorBoard, MLflow, W&B and Trackio.

Each needs the extra of its name, as in `pip install 'ctde_jax[tensorboard]'`. If a run is resumed,
its tracker writes the earlier rows again, so each tracked run has all rows of its training.
"""

from ctde_jax.trainer.trackers.base import Tracker
from ctde_jax.trainer.trackers.mlflow import MLflow
from ctde_jax.trainer.trackers.tensorboard import TensorBoard
from ctde_jax.trainer.trackers.trackio import Trackio
from ctde_jax.trainer.trackers.wandb import WandB

__all__ = ["MLflow", "TensorBoard", "Tracker", "Trackio", "WandB"]
