"""Options and presets, the command line, and the objects that they build."""

from ctde_jax.config.command_line import deciding, flag, new_run_folder, parse, save, take
from ctde_jax.config.options import (
    AggregationOptions,
    Config,
    DataOptions,
    ModelOptions,
    OptimizationOptions,
    RunOptions,
)

__all__ = [
    "AggregationOptions",
    "Config",
    "DataOptions",
    "ModelOptions",
    "OptimizationOptions",
    "RunOptions",
    "deciding",
    "flag",
    "new_run_folder",
    "parse",
    "save",
    "take",
]
