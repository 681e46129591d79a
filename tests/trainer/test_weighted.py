"""Sample weights multiply the losses in training, wherever the examples come from."""

from functools import partial

import jax
import numpy as np
import optax
import pytest
from sklearn.linear_model import LogisticRegression, Ridge

import ctde_jax as ctde
from ctde_jax import data, devices
from ctde_jax.errors import InputError

RNG = np.random.default_rng(0)
Y = np.arange(96) % 3
X = (RNG.normal(size=(96, 4)) + np.eye(3, 4)[Y]).astype(np.float32)
W = RNG.integers(0, 4, 96).astype(np.float32)
PLAIN = data.from_arrays(X, Y, X, Y)
WEIGHTED = data.from_arrays(X, Y, X, Y, weights=W)
MODEL = ctde.models.mlp([4, 3])


def train(dataset: data.Dataset, **options) -> ctde.Trained:
    arguments = {"optimizer": optax.sgd(0.5), "batch_size": 32, "steps": 7, "show": False}
    arguments |= {"devices": devices.start(4)}
    return ctde.fit(MODEL, dataset, **arguments | options)


def assert_close(one: ctde.Trained, other: ctde.Trained, rtol: float = 1e-5) -> None:
    jax.tree.map(
        partial(np.testing.assert_allclose, rtol=rtol, atol=1e-6), one.params, other.params
    )


def on_disk(folder):
    np.save(folder / "x.npy", X)
    return data.from_arrays(np.load(folder / "x.npy", mmap_mode="r"), Y, X, Y, weights=W)


def streamed(folder):
    order = data.deal(PLAIN.train, 1, 32, 0)

    def batches(epoch):
        for rows in order.draw(epoch)[:, 0]:
            yield X[rows], Y[rows], W[rows]

    return data.from_batches(batches, order.steps_per_epoch, X, Y)


@pytest.fixture(scope="module")
def whole():
    return train(WEIGHTED, devices=devices.start(1), log_every=1)


@pytest.fixture(scope="module")
def plain():
    return train(PLAIN, devices=devices.start(1), log_every=1)


def test_weights_change_the_training_and_not_the_reported_loss(whole, plain):
    assert whole.history[0]["loss"] == pytest.approx(plain.history[0]["loss"], rel=1e-6)
    assert whole.history[-2]["loss"] != pytest.approx(plain.history[-2]["loss"], rel=0.05)
    assert whole.evaluate(WEIGHTED.train) == whole.evaluate(PLAIN.train)
    assert dict(whole.plan)["weights"] == "0 to 3, 1.67708 on average"
    assert "weights" not in dict(plain.plan)


@pytest.mark.parametrize(
    ("source", "options"),
    [
        (lambda folder: WEIGHTED, {}),
        (lambda folder: WEIGHTED, {"accumulation_steps": 2}),
        (lambda folder: WEIGHTED, {"strategy": ctde.Strategy(exact=True)}),
        (on_disk, {}),
        (streamed, {}),
    ],
    ids=["memory", "accumulation", "exact", "disk", "stream"],
)
def test_result_does_not_depend_on_the_devices_or_the_source(source, options, whole, tmp_path):
    assert_close(train(source(tmp_path), **options), whole)


def test_partition_keeps_the_weights_of_its_examples(tmp_path):
    options = {"partition": data.partition.iid(Y, 4), "strategy": ctde.Strategy(inner_steps=2)}
    assert_close(train(WEIGHTED, **options), train(on_disk(tmp_path), **options))


def test_equal_weights_change_nothing(plain):
    assert_close(train(data.weighted(PLAIN, np.ones(96))), plain)


def test_class_weights_and_sample_weights_are_multiplied(whole):
    of_class = np.array([1.0, 2.0, 5.0])
    both = train(data.weighted(PLAIN, W / of_class[Y]), class_weights=of_class)
    assert_close(both, whole)


def test_value_of_an_optimizer_is_the_weighted_objective():
    """Keras: `sum(weight * loss) / batch_size`, with the reduction "sum_over_batch_size"."""

    def update(grads, state, params=None, *, value, **_):
        return jax.tree.map(jax.numpy.zeros_like, grads), value

    keeps_value = optax.GradientTransformationExtraArgs(lambda params: jax.numpy.float32(0), update)
    trained = train(WEIGHTED, optimizer=keeps_value, batch_size=96, steps=1)
    logits = np.asarray(trained.predict(X), np.float64)
    losses = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(96), Y]
    assert float(trained.opt_state) == pytest.approx((W * losses).sum() / 96, rel=1e-5)


def test_solution_of_scikit_learn_is_a_fixed_point():
    """At the optimum with `sample_weight`, a step with a large learning rate changes nothing."""
    solved = LogisticRegression(C=np.inf, tol=1e-10, max_iter=1000).fit(X, Y, sample_weight=W)
    kernel, bias = (each.astype(np.float32) for each in (solved.coef_.T, solved.intercept_))
    assert largest_step(WEIGHTED, kernel, bias) < 1e-4
    assert largest_step(PLAIN, kernel, bias) > 1e-2


def test_solution_of_ridge_is_a_fixed_point():
    targets = (X @ np.array([1.0, -2.0, 0.5, 3.0]) + RNG.normal(size=96)).astype(np.float32)
    solved = Ridge(alpha=0.0).fit(X.astype(float), targets, sample_weight=W)
    kernel, bias = np.float32(solved.coef_)[:, None], np.float32([solved.intercept_])
    task = ctde.Task(lambda outputs, labels: optax.squared_error(outputs[:, 0], labels))
    dataset = data.from_arrays(X, targets, X, targets, weights=W)
    assert largest_step(dataset, kernel, bias, task=task) < 1e-4


def largest_step(dataset, kernel, bias, **options) -> float:
    """Returns the largest change of a parameter by a step of gradient descent on 4 devices."""
    model = ctde.models.mlp([4, len(bias)])
    like = jax.tree.structure(jax.eval_shape(model.init, jax.random.key(0), X[:1])[0])
    arguments = {"batch_size": 96, "steps": 1, "devices": devices.start(4), "show": False}
    arguments |= {"init_from": jax.tree.unflatten(like, [bias, kernel]), **options}
    found = jax.tree.leaves(ctde.fit(model, dataset, optax.sgd(1.0), **arguments).params)
    return max(np.abs(new - old).max() for new, old in zip(found, [bias, kernel], strict=True))


def test_resumed_run_with_other_weights_is_refused(tmp_path):
    run = partial(train, run_dir=tmp_path, save_every=2)
    run(WEIGHTED)
    for other in (PLAIN, data.weighted(PLAIN, W[::-1])):
        with pytest.raises(InputError, match="weights of the training split"):
            run(other, steps=9)
