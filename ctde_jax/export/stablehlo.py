"""A program as StableHLO, the form in which JAX gives programs away: versioned, and for hardware that is not here."""

import jax
from jax import export

from ctde_jax.export.program import Program, leaving_out

PLATFORMS = ("cpu", "cuda", "tpu")


def to_stablehlo(program: Program) -> bytes:
    """Writes a program as `jax.export.deserialize` reads it.

    Raises:
        LeftOut: It has something in it that runs on some hardware only.
    """
    with leaving_out("jax.export"):
        return bytes(
            export.export(jax.jit(program.run), platforms=PLATFORMS)(*program.like).serialize()
        )
