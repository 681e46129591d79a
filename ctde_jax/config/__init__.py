"""From words to objects and back: options, presets, and what they build."""

from ctde_jax.config.options import (
    Aggregation,
    Config,
    Data,
    Model,
    Optimization,
    Run,
    deciding,
    flag,
    new_run_folder,
    parse,
    save,
    take,
)

__all__ = [
    "Aggregation",
    "Config",
    "Data",
    "Model",
    "Optimization",
    "Run",
    "deciding",
    "flag",
    "new_run_folder",
    "parse",
    "save",
    "take",
]
