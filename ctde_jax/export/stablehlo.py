"""A program as StableHLO, the form in which JAX gives programs away: versioned, and for hardware that is not here."""

import jax
from jax import export

from ctde_jax.errors import on_one_line, shortened
from ctde_jax.export.program import LeftOut, Program

PLATFORMS = ("cpu", "cuda", "tpu")


def to_stablehlo(program: Program) -> bytes:
    """Writes a program as `jax.export.deserialize` reads it.

    Raises:
        LeftOut: It has something in it that runs on some hardware only.
    """
    try:
        return bytes(export.export(jax.jit(program.run), platforms=PLATFORMS)(*program.like).serialize())
    except Exception as error:  # of whatever type JAX has for it
        raise LeftOut(f"jax.export cannot write it ({shortened(on_one_line(str(error)))})") from error
