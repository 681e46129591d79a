"""The text of `--help`: examples and the most used options, then all options in groups."""

import shutil
import textwrap
from dataclasses import fields
from functools import cache, partial
from typing import Any, get_type_hints

import tyro

from ctde_jax.config.options import Config
from ctde_jax.config.presets import MODELS, PRESETS, as_flag, describe

EXAMPLES = (
    "--epochs 20 --learning-rate 0.01",
    "--dataset csv --data-file wine.csv --batch-size 32",
    "--model cnn --devices 8 --strategy diloco",
)
"""Options of the example commands."""

MOST_USED = (
    "dataset",
    "data_file",
    "model",
    "hidden_sizes",
    "dropout_rate",
    "learning_rate",
    "clip_grad_norm",
    "batch_size",
    "accumulation_steps",
    "epochs",
    "seed",
    "devices",
    "strategy",
    "run_dir",
)
"""Options at the top of `--help`, each with the first sentence of its help text."""


def overview(command: str) -> str:
    """Returns the first part of `--help`, wrapped to the terminal: examples and `MOST_USED`.

    Args:
        command: Name of the command, such as `wire`.
    """
    # Leave a margin, as argument parsers do.
    width = shutil.get_terminal_size().columns - 2
    indent = " " * (max(map(len, MOST_USED)) + 6)

    def entry(option: str, text: str) -> str:
        first = f"  {as_flag(option)}".ljust(len(indent))
        return textwrap.fill(
            text, width, initial_indent=first, subsequent_indent=indent, break_on_hyphens=False
        )

    groups = {option.name: group for group in _groups() for option in fields(group)}
    return "\n".join(
        [
            Config.__doc__ or "",
            "",
            "Examples:",
            *(f"  python -m ctde_jax.{command} {options}" for options in EXAMPLES),
            "",
            "Options that most runs need (all options are listed below):",
            *(entry(name, _first_clause(help_text(groups[name], name))) for name in MOST_USED),
        ]
    )


def help_text(group: type, option: str) -> str:
    """Returns the docstring of an option as one line, followed by a line for each preset.

    Args:
        group: Class of options, such as `RunOptions`.
        option: Name of a field of the class; only `model` and `strategy` have presets.
    """
    presets = {"model": MODELS, "strategy": PRESETS}.get(option, {})
    return "\n".join([_docstrings(group)[option], *describe(presets)])


@cache
def _docstrings(group: type) -> dict[str, str]:
    """Returns the docstring of each field of a class as one line, by name; parses the source."""
    # Imported here, as only `--help` needs it.
    from docstring_parser import parse_from_object

    params = parse_from_object(group).params
    return {each.arg_name: " ".join((each.description or "").split()) for each in params}


registry = tyro.constructors.ConstructorRegistry()
"""Rules of tyro for the groups of options."""


@registry.struct_rule
def _group_rule(
    info: tyro.constructors.StructTypeInfo,
) -> tyro.constructors.StructConstructorSpec | None:
    # tyro keeps the line breaks of a docstring, which would end lines in the middle of a column.
    if info.type not in _groups():
        return None
    hints = get_type_hints(info.type, include_extras=True)
    specs = [
        tyro.constructors.StructFieldSpec(
            option.name,
            hints[option.name],
            option.default,
            partial(help_text, info.type, option.name),
        )
        for option in fields(info.type)
    ]
    return tyro.constructors.StructConstructorSpec(info.type, tuple(specs))


@cache
def _groups() -> tuple[Any, ...]:
    return tuple(get_type_hints(Config).values())


def _first_clause(text: str) -> str:
    """Returns a help text up to the end of its first sentence or clause."""
    ends = [text.find(mark) for mark in (".\n", ". ", "; ")]
    return text[: min((end for end in ends if end > 0), default=len(text))].rstrip(".")
