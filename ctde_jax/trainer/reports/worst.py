"""The examples with the highest loss, and their inputs as pictures or numbers."""

import base64
import io
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Shaped

SHOWN = 12
"""Number of examples with the highest loss."""

_FEATURES = 8
"""Number of features, targets and outputs of an example that are shown."""


class WorstExample(NamedTuple):
    """An example with a high loss."""

    example: int
    """Index of the example in the split."""

    loss: float
    label: str
    """Name of the class, or the targets."""

    prediction: str
    """Name of the predicted class, or the outputs."""

    probability: float | None
    """Probability of the predicted class; None for targets."""

    inputs: np.ndarray
    """Inputs of the example, as in the split."""


def highest(losses: Float[np.ndarray, " examples"]) -> np.ndarray:
    """Returns the indices of the `SHOWN` highest losses, in descending order."""
    return np.argsort(-losses, kind="stable")[:SHOWN]


def describe_numbers(values: Shaped[np.ndarray, "..."]) -> str:
    """Returns the first numbers of an array as a phrase."""
    flat = values.ravel()
    more = f", … {flat.size:,} in total" if flat.size > _FEATURES else ""
    return ", ".join(f"{value:.4g}" for value in flat[:_FEATURES].tolist()) + more


def are_pictures(inputs: np.ndarray) -> bool:
    """Returns whether inputs `[examples, ...]` are shown as pictures.

    They are if an example is `[height, width, channels]` with 1 or 3 channels, or
    `uint8[height, width]`, with sides of at least 4 pixels and a ratio of at most 2. Other arrays
    with two axes are probably sequences of features.
    """
    shape = inputs.shape[1:]
    has_channels = len(shape) == 3 and shape[2] in (1, 3)
    if not has_channels and not (len(shape) == 2 and inputs.dtype == np.uint8):
        return False
    return min(shape[:2]) >= 4 and max(shape[:2]) <= 2 * min(shape[:2])


def pictures(inputs: Sequence[np.ndarray]) -> list[str]:
    """Returns pictures as data URIs of PNG files.

    The smallest value of all pictures is black and the largest one is white.
    """
    # Imported here, as only the page needs matplotlib.
    from matplotlib.image import imsave

    stacked = np.stack(inputs).astype(np.float64)
    low = stacked.min()
    scaled = (stacked - low) / max(stacked.max() - low, np.finfo(float).tiny)
    uris = []
    for picture in scaled:
        pixels = picture[..., 0] if picture.shape[2:] == (1,) else picture
        file = io.BytesIO()
        imsave(file, pixels, cmap="gray", vmin=0, vmax=1, format="png")
        uris.append(f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}")
    return uris
