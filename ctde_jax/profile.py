"""Command `python -m ctde_jax.profile`: measures the parts of a training, and prints advice.

    python -m ctde_jax.profile --model cnn                       # options of ctde_jax.train
    python -m ctde_jax.profile --model cnn --trace runs/trace    # also writes a trace of some steps
    python -m ctde_jax.profile --model cnn --find batch-size     # measures growing batch sizes
    python -m ctde_jax.profile --model cnn --find learning-rate  # compares learning rates

`trainer/stopwatch.py` measures; this module parses the options and presents the measurements as
tables, a figure and advice. `trainer/batch_size_finder.py` does both for `--find batch-size`, and
`trainer/many/learning_rate_finder.py` for `--find learning-rate`.
"""

import os
import signal
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

import ctde_jax as ctde
from ctde_jax import config as options
from ctde_jax.bundle import streams
from ctde_jax.errors import InputError, check_known

if TYPE_CHECKING:
    import jax
    from matplotlib.figure import Figure

    from ctde_jax.trainer import Profile, Spread, Training

SECONDS = 10.0
"""Approximate duration of all turns; the minimum number of turns may take longer."""

SECONDS_PER_SIZE = 2.0
"""Approximate duration of the measurement of one batch size by `--find batch-size`."""

_FINDABLE = ("batch-size", "learning-rate")
"""Options that `--find` can find a value for."""

_BAR = 20  # characters
_COLORS = {
    "input": "tab:orange",
    "dispatch": "tab:red",
    "compute": "tab:blue",
    "aggregation": "tab:purple",
}

# Thresholds for advice.
_SMALL_BATCH = 0.8  # time of a step with half the batch size, relative to a step
_LONG_EVALUATION = 0.1  # fraction of the time of the steps between evaluations and an evaluation
_LONG_AGGREGATION = 1 / 3  # fraction of a step


def main(arguments: Sequence[str]) -> int:
    """Measures a training with the given options and prints the result.

    Args:
        arguments: Arguments of the command line.

    Returns:
        The exit status: 0, or 2 for invalid options or data.
    """
    started = time.perf_counter()

    # Help on the options of this command; the parser of the other options prints the rest.
    if {"-h", "--help"} & set(arguments):
        print(
            "--trace FOLDER  also write a trace of a few steps for XProf and Perfetto\n"
            f"--find {'|'.join(_FINDABLE)}  instead, measure doublings of --batch-size, or\n"
            "                compare short runs with different learning rates\n"
            "all other options are those of python -m ctde_jax.train:"
        )
    try:
        trace, rest = options.take("trace", arguments, "name a folder")
        find, rest = options.take("find", rest, f"be one of {', '.join(_FINDABLE)}")
        if find is not None:
            check_known("find", find, _FINDABLE)
        if find is not None and trace is not None:
            raise InputError("trace", "must be left out with --find, which writes no trace.")
        _run(
            options.parse(rest, "profile"),
            find,
            None if trace is None else Path(os.path.expanduser(trace)),
            started,
        )
        return 0
    except InputError as error:
        is_of_profile = error.option in ("find", "trace")
        option = f"--{error.option}" if is_of_profile else options.flag(error.option)
        print(f"error: {option} {error.sentence}", file=sys.stderr)
        return 2


def _run(config: options.Config, find: str | None, trace: Path | None, started: float) -> None:
    """Builds a training, measures it, and saves a figure to the run folder.

    Args:
        config: Options of the run.
        find: The option to find a value for, or None for a profile.
        trace: Folder for a trace, or None.
        started: Start of the command, by `time.perf_counter`.

    Raises:
        InputError: An option is invalid or not supported, or a folder cannot be written to.
    """
    # Check the options that this command does not support.
    ctde.devices.hosts.check_alone(ctde.devices.hosts.find_meeting(**vars(config.hosts)))
    if config.aggregation.exact:
        raise InputError("exact", "must be left out; exact training cannot be profiled.")

    # Imported here, so that the import of JAX is measured.
    from ctde_jax.config import build

    # Time what a run does once: imports, start of the devices, loading of the data.
    imported = time.perf_counter()
    devices = ctde.devices.start(
        config.aggregation.devices, ctde.devices.FAKE_DEVICES, config.aggregation.replicas
    )
    started_devices = time.perf_counter()
    seed = config.optimization.seed
    data = build.load_data(config.data, seed)
    loaded = time.perf_counter()
    once = {
        "imports": imported - started,
        "device start-up": started_devices - imported,
        "data loading": loaded - started_devices,
    }

    training = build.build_training(config, data, devices)
    title = f"{config.model.model} on {data.name}, {_count(len(devices), 'device')}"

    # Claim the folders before the measurement, whose result would be lost if they are not writable.
    if trace is not None:
        _make_trace_folder(trace)
    folder = config.run.run_dir or options.new_run_folder(config, "profile-")
    with ctde.checkpoint.claimed(folder):
        ctde.checkpoint.check_new(folder)
        if find is None:
            _profile(config, training, trace, once, title, folder / "profile.png")
        elif find == "batch-size":
            _find_batch_size(training, title, folder / "batch-size.png")
        else:
            _find_learning_rate(config, devices, title, folder / "learning-rate.png")


def _profile(
    config: options.Config,
    training: "Training",
    trace: Path | None,
    once: dict[str, float],
    title: str,
    path: Path,
) -> None:
    """Measures the parts of a training, prints tables and advice, and saves the figure.

    Args:
        config: Options of the run.
        training: The training that they describe.
        trace: Folder for a trace, or None.
        once: Time of each part of the start-up so far.
        title: Model, data and devices.
        path: File of the figure.
    """
    from ctde_jax.config import build
    from ctde_jax.trainer import picture, stopwatch

    # The partition is a function of the number of devices, for the measurement on fewer devices.
    labels = training.data.train.labels
    partition = partial(build.make_partition, config.data, labels, seed=training.seed)

    # Measure.
    screen = ctde.trainer.console()
    with screen.status("initializing") as status:
        measured = stopwatch.measure(training, partition, SECONDS, trace, status.update)
    measured = replace(measured, once={**once, **measured.once})

    # Present the result.
    title = f"{title}, {training.batch_size} examples per step"
    failure = picture.save(partial(plot, measured, title), path)
    for table in (step_table(measured, title), run_table(measured), scaling_table(measured)):
        screen.print(table)
    for sentence in advice(measured):
        screen.print(f"- {sentence}")
    screen.print(failure or f"figure     {path}")
    if trace is not None:
        screen.print(
            f"trace      {trace}: open perfetto_trace.json.gz in its deepest subfolder at "
            f"https://ui.perfetto.dev, or run pip install xprof && xprof --logdir {trace}"
        )


def _find_batch_size(training: "Training", title: str, path: Path) -> None:
    """Measures growing batch sizes, prints a table and advice, and saves the figure.

    Args:
        training: The training at the smallest batch size.
        title: Model, data and devices.
        path: File of the figure.
    """
    from ctde_jax.trainer import batch_size_finder, picture

    screen = ctde.trainer.console()
    with screen.status("initializing") as status:
        search = batch_size_finder.find(training, SECONDS_PER_SIZE, status.update)
    failure = picture.save(partial(batch_size_finder.plot, search, title), path)
    screen.print(batch_size_finder.table(search, title))
    for sentence in batch_size_finder.advice(search):
        screen.print(f"- {sentence}")
    screen.print(failure or f"figure     {path}")


def _find_learning_rate(
    config: options.Config, devices: "Sequence[jax.Device]", title: str, path: Path
) -> None:
    """Compares short runs with different learning rates, and saves the figure.

    Args:
        config: Options of the runs.
        devices: The device of each replica.
        title: Model, data and devices.
        path: File of the figure.
    """
    from ctde_jax.config import sweep
    from ctde_jax.trainer import learning_rate_finder as finder
    from ctde_jax.trainer import picture

    # Constant learning rates, rows short enough for a mean over the last steps, no evaluations.
    steps = max(finder.STEPS, config.aggregation.sync_every)
    run = replace(config.run, eval_every=steps, log_every=max(1, steps // 10))
    optimization = replace(
        config.optimization,
        schedule="constant",
        warmup_steps=0,
        schedule_start=0,
        steps=steps,
        patience=None,
    )
    short = replace(config, run=run, optimization=optimization)
    configs = [sweep.with_values(short, {"learning_rate": str(rate)}) for rate in finder.RATES]
    families = sweep.make_families(short, configs, devices, None)

    screen = ctde.trainer.console()
    outcomes = ctde.trainer.train_many(families, devices)
    comparison = finder.compare(outcomes, steps)
    failure = picture.save(partial(finder.plot, comparison, title), path)
    screen.print(finder.table(comparison, title))
    for sentence in finder.advice(comparison):
        screen.print(f"- {sentence}")
    screen.print(failure or f"figure     {path}")


def _make_trace_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            "trace", f"must be a folder that can be created, got {folder}: {error.strerror}."
        ) from error


def advice(profile: "Profile") -> list[str]:
    """Returns a sentence for each bottleneck and the options that reduce it, or one if none exists.

    Args:
        profile: The measurements.
    """
    # Each of these yields at most one sentence.
    return [
        *_about_cores(profile),
        *_about_batch(profile),
        *_about_dispatch(profile),
        *_about_input(profile),
        *_about_aggregation(profile),
        *_about_compilation(profile),
        *_about_evaluation(profile),
    ] or [f"No bottleneck was found: compute takes {_fraction(profile, 'compute'):.0%} of a step."]


def _about_cores(profile: "Profile") -> Iterable[str]:
    # `cores` is None on accelerators, which do not share cores.
    if profile.cores is None or profile.replicas == 1:
        return
    yield (
        f"{profile.replicas} fake devices share {_count(profile.cores, 'core')}, so they cannot be "
        "faster than these. They are for demonstration; compare the speed with --devices 1."
    )


def _about_batch(profile: "Profile") -> Iterable[str]:
    # `half_batch` is a ratio: the time of a step with half the batch size over that of a step.
    if profile.half_batch is None or profile.half_batch.median < _SMALL_BATCH:
        return
    per_replica = profile.batch_size // profile.replicas
    yield (
        f"With half the batch size, a step takes {profile.half_batch.median:.0%} of the time: "
        f"{per_replica} examples per device do not keep a device busy. Increase --batch-size, "
        "which costs little time per step (--find batch-size measures it), or use fewer --devices."
    )


def _about_dispatch(profile: "Profile") -> Iterable[str]:
    # A dispatch ends at the next evaluation at the latest.
    if profile.steps_per_evaluation == 1 < profile.steps:
        yield (
            "Every step is a separate dispatch, because the model is evaluated after every step. "
            "Increase --eval-every, so that a dispatch contains many steps."
        )


def _about_input(profile: "Profile") -> Iterable[str]:
    # Input is prefetched, so it delays a step only if it takes longer than everything else.
    duration = profile.parts["input"].median
    rest = _sum(profile) - duration
    if duration > rest:
        yield (
            f"Input takes {_time(duration)} per step, and all other parts take {_time(rest)}, so "
            "the devices wait for input. Increase --batch-size to reduce its time per example."
        )


def _about_aggregation(profile: "Profile") -> Iterable[str]:
    fraction = _fraction(profile, "aggregation")
    if profile.replicas > 1 and fraction > _LONG_AGGREGATION:
        yield (
            f"Aggregation, with the wait for the slowest device, takes {fraction:.0%} of a step. "
            "Communicate less often (--sync-every), or compute more per step (--batch-size)."
        )


def _about_compilation(profile: "Profile") -> Iterable[str]:
    # From tracing to the executable.
    compiling = sum(
        profile.once[part] for part in ("trace", "lower", "compile", "compile evaluation")
    )
    training = profile.steps * profile.step.median
    if compiling > training:
        yield (
            f"Compilation takes {_time(compiling)}, and all {profile.steps:,} steps take "
            f"{_time(training)}, so faster steps would hardly shorten this run."
        )


def _about_evaluation(profile: "Profile") -> Iterable[str]:
    # An interval is the steps between two evaluations, and one evaluation.
    between = profile.steps_per_evaluation * profile.step.median
    fraction = profile.evaluation.median / (between + profile.evaluation.median)
    if fraction > _LONG_EVALUATION:
        yield (
            f"Evaluation every {_count(profile.steps_per_evaluation, 'step')} takes "
            f"{fraction:.0%} of the time of training and evaluation. Increase --eval-every."
        )


def step_table(profile: "Profile", title: str) -> Table:
    """Returns a table of the time of each part of a step.

    Args:
        profile: The measurements.
        title: Model, data, devices and batch size, for the title of the table.
    """
    table = Table(title=f"step time, {title}", title_justify="left", caption_justify="left")
    _add_columns(table, "part", "median, ms", "quartiles, ms", "fraction", "")
    for part, spread in profile.parts.items():
        fraction = _fraction(profile, part)
        table.add_row(part, *_milliseconds(spread), f"{fraction:.0%}", _bar(fraction))
    table.add_section()
    table.add_row("sum of parts", f"{_sum(profile) * 1e3:,.3f}", "", "100%")
    table.add_row("training step", *_milliseconds(profile.step), "")

    # The parts are measured separately; in training they overlap, as input is prefetched.
    table.caption = (
        f"Measured in {profile.turns} turns with {profile.steps_per_dispatch} steps per dispatch. "
        "Compute is the time of a step without communication, minus dispatch; aggregation is the "
        "additional time with communication."
    )
    if profile.cores is not None:
        table.caption += (
            " On a CPU, host and devices share the cores, so only the sum of dispatch and compute "
            "is certain."
        )
    return table


def run_table(profile: "Profile") -> Table:
    """Returns a table of the time of the whole run, extrapolated from the measurements.

    Args:
        profile: The measurements.
    """
    evaluations = -(-profile.steps // profile.steps_per_evaluation)  # rounded up
    seconds = {
        **profile.once,
        f"{_count(profile.steps, 'step')}, estimated": profile.steps * profile.step.median,
        f"{_count(evaluations, 'evaluation')}, estimated": evaluations * profile.evaluation.median,
    }
    total = sum(seconds.values())
    table = Table(title="time of the whole run", title_justify="left")
    _add_columns(table, "part", "seconds", "fraction", "")
    for part, duration in seconds.items():
        fraction = duration / total
        table.add_row(part, f"{duration:,.2f}", f"{fraction:.0%}", _bar(fraction))
    table.add_section()
    table.add_row("total", f"{total:,.2f}", "100%")
    return table


def scaling_table(profile: "Profile") -> Table:
    """Returns a table of speed-up and efficiency by number of devices, for the same global batch.

    Args:
        profile: The measurements.
    """
    table = Table(
        title=f"step time by number of devices, {profile.batch_size} examples per step",
        title_justify="left",
    )
    _add_columns(
        table, "devices", "median, ms", "quartiles, ms", "examples/s", "speed-up", "efficiency"
    )
    for (count, spread), speed_up in zip(profile.scaling.items(), _speed_ups(profile), strict=True):
        table.add_row(
            f"{count}",
            *_milliseconds(spread),
            f"{profile.batch_size / spread.median:,.0f}",
            f"{speed_up:.2f}",
            f"{speed_up / count:.0%}",
        )
    return table


def plot(profile: "Profile", title: str) -> "Figure":
    """Plots the time of each part of a step, and the throughput by number of devices.

    Args:
        profile: The measurements.
        title: Title of the figure.

    Returns:
        The figure, which pyplot does not manage.
    """
    import numpy as np  # not at the top, as the measured import of JAX includes it
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 3.6), layout="constrained")
    figure.suptitle(title)
    left, right = figure.subplots(1, 2)

    # Left: median and quartiles of each part of a step.
    parts = list(profile.parts)
    milliseconds = [1e3 * profile.parts[part].median for part in parts]
    low = [1e3 * (spread.median - spread.low) for spread in profile.parts.values()]
    high = [1e3 * (spread.high - spread.median) for spread in profile.parts.values()]
    left.barh(
        parts, milliseconds, xerr=(low, high), color=[_COLORS[part] for part in parts], capsize=3
    )
    left.axvline(1e3 * profile.step.median, color="tab:gray", linestyle="--", label="training step")
    left.invert_yaxis()
    left.set(xlabel="ms per step", title="time of the parts of a step")
    left.legend()

    # Right: examples per second. The slow end of an error bar is the high quartile of the time.
    counts = list(profile.scaling)
    slow, middle, fast = (
        np.array([profile.batch_size / seconds for seconds in bounds])
        for bounds in zip(
            *((one.high, one.median, one.low) for one in profile.scaling.values()), strict=True
        )
    )
    speed_ups = np.array(_speed_ups(profile))  # [device counts]
    right.errorbar(
        counts,
        middle,
        (middle - slow, fast - middle),
        marker="o",
        capsize=3,
        label="measured (with efficiency)",
    )
    # `middle / speed_ups` is the throughput of one device.
    right.plot(
        counts,
        middle / speed_ups * counts,
        color="tab:gray",
        linestyle="--",
        label="linear scaling",
    )
    for count, speed, speed_up in zip(counts, middle, speed_ups, strict=True):
        right.annotate(
            f"{speed_up / count:.0%}",
            (count, speed),
            (0, 7),
            textcoords="offset points",
            ha="center",
        )

    # From zero, so that heights are proportional to throughput.
    right.set(xlabel="devices", title="examples/s", ylim=(0, None), xticks=counts)
    right.yaxis.set_major_formatter("{x:,.0f}")
    right.margins(x=0.1)
    right.legend()
    for axes in (left, right):
        axes.grid(alpha=0.3)
    return figure


def _add_columns(table: Table, *names: str) -> None:
    for name in names:
        table.add_column(name, justify="left" if name in ("part", "") else "right")


def _speed_ups(profile: "Profile") -> list[float]:
    """Returns the speed-up over one device for each number of devices.

    If one device cannot run the training, the speed-up of the smallest number of devices that can
    is assumed to equal this number.
    """
    fewest = min(profile.scaling)
    return [
        fewest * profile.scaling[fewest].median / spread.median
        for spread in profile.scaling.values()
    ]


def _sum(profile: "Profile") -> float:
    return sum(spread.median for spread in profile.parts.values())


def _fraction(profile: "Profile", part: str) -> float:
    return profile.parts[part].median / _sum(profile)


def _milliseconds(spread: "Spread") -> tuple[str, str]:
    return f"{spread.median * 1e3:,.3f}", f"{spread.low * 1e3:,.3f}-{spread.high * 1e3:,.3f}"


def _time(seconds: float) -> str:
    return f"{seconds:,.2f} s" if seconds >= 1 else f"{seconds * 1e3:,.3g} ms"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s' * (number > 1)}"


def _bar(fraction: float) -> str:
    return "█" * round(fraction * _BAR)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # there is nothing to save after Ctrl-C
    sys.exit(streams.run(main))
