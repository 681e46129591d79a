"""Published strategies and networks as presets of options.

A preset consists of default values: `--strategy diloco` or `--model cnn` sets the options below,
and other options of the command line override them. `ctde_jax.strategy("diloco")` returns the same
strategy in Python.
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
    "ddp": Preset({}, "average of the gradients at every step"),
    "local-sgd": Preset(
        {"sync_every": 8},
        "periodic average of the parameters (Stich, 2019); recommended: every 4 to 32 steps",
    ),
    "post-local-sgd": Preset(
        {"sync_every": 16, "synchronous_steps": 64},
        "average of the gradients at first, then local SGD (Lin et al., 2020); recommended: "
        "--synchronous-steps until the learning rate decays",
    ),
    "qsr": Preset(
        {"optimizer": "adamw", "schedule": "cosine", "sync_every": 4, "sync_growth": 1.0},
        "local steps that grow as the learning rate decays (Gu et al., 2024); recommended: every 2 "
        "to 8 steps at first",
    ),
    # Federated averaging.
    "fedavg": Preset(
        FEDAVG,
        "local SGD on --clients with fixed data (McMahan et al., 2017); recommended: 1 to 5 local "
        "epochs per round",
    ),
    "fedprox": Preset(
        {**FEDAVG, "proximal": 0.01},
        "fedavg with a proximal term (Li et al., 2020); recommended: --proximal of 0.001 to 1",
    ),
    "fedadam": Preset(
        {**FEDAVG, "outer": "adam", "outer_learning_rate": 0.01},
        "fedavg with Adam as outer optimizer (Reddi et al., 2021); recommended: "
        "--outer-learning-rate of 0.001 to 0.1",
    ),
    # Slow momentum, and DiLoCo with its variants.
    "slowmo": Preset(
        {"sync_every": 12, "outer": "momentum", "outer_learning_rate": 1.0, "outer_momentum": 0.5},
        "local SGD with slow momentum (Wang et al., 2020), here without division of the change by "
        "the learning rate; recommended: every 12 to 48 steps, --outer-momentum of 0.4 to 0.8",
    ),
    "diloco": Preset(
        DILOCO,
        "inner AdamW and outer Nesterov momentum (Douillard et al., 2023); recommended: every 500 "
        "steps, --outer-learning-rate 0.7, --outer-momentum 0.9, and lower values of all three in "
        "short runs",
    ),
    "streaming-diloco": Preset(
        {**DILOCO, "sync_every": 8, "fragments": 4},
        "diloco by fragments, aggregated during the next local steps (Douillard et al., 2025); "
        "--sync-every counts the steps between two fragments; recommended: --reduce int4",
    ),
    "mu-loco": Preset(
        {**DILOCO, "optimizer": "muon"},
        "diloco with inner Muon (Thérien et al., 2025); recommended: --reduce int4 or int2 with "
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
        "the largest values of each chunk in 2 bits, with error feedback instead of outer "
        "momentum (Sarfi et al., 2025); recommended: every 15 to 50 steps, --keep of 32 to 128",
    ),
    "iso-loco": Preset(
        {**DILOCO, "isotropic": True},
        "diloco with equal singular values of the outer gradient (after Marczak et al., 2025)",
    ),
    # Mixing with neighbors, without central parameters.
    "gossip": Preset(
        {"sync_every": 1, "graph": "ring"},
        "decentralized average with the neighbors in a graph (Lian et al., 2017); --graph "
        "exponential mixes fastest",
    ),
    "no-loco": Preset(
        {
            **{"optimizer": "adamw", "sync_every": 32, "graph": "pairs"},
            **{"outer": "momentum", "outer_learning_rate": 0.7, "outer_momentum": 0.5},
        },
        "decentralized diloco with one random partner per round (Kolehmainen et al., 2025); "
        "recommended: every 50 to 250 steps",
    ),
}


MODELS = {
    "mlp": Preset({}, "multilayer perceptron"),
    "cnn": Preset(
        {"learning_rate": 0.001, "init": "orthogonal"},
        "two convolutional and two dense layers (McMahan et al., 2017)",
    ),
    "resnet": Preset(
        {"learning_rate": 0.002},
        "pre-activation residual network (He et al., 2016)",
    ),
    # Gradients of long sequences are clipped, as they may explode.
    "lstm": Preset(
        {"learning_rate": 0.003, "clip_grad_norm": 1.0, "init": "recurrent"},
        "long short-term memory (Hochreiter and Schmidhuber, 1997), for classification of "
        "sequences or as a language model",
    ),
    "gru": Preset(
        {"learning_rate": 0.003, "clip_grad_norm": 1.0},
        "gated recurrent units (Cho et al., 2014), for classification of sequences or as a "
        "language model",
    ),
    "transformer": Preset(
        {
            "optimizer": "adamw",
            "learning_rate": 0.001,
            "clip_grad_norm": 1.0,
            "layers": 2,
            "init": "lsuv",
        },
        "decoder-only language model (Vaswani et al., 2017)",
    ),
}
"""Presets of networks; options that are not listed have the defaults of their fields."""


def as_flag(option: str) -> str:
    """Returns the command-line option of a field."""
    return "--" + option.replace("_", "-")


def describe(presets: Mapping[str, Preset]) -> list[str]:
    """Returns a line for each preset: description, paper, recommended values, and its options."""
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
