"""Scikit-learn's handwritten digits: 1,797 images of 8 x 8 pixels that come with the library."""

from dataclasses import replace
from importlib.metadata import distribution

import numpy as np

from ctde_jax.data.dataset import Dataset, from_arrays

FILE = "sklearn/datasets/data/digits.csv.gz"


def digits() -> Dataset:
    """Loads the digits, `uint8[examples, 8, 8]`; a fixed random fifth of them is the test split.

    The 1,438 training and 359 test images have pixels from 0 to 16 (`scale` is 1/16) and labels
    `int32[examples]`. They are the test set of Alpaydin and Kaynak (1998), which is part of
    scikit-learn; they are read from its file, because its import takes a second.

    Examples:
        >>> data = ctde.data.digits()
        >>> data.train.inputs.shape, data.test.labels.shape
        ((1438, 8, 8), (359,))
    """
    table = np.loadtxt(str(distribution("scikit-learn").locate_file(FILE)), np.uint8, delimiter=",")
    dataset = from_arrays(table[:, :-1].reshape(-1, 8, 8), table[:, -1], name="digits")
    # A pixel is a number from 0 to 16.
    return replace(dataset, scale=np.asarray(1 / 16, np.float32))
