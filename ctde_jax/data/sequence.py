"""Converts images to sequences of rows or pixels, for recurrent models."""

from dataclasses import replace
from math import prod

import numpy as np

from ctde_jax.data.dataset import Dataset
from ctde_jax.data.split import AnySplit
from ctde_jax.errors import InputError, check_known

VIEWS = ("rows", "pixels")


def as_sequence(dataset: Dataset, view: str) -> Dataset:
    """Converts each image to a sequence of rows, or of pixels row by row (Le et al., 2015).

    An image `[height, width]` or `[height, width, channels]` becomes `[height, width * channels]`
    by rows, and `[height * width, channels]` by pixels (one channel if the image has no such axis).
    Dtypes and labels are unchanged.

    Args:
        dataset: Data set of images.
        view: `rows` or `pixels`.

    Raises:
        InputError: If the view is unknown, the inputs are not images, or the examples come from a
            stream.

    Examples:
        >>> data = ctde.data.as_sequence(ctde.data.digits(), "rows")
        >>> model = ctde.models.rnn_classifier(features=8, classes=10)
        >>> data.train.inputs.shape
        (1438, 8, 8)
    """
    check_known("sequence", view, VIEWS)
    dataset.check_arrays("sequence")
    picture = dataset.train.inputs.shape[1:]
    if len(picture) not in (2, 3):
        raise InputError(
            "sequence",
            "requires images of the shape [height, width] or [height, width, channels], "
            f"got {dataset.name} with examples of the shape {list(picture)}.",
        )

    # One step per row or per pixel.
    steps = picture[0] if view == "rows" else picture[0] * picture[1]
    sequence = (steps, prod(picture) // steps)

    def reshaped(split: AnySplit) -> AnySplit:
        return split._replace(inputs=split.inputs.reshape(-1, *sequence))

    def reshaped_feature(values: np.ndarray) -> np.ndarray:
        # `shift` and `scale` are scalars, or have one value per pixel, broadcast over the examples.
        return (
            np.broadcast_to(values, (1, *picture)).reshape(1, *sequence) if values.ndim else values
        )

    return replace(
        dataset,
        train=reshaped(dataset.train),
        test=reshaped(dataset.test),
        validation=dataset.validation and reshaped(dataset.validation),
        shift=reshaped_feature(dataset.shift),
        scale=reshaped_feature(dataset.scale),
    )
