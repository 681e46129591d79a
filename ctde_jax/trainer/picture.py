"""Pictures of a run, drawn by matplotlib without a window; a failure never ends the run."""

import os
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from ctde_jax.errors import on_one_line, shortened

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_DOTS_PER_INCH = 120


def save(draw: Callable[[], "Figure"], path: Path) -> str:
    """Draws a figure and writes it as PNG.

    Neither pyplot nor its backend is used. Warnings and floating-point errors that the user has
    turned into exceptions do not apply to the drawing.

    Args:
        draw: Returns the figure.
        path: The file to write.

    Returns:
        An empty string, or one sentence with the reason if the drawing or the writing failed.
    """
    import numpy as np

    # matplotlib depends on the user's fonts, settings and folders, so any exception is possible.
    try:
        with warnings.catch_warnings(action="ignore"), np.errstate(all="ignore"):
            _import_matplotlib()
            draw().savefig(path, dpi=_DOTS_PER_INCH, format="png", backend="agg")
    except Exception as error:
        reason = (
            error.strerror
            if isinstance(error, OSError) and error.strerror
            else f"{type(error).__name__}: {error}"
        )
        return (
            f"could not draw {path} ({on_one_line(shortened(reason))}); nothing else depends on "
            "this file."
        )
    return ""


def _import_matplotlib() -> None:
    """Imports matplotlib, even if MPLBACKEND names a backend that it does not know."""
    if "matplotlib" in sys.modules or "MPLBACKEND" not in os.environ:
        return
    # The import fails on an unknown backend, so hide the variable, and apply it if it is valid.
    backend = os.environ.pop("MPLBACKEND")
    try:
        import matplotlib
    finally:
        os.environ["MPLBACKEND"] = backend
    with suppress(ValueError):
        matplotlib.rcParams["backend"] = backend
