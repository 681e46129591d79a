"""The federation that options of the command line describe, on the server and on its nodes.

The server sends the options that determine the result to its nodes; they are data, not code. Each
node combines them with its options of data, such as `--data-file`, which it does not take from
the server.
"""

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from ctde_jax.config import (
    Config,
    DataOptions,
    OptimizationOptions,
    build,
    deciding,
    from_saved,
)
from ctde_jax.data import Dataset
from ctde_jax.errors import InputError
from ctde_jax.nodes.federation import Federation

LOCAL = ("dataset", "data_dir", "data_file")
"""Options of data that each node chooses."""


def to_send(config: Config, nodes: int, rounds: int) -> dict[str, Any]:
    """Returns the options for the nodes, serializable as JSON."""
    options = {name: value for name, value in deciding(config).items() if name not in LOCAL}
    return {"options": options, "nodes": nodes, "rounds": rounds}


def received(sent: Mapping[str, Any] | None, local: DataOptions) -> tuple[Config, int, int]:
    """Returns configuration, number of nodes and number of rounds of a node.

    Args:
        sent: The result of `to_send`, from the server.
        local: The options of data that the node has chosen.

    Raises:
        InputError: The server sends none, or options that this version does not have.
    """
    if not isinstance(sent, Mapping) or not isinstance(sent.get("options"), Mapping):
        raise InputError(
            "server",
            "must be started by python -m ctde_jax.serve, got one that sends no options; start the "
            "node from Python, with the model and the strategy of the server.",
        )
    config = from_saved(
        {name: value for name, value in sent["options"].items() if name not in LOCAL}
    )
    chosen = {name: getattr(local, name) for name in LOCAL}
    return replace(config, data=replace(config.data, **chosen)), sent["nodes"], sent["rounds"]


def build_federation(config: Config, data: Dataset, nodes: int, rounds: int) -> Federation:
    """Builds the federation that a configuration describes.

    Args:
        config: Options of the run.
        data: Data set of the server or of a node.
        nodes: Number of nodes among which a batch is divided.
        rounds: Number of rounds.

    Raises:
        InputError: An option is invalid, alone or in combination with others, or has no meaning
            between nodes.
    """
    _check(config)
    optimization = config.optimization
    strategy = build.build_strategy(config.aggregation)
    steps = rounds * max(1, strategy.inner_steps)
    return Federation(
        model=build.build_model(config.model, data),
        optimizer=build.build_optimizer(config, data, steps),
        strategy=strategy,
        nodes=nodes,
        rounds=rounds,
        task=build.build_task(config, data),
        batch_size=_batch_size(optimization.batch_size, nodes),
        seed=optimization.seed,
        eval_every=config.run.eval_every,
        options={
            "init_from": config.run.init_from,
            "init_only": config.run.init_only or None,
            "freeze": optimization.freeze or None,
            "lora_rank": optimization.lora_rank,
            "class_weights": build.class_weights(optimization.class_weights),
            "augment": build.build_augment(config.data),
            "accumulation_steps": optimization.accumulation_steps,
            "ema_decay": optimization.ema_decay,
            "patience": optimization.patience,
        },
    )


def _batch_size(chosen: int, nodes: int) -> int:
    """Returns the global batch size; the default is rounded to a multiple of the nodes."""
    if chosen != OptimizationOptions().batch_size:
        return chosen
    return max(1, round(chosen / nodes)) * nodes


_UNUSED = {
    "partition": "as each node has its data",
    "clients": "as each node has its data",
    "devices": "as the server does not train; nodes have --devices",
    "replicas": "as the server does not train; nodes have --devices",
    "reestimate_batches": "as the server has no training batches",
    "on_nonfinite": "as a node does not send a message that is NaN or infinite",
    "branch_from": "which no server supports",
    "mirror": "which no server supports",
    "report": "which no server supports",
}
"""Options that have no meaning between nodes, each with the reason."""


def _check(config: Config) -> None:
    """Raises InputError if an option is set that has no meaning between nodes."""
    default = Config()
    for group in fields(config):
        chosen = getattr(config, group.name)
        for option in fields(chosen):
            value = getattr(chosen, option.name)
            is_default = value == getattr(getattr(default, group.name), option.name)
            if option.name in _UNUSED and not is_default:
                raise InputError(
                    option.name, f"must be left out between nodes, {_UNUSED[option.name]}."
                )
