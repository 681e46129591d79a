"""Gradients, dropout masks, batch statistics and augmentation on any number of devices."""

from functools import cache, partial

import jax
import numpy as np
import optax
import pytest
from flax import linen, nnx
from jax import numpy as jnp

from ctde_jax import models
from ctde_jax.data import Split, from_arrays
from ctde_jax.data.augment import shift
from ctde_jax.devices import replica
from ctde_jax.models import tasks
from ctde_jax.models.tasks import classification
from ctde_jax.rounds.gradient import Gradient, cut_into_shards, draws, make_gradient

FEATURES, CLASSES, BATCH = 5, 3, 16


class Noisy(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.first = nnx.Linear(FEATURES, 8, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.last = nnx.Linear(8, CLASSES, rngs=rngs)

    def __call__(self, x):
        return self.last(self.dropout(jnp.tanh(self.first(x.reshape(len(x), -1)))))


class Normed(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.first = nnx.Linear(FEATURES, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, momentum=0.9, rngs=rngs)
        self.last = nnx.Linear(8, CLASSES, rngs=rngs)

    def __call__(self, x):
        return self.last(jnp.tanh(self.norm(self.first(x))))


class LinenNormed(linen.Module):
    @linen.compact
    def __call__(self, x, train: bool):
        x = linen.BatchNorm(use_running_average=not train, momentum=0.9)(linen.Dense(8)(x))
        return linen.Dense(CLASSES)(jnp.tanh(x))


NOISY = models.from_nnx(Noisy)
GRADIENT_OF_NOISY = make_gradient(NOISY, classification)
NORMED = {
    "nnx": partial(models.from_nnx, Normed),
    "linen": partial(models.from_linen, LinenNormed()),
}


@pytest.fixture
def split() -> Split:
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(40, FEATURES)).astype(np.float32)
    return Split(jnp.asarray(inputs), jnp.asarray(rng.integers(0, CLASSES, 40), jnp.int32))


@pytest.mark.parametrize(
    ("model", "shape", "random"),
    [
        (NOISY, (2, FEATURES), True),
        (models.mlp([FEATURES, 4, CLASSES]), (2, FEATURES), False),
        (models.from_linen(LinenNormed()), (2, FEATURES), False),
        (models.from_linen(linen.Dropout(0.5)), (2, FEATURES), True),
        (
            models.rnn_classifier(1, CLASSES, hidden_size=4, dropout_rate=0.0),
            (2, FEATURES, 1),
            False,
        ),
        (
            models.rnn_classifier(1, CLASSES, hidden_size=4, dropout_rate=0.1),
            (2, FEATURES, 1),
            True,
        ),
    ],
    ids=["nnx dropout", "mlp", "linen", "linen dropout", "no dropout", "dropout"],
)
def test_model_draws_only_if_its_outputs_depend_on_the_key(model, shape, random):
    inputs = jax.ShapeDtypeStruct(shape, jnp.float32)
    params, model_state = jax.eval_shape(model.init, jax.eval_shape(jax.random.key, 0), inputs)
    assert draws(model, params, model_state, inputs) == random


def distribute(batch: np.ndarray, replicas: int) -> np.ndarray:
    """Distributes a global batch as the trainer does: `int32[replica, per_replica]`."""
    return batch.reshape(-1, replicas).T


@cache
def compiled(gradient: Gradient):
    def on_replica(params, model_state, split, indices, key):
        grads, model_state_, sums = gradient(params, model_state, split, indices, key)
        return replica.weighted_mean(grads, sums["examples"]), replica.weighted_mean(
            model_state_, sums["examples"]
        )

    return jax.jit(
        jax.vmap(on_replica, in_axes=(None, None, None, 0, None), axis_name=replica.AXIS)
    )


def on_replicas(gradient, params, model_state, split, indices, key):
    """Returns the mean gradient and the mean model state of virtual replicas."""
    returned = compiled(gradient)(params, model_state, split, indices, key)
    return jax.tree.map(lambda x: x[0], returned)


def assert_close(tree, other, rtol=1e-5, atol=1e-6):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), tree, other)


def differs(tree, other) -> bool:
    return any(
        not np.allclose(x, y, atol=1e-4)
        for x, y in zip(*map(jax.tree.leaves, (tree, other)), strict=True)
    )


@pytest.mark.slow
@pytest.mark.parametrize("replicas", [2, 4, 8])
def test_dropout_masks_do_not_depend_on_the_number_of_devices(split, key, replicas):
    params, model_state = NOISY.init(key, split.inputs[:1])
    gradient, batch = GRADIENT_OF_NOISY, np.arange(BATCH, dtype=np.int32)
    alone, _ = on_replicas(gradient, params, model_state, split, distribute(batch, 1), key)
    together, _ = on_replicas(
        gradient, params, model_state, split, distribute(batch, replicas), key
    )
    other_key, _ = on_replicas(
        gradient, params, model_state, split, distribute(batch, replicas), jax.random.key(1)
    )
    assert_close(together, alone)
    assert differs(other_key, alone)


@pytest.mark.parametrize("missing", [0, 3])
@pytest.mark.parametrize("accumulation_steps", [2, 4])
def test_accumulated_gradient_is_that_of_the_whole_batch(split, key, accumulation_steps, missing):
    """Also with dropout, and if the last microbatch has fewer examples."""
    params, model_state = NOISY.init(key, split.inputs[:1])
    batch = np.arange(BATCH, dtype=np.int32)
    batch[BATCH - missing :] = ~batch[0]
    arguments = (params, model_state, split, distribute(batch, 2), key)
    whole, _ = on_replicas(GRADIENT_OF_NOISY, *arguments)
    accumulated, _ = on_replicas(
        make_gradient(NOISY, classification, accumulation_steps=accumulation_steps), *arguments
    )
    assert_close(accumulated, whole, rtol=0, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("api", NORMED)
def test_synchronized_statistics_do_not_depend_on_the_number_of_devices(split, key, api):
    model = NORMED[api]("synchronized")
    params, model_state = model.init(key, split.inputs[:1])
    gradient, batch = make_gradient(model, classification), np.arange(BATCH, dtype=np.int32)

    def mean_loss(params):
        outputs, after = model.apply(params, model_state, split.inputs[:BATCH], key)
        return classification.loss(outputs, split.labels[:BATCH]).mean(), after

    grads, after = jax.grad(mean_loss, has_aux=True)(params)
    for replicas in (1, 4):
        assert_close(
            on_replicas(gradient, params, model_state, split, distribute(batch, replicas), key),
            (grads, after),
        )


@pytest.mark.parametrize("api", NORMED)
def test_averaged_statistics_are_means_over_devices(split, key, api):
    model = NORMED[api]("averaged")
    params, model_state = model.init(key, split.inputs[:1])
    gradient, indices = (
        make_gradient(model, classification),
        distribute(np.arange(BATCH, dtype=np.int32), 4),
    )
    states = [model.apply(params, model_state, split.inputs[rows], key)[1] for rows in indices]
    mean = jax.tree.map(lambda *x: np.mean(x, axis=0), *states)
    assert_close(on_replicas(gradient, params, model_state, split, indices, key)[1], mean)


def test_microbatch_without_examples_keeps_the_state_of_its_replica(split, key):
    """The state counts microbatches; only on the first replica, the second one has no examples."""
    linear = models.mlp([FEATURES, CLASSES])
    counting = models.Model(
        lambda key, inputs: (linear.init(key, inputs)[0], {"microbatches": jnp.int32(0)}),
        lambda params, state, inputs, key, mask=None: (
            linear.apply(params, {}, inputs, key)[0],
            {"microbatches": state["microbatches"] + 1},
        ),
    )
    gradient = make_gradient(counting, classification, accumulation_steps=2)
    indices = np.array([[0, ~0, 1, ~1], [2, 3, 4, 5]], np.int32)
    run = jax.jit(jax.vmap(gradient, in_axes=(None, None, None, 0, None), axis_name=replica.AXIS))
    _, model_state, sums = run(*counting.init(key, split.inputs[:1]), split, indices, key)
    np.testing.assert_array_equal(model_state["microbatches"], [1, 2])
    np.testing.assert_array_equal(sums["examples"], [2, 4])


@pytest.mark.slow
def test_augmentation_depends_on_the_example_and_not_on_its_position(key):
    """With one bright corner, the gradient of a linear model shows how each image was shifted."""
    images = jnp.zeros((40, 4, 4)).at[:, 0, 0].set(1.0)
    split = Split(images, jnp.zeros(40, jnp.int32))
    model = models.mlp([16, CLASSES])
    params, model_state = model.init(key, images[:1])
    gradient, batch = (
        make_gradient(model, classification, shift(1)),
        np.arange(BATCH, dtype=np.int32),
    )
    whole, _ = on_replicas(gradient, params, model_state, split, distribute(batch, 1), key)
    other_order, _ = on_replicas(
        gradient, params, model_state, split, distribute(batch[::-1].copy(), 4), key
    )
    plain, _ = on_replicas(
        make_gradient(model, classification), params, model_state, split, distribute(batch, 1), key
    )
    assert_close(other_order, whole)
    assert differs(whole, plain)


@pytest.mark.slow
def test_label_smoothing_changes_the_gradient_and_not_the_reported_loss(split, key):
    model, task = models.mlp([FEATURES, CLASSES]), tasks.smoothed(classification, 0.3)
    params, model_state = model.init(key, split.inputs[:1])
    batch = np.arange(BATCH, dtype=np.int32)

    def mean_loss(params):
        outputs, _ = model.apply(params, model_state, split.inputs[:BATCH], None)
        labels = optax.smooth_labels(jax.nn.one_hot(split.labels[:BATCH], CLASSES), 0.3)
        return optax.softmax_cross_entropy(outputs, labels).mean()

    grads, _ = on_replicas(
        make_gradient(model, task), params, model_state, split, distribute(batch, 2), key
    )
    assert_close(grads, jax.grad(mean_loss)(params))
    outputs, _ = model.apply(params, model_state, split.inputs, None)
    np.testing.assert_array_equal(
        task.measure(outputs, split.labels)["loss"], classification.loss(outputs, split.labels)
    )


@pytest.mark.parametrize("replicas", [1, 4])
def test_gradient_of_class_weights_is_that_of_the_whole_batch(split, key, replicas):
    """Replicas divide by their numbers of examples, not by their sums of weights."""
    weights = np.array([0.2, 1.0, 5.0], np.float32)
    data = from_arrays(split.inputs, split.labels, classes=("a", "b", "c"))
    task = tasks.weighted(classification, weights, data)
    model = models.mlp([FEATURES, CLASSES])
    params, model_state = model.init(key, split.inputs[:1])
    inputs, labels = split.inputs[:BATCH], split.labels[:BATCH]

    def objective(params):
        outputs, _ = model.apply(params, model_state, inputs, None)
        return (weights[labels] * classification.loss(outputs, labels)).sum() / BATCH

    indices = distribute(np.arange(BATCH, dtype=np.int32), replicas)
    grads, _ = on_replicas(make_gradient(model, task), params, model_state, split, indices, key)
    assert_close(grads, jax.grad(objective)(params))


@pytest.mark.parametrize(
    ("replicas", "examples", "groups", "wanted", "shards"),
    [
        (1, 8, 1, 8, 8),
        (2, 8, 1, 8, 8),
        (4, 8, 2, 8, 8),
        # More than wanted, as all replicas and groups get equally many shards.
        (3, 8, 1, 8, 24),
        (4, 16, 4, 8, 16),
        # The batch cannot be cut into the least common multiple.
        (4, 3, 1, 8, 4),
        (3, 4, 2, 8, 6),
        (1, 3, 3, 1, 3),
    ],
)
def test_batch_is_cut_into_shards_of_equal_size(replicas, examples, groups, wanted, shards):
    """Each example is in one shard, and each shard on one replica, in the order of its number."""
    indices = np.arange(replicas * examples, dtype=np.int32).reshape(replicas, examples)
    cut, numbers = jax.vmap(
        lambda own: cut_into_shards(own, groups, wanted), axis_name=replica.AXIS
    )(indices)

    per_shard = replicas * examples // shards
    assert cut.shape == (replicas, groups, shards // replicas // groups, per_shard)
    np.testing.assert_array_equal(np.sort(cut.ravel()), indices.ravel())
    np.testing.assert_array_equal(np.sort(numbers.ravel()), np.arange(shards))
    for own, own_numbers, own_examples in zip(cut, numbers, indices, strict=True):
        assert {*own.ravel().tolist()} == {*own_examples.tolist()}
        assert (np.diff(own_numbers.ravel()) > 0).all()
        assert {*(own_numbers.ravel() % replicas).tolist()} == {int(own_numbers[0, 0]) % replicas}
