"""The folder of a trained model: written by `Trained.save`, read by `load`.

The folder is a checkpoint (see `checkpoint/format.py`) of the parameters, the model state, the
scaling of inputs and regression targets, and an example: some inputs and the outputs of the model
for them. All other fields of the result are facts in its manifest.
"""

import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ctde_jax import checkpoint
from ctde_jax.bundle import Accepted
from ctde_jax.checkpoint import INPUTS, MANIFEST, Checkpoint, Damaged
from ctde_jax.devices import PyTree, hosts
from ctde_jax.errors import InputError, quoted, writing_to
from ctde_jax.models import Model, tasks, unscaled
from ctde_jax.rounds import state

RESULT = "trained"
"""Key of a fact: the fields of the result besides its arrays."""

TARGETS = "targets/"
"""Prefix of the mean and the deviation of regression targets."""

EXAMPLE = "example"
"""Name of the example, which has `inputs` and `outputs`."""


def write(
    path: Path,
    model: Model,
    units: tasks.Units | None,
    center: Mapping[str, PyTree],
    example: PyTree,
    facts: Mapping[str, Any],
) -> None:
    """Writes the folder; on several hosts, host 0 writes it.

    Args:
        path: The folder, checked by `check_new`.
        model: The model, which takes inputs as the data set stores them.
        units: Units of regression targets; None for other tasks.
        center: `params` and `model_state`.
        example: Two inputs from `make_example`, as `inputs`, and the `outputs` for them.
        facts: Fields of the result, serializable as JSON.

    Raises:
        InputError: The folder cannot be written to, or the model was changed after the training.
    """
    unscaled(model)  # raises if the model was changed
    tensors = state.to_tensors({**center, EXAMPLE: example})
    if model.unscaled is not None:
        tensors[f"{INPUTS}shift"] = np.asarray(model.unscaled.shift)
        tensors[f"{INPUTS}scale"] = np.asarray(model.unscaled.scale)
    if units is not None:
        tensors[f"{TARGETS}mean"], tensors[f"{TARGETS}deviation"] = units

    def write_all() -> None:
        with writing_to(path, "folder"):
            checkpoint.write(path, tensors, {RESULT: facts})

    hosts.of_the_first(write_all)


def check_new(path: Path) -> None:
    """Raises InputError on all hosts unless the path is free, or an empty folder, on host 0."""
    hosts.of_the_first(partial(_check_new, path))


def _check_new(path: Path) -> None:
    with writing_to(path, "folder"):
        is_free = not path.exists() or (path.is_dir() and not any(path.iterdir()))
    if not is_free:
        raise InputError(
            "folder",
            f"must be new or empty, but {quoted(str(path))} is not; choose another folder.",
        )


def make_example(accepted: Accepted) -> np.ndarray:
    """Returns two valid inputs, always the same; axes of any length have length 1."""
    rng = np.random.default_rng(0)
    shape = (2, *(length or 1 for length in accepted.shape))
    dtype = np.dtype(accepted.dtype)
    if dtype.kind == "f":
        return rng.normal(size=shape).astype(dtype)
    # Without a known range, 0 and 1 are the safest integers.
    default = 255 if dtype == np.uint8 else 1
    largest = default if accepted.largest is None else accepted.largest
    return rng.integers(0, largest, shape, dtype, endpoint=True)


def read(path: Path) -> Checkpoint:
    """Reads a folder of `Trained.save`.

    Raises:
        InputError: The folder is not one of `Trained.save`, is damaged, or cannot be read.
    """
    rule = "must be a folder that Trained.save wrote"
    if not os.path.isfile(path / MANIFEST):
        raise InputError(
            "folder",
            f"{rule}, but {quoted(str(path))} has no {MANIFEST}; load a run of the command line "
            "with load_run.",
        )
    try:
        found = checkpoint.read(path)
    except Damaged as error:
        raise InputError("folder", f"must be intact, but {error}.") from error
    except InputError as error:
        raise InputError("folder", error.sentence) from error
    if RESULT not in found.facts:
        raise InputError(
            "folder",
            f"{rule}, but {quoted(str(path))} is a checkpoint of a run; load it with load_run, or "
            "call fit again with its run_dir.",
        )
    return found


def find_center(found: Checkpoint, model: Model) -> tuple[PyTree, PyTree]:
    """Returns the parameters and model state in the structure of the model, as numpy arrays.

    Raises:
        InputError: The model has other parameters or another state.
    """
    key = jax.eval_shape(jax.random.key, 0)
    params, model_state = jax.eval_shape(model.init, key, found.tensors[f"{EXAMPLE}/inputs"][:1])
    like = {"params": params, "model_state": model_state}
    wanted = state.named(like)
    tensors = {
        name: tensor
        for name, tensor in found.tensors.items()
        if not name.startswith((INPUTS, TARGETS, EXAMPLE))
    }

    # Collect all differences for one error, of which at most ten are listed.
    faults = [f"lacks {name}" for name in tensors if name not in wanted]
    faults += [f"has another array {name}" for name in wanted if name not in tensors]
    faults += [
        f"has {name} of {leaf.dtype}{list(leaf.shape)} instead of "
        f"{tensors[name].dtype}{list(tensors[name].shape)}"
        for name, leaf in wanted.items()
        if name in tensors
        and (leaf.shape, leaf.dtype) != (tensors[name].shape, tensors[name].dtype)
    ]
    if faults:
        more = f"; and {len(faults) - 10} more" if len(faults) > 10 else ""
        raise InputError("model", f"must be the saved one, but it {'; '.join(faults[:10])}{more}.")
    center = jax.tree.structure(like).unflatten([tensors[name] for name in wanted])
    return center["params"], center["model_state"]
