"""A small pre-activation residual network for small images (He et al., 2016).

Group normalization (Wu and He, 2018) is the default: the outputs for an example then do not depend
on other examples, so splitting a batch over devices changes nothing. Batch normalization (Ioffe and
Szegedy, 2015) couples the examples of a batch.
"""

from collections.abc import Callable, Sequence
from functools import partial

from flax import nnx
from jaxtyping import Array, Float

from ctde_jax.errors import InputError, check_at_least, check_known
from ctde_jax.models.base import Model
from ctde_jax.models.batch_statistics import BatchStatistics
from ctde_jax.models.convolution import Conv
from ctde_jax.models.layers import Images, as_images, check_image_shape, count_channels
from ctde_jax.models.linear import Linear
from ctde_jax.models.nnx_modules import from_nnx

GROUPS = 8

NORMS: dict[str, Callable[..., nnx.Module]] = {
    "group": partial(nnx.GroupNorm, num_groups=GROUPS),
    # The default momentum, 0.99, would make the running averages lag by hundreds of steps.
    "batch": partial(nnx.BatchNorm, momentum=0.9),
}


class Block(nnx.Module):
    """A residual block: two 3 x 3 convolutions, each after a normalization and a ReLU."""

    def __init__(self, before: int, width: int, stride: int, norm: str, *, rngs: nnx.Rngs):
        self.first_norm = NORMS[norm](before, rngs=rngs)
        self.first = _convolution(before, width, stride, rngs=rngs)
        self.second_norm = NORMS[norm](width, rngs=rngs)
        self.second = _convolution(width, width, rngs=rngs)
        # The shortcut is the identity if shapes agree, else a 1 x 1 convolution.
        same = before == width and stride == 1
        self.shortcut = None if same else _convolution(before, width, stride, size=1, rngs=rngs)

    def __call__(self, x: Images) -> Images:
        """Applies the block; height and width are divided by the stride."""
        # A projection reads the activated input, as in the pre-activation networks of the paper.
        active = _activate(self.first_norm, x)
        kept = x if self.shortcut is None else self.shortcut(active)
        return kept + self.second(_activate(self.second_norm, self.first(active)))


class ResNet(nnx.Module):
    """A convolution, stages of residual blocks, a global mean over pixels and a dense layer."""

    def __init__(
        self,
        image_shape: Sequence[int],
        classes: int,
        channels: Sequence[int],
        blocks: int,
        norm: str,
        *,
        rngs: nnx.Rngs,
    ):
        self.image_shape = tuple(image_shape)
        self.stem = _convolution(count_channels(image_shape), channels[0], rngs=rngs)

        # The first block of each later stage halves height and width.
        self.blocks = nnx.List([])
        before = channels[0]
        for stage, width in enumerate(channels):
            for i in range(blocks):
                halves = stage > 0 and i == 0
                self.blocks.append(Block(before, width, 2 if halves else 1, norm, rngs=rngs))
                before = width

        self.norm = NORMS[norm](before, rngs=rngs)
        self.out = Linear(before, classes, rngs=rngs)

    def __call__(
        self, inputs: Float[Array, " examples *image_shape"]
    ) -> Float[Array, "examples classes"]:
        """Maps images to logits."""
        x = self.stem(as_images(inputs, self.image_shape))
        for block in self.blocks:
            x = block(x)
        # The last block ends in a convolution, so normalize its output before the mean over pixels.
        return self.out(_activate(self.norm, x).mean(axis=(1, 2)))


def resnet(
    image_shape: Sequence[int],
    classes: int,
    channels: Sequence[int] = (16, 32, 64),
    blocks: int = 1,
    norm: str = "group",
    batch_statistics: BatchStatistics = "synchronized",
) -> Model:
    """Builds a pre-activation residual network (He et al., 2016).

    It has `2 * blocks * len(channels) + 2` layers, and group normalization (Wu and He, 2018) or
    batch normalization (Ioffe and Szegedy, 2015). The model maps images `[examples, *image_shape]`
    to logits, `float32[examples, classes]`.

    Args:
        image_shape: `(height, width)` or `(height, width, channels)`, as stored by the data set.
        classes: Number of classes.
        channels: Number of channels of each stage.
        blocks: Number of blocks of each stage.
        norm: "group" or "batch".
        batch_statistics: Examples over which batch normalization computes its mean and variance.

    Raises:
        InputError: `image_shape` is not the shape of an image or too small for the stages, a stage
            is not a multiple of the `GROUPS` of group normalization, or another argument is out of
            range.

    Examples:
        >>> model = ctde.models.resnet((32, 32, 3), classes=10, norm="batch")
        >>> images = np.zeros((1, 32, 32, 3), np.float32)
        >>> params, batch_stats = jax.eval_shape(model.init, jax.random.key(0), images)
        >>> ctde.models.count_params(params)
        77850
    """
    if not channels:
        raise InputError("channels", "must contain at least one stage, got none.")
    check_at_least(1, classes=classes, channels=min(channels), blocks=blocks)
    check_known("norm", norm, NORMS)

    # Group normalization splits the channels of every stage into `GROUPS` groups of equal size.
    uneven = [each for each in channels if each % GROUPS]
    if norm == "group" and uneven:
        raise InputError(
            "channels",
            f"must be multiples of the {GROUPS} groups of group normalization, got {uneven[0]}.",
        )

    check_image_shape(image_shape, halvings=len(channels) - 1)
    return from_nnx(
        lambda rngs: ResNet(image_shape, classes, channels, blocks, norm, rngs=rngs),
        batch_statistics,
    )


def _convolution(
    before: int, after: int, stride: int = 1, size: int = 3, *, rngs: nnx.Rngs
) -> Conv:
    return Conv(before, after, (size, size), strides=stride, use_bias=False, rngs=rngs)


def _activate(norm: nnx.Module, x: Images) -> Images:
    # For bfloat16 inputs, batch normalization returns float32, the dtype of its statistics.
    return nnx.relu(norm(x)).astype(x.dtype)
