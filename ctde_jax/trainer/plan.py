"""The plan of a run, printed before it starts: devices, data, model, batch, steps and folder."""

from collections.abc import Mapping
from pathlib import Path

import jax
from rich.table import Table

from ctde_jax.aggregate import Strategy
from ctde_jax.bundle import Recipe
from ctde_jax.cost import sentence, sentence_of_run
from ctde_jax.data import Dataset
from ctde_jax.devices import count_cores, replica
from ctde_jax.errors import on_one_line
from ctde_jax.models import count_params, fine_tuning
from ctde_jax.rounds import count_rounds
from ctde_jax.trainer.programs import Programs
from ctde_jax.trainer.training import Training

_MOST_COLUMNS = 40
"""Maximum number of columns of a table that the plan lists."""


def plan(training: Training, folder: Path | None, names: Mapping[str, str] = {}) -> Table:
    """Returns a table of the devices, data, model, batch, optimizer, strategy and folder of a run.

    Args:
        training: Model, data and all options that determine the result of the run.
        folder: Folder of the run; None if it writes no files.
        names: Descriptions by the keys `model`, `optimizer`, `strategy` and `partition`, which the
            command derives from its options. Without one, a part is described generically or left
            out.
    """
    table = _grid()
    for row in plan_rows(training, names):
        table.add_row(*row)
    if folder is not None:
        table.add_row("results", str(folder))
    return table


def plan_rows(training: Training, names: Mapping[str, str] = {}) -> list[tuple[str, str]]:
    """Returns the rows of `plan` without the folder; notes on a row follow it without a name."""
    devices = training.devices
    data = training.data

    # Devices first, then the data and how the devices divide them.
    rows = [("devices", _describe_devices(training))]
    if note := _note_on_fake_devices(training):
        rows.append(("", note))
    examples = f"{len(data.train.inputs):,} training and {len(data.test.inputs):,} test examples"
    rows.append(("data", f"{data.name}: {examples}, {data.kinds}"))
    rows += [("", note) for note in data.notes]
    if data.recipe is not None:
        header, *columns = _list_columns(data.recipe)
        rows += [("columns", header), *(("", column) for column in columns)]
    rows.append(("inputs", _describe_inputs(data)))
    if (weights := data.train.weights) is not None:
        found = f"{weights.min():g} to {weights.max():g}, {weights.mean():g} on average"
        rows.append(("weights", "one for each example of a batch" if data.stream else found))
    rows.append(("split", _describe_split(training, names.get("partition", "partition"))))

    # Model, batch, optimizer and strategy.
    count = f"{count_params(training.shapes[0]):,} parameters"
    rows.append(("model", f"{names['model']}, {count}" if "model" in names else count))
    if training.freeze is not None or training.lora_rank is not None:
        trained, _ = training.shapes_of_parts
        rows.append(("trained", fine_tuning.describe(training.shapes[0], trained)))
    microbatches = training.accumulation_steps
    cut = f" in {microbatches} microbatches" if microbatches > 1 else ""
    each = training.batch_size // len(devices)
    rows.append(("batch", f"{training.batch_size} examples, {each} per {_owner(training)}{cut}"))
    per_epoch = training.source.steps_per_epoch
    rows.append(("steps", f"{training.total_steps:,}, {per_epoch:,} per epoch"))
    if training.patience is not None:
        evaluations = f"{training.patience} evaluation{'s' * (training.patience > 1)}"
        rows.append(("stopping", f"after {evaluations} without a lower validation loss"))
    if "optimizer" in names:
        rows.append(("optimizer", names["optimizer"]))
    rows.append(("strategy", names.get("strategy") or _describe_strategy(training.strategy)))
    return rows


def wire_rows(training: Training, programs: Programs, sent: float) -> list[tuple[str, str]]:
    """Returns rows on the bytes that each device sends per round of each phase, and in all.

    Args:
        training: Model, data and all options that determine the result of the run.
        programs: The compiled programs of the unfinished phases.
        sent: Bytes that each device has sent before.
    """
    count = count_params(training.shapes[0])
    replicas = len(training.devices)
    texts = [sentence(program.traffic, count, replicas) for program in programs.phases]
    if len(training.strategy.phases) > 1:
        starts = [program.phase.start for program in programs.phases]
        texts = [f"{text}, from step {start:,}" for text, start in zip(texts, starts, strict=True)]
        sent += sum(program.sent * count_rounds(program.spans) for program in programs.phases)
        texts.append(sentence_of_run(sent, training.total_steps, count, replicas))
    return [("wire" if number == 0 else "", text) for number, text in enumerate(texts)]


def line(name: str, text: str) -> Table:
    """Returns a table of one row with the column widths of a plan, to print after it."""
    table = _grid()
    table.add_row(name, text)
    return table


def _grid() -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(min_width=len("optimizer"))
    table.add_column()
    return table


def _describe_devices(training: Training) -> str:
    devices = replica.distinct(training.devices)
    kind = devices[0].device_kind
    if devices[0].platform == "cpu":
        kind = "fake CPU" if len(devices) > 1 else "CPU"
    hosts = len({device.process_index for device in devices})
    spread = f" on {hosts} hosts" if hosts > 1 else ""
    shared = f"{len(training.devices)} replicas on " * replica.is_virtual(training.devices)
    return f"{shared}{len(devices)} {kind} device{'s' if len(devices) > 1 else ''}{spread}"


def _owner(training: Training) -> str:
    """Returns the owner of a part of the batch and of the data."""
    return "replica" if replica.is_virtual(training.devices) else "device"


def _note_on_fake_devices(training: Training) -> str | None:
    """Returns a sentence on the speed of several fake CPU devices; None for all other devices."""
    devices = replica.distinct(training.devices)
    here = sum(device.process_index == jax.process_index() for device in devices)
    if devices[0].platform != "cpu" or here == 1:
        return None
    cores = f"{count_cores()} core{'s' * (count_cores() > 1)}"
    return (
        f"{here} fake devices share {cores}: they show how devices communicate; 1 device is "
        "usually faster."
    )


def _list_columns(recipe: Recipe) -> list[str]:
    """Returns aligned lines with the kind, the gaps and the use of each column of a table."""
    cells = [("column", "kind", "missing", "inputs")]
    for column in recipe.columns[:_MOST_COLUMNS]:
        missing = f"{column.missing:,}"
        cells.append((on_one_line(column.name), column.kind, missing, column.use))
    widths = [max(map(len, each)) for each in zip(*cells, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in cells
    ]
    more = len(recipe.columns) - _MOST_COLUMNS
    return [*lines, f"and {more:,} more"] if more > 0 else lines


def _describe_inputs(data: Dataset) -> str:
    shape = " x ".join(map(str, data.train.inputs.shape[1:]))
    scaling = ""
    if data.scale.ndim:
        scaling = ", standardized"
    elif data.scale != 1:
        scaling = f", divided by {1 / float(data.scale):g}"
    return f"{shape} {data.train.inputs.dtype}{scaling}"


def _describe_split(training: Training, name: str) -> str:
    """Describes the assignment of examples to devices: reshuffled, by clients, or fixed."""
    partition = training.partition
    devices = len(training.devices)
    owner = _owner(training)
    if partition is None:
        examples = len(training.data.train.inputs) / devices
        return f"reshuffled in every epoch, {examples:,.0f} examples per {owner}"
    sizes = [len(part) for part in partition]
    if len(sizes) > devices:
        return (
            f"{name}: {len(sizes)} clients with {min(sizes):,} to {max(sizes):,} examples each; "
            f"{devices} of them, drawn at random, train in each round"
        )
    return f"{name}: {', '.join(f'{size:,}' for size in sizes)} examples, fixed to their {owner}s"


def _describe_strategy(strategy: Strategy) -> str:
    first, *later = (
        f"{_describe_phase(each)}{f' from step {start:,}' if start else ''}"
        for start, each in strategy.phases.items()
    )
    return "; ".join([first, *later])


def _describe_phase(strategy: Strategy) -> str:
    if strategy.shared_batches:
        return "the same batches on all replicas, without communication"
    combined = "mean" if strategy.reduce is Strategy.reduce else "aggregate"
    if strategy.inner_steps:
        steps = f"{combined} of the parameters after every {strategy.inner_steps} local steps"
        hosts = f", each with the mean gradient of {strategy.per_host} devices"
        return steps + hosts * (strategy.per_host > 1)
    return f"{combined} of the gradients at every step"
