"""A round is one function for all strategies; here it is held against routes that know nothing of replicas."""

import re

import jax
import numpy as np
import optax
import pytest
from flax import nnx
from jax import numpy as jnp

from ctde_jax import models, replica, state
from ctde_jax.aggregate import Strategy
from ctde_jax.data import Split
from ctde_jax.round import make_round, make_rounds
from ctde_jax.tasks import classification

REPLICAS, FEATURES, CLASSES = 4, 5, 3
MODEL = models.mlp([FEATURES, 6, CLASSES])
OPTIMIZER = optax.sgd(0.05, momentum=0.9)
STRATEGIES = {
    "synchronous": Strategy(),
    "local sgd": Strategy(inner_steps=3),
    "diloco": Strategy(inner_steps=3, outer=optax.sgd(0.7, momentum=0.9, nesterov=True)),
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
    return (np.arange(REPLICAS * steps * per_replica, dtype=np.int32) % 40).reshape(REPLICAS, steps, per_replica)


def begin(model, strategy, key) -> state.TrainState:
    center = state.create(model, OPTIMIZER, strategy, jnp.zeros((1, FEATURES)), key)
    return state.stack(center, strategy, REPLICAS)


def under_vmap(function, strategy):
    """Runs per-replica code on the rows of a batch axis, where a forgotten reduction is an error."""
    axes = state.axes(strategy)
    return jax.jit(jax.vmap(function, in_axes=(axes, None, 0, None), out_axes=(axes, None), axis_name=replica.AXIS))


def assert_close(tree, other, rtol=1e-5, atol=1e-6):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), tree, other)


def mean_loss(params, split, indices):
    outputs, _ = MODEL.apply(params, {}, split.inputs[indices], None)
    return classification.loss(outputs, split.labels[indices]).mean()


@pytest.mark.parametrize("missing", [0, 3])
def test_synchronous_round_is_one_step_on_the_whole_batch(split, key, missing):
    """The gradient is that of the mean over all examples, also when replicas have unequal numbers of them."""
    strategy = STRATEGIES["synchronous"]
    batches = steps_of(strategy)
    batches.flat[:missing] = -1
    before = begin(MODEL, strategy, key)

    after, sums = under_vmap(make_round(MODEL, classification, OPTIMIZER, strategy), strategy)(
        before, split, batches, key
    )

    present = batches[batches >= 0]
    loss, grads = jax.value_and_grad(mean_loss)(before.params, split, present)
    updates, _ = OPTIMIZER.update(grads, OPTIMIZER.init(before.params))
    assert_close(after.params, optax.apply_updates(before.params, updates))
    np.testing.assert_allclose(sums["loss"] / sums["examples"], [loss], rtol=1e-5)
    assert sums["examples"] == len(present)


@pytest.mark.parametrize("name", ["local sgd", "diloco"])
def test_local_round_is_a_loop_on_each_replica_and_one_outer_step(split, key, name):
    strategy = STRATEGIES[name]
    batches = steps_of(strategy)
    before = begin(MODEL, strategy, key)

    after, _ = under_vmap(make_round(MODEL, classification, OPTIMIZER, strategy), strategy)(before, split, batches, key)

    ends = []
    for own_batches in batches:
        params, opt_state = before.params, OPTIMIZER.init(before.params)
        for indices in own_batches:
            updates, opt_state = OPTIMIZER.update(jax.grad(mean_loss)(params, split, indices), opt_state)
            params = optax.apply_updates(params, updates)
        ends.append(params)
    outer_grads = jax.tree.map(lambda p, *own: p - sum(own) / REPLICAS, before.params, *ends)
    updates, _ = strategy.outer.update(outer_grads, before.outer_state, before.params)
    assert_close(after.params, optax.apply_updates(before.params, updates))
    assert after.step == strategy.inner_steps


def test_one_inner_step_of_sgd_is_a_synchronous_step(split, key):
    """Averaging parameters after one step of plain SGD is averaging the gradients."""
    optimizer = optax.sgd(0.1)
    results = []
    for strategy in (Strategy(), Strategy(inner_steps=1)):
        center = state.create(MODEL, optimizer, strategy, jnp.zeros((1, FEATURES)), key)
        train_round = under_vmap(make_round(MODEL, classification, optimizer, strategy), strategy)
        batches = np.arange(8, dtype=np.int32).reshape(REPLICAS, 1, 2)
        results.append(train_round(state.stack(center, strategy, REPLICAS), split, batches, key)[0].params)
    assert_close(*results)


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("model", [MODEL, models.from_nnx(Noisy)], ids=["mlp", "noisy"])
def test_vmap_and_pmap_agree(split, key, name, model):
    """The same per-replica code, dropout and batch statistics included, on virtual and on real replicas."""
    strategy = STRATEGIES[name]
    devices = jax.devices()[:REPLICAS]
    train_round = make_round(model, classification, OPTIMIZER, strategy)
    axes = state.axes(strategy)
    before, batches = begin(model, strategy, key), steps_of(strategy, per_replica=8)

    virtual = under_vmap(train_round, strategy)(before, split, batches, key)
    on_devices = replica.parallel(train_round, devices, in_axes=(axes, None, 0, None), out_axes=(axes, None))
    real = on_devices(state.place(before, strategy, devices), split, batches, key)

    assert_close(virtual, real)


def test_forgotten_reduction_is_caught(split, key):
    """A reducer that does not reduce leaves the replicas with different parameters, which vmap refuses to return."""
    strategy = Strategy(reduce=optax.identity())
    train_round = under_vmap(make_round(MODEL, classification, OPTIMIZER, strategy), strategy)

    with pytest.raises(ValueError, match=r"mapped output .* but out_axes is None"):
        train_round(begin(MODEL, strategy, key), split, steps_of(strategy), key)


@pytest.mark.parametrize("name", STRATEGIES)
def test_round_without_examples_changes_nothing(split, key, name):
    strategy = STRATEGIES[name]
    train_round = under_vmap(make_round(MODEL, classification, OPTIMIZER, strategy), strategy)
    before, _ = train_round(begin(MODEL, strategy, key), split, steps_of(strategy), key)

    after, sums = train_round(before, split, np.full_like(steps_of(strategy), -1), key)

    jax.tree.map(np.testing.assert_array_equal, after, before)
    assert not any(np.any(total) for total in sums.values())


def test_replica_without_examples_does_not_count(split, key):
    """Two replicas with data and two without agree on what the two with data alone would have agreed on."""
    strategy = STRATEGIES["local sgd"]
    batches = steps_of(strategy)
    batches[2:] = -1
    train_round = make_round(MODEL, classification, OPTIMIZER, strategy)
    four = under_vmap(train_round, strategy)(begin(MODEL, strategy, key), split, batches, key)[0]

    center = state.create(MODEL, OPTIMIZER, strategy, jnp.zeros((1, FEATURES)), key)
    two = under_vmap(train_round, strategy)(state.stack(center, strategy, 2), split, batches[:2], key)[0]

    assert_close(four.params, two.params)


def test_dropout_differs_between_steps_and_replicas_and_repeats_with_the_key(split, key):
    strategy, model = STRATEGIES["synchronous"], models.from_nnx(Noisy)
    train_round = under_vmap(make_round(model, classification, OPTIMIZER, strategy), strategy)
    before = begin(model, strategy, key)
    same_examples = np.tile(np.arange(8, dtype=np.int32), (REPLICAS, 1, 1))

    def loss(state_, key_, batches=same_examples):
        return float(train_round(state_, split, batches, key_)[1]["loss"][0])

    assert loss(before, key) == loss(before, key)
    assert loss(before, key) != loss(before, jax.random.key(1))
    assert loss(before, key) != loss(before._replace(step=jnp.int32(1)), key)
    only = [np.where(np.arange(REPLICAS)[:, None, None] == r, same_examples, -1) for r in range(2)]
    assert loss(before, key, only[0]) != loss(before, key, only[1])


def test_model_state_is_averaged_over_the_replicas(split, key):
    strategy, model = STRATEGIES["synchronous"], models.from_nnx(Noisy)
    before, batches = begin(model, strategy, key), steps_of(strategy)

    after, _ = under_vmap(make_round(model, classification, OPTIMIZER, strategy), strategy)(before, split, batches, key)

    own = [model.apply(before.params, before.model_state, split.inputs[batch[0]], key)[1] for batch in batches]
    assert_close(after.model_state, jax.tree.map(lambda *x: sum(x) / REPLICAS, *own))


def test_several_rounds_in_one_are_as_many_rounds_one_by_one(split, key):
    strategy = STRATEGIES["local sgd"]
    train_round = make_round(MODEL, classification, OPTIMIZER, strategy)
    batches = np.stack([(steps_of(strategy) + shift) % 40 for shift in (0, 7, 11)], axis=1)  # [replica, round, ...]

    together, sums = under_vmap(make_rounds(train_round), strategy)(begin(MODEL, strategy, key), split, batches, key)
    one_by_one, losses = begin(MODEL, strategy, key), []
    for number in range(3):
        one_by_one, own_sums = under_vmap(train_round, strategy)(one_by_one, split, batches[:, number], key)
        losses.append(own_sums["loss"])

    assert_close(together, one_by_one)
    np.testing.assert_allclose(sums["loss"], np.concatenate(losses), rtol=1e-5)


@pytest.mark.parametrize("name", STRATEGIES)
def test_round_talks_once(split, key, name):
    """Message, weights and metrics go out in one collective, whatever the number of steps before it."""
    strategy, devices = STRATEGIES[name], jax.devices()[:REPLICAS]
    axes = state.axes(strategy)
    on_devices = replica.parallel(
        make_round(MODEL, classification, OPTIMIZER, strategy), devices, (axes, None, 0, None), (axes, None)
    )
    compiled = on_devices.lower(begin(MODEL, strategy, key), split, steps_of(strategy), key).compile()
    assert len(re.findall(r"\) all-\w+\(|\) collective-\w+\(", compiled.as_text())) == 1
