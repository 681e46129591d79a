"""The local steps of a node: a round on the devices of the node, without communication."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
import optax

from ctde_jax.aggregate import Strategy
from ctde_jax.data import deal_part
from ctde_jax.devices import PyTree, replica
from ctde_jax.nodes.center import Center
from ctde_jax.rounds import (
    OnDisk,
    Place,
    Resident,
    Span,
    make_gradient_for,
    make_local_steps,
    replicated_gradient,
    state,
)
from ctde_jax.trainer import Training, train_key


class Local(NamedTuple):
    """The result of a node's local steps, as numpy arrays."""

    message: PyTree
    """The outer gradient: the central parameters minus those after the local steps."""

    model_state: PyTree
    opt_state: PyTree
    sums: dict[str, float]
    """Sums over the examples of all steps; see `rounds.Sums`."""

    @property
    def is_finite(self) -> bool:
        """Whether no number of the message and the sums is NaN or infinite."""
        leaves = [*jax.tree.leaves(self.message), *self.sums.values()]
        return all(np.isfinite(leaf).all() for leaf in leaves)


class LocalSteps:
    """The local steps of a node, compiled once.

    Args:
        training: Training of the node, from `Federation.of_node`.
        place: Index of the node and number of nodes.
        epoch_steps: Number of steps in an epoch; see `Federation`.

    Raises:
        InputError: The node has too few examples, or too many for `epoch_steps`.
    """

    def __init__(self, training: Training, place: Place, epoch_steps: int | None = None):
        devices = training.devices
        batches = deal_part(
            training.data.train,
            len(devices),
            training.batch_size,
            training.seed,
            place.node,
            epoch_steps,
        )
        source = OnDisk(batches) if batches.is_on_disk else Resident(batches)
        self._feed = source.feed(devices)
        self._devices: Sequence[jax.Device] = devices
        self._key = replica.replicate(train_key(training), devices)
        self._optimizer = training.strategy.local(training.optimizer)
        self._round_steps = training.strategy.inner_steps

        # The gradient is that of the round in `fit`, for the place of these devices among all.
        gradient = make_gradient_for(
            Strategy(),
            training.raw_model,
            training.weighted_task,
            training.augment,
            training.accumulation_steps,
            place,
        )
        local_steps = make_local_steps(replicated_gradient(gradient), self._optimizer)

        def take_steps(train_state, split, batches, key):
            after, sums = local_steps(train_state, split, batches[0], key)
            params, model_state, opt_state = after
            message = optax.tree.sub(train_state.params, params)
            return message, model_state, opt_state, sums

        self._take_steps = replica.compiled_once(
            replica.parallel(
                take_steps, devices, in_axes=(None, source.axis, 0, None), out_axes=None
            ),
            devices,
            one_thread=True,
        )

    def init(self, center: Center) -> PyTree:
        """Returns the state of the optimizer before the first round, as numpy arrays."""
        return jax.device_get(jax.jit(self._optimizer.init)(center.params))

    def __call__(self, center: Center, opt_state: PyTree, step: int) -> Local:
        """Takes the local steps of the round that starts at `step`, from the center."""
        before = state.TrainState(
            np.int32(step),
            center.params,
            center.model_state,
            opt_state,
            reduce_state=(),
            outer_state=(),
            frozen=center.frozen,
        )
        before = replica.replicate(before, self._devices)
        span = Span(step, step + self._round_steps, self._round_steps, 1, 1)
        with self._feed([span]) as pieces:
            examples, indices, _ = next(pieces)
        taken = self._take_steps(before, examples, indices, self._key)
        message, model_state, opt_state, sums = jax.device_get(taken)
        totals = {name: float(values.sum(dtype=np.float64)) for name, values in sums.items()}
        return Local(message, model_state, opt_state, totals)
