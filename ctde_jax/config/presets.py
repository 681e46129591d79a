"""Published strategies and networks as presets of options.

A preset consists of default values: `--strategy diloco` or `--model cnn` sets the options below,
and options that are given override them. `ctde_jax.strategy("diloco")` returns the same strategy in
Python.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple


class Preset(NamedTuple):
    """A published method or network."""

    options: Mapping[str, Any]
    """Fields of `AggregationOptions` or `ModelOptions`, and if needed of `OptimizationOptions`."""

    description: str
    """Method, paper and recommended values, for the help text."""


# Options that several presets share.
NESTEROV = {"outer": "nesterov", "outer_learning_rate": 0.7, "outer_momentum": 0.9}
DILOCO = {"optimizer": "adamw", "sync_every": 32, **NESTEROV}
FEDAVG = {"optimizer": "sgd", "learning_rate": 0.1, "sync_every": 20}

PRESETS = {
    # Every step, or plain averages of local steps.
    "ddp": Preset({}, "the mean gradient at every step"),
    "local-sgd": Preset(
        {"sync_every": 8},
        "the mean of the parameters now and then (Stich, 2019); every 4 to 32 steps",
    ),
    "post-local-sgd": Preset(
        {"sync_every": 16, "synchronous_steps": 64},
        "synchronous at first, then local SGD (Lin et al., 2020); synchronous until the learning "
        "rate falls",
    ),
    # Federated averaging.
    "fedavg": Preset(
        FEDAVG,
        "local SGD on --clients that keep their data (McMahan et al., 2017); alone for 1 to 5 of a "
        "client's epochs",
    ),
    "fedprox": Preset(
        {**FEDAVG, "proximal": 0.01},
        "fedavg with a pull to the center (Li et al., 2020); --proximal of 0.001 to 1",
    ),
    "fedadam": Preset(
        {**FEDAVG, "outer": "adam", "outer_learning_rate": 0.01},
        "fedavg with Adam at the center (Reddi et al., 2021); --outer-learning-rate of 0.001 to "
        "0.1",
    ),
    # Slow momentum, and DiLoCo with its variants.
    "slowmo": Preset(
        {"sync_every": 12, "outer": "momentum", "outer_learning_rate": 1.0, "outer_momentum": 0.5},
        "local SGD with slow momentum (Wang et al., 2020), here of changes that are not divided "
        "by the learning rate; every 12 to 48 steps, --outer-momentum of 0.4 to 0.8",
    ),
    "diloco": Preset(
        DILOCO,
        "AdamW inside, Nesterov outside (Douillard et al., 2023); every 500 steps in the paper, "
        "fewer in shorter runs, --outer-learning-rate 0.7, --outer-momentum 0.9, or less of both "
        "in short runs",
    ),
    "streaming-diloco": Preset(
        {**DILOCO, "sync_every": 8, "fragments": 4},
        "diloco by fragments that travel during the next steps (Douillard et al., 2025); "
        "--sync-every counts the steps between two fragments; --reduce int4",
    ),
    "mu-loco": Preset(
        {**DILOCO, "optimizer": "muon"},
        "diloco with Muon inside (Thérien et al., 2025); --reduce int4 or int2 with "
        "--error-feedback",
    ),
    "sparse-loco": Preset(
        {
            **{
                "optimizer": "adamw",
                "sync_every": 16,
                "reduce": "top_k",
                "exchange": "gathered",
                "keep": 128,
            },
            **{
                "kept_as": "int2",
                "levels": "statistical",
                "error_feedback": True,
                "feedback_decay": 0.95,
            },
        },
        "the largest numbers of each chunk in 2 bits, with error feedback instead of outer "
        "momentum (Sarfi et al., 2025); every 15 to 50 steps, --keep of 32 to 128 in 4096",
    ),
    "iso-loco": Preset(
        {**DILOCO, "isotropic": True},
        "diloco whose outer gradient has equal singular values (after Marczak et al., 2025)",
    ),
    # Mixing with neighbors, without central parameters.
    "gossip": Preset(
        {"sync_every": 1, "graph": "ring"},
        "no center: the mean with the neighbors in a graph (Lian et al., 2017); --graph "
        "exponential mixes fastest",
    ),
    "no-loco": Preset(
        {
            **{"optimizer": "adamw", "sync_every": 32, "graph": "pairs"},
            **{"outer": "momentum", "outer_learning_rate": 0.7, "outer_momentum": 0.5},
        },
        "no center: diloco with one random partner in each round (Kolehmainen et al., 2025); every "
        "50 to 250 steps in the paper",
    ),
}


MODELS = {
    "mlp": Preset({}, "dense layers"),
    "cnn": Preset(
        {"learning_rate": 0.001, "init": "orthogonal"},
        "two convolutions and two dense layers (McMahan et al., 2017)",
    ),
    "resnet": Preset(
        {"learning_rate": 0.002},
        "residual blocks that normalize first (He et al., 2016)",
    ),
    # Gradients of long sequences are clipped, as they may explode.
    "lstm": Preset(
        {"learning_rate": 0.003, "clip_grad_norm": 1.0, "init": "recurrent"},
        "long short-term memory (Hochreiter and Schmidhuber, 1997), which reads a sequence or "
        "writes on a text",
    ),
    "gru": Preset(
        {"learning_rate": 0.003, "clip_grad_norm": 1.0},
        "gated recurrent units (Cho et al., 2014), likewise",
    ),
    "transformer": Preset(
        {
            "optimizer": "adamw",
            "learning_rate": 0.001,
            "clip_grad_norm": 1.0,
            "layers": 2,
            "init": "lsuv",
        },
        "a decoder that writes on a text (Vaswani et al., 2017)",
    ),
}
"""Networks; options that are not listed have the defaults of their fields."""


def as_flag(option: str) -> str:
    """Returns the command-line option of a field."""
    return "--" + option.replace("_", "-")


def describe(presets: Mapping[str, Preset]) -> list[str]:
    """Returns a line for each preset: description, paper, recommended values, options it sets."""
    return [f"{name}: {preset.description}{_settings(preset)}." for name, preset in presets.items()]


def _settings(preset: Preset) -> str:
    # A flag that is on has no value.
    flags = [
        (
            f"{as_flag(name)} {' '.join(map(str, value)) if isinstance(value, tuple) else value}"
        ).removesuffix(" True")
        for name, value in preset.options.items()
    ]
    return f"; sets {' '.join(flags)}" if flags else ""
