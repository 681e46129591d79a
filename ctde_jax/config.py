"""The options of a run. This file is the command line: a field is an option, its docstring the help.

A saved configuration is a JSON object of options by name. It is read as a command line that stands before the user's
own, so it passes the same checks, and what the user types wins.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from itertools import zip_longest
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import tyro

from ctde_jax.errors import InputError, check_known, nearest

File = Annotated[Path | None, tyro.conf.arg(metavar="FILE")]
Folder = Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")]
Count = Annotated[int | None, tyro.conf.arg(metavar="INT")]


@dataclass(frozen=True)
class Data:
    """Which examples there are, and which device gets them."""

    dataset: Literal["digits", "mnist", "fashion_mnist", "npz", "csv"] = "digits"
    """Digits come with scikit-learn, the MNIST family is downloaded where absent, npz and csv are your --data-file."""

    data_dir: Folder = None
    """Folder with the IDX files of the MNIST family, plain or gz; by default your cache folder."""

    data_file: File = None
    """Your .npz file (x_train, y_train and maybe x_test, y_test) or .csv file."""

    label_column: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """Name of the csv column that holds the label; by default the last one."""

    partition: Literal["reshuffled", "iid", "by_label", "dirichlet"] = "reshuffled"
    """Who gets which examples: dealt anew in every epoch, or kept for good, shared out at random or by label."""

    label_shards: int = 2
    """Shards of the examples sorted by label that each device keeps, for the partition by_label."""

    dirichlet_alpha: float = 0.5
    """How even each label's shares are, for the partition dirichlet: small is uneven, large is even."""


@dataclass(frozen=True)
class Model:
    """What is trained."""

    model: Literal["mlp"] = "mlp"
    """The network."""

    widths: tuple[int, ...] = (128,)
    """Widths of the hidden layers; the input's and the output's are the data's."""

    activation: Literal["tanh", "relu", "gelu", "silu"] = "tanh"
    """The function between two layers."""

    precision: Literal["f32", "bf16"] = "f32"
    """What the network computes in; parameters and their updates are always f32."""


@dataclass(frozen=True)
class Optimization:
    """How each step goes downhill."""

    optimizer: Literal["sgd", "momentum", "adam", "adamw"] = "adam"
    """The rule that turns gradients into updates."""

    learning_rate: float = 0.008
    """The largest learning rate of the run."""

    schedule: Literal["constant", "cosine", "linear"] = "cosine"
    """How the learning rate goes on after the warm-up; cosine and linear end at zero."""

    warmup_steps: int = 0
    """Optimizer steps in which the learning rate rises from zero."""

    batch_size: int = 64
    """Examples of one optimizer step, over all devices together."""

    epochs: int = 10
    """How often to go through the training data."""

    steps: Count = None
    """Optimizer steps to take, instead of --epochs."""

    seed: int = 0
    """Of the model's start, the data's order and dropout."""


@dataclass(frozen=True)
class Aggregation:
    """How the devices agree."""

    devices: Count = None
    """Devices to train on; by default all accelerators, or 4 fake CPU devices where there is none."""

    sync_every: int = 0
    """Steps that a device takes alone before the parameters are averaged; 0 averages the gradients of every step."""


@dataclass(frozen=True)
class Run:
    """Where the results go, and how often something is measured."""

    config: File = None
    """The config.json of a run that is to be repeated; options on the command line replace the saved ones."""

    run_dir: Folder = None
    """A new folder for configuration, metrics and curves; by default runs/ with data set, model and time."""

    eval_every: Count = None
    """Optimizer steps between two evaluations on the test data; by default an epoch."""

    log_every: int = 20
    """At most so many optimizer steps lie between two lines of metrics."""


@dataclass(frozen=True)
class Config:
    """Trains one model centrally over many devices, and evaluates what they agreed on."""

    data: Data = field(default_factory=Data)
    model: Model = field(default_factory=Model)
    optimization: Optimization = field(default_factory=Optimization)
    aggregation: Aggregation = field(default_factory=Aggregation)
    run: Run = field(default_factory=Run)


def parse(arguments: Sequence[str]) -> Config:
    """Reads a command line, and the saved configuration that it names.

    A value of the wrong type, and `--help`, end the process as command lines do.

    Raises:
        InputError: An option or a name is not known, or the saved configuration cannot be read.
    """
    _check_names(arguments)
    chosen = _parse(arguments)
    if chosen.run.config is None:
        return chosen
    saved = _saved_arguments(chosen.run.config)
    _check_names(saved)
    return _parse([*saved, *arguments])


def save(config: Config, path: Path) -> None:
    """Writes the options as a JSON object that `--config` takes; the folder is left out, as each run has its own."""
    groups = [getattr(config, group.name) for group in fields(config)]
    chosen = {option.name: getattr(group, option.name) for group in groups for option in fields(group)}
    del chosen["config"], chosen["run_dir"]
    path.write_text(json.dumps(chosen, indent=2, default=str) + "\n", encoding="utf-8")


def flag(argument: str) -> str:
    """Writes an argument of the library as the option that sets it, where there is one."""
    option = {"inner_steps": "sync_every"}.get(argument, argument)
    return _as_flag(option) if option in _option_types() else argument


def _parse(arguments: Sequence[str]) -> Config:
    flat = tyro.conf.configure(tyro.conf.OmitArgPrefixes)(Config)
    return tyro.cli(flat, prog="python -m ctde_jax.train", args=arguments)


def _saved_arguments(path: Path) -> list[str]:
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            "config", f"must name the config.json of a run, but {path} could not be read: {error}."
        ) from error
    if not isinstance(saved, dict):
        raise InputError("config", f"must name a JSON object of options, but {path} holds a {type(saved).__name__}.")
    arguments: list[str] = []
    for name, value in saved.items():
        if value is not None:
            values = value if isinstance(value, list) else [value]
            arguments += [_as_flag(name), *map(str, values)]
    return arguments


def _check_names(arguments: Sequence[str]) -> None:
    """Suggests the nearest known name for an option, or a name given to an option, that is not known."""
    hints = {_as_flag(name): hint for name, hint in _option_types().items()}
    words = [word for argument in arguments for word in argument.split("=", 1)]
    for word, following in zip_longest(words, words[1:], fillvalue=""):
        if word.startswith("--"):
            flag = word.replace("_", "-")
            if flag not in {*hints, "--help"}:
                raise InputError(word, f"is no option; did you mean {nearest(flag, hints)}? --help lists them all.")
            if get_origin(hints.get(flag)) is Literal:
                check_known(flag, following, get_args(hints[flag]))


def _option_types() -> dict[str, Any]:
    groups = get_type_hints(Config).values()
    return {name: hint for group in groups for name, hint in get_type_hints(group).items()}


def _as_flag(name: str) -> str:
    return "--" + name.replace("_", "-")
