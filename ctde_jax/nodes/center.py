"""The center of a federation, and the answers of the server by which it advances.

The center is a log: given the center before a round, the answer of the round determines the center
after it, bit for bit. All sides therefore compute it by the same program on a CPU, and compare
digests.
"""

from collections.abc import Callable
from functools import partial
from hashlib import sha256
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import numpy as jnp

from ctde_jax.aggregate import Star, Strategy, adapted
from ctde_jax.devices import PyTree
from ctde_jax.errors import InputError
from ctde_jax.rounds import named, outer_step, state, step_keys
from ctde_jax.trainer import Training, init_arguments, train_key, warmed


class Center(NamedTuple):
    """The center between two rounds, as numpy arrays."""

    params: PyTree
    model_state: PyTree
    outer_state: PyTree
    """State of the strategy's outer optimizer."""

    frozen: PyTree
    """Parameters that are not trained."""

    @property
    def digest(self) -> str:
        """The first 16 hexadecimal digits of the SHA-256 of all bits."""
        digest = sha256()
        for array in _arrays(self):
            digest.update(array.tobytes())
        return digest.hexdigest()[:16]


class Answer(NamedTuple):
    """The answer of the server to the messages of a round."""

    reduced: bytes
    """The answer of the reducer; see `aggregate.Star`."""

    model_state: bytes
    """The merged model state, see `to_bytes`."""

    value: float
    """Mean objective of the round, which outer optimizers may depend on."""


class Algorithm(NamedTuple):
    """The computation that a server and its nodes share.

    Made by `make_algorithm`. All functions run on one CPU device.
    """

    star: Star
    """The parts of the reducer."""

    begin: Callable[[], Center]
    """Returns the center before the first round."""

    advance: Callable[[Center, Answer, int], Center]
    """`advance(center, answer, step) -> center` after the round that starts at this step."""

    key: Callable[[int], jax.Array]
    """Returns the key of the reducer for the round that starts at this step."""

    place: Callable[[], Any]
    """Context in which arrays are placed on the CPU."""


def make_algorithm(
    training: Training, strategy: Strategy, nodes: int, say: Callable[[str], None]
) -> Algorithm:
    """Makes the computation that a server and its nodes share.

    Args:
        training: Training of the server or of a node; see `Federation`.
        strategy: Strategy of the federation.
        nodes: Number of nodes for which the strategy is set up.
        say: Prints a line.

    Raises:
        InputError: The strategy cannot run between nodes.
    """
    star = make_star(strategy, nodes)
    cpu = jax.local_devices(backend="cpu")[0]
    place = partial(jax.default_device, cpu)

    def begin() -> Center:
        with place():
            params, model_state = jax.jit(training.raw_model.init)(*init_arguments(training))
            params, model_state = warmed(training, params, model_state, say)
            trained, frozen = training.divide(params)
            outer_state = adapted(strategy.outer).init(trained)
        return jax.device_get(Center(trained, model_state, outer_state, frozen))

    @jax.jit
    def step_outwards(center: Center, reduced: jax.Array, value: jax.Array, key: jax.Array):
        outer_grads = star.receive(reduced, center.params, key)
        before = state.TrainState(
            jnp.int32(0), center.params, (), (), (), center.outer_state, (), center.frozen
        )
        after = outer_step(strategy, before, outer_grads, lambda: value)
        return after.params, after.outer_state

    def key(step: int) -> jax.Array:
        with place():
            return step_keys(train_key(training), jnp.int32(step))[0]

    def advance(center: Center, answer: Answer, step: int) -> Center:
        reduced = np.frombuffer(answer.reduced, np.uint8)
        with place():
            moved = step_outwards(center, reduced, np.float32(answer.value), key(step))
        params, outer_state = jax.device_get(moved)
        model_state = from_bytes(answer.model_state, center.model_state)
        return Center(params, model_state, outer_state, center.frozen)

    return Algorithm(star, begin, advance, key, place)


def make_star(strategy: Strategy, nodes: int) -> Star:
    """Returns the parts of the reducer of a strategy.

    Raises:
        InputError: The strategy cannot run between nodes.
    """
    rules = {
        "inner_steps": (strategy.inner_steps == 0, "must be at least 1 between nodes, got 0"),
        "later": (bool(strategy.later), "must not be set between nodes, which train in one phase"),
        "diverges": (
            strategy.diverges,
            "must be False between nodes, whose parameters are equal after each round",
        ),
        "per_host": (
            strategy.per_host > 1,
            f"must be 1 between nodes, each of which averages the gradients of all its devices, "
            f"got {strategy.per_host}",
        ),
    }
    for name, (is_broken, rule) in rules.items():
        if is_broken:
            raise InputError(name, f"{rule}.")
    make = getattr(strategy.reduce, "star", None)
    if make is None:
        raise InputError(
            "reduce",
            "must be mean(), two_phase(...), gathered(...) or private(...) of mean() between "
            "nodes, because other reducers exchange messages more than once.",
        )
    return make(nodes)


def shapes_of(center: Center) -> dict[str, str]:
    """Returns the dtype and shape of each array of a center, by name."""
    return {name: f"{leaf.dtype}{list(leaf.shape)}" for name, leaf in named(center).items()}


def to_bytes(tree: PyTree) -> bytes:
    """Returns the bits of all arrays of a tree."""
    return b"".join(array.tobytes() for array in _arrays(tree))


def from_bytes(written: bytes, like: PyTree) -> PyTree:
    """Inverts `to_bytes`; shapes and dtypes are those of `like`.

    Raises:
        InputError: The number of bytes is wrong.
    """
    leaves, structure = jax.tree.flatten(like)
    raw = [_raw(leaf) for leaf in leaves]
    total = sum(array.nbytes for array in raw)
    if len(written) != total:
        raise InputError("message", f"must have {total:,} bytes of state, got {len(written):,}.")
    read = []
    first = 0
    for leaf, array in zip(leaves, raw, strict=True):
        piece = np.frombuffer(written, array.dtype, array.size, first).reshape(array.shape)
        first += array.nbytes
        is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        impl = jax.random.key_impl(leaf) if is_key else None
        read.append(jax.random.wrap_key_data(jnp.asarray(piece), impl=impl) if is_key else piece)
    return structure.unflatten(read)


def _arrays(tree: PyTree) -> list[np.ndarray]:
    return [_raw(leaf) for leaf in jax.tree.leaves(tree)]


def _raw(leaf: Any) -> np.ndarray:
    """Returns an array on the host; of a PRNG key, its integers."""
    is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(leaf) if is_key else leaf)
