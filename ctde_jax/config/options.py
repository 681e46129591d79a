"""The options of a run. This file is the command line: a field is an option, its docstring the help.

A saved configuration is a JSON object of options by name. It is read as a command line that stands before the user's
own, so it passes the same checks, and what the user types wins.
"""

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from datetime import datetime
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import tyro

from ctde_jax.bundle import read_small
from ctde_jax.config.presets import MODELS, PRESETS, Preset, as_flag, describe
from ctde_jax.errors import InputError, check_known, check_seed, did_you_mean, quoted

# The help of an option without a value of its own says in words what happens by default.
File = Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="")]
Folder = Annotated[Path | None, tyro.conf.arg(metavar="FOLDER", help_behavior_hint="")]
Name = Annotated[str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint="")]
Names = Annotated[tuple[str, ...], tyro.conf.arg(metavar="PATTERN [PATTERN ...]", help_behavior_hint="")]
Text = Annotated[str | None, tyro.conf.arg(metavar="TEXT", help_behavior_hint="")]
Count = Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="")]
Strategy = Annotated[
    Literal[tuple(PRESETS)],  # pyright: ignore[reportInvalidTypeForm]
    tyro.conf.arg(
        help=f"A published method: default values for the options below and --optimizer.\n{describe(PRESETS)}"
    ),
]
Number = Annotated[float | None, tyro.conf.arg(metavar="FLOAT", help_behavior_hint="")]


@dataclass(frozen=True)
class Data:
    """Which examples there are, and which device gets them."""

    dataset: Literal["digits", "mnist", "fashion_mnist", "cifar10", "text", "npz", "csv"] = "digits"
    """Digits come with scikit-learn; the MNIST family and CIFAR-10 are downloaded where absent; text, npz and csv are
    your --data-file."""

    data_dir: Folder = None
    """Folder with the files of the MNIST family (IDX, plain or gz) or of CIFAR-10 (binary); by default your cache
    folder."""

    data_file: File = None
    """Your text in UTF-8, .npz file (x_train, y_train and maybe x_test, y_test) or folder of .npy files of these names,
    or .csv file; by default none."""

    window: int = 128
    """Characters of a text that make up an example."""

    stride: Count = None
    """Characters from the start of a training window to the start of the next; by default those of a window."""

    sequence: Literal["none", "rows", "pixels"] = "none"
    """Whether pictures are read as sequences, row by row or pixel by pixel."""

    shift: int = 0
    """Pixels by which a training picture is moved at random, at most, anew in every epoch."""

    flip: bool = False
    """Whether to mirror training pictures at random, left to right."""

    cutout: int = 0
    """Side of a square that is cut out of training pictures at random, in pixels."""

    validation_share: float = 0.0
    """Share of the training examples that is set aside to say when to stop; see --patience."""

    label_column: Name = None
    """Name of the csv column that holds the label; by default the last one."""

    partition: Literal["reshuffled", "iid", "by_label", "dirichlet"] = "reshuffled"
    """Who gets which examples: dealt anew in every epoch, or kept for good, shared out at random or by label."""

    label_shards: int = 2
    """Shards of the examples sorted by label that each device keeps, for the partition by_label."""

    clients: Count = None
    """Parts of the partition, of which each device trains one, drawn anew in every round; by default one a device."""

    dirichlet_alpha: float = 0.5
    """How even each label's shares are, for the partition dirichlet: small is uneven, large is even."""


@dataclass(frozen=True)
class Model:
    """What is trained."""

    model: Annotated[
        Literal[tuple(MODELS)],  # pyright: ignore[reportInvalidTypeForm]
        tyro.conf.arg(help=f"The network, and default values for the options of its kind.\n{describe(MODELS)}"),
    ] = "mlp"

    widths: tuple[int, ...] = (128,)
    """Widths of an mlp's hidden layers, the input's and the output's being the data's; or the channels of a resnet's
    stages."""

    activation: Literal["tanh", "relu", "gelu", "silu"] = "tanh"
    """The function between two layers of an mlp."""

    width: int = 128
    """Numbers in the state of a recurrent layer, or in the vector of a transformer's token."""

    layers: int = 1
    """Recurrent layers, blocks of a transformer, or blocks in each stage of a resnet."""

    heads: int = 4
    """Parts of a vector that a transformer's attention looks at by themselves."""

    dropout: float = 0.0
    """Share of the numbers that are left out at random in training."""

    norm: Literal["group", "batch"] = "group"
    """What a resnet normalizes over: groups of channels of one example, or all examples."""

    batch_statistics: Literal["averaged", "synchronized"] = "synchronized"
    """Examples over which --norm batch takes its statistics. synchronized: the whole batch, so the number of devices
    changes nothing; with --sync-every, the examples of one device. averaged: always the examples of one device."""

    init: Literal["flax", "glorot", "he", "orthogonal", "delta_orthogonal", "recurrent", "residual", "lsuv", "mup"] = (
        "flax"
    )
    """How the weights start."""

    base_width: Count = None
    """Width at which the learning rate of --init mup was found; by default none."""

    precision: Literal["f32", "bf16"] = "f32"
    """What the network computes in, by JAX's default matrix products; parameters and updates are always f32."""


@dataclass(frozen=True)
class Optimization:
    """How each step goes downhill."""

    optimizer: Literal["sgd", "momentum", "adam", "adamw", "lion", "muon"] = "adam"
    """The rule that turns gradients into updates."""

    learning_rate: float = 0.008
    """The largest learning rate of the run."""

    schedule: Literal["constant", "cosine", "linear"] = "cosine"
    """How the learning rate goes on after the warm-up; cosine and linear end at zero."""

    warmup_steps: int = 0
    """Optimizer steps in which the learning rate rises from zero."""

    schedule_start: int = 0
    """Optimizer step at which warmup and schedule start; for --branch-from with --learning-rate, --schedule or
    --warmup-steps, the step of that checkpoint."""

    weight_decay: Number = None
    """Share of the kernels that a step takes off, in units of the learning rate; by default 0.0001 for adamw, 0.001 for
    lion, and 0 for muon."""

    max_grad_norm: Number = None
    """Norm to which longer gradients are shortened; by default they are not."""

    label_smoothing: float = 0.0
    """Share of the uniform distribution in the labels that training aims at."""

    batch_size: int = 64
    """Examples of one optimizer step, over all devices together."""

    accumulate: int = 1
    """Groups in which a device computes its part of a batch, one after another, to save memory."""

    ema_decay: Number = None
    """Share that an exponential moving average of the parameters keeps of itself whenever devices agree, from the first
    parameters on; then that average is evaluated and returned; by default there is none."""

    patience: Count = None
    """Evaluations in a row that may fail to lower the validation loss before training ends; by default any number."""

    on_nonfinite: Literal["stop", "skip", "rollback"] = "stop"
    """What to do where loss or parameters become NaN or infinite: stop; leave out that round on all devices; or go back
    to the newest checkpoint and halve all updates, at most three times."""

    epochs: int = 10
    """How often to go through the training data."""

    steps: Count = None
    """Optimizer steps to take, instead of --epochs; by default those of the epochs."""

    seed: int = 0
    """Of the model's start, the data's order and dropout."""


@dataclass(frozen=True)
class Aggregation:
    """How the devices agree."""

    devices: Count = None
    """Devices to train on, of each host; by default all accelerators, or if there is none 4 fake CPU devices, and of
    several hosts 1 each."""

    strategy: Strategy = "ddp"

    sync_every: int = 0
    """Steps that a device takes alone before they agree on parameters; 0 agrees on the gradient of every step."""

    exact: bool = False
    """Whether the training has the same bits on 1, 2, 4 and 8 fake CPU devices: 8 shards of each batch are computed one
    after another, and their gradients summed in one order by every device."""

    synchronous_steps: int = 0
    """Steps at the start of the run at which the gradients are averaged, before --sync-every begins."""

    reduce: Literal["mean", "int8", "int4", "int2", "sign", "top_k", "random_k", "power_sgd"] = "mean"
    """What is sent: numbers in float32 or fewer bits, the largest or random ones only, or products of low rank."""

    combine: Literal[
        "average", "median", "trimmed_mean", "krum", "multi_krum", "geometric_median", "centered_clipping"
    ] = "average"
    """What is made of what arrives: the average by examples, or a rule that bears bad devices."""

    exchange: Literal["two_phase", "gathered"] = "two_phase"
    """How compressed messages travel: through the owner of each slice, or from everybody to everybody."""

    error_feedback: bool = False
    """Whether to send with the next message what this one could not say."""

    feedback_decay: float = 1.0
    """The part of it that is still sent, from 0 to 1."""

    levels: Literal["linear", "statistical"] = "linear"
    """The values that few bits can say: evenly spaced, or the best for normally distributed numbers."""

    keep: int = 128
    """Numbers that top_k and random_k keep in each chunk."""

    chunk: int = 4096
    """Numbers in a chunk."""

    kept_as: Literal["f32", "int8", "int4", "int2", "sign"] = "f32"
    """How the kept numbers are written."""

    rank: int = 4
    """Rank of the products that power_sgd sends."""

    byzantine: int = 1
    """How many bad devices trimmed_mean, krum and multi_krum must bear."""

    clip_radius: float = 1.0
    """How far from the last message centered_clipping follows a device, in the norm of a whole message."""

    clip_norm: Number = None
    """Norm to which each device's message is clipped, for differential privacy; by default none."""

    noise_multiplier: float = 0.0
    """Standard deviation of the noise on the sum of clipped messages, in units of --clip-norm."""

    outer: Literal["average", "momentum", "nesterov", "adam"] = "average"
    """What the center does with the agreed change: follow it, or an optimizer's step."""

    outer_learning_rate: float = 1.0
    """Of the outer optimizer."""

    outer_momentum: float = 0.9
    """Of the outer optimizers momentum and nesterov."""

    isotropic: bool = False
    """Whether to give the agreed change of each matrix equal singular values before the outer optimizer."""

    proximal: float = 0.0
    """How strongly a device is pulled to the round's first parameters while it is alone."""

    fragments: int = 1
    """Parts of the model that are agreed on in turn, one a round, during the next round's steps."""

    graph: Literal["none", "ring", "exponential", "pairs"] = "none"
    """The neighbors with whom each device mixes its own parameters, instead of a center."""


@dataclass(frozen=True)
class Run:
    """Where the results go, and how often something is measured."""

    config: File = None
    """The config.json of a run to be repeated, its options replaced by those given here; by default none."""

    run_dir: Folder = None
    """The folder for configuration, metrics, curves and checkpoints; by default runs/ with data set, model and time."""

    resume: Literal["auto", "never"] = "auto"
    """Whether to continue the run in --run-dir; `never` trains from the start, and moves an earlier run into the
    subfolder previous-1, or the next number."""

    init_from: Folder = None
    """Start from the parameters of this run, checkpoint, bundle or .safetensors file (default: random
    initialization). The optimizer state and the step start anew; see --branch-from to continue a run with both."""

    init_only: Names = ()
    """Patterns of the parameters to take from --init-from, such as 'layers/0/*' (default: all of them must match)."""

    branch_from: Folder = None
    """Continue from this checkpoint of another run, with its options except those given here (default: none)."""

    save_every: Count = None
    """At most so many optimizer steps, or a round where that is longer, lie between two checkpoints; by default those
    of about a minute."""

    keep_checkpoints: int = 2
    """How many of the newest checkpoints stay."""

    keep_best: Name = None
    """The loss, or the metric such as accuracy, whose best checkpoint stays beside the newest, as measured on the
    validation split or else the test split; whatever is the best so far is saved at once; by default only the newest
    stay."""

    eval_every: Count = None
    """Optimizer steps between two evaluations, which wait for the end of a round; by default an epoch."""

    log_every: int = 20
    """At most so many optimizer steps, or a round where that is longer, lie between two lines of metrics."""

    reestimate_batches: int = 0
    """Training batches over which --norm batch takes its statistics anew before every evaluation."""

    prompt: Text = None
    """How the text starts that a language model writes at every evaluation; by default with the first character of its
    training text."""

    sample_length: int = 200
    """Characters of that text; 0 for none."""


@dataclass(frozen=True)
class Hosts:
    """Where several hosts meet, each of which runs this command; by default what Slurm, MPI or a TPU pod says."""

    coordinator: Text = None
    """Address and port of host 0, which it opens and all others reach, such as 10.0.0.1:1234; by default that of the
    launcher."""

    num_processes: Count = None
    """How many hosts there are; by default as many as the launcher has started."""

    process_id: Count = None
    """Which of them this is, from 0; by default as the launcher says."""

    coordinator_bind: Text = None
    """Address and port that host 0 opens where it is another than --coordinator, such as 0.0.0.0:1234; nobody who
    reaches it is asked who they are."""

    join_timeout: int = 300
    """Seconds that the hosts may take to come."""


@dataclass(frozen=True)
class Config:
    """Trains one model centrally over many devices, and evaluates what they agreed on."""

    data: Data = field(default_factory=Data)
    model: Model = field(default_factory=Model)
    optimization: Optimization = field(default_factory=Optimization)
    aggregation: Aggregation = field(default_factory=Aggregation)
    run: Run = field(default_factory=Run)
    hosts: Hosts = field(default_factory=Hosts)


def parse(arguments: Sequence[str]) -> Config:
    """Reads a command line, and the saved configuration that it names.

    `--help` prints the options and ends the process.

    Raises:
        InputError: An option, a name or a value is wrong, or the saved configuration cannot be read.
    """
    typed = _check(arguments)
    if {"--epochs", "--steps"} <= typed:
        raise InputError("epochs", "and --steps exclude each other; give one.")
    chosen = _parse(arguments)
    options: dict[str, Any] = {}
    saved, is_parent = chosen.run.config, False
    if saved is None and chosen.run.branch_from is not None:
        saved = _config_of_branch(chosen.run)
        is_parent = saved is None
        saved = saved or _config_of(chosen.run.branch_from)
    if saved is not None:
        options = _load(saved)
        if is_parent:  # where its parameters came from is not where those of the branch come from
            options = {name: value for name, value in options.items() if name not in _STARTS}
            if typed & {"--learning-rate", "--schedule", "--warmup-steps"}:
                options["schedule_start"] = _step_of(chosen.run.branch_from)
        if "--epochs" in typed:
            options.pop("steps", None)
        _check(_as_arguments(options))
    model, strategy = options.get("model", "mlp"), options.get("strategy", "ddp")
    if "--model" in typed:
        options = _without(options, Model, MODELS[model], MODELS[chosen.model.model])
        model = chosen.model.model
    if "--strategy" in typed:
        options = _without(options, Aggregation, PRESETS[strategy], PRESETS[chosen.aggregation.strategy])
        strategy = chosen.aggregation.strategy
    options = {**MODELS[model].options, **PRESETS[strategy].options, **options}
    parsed = _parse([*_as_arguments(options), *arguments])
    _check_effect(typed, parsed)
    return parsed


_STARTS = ("init_from", "init_only", "branch_from")
"""The options that determine the first parameters of a run."""


def _config_of_branch(run: Run) -> Path | None:
    """Returns the saved options of a branch that was started before; its parent may be gone."""
    path = None if run.run_dir is None else run.run_dir / "config.json"
    return path if path is not None and run.resume == "auto" and os.path.isfile(path) else None


def _config_of(checkpoint: Path) -> Path | None:
    """Returns the saved options of the run to which a checkpoint belongs; None for what is no checkpoint."""
    if not os.path.isfile(checkpoint / "manifest.json"):
        return None
    path = checkpoint.absolute().parent.parent / "config.json"
    if not path.is_file():
        raise InputError(
            "branch_from",
            f"must be a checkpoint of a run of python -m ctde_jax.train, such as runs/mine/checkpoints/step-00000100, "
            f"and {quoted(str(checkpoint))} belongs to none: there is no {path}.",
        )
    return path


def _step_of(checkpoint: Path | None) -> int:
    """Returns the optimizer steps of a checkpoint, or 0 if its manifest cannot be read, which is reported later."""
    try:
        assert checkpoint is not None
        return int(json.loads((checkpoint / "manifest.json").read_text(encoding="utf-8"))["position"]["step"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return 0


def save(config: Config, path: Path) -> None:
    """Writes the options as a JSON object that `--config` takes, without those that each run has for itself."""
    chosen = {name: value for name, value in _flat(config).items() if name not in _OF_ONE_RUN}
    path.write_text(json.dumps(chosen, indent=2, default=lambda p: str(p.resolve())) + "\n", encoding="utf-8")


def deciding(config: Config) -> dict[str, Any]:
    """Returns the options that decide the numbers of a run, by name."""
    options = _flat(config).items()
    return {name: value for name, value in options if name not in _OF_ONE_RUN + _DECIDE_NOTHING}


_OF_ONE_RUN = ("config", "run_dir", "resume", *(option.name for option in fields(Hosts)))
_DECIDE_NOTHING = (
    *_STARTS,
    "devices",
    "data_dir",
    "data_file",
    "epochs",
    "save_every",
    "log_every",
    "keep_checkpoints",
    "keep_best",
    "prompt",
    "sample_length",
)
"""Another number of devices, or another place of the data, is the same run; epochs count as steps."""


def _flat(config: Config) -> dict[str, Any]:
    groups = [getattr(config, group.name) for group in fields(config)]
    return {option.name: getattr(group, option.name) for group in groups for option in fields(group)}


def new_run_folder(config: Config, prefix: str = "") -> Path:
    """Names a folder for a run that none is named for: by data, model, time and process, as two may start at once."""
    now = f"{datetime.now():%Y%m%d-%H%M%S}-{os.getpid()}"
    return Path("runs") / f"{prefix}{config.data.dataset}-{config.model.model}-{now}"


def take(option: str, arguments: Sequence[str], rule: str) -> tuple[str | None, list[str]]:
    """Takes an option that only one command has, with its value, out of a command line of the options of a run.

    Args:
        option: Its name, as a field would be written.
        arguments: The command line.
        rule: What its value must be, as a sentence about it says.

    Raises:
        InputError: It has no value.
    """
    flag = as_flag(option)
    flat = [part for word in arguments for part in (word.split("=", 1) if word.startswith(f"{flag}=") else [word])]
    if flag not in flat:
        return None, flat
    at = flat.index(flag)
    value = flat[at + 1 : at + 2]
    if not value or not value[0] or value[0].startswith("--"):
        raise InputError(option, f"must {rule}, got none.")
    return value[0], flat[:at] + flat[at + 2 :]


def flag(argument: str) -> str:
    """Writes an argument of the library as the option that sets it, where there is one."""
    option = _OPTION_OF.get(argument, argument)
    return as_flag(option) if option in _option_types() else argument


_OPTION_OF = {
    "inner_steps": "sync_every",
    "k": "keep",
    "decay": "feedback_decay",
    "radius": "clip_radius",
    "strength": "proximal",
    "length": "window",
    "pixels": "shift",
    "size": "cutout",
    "blocks": "layers",
}
"""The options that bear another name than the argument they set."""


def _parse(arguments: Sequence[str]) -> Config:
    flat = tyro.conf.configure(tyro.conf.OmitArgPrefixes)(Config)
    return tyro.cli(flat, prog="python -m ctde_jax.train", args=arguments)


def _load(path: Path) -> dict[str, Any]:
    try:
        saved = json.loads(read_small(os.path.expanduser(path)).decode())
    except OSError as error:
        raise _bad_config(path, f"cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise _bad_config(path, f"is no JSON ({error})") from error
    if not isinstance(saved, dict):
        raise _bad_config(path, f"holds a {type(saved).__name__} instead of an object")
    types = _option_types()
    for name, value in saved.items():
        if name not in types:
            raise _bad_config(path, f"has the unknown option {quoted(name)}", did_you_mean(name, types))
        if not _is_saved(value, types[name]):
            raise _bad_config(path, f"has for {name} the value {quoted(value)}, which none of its values is saved as")
    return saved


def _is_saved(value: Any, kind: Any) -> bool:
    """Says whether a JSON value may stand for an option; what it says is checked as if it had been typed."""
    if value is None:
        return isinstance(kind, UnionType)
    if get_origin(kind) is tuple:
        (kind, *_) = get_args(kind)
        return isinstance(value, list) and all(isinstance(each, str if kind is str else (int, float)) for each in value)
    return isinstance(value, (str, int, float))


def _without(options: dict[str, Any], group: type, before: Preset, after: Preset) -> dict[str, Any]:
    """Leaves out what belongs to a choice that is made anew: the group's options, and what a preset says of others."""
    dropped = {option.name for option in fields(group)} | before.options.keys() | after.options.keys()
    return {name: value for name, value in options.items() if name == "devices" or name not in dropped}


def _as_arguments(options: dict[str, Any]) -> list[str]:
    arguments: list[str] = []
    for name, value in options.items():
        if isinstance(value, bool):
            arguments.append(as_flag(name if value else f"no_{name}"))
        elif isinstance(value, (list, tuple)):
            arguments += [] if not value else [as_flag(name), *map(str, value)]
        elif value is not None:
            arguments.append(f"{as_flag(name)}={value}")  # a value is one, also where it looks like an option
    return arguments


def _bad_config(path: Path, fault: str, end: str = ".") -> InputError:
    return InputError("config", f"must name the config.json that a run has left in its folder, but {path} {fault}{end}")


def _unknown(name: str, known: Iterable[str]) -> InputError:
    suggestion = did_you_mean(name.replace("_", "-"), known)
    return InputError(quoted(name)[1:-1], f"is no option{suggestion} --help lists them all.")


def _check(arguments: Sequence[str]) -> set[str]:
    """Returns the options of a command line, and says in one sentence what is wrong with a name or a value.

    The parser would say it, too, but in a box.
    """
    types = {as_flag(name): kind for name, kind in _option_types().items()}
    types |= {as_flag(f"no_{name}"): bool for name, kind in _option_types().items() if kind is bool}
    given: list[tuple[str, list[str]]] = []
    for word in arguments:
        if word.startswith("--") or not given:
            name, *value = word.split("=", 1)
            given.append((name, value))
        else:
            given[-1][1].append(word)
    for name, values in given:
        if name in ("-h", "--help"):
            break
        option = name.replace("_", "-")
        if option not in types:
            raise _unknown(name, types)
        _check_values(option, types[option], values)
    return {name.replace("_", "-") for name, _ in given}


_COMPRESSED = ("int8", "int4", "int2", "sign", "top_k", "random_k")
_GOES_WITH: dict[str, tuple[str, tuple[Any, ...]]] = {
    "keep": ("reduce", ("top_k", "random_k")),
    "chunk": ("reduce", ("top_k", "random_k")),
    "kept_as": ("reduce", ("top_k", "random_k")),
    "levels": ("reduce", ("int8", "int4", "int2", "top_k", "random_k")),
    "rank": ("reduce", ("power_sgd",)),
    "error_feedback": ("reduce", _COMPRESSED),
    "feedback_decay": ("error_feedback", (True,)),
    "exchange": ("reduce", _COMPRESSED),
    "byzantine": ("combine", ("trimmed_mean", "krum", "multi_krum")),
    "clip_radius": ("combine", ("centered_clipping",)),
    "outer_learning_rate": ("outer", ("momentum", "nesterov", "adam")),
    "outer_momentum": ("outer", ("momentum", "nesterov")),
    "window": ("dataset", ("text",)),
    "stride": ("dataset", ("text",)),
    "prompt": ("dataset", ("text",)),
    "sample_length": ("dataset", ("text",)),
    "widths": ("model", ("mlp", "resnet")),
    "activation": ("model", ("mlp",)),
    "width": ("model", ("lstm", "gru", "transformer")),
    "layers": ("model", ("resnet", "lstm", "gru", "transformer")),
    "heads": ("model", ("transformer",)),
    "dropout": ("model", ("cnn", "lstm", "gru", "transformer")),
    "norm": ("model", ("resnet",)),
    "batch_statistics": ("norm", ("batch",)),
    "reestimate_batches": ("norm", ("batch",)),
    "base_width": ("init", ("mup",)),
    "weight_decay": ("optimizer", ("adamw", "lion", "muon")),
    "label_shards": ("partition", ("by_label",)),
    "dirichlet_alpha": ("partition", ("dirichlet",)),
}
"""Options that do nothing unless another one has one of these values."""


def _check_effect(typed: set[str], parsed: Config) -> None:
    """Raises InputError for an option that was typed and would do nothing."""
    values = _flat(parsed)
    for option, (other, allowed) in _GOES_WITH.items():
        if as_flag(option) in typed and values[other] not in allowed:
            names = " or ".join(as_flag(other) if value is True else f"{as_flag(other)} {value}" for value in allowed)
            raise InputError(option, f"goes with {names}.")


def _check_values(option: str, kind: Any, values: list[str]) -> None:
    if kind is bool:
        if values:
            raise InputError(option, f"takes no value, got {' '.join(values)}.")
        return
    many, optional = get_origin(kind) is tuple, isinstance(kind, UnionType)
    if many or optional:
        kind = get_args(kind)[0]
    if len(values) != 1 and not many:
        raise InputError(option, f"takes one value, got {' '.join(values) or 'none'}.")
    if get_origin(kind) is Literal:
        check_known(option, values[0], get_args(kind))
    for value in values:
        if kind in (int, float) and not (optional and value == "None"):
            try:
                number = kind(value)
            except ValueError as error:
                rule = "a whole number" if kind is int else "a number"
                raise InputError(option, f"must be {rule}, got {quoted(value)}.") from error
            if option == "--seed":
                check_seed(int(number))
            elif kind is int and abs(number) > _LARGEST:
                raise InputError(option, f"must be at most {_LARGEST}, got {quoted(value)}.")
        if kind is Path and not _can_be_path(value):
            raise InputError(option, f"must be a path, got {quoted(value)}.")


_LARGEST = 2**31 - 1
"""Whole numbers are at most this, as JAX counts with 32 bits, one of them for the sign."""


def _can_be_path(value: str) -> bool:
    try:
        return bool(value) and b"\0" not in os.fsencode(value)
    except UnicodeEncodeError:
        return False


def _option_types() -> dict[str, Any]:
    groups = get_type_hints(Config).values()
    return {name: hint for group in groups for name, hint in get_type_hints(group).items()}
