"""The batch size finder: the speed of training at growing batch sizes.

A larger batch keeps the devices busier and communicates less often per example, until they compute
as fast as they can. The finder doubles the batch size and measures the training loop each time,
without evaluations. It ends if the batch exceeds the memory or the training examples, or if two
doublings in a row hardly raise the speed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import jax
from rich.filesize import decimal
from rich.table import Table

from ctde_jax.devices import PyTree
from ctde_jax.errors import InputError
from ctde_jax.rounds import Resident
from ctde_jax.trainer.contestant import Contestant, Spread, check_data, initialize
from ctde_jax.trainer.training import Training

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_NEAR_BEST = 0.9  # fraction of the best speed
_LEAST_GAIN = 1.1  # ratio of the speeds before and after a doubling


class Measurement(NamedTuple):
    """The measured training at one batch size."""

    batch_size: int
    examples: float
    """Mean number of examples in a step; batches at the end of an epoch are padded."""

    step: Spread
    """Time of a step of the training loop, in seconds."""

    temporary: int | None
    """Bytes of the temporary arrays of a step on a device; None if the compiler reports none."""

    @property
    def speed(self) -> float:
        """Examples per second, without padding."""
        return self.examples / self.step.median


@dataclass(frozen=True)
class Search:
    """The measurements of a search."""

    measured: Sequence[Measurement]
    """At least one measurement, in the order of the batch sizes."""

    end: str
    """A sentence with the reason for the end of the search."""

    @property
    def best(self) -> Measurement:
        """The measurement with the highest speed."""
        return max(self.measured, key=lambda each: each.speed)

    @property
    def found(self) -> Measurement:
        """The measurement of the smallest batch size that reaches 90% of the best speed."""
        return next(each for each in self.measured if each.speed >= _NEAR_BEST * self.best.speed)


def find(training: Training, seconds: float, say: Callable[[str], None] = print) -> Search:
    """Measures the speed of a training at its batch size and at doublings of it.

    Args:
        training: The training to measure, in the last phase of its strategy.
        seconds: Approximate duration of the measurement at each batch size.
        say: Prints the stage of the search.

    Raises:
        InputError: The training data are not in memory, or the batch size of `training` does not
            fit into the memory of the devices.
    """
    check_data(training)
    assert isinstance(training.source, Resident)
    center = initialize(training)
    examples = training.source.hold(training.devices)
    most = len(training.data.train.inputs)

    measured: list[Measurement] = []
    size = training.batch_size
    while size <= most:
        say(f"measuring {size:,} examples per step")
        larger = replace(training, batch_size=size)
        try:
            measured.append(_measure(larger, center, examples, seconds))
        except InputError as error:
            # Larger batches than the first may exceed the memory: that is where the search ends.
            if not measured:
                raise
            return Search(measured, f"The search ended at {size:,} examples: {error}")
        if _is_flat(measured):
            return Search(
                measured,
                f"The search ended at {size:,} examples, as the last two doublings raised the "
                f"speed by less than {_LEAST_GAIN - 1:.0%} each.",
            )
        size *= 2
    return Search(
        measured, f"The search ended, as {size:,} examples exceed the {most:,} training examples."
    )


def _measure(
    training: Training, center: tuple[PyTree, PyTree], examples: PyTree, seconds: float
) -> Measurement:
    """Measures a training; raises InputError if its batch does not fit into memory."""
    # Rows of one round, so that even slow steps need not fill a row of the history.
    phase = training.phases(1)[-1]
    try:
        contestant = Contestant(training, center, phase.strategy, phase.spans[0], examples)
        step = contestant.step(seconds)
    except jax.errors.JaxRuntimeError as error:
        # The memory check of the contestant compares only a lower bound.
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise InputError(
            "batch_size",
            "must fit into memory, but the arrays of a step could not be allocated; lower "
            "batch_size, or use a smaller model.",
        ) from error
    examples_per_step = len(training.data.train.inputs) / training.source.steps_per_epoch
    return Measurement(training.batch_size, examples_per_step, step, contestant.temporary)


def _is_flat(measured: Sequence[Measurement]) -> bool:
    """Returns whether each of the last two doublings has raised the speed by less than 10%."""
    speeds = [each.speed for each in measured[-3:]]
    return len(speeds) == 3 and all(
        after < _LEAST_GAIN * before for before, after in pairwise(speeds)
    )


def advice(search: Search) -> list[str]:
    """Returns the batch size that was found, the reason for the end, and a caution.

    Args:
        search: The search.
    """
    found = search.found
    return [
        search.end,
        f"Of the measured batch sizes, {found.batch_size:,} is the smallest that reaches "
        f"{_NEAR_BEST:.0%} of the best speed, with {found.speed:,.0f} examples/s.",
        "A larger batch also changes the training: an epoch has fewer steps, so tune the learning "
        "rate again, and compare the validation loss.",
    ]


def table(search: Search, title: str) -> Table:
    """Returns a table of the speed at each batch size.

    Args:
        search: The search.
        title: Model, data and devices, for the title of the table.
    """
    shown = Table(
        title=f"speed by batch size, {title}",
        title_justify="left",
        caption="Padding at the end of an epoch does not count as examples. Memory: the temporary "
        "arrays of a step on one device, such as activations, as reported by the compiler.",
        caption_justify="left",
    )
    for name in (
        "batch size",
        "ms per step",
        "quartiles, ms",
        "examples/s",
        "speed-up",
        "memory",
    ):
        shown.add_column(name, justify="right")
    for each in search.measured:
        step = each.step
        shown.add_row(
            f"{each.batch_size:,}",
            f"{step.median * 1e3:,.3f}",
            f"{step.low * 1e3:,.3f}-{step.high * 1e3:,.3f}",
            f"{each.speed:,.0f}",
            f"{each.speed / search.measured[0].speed:.2f}",
            "unknown" if each.temporary is None else decimal(each.temporary),
        )
    return shown


def plot(search: Search, title: str) -> "Figure":
    """Plots the speed over the batch size.

    Args:
        search: The search.
        title: Title of the figure.

    Returns:
        The figure, which pyplot does not manage.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()

    # Median and quartiles. The slow end of an error bar is the high quartile of the time.
    sizes = [each.batch_size for each in search.measured]
    speeds = [each.speed for each in search.measured]
    slower = [each.speed - each.examples / each.step.high for each in search.measured]
    faster = [each.examples / each.step.low - each.speed for each in search.measured]
    axes.errorbar(sizes, speeds, (slower, faster), marker="o", capsize=3, label="measured")

    # The batch size that was found, and the speed that it had to reach.
    axes.axhline(
        _NEAR_BEST * search.best.speed,
        color="tab:gray",
        linestyle="--",
        label=f"{_NEAR_BEST:.0%} of the best speed",
    )
    found = search.found
    axes.plot(
        found.batch_size,
        found.speed,
        "o",
        color="tab:orange",
        markersize=10,
        label=f"smallest that reaches it: {found.batch_size:,}",
    )

    # From zero, so that heights are proportional to the speed.
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axes.minorticks_off()
    axes.set(title=title, xlabel="batch size", ylabel="examples/s", ylim=(0, None))
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure
