"""A model accepts only inputs like those of its training."""

import numpy as np
import pytest

from ctde_jax.bundle.accepted import Accepted
from ctde_jax.errors import InputError

ACCEPTED = [
    ("uint8", np.array([[0, 200]], np.uint8)),
    ("uint8", np.array([[0, 200]], np.int64)),
    ("uint8", np.array([[True, False]])),
    ("int32", np.array([[-7, 200]], np.int64)),
    ("int32", np.array([[7, 200]], np.uint8)),
    ("int32", np.array([[True, False]])),
    ("float32", np.array([[0.1, -1e30]], np.float64)),
    ("float32", np.array([[0.1, 3.0]], np.float16)),
    ("float32", np.array([[True, False]])),
    ("float32", [[0.5, 1.5]]),
    ("float32", [[1, 2]]),
]
REFUSED = [
    (
        "uint8",
        np.array([[0, 1]], np.float32),
        "must be integers, as the model was trained on uint8, got float32",
    ),
    (
        "uint8",
        np.array([[0, 256]]),
        "must be from 0 to 255, as in training, got numbers from 0 to 256",
    ),
    ("int32", np.array([[0, 2**31]]), "must be from -2147483648 to 2147483647"),
    ("int32", np.array([[0, 2**64 - 1]], np.uint64), "got numbers from 0 to 18446744073709551615"),
    (
        "int32",
        np.array([[1, 2]], np.float64),
        "must be integers, as the model was trained on int32",
    ),
    (
        "float32",
        np.array([[0, 255]], np.uint8),
        "must be floats, as the model was trained on float32, got uint8",
    ),
    ("float32", np.array([[0, np.nan]], np.float64), "must be finite in float32"),
    ("float32", np.array([[0, 1e39]], np.float64), "must be finite in float32"),
    ("float32", np.array([["a", "b"]]), "must be floats"),
    ("float32", np.array([[1j, 2]]), "must be floats"),
    (
        "float32",
        np.array([1, 2], np.float32),
        r"shape \[2\], got the shape \[2\]; pass a single example as x\[None\]\.$",
    ),
    (
        "float32",
        np.array([1, 2, 3], np.float32),
        r"must be examples of the shape \[2\], got the shape \[3\]\.$",
    ),
    (
        "float32",
        np.array([[1, 2, 3]], np.float32),
        r"must be examples of the shape \[2\], got the shape \[1, 3\]",
    ),
    ("float32", np.zeros(0), r"got the shape \[0\]"),
]


@pytest.mark.parametrize(("dtype", "inputs"), ACCEPTED)
def test_inputs_like_those_of_training_keep_their_values(dtype, inputs):
    found = Accepted(dtype, (2,)).conform("inputs", inputs)
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, np.asarray(inputs).astype(dtype))


@pytest.mark.parametrize(("dtype", "inputs", "sentence"), REFUSED)
def test_inputs_of_another_dtype_shape_or_range_are_refused(dtype, inputs, sentence):
    with pytest.raises(InputError, match=sentence):
        Accepted(dtype, (2,)).conform("inputs", inputs)


def test_pixels_and_tokens_must_be_in_the_range_of_training():
    with pytest.raises(
        InputError, match="must be from 0 to 16, as in training, got numbers from 0 to 17"
    ):
        Accepted("uint8", (2,), 16).conform("inputs", np.array([[0, 17]], np.uint8))
    with pytest.raises(
        InputError, match="must be from 0 to 9, as in training, got numbers from -1 to 3"
    ):
        Accepted("int32", (2,), 9).conform("inputs", np.array([[-1, 3]], np.int32))
    np.testing.assert_array_equal(Accepted("int32", (2,), 9).conform("inputs", [[0, 9]]), [[0, 9]])


def test_empty_inputs_are_accepted():
    accepted = Accepted("float32", (3, None))
    for inputs in ([], np.zeros((0, 3, 5))):
        found = accepted.conform("inputs", inputs)
        assert (found.shape[:2], found.dtype) == ((0, 3), np.float32)
