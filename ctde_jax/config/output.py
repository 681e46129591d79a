"""Output of the command line for a run: descriptions for its plan, and the table of results."""

from math import prod
from pathlib import Path

from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from ctde_jax.checkpoint import CURVES, PARTITION
from ctde_jax.config.options import AggregationOptions, Config, ModelOptions, OptimizationOptions
from ctde_jax.data import Dataset
from ctde_jax.trainer import Trained


def names(config: Config, data: Dataset) -> dict[str, str]:
    """Returns the descriptions of model, optimizer, strategy and partition for `trainer.plan`."""
    picture = f" ({PARTITION})" if data.classes else ""
    return {
        "model": _describe_network(config.model, data),
        "optimizer": _describe_optimization(config.optimization),
        "strategy": _describe_strategy(config.aggregation),
        "partition": f"{config.data.partition}{picture}",
    }


def _describe_network(chosen: ModelOptions, data: Dataset) -> str:
    """Describes the network, its initialization and its precision."""
    shape = data.train.inputs.shape[1:]
    match chosen.model:
        case "mlp":
            sizes = (prod(shape), *chosen.hidden_sizes, len(data.classes) or data.targets)
            words = [f"{'-'.join(map(str, sizes))} with {chosen.activation}"]
        case "resnet":
            words = [
                f"with stages of {', '.join(map(str, chosen.channels))} channels, {chosen.layers} "
                f"block{'s' * (chosen.layers > 1)} each, {chosen.norm} normalization"
            ]
        case "cnn":
            words = [f"of {' x '.join(map(str, shape))} images"]
        case "transformer":
            size = f"hidden size {chosen.hidden_size}"
            words = [f"{chosen.layers} blocks of {size}, {chosen.heads} heads"]
        case _:
            size = f"hidden size {chosen.hidden_size}"
            words = [f"{chosen.layers} layer{'s' * (chosen.layers > 1)} of {size}"]
    # Name options only if they differ from their defaults.
    if chosen.dropout_rate:
        words.append(f"dropout rate {chosen.dropout_rate:g}")
    if chosen.init != "flax":
        words.append(f"{chosen.init} initialization")
    return ", ".join([f"{chosen.model} {words[0]}", *words[1:], chosen.precision])


def _describe_optimization(chosen: OptimizationOptions) -> str:
    """Describes the optimizer and the learning-rate schedule."""
    words = [
        f"{chosen.optimizer}, learning rate {chosen.learning_rate:g}, {chosen.schedule} schedule"
        + (f", {chosen.warmup_steps:,} warmup steps" if chosen.warmup_steps else "")
        + (f", starting at step {chosen.schedule_start:,}" if chosen.schedule_start else "")
    ]
    if chosen.weight_decay is not None:
        words.append(f"weight decay {chosen.weight_decay:g}")
    if chosen.clip_grad_norm is not None:
        words.append(f"gradients clipped to norm {chosen.clip_grad_norm:g}")
    if chosen.label_smoothing:
        words.append(f"label smoothing {chosen.label_smoothing:g}")
    if chosen.focal_gamma:
        words.append(f"focal loss with gamma {chosen.focal_gamma:g}")
    if chosen.class_weights:
        words.append(f"class weights {' '.join(chosen.class_weights)}")
    if chosen.ema_decay is not None:
        words.append(f"moving average of the parameters with decay {chosen.ema_decay:g}")
    return ", ".join(words)


def _describe_strategy(chosen: AggregationOptions) -> str:
    """Describes when devices communicate, what they send, and how the result is applied."""
    words = _describe_times(chosen)

    # Messages and their receivers.
    if chosen.reduce != "mean":
        feedback = " with error feedback" if chosen.error_feedback else ""
        kept = (
            f", {chosen.keep} of {chosen.chunk} values as {chosen.kept_as}"
            if chosen.reduce in ("top_k", "random_k")
            else ""
        )
        words.append(f"compressed by {chosen.reduce}{kept}{feedback}")
    if chosen.exchange == "gathered":
        words.append("exchanged by all-gather")
    if chosen.graph != "none":
        neighbors = {
            "ring": "in a ring",
            "exponential": "in an exponential graph",
            "pairs": "in random pairs",
        }
        words.append(f"only with neighbors {neighbors[chosen.graph]}")
    if chosen.fragments > 1:
        words.append(f"one of {chosen.fragments} fragments per round")
    if chosen.dp_clip_norm is not None:
        words.append(
            f"messages clipped to norm {chosen.dp_clip_norm:g} with noise multiplier "
            f"{chosen.dp_noise_multiplier:g}"
        )

    # The local steps and the outer optimizer.
    if chosen.proximal:
        words.append(f"proximal term {chosen.proximal:g}")
    if chosen.isotropic:
        words.append("isotropic outer gradient")
    if chosen.outer != "average":
        words.append(
            f"outer optimizer {chosen.outer} with learning rate {chosen.outer_learning_rate:g}"
        )
    name = "" if chosen.strategy == "ddp" else f"{chosen.strategy}: "
    return name + ", ".join(words)


def _describe_times(chosen: AggregationOptions) -> list[str]:
    """Describes when the devices communicate."""
    combined = "mean" if chosen.combine == "average" else chosen.combine.replace("_", " ")
    words = [f"{combined} of the gradients at every step"]
    if chosen.exact:
        words.append(
            "8 shards summed in a fixed order, so the number of devices does not change any bit"
        )
    if chosen.sync_every:
        steps = f"{chosen.sync_every} local steps" if chosen.sync_every > 1 else "local step"
        words = [f"{combined} of the parameters after every {steps}"]
    if chosen.sync_growth:
        words.append(f"more steps as the learning rate decays (growth {chosen.sync_growth:g})")
    if chosen.per_host > 1:
        steps = "in the local steps" if chosen.sync_every else "first"
        words.append(f"mean of the gradients of each {chosen.per_host} devices {steps}")
    if chosen.synchronous_steps:
        words.append(f"{chosen.synchronous_steps:,} synchronous steps first")
    if chosen.shared_steps:
        words.append(f"{chosen.shared_steps:,} steps on shared batches first")
    return words


def result(trained: Trained, folder: Path) -> Table:
    """Returns a table of the test metrics of a run, the bytes sent and the wall time.

    Args:
        trained: Result of the run.
        folder: Folder of the run.
    """
    # The title states how the run ended, and which parameters the metrics are of.
    tested = trained.tested
    last = trained.history[-1]["step"]
    title = f"after {last:,} steps"
    if trained.interrupted:
        title = (
            f"interrupted at step {last:,}; repeat the command with --run-dir {folder} to continue"
        )
    elif trained.stopped_early:
        title = f"stopped early at step {last:,}, as the validation loss no longer improved"
    if "train" not in trained.seconds:
        title += "; this run was complete, so nothing was trained"
    if trained.step < last:
        title += f"; the parameters are those of step {trained.step:,}, the lowest validation loss"

    # Metrics and traffic.
    table = Table(title=title, show_header=False)
    task = trained.task
    for row in trained.history:
        if (row["split"], row["step"]) == ("validation", trained.step):
            for name in (*task.metrics, "loss"):
                table.add_row(f"validation {name.replace('_', ' ')}", _value(name, row[name]))
    for name in (*task.metrics, "loss", *task.derived):
        table.add_row(f"test {name.replace('_', ' ')}", _value(name, tested[name]))
    table.add_row("examples evaluated", f"{tested['examples']:,}")
    sent = max(row.get("bytes_sent", 0) for row in trained.history)
    table.add_row("sent by each device", decimal(sent))

    # Wall time by part.
    table.add_section()
    for part, seconds in trained.seconds.items():
        table.add_row(part, f"{seconds:.2f} s")
    table.add_row("wall time", f"{sum(trained.seconds.values()):.2f} s")
    table.add_section()
    table.add_row("curves", Text(str(folder / CURVES), overflow="fold"))
    return table


def _value(name: str, value: float) -> str:
    """Returns a fraction of correct labels in percent, any other average with four decimals."""
    return f"{value:.2%}" if name in ("accuracy", "exact_match") else f"{value:.4f}"
