"""Messages with smooth kernels: a few numbers in place of the pixels of an image."""

from math import prod

import jax
import numpy as np
from jax import numpy as jnp
from jaxtyping import Array, Float, Float32

from ctde_jax.aggregate.reducer import IndependentReducer, Reducer, Star, reducer
from ctde_jax.devices import PyTree
from ctde_jax.errors import InputError, check_positive


def smooth(
    reduce: Reducer,
    image: tuple[int, ...],
    keep: tuple[int, int],
    length: float = 2.0,
    width: float | None = None,
) -> Reducer:
    """Reduces messages whose kernels of images are smooth functions of the position.

    Neighboring pixels are similar, so the gradient of a dense kernel that reads an image is a
    smooth function of the pixel, and a few components of a basis contain most of it. (DeMo, Peng et
    al., 2024, selects components of the cosine transform of each message.) A kernel `[height *
    width * channels, ...]` travels as `[keep[0] * keep[1] * channels, ...]`. The rest of a message
    is dropped, so the kernel changes by smooth functions only; its initial values and all other
    parameters are not restricted.

    The basis does not depend on the data. Along the height and the width, it has the first
    principal components of a Gaussian process whose covariance is
    `exp(-(x - y)**2 / (2 * length**2))`, times the envelopes `exp(-x**2 / (2 * width**2))` of x
    and y if a width is given, with positions relative to the center.

    Args:
        reduce: Reducer of the shortened messages.
        image: Height and width of an input, and if it has channels, their number.
        keep: Number of components to keep along the height and along the width.
        length: Correlation length, in pixels.
        width: Standard deviation of the envelope, in pixels, for images with a dark margin; None
            for no envelope.

    Raises:
        InputError: `keep` is not from 1 to the size of the image, or a length is not positive. Or,
            at initialization, no parameter has as many rows as the image has values.

    Examples:
        >>> codec = ctde.aggregate.error_feedback(ctde.aggregate.quantize(bits=2))
        >>> two_phase = ctde.aggregate.two_phase(codec)
        >>> reduce = ctde.aggregate.smooth(two_phase, image=(28, 28), keep=(9, 9), width=6.0)
        >>> strategy = ctde.Strategy(inner_steps=64, reduce=reduce)
    """
    check_positive(length=length, width=width)
    kernels = _Kernels(image, keep, length, width)
    short, long = kernels.short, kernels.long

    def init(params: PyTree) -> PyTree:
        kernels.check(params)
        return reduce.init(short(params))

    def update(updates, state, params=None, **extra_args):
        of_params = None if params is None else short(params)
        reduced, state = reduce.update(short(updates), state, of_params, **extra_args)
        return long(reduced, updates), state

    def star(nodes: int) -> Star:
        """Returns the parts of the inner reducer, with shortened messages."""
        assert reduce.star is not None
        inner = reduce.star(nodes)

        def init_sender(params):
            kernels.check(params)
            return inner.init(short(params))

        def read(payload, params, key):
            message, weight = inner.read(payload, short(params), key)
            return long(message, params), weight

        def receive(answer, params, key):
            return long(inner.receive(answer, short(params), key), params)

        return Star(
            init=init_sender,
            init_server=lambda params: inner.init_server(short(params)),
            send=lambda message, *rest: inner.send(short(message), *rest),
            read=read,
            combine=lambda payloads, state, params, key: inner.combine(
                payloads, state, short(params), key
            ),
            receive=receive,
            settle=lambda answer, params, *states: inner.settle(answer, short(params), *states),
        )

    independent = isinstance(reduce, IndependentReducer)
    has_star = getattr(reduce, "star", None) is not None
    return reducer(init, update, independent, star if has_star else None)


class _Kernels:
    """The change between kernels of images and their components.

    Raises:
        InputError: See `smooth`.
    """

    def __init__(
        self,
        image: tuple[int, ...],
        keep: tuple[int, int],
        length: float,
        width: float | None,
    ):
        if len(image) not in (2, 3):
            raise InputError("image", f"must be height, width and maybe channels, got {image}.")
        for most, count in zip(image, keep, strict=False):
            if not 1 <= count <= most:
                raise InputError("keep", f"must be from 1 to {most}, got {count}.")
        self._image = image
        self._grid = (*image, 1)[:3]
        self._kept = (*keep, self._grid[2])
        self._bases = [
            _components(size, count, length, width)
            for size, count in zip(image, keep, strict=False)
        ]

    def check(self, params: PyTree) -> None:
        """Raises InputError if there is no kernel of images."""
        if not any(map(self._reads_images, jax.tree.leaves(params))):
            raise InputError(
                "image",
                f"must be the shape of the inputs of a dense layer, got {self._image}, but no "
                f"parameter has {prod(self._grid):,} rows.",
            )

    def short(self, tree: PyTree) -> PyTree:
        """Replaces kernels of images by their components."""
        return jax.tree.map(self._shorten, tree)

    def long(self, tree: PyTree, like: PyTree) -> PyTree:
        """Returns the smooth kernels with these components, shaped like `like`."""
        return jax.tree.map(self._lengthen, tree, like)

    def _reads_images(self, leaf: jax.Array) -> bool:
        return leaf.ndim > 1 and leaf.shape[0] == prod(self._grid)

    def _shorten(self, leaf: Float[Array, "pixels ..."]) -> Float[Array, "components ..."]:
        if not self._reads_images(leaf):
            return leaf
        pixels = leaf.astype(jnp.float32).reshape(*self._grid, -1)
        kept = jnp.einsum("ah,bw,hwcn->abcn", *self._bases, pixels, precision="highest")
        return kept.reshape(-1, *leaf.shape[1:]).astype(leaf.dtype)

    def _lengthen(self, kept: Float[Array, "components ..."], like: jax.Array) -> jax.Array:
        if not self._reads_images(like):
            return kept
        numbers = kept.astype(jnp.float32).reshape(*self._kept, -1)
        pixels = jnp.einsum("ah,bw,abcn->hwcn", *self._bases, numbers, precision="highest")
        return pixels.reshape(like.shape).astype(like.dtype)


def _components(
    size: int, count: int, length: float, width: float | None
) -> Float32[np.ndarray, "count size"]:
    """Returns orthonormal rows, the first principal components; see `smooth`."""
    position = np.arange(size) - (size - 1) / 2
    envelope = np.ones(size) if width is None else np.exp(-(position**2) / (2 * width**2))
    distance = position[:, None] - position
    covariance = np.exp(-(distance**2) / (2 * length**2)) * envelope[:, None] * envelope
    rows = np.linalg.eigh(covariance)[1][:, ::-1][:, :count].T

    # The same bits on every machine, although LAPACK rounds differently and the sign is arbitrary.
    largest = np.take_along_axis(rows, np.abs(rows.round(6)).argmax(axis=1)[:, None], axis=1)
    return ((rows * np.sign(largest) * 2**16).round() / 2**16).astype(np.float32)
