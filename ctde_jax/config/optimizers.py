"""Optimizers and learning-rate schedules by name, all of them optax's."""

from math import inf

import jax
import optax
import optax.contrib
from jax import numpy as jnp

from ctde_jax.devices import PyTree
from ctde_jax.errors import InputError, check_at_least, check_known

OPTIMIZERS = {
    "sgd": optax.sgd,
    "momentum": lambda learning_rate: optax.sgd(learning_rate, momentum=0.9),
    "adam": optax.adam,
    "adamw": lambda learning_rate, decay=1e-4: optax.adamw(
        learning_rate, weight_decay=decay, mask=is_decayed
    ),
    "lion": lambda learning_rate, decay=1e-3: optax.lion(
        learning_rate, weight_decay=decay, mask=is_decayed
    ),
    "muon": lambda learning_rate, decay=0.0: optax.contrib.muon(learning_rate, weight_decay=decay),
}
"""Functions of the learning rate, and where they know it of the decoupled weight decay."""

DECAYING = ("adamw", "lion", "muon")
"""The optimizers with decoupled weight decay (Loshchilov and Hutter, 2019)."""

SCHEDULES = ("constant", "cosine", "linear")


def build(
    name: str,
    learning_rate: float,
    schedule: str = "constant",
    warmup_steps: int = 0,
    total_steps: int = 0,
    weight_decay: float | None = None,
    max_grad_norm: float | None = None,
    schedule_start: int = 0,
) -> optax.GradientTransformation:
    """Builds an optimizer whose learning rate rises linearly for the warm-up steps and then follows the schedule.

    Args:
        name: One of `OPTIMIZERS`.
        learning_rate: The largest learning rate.
        schedule: `constant`; `cosine` or `linear`, which reach zero at `total_steps`.
        warmup_steps: Optimizer steps.
        total_steps: Optimizer steps of the whole run, warm-up included; only read by schedules that decay.
        weight_decay: Share of the weights that a step takes off, in units of the learning rate; biases and the scales
            of norms keep theirs. By default the optimizer's own.
        max_grad_norm: Clip gradients to this global norm.
        schedule_start: Optimizer step at which warm-up and schedule start; the steps before count for neither.

    Raises:
        InputError: A name is not known, or a number is out of its range.
    """
    check_known("optimizer", name, OPTIMIZERS)
    rate = build_schedule(learning_rate, schedule, warmup_steps, total_steps, schedule_start)
    decay = () if weight_decay is None else (weight_decay,)
    if decay and name not in DECAYING:
        raise InputError(
            "weight_decay", f"goes with {', '.join(DECAYING)}, got the optimizer {name}."
        )
    if weight_decay is not None and not 0 <= weight_decay < inf:
        raise InputError("weight_decay", f"must be at least 0 and finite, got {weight_decay}.")
    # hyperparameters are part of the state, so that the learning rate of a step can be logged
    make = optax.inject_hyperparams(lambda learning_rate: OPTIMIZERS[name](learning_rate, *decay))
    optimizer = make(learning_rate=rate)
    if max_grad_norm is None:
        return optimizer
    if not 0 < max_grad_norm < inf:
        raise InputError(
            "max_grad_norm", f"must be greater than 0 and finite, got {max_grad_norm}."
        )
    return optax.chain(optax.clip_by_global_norm(max_grad_norm), optimizer)


def is_decayed(params: PyTree) -> PyTree:
    """Says of each parameter whether weight decay takes hold of it: of kernels, and not of biases and norms.

    Muon decays the matrices alone, which are those that it orthogonalizes.
    """
    return jax.tree.map(lambda x: x.ndim > 1, params)


def build_schedule(
    learning_rate: float,
    schedule: str = "constant",
    warmup_steps: int = 0,
    total_steps: int = 0,
    schedule_start: int = 0,
) -> optax.Schedule:
    """Builds the function from the optimizer step to the learning rate; arguments as in `build`."""
    check_known("schedule", schedule, SCHEDULES)
    if not 0 < learning_rate < inf:
        raise InputError(
            "learning_rate", f"must be greater than 0 and finite, got {learning_rate}."
        )
    check_at_least(0, warmup_steps=warmup_steps, schedule_start=schedule_start)
    decay_steps = total_steps - schedule_start - warmup_steps
    if schedule_start and total_steps <= schedule_start:
        raise InputError(
            "steps",
            f"must be more than the {schedule_start:,} at which the schedule starts, got {total_steps:,}; steps and "
            "epochs of a branch count from the start of its parent.",
        )
    if schedule != "constant" and decay_steps < 1:
        raise InputError(
            "warmup_steps",
            f"must be fewer than the {total_steps - schedule_start} steps of the run, got {warmup_steps}.",
        )
    after = {
        "constant": lambda: optax.constant_schedule(learning_rate),
        "cosine": lambda: optax.cosine_decay_schedule(learning_rate, decay_steps),
        "linear": lambda: optax.linear_schedule(learning_rate, 0.0, decay_steps),
    }[schedule]()
    warmup = optax.linear_schedule(0.0, learning_rate, warmup_steps)
    whole = optax.join_schedules([warmup, after], [warmup_steps]) if warmup_steps else after
    return (lambda step: whole(jnp.maximum(step - schedule_start, 0))) if schedule_start else whole
