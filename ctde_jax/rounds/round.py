"""One training round on one replica.

A synchronous round computes a gradient, reduces it over the replicas and applies the optimizer. A
local round takes optimizer steps without communication, reduces the change of the parameters and
applies the outer optimizer. An exact round uses the gradient over all shards of the global batch
and no reducer.
"""

from collections.abc import Callable, Sequence
from functools import partial

import jax
import optax
from jax import lax
from jax import numpy as jnp
from jaxtyping import Array, Float32, Int32, Key

from ctde_jax.aggregate import MEAN, Strategy, Value, adapted
from ctde_jax.data import Augment, Split
from ctde_jax.devices import PyTree, agreed_state, groups, is_vmapped, replica
from ctde_jax.models import Model, Task, fine_tuning
from ctde_jax.rounds.exact import make_exact, make_exact_gradient
from ctde_jax.rounds.gradient import Gradient, Place, StepIndices, make_gradient, step_keys
from ctde_jax.rounds.state import TrainState, axes
from ctde_jax.rounds.sums import StepSums, mean_objective, of_the_first, with_measurements

BLOCK_STEPS = 16
"""Steps per inner loop with a static trip count, on a GPU.

XLA:GPU synchronizes with the host on every iteration of a loop with a dynamic trip count (measured,
about 20 microseconds per step). Blocks with a static trip count pay that once per block.
"""

Round = Callable[[TrainState, Split, StepIndices, Key[Array, ""]], tuple[TrainState, StepSums]]
"""`train_round(state, split, batches, key) -> (state, sums over the replica's examples)`

`split` contains the examples that the device holds.
"""

Rounds = Callable[
    [
        TrainState,
        Split,
        Int32[Array, "rounds steps per_replica"],
        Int32[Array, ""],
        Int32[Array, ""],
        Key[Array, ""],
    ],
    tuple[TrainState, dict[str, Float32[Array, " rounds*steps"]]],
]
"""`train_rounds(state, split, batches, first, last, key) -> (state, sums over the examples)`

The rounds from `first` up to but not including `last` are computed. The sums of all other rounds
are zero.
"""


def make_gradient_for(
    strategy: Strategy,
    model: Model,
    task: Task,
    augment: Augment | None = None,
    accumulation_steps: int = 1,
    place: Place = Place(),
) -> Gradient:
    """Makes the gradient function for the rounds of a strategy.

    Args:
        strategy: Strategy of the rounds; an exact one has a separate gradient function.
        model: Model to train.
        task: Task that defines the loss and the metrics.
        augment: Augmentation of each training example, with a different key for each.
        accumulation_steps: Number of microbatches for gradient accumulation; ignored if the
            strategy is exact.
        place: Place of these replicas among those of all nodes.
    """
    if strategy.exact:
        return make_exact_gradient(model, task, augment)
    return make_gradient(model, task, augment, accumulation_steps, place)


def make_round(
    gradient: Gradient,
    optimizer: optax.GradientTransformation,
    strategy: Strategy,
    ema_decay: float | None = None,
    merges: bool = False,
) -> Round:
    """Makes the round of a strategy; it uses collectives, so it runs under `replica.parallel`.

    A local step for which a replica (or, with `per_host`, a host) has no examples leaves its
    parameters and states unchanged. In the first step of a round, at least one replica must have
    examples.

    Args:
        gradient: Gradient function, made by `make_gradient_for` for the same strategy.
        optimizer: Optimizer of every step.
        strategy: Strategy of the rounds.
        ema_decay: Decay per round of the exponential moving average of the parameters; None for no
            average.
        merges: Whether synchronous rounds compute the mean gradient of all replicas at once; for
            virtual replicas on one device that hold the same split.
    """
    optimizer = strategy.local(optimizer)

    def step(state: TrainState, grads: PyTree, value: Value) -> TrainState:
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params, value=value)
        return averaged(
            state._replace(params=optax.apply_updates(state.params, updates), opt_state=opt_state)
        )

    def averaged(state: TrainState) -> TrainState:
        if ema_decay is None:
            return state
        rate = 1 - ema_decay
        # In this form, the average of a constant parameter keeps its bits.
        ema_params = jax.tree.map(
            lambda ema, x: ema + rate * (x - ema), state.ema_params, state.params
        )
        return state._replace(ema_params=ema_params)

    # The kinds of round. With an independent reducer, no message may depend on the examples of
    # another replica or host, so the gradient is computed without collectives between them.
    if strategy.exact:
        advance = make_exact(gradient, step)
    elif strategy.inner_steps:
        of_host = replicated_gradient(gradient, strategy.per_host)
        advance = _make_local(of_host, optimizer, strategy, averaged)
    elif strategy.shared_batches:
        advance = _as_only_replica(_make_synchronous(gradient, optax.identity(), step))
    elif merges and strategy.reduce is MEAN:
        merging = partial(gradient, merges=True)
        advance = _make_synchronous(merging, optax.identity(), step)
    else:
        gradient = partial(gradient, alone=True) if strategy.is_independent else gradient
        advance = _make_synchronous(gradient, strategy.reduce, step)

    def train_round(state: TrainState, split: Split, batches: StepIndices, key: Key[Array, ""]):
        advanced, sums = advance(state, split, batches, key)
        # The objective was needed for `value` only; it is not reported.
        sums.pop("objective", None)
        return advanced._replace(step=state.step + len(batches)), sums

    return train_round


def _make_synchronous(
    gradient: Gradient, reduce: optax.GradientTransformation, step: Callable[..., TrainState]
) -> Round:
    """Makes the synchronous round: one optimizer step with the reduced gradient."""
    reduce = optax.with_extra_args_support(reduce)

    def synchronous(
        state: TrainState,
        split: Split,
        batches: Int32[Array, "1 per_replica"],
        key: Key[Array, ""],
    ):
        # Compute the gradient over this replica's examples.
        (indices,) = batches
        reduce_key, step_key = step_keys(key, state.step)
        grads, model_state, sums = gradient(
            state.params, state.model_state, split, indices, step_key, frozen=state.frozen
        )

        # Reduce the gradients, weighted by the number of examples.
        grads, reduce_state = reduce.update(
            grads, state.reduce_state, state.params, weight=sums["examples"], key=reduce_key
        )
        model_state = agreed_state(model_state, state.model_state, sums["examples"])

        # Every replica takes the same step with the reduced gradient.
        state = state._replace(model_state=model_state, reduce_state=reduce_state)
        state = step(state, grads, value=partial(mean_objective, sums, over_replicas=True))
        sums = with_measurements(sums, state.opt_state)
        return state, jax.tree.map(lambda x: x[None], sums)

    return synchronous


def _as_only_replica(train_round: Round) -> Round:
    """Returns a round without collectives: each replica computes as if there were no others."""
    # The inner axis hides the outer one of the same name.
    alone = jax.vmap(train_round, in_axes=None, axis_name=replica.AXIS, axis_size=1)

    def round_alone(state: TrainState, split: Split, batches: StepIndices, key: Key[Array, ""]):
        # `vmap` knows that virtual replicas are equal if they take the examples of the first one.
        if is_vmapped():
            split, batches = jax.tree.map(
                lambda x: lax.all_gather(x, replica.AXIS)[0], (split, batches)
            )
        return jax.tree.map(lambda x: x.squeeze(0), alone(state, split, batches, key))

    return round_alone


def replicated_gradient(gradient: Gradient, per_host: int | None = None) -> Gradient:
    """Returns the gradient of the mean over the examples of a host, equal on all its replicas.

    The sums are those of the host, too. With a single replica, it is `gradient` without
    collectives. Batch statistics are synchronized only if all replicas are on one host.

    Args:
        gradient: Gradient function.
        per_host: Number of consecutive replicas on a host (default: all), as for a node with
            several devices.
    """

    def of_host(params, model_state, *arguments, **options):
        replicas = lax.axis_size(replica.AXIS)
        host = groups.hosts(per_host or replicas)
        alone = host.size == 1 or host.size < replicas
        grads, new_state, sums = gradient(params, model_state, *arguments, alone=alone, **options)
        if host.size == 1:
            return grads, new_state, sums
        examples = sums["examples"]
        return (
            replica.weighted_mean(grads, examples, host),
            agreed_state(new_state, model_state, examples, host),
            replica.add_up(sums, host),
        )

    return of_host


def make_local_steps(
    gradient: Gradient, optimizer: optax.GradientTransformationExtraArgs
) -> Callable[..., tuple[tuple[PyTree, PyTree, PyTree], StepSums]]:
    """Makes the local steps of a round, which use no collectives unless `gradient` does.

    Args:
        gradient: Gradient function.
        optimizer: Optimizer of every step, from `Strategy.local`.

    Returns:
        `local_steps(state, split, batches, key) -> ((params, model_state, opt_state), sums)`
    """

    def local_steps(state: TrainState, split: Split, batches: StepIndices, key: Key[Array, ""]):
        def local_step(carry, step_and_indices):
            params, model_state, opt_state = carry
            step, indices = step_and_indices
            grads, model_state, sums = gradient(
                params,
                model_state,
                split,
                indices,
                step_keys(key, step)[1],
                frozen=state.frozen,
            )
            value = partial(mean_objective, sums)
            updates, opt_state = optimizer.update(
                grads, opt_state, params, value=value, anchor=state.params
            )

            # Without examples in this step, the replica or its host remains unchanged.
            moved = (optax.apply_updates(params, updates), model_state, opt_state)
            return optax.tree.where(sums["examples"] > 0, moved, carry), with_measurements(
                sums, opt_state
            )

        steps = state.step + jnp.arange(len(batches))
        carry = (state.params, state.model_state, state.opt_state)
        return lax.scan(local_step, carry, (steps, batches))

    return local_steps


def _make_local(
    gradient: Gradient,
    optimizer: optax.GradientTransformationExtraArgs,
    strategy: Strategy,
    averaged: Callable[[TrainState], TrainState],
) -> Round:
    """Makes the local round: local steps, then an outer step with the reduced outer gradient.

    The outer gradient is the parameters before the local steps minus those after them. `averaged`
    updates the moving average of the parameters.
    """
    local_steps = make_local_steps(gradient, optimizer)
    reduce = optax.with_extra_args_support(strategy.reduce)

    def local(state: TrainState, split: Split, batches: StepIndices, key: Key[Array, ""]):
        # Take the local steps, starting from the parameters of the round.
        (params, model_state, opt_state), sums = local_steps(state, split, batches, key)

        # The replicas of a host have equal messages, of which only the first has a weight.
        sums = of_the_first(sums, strategy.per_host)
        examples = sums["examples"].sum()

        # Reduce the outer gradients, weighted by the number of examples in the round.
        outer_grads = optax.tree.sub(state.params, params)
        outer_grads, reduce_state = reduce.update(
            outer_grads,
            state.reduce_state,
            state.params,
            weight=examples,
            key=step_keys(key, state.step)[0],
        )

        # Take the outer step from the parameters at the start of the round. It is the same on all
        # replicas, unless the strategy diverges. The model state is merged over the replicas; each
        # replica keeps its optimizer state.
        value = partial(mean_objective, sums, over_replicas=True)
        moved = outer_step(strategy, state, outer_grads, value)
        moved = moved._replace(
            model_state=agreed_state(model_state, state.model_state, examples),
            opt_state=opt_state,
            reduce_state=reduce_state,
        )
        return averaged(moved), sums

    return local


def outer_step(
    strategy: Strategy, state: TrainState, outer_grads: PyTree, value: Value
) -> TrainState:
    """Applies a reduced outer gradient to the parameters at the start of the round.

    Args:
        strategy: Strategy of the round.
        state: State at the start of the round.
        outer_grads: The result of the reducer.
        value: Mean objective of the round over all replicas.
    """
    updates, outer_state = adapted(strategy.outer).update(
        outer_grads, state.outer_state, state.params, value=value
    )
    return state._replace(
        params=optax.apply_updates(state.params, updates), outer_state=outer_state
    )


def skipping(train_round: Round) -> Round:
    """Returns a round that all replicas skip if its result is not finite on one of them.

    A round is skipped if a finite number in the state becomes NaN or infinite on any replica, or if
    a loss is. It then changes only `step`, and its sums are zero.
    """

    def sound_round(state: TrainState, split: Split, batches: StepIndices, key: Key[Array, ""]):
        advanced, sums = train_round(state, split, batches, key)
        pair = advanced, state

        # Only numbers that were finite before are checked: some optimizers start with an infinity
        # in their state, such as the best value of `optax.contrib.reduce_on_plateau`.
        is_spoilt = jnp.zeros((), bool)
        # The factors of a low-rank change may be finite although their product is not.
        changed = [fine_tuning.low_rank_kernels(each.params, each.frozen) for each in pair]
        for new, old in zip(
            jax.tree.leaves((advanced, sums["loss"], changed[0])),
            jax.tree.leaves((state, 0.0, changed[1])),
            strict=True,
        ):
            if jnp.issubdtype(new.dtype, jnp.inexact):
                is_spoilt |= jnp.any(~jnp.isfinite(new) & jnp.isfinite(old))

        # All replicas skip the round together, or their shared parameters would differ.
        if lax.axis_size(replica.AXIS) > 1:
            is_spoilt = lax.pmax(is_spoilt.astype(jnp.int32), replica.AXIS) > 0
        kept = optax.tree.where(is_spoilt, state._replace(step=advanced.step), advanced)
        return kept, jax.tree.map(lambda x: jnp.where(is_spoilt, 0, x), sums)

    return sound_round


def make_rounds(train_round: Round, block_steps: int = 1) -> Rounds:
    """Makes a program that computes any range of rounds, so that one program serves a whole run.

    Args:
        train_round: Round, made by `make_round`.
        block_steps: Maximum number of steps in a block, an inner loop over rounds with a static
            trip count; there are no blocks if it is less than two rounds.
    """
    # Traced once, for its shapes and for both loops.
    train_round = jax.jit(train_round, inline=True)

    def train_rounds(state, split, batches, first, last, key):
        most, round_steps = batches.shape[:2]
        block = min(most, block_steps // round_steps)

        # Sums are collected in one array, float32[most, names, round_steps].
        _, shapes = jax.eval_shape(train_round, state, split, batches[0], key)
        names = list(shapes)

        def add_round(number, so_far):
            state, sums = so_far
            state, new_sums = train_round(state, split, batches[number], key)
            return state, sums.at[number].set(jnp.stack([new_sums[name] for name in names]))

        def add_block(number, so_far):
            start = first + number * block
            return lax.fori_loop(
                0, block, lambda place, so_far: add_round(start + place, so_far), so_far
            )

        # Whole blocks first, then the remaining rounds one by one; both trip counts are dynamic.
        so_far = (state, jnp.zeros((most, len(names), round_steps)))
        left = first
        if block > 1:
            blocks = (last - first) // block
            so_far = lax.fori_loop(0, blocks, add_block, so_far)
            left = first + blocks * block
        state, sums = lax.fori_loop(left, last, add_round, so_far)
        return state, dict(zip(names, sums.swapaxes(0, 1).reshape(len(names), -1), strict=True))

    return train_rounds


def parallel_rounds(
    gradient: Gradient,
    optimizer: optax.GradientTransformation,
    strategy: Strategy,
    devices: Sequence[jax.Device],
    split_axis: int | None,
    ema_decay: float | None = None,
    skip_nonfinite: bool = False,
) -> jax.stages.Wrapped:
    """Makes the program that computes several rounds on the devices; it donates the state.

    Its arguments are those of `Rounds`, with the batches of all replicas. Its sums are
    `float32[replicas, rounds * steps]`; `digests.make_digests` sums them over the replicas.

    Args:
        gradient: Gradient function, made by `make_gradient_for` for the same strategy.
        optimizer: Optimizer of every step.
        strategy: Strategy of the rounds.
        devices: Devices, with one replica on each.
        split_axis: None if every device holds the whole split, 0 if each holds one row of it.
        ema_decay: Decay per round of the moving average of the parameters; None for no average.
        skip_nonfinite: Whether all replicas skip a round that would make the state or the loss of
            any replica non-finite.
    """
    # On several devices, each of them would compute the gradient of all replicas.
    is_one = len(replica.distinct(devices)) == 1
    merges = is_one and replica.is_virtual(devices) and split_axis is None
    train_round = make_round(gradient, optimizer, strategy, ema_decay, merges)
    # Only on a GPU do dynamic trip counts cost time.
    block_steps = BLOCK_STEPS if devices[0].platform == "gpu" else 1
    return replica.parallel(
        make_rounds(skipping(train_round) if skip_nonfinite else train_round, block_steps),
        devices,
        in_axes=(axes(strategy), split_axis, 0, None, None, None),
        out_axes=(axes(strategy), 0),
        donate=(0,),
    )
