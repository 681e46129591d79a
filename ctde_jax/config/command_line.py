"""The command line: parsed by tyro, checked here, saved to and loaded from `config.json`.

A saved configuration is a JSON object of options by name. It is converted to arguments that precede
those of the user, so it passes the same checks, and the options of the user take precedence.
"""

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import tyro

from ctde_jax.bundle import read_small
from ctde_jax.config import usage
from ctde_jax.config.options import (
    AggregationOptions,
    Config,
    HostOptions,
    ModelOptions,
    RunOptions,
)
from ctde_jax.config.presets import MODELS, PRESETS, Preset, as_flag
from ctde_jax.config.rules import NEEDS
from ctde_jax.errors import InputError, check_known, check_seed, did_you_mean, quoted

CONFIG = "config.json"
"""File of a run folder with all options; `--config` reads it.

`checkpoint.run_folder` lists the same name: parsing imports no room that imports JAX.
"""


def parse(arguments: Sequence[str], command: str = "train") -> Config:
    """Parses a command line, and the saved configuration that it names.

    `--help` prints the options and ends the process.

    Args:
        arguments: Words of the command line.
        command: Name of the command that `--help` shows, such as `wire`.

    Returns:
        The options, with defaults from the chosen presets and the saved configuration.

    Raises:
        InputError: If an option is unknown, has an invalid value or would have no effect, or the
            saved configuration cannot be read.
    """
    # Check the options of the user, before those of a saved configuration.
    typed = _check(arguments)
    if command != "train":
        for name in ("seeds", "sweep", "halving"):
            if as_flag(name) in typed:
                raise InputError(name, "requires python -m ctde_jax.train.")
    if {"--epochs", "--steps"} <= typed:
        raise InputError("epochs", "and --steps are mutually exclusive; pass only one of them.")
    chosen = _parse(arguments, command)

    # Find the saved options: those of --config, of this branch if it was started before, or else of
    # the run that it branches off from.
    options: dict[str, Any] = {}
    saved = chosen.run.config
    is_parent = False
    if saved is None and chosen.run.branch_from is not None:
        saved = _config_of_branch(chosen.run)
        is_parent = saved is None
        saved = saved or _config_of(chosen.run.branch_from)
    if saved is not None:
        options = _load(saved)
        # A branch starts from a checkpoint, not from the initial parameters of its parent. If the
        # user changes the learning rate or its schedule, that schedule starts with the branch.
        if is_parent:
            options = {name: value for name, value in options.items() if name not in _STARTS}
            if typed & {"--learning-rate", "--schedule", "--warmup-steps"}:
                options["schedule_start"] = _step_of(chosen.run.branch_from)
        if "--epochs" in typed:
            options.pop("steps", None)
        _check(_as_arguments(options))

    # If the user chooses another model or strategy, the saved options of the old one do not apply.
    model = options.get("model", "mlp")
    strategy = options.get("strategy", "ddp")
    if "--model" in typed:
        options = _without(options, ModelOptions, MODELS[model], MODELS[chosen.model.model])
        model = chosen.model.model
    if "--strategy" in typed:
        options = _without(
            options, AggregationOptions, PRESETS[strategy], PRESETS[chosen.aggregation.strategy]
        )
        strategy = chosen.aggregation.strategy

    # In order of increasing precedence: presets, saved options, command line.
    options = {**MODELS[model].options, **PRESETS[strategy].options, **options}
    parsed = _parse([*_as_arguments(options), *arguments], command)
    _check_effect(typed, parsed)
    return parsed


def from_saved(options: Mapping[str, Any]) -> Config:
    """Returns the configuration of saved options, with presets for those that are missing.

    Args:
        options: Options by name, in types of JSON, such as `deciding` returns them.

    Raises:
        InputError: An option is unknown or has an invalid value.
    """
    _check_saved(options, lambda fault, end=".": InputError("options", f"{fault}{end}"))
    arguments = _as_arguments(dict(options))
    _check(arguments)
    model = options.get("model", "mlp")
    strategy = options.get("strategy", "ddp")
    presets = {**MODELS[model].options, **PRESETS[strategy].options}
    return _parse([*_as_arguments(presets), *arguments], "train")


_STARTS = ("init_from", "init_only", "branch_from")
"""Options that determine the initial state of a run."""


def _config_of_branch(run: RunOptions) -> Path | None:
    """Returns the path of the config.json of a branch that is resumed, or None if it is new.

    The parent of a resumed branch need not exist any more.
    """
    path = None if run.run_dir is None else run.run_dir / CONFIG
    return path if path is not None and run.resume == "auto" and os.path.isfile(path) else None


def _config_of(checkpoint: Path) -> Path | None:
    """Returns the path of the config.json of a checkpoint's run, or None if it is no checkpoint.

    Raises:
        InputError: If the run of the checkpoint has no config.json.
    """
    if not os.path.isfile(checkpoint / "manifest.json"):
        return None
    path = checkpoint.absolute().parent.parent / CONFIG
    if not path.is_file():
        raise InputError(
            "branch_from",
            "must be a checkpoint of a run of python -m ctde_jax.train, such as "
            f"runs/mine/checkpoints/step-00000100, got {quoted(str(checkpoint))}, but {path} does "
            "not exist.",
        )
    return path


def _step_of(checkpoint: Path | None) -> int:
    """Returns the optimizer step of a checkpoint, or 0 if its manifest cannot be read."""
    try:
        assert checkpoint is not None
        return int(
            json.loads((checkpoint / "manifest.json").read_text(encoding="utf-8"))["position"][
                "step"
            ]
        )
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return 0


def save(config: Config, path: Path) -> None:
    """Writes the options to a JSON file for `--config`, except `_OF_ONE_RUN`, such as run_dir."""
    chosen = {name: value for name, value in _flat(config).items() if name not in _OF_ONE_RUN}
    # Paths are made absolute, so that the file can be used from any folder.
    path.write_text(
        json.dumps(chosen, indent=2, default=lambda p: str(p.resolve())) + "\n", encoding="utf-8"
    )


def deciding(config: Config) -> dict[str, Any]:
    """Returns the options that determine the parameters and metrics of a run, by name."""
    options = _flat(config).items()
    return {name: value for name, value in options if name not in _OF_ONE_RUN + _DECIDE_NOTHING}


_OF_ONE_RUN = (
    "config",
    "run_dir",
    "mirror",
    "resume",
    *(option.name for option in fields(HostOptions)),
)
"""Options that apply to one run on one machine, and are not saved."""

_DECIDE_NOTHING = (
    *_STARTS,
    "devices",
    "replicas",
    "data_dir",
    "data_file",
    "epochs",
    "save_every",
    "log_every",
    "keep_checkpoints",
    "keep_best",
    "report",
    "track",
    "prompt",
    "sample_length",
    "seeds",
    "sweep",
    "halving",
)
"""Options that may change when a run continues, such as the devices or the location of the data.

Initial parameters are compared by their digest instead, and epochs as steps."""


def _flat(config: Config) -> dict[str, Any]:
    groups = [getattr(config, group.name) for group in fields(config)]
    return {
        option.name: getattr(group, option.name) for group in groups for option in fields(group)
    }


def new_run_folder(config: Config, prefix: str = "") -> Path:
    """Returns the default path of a run folder: data set, model, time and process after a prefix.

    The folder is not created.
    """
    # Two runs may start within a second, so the time alone is not unique.
    now = f"{datetime.now():%Y%m%d-%H%M%S}-{os.getpid()}"
    return Path("runs") / f"{prefix}{config.data.dataset}-{config.model.model}-{now}"


def take(option: str, arguments: Sequence[str], rule: str) -> tuple[str | None, list[str]]:
    """Removes an option that is not one of `train`, and its value, from a command line.

    Args:
        option: Name of the option, spelled as a field.
        arguments: Command line.
        rule: Rule for the value, which completes an error message after "must".

    Returns:
        The value of the option, or None if it is not given, and the remaining arguments.

    Raises:
        InputError: If the option has no value.
    """
    # Split `--option=value`, so that both spellings are handled in the same way.
    flag = as_flag(option)
    flat = [
        part
        for word in arguments
        for part in (word.split("=", 1) if word.startswith(f"{flag}=") else [word])
    ]
    if flag not in flat:
        return None, flat
    at = flat.index(flag)
    value = flat[at + 1 : at + 2]
    if not value or not value[0] or value[0].startswith("--"):
        raise InputError(option, f"must {rule}, got none.")
    return value[0], flat[:at] + flat[at + 2 :]


def flag(argument: str) -> str:
    """Returns the option that sets an argument, such as `--batch-size` for `batch_size`.

    If no option sets it, returns the argument unchanged.
    """
    option = _OPTION_OF.get(argument, argument)
    return as_flag(option) if option in _option_types() else argument


_OPTION_OF = {
    "inner_steps": "sync_every",
    "growth": "sync_growth",
    "later": "synchronous_steps",
    "k": "keep",
    "decay": "feedback_decay",
    "radius": "clip_radius",
    "strength": "proximal",
    "length": "context_length",
    "layer_sizes": "hidden_sizes",
    "clip_norm": "dp_clip_norm",
    "noise_multiplier": "dp_noise_multiplier",
    "pixels": "shift",
    "size": "cutout",
    "blocks": "layers",
    "label": "label_column",
    "source": "data_file",
}
"""Options whose names differ from the arguments that they set."""


def _parse(arguments: Sequence[str], command: str) -> Config:
    flat = tyro.conf.configure(tyro.conf.OmitArgPrefixes)(Config)
    parsed = tyro.cli(
        flat,
        prog=f"python -m ctde_jax.{command}",
        description=usage.overview(command) if {"-h", "--help"} & set(arguments) else None,
        args=arguments,
        registry=usage.registry,
    )
    groups = {group.name: getattr(parsed, group.name) for group in fields(parsed)}
    return replace(parsed, **{name: _with_expanded_paths(group) for name, group in groups.items()})


def _with_expanded_paths(group: Any) -> Any:
    """Replaces `~` in paths: a shell leaves it in `--branch-from=~/run`."""
    paths = {
        option.name: Path(os.path.expanduser(value))
        for option in fields(group)
        if isinstance(value := getattr(group, option.name), Path)
    }
    return replace(group, **paths)


def _load(path: Path) -> dict[str, Any]:
    try:
        saved = json.loads(read_small(os.path.expanduser(path)).decode())
    except OSError as error:
        raise _bad_config(path, f"cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise _bad_config(path, f"is not valid JSON ({error})") from error
    if not isinstance(saved, dict):
        raise _bad_config(path, f"contains a {type(saved).__name__} instead of an object")

    _check_saved(saved, partial(_bad_config, path))
    return saved


def _check_saved(saved: Mapping[str, Any], bad: Callable[..., InputError]) -> None:
    """Checks names and types of saved options; their values are checked as on the command line.

    Args:
        saved: Options by name.
        bad: Makes the error from a description of the fault and the end of the sentence.
    """
    types = _option_types()
    for name, value in saved.items():
        if name not in types:
            raise bad(f"contains the unknown option {quoted(name)}", did_you_mean(name, types))
        if not _is_saved(value, types[name]):
            raise bad(f"contains the value {quoted(value)} of the wrong type for {name}")


def _is_saved(value: Any, kind: Any) -> bool:
    """Returns whether a JSON value has a suitable type for an option whose annotation is `kind`.

    `_check` checks the value itself.
    """
    if value is None:
        return isinstance(kind, UnionType)
    if get_origin(kind) is tuple:
        (kind, *_) = get_args(kind)
        return isinstance(value, list) and all(
            isinstance(each, (int, float) if kind in (int, float) else str) for each in value
        )
    return isinstance(value, (str, int, float))


def _without(options: dict[str, Any], group: type, before: Preset, after: Preset) -> dict[str, Any]:
    """Removes options that do not apply after a change of the model or the strategy.

    Args:
        options: Saved options by name.
        group: Class of the options that are all removed, except `devices` and `replicas`.
        before: Preset of the old model or strategy, whose options are removed as well.
        after: Preset of the new one, whose options are removed as well.
    """
    # The numbers of devices and replicas do not depend on the strategy.
    dropped = (
        {option.name for option in fields(group)} | before.options.keys() | after.options.keys()
    ) - {"devices", "replicas"}
    return {name: value for name, value in options.items() if name not in dropped}


def _as_arguments(options: dict[str, Any]) -> list[str]:
    arguments: list[str] = []
    for name, value in options.items():
        # Flags have a negated form. Empty tuples and None are defaults, which are left out.
        if isinstance(value, bool):
            arguments.append(as_flag(name if value else f"no_{name}"))
        elif isinstance(value, (list, tuple)):
            arguments += [] if not value else [as_flag(name), *map(str, value)]
        elif value is not None:
            # A value may look like an option, so it must be in the same argument as its name.
            arguments.append(f"{as_flag(name)}={value}")
    return arguments


def _bad_config(path: Path, fault: str, end: str = ".") -> InputError:
    return InputError(
        "config",
        f"must be the config.json in the folder of a run, but {path} {fault}{end}",
    )


_SYNONYMS = {
    "batch": "batch_size",
    "block_size": "context_length",
    "bs": "batch_size",
    "class_weight": "class_weights",
    "clip": "clip_grad_norm",
    "clip_grad": "clip_grad_norm",
    "clip_norm": "clip_grad_norm",
    "dropout": "dropout_rate",
    "early_stopping": "patience",
    "ema": "ema_decay",
    "gamma": "focal_gamma",
    "gpus": "devices",
    "grad_accum": "accumulation_steps",
    "grad_clip": "clip_grad_norm",
    "gradient_accumulation": "accumulation_steps",
    "gradient_accumulation_steps": "accumulation_steps",
    "gradient_clipping": "clip_grad_norm",
    "hidden": "hidden_sizes",
    "input": "data_file",
    "lr": "learning_rate",
    "lr_schedule": "schedule",
    "max_grad_norm": "clip_grad_norm",
    "noise_multiplier": "dp_noise_multiplier",
    "num_devices": "devices",
    "num_epochs": "epochs",
    "num_heads": "heads",
    "num_layers": "layers",
    "output_dir": "run_dir",
    "random_seed": "seed",
    "sample_weight": "weights",
    "sample_weights": "weights",
    "seq_len": "context_length",
    "val_fraction": "validation_fraction",
    "val_split": "validation_fraction",
    "validation_split": "validation_fraction",
    "warmup": "warmup_steps",
    "wd": "weight_decay",
}
"""Names that other libraries use, and the options that they mean here."""


def _unknown(name: str, known: Iterable[str]) -> InputError:
    bare = name.removeprefix("--").replace("-", "_")
    suggestion = did_you_mean(name.replace("_", "-"), known)
    if bare in _SYNONYMS:
        suggestion = f"; did you mean {as_flag(_SYNONYMS[bare])!r}?"
    return InputError(quoted(name)[1:-1], f"is not an option{suggestion} --help lists all options.")


def _check(arguments: Sequence[str]) -> set[str]:
    """Checks the names and values of the options in a command line, and returns the names.

    tyro checks them as well, but prints its errors in a box instead of one line.

    Raises:
        InputError: If an option is unknown, or a value is missing or invalid.
    """
    # Types by option, including the negated form of flags.
    types = {as_flag(name): kind for name, kind in _option_types().items()}
    types |= {as_flag(f"no_{name}"): bool for name, kind in _option_types().items() if kind is bool}

    # Group the arguments: each option with the values that follow it.
    given: list[tuple[str, list[str]]] = []
    for word in arguments:
        if word.startswith("--") or not given:
            name, *value = word.split("=", 1)
            given.append((name, value))
        else:
            given[-1][1].append(word)

    # Options after --help are not checked.
    for name, values in given:
        if name in ("-h", "--help"):
            break
        option = name.replace("_", "-")
        if option not in types:
            raise _unknown(name, types)
        _check_values(option, types[option], values)
    return {name.replace("_", "-") for name, _ in given}


def _check_effect(typed: set[str], parsed: Config) -> None:
    """Raises InputError if an option on the command line would have no effect."""
    values = _flat(parsed)
    for option, (other, allowed) in NEEDS.items():
        if as_flag(option) in typed and values[other] not in allowed:
            names = " or ".join(
                as_flag(other) if value is True else f"{as_flag(other)} {value}"
                for value in allowed
            )
            raise InputError(option, f"requires {names}.")


def with_words(config: Config, words: Mapping[str, str]) -> Config:
    """Returns a configuration with other options, which are checked as on the command line.

    Args:
        config: The configuration.
        words: The values of the other options, by name.

    Raises:
        InputError: A value is invalid, or would have no effect.
    """
    types = _option_types()
    for name, word in words.items():
        _check_values(as_flag(name), types[name], [word])
    values = {name: _converted(types[name], word) for name, word in words.items()}
    values = {**_of_other_presets(config, values), **values}
    groups = {group.name: getattr(config, group.name) for group in fields(config)}
    changed = Config(
        **{
            name: replace(
                group, **{option: values[option] for option in vars(group) if option in values}
            )
            for name, group in groups.items()
        }
    )
    _check_effect({as_flag(name) for name in words}, changed)
    return changed


def _of_other_presets(config: Config, values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the options that another model or strategy changes: those of its preset.

    Options keep their values if these differ from the preset of the configuration.
    """
    given = _flat(config)

    def preset(chosen: Mapping[str, Any]) -> dict[str, Any]:
        return {**MODELS[chosen["model"]].options, **PRESETS[chosen["strategy"]].options}

    before = preset(given)
    after = preset({**given, **values})
    default = _flat(Config())
    return {
        name: after.get(name, default[name])
        for name in before | after
        if given[name] == before.get(name, default[name])
    }


def _converted(kind: Any, word: str) -> Any:
    """Converts a valid word to the type of an option."""
    if get_origin(kind) is tuple:
        return (_converted(get_args(kind)[0], word),)
    if isinstance(kind, UnionType):
        return None if word == "None" else _converted(get_args(kind)[0], word)
    return kind(word) if kind in (int, float) else word


def _check_values(option: str, kind: Any, values: list[str]) -> None:
    # A flag takes no value, a tuple any number of values, and all other options take one.
    if kind is bool:
        if values:
            raise InputError(option, f"takes no value, got {' '.join(values)}.")
        return
    many = get_origin(kind) is tuple
    optional = isinstance(kind, UnionType)
    if many or optional:
        kind = get_args(kind)[0]
    if len(values) != 1 and not many:
        raise InputError(option, f"takes one value, got {' '.join(values) or 'none'}.")
    # An MLP may have no hidden layers, but without texts or a size an option has no effect.
    if not values and (kind is str or option == "--image-size"):
        raise InputError(option, "takes at least one value, got none.")

    # Each value must be one of the choices, a number in range, or a path.
    for value in values:
        if get_origin(kind) is Literal:
            check_known(option, value, get_args(kind))
        if kind in (int, float) and not (optional and value == "None"):
            _check_number(option, kind, value, many)
        if kind is Path and not _can_be_path(value):
            raise InputError(option, f"must be a path, got {quoted(value)}.")


def _check_number(option: str, kind: type[int] | type[float], value: str, many: bool) -> None:
    try:
        number = kind(value)
    except ValueError as error:
        rule = "a whole number" if kind is int else "a number"
        end = "; separate the values by spaces." if many and "," in value else "."
        raise InputError(option, f"must be {rule}, got {quoted(value)}{end}") from error
    if option == "--seed":
        check_seed(int(number))
    elif kind is int and abs(number) > _LARGEST:
        raise InputError(option, f"must be at most {_LARGEST}, got {quoted(value)}.")


_LARGEST = 2**31 - 1
"""Largest absolute value of an integer option, as JAX computes with int32."""


def _can_be_path(value: str) -> bool:
    # Neither a null byte nor a character that the file system cannot encode can be in a path.
    try:
        return bool(value) and b"\0" not in os.fsencode(value)
    except UnicodeEncodeError:
        return False


def _option_types() -> dict[str, Any]:
    groups = get_type_hints(Config).values()
    return {name: hint for group in groups for name, hint in get_type_hints(group).items()}
