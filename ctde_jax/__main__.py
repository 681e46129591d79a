"""Command `python -m ctde_jax`: prints the commands and their purposes, or the version."""

import sys
from collections.abc import Sequence

import ctde_jax
from ctde_jax.bundle import streams

COMMANDS = {
    "train": "train a model on all devices, into a run folder",
    "serve": "train with nodes that keep their data",
    "node": "take part in the training of a server",
    "export": "write a trained model as numpy, ONNX or StableHLO",
    "execute": "run an exported model, on a machine without JAX",
    "wire": "print the bytes that each device would send",
    "profile": "measure where the time of a step goes",
    "verify": "check resume, determinism and bundles here",
}
"""Purpose of each command."""

_OVERVIEW = "\n".join(
    [
        "usage: python -m ctde_jax.COMMAND [OPTIONS]",
        "",
        "Trains one Flax model over many devices; the result runs alone anywhere.",
        "",
        *(f"  python -m ctde_jax.{name:9}{purpose}" for name, purpose in COMMANDS.items()),
        "",
        "--help after a command lists its options; help(ctde_jax) lists the functions.",
    ]
)


def main(arguments: Sequence[str]) -> int:
    """Prints the version for `--version`, else the commands.

    Args:
        arguments: Arguments of the command line.

    Returns:
        The exit status: 0; 2 for an unknown argument.
    """
    unknown = [word for word in arguments if word not in ("-h", "--help", "--version")]
    if unknown:
        # A command is a module: `python -m ctde_jax.train`, not `python -m ctde_jax train`.
        command = unknown[0] if unknown[0] in COMMANDS else "COMMAND"
        print(
            f"error: {unknown[0]} is not an option; use python -m ctde_jax.{command}",
            file=sys.stderr,
        )
        return 2
    print(ctde_jax.__version__ if "--version" in arguments else _OVERVIEW)
    return 0


if __name__ == "__main__":
    sys.exit(streams.run(main))
