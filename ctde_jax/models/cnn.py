"""The convolutional network of federated averaging (McMahan et al., 2017)."""

from collections.abc import Sequence

import jax
from flax import nnx

from ctde_jax.errors import check_at_least
from ctde_jax.models.base import Model
from ctde_jax.models.convolution import Conv
from ctde_jax.models.layers import Dropout, as_images, check_image_shape, count_channels
from ctde_jax.models.linear import Linear
from ctde_jax.models.nnx_modules import from_nnx

CONVOLUTIONS = (32, 64)
HIDDEN = 512


class CNN(nnx.Module):
    """Two 5 x 5 convolutions, each followed by a ReLU and 2 x 2 max pooling, then two dense layers."""

    def __init__(self, image_shape: Sequence[int], classes: int, dropout: float, *, rngs: nnx.Rngs):
        self.image_shape = tuple(image_shape)
        first, second = CONVOLUTIONS
        self.first = Conv(count_channels(image_shape), first, (5, 5), rngs=rngs)
        self.second = Conv(first, second, (5, 5), rngs=rngs)
        height, width = (side // 4 for side in image_shape[:2])
        self.hidden = Linear(height * width * second, HIDDEN, rngs=rngs)
        self.out = Linear(HIDDEN, classes, rngs=rngs)
        self.dropout = Dropout(dropout, rngs=rngs)

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Maps pictures `[examples, *image_shape]` to `[examples, classes]`."""
        x = as_images(inputs, self.image_shape)
        for convolution in (self.first, self.second):
            x = nnx.relu(
                _halve(convolution(x))
            )  # the same as pooling after the ReLU, with a quarter of the work
        x = nnx.relu(self.hidden(x.reshape(x.shape[0], -1)))
        return self.out(self.dropout(x))


def cnn(image_shape: Sequence[int], classes: int, dropout: float = 0.0) -> Model:
    """Builds the network; on pictures of 28 x 28 with 10 classes it has 1,663,370 parameters.

    Args:
        image_shape: `(height, width)` or `(height, width, channels)`, as the data set stores a picture.
        classes: The numbers that come out.
        dropout: Which share of the hidden layer is left out in training.

    Raises:
        InputError: It is no picture, or one with fewer than 4 x 4 pixels; or another option is out of range.
    """
    check_image_shape(image_shape, halvings=2)
    check_at_least(1, classes=classes)
    return from_nnx(lambda rngs: CNN(image_shape, classes, dropout, rngs=rngs))


def _halve(x: jax.Array) -> jax.Array:
    """Takes the largest of each 2 x 2 pixels; on a CPU its gradient takes half the time of `nnx.max_pool`'s."""
    examples, height, width, channels = x.shape
    x = x[:, : height // 2 * 2, : width // 2 * 2]
    return x.reshape(examples, height // 2, 2, width // 2, 2, channels).max(axis=(2, 4))
