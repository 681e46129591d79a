"""Programs as StableHLO, JAX's export format: versioned, and also for hardware that is absent."""

import jax
from jax import export

from ctde_jax.export.program import Inference, leaving_out

PLATFORMS = ("cpu", "cuda", "tpu")


def to_stablehlo(program: Inference) -> bytes:
    """Serializes a program for `jax.export.deserialize`.

    Args:
        program: The program.

    Returns:
        The content of the file.

    Raises:
        LeftOut: A part of the program does not lower for all of `PLATFORMS`.
    """
    # One file serves all platforms: it is lowered for each of them.
    with leaving_out("jax.export"):
        return bytes(
            export.export(jax.jit(program.run), platforms=PLATFORMS)(*program.like).serialize()
        )
