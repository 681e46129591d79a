"""Optimizers and learning-rate schedules of optax, by name."""

from collections.abc import Mapping
from fnmatch import fnmatchcase
from math import inf
from numbers import Real

import jax
import optax
import optax.contrib
from jax import numpy as jnp

from ctde_jax.devices import PyTree
from ctde_jax.errors import (
    InputError,
    check_at_least,
    check_known,
    check_not_negative,
    check_positive,
    quoted,
)
from ctde_jax.models import fine_tuning

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
"""Functions from the learning rate and, if supported, the weight decay to an optimizer, by name."""

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
    clip_grad_norm: float | None = None,
    schedule_start: int = 0,
) -> optax.GradientTransformation:
    """Builds an optimizer with linear warmup and a learning-rate schedule.

    Args:
        name: Name of the optimizer, one of `OPTIMIZERS`.
        learning_rate: Peak learning rate.
        schedule: `constant`; or `cosine` or `linear`, which decay to zero at `total_steps`.
        warmup_steps: Number of optimizer steps of linear warmup from zero.
        total_steps: Optimizer steps of the whole run, including warmup; only read by schedules that
            decay.
        weight_decay: Decoupled weight decay, in units of the learning rate; applied to parameters
            with two or more axes. By default that of the optimizer.
        clip_grad_norm: Clip gradients to this global norm.
        schedule_start: Optimizer step at which warmup and schedule start, as for a branch; earlier
            steps have the first learning rate.

    Returns:
        A transformation whose state holds the learning rate, as `optax.inject_hyperparams` keeps
        it, and with `clip_grad_norm` the norm before clipping, as `optax.snapshot` keeps it.

    Raises:
        InputError: If a name is unknown, a number is out of range, `weight_decay` is given for an
            optimizer without it, or `total_steps` leaves no step for a schedule that decays.

    Examples:
        >>> adamw = ctde.optimizers.build("adamw", 0.001, "cosine", total_steps=100)
        >>> clipped = ctde.optimizers.build("sgd", 0.1, clip_grad_norm=1.0)
    """
    check_known("optimizer", name, OPTIMIZERS)
    rate = build_schedule(learning_rate, schedule, warmup_steps, total_steps, schedule_start)

    # An empty tuple leaves the weight decay to the optimizer.
    decay = () if weight_decay is None else (weight_decay,)
    if decay and name not in DECAYING:
        raise InputError(
            "weight_decay", f"requires one of {', '.join(DECAYING)}, got the optimizer {name}."
        )
    check_not_negative(weight_decay=weight_decay)

    # Hyperparameters are part of the state, so that the learning rate of each step can be logged.
    make = optax.inject_hyperparams(lambda learning_rate: OPTIMIZERS[name](learning_rate, *decay))
    optimizer = make(learning_rate=rate)

    # Clip the gradients, not the updates.
    if clip_grad_norm is None:
        return optimizer
    check_positive(clip_grad_norm=clip_grad_norm)
    # The norm before clipping is logged. Clipping computes it anyway, so that costs nothing.
    keep_norm = optax.snapshot("gradient_norm", optax.tree.norm)
    return optax.chain(keep_norm, optax.clip_by_global_norm(clip_grad_norm), optimizer)


def scale_updates(scales: Mapping[str, float]) -> optax.GradientTransformation:
    """Multiplies the updates of the parameters whose names match a pattern by its factor.

    Chained after an optimizer, it scales the learning rate of these parameters, and with it their
    decoupled weight decay. An optimizer such as `optax.contrib.schedule_free` must wrap both:
    `schedule_free(optax.chain(optax.sgd(0.1), scale_updates(...)), 0.1)`.

    Args:
        scales: Factors by pattern of names, such as `{"encoder/*": 0.1}`, in the syntax of
            `fnmatch`. The first pattern that matches applies; all other parameters keep their
            updates. Both factors of a low-rank change have the name of its kernel.

    Raises:
        InputError: A factor is not positive and finite. Or, by `init`, a pattern matches nothing.

    Examples:
        >>> scales = {"encoder/*": 0.1}
        >>> optimizer = optax.chain(optax.adam(0.01), ctde.optimizers.scale_updates(scales))
    """
    for pattern, factor in scales.items():
        if not isinstance(factor, Real) or not 0 < factor < inf:
            got = f"{factor!r:.60} for {quoted(pattern)}"
            raise InputError(
                "learning_rate_scales",
                f"must be positive and finite numbers, got {got}; to keep parameters as they are, "
                "use freeze.",
            )

    def init(params: PyTree) -> optax.OptState:
        fine_tuning.find_matches("learning_rate_scales", list(scales), fine_tuning.names_of(params))
        return optax.EmptyState()

    def update(updates: PyTree, state: optax.OptState, params: PyTree = None):
        leaves, structure = jax.tree.flatten(updates, fine_tuning.is_low_rank)
        factors = [
            next((scales[pattern] for pattern in scales if fnmatchcase(name, pattern)), 1.0)
            for name in fine_tuning.names_of(updates)
        ]
        scaled = [
            optax.tree.scale(factor, leaf) for leaf, factor in zip(leaves, factors, strict=True)
        ]
        return structure.unflatten(scaled), state

    return optax.GradientTransformation(init, update)


def is_decayed(params: PyTree) -> PyTree:
    """Returns whether weight decay applies to each parameter: True if it has two or more axes.

    These are kernels, not biases and parameters of normalization. Muon ignores this mask and decays
    only the matrices that it orthogonalizes.

    Returns:
        A tree of booleans with the structure of `params`.

    Examples:
        >>> ctde.optimizers.is_decayed({"bias": np.ones(3), "kernel": np.ones((2, 3))})
        {'bias': False, 'kernel': True}
    """
    return jax.tree.map(lambda x: x.ndim > 1, params)


def build_schedule(
    learning_rate: float,
    schedule: str = "constant",
    warmup_steps: int = 0,
    total_steps: int = 0,
    schedule_start: int = 0,
) -> optax.Schedule:
    """Builds the function from the optimizer step to the learning rate.

    Arguments are those of `build`.

    Raises:
        InputError: If the schedule is unknown, a number is out of range, or `total_steps` leaves no
            step for a schedule that decays.

    Examples:
        >>> rate = ctde.optimizers.build_schedule(0.1, "linear", warmup_steps=10, total_steps=110)
        >>> [round(float(rate(step)), 3) for step in (0, 10, 60, 110)]
        [0.0, 0.1, 0.05, 0.0]
    """
    check_known("schedule", schedule, SCHEDULES)
    check_positive(learning_rate=learning_rate)
    check_at_least(0, warmup_steps=warmup_steps, schedule_start=schedule_start)
    decay_steps = total_steps - schedule_start - warmup_steps
    if schedule_start and total_steps <= schedule_start:
        raise InputError(
            "steps",
            f"must be greater than schedule_start, {schedule_start:,}, got {total_steps:,}; steps "
            "and epochs of a branch count from the start of its parent.",
        )
    if schedule != "constant" and decay_steps < 1:
        raise InputError(
            "warmup_steps",
            f"must be less than the {total_steps - schedule_start} steps of the schedule, got "
            f"{warmup_steps}.",
        )

    # Functions, because optax rejects a decay of 0 steps, which `constant` may have.
    after = {
        "constant": lambda: optax.constant_schedule(learning_rate),
        "cosine": lambda: optax.cosine_decay_schedule(learning_rate, decay_steps),
        "linear": lambda: optax.linear_schedule(learning_rate, 0.0, decay_steps),
    }[schedule]()

    # Join warmup and schedule; all steps before `schedule_start` have the rate at that step.
    warmup = optax.linear_schedule(0.0, learning_rate, warmup_steps)
    whole = optax.join_schedules([warmup, after], [warmup_steps]) if warmup_steps else after
    return (lambda step: whole(jnp.maximum(step - schedule_start, 0))) if schedule_start else whole
