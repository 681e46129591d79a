"""Loads the trained model of a run from its folder, without training."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from ctde_jax import checkpoint
from ctde_jax.aggregate import adapted
from ctde_jax.checkpoint import (
    BEST,
    CHECKPOINTS,
    INPUTS,
    Checkpoint,
    Damaged,
    Options,
    check_facts,
    different_options,
    differing,
    named,
    newest_intact,
    plain,
)
from ctde_jax.config import build, output
from ctde_jax.config.command_line import CONFIG, deciding, flag, parse
from ctde_jax.config.options import Config, DataOptions
from ctde_jax.data import Dataset, digests_of
from ctde_jax.devices import FAKE_DEVICES, PyTree, replica, start
from ctde_jax.errors import InputError
from ctde_jax.models import Model, fine_tuning
from ctde_jax.rounds import make_source, of_first_steps, state
from ctde_jax.trainer import (
    SCALED,
    Row,
    Trained,
    accepts,
    console,
    in_stored_units,
    read_rows,
)


class Loaded(NamedTuple):
    """A run that was loaded from its folder: its result, its data and its options."""

    trained: Trained
    data: Dataset
    config: Config


def load_run(path: Path | str, options: Sequence[str] = ()) -> Loaded:
    """Loads the model of a command-line run from its newest checkpoint or a given one.

    Options, class names, vocabulary, and the shift and scale of the inputs are those of the
    checkpoint.

    Args:
        path: Folder of the run or of one of its checkpoints. The parameters of a run are those that
            `fit` would return (with `patience`, the best); a checkpoint's are those at its step.
        options: Command-line options, such as `["--data-dir", "elsewhere"]` if the data have moved.

    Returns:
        The model, the data and the options of the run: `trained`, `data` and `config`.

    Raises:
        InputError: If the folder does not belong to a command-line run or has no intact checkpoint,
            if `options` are invalid, or if options or data differ from those of the checkpoint.

    Examples:
        >>> from ctde_jax import train
        >>> train.main(["--run-dir", "runs/digits", "--devices", "1", "--steps", "1"])
        >>> trained, data, options = ctde.load_run("runs/digits")
        >>> trained.step, data.name, options.optimization.batch_size
        (1, 'digits', 64)
    """
    # Find the saved options of the run.
    path = named("run_dir", path)
    folder = folder_of(path)
    is_checkpoint = folder != path
    if not os.path.isfile(folder / CONFIG):
        raise InputError(
            "run_dir",
            "must be the folder of a run of python -m ctde_jax.train, or of one of its "
            f"checkpoints, but {path} has no {CONFIG}. To export a run of fit, call fit again with "
            "the same arguments, which restores its checkpoint, and pass its result to "
            "write_bundle.",
        )

    # Read the checkpoint, which must have been written with these options.
    chosen = parse(["--config", str(folder / CONFIG), *options])
    found = _read(path) if is_checkpoint else newest_intact(folder / CHECKPOINTS, console().print)
    if found is None:
        raise InputError("run_dir", f"must contain a checkpoint, but {folder} has none yet.")
    check_facts(found, "run_dir")
    _check_options(found, chosen)

    # Build the data and the model as in training.
    data = _as_trained(found, build.load_data(chosen.data, chosen.optimization.seed), chosen.data)
    task = build.build_task(chosen, data)
    model = in_stored_units(build.build_model(chosen.model, data), data, task)

    # Restore the parameters to evaluate. Batch statistics are re-estimated on as many devices as
    # in training; for anything else one device suffices.
    if chosen.run.reestimate_batches:
        aggregation = chosen.aggregation
        devices = start(aggregation.devices, FAKE_DEVICES, aggregation.replicas)
    else:
        devices = start(1)
    (params, model_state), is_best = _center(found, model, data, not is_checkpoint)
    if chosen.run.reestimate_batches and not is_best:
        model_state = _reestimated(chosen, model, data, devices, params, model_state)

    # Restore the history, and whether the run has ended.
    rows = read_rows(folder, found.facts["rows"])
    position = found.facts["position"]
    best = found.facts["best"] or {}
    patience = chosen.optimization.patience
    is_over = is_best and patience is not None and best["in_vain"] >= patience
    trained = Trained(
        model=model,
        params=params,
        model_state=model_state,
        opt_state=_opt_state(found, chosen, data, params),
        step=best["step"] if is_best else position["step"],
        history=rows,
        seconds={},
        interrupted=position["gone_through"] < found.facts["options"]["steps"] and not is_over,
        stopped_early=is_over,
        task=task,
        devices=devices,
        traffic=None,
        accepts=accepts(data),
        platform=found.facts.get("platform"),
        plan=(("data", data.name), *output.names(chosen, data).items()),
    )

    # A checkpoint between two evaluations has no test row yet.
    trained.history.extend(_tested(trained, data))
    return Loaded(trained, data, chosen)


def folder_of(path: Path) -> Path:
    """Returns the folder of a run, given that folder or the folder of one of its checkpoints."""
    return path.absolute().parent.parent if os.path.exists(path / checkpoint.MANIFEST) else path


def _read(path: Path) -> Checkpoint:
    try:
        return checkpoint.read(path)
    except Damaged as error:
        raise InputError("run_dir", f"must contain an intact checkpoint, but {error}.") from error


def _check_options(found: Checkpoint, chosen: Config) -> None:
    """Compares the options with those of the checkpoint, in case config.json has been edited.

    Options that the checkpoint or this version does not have are not compared.

    Raises:
        InputError: If options differ; lists them.
    """
    sealed = found.facts.get("given_options")
    now = Options(plain(deciding(chosen)), flag)
    if not isinstance(sealed, dict):
        console().print(
            f"           not compared with {found.path}: the options, as it does not list them"
        )
        return

    # Options that this version does not have are not compared.
    different = different_options({name: sealed[name] for name in sealed if name in now}, now)
    if different:
        raise InputError(
            "run_dir",
            f"must be loaded with the options of its checkpoint {found.path}, but these differ: "
            f"{'; '.join(different)}; correct {CONFIG}, or omit these options.",
        )


def _as_trained(found: Checkpoint, data: Dataset, chosen: DataOptions) -> Dataset:
    """Returns the data with the shift, scale, classes and vocabulary of the checkpoint.

    Args:
        found: Checkpoint; if it has no digests of the data, these are returned unchanged.
        data: Data set that was loaded.
        chosen: Options of the data, which determine the argument in error messages.

    Raises:
        InputError: If the data differ from those of the training; lists the differences.
    """
    identity = found.facts.get("identity")
    if identity is None:
        console().print(
            f"           not compared with {found.path}: the data, as it has no digests of them"
        )
        return data

    # Compare all digests but the partition, which follows from the options and the labels.
    before = {name: digest for name, digest in identity["data"].items() if name != "the partition"}
    different = differing(before, digests_of(data))
    if different:
        option = "data_file" if chosen.data_file else "data_dir"
        raise InputError(
            option,
            f"must contain the data of the run, but {data.name} differs in "
            f"{', '.join(different)}; restore the original data, or train again.",
        )
    return replace(
        data,
        shift=found.tensors[f"{INPUTS}shift"],
        scale=found.tensors[f"{INPUTS}scale"],
        classes=tuple(found.facts["classes"]),
        vocabulary=tuple(found.facts["vocabulary"]),
    )


def _center(
    found: Checkpoint, model: Model, data: Dataset, may_be_best: bool
) -> tuple[tuple[PyTree, PyTree], bool]:
    """Returns the parameters and model state of a checkpoint to evaluate.

    Args:
        found: Checkpoint.
        model: Model of the run.
        data: Data set of the run; only shapes and dtypes are read.
        may_be_best: Whether the best parameters of early stopping take precedence.

    Returns:
        The pair of parameters and model state, and whether it is the best of early stopping.

    Raises:
        InputError: If the arrays of the checkpoint do not match the model.
    """
    like = jax.eval_shape(model.init, jax.eval_shape(jax.random.key, 0), data.train.inputs[:1])

    # With early stopping, the checkpoint also holds the best parameters and their model state.
    best = _beginning(found, f"{BEST}/")
    if best and may_be_best:
        _, center = state.tree_from_tensors(best, {BEST: like}, "run_dir").popitem()
        return center, True

    # Otherwise take the moving average, if there is one. If replicas diverge, these have a leading
    # replica axis, over which their mean is taken in float32 or better.
    part = "ema_params" if _beginning(found, "ema_params/") else "params"
    merged = state.merged_params(found.tensors, part)
    whole = {part: like[0]}
    wanted = state.named(whole)
    agreed = {
        name: tensor.mean(axis=0, dtype=np.promote_types(tensor.dtype, np.float32)).astype(
            tensor.dtype
        )
        if name in wanted and tensor.shape[1:] == wanted[name].shape
        else tensor
        for name, tensor in ((f"{part}/{name}", tensor) for name, tensor in merged.items())
    }
    _, params = state.tree_from_tensors(agreed, whole, "run_dir").popitem()
    kept = state.tree_from_tensors(
        _beginning(found, "model_state/"), {"model_state": like[1]}, "run_dir"
    )
    return (params, kept["model_state"]), False


def _opt_state(found: Checkpoint, chosen: Config, data: Dataset, params: PyTree) -> PyTree:
    """Returns the optimizer state of a checkpoint, in the form of `Trained.opt_state`."""
    optimizer = build.build_optimizer(chosen, data, found.facts["options"]["steps"])
    options = chosen.optimization
    trained, _ = fine_tuning.split(params, options.freeze or None, options.lora_rank, options.seed)
    like = jax.eval_shape(adapted(optimizer).init, trained)
    # For rollbacks, the optimizer is wrapped, so its state is nested one level deeper.
    prefix = SCALED if chosen.optimization.on_nonfinite == "rollback" else "opt_state/1/"
    tensors = {
        name.removeprefix(prefix): tensor for name, tensor in _beginning(found, prefix).items()
    }
    return state.in_place(tensors, like, "run_dir")


def _beginning(found: Checkpoint, prefix: str) -> dict[str, np.ndarray]:
    return {name: tensor for name, tensor in found.tensors.items() if name.startswith(prefix)}


def _reestimated(
    chosen: Config,
    model: Model,
    data: Dataset,
    devices: Sequence[jax.Device],
    params: PyTree,
    model_state: PyTree,
) -> PyTree:
    """Returns the model state with batch statistics that are re-estimated as in training."""
    # The same source of batches and the same key as in training.
    seed = chosen.optimization.seed
    batch_size = chosen.optimization.batch_size
    partition = build.make_partition(chosen.data, data.train.labels, len(devices), seed)
    round_steps = max(1, chosen.aggregation.sync_every)
    source = make_source(data, len(devices), batch_size, seed, partition, round_steps)
    _, train_key = jax.random.split(jax.random.key(seed))
    feed = source.feed(devices)
    key = replica.replicate(train_key, devices)

    # Every device reads its part of each batch, and the statistics are averaged over all of them.
    reestimate = of_first_steps(
        model, feed, devices, source.axis, chosen.run.reestimate_batches, key
    )
    return jax.device_get(reestimate(*replica.replicate((params, model_state), devices)))


def _tested(trained: Trained, data: Dataset) -> list[Row]:
    """Evaluates on the test split and returns the row, or no row if the history has it."""
    if any(row["split"] == "test" and row["step"] == trained.step for row in trained.history):
        return []
    return [{"split": "test", "step": trained.step, **trained.evaluate(data.test)}]
