"""An image that is read as a sequence keeps its values."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from ctde_jax import data
from ctde_jax.errors import InputError
from ctde_jax.models import mlp, with_raw_inputs

RNG = np.random.default_rng(0)
IMAGES = {"gray": (6, 4), "color": (6, 4, 3)}
SHAPES = {
    ("gray", "rows"): (6, 4),
    ("gray", "pixels"): (24, 1),
    ("color", "rows"): (6, 12),
    ("color", "pixels"): (24, 3),
}


def image_data(*shape: int) -> data.Dataset:
    """Returns ten examples of this shape."""
    return data.from_arrays(RNG.integers(0, 256, (10, *shape), np.uint8), np.arange(10) % 2)


@pytest.mark.parametrize(("image", "view"), SHAPES)
def test_sequence_has_the_order_of_the_image(image: str, view: str):
    """Bytes stay bytes, and pixels keep their order."""
    dataset = image_data(*IMAGES[image])

    sequences = data.as_sequence(dataset, view)

    for split, original in [(sequences.train, dataset.train), (sequences.test, dataset.test)]:
        assert split.inputs.dtype == np.uint8
        assert split.inputs.shape == (len(original.inputs), *SHAPES[image, view])
        np.testing.assert_array_equal(split.inputs.ravel(), original.inputs.ravel())
        np.testing.assert_array_equal(split.labels, original.labels)
    assert (sequences.shift, sequences.scale) == (dataset.shift, dataset.scale)


@pytest.mark.parametrize("view", ["rows", "pixels"])
def test_standardized_images_stay_standardized(view: str):
    """A model that flattens its inputs sees the same numbers either way."""
    dataset = data.standardized(image_data(6, 4, 3))
    outputs = []
    for each in (dataset, data.as_sequence(dataset, view)):
        model = with_raw_inputs(mlp([72, 2]), each.shift, each.scale)
        params, model_state = model.init(jax.random.key(0), each.train.inputs[:1])
        outputs.append(model.apply(params, model_state, each.train.inputs, None)[0])
    np.testing.assert_array_equal(*outputs)


def test_validation_examples_are_sequences_like_all_others():
    """`hold_out` and `as_sequence` can be applied in either order."""
    dataset = image_data(6, 4)
    first = data.as_sequence(data.hold_out(dataset, 0.25), "pixels")
    second = data.hold_out(data.as_sequence(dataset, "pixels"), 0.25)
    assert first.validation is not None
    assert second.validation is not None
    np.testing.assert_array_equal(first.validation.inputs, second.validation.inputs)


def test_shift_of_a_channel_applies_to_every_pixel():
    """A shift with fewer elements than the image is broadcast first."""
    dataset = image_data(6, 4, 3)
    dataset = replace(dataset, shift=np.array([1, 2, 3], np.float32).reshape(1, 1, 1, 3))
    rows = data.as_sequence(dataset, "rows")
    np.testing.assert_array_equal(rows.shift, np.tile([1, 2, 3], 4) * np.ones((1, 6, 1)))


@pytest.mark.parametrize("shape", [(5,), (2, 3, 4, 5)])
def test_only_images_are_read_as_sequences(shape: tuple[int, ...]):
    with pytest.raises(InputError) as caught:
        data.as_sequence(image_data(*shape), "rows")
    assert str(caught.value) == (
        "sequence requires images of the shape [height, width] or [height, width, channels], "
        f"got arrays with examples of the shape {list(shape)}."
    )


def test_unknown_view_is_refused():
    with pytest.raises(
        InputError, match=r"sequence must be one of rows, pixels, got 'row'; did you mean 'rows'\?"
    ):
        data.as_sequence(image_data(2, 2), "row")
