"""Families: runs that differ in seeds and numbers alone, so that one program trains them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np
from rich.filesize import decimal

from ctde_jax.devices import memory, replica
from ctde_jax.rounds import Resident, many, state
from ctde_jax.trainer.trained import Trained
from ctde_jax.trainer.training import Saving, Training


class Variant(NamedTuple):
    """One of many runs."""

    values: Mapping[str, Any]
    """The values of the sweep for this run, by name."""

    training: Training
    saving: Saving

    @property
    def combination(self) -> dict[str, Any]:
        """The values in which runs are compared: all but the number of the data set."""
        return _combination(self.values)


class Outcome(NamedTuple):
    """The result of one of many runs."""

    values: Mapping[str, Any]
    """The values of the sweep for this run, by name."""

    seed: int
    trained: Trained | None
    """The result; None if the loss of the run became NaN or infinite."""

    step: int
    """Number of optimizer steps of the result, or of the failure."""

    failure: str = ""
    """The message of the error that ended the run."""

    @property
    def combination(self) -> dict[str, Any]:
        """The values in which runs are compared: all but the number of the data set."""
        return _combination(self.values)


def _combination(values: Mapping[str, Any]) -> dict[str, Any]:
    # Data sets are repetitions, as are seeds.
    return {name: value for name, value in values.items() if name != "data"}


@dataclass(frozen=True)
class Family:
    """Runs that differ in seeds and numbers alone."""

    variants: Sequence[Variant]
    make: many.Make
    """Makes optimizer, strategy and task from the numbers of a run, which may be traced."""

    names: Sequence[str]
    """Names of the values in which the runs differ, all of them numbers."""

    @property
    def is_joint(self) -> bool:
        """Whether one program trains all runs; if not, they are trained one after another."""
        training = self.variants[0].training
        shared = _shared_by_program(training)
        evaluated = (training.data.validation, training.data.test)
        return (
            len(self.variants) > 1
            and all(_shared_by_program(variant.training) == shared for variant in self.variants)
            and not training.strategy.exact
            and not training.reestimate_batches
            and training.on_nonfinite != "rollback"
            and isinstance(training.source, Resident)
            and not any(split.is_on_disk for split in evaluated if split is not None)
        )


def _shared_by_program(training: Training) -> tuple[Any, ...]:
    """Returns what must be equal in runs of one program.

    These are their steps, the shapes of their examples on each replica, and the constants that
    model and objective take from the training split.
    """
    source = training.source
    # With a partition, the longest part of a replica determines both.
    shapes = None
    if isinstance(source, Resident):
        shapes = jax.tree.map(np.shape, source.batches.split)
    units = training.task.units
    of_targets = None if units is None else [array.tobytes() for array in units]
    is_balanced = isinstance(training.class_weights, str)
    counted = id(training.data.train) if is_balanced else None
    return source.steps_per_epoch, training.total_steps, shapes, of_targets, counted


def describe(families: Sequence[Family], devices: Sequence[jax.Device]) -> str:
    """Describes the programs that train the runs and the memory that these take, for the plan."""
    count = len(replica.distinct(devices))
    total = sum(len(family.variants) for family in families)
    joint = [family for family in families if family.is_joint]
    together = sum(len(family.variants) for family in joint)
    parts = []
    if joint:
        programs = f"{len(joint)} programs in turn" if len(joint) > 1 else "one program"
        needed = max(len(each.variants) * _state_bytes(each.variants[0].training) for each in joint)
        spread = f"on {count} devices" if count > 1 else "on 1 device"
        parts.append(f"{together} by {programs}, {spread}, with {decimal(needed)} of state")
    if total > together:
        parts.append(f"{total - together} one after another")
    return "; ".join(parts)


def _state_bytes(training: Training) -> int:
    """Returns the bytes of the training state of a run."""
    trained, frozen = training.shapes_of_parts
    replicas = len(training.devices)
    like = state.like_created(
        trained,
        training.shapes[1],
        training.optimizer,
        training.strategy,
        replicas,
        training.ema_decay is not None,
        frozen,
    )
    # All parts of `like` have a row for each replica, but a run keeps one of those that are equal.
    return sum(
        memory.size_of(part) // (replicas if axis is None else 1)
        for part, axis in zip(like, state.axes(training.strategy), strict=True)
    )
