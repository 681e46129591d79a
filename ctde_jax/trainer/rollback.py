"""Rollback: if the loss is NaN or infinite, a run resumes from a checkpoint with smaller updates.

All updates are multiplied by a factor in the optimizer state. A rollback halves the factor in the
newest checkpoint, from which the run then continues.
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
from ctde_jax.checkpoint import CHECKPOINTS, claimed, newest_intact, write
from ctde_jax.devices import PyTree, hosts
from ctde_jax.errors import NonFiniteLoss, writing_to
from ctde_jax.trainer.log import console
from ctde_jax.trainer.trained import Trained
from ctde_jax.trainer.training import Saving, Training

ROLLBACKS = 3
"""Maximum number of rollbacks of a run."""

SCALED = "opt_state/1/0/"
"""Prefix of the names of a scaled optimizer's state in a checkpoint."""


def rolling_back(run: Callable[..., Trained]) -> Callable[..., Trained]:
    """Decorates a training function so that it rolls back if `on_nonfinite` is `rollback`.

    After NonFiniteLoss, the update factor in the newest checkpoint is halved, and the run resumes
    from it. After `ROLLBACKS` rollbacks, or without a checkpoint, NonFiniteLoss is raised.

    Args:
        run: A function of a `Training`, a `Saving` and keyword arguments, of which only `show` is
            read here.
    """

    @wraps(run)
    def run_until_finite(training: Training, saving: Saving = Saving(), **rest: Any) -> Trained:
        if training.on_nonfinite != "rollback":
            return run(training, saving, **rest)
        # The factor is part of the optimizer state, so that every checkpoint holds it.
        training = training.changed(optimizer=shrunk(training.optimizer))
        say = console(quiet=not rest.get("show", True)).print
        while True:
            # Each attempt but the first resumes from the checkpoint whose factor was halved.
            try:
                trained = run(training, saving, **rest)
            except NonFiniteLoss as error:
                assert saving.folder is not None
                # Host 0 alone writes the folder; all hosts raise if there is no rollback left.
                if not hosts.of_the_first(partial(_halve_updates, saving.folder, error, say)):
                    raise
                saving = replace(saving, resume=True, branch_from=None)
            else:
                return replace(trained, opt_state=unscaled_state(trained.opt_state))

    return run_until_finite


class ShrunkState(NamedTuple):
    """The factor by which all updates are multiplied."""

    update_factor: jax.Array  # float32[]


def shrunk(optimizer: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Returns an optimizer whose updates are multiplied by a factor in its state, initially 1."""

    def update(updates, state, params=None, **extra_args):
        return optax.tree.scale(state.update_factor, updates), state

    # The factor comes last, so that it scales the final updates.
    factor = optax.GradientTransformationExtraArgs(
        lambda params: ShrunkState(jnp.float32(1)), update
    )
    return optax.chain(as_transformation(optimizer), factor)


def unscaled_state(opt_state: PyTree) -> PyTree:
    """Returns the state of `optimizer`, given the state of `shrunk(optimizer)`."""
    inner, _ = opt_state
    return inner


def _halve_updates(folder: Path, error: NonFiniteLoss, say: Callable[[str], None]) -> bool:
    """Halves the update factor in the newest intact checkpoint of a run, and rewrites it.

    Args:
        folder: Folder of the run.
        error: The exception that ended the run, whose step is printed.
        say: Prints a line.

    Returns:
        True if the factor was halved; False if there is no checkpoint, or the factor has been
        halved `ROLLBACKS` times already.

    Raises:
        InputError: If the folder cannot be written to, or has no intact checkpoint.
    """
    with claimed(folder), writing_to(folder):
        found = newest_intact(folder / CHECKPOINTS, say)
        if found is None:
            return False
        # In local steps each replica has a factor, all of them equal.
        factors = {
            name: tensor / 2
            for name, tensor in found.tensors.items()
            if name.endswith("/update_factor")
        }
        factor = min(float(tensor.min()) for tensor in factors.values())
        if factor < 2.0**-ROLLBACKS:
            return False
        say(
            f"rollback   loss not finite at step {error.step:,}; continuing from "
            f"{found.path.name} with all updates multiplied by {factor:g}"
        )
        # Replace the checkpoint: an interruption leaves either the old one or the new one.
        write(found.path, {**found.tensors, **factors}, found.facts)
    return True
