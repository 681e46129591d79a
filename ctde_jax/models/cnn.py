"""The convolutional network of federated averaging (McMahan et al., 2017)."""

from collections.abc import Sequence

from flax import nnx
from jaxtyping import Array, Float

from ctde_jax.errors import check_at_least
from ctde_jax.models.base import Model
from ctde_jax.models.convolution import Conv
from ctde_jax.models.layers import Dropout, Images, as_images, check_image_shape, count_channels
from ctde_jax.models.linear import Linear
from ctde_jax.models.nnx_modules import from_nnx

CONVOLUTIONS = (32, 64)
HIDDEN = 512


class CNN(nnx.Module):
    """Two 5 x 5 convolutions, each with ReLU and 2 x 2 max pooling, then two dense layers."""

    def __init__(
        self, image_shape: Sequence[int], classes: int, dropout_rate: float, *, rngs: nnx.Rngs
    ):
        self.image_shape = tuple(image_shape)
        first, second = CONVOLUTIONS
        self.first = Conv(count_channels(image_shape), first, (5, 5), rngs=rngs)
        self.second = Conv(first, second, (5, 5), rngs=rngs)
        # Two poolings, each rounding down, leave a quarter of the height and width.
        height, width = (side // 4 for side in image_shape[:2])
        self.hidden = Linear(height * width * second, HIDDEN, rngs=rngs)
        self.out = Linear(HIDDEN, classes, rngs=rngs)
        self.dropout = Dropout(dropout_rate, rngs=rngs)

    def __call__(
        self, inputs: Float[Array, " examples *image_shape"]
    ) -> Float[Array, "examples classes"]:
        """Maps images to logits."""
        x = as_images(inputs, self.image_shape)
        for convolution in (self.first, self.second):
            # Max pooling commutes with the ReLU and leaves it a quarter of the work.
            x = nnx.relu(_halve(convolution(x)))
        x = nnx.relu(self.hidden(x.reshape(x.shape[0], -1)))
        return self.out(self.dropout(x))


def cnn(image_shape: Sequence[int], classes: int, dropout_rate: float = 0.0) -> Model:
    """Builds the convolutional network of federated averaging (McMahan et al., 2017).

    For images of 28 x 28 and 10 classes, it has 1,663,370 parameters. The model maps images
    `[examples, *image_shape]` to logits, `float32[examples, classes]`.

    Args:
        image_shape: `(height, width)` or `(height, width, channels)`, as stored by the data set.
        classes: Number of classes.
        dropout_rate: Dropout rate of the hidden layer.

    Raises:
        InputError: `image_shape` is not the shape of an image with at least 4 x 4 pixels, or
            another argument is out of range.

    Examples:
        >>> model = ctde.models.cnn((28, 28), classes=10)
        >>> images = np.zeros((1, 28, 28), np.float32)
        >>> params, _ = jax.eval_shape(model.init, jax.random.key(0), images)
        >>> ctde.models.count_params(params)
        1663370
    """
    check_image_shape(image_shape, halvings=2)
    check_at_least(1, classes=classes)
    return from_nnx(lambda rngs: CNN(image_shape, classes, dropout_rate, rngs=rngs))


def _halve(x: Images) -> Images:
    """Applies 2 x 2 max pooling.

    On CPU, the gradient takes half the time of that of `nnx.max_pool`.
    """
    examples, height, width, channels = x.shape
    # As in `nnx.max_pool` with padding "VALID", an odd last row or column is dropped.
    x = x[:, : height // 2 * 2, : width // 2 * 2]
    return x.reshape(examples, height // 2, 2, width // 2, 2, channels).max(axis=(2, 4))
