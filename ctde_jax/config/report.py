"""Tables that the command line prints before and after a run: the plan and the result."""

from math import prod
from pathlib import Path

import jax
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from ctde_jax.config.options import AggregationOptions, Config, ModelOptions, OptimizationOptions
from ctde_jax.data import Dataset
from ctde_jax.devices import count_cores
from ctde_jax.models import count_params
from ctde_jax.trainer import Trained, Training


def plan(config: Config, training: Training, folder: Path) -> Table:
    """Returns a table of what is trained, on which devices and data, and of the output folder."""
    devices = training.devices
    data = training.data
    partition = training.partition
    network = config.model
    optimization = config.optimization
    kind = "fake CPU" if devices[0].platform == "cpu" else devices[0].device_kind
    params, _ = training.shapes

    # Devices and hosts. Fake devices share the cores of this host.
    picture = " (partition.png)" if data.classes else ""
    table = Table.grid(padding=(0, 2))
    count = len({device.process_index for device in devices})
    spread = f" on {count} hosts" if count > 1 else ""
    table.add_row(
        "devices", f"{len(devices)} {kind} device{'s' if len(devices) > 1 else ''}{spread}"
    )
    here = sum(device.process_index == jax.process_index() for device in devices)
    if devices[0].platform == "cpu" and here > 1:
        cores = f"{count_cores()} core{'s' * (count_cores() > 1)}"
        table.add_row(
            "",
            f"{here} fake devices share {cores}: for demonstration; --devices 1 is usually faster.",
        )

    # Data set and inputs.
    table.add_row(
        "data",
        f"{data.name}: {len(data.train.inputs):,} training and {len(data.test.inputs):,} test "
        f"examples, {data.kinds}",
    )
    for note in data.notes:
        table.add_row("", note)
    table.add_row("inputs", _describe_inputs(data))

    # Assignment of examples: reshuffled, to clients, or to devices.
    if partition is None:
        table.add_row(
            "split",
            f"dealt anew in every epoch, {len(data.train.inputs) / len(devices):,.0f} examples to "
            "each device",
        )
    elif len(partition) > len(devices):
        sizes = f"{min(map(len, partition)):,} to {max(map(len, partition)):,}"
        clients = (
            f"{config.data.partition}: {len(partition)} clients keep {sizes} examples each{picture}"
        )
        table.add_row(
            "split", f"{clients}, and {len(devices)} of them, drawn anew, train in each round"
        )
    else:
        sizes = ", ".join(f"{len(part):,}" for part in partition)
        table.add_row(
            "split", f"{config.data.partition}: {sizes} examples stay on their device{picture}"
        )

    # Model, batch, optimizer and strategy.
    table.add_row(
        "model", f"{describe_network(network, data)}, {count_params(params):,} parameters"
    )
    groups = (
        f" in {optimization.accumulation_steps} groups"
        if optimization.accumulation_steps > 1
        else ""
    )
    table.add_row(
        "batch",
        f"{optimization.batch_size} examples a step, {optimization.batch_size // len(devices)} on "
        f"each device{groups}",
    )
    table.add_row(
        "steps", f"{training.total_steps:,}, {training.source.steps_per_epoch:,} an epoch"
    )
    table.add_row("optimizer", describe_optimization(optimization))
    table.add_row("strategy", describe_strategy(config.aggregation))
    table.add_row("results", str(folder))
    return table


def describe_network(chosen: ModelOptions, data: Dataset) -> str:
    """Describes the network, its initialization and its precision."""
    shape = data.train.inputs.shape[1:]
    match chosen.model:
        case "mlp":
            sizes = (prod(shape), *chosen.hidden_sizes, len(data.classes))
            words = [f"{'-'.join(map(str, sizes))} with {chosen.activation}"]
        case "resnet":
            words = [
                f"{chosen.layers} a stage of {', '.join(map(str, chosen.channels))} channels, "
                f"{chosen.norm} norm"
            ]
        case "cnn":
            words = [f"on {' x '.join(map(str, shape))}"]
        case "transformer":
            words = [f"{chosen.layers} blocks of size {chosen.hidden_size}, {chosen.heads} heads"]
        case _:
            words = [
                f"{chosen.layers} layer{'s' * (chosen.layers > 1)} of size {chosen.hidden_size}"
            ]
    # Name options only if they differ from their defaults.
    if chosen.dropout_rate:
        words.append(f"dropout rate {chosen.dropout_rate:g}")
    if chosen.init != "flax":
        words.append(f"{chosen.init} start")
    return ", ".join([f"{chosen.model} {words[0]}", *words[1:], chosen.precision])


def describe_optimization(chosen: OptimizationOptions) -> str:
    """Describes the optimizer and the learning-rate schedule."""
    words = [
        f"{chosen.optimizer}, learning rate {chosen.learning_rate:g}, {chosen.schedule}, "
        f"{chosen.warmup_steps} warm-up steps"
        + (f", starting at step {chosen.schedule_start:,}" if chosen.schedule_start else "")
    ]
    if chosen.weight_decay is not None:
        words.append(f"weight decay {chosen.weight_decay:g}")
    if chosen.clip_grad_norm is not None:
        words.append(f"gradients of at most norm {chosen.clip_grad_norm:g}")
    if chosen.label_smoothing:
        words.append(f"labels smoothed by {chosen.label_smoothing:g}")
    if chosen.ema_decay is not None:
        words.append(f"averaged with decay {chosen.ema_decay:g}")
    return ", ".join(words)


def describe_strategy(chosen: AggregationOptions) -> str:
    """Describes when devices communicate, what they send, and how the result is applied."""
    combined = (
        "the mean" if chosen.combine == "average" else f"the {chosen.combine.replace('_', ' ')}"
    )
    # When the devices communicate.
    words = [f"{combined} of the gradients at every step"]
    if chosen.exact:
        words.append(
            "of 8 shards in one order, so that bits do not depend on the number of devices"
        )
    if chosen.sync_every:
        steps = "every step" if chosen.sync_every == 1 else f"every {chosen.sync_every} steps"
        words = [f"{combined} of the parameters after {steps} alone"]
    if chosen.synchronous_steps:
        words.append(f"after {chosen.synchronous_steps} synchronous steps")

    # Messages and their receivers.
    if chosen.reduce != "mean":
        feedback = " with error feedback" if chosen.error_feedback else ""
        kept = (
            f", {chosen.keep} of {chosen.chunk} as {chosen.kept_as}"
            if chosen.reduce in ("top_k", "random_k")
            else ""
        )
        words.append(f"sent as {chosen.reduce}{kept}{feedback}")
    if chosen.exchange == "gathered":
        words.append("from everybody to everybody")
    if chosen.graph != "none":
        neighbors = {
            "ring": "in a ring",
            "exponential": "in an exponential graph",
            "pairs": "in random pairs",
        }
        words.append(f"with the neighbors {neighbors[chosen.graph]}, and no center")
    if chosen.fragments > 1:
        words.append(f"one of {chosen.fragments} fragments at a time")
    if chosen.dp_clip_norm is not None:
        words.append(
            f"clipped to {chosen.dp_clip_norm:g} with noise of {chosen.dp_noise_multiplier:g}"
        )

    # The local steps and the outer optimizer.
    if chosen.proximal:
        words.append(f"pulled to the center by {chosen.proximal:g}")
    if chosen.isotropic:
        words.append("the change made isotropic")
    if chosen.outer != "average":
        words.append(f"followed by {chosen.outer}, learning rate {chosen.outer_learning_rate:g}")
    name = "" if chosen.strategy == "ddp" else f"{chosen.strategy}: "
    return name + ", ".join(words)


def _describe_inputs(data: Dataset) -> str:
    shape = " x ".join(map(str, data.train.inputs.shape[1:]))
    seen = "as they are"
    if data.scale.ndim:
        seen = "standardized"
    elif data.scale != 1:
        seen = f"divided by {1 / float(data.scale):g}"
    return f"{shape} {data.train.inputs.dtype}, which reach the model {seen}"


def result(trained: Trained, folder: Path) -> Table:
    """Returns a table of the test metrics of a run, its traffic and its wall time."""
    # The title names the step of the parameters, and how the run ended.
    tested = trained.tested
    title = f"after {trained.step:,} steps"
    if trained.interrupted:
        title = (
            f"interrupted at step {trained.step:,}; the same command with --run-dir {folder} "
            "goes on"
        )
    elif "train" not in trained.seconds:
        title = f"complete at step {trained.step:,} before; nothing was trained"
    if trained.step < trained.history[-1]["step"]:
        title += ", the best of those evaluated"

    # Test metrics and traffic.
    table = Table(title=title, show_header=False)
    table.add_row("test accuracy", f"{tested['accuracy']:.2%}")
    table.add_row("test loss", f"{tested['loss']:.4f}")
    for name in trained.task.of_the_loss:
        table.add_row(f"test {name.replace('_', ' ')}", f"{tested[name]:.4f}")
    table.add_row("examples evaluated", f"{tested['examples']:,}")
    sent = max(row.get("bytes_sent", 0) for row in trained.history)
    table.add_row("sent by each device", decimal(sent))

    # Wall time by part.
    table.add_section()
    for part, seconds in trained.seconds.items():
        table.add_row(part, f"{seconds:.2f} s")
    table.add_row("wall time", f"{sum(trained.seconds.values()):.2f} s")
    table.add_section()
    table.add_row("curves", Text(str(folder / "curves.png"), overflow="fold"))
    return table
