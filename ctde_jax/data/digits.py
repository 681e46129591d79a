"""Scikit-learn's handwritten digits: 1,797 pictures of 8 x 8 pixels that come with the library."""

from dataclasses import replace

import numpy as np

from ctde_jax.data.dataset import Dataset, from_arrays


def digits() -> Dataset:
    """Loads the digits; a fixed random fifth of them is the test split."""
    from sklearn.datasets import load_digits  # takes a second, and only this data set needs it

    images, labels = load_digits(return_X_y=True)
    dataset = from_arrays(images.reshape(-1, 8, 8).astype(np.uint8), labels, name="digits")
    return replace(dataset, scale=np.asarray(1 / 16, np.float32))  # a pixel is a number from 0 to 16
