"""Loads a trained model from the folder that `Trained.save` wrote."""

from pathlib import Path
from typing import Any

import jax
import numpy as np

from ctde_jax.bundle import Accepted
from ctde_jax.checkpoint import INPUTS, Checkpoint, named
from ctde_jax.devices import start
from ctde_jax.errors import InputError
from ctde_jax.models import Task, as_model, in_units, tasks, unscaled, with_raw_inputs
from ctde_jax.rounds import state
from ctde_jax.trainer.saved import EXAMPLE, RESULT, TARGETS, find_center, read
from ctde_jax.trainer.trained import Accepts, Trained


def load(folder: Path | str, model: Any, task: Task | None = None) -> Trained:
    """Loads a trained model from a folder that `Trained.save` wrote.

    The result predicts and evaluates as the saved one. It has no state of the optimizer, no traffic
    and no wall times. To load a run of the command line, call `load_run`, which builds the model
    from the options of the run.

    Args:
        folder: The folder.
        model: The model or module of the training, as passed to `fit`.
        task: The task of the training. It may be omitted for tasks of the library, and is then
            without the changes of `tasks.smoothed`, `focal` and `weighted`, which affect training
            alone.

    Raises:
        InputError: The folder is not one of `Trained.save` or is damaged, the model has other
            parameters or other outputs than the saved one, or the task has other metrics.

    Examples:
        >>> model, data = ctde.models.mlp([64, 10]), ctde.data.digits()
        >>> folder = ctde.fit(model, data, optax.sgd(0.1), steps=1, show=False).save("digits")
        >>> trained = ctde.load(folder, model)
        >>> trained.step, trained.predict(data.test.inputs[:5]).shape
        (1, (5, 10))
    """
    path = named("folder", folder)
    found = read(path)
    facts = found.facts[RESULT]
    inputs, labels = (
        Accepted(dtype, tuple(shape), largest)
        for dtype, shape, largest in (facts["inputs"], facts["labels"])
    )

    # The model takes inputs as the data set stores them, as in training.
    task = _find_task(found, task)
    raw_model = unscaled(as_model(model))
    if f"{INPUTS}scale" in found.tensors:
        shift, scale = found.tensors[f"{INPUTS}shift"], found.tensors[f"{INPUTS}scale"]
        raw_model = with_raw_inputs(raw_model, shift, scale)
    if task.units is not None:
        raw_model = in_units(raw_model, *task.units)
    params, model_state = find_center(found, raw_model)
    trained = Trained(
        model=raw_model,
        params=params,
        model_state=model_state,
        opt_state=(),
        step=facts["step"],
        history=facts["history"],
        seconds={},
        interrupted=facts["interrupted"],
        stopped_early=facts["stopped_early"],
        task=task,
        devices=start(),
        traffic=None,
        accepts=Accepts(inputs, labels, tuple(facts["classes"])),
        platform=facts["platform"],
        plan=tuple((name, text) for name, text in facts["plan"]),
    )
    _check_outputs(trained, found)
    return trained


def _check_outputs(trained: Trained, found: Checkpoint) -> None:
    """Raises InputError unless the model computes the saved outputs, up to rounding.

    Another activation, for example, does not change the parameters. Outputs of other platforms are
    not compared, as their precision differs, nor outputs that are not floats, as they may jump.
    """
    inputs = found.tensors[f"{EXAMPLE}/inputs"]
    outputs = state.to_tensors({EXAMPLE: {"outputs": trained.predict(inputs)}})
    prefix = f"{EXAMPLE}/outputs"
    saved = {name: tensor for name, tensor in found.tensors.items() if name.startswith(prefix)}
    is_same = outputs.keys() == saved.keys() and all(
        output.shape == saved[name].shape for name, output in outputs.items()
    )
    if is_same and found.facts[RESULT]["example_platform"] == jax.default_backend():
        is_same = all(
            output.dtype.kind != "f" or _is_close(output, saved[name])
            for name, output in outputs.items()
        )
    if not is_same:
        raise InputError(
            "model",
            "must be the saved one, but its outputs for the saved inputs differ; pass the model "
            "with the options of the training, such as its activation.",
        )


def _is_close(one: np.ndarray, other: np.ndarray) -> bool:
    # Relative to the largest output, as small ones may be differences of large numbers.
    largest = np.nanmax(np.abs(other), initial=0.0)
    return np.allclose(one, other, rtol=0, atol=1e-2 * float(largest), equal_nan=True)


def _find_task(found: Checkpoint, given: Task | None) -> Task:
    """Returns the task of a saved model.

    Raises:
        InputError: No task is given although the saved one is not of the library, or the given one
            has other metrics.
    """
    facts = found.facts[RESULT]
    saved = ", ".join(facts["measures"])
    if given is None and facts["task"] is None:
        raise InputError(
            "task",
            f"must be given, because the model was trained with a custom task ({saved}); pass "
            "task=Task(...) as to fit.",
        )
    if given is not None:
        task = given
    elif facts["task"] == "regression":
        parts = (found.tensors[f"{TARGETS}{name}"] for name in tasks.Units._fields)
        task = tasks.regression_in(tasks.Units(*parts))
    else:
        task = tasks.BY_NAME[facts["task"]]
    if list(task.names) != facts["measures"]:
        raise InputError(
            "task", f"must report {saved}, as in training, got {', '.join(task.names)}."
        )
    return task
