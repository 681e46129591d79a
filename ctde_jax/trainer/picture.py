"""Pictures of a run, drawn by matplotlib without a window; a failure never ends the run."""

import io
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ctde_jax.errors import on_one_line, shortened

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_DOTS_PER_INCH = 120

_INK = "#012345"
"""Color of text and axes in an SVG picture, which is then replaced by that of the page."""


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

    def write() -> None:
        with _isolated():
            draw().savefig(path, dpi=_DOTS_PER_INCH, format="png", backend="agg")

    return attempt(write, path)


def attempt(write: Callable[[], object], path: Path) -> str:
    """Calls a function that writes a file on which nothing else depends.

    Args:
        write: Writes the file.
        path: The file, for the message.

    Returns:
        An empty string, or one sentence with the reason if the function raised an exception.
    """
    # matplotlib depends on the user's fonts, settings and folders, so any exception is possible.
    try:
        write()
    except Exception as error:
        reason = (
            error.strerror
            if isinstance(error, OSError) and error.strerror
            else f"{type(error).__name__}: {error}"
        )
        return (
            f"could not write {path} ({on_one_line(shortened(reason))}); nothing else depends on "
            "this file."
        )
    return ""


def svg(draw: Callable[[], "Figure"], name: str) -> str:
    """Draws a figure as an `<svg>` element for a page, in the page's font and text color.

    Args:
        draw: Returns the figure.
        name: Name of the figure, which makes the identifiers in the element unique in the page.
    """
    with _isolated():
        from matplotlib import rc_context

        inks = ("text.color", "axes.labelcolor", "axes.titlecolor", "axes.edgecolor")
        settings: dict[Any, Any] = {
            **dict.fromkeys([*inks, "xtick.color", "ytick.color"], _INK),
            "axes.facecolor": "none",
            "figure.facecolor": "none",
            "legend.frameon": False,
            "svg.fonttype": "none",
            "svg.hashsalt": name,
        }
        file = io.StringIO()
        with rc_context(settings):
            no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
            draw().savefig(file, format="svg", backend="svg", metadata=no_metadata)

    # Without the XML declaration. Numbered identifiers are not unique, and nothing refers to them.
    content = file.getvalue()
    content = re.sub(r' id="[\w.]+_\d+"', "", content[content.index("<svg") :])
    return content.replace(_INK, "currentColor")


@contextmanager
def _isolated() -> Iterator[None]:
    """Imports matplotlib, and suspends the user's warning filters and floating-point settings."""
    import numpy as np

    with warnings.catch_warnings(action="ignore"), np.errstate(all="ignore"):
        _import_matplotlib()
        yield


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
