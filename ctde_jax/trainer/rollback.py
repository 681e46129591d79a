"""Rollback: a run whose loss became NaN or infinite continues from its newest checkpoint with smaller updates.

All updates are multiplied by a factor in the optimizer state, which each rollback halves in the checkpoint.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial, wraps
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ctde_jax.aggregate import as_transformation
from ctde_jax.checkpoint import CHECKPOINTS, claimed, newest_intact, write, writing_to
from ctde_jax.devices import PyTree, hosts
from ctde_jax.errors import NonFiniteLoss
from ctde_jax.trainer.log import console
from ctde_jax.trainer.trained import Trained
from ctde_jax.trainer.training import Saving, Training

ROLLBACKS = 3
"""How often a run is rolled back at most."""

SCALED = "opt_state/1/0/"
"""What the names of the state of a scaled optimizer begin with in a checkpoint."""


def rolling_back(run: Callable[..., Trained]) -> Callable[..., Trained]:
    """Runs a training again, with smaller updates, if its loss became NaN or infinite and it is to be rolled back.

    Args:
        run: Takes a `Training`, a `Saving` and keyword arguments, of which `show` is read.
    """

    @wraps(run)
    def run_until_finite(training: Training, saving: Saving = Saving(), **rest: Any) -> Trained:
        if training.on_nonfinite != "rollback":
            return run(training, saving, **rest)
        saving.check(training)
        training = replace(training, optimizer=shrunk(training.optimizer))
        say = console(quiet=not rest.get("show", True)).print
        while True:
            try:
                trained = run(training, saving, **rest)
            except NonFiniteLoss as error:
                assert saving.folder is not None
                if not hosts.of_the_first(partial(_halve_updates, saving.folder, error, say)):
                    raise
                saving = replace(saving, resume=True, branch_from=None)
            else:
                return replace(trained, opt_state=unscaled_state(trained.opt_state))

    return run_until_finite


class ShrunkState(NamedTuple):
    """What all updates are multiplied by."""

    update_factor: jax.Array  # float32[]


def shrunk(optimizer: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Multiplies the updates of an optimizer by a factor in its state, which is 1 until a run is rolled back."""

    def update(updates, state, params=None, **extra_args):
        return optax.tree.scale(state.update_factor, updates), state

    factor = optax.GradientTransformationExtraArgs(
        lambda params: ShrunkState(jnp.float32(1)), update
    )
    return optax.chain(as_transformation(optimizer), factor)


def unscaled_state(opt_state: PyTree) -> PyTree:
    """Returns the state of the optimizer that `shrunk` was given."""
    own, _ = opt_state
    return own


def _halve_updates(folder: Path, error: NonFiniteLoss, say: Callable[[str], None]) -> bool:
    """Halves all updates from the newest checkpoint of a run's folder on, in the checkpoint.

    Returns False where that has been done too often.
    """
    with claimed(folder), writing_to(folder):
        found = newest_intact(folder / CHECKPOINTS, say)
        if found is None:
            return False
        factors = {
            name: tensor / 2
            for name, tensor in found.tensors.items()
            if name.endswith("/update_factor")
        }
        factor = min(float(tensor.min()) for tensor in factors.values())
        if factor < 2.0**-ROLLBACKS:
            return False
        say(
            f"rollback   not finite at step {error.step:,}; on from {found.path.name} with all updates times {factor:g}"
        )
        write(found.path, {**found.tensors, **factors}, found.facts)
    return True
