"""A round is one function for all strategies, and equals code without replicas."""

from functools import partial
from unittest.mock import Mock

import jax
import numpy as np
import optax
import pytest
from cases import some
from flax import nnx
from jax import lax
from jax import numpy as jnp
from virtual_replicas import FEATURES, OPTIMIZER, REPLICAS, initial_state, under_vmap

from ctde_jax import models
from ctde_jax.aggregate import (
    Strategy,
    error_feedback,
    gossip,
    proximal,
    quantize,
    sign,
    streaming,
    top_k,
    two_phase,
)
from ctde_jax.cost import collectives
from ctde_jax.data import Split
from ctde_jax.devices import replica
from ctde_jax.models import tasks
from ctde_jax.models.tasks import classification
from ctde_jax.rounds import round as round_module
from ctde_jax.rounds import state
from ctde_jax.rounds.gradient import make_gradient
from ctde_jax.rounds.round import make_round, make_rounds, parallel_rounds, skipping

CLASSES = 3
MODEL = models.mlp([FEATURES, 6, CLASSES])
STRATEGIES = {
    "synchronous": Strategy(),
    "local sgd": Strategy(inner_steps=3),
    "diloco": Strategy(
        inner_steps=3,
        outer=optax.chain(
            optax.add_decayed_weights(0.01), optax.sgd(0.7, momentum=0.9, nesterov=True)
        ),
    ),
    "int4": Strategy(reduce=two_phase(error_feedback(quantize(4)))),
    "sparse": Strategy(inner_steps=3, reduce=two_phase(error_feedback(top_k(8, 16, sign(8))))),
    "fedprox": Strategy(inner_steps=3, inner=proximal(0.5)),
    "gossip": Strategy(inner_steps=3, reduce=gossip("exponential"), diverges=True),
    "streaming": Strategy(inner_steps=3, reduce=streaming(2), diverges=True),
    "int8 across hosts": Strategy(reduce=two_phase(error_feedback(quantize(8)), per_host=2)),
    "by host": Strategy(inner_steps=3, per_host=2),
    "by host, int8 across": Strategy(
        inner_steps=3, reduce=two_phase(error_feedback(quantize(8)), per_host=2), per_host=2
    ),
}


class Noisy(nnx.Module):
    """Has dropout and batch statistics, so it needs keys and a model state."""

    def __init__(self, rngs: nnx.Rngs):
        self.first = nnx.Linear(FEATURES, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.last = nnx.Linear(8, CLASSES, rngs=rngs)

    def __call__(self, x):
        return self.last(self.dropout(self.norm(self.first(x))))


@pytest.fixture
def split() -> Split:
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(40, FEATURES)).astype(np.float32)
    return Split(jnp.asarray(inputs), jnp.asarray(rng.integers(0, CLASSES, 40), jnp.int32))


def steps_of(strategy: Strategy, per_replica: int = 2) -> np.ndarray:
    """One round's batches, `[replica, steps, per_replica]`."""
    steps = max(1, strategy.inner_steps)
    return (np.arange(REPLICAS * steps * per_replica, dtype=np.int32) % 40).reshape(
        REPLICAS, steps, per_replica
    )


def assert_close(tree, other, rtol=1e-5, atol=1e-6):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), tree, other)


def mean_loss(params, split, indices):
    outputs, _ = MODEL.apply(params, {}, split.inputs[indices], None)
    return classification.loss(outputs, split.labels[indices]).mean()


@pytest.mark.parametrize("missing", some([0, 3], 3))
def test_synchronous_round_is_one_step_on_the_whole_batch(split, key, missing):
    """The gradient is that of the mean over all examples, even if replicas have unequal numbers."""
    strategy = STRATEGIES["synchronous"]
    batches = steps_of(strategy)
    batches.flat[:missing] = -1
    before = initial_state(MODEL, strategy, key)

    after, sums = under_vmap(
        make_round(make_gradient(MODEL, classification), OPTIMIZER, strategy), strategy
    )(before, split, batches, key)

    present = batches[batches >= 0]
    loss, grads = jax.value_and_grad(mean_loss)(before.params, split, present)
    updates, _ = OPTIMIZER.update(grads, OPTIMIZER.init(before.params))
    assert_close(after.params, optax.apply_updates(before.params, updates))
    np.testing.assert_allclose(sums["loss"].sum() / sums["examples"].sum(), loss, rtol=1e-5)
    assert sums["examples"].sum() == len(present)


@pytest.mark.parametrize("name", some(["local sgd", "diloco"], "diloco"))
def test_local_round_equals_a_loop_on_each_replica_and_an_outer_step(split, key, name):
    """Two rounds, so that momentum matters; one replica lacks examples in part of the first."""
    strategy = STRATEGIES[name]
    # [round, replica, steps, per_replica]
    batches = np.stack([steps_of(strategy), (steps_of(strategy) + 5) % 40])
    batches[0, 1, 1:] = -1
    current = initial_state(MODEL, strategy, key)
    params, outer_state = current.params, current.outer_state
    opt_states = [OPTIMIZER.init(params)] * REPLICAS
    train_round = under_vmap(
        make_round(make_gradient(MODEL, classification), OPTIMIZER, strategy), strategy
    )

    for number in range(2):
        current, _ = train_round(current, split, batches[number], key)
        ends = []
        for index, replica_batches in enumerate(batches[number]):
            end = params
            for indices in replica_batches[replica_batches[:, 0] >= 0]:
                updates, opt_states[index] = OPTIMIZER.update(
                    jax.grad(mean_loss)(end, split, indices), opt_states[index]
                )
                end = optax.apply_updates(end, updates)
            ends.append(end)
        average = partial(np.average, axis=0, weights=(batches[number] >= 0).sum(axis=(1, 2)))
        outer_grads = optax.tree.sub(
            params, jax.tree.map(lambda *leaves, average=average: average(leaves), *ends)
        )
        updates, outer_state = strategy.outer.update(outer_grads, outer_state, params)
        params = optax.apply_updates(params, updates)

    assert_close(current.params, params)
    assert current.step == 2 * strategy.inner_steps


def test_reducer_state_is_kept_between_rounds(split, key):
    """A toy with error feedback: it sends half, and keeps the other half for the next round."""

    def update(updates, residual, params=None, *, weight, **extra_args):
        target = optax.tree.add(updates, residual)
        sent = optax.tree.scale(0.5, target)
        return replica.weighted_mean(sent, weight), optax.tree.sub(target, sent)

    toy = optax.GradientTransformationExtraArgs(optax.tree.zeros_like, update)
    strategy = Strategy(reduce=toy)
    without_learning = optax.sgd(
        0.0
    )  # parameters do not move, so every round has the same gradient
    center = current = initial_state(MODEL, strategy, key, without_learning)
    axes = state.axes(strategy)
    train_round = under_vmap(
        make_round(make_gradient(MODEL, classification), without_learning, strategy), strategy
    )
    batches = steps_of(strategy)

    for _ in range(2):
        current, _ = train_round(current, split, batches, key)

    assert axes.reduce_state == 0
    for index, replica_batches in enumerate(batches):
        grads = jax.grad(mean_loss)(center.params, split, replica_batches[0])
        # half of the gradient, then half of 1.5 times the gradient
        assert_close(
            jax.tree.map(lambda x, index=index: x[index], current.reduce_state),
            optax.tree.scale(0.75, grads),
        )


def test_one_inner_step_of_sgd_is_a_synchronous_step(split, key):
    """Averaging parameters after one step of plain SGD is averaging the gradients."""
    optimizer = optax.sgd(0.1)
    results = []
    for strategy in (Strategy(), Strategy(inner_steps=1)):
        train_round = under_vmap(
            make_round(make_gradient(MODEL, classification), optimizer, strategy), strategy
        )
        batches = np.arange(8, dtype=np.int32).reshape(REPLICAS, 1, 2)
        before = initial_state(MODEL, strategy, key, optimizer)
        results.append(train_round(before, split, batches, key)[0].params)
    assert_close(*results)


@pytest.mark.parametrize("name", some(STRATEGIES, "synchronous"))
def test_vmap_and_pmap_agree(split, key, name):
    """The same code, with dropout and batch statistics, on virtual and real replicas."""
    strategy, model = STRATEGIES[name], models.from_nnx(Noisy)
    devices = jax.devices()[:REPLICAS]
    train_round = make_round(make_gradient(model, classification), OPTIMIZER, strategy)
    axes = state.axes(strategy)
    before, batches = initial_state(model, strategy, key), steps_of(strategy, per_replica=8)

    virtual = under_vmap(train_round, strategy)(before, split, batches, key)
    on_devices = replica.parallel(
        train_round, devices, in_axes=(axes, None, 0, None), out_axes=(axes, 0)
    )
    center = model.init(key, jnp.zeros((1, FEATURES)))
    real = on_devices(state.place(*center, OPTIMIZER, strategy, devices), split, batches, key)

    assert_close(virtual, real)


def test_missing_reduction_is_an_error_under_vmap(split, key):
    """Without a reduction, parameters differ between replicas, and vmap refuses to return them."""
    strategy = Strategy(reduce=optax.identity())
    train_round = under_vmap(
        make_round(make_gradient(MODEL, classification), OPTIMIZER, strategy), strategy
    )

    with pytest.raises(ValueError, match=r"mapped output .* but out_axes is None"):
        train_round(initial_state(MODEL, strategy, key), split, steps_of(strategy), key)


def test_replica_without_examples_is_ignored(split, key):
    """Two replicas with data and two without give the same result as the two with data alone."""
    strategy = STRATEGIES["local sgd"]
    batches = steps_of(strategy)
    batches[2:] = -1
    train_round = make_round(make_gradient(MODEL, classification), OPTIMIZER, strategy)
    four = under_vmap(train_round, strategy)(
        initial_state(MODEL, strategy, key), split, batches, key
    )[0]

    two = under_vmap(train_round, strategy)(
        initial_state(MODEL, strategy, key, replicas=2), split, batches[:2], key
    )[0]

    assert_close(four.params, two.params)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["synchronous", "local sgd"])
def test_dropout_differs_between_steps_and_replicas_and_repeats_with_the_key(split, key, name):
    """With a learning rate of 0, the losses of equal batches differ only by their masks."""
    strategy, model, without_learning = STRATEGIES[name], models.from_nnx(Noisy), optax.sgd(0.0)
    train_round = under_vmap(
        make_round(make_gradient(model, classification), without_learning, strategy), strategy
    )
    before = initial_state(model, strategy, key, without_learning)
    same_examples = np.tile(
        np.arange(8, dtype=np.int32), (REPLICAS, max(1, strategy.inner_steps), 1)
    )

    def losses(state_, key_, batches=same_examples):
        return list(np.asarray(train_round(state_, split, batches, key_)[1]["loss"].sum(0)))

    assert losses(before, key) == losses(before, key)
    assert losses(before, key) != losses(before, jax.random.key(1))
    assert losses(before, key) != losses(before._replace(step=jnp.int32(7)), key)
    assert len(set(losses(before, key))) == same_examples.shape[1], (
        "every step must have different masks"
    )
    only = [np.where(np.arange(REPLICAS)[:, None, None] == r, same_examples, -1) for r in range(2)]
    assert losses(before, key, only[0]) != losses(before, key, only[1])


@pytest.mark.slow
def test_model_state_is_averaged_over_the_examples(split, key):
    """A replica with twice the examples counts twice in the batch statistics, too."""
    strategy, model = STRATEGIES["synchronous"], models.from_nnx(Noisy, "averaged")
    before, batches = initial_state(model, strategy, key), steps_of(strategy, per_replica=4)
    batches[1, 0, 2:] = ~batches[1, 0, :2]

    after, _ = under_vmap(
        make_round(make_gradient(model, classification), OPTIMIZER, strategy), strategy
    )(before, split, batches, key)

    rows = [row[0][row[0] >= 0] for row in batches]
    states = [
        model.apply(before.params, before.model_state, split.inputs[row], key)[1] for row in rows
    ]
    mean = jax.tree.map(lambda *x: np.average(x, axis=0, weights=[4, 2, 4, 4]), *states)
    assert_close(after.model_state, mean)


def test_padding_does_not_affect_the_parameters(key):
    """The gradient of the model is NaN at zero, and only example 0, the padding, is zero."""
    split = Split(jnp.ones((8, FEATURES)).at[0].set(0.0), jnp.zeros(8, jnp.int32))
    model = models.Model(
        MODEL.init,
        lambda p, s, x, k: MODEL.apply(p, s, x / jnp.linalg.norm(x, axis=1, keepdims=True), k),
    )
    strategy = STRATEGIES["local sgd"]
    batches = np.full((REPLICAS, 3, 2), ~0, np.int32)
    batches[0] = [[1, 2], [3, 4], [5, 6]]

    after, sums = under_vmap(
        make_round(make_gradient(model, classification), OPTIMIZER, strategy), strategy
    )(initial_state(model, strategy, key), split, batches, key)

    assert np.isfinite(sums["loss"]).all()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(after.params))


@pytest.mark.slow
@pytest.mark.parametrize("block", [1, 2], ids=["round by round", "in blocks"])
@pytest.mark.parametrize("name", STRATEGIES)
def test_program_of_several_rounds_equals_single_rounds(split, key, name, block):
    strategy = STRATEGIES[name]
    train_round = make_round(make_gradient(MODEL, classification), OPTIMIZER, strategy)
    # [replica, round, ...]
    batches = np.stack([(steps_of(strategy) + shift) % 40 for shift in (0, 7, 11, 3, 5)], axis=1)

    axes = state.axes(strategy)
    program = jax.vmap(
        make_rounds(train_round, block * max(1, strategy.inner_steps)),
        in_axes=(axes, None, 0, None, None, None),
        out_axes=(axes, 0),
        axis_name=replica.AXIS,
    )
    train_rounds, one_round = jax.jit(program), under_vmap(train_round, strategy)
    for first, last in [(0, 0), (2, 3), (0, 5), (1, 4)]:
        together, sums = train_rounds(
            initial_state(MODEL, strategy, key),
            split,
            batches,
            np.int32(first),
            np.int32(last),
            key,
        )
        one_by_one, losses = (
            initial_state(MODEL, strategy, key),
            np.zeros((REPLICAS, 5, max(1, strategy.inner_steps))),
        )
        for number in range(first, last):
            one_by_one, round_sums = one_round(one_by_one, split, batches[:, number], key)
            losses[:, number] = round_sums["loss"]

        assert_close(together, one_by_one)
        np.testing.assert_allclose(sums["loss"], losses.reshape(REPLICAS, -1), rtol=1e-5)


MEAN = ["all-reduce"]
TWO_PHASE = ["all-gather", "all-to-all"]
EXPECTED_COLLECTIVES = {
    "synchronous": MEAN,
    "local sgd": MEAN,
    "diloco": MEAN,
    "fedprox": MEAN,
    "int4": TWO_PHASE,
    "sparse": TWO_PHASE,
    "gossip": ["collective-permute"],  # with one of two neighbors
    "streaming": TWO_PHASE,
}


@pytest.mark.parametrize(
    "name", some(EXPECTED_COLLECTIVES, "synchronous", "diloco", "sparse", "gossip")
)
def test_round_communicates_once(split, key, name):
    """Message and weights share one collective, for any number of local steps."""
    strategy, devices = STRATEGIES[name], jax.devices()[:REPLICAS]
    axes = state.axes(strategy)
    on_devices = replica.parallel(
        make_round(make_gradient(MODEL, classification), OPTIMIZER, strategy),
        devices,
        (axes, None, 0, None),
        (axes, 0),
    )
    compiled = on_devices.lower(
        initial_state(MODEL, strategy, key), split, steps_of(strategy), key
    ).compile()
    found = collectives.read(compiled.as_text())
    assert sorted(one.op for one in found) == EXPECTED_COLLECTIVES[name]
    assert {one.times for one in found} == {1}, "the loop of the local steps must not contain any"


@pytest.mark.parametrize(
    "name",
    some(
        (name for name in STRATEGIES if not STRATEGIES[name].diverges),
        "int4",
    ),
)
def test_all_replicas_hold_the_same_bits_after_every_round(split, key, name):
    """Compares every device's copy of the shared state for two rounds."""
    strategy, devices = STRATEGIES[name], jax.devices()[:REPLICAS]
    all_copies = state.axes(strategy)._replace(params=0, outer_state=0, model_state=0)
    train_round = make_round(
        make_gradient(models.from_nnx(Noisy), classification), OPTIMIZER, strategy
    )
    run = replica.parallel(train_round, devices, (all_copies, None, 0, None), (all_copies, 0))
    center = models.from_nnx(Noisy).init(key, jnp.zeros((1, FEATURES)))
    batches = steps_of(strategy, per_replica=8)

    current = state.place(*center, OPTIMIZER, strategy, devices)
    shared = (current.params, current.outer_state, current.model_state)
    params, outer_state, model_state = jax.tree.map(
        lambda x: np.stack([x] * REPLICAS), jax.device_get(shared)
    )
    current = current._replace(params=params, outer_state=outer_state, model_state=model_state)
    for shift in (0, 7):
        current, _ = run(current, split, (batches + shift) % 40, key)

    for leaf in jax.tree.leaves(
        jax.device_get((current.params, current.outer_state, current.model_state))
    ):
        for copy in leaf[1:]:
            np.testing.assert_array_equal(copy, leaf[0])


@pytest.mark.parametrize("name", ["int4", "sparse", "gossip", "streaming"])
def test_restored_state_continues_with_the_same_bits(tmp_path, split, key, name):
    """A file of plain arrays holds the state, including residuals and pending fragments."""
    strategy = STRATEGIES[name]
    train_round = under_vmap(
        make_round(make_gradient(MODEL, classification), OPTIMIZER, strategy), strategy
    )
    batches = steps_of(strategy)
    current, _ = train_round(initial_state(MODEL, strategy, key), split, batches, key)

    leaves, structure = jax.tree.flatten(current)
    np.savez(tmp_path / "state.npz", *leaves)
    with np.load(tmp_path / "state.npz") as saved:
        restored = structure.unflatten([saved[file] for file in saved.files])

    again, _ = train_round(restored, split, (batches + 7) % 40, key)
    current, _ = train_round(current, split, (batches + 7) % 40, key)
    jax.tree.map(np.testing.assert_array_equal, again, current)


@pytest.mark.parametrize("name", ["synchronous", "diloco", "gossip"])
def test_ema_of_the_parameters_equals_its_closed_form(split, key, name):
    """After n rounds: d^n times the initial, (1 - d) d^(n - i) times the parameters of round i."""
    strategy, decay, rounds = STRATEGIES[name], 0.8, 5
    train_round = under_vmap(
        make_round(make_gradient(MODEL, classification), OPTIMIZER, strategy, decay), strategy
    )
    current = initial_state(MODEL, strategy, key, ema=True)
    expected = jax.tree.map(lambda p: decay**rounds * p, current.params)
    for number in range(rounds):
        current, _ = train_round(current, split, steps_of(strategy), key)
        weight = (1 - decay) * decay ** (rounds - 1 - number)
        expected = jax.tree.map(
            lambda e, p, weight=weight: e + weight * p, expected, current.params
        )
    assert_close(current.ema_params, expected)


def draw_uniform(keys: list[jax.Array]) -> np.ndarray:
    return np.array([jax.random.uniform(key) for key in keys])


def test_keys_of_local_steps_derive_from_the_step_number(split, key):
    """Compares two rounds with a loop that follows the rule in `gradient.py`; all keys differ."""
    strategy, per_replica = STRATEGIES["local sgd"], 2
    without_learning = optax.sgd(0.0)
    model = models.Model(
        lambda key, inputs: ({"shift": jnp.zeros(1)}, {}),
        lambda params, state, inputs, key: (
            jnp.stack([jnp.full(len(inputs), jax.random.uniform(key)), inputs[:, 0]], axis=1)
            + params["shift"][None],
            state,
        ),
    )
    task = tasks.Task(
        lambda outputs, labels: outputs[:, 0],
        {
            "mask": lambda outputs, labels: outputs[:, 0],
            "moved": lambda outputs, labels: outputs[:, 1],
        },
    )

    def augment(key, example):
        return jnp.full_like(example, jax.random.uniform(key))

    train_round = under_vmap(
        make_round(make_gradient(model, task, augment), without_learning, strategy), strategy
    )
    current, masks, moves = initial_state(model, strategy, key, without_learning), [], []
    batches = np.arange(REPLICAS * 3 * per_replica, dtype=np.int32).reshape(
        REPLICAS, 3, per_replica
    )
    for _ in range(2):
        current, sums = train_round(current, split, batches, key)
        masks.append(sums["mask"])
        moves.append(sums["moved"])

    for step in range(6):
        _, gradient_key = jax.random.split(jax.random.fold_in(key, step))
        augment_key, model_key = jax.random.split(gradient_key)
        for index in range(REPLICAS):
            shards = [index, index + REPLICAS]  # of 8, one example each
            drawn = draw_uniform([jax.random.fold_in(model_key, shard) for shard in shards])
            moved = draw_uniform(
                [jax.random.fold_in(augment_key, row) for row in batches[index, step % 3]]
            )
            np.testing.assert_allclose(masks[step // 3][index, step % 3], drawn.sum(), rtol=1e-6)
            np.testing.assert_allclose(moves[step // 3][index, step % 3], moved.sum(), rtol=1e-6)
    assert len(np.unique(np.stack(masks))) == 6 * REPLICAS
    assert len(np.unique(np.stack(moves))) == 6 * REPLICAS


class ConstantState(nnx.Module):
    """Has state of several dtypes that the module does not change, and counters."""

    def __init__(self, rngs: nnx.Rngs):
        self.last = nnx.Linear(FEATURES, CLASSES, rngs=rngs)
        self.frozen = nnx.BatchNorm(FEATURES, use_running_average=True, rngs=rngs)
        self.frozen.eval()
        odd = jnp.array([0.1, -0.0, 1e-42, jnp.inf, jnp.nan])
        self.constant, self.half = nnx.Variable(odd), nnx.Variable(odd.astype(jnp.bfloat16))
        self.complex = nnx.Variable(jnp.array([0.1 + 0.3j]))
        self.flag, self.size = (
            nnx.Variable(jnp.array([True, False])),
            nnx.Variable(jnp.array([-3, 7], jnp.int8)),
        )
        self.key = nnx.Variable(jax.random.key(5))
        self.steps, self.time = nnx.Variable(jnp.uint32(0)), nnx.Variable(jnp.float32(0))
        self.left = nnx.Variable(jnp.int32(100))

    def __call__(self, x):
        self.steps[...] += 1
        self.time[...] += 1
        self.left[...] -= 1
        return self.last(self.frozen(x, use_running_average=True)) + 0 * self.constant[0]


@pytest.mark.parametrize("name", ["synchronous", "local sgd"])
@pytest.mark.parametrize("replicas", some([1, 2, 3, 4, 8], 1, 3))
def test_constant_model_state_keeps_its_bits(split, key, name, replicas):
    """The last replica has fewer examples than the others; counters count steps."""
    strategy, model = STRATEGIES[name], models.from_nnx(ConstantState)
    axes, steps = state.axes(strategy), max(1, strategy.inner_steps)
    train_round = jax.jit(
        jax.vmap(
            make_round(make_gradient(model, classification), OPTIMIZER, strategy),
            in_axes=(axes, None, 0, None),
            out_axes=(
                axes._replace(params=0, model_state=0, opt_state=0, reduce_state=0, step=0),
                0,
            ),
            axis_name=replica.AXIS,
        )
    )
    before = initial_state(model, strategy, key, replicas=replicas)
    batches = np.broadcast_to(np.arange(5, dtype=np.int32), (replicas, steps, 5)).copy()
    batches[-1, :, 2:] = ~0
    after, _ = train_round(before, split, batches, key)

    written = {"steps": steps, "time": steps, "left": 100 - steps}
    for name, leaf in after.model_state.items():
        for index in range(replicas) if name != "frozen" else ():
            if name in written:
                assert leaf[index] == written[name]
            else:
                assert bits(leaf[index]) == bits(before.model_state[name])
    for name, leaf in after.model_state["frozen"].items():
        assert all(
            bits(leaf[index]) == bits(before.model_state["frozen"][name])
            for index in range(replicas)
        )


def bits(leaf: jax.Array) -> bytes:
    return np.asarray(
        jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
    ).tobytes()


@pytest.mark.parametrize("spoilt", [None, 0, 3])
def test_all_replicas_skip_a_round_that_is_not_finite_on_one(key, spoilt):
    start = initial_state(MODEL, STRATEGIES["synchronous"], key)

    def train_round(before, split, batches, key):
        bad = jnp.where(
            lax.axis_index(replica.AXIS) == (-1 if spoilt is None else spoilt), jnp.nan, 0
        )
        params = jax.tree.map(lambda x: x + 1 + bad, before.params)
        return before._replace(params=params, step=before.step + 1), {"loss": 1 + bad}

    skipping_round = jax.vmap(
        lambda state: skipping(train_round)(state, None, None, None),
        in_axes=None,
        axis_size=REPLICAS,
        axis_name=replica.AXIS,
    )
    after, sums = skipping_round(start)

    added, loss = (1, 1) if spoilt is None else (0, 0)
    np.testing.assert_array_equal(sums["loss"], np.full(REPLICAS, loss))
    np.testing.assert_array_equal(after.step, np.ones(REPLICAS))
    jax.tree.map(
        lambda x, y: np.testing.assert_array_equal(x, np.stack([y + added] * REPLICAS)),
        after.params,
        start.params,
    )


@pytest.mark.parametrize("inner_steps", [0, 1])
def test_reducer_and_gradient_draw_from_different_keys(key, inner_steps):
    def key_words(key):
        return jax.random.key_data(key).astype(jnp.float32)

    def gradient(params, model_state, split, indices, key, **rest):
        sums = {"loss": jnp.float32(0), "examples": jnp.float32(1)}
        return {"words": key_words(key)}, model_state, sums

    def update(message, state, params=None, *, key, **rest):
        return {"words": jnp.float32(message["words"] == key_words(key))}, state

    reduce = optax.GradientTransformationExtraArgs(lambda params: (), update)
    strategy = Strategy(inner_steps, reduce=reduce)
    model = models.Model(lambda key, inputs: ({"words": jnp.zeros(2)}, {}), MODEL.apply)
    start = initial_state(model, strategy, key, optax.sgd(1.0))
    train_round = make_round(gradient, optax.sgd(1.0), strategy)
    batches = np.zeros((REPLICAS, 1, 1), np.int32)
    after, _ = under_vmap(train_round, strategy)(start, None, batches, key)
    # The update is minus 1 for each word that is equal.
    assert after.params["words"].sum() > -2


@pytest.mark.parametrize(("platform", "block"), [("cpu", 1), ("tpu", 1), ("gpu", 16)])
def test_rounds_form_blocks_on_a_gpu_only(monkeypatch, platform, block):
    """A loop with a dynamic trip count costs time on a GPU alone."""
    blocks = []
    monkeypatch.setattr(round_module, "make_rounds", lambda _, steps: blocks.append(steps))
    monkeypatch.setattr(replica, "parallel", lambda *_, **__: None)
    devices = [Mock(platform=platform) for _ in range(2)]
    parallel_rounds(make_gradient(MODEL, classification), OPTIMIZER, Strategy(), devices, None)
    assert blocks == [block]
