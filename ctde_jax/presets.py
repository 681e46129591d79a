"""Published ways to agree, each as the options that it stands for.

A preset is nothing but default values: `--strategy diloco` reads the options below, and whatever else is given replaces
them. `ctde_jax.strategy("diloco")` makes the same strategy in Python.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple


class Preset(NamedTuple):
    """A published method."""

    options: Mapping[str, Any]
    """Fields of `config.Aggregation`, and for a method that is about the inner optimizer, `optimizer`."""

    says: str
    """What it is, its paper, and the values that are recommended."""


NESTEROV = {"outer": "nesterov", "outer_learning_rate": 0.7, "outer_momentum": 0.9}

PRESETS = {
    "ddp": Preset({}, "the mean gradient at every step"),
    "local-sgd": Preset({"sync_every": 8}, "the mean of the parameters now and then (Stich, 2019); 4 to 32 steps"),
    "post-local-sgd": Preset(
        {"sync_every": 16, "synchronous_steps": 64},
        "synchronous at first, then local SGD (Lin et al., 2020); synchronous until the learning rate falls",
    ),
    "fedavg": Preset(
        {"sync_every": 20},
        "local SGD on --clients that keep their data (McMahan et al., 2017); --sync-every of 1 to 5 of their epochs",
    ),
    "fedprox": Preset(
        {"sync_every": 20, "proximal": 0.01},
        "fedavg with a pull to the center (Li et al., 2020); --proximal of 0.001 to 1",
    ),
    "fedadam": Preset(
        {"sync_every": 20, "outer": "adam", "outer_learning_rate": 0.01},
        "fedavg with Adam at the center (Reddi et al., 2021); --outer-learning-rate of 0.001 to 0.1",
    ),
    "slowmo": Preset(
        {"sync_every": 12, "outer": "momentum", "outer_learning_rate": 1.0, "outer_momentum": 0.5},
        "local SGD with slow momentum (Wang et al., 2020); --outer-momentum of 0.4 to 0.8, 12 to 48 steps",
    ),
    "diloco": Preset(
        {"sync_every": 32, **NESTEROV},
        "AdamW inside, Nesterov outside (Douillard et al., 2023); 50 to 500 steps, --outer-learning-rate 0.7, "
        "--outer-momentum 0.9, or less of both in short runs",
    ),
    "streaming-diloco": Preset(
        {"sync_every": 8, "fragments": 4, **NESTEROV},
        "diloco by fragments that travel during the next steps (Douillard et al., 2025); --sync-every counts the steps "
        "between two fragments; --reduce int4",
    ),
    "mu-loco": Preset(
        {"sync_every": 32, "optimizer": "muon", **NESTEROV},
        "diloco with Muon inside (Thérien et al., 2025); --reduce int4 or int2 with --error-feedback costs nothing",
    ),
    "sparse-loco": Preset(
        {
            **{"sync_every": 16, "reduce": "top_k", "exchange": "gathered", "keep": 128, "kept_as": "int2"},
            **{"levels": "statistical", "error_feedback": True, "feedback_decay": 0.95},
        },
        "the largest numbers of each chunk in 2 bits, with error feedback instead of outer momentum (Sarfi et al., "
        "2025); 15 to 50 steps, --keep of 32 to 128 in 4096",
    ),
    "iso-loco": Preset(
        {"sync_every": 32, "isotropic": True, **NESTEROV},
        "diloco whose outer gradient has equal singular values (after Marczak et al., 2025)",
    ),
    "gossip": Preset(
        {"sync_every": 1, "graph": "ring"},
        "no center: the mean with the neighbors in a graph (Lian et al., 2017); --graph exponential mixes fastest",
    ),
    "no-loco": Preset(
        {"sync_every": 32, "graph": "pairs", "outer": "momentum", "outer_learning_rate": 0.7, "outer_momentum": 0.5},
        "no center: diloco with one random partner in each round (Kolehmainen et al., 2025); 50 to 250 steps",
    ),
}


def describe() -> str:
    """Says of every preset what it is, whose, and what is recommended, one line each."""
    return "\n".join(f"{name}: {preset.says}." for name, preset in PRESETS.items())
