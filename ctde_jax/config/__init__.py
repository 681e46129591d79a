"""Options and presets, the command line, and the objects that they build."""

from ctde_jax.config.command_line import (
    CONFIG,
    deciding,
    flag,
    from_saved,
    new_run_folder,
    parse,
    save,
    take,
)
from ctde_jax.config.options import (
    AggregationOptions,
    Config,
    DataOptions,
    ModelOptions,
    OptimizationOptions,
    RunOptions,
)
from ctde_jax.config.presets import as_flag

__all__ = [
    "CONFIG",
    "AggregationOptions",
    "Config",
    "DataOptions",
    "ModelOptions",
    "OptimizationOptions",
    "RunOptions",
    "as_flag",
    "deciding",
    "flag",
    "from_saved",
    "new_run_folder",
    "parse",
    "save",
    "take",
]
