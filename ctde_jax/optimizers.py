"""Optimizers and learning-rate schedules by name, all of them optax's."""

from math import inf

import optax
import optax.contrib

from ctde_jax.errors import InputError, check_at_least, check_known

OPTIMIZERS = {
    "sgd": optax.sgd,
    "momentum": lambda learning_rate: optax.sgd(learning_rate, momentum=0.9),
    "adam": optax.adam,
    "adamw": optax.adamw,
    "muon": optax.contrib.muon,
}
SCHEDULES = ("constant", "cosine", "linear")


def build(
    name: str, learning_rate: float, schedule: str = "constant", warmup_steps: int = 0, total_steps: int = 0
) -> optax.GradientTransformation:
    """Builds an optimizer whose learning rate rises linearly for the warm-up steps and then follows the schedule.

    Args:
        name: One of `OPTIMIZERS`.
        learning_rate: The largest learning rate.
        schedule: `constant`; `cosine` or `linear`, which reach zero at `total_steps`.
        warmup_steps: Optimizer steps.
        total_steps: Optimizer steps of the whole run, warm-up included; only read by schedules that decay.

    Raises:
        InputError: A name is not known, or a number is out of its range.
    """
    check_known("optimizer", name, OPTIMIZERS)
    return OPTIMIZERS[name](build_schedule(learning_rate, schedule, warmup_steps, total_steps))


def build_schedule(
    learning_rate: float, schedule: str = "constant", warmup_steps: int = 0, total_steps: int = 0
) -> optax.Schedule:
    """Builds the function from the optimizer step to the learning rate."""
    check_known("schedule", schedule, SCHEDULES)
    if not 0 < learning_rate < inf:
        raise InputError("learning_rate", f"must be greater than 0 and finite, got {learning_rate}.")
    check_at_least(0, warmup_steps=warmup_steps)
    decay_steps = total_steps - warmup_steps
    if schedule != "constant" and decay_steps < 1:
        raise InputError("warmup_steps", f"must be fewer than the {total_steps} steps of the run, got {warmup_steps}.")
    after = {
        "constant": lambda: optax.constant_schedule(learning_rate),
        "cosine": lambda: optax.cosine_decay_schedule(learning_rate, decay_steps),
        "linear": lambda: optax.linear_schedule(learning_rate, 0.0, decay_steps),
    }[schedule]()
    if warmup_steps == 0:
        return after
    warmup = optax.linear_schedule(0.0, learning_rate, warmup_steps)
    return optax.join_schedules([warmup, after], [warmup_steps])
