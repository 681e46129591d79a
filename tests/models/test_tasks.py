"""Losses and metrics are one number for each example, and averages are exact."""

import jax
import numpy as np
import optax
import pytest
from jax import numpy as jnp
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import mean_absolute_error, r2_score, root_mean_squared_error
from sklearn.utils.class_weight import compute_class_weight

import ctde_jax as ctde
from ctde_jax.errors import InputError
from ctde_jax.models import tasks
from ctde_jax.models.tasks import Task


def test_language_modeling_weights_every_position_equally(key):
    logits, labels = jax.random.normal(key, (2, 3, 5)), jnp.array([[0, 1, 2], [4, 4, 0]])
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    of_labels = np.take_along_axis(probabilities, np.asarray(labels)[..., None], axis=-1)[..., 0]

    measured = tasks.language_modeling.measure(logits, labels)
    averages = tasks.language_modeling.averages(
        {name: values.sum() for name, values in measured.items()}, 2
    )

    np.testing.assert_allclose(measured["loss"], -np.log(of_labels).mean(axis=1), rtol=1e-5)
    np.testing.assert_allclose(
        measured["accuracy"], (np.argmax(logits, -1) == labels).mean(axis=1), rtol=1e-6
    )
    assert averages["loss"] == pytest.approx(-np.log(of_labels).mean(), rel=1e-5)
    assert averages["bits_per_character"] == pytest.approx(-np.log2(of_labels).mean(), rel=1e-5)
    assert averages["perplexity"] == pytest.approx(np.exp(-np.log(of_labels).mean()), rel=1e-5)


@pytest.mark.parametrize("shape", [(500, 7), (40, 9, 7)], ids=["classes", "tokens"])
def test_ties_resolve_to_the_lowest_index(shape, key):
    outputs = jax.random.randint(key, shape, 0, 4).astype(jnp.float32)  # with many ties
    labels = jax.random.randint(key, shape[:-1], 0, 7)

    expected = (np.asarray(outputs).argmax(-1) == labels).reshape(len(labels), -1).mean(axis=1)

    assert 0.1 < expected.mean() < 0.3
    np.testing.assert_allclose(tasks.is_correct(outputs, labels), expected, rtol=1e-6)


def test_outputs_with_nan_are_not_correct():
    outputs = jnp.array([[jnp.nan, 1.0], [1.0, jnp.nan], [jnp.nan, jnp.nan]])

    for label in (0, 1):
        assert not tasks.is_correct(outputs, jnp.full(3, label)).any()


def test_perplexity_of_a_huge_loss_is_finite():
    assert np.isfinite(
        tasks.language_modeling.averages({"loss": 1e30, "accuracy": 0.0}, 1)["perplexity"]
    )


@pytest.mark.parametrize("amount", [-0.1, 1.0])
def test_smoothing_out_of_range_is_refused(amount):
    with pytest.raises(
        InputError, match=f"label_smoothing must be at least 0 and less than 1, got {amount}"
    ):
        tasks.smoothed(tasks.classification, amount)


def test_smoothing_of_zero_returns_the_task():
    assert tasks.smoothed(tasks.classification, 0.0) is tasks.classification


@pytest.fixture(scope="module")
def imbalanced():
    """60, 30 and 10 examples of three overlapping classes; the test split is the same."""
    rng = np.random.default_rng(0)
    y = np.repeat([0, 1, 2], [60, 30, 10])
    x = rng.normal(size=(100, 4)).astype(np.float32) + np.eye(3, 4)[y].astype(np.float32)
    return ctde.data.from_arrays(x, y, x, y)


def log_probabilities(logits):
    logits = np.asarray(logits, np.float64)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def test_class_weights_are_those_of_keras(imbalanced, key):
    """Keras multiplies each loss by the weight of its class, and divides by the batch size.

    `keras.src.losses.loss.reduce_weighted_values`, with the reduction "sum_over_batch_size".
    """
    weights = np.array([0.5, 1.0, 4.0], np.float32)
    task = tasks.weighted(tasks.classification, weights, imbalanced)
    logits, labels = jax.random.normal(key, (100, 3)), imbalanced.train.labels
    losses = -log_probabilities(logits)[np.arange(100), labels]

    measured = task.measure(logits, labels)
    np.testing.assert_allclose(measured["loss"], losses, rtol=1e-5)
    assert float(task.minimized(logits, labels, measured).mean()) == pytest.approx(
        (weights[labels] * losses).sum() / 100, rel=1e-5
    )


def test_balanced_weights_are_those_of_scikit_learn(imbalanced):
    labels = imbalanced.train.labels
    expected = compute_class_weight("balanced", classes=np.arange(3), y=labels)
    task = tasks.weighted(tasks.classification, "balanced", imbalanced)
    # The loss of equal outputs is log(3) for each class.
    objective = task.objective(jnp.zeros((3, 3)), jnp.arange(3))
    np.testing.assert_allclose(objective, expected * np.log(3), rtol=1e-6)


def test_balanced_gradient_is_zero_at_the_solution_of_scikit_learn(imbalanced):
    x, y = imbalanced.train.inputs, imbalanced.train.labels
    solved = LogisticRegression(C=np.inf, class_weight="balanced", tol=1e-8).fit(x.astype(float), y)
    task = tasks.weighted(tasks.classification, "balanced", imbalanced)

    def mean_objective(params, task):
        logits = x @ params["kernel"] + params["bias"][None]
        return task.minimized(logits, y, task.measure(logits, y)).mean()

    params = {"kernel": jnp.float32(solved.coef_.T), "bias": jnp.float32(solved.intercept_)}
    grads, plain = (
        jax.tree.leaves(jax.grad(mean_objective)(params, each))
        for each in (task, tasks.classification)
    )
    assert max(np.abs(grad).max() for grad in grads) < 1e-5
    assert max(np.abs(grad).max() for grad in plain) > 0.1


def test_classes_without_training_examples_are_not_counted():
    y = np.array([0, 0, 0, 2])
    data = ctde.data.from_arrays(np.zeros((4, 1)), y, np.zeros((4, 1)), y)
    task = tasks.weighted(tasks.classification, "balanced", data)
    objective = task.objective(jnp.zeros((3, 3)), jnp.arange(3))
    np.testing.assert_allclose(objective / np.log(3), [4 / 6, 0, 4 / 2], rtol=1e-6)


@pytest.mark.parametrize(
    ("weights", "sentence"),
    [
        ([1, 2], "must be balanced, or 3 numbers, one for each class, got [1, 2]."),
        ("auto", "must be balanced, or 3 numbers, one for each class, got 'auto'."),
        ({0: 1, 1: 2}, "must be balanced, or 3 numbers, one for each class, got {0: 1, 1: 2}."),
        ([1, -1, 1], "must be finite, at least 0, and not all 0, got [1.0, -1.0, 1.0]."),
        ([1, np.inf, 1], "must be finite, at least 0, and not all 0, got [1.0, inf, 1.0]."),
        ([0, 0, 0], "must be finite, at least 0, and not all 0, got [0.0, 0.0, 0.0]."),
    ],
)
def test_invalid_class_weights_are_refused(imbalanced, weights, sentence):
    with pytest.raises(InputError) as caught:
        tasks.weighted(tasks.classification, weights, imbalanced)
    assert str(caught.value) == f"class_weights {sentence}"


def test_class_weights_need_classes_that_can_be_counted():
    x, y = np.zeros((8, 3), np.float32), np.arange(8) % 2
    targets = ctde.data.from_arrays(x, x[:, 0] + 0.5)
    with pytest.raises(InputError) as caught:
        tasks.weighted(tasks.classification, [1.0], targets)
    assert str(caught.value) == (
        "class_weights requires labels that are classes, one for each example; got labels of the "
        "dtype float32 and the shape [6]."
    )
    stream = ctde.data.from_batches(lambda epoch: [(x, y)], 1, x, y)
    with pytest.raises(InputError) as caught:
        tasks.weighted(tasks.classification, "balanced", stream)
    assert str(caught.value).startswith("class_weights requires a data set of arrays, but ")
    tasks.weighted(tasks.classification, [1.0, 2.0], stream)


@pytest.mark.slow
def test_weights_of_fit_are_those_of_the_task(imbalanced):
    """The reported loss is that of the unweighted examples."""
    model = ctde.models.mlp([4, 3])

    def fit(**options):
        return ctde.fit(
            model, imbalanced, optax.sgd(0.5), batch_size=100, steps=1, show=False, **options
        )

    of_task = fit(task=tasks.weighted(tasks.classification, "balanced", imbalanced))
    of_fit = fit(class_weights="balanced")
    jax.tree.map(np.testing.assert_array_equal, of_fit.params, of_task.params)
    losses = -log_probabilities(of_fit.predict(imbalanced.test.inputs))[
        np.arange(100), imbalanced.test.labels
    ]
    assert of_fit.tested["loss"] == pytest.approx(losses.mean(), rel=1e-5)


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("shape", [(20, 5), (4, 7, 5)], ids=["classes", "tokens"])
def test_focal_loss_is_that_of_the_paper(gamma, shape, key):
    """FL = -(1 - p) ** gamma * log(p) (Lin et al., 2017, equation 4)."""
    logits = 3 * jax.random.normal(key, shape)
    labels = jax.random.randint(key, shape[:-1], 0, 5)
    log_p = np.take_along_axis(
        log_probabilities(logits), np.asarray(labels)[..., None], axis=-1
    ).squeeze(-1)
    expected = -((1 - np.exp(log_p)) ** gamma) * log_p
    task = tasks.focal(tasks.classification if len(shape) == 2 else tasks.language_modeling, gamma)
    np.testing.assert_allclose(
        task.objective(logits, labels), expected.reshape(len(labels), -1).mean(axis=1), rtol=1e-4
    )
    assert task.loss is tasks.cross_entropy


def test_focal_loss_without_gamma_is_the_task():
    assert tasks.focal(tasks.classification, 0) is tasks.classification


@pytest.mark.parametrize("gamma", [0.5, 2.0])
def test_gradient_of_the_focal_loss_is_finite_for_certain_outputs(gamma):
    task = tasks.focal(tasks.classification, gamma)
    grad = jax.grad(lambda logits: task.objective(logits, jnp.array([0, 1])).sum())(
        jnp.array([[200.0, 0.0], [200.0, 0.0]])
    )
    np.testing.assert_allclose(grad, [[0, 0], [1, -1]], atol=1e-6)


@pytest.mark.parametrize("shape", [(20, 3), (4, 7, 3)], ids=["classes", "tokens"])
def test_calibrated_loss_is_that_of_bayes(shape, key):
    """With scores of `p(input | class)`, the probabilities are those of the node's classes."""
    scores = jax.random.normal(key, shape)
    labels = jax.random.randint(key, shape[:-1], 0, 3)
    prior = np.array([10, 1, 5]) / 16
    posterior = np.exp(np.asarray(scores)) * prior
    posterior /= posterior.sum(axis=-1, keepdims=True)
    chosen = np.take_along_axis(posterior, np.asarray(labels)[..., None], axis=-1)
    task = tasks.classification if len(shape) == 2 else tasks.language_modeling
    calibrated = tasks.calibrated(task, [9, 0, 4])
    np.testing.assert_allclose(
        calibrated.objective(scores, labels),
        -np.log(chosen).reshape(len(labels), -1).mean(axis=1),
        rtol=1e-4,
    )
    assert calibrated.loss is tasks.cross_entropy


def test_negative_counts_are_refused():
    with pytest.raises(InputError, match="counts must not be negative, got -1"):
        tasks.calibrated(tasks.classification, [3, -1])


def test_class_weights_multiply_the_focal_loss(imbalanced, key):
    focal = tasks.focal(tasks.classification, 2.0)
    task = tasks.weighted(focal, [1.0, 2.0, 3.0], imbalanced)
    logits, labels = jax.random.normal(key, (3, 3)), jnp.arange(3)
    np.testing.assert_allclose(
        task.objective(logits, labels), focal.objective(logits, labels) * jnp.arange(1, 4)
    )


@pytest.mark.parametrize("change", [tasks.focal, tasks.smoothed, tasks.calibrated])
def test_objective_is_not_replaced_silently(change, imbalanced):
    task = tasks.weighted(tasks.classification, "balanced", imbalanced)
    with pytest.raises(InputError) as caught:
        change(task, 0.5)
    assert str(caught.value) == (
        f"task must not have an objective yet, because {change.__name__} would replace it; pass "
        "tasks.classification or tasks.language_modeling, and apply weighted to the result."
    )


@pytest.mark.parametrize(
    ("task", "gamma", "sentence"),
    [
        (tasks.classification, -1.0, "focal_gamma must be at least 0 and finite, got -1.0."),
        (
            Task(lambda outputs, labels: outputs[:, 0]),
            2.0,
            "task must have the loss tasks.cross_entropy for the focal loss, such as "
            "tasks.classification, got another loss.",
        ),
    ],
)
def test_invalid_focal_loss_is_refused(task, gamma, sentence):
    with pytest.raises(InputError) as caught:
        tasks.focal(task, gamma)
    assert str(caught.value) == sentence


@pytest.mark.parametrize(
    ("task", "sentence"),
    [
        (
            tasks.Task(lambda outputs, labels: jnp.mean(outputs)),
            "must return one loss for each example",
        ),
        (
            tasks.Task(tasks.cross_entropy, {"step": tasks.is_correct}),
            "must not have a metric with a reserved name, got step; rename it",
        ),
        (
            tasks.Task(tasks.cross_entropy, lower_is_better=["mae"]),
            "must have only names of its metrics in lower_is_better, got mae",
        ),
        (
            tasks.Task(tasks.cross_entropy, derived={"loss": abs}),
            "must not have a metric with a reserved name, got loss; rename it",
        ),
    ],
)
def test_invalid_task_is_refused(task, sentence):
    with pytest.raises(InputError, match=sentence):
        task.measure(jnp.zeros((4, 3)), jnp.zeros(4, jnp.int32))


@pytest.mark.parametrize(
    ("name", "index"),
    [("loss", 1), ("perplexity", 1), ("accuracy", 2), ("error", 3), ("lost", None)],
)
def test_best_row_has_the_lowest_loss_or_the_highest_metric(name, index):
    task = tasks.language_modeling._replace(
        metrics={"accuracy": tasks.is_correct, "error": tasks.is_correct},
        lower_is_better=["error", "bits_per_character", "perplexity"],
    )
    columns = {
        "loss": [2, 1, 1, 3],
        "accuracy": [0.1, np.nan, 0.5, 0.5],
        "error": [np.nan, 3, 2, 1],
    }
    columns |= {"perplexity": np.exp(columns["loss"]), "lost": [np.nan] * 4}
    assert (
        task.best(
            name,
            [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)],
        )
        == index
    )


@pytest.mark.parametrize(
    ("task", "sentence"),
    [
        (
            Task(lambda outputs, labels: jnp.square(outputs - labels).mean(-1)),
            "^task must compute the loss of each example .* mixes the examples of outputs",
        ),
        (
            Task(lambda outputs, labels: outputs[:, 0], print),
            "must have metrics that map names to functions",
        ),
        (
            Task(lambda outputs, labels: outputs[:, 0], [print]),
            "must have metrics that map names to functions",
        ),
    ],
)
def test_loss_that_mixes_examples_and_metrics_without_names_are_refused(task, sentence):
    """Outputs `[n, 1]` minus labels `[n]` are `[n, n]`, whose mean has the right shape."""
    x, y = np.arange(20.0, dtype=np.float32).reshape(10, 2), np.arange(10.0, dtype=np.float32)
    dataset = ctde.data.from_arrays(x, y)
    with jax.numpy_rank_promotion("allow"), pytest.raises(ctde.InputError, match=sentence):
        ctde.fit(
            ctde.models.mlp([2, 1]),
            dataset,
            optax.sgd(0.1),
            task=task,
            batch_size=4,
            steps=1,
            show=False,
        )


@pytest.mark.parametrize("targets", [1, 3])
def test_metrics_of_regression_equal_those_of_scikit_learn(targets):
    """Also if the mean of the targets is a thousand standard deviations."""
    rng = np.random.default_rng(0)
    y = (rng.normal(size=(50, targets)) * [1, 10, 0.1][:targets] + 1000).astype(np.float32)
    train, test = (y[:30, 0], y[30:, 0]) if targets == 1 else (y[:30], y[30:])
    outputs = y[30:] + rng.normal(size=(20, targets)).astype(np.float32)

    task = tasks.regression(train)
    measured = task.measure(jnp.asarray(outputs), jnp.asarray(test))
    averages = task.averages({name: values.sum() for name, values in measured.items()}, 20)

    deviation = y[:30].std(axis=0, dtype=np.float64)
    assert averages == pytest.approx(
        {
            "loss": np.mean(((outputs - y[30:]) / deviation) ** 2),
            "mae": mean_absolute_error(y[30:], outputs),
            "rmse": root_mean_squared_error(y[30:], outputs),
            "r2": r2_score(y[30:], outputs),
        },
        rel=1e-4,
    )
    assert task.names == tuple(averages)


def test_r2_is_zero_if_targets_are_equal():
    task = tasks.regression(np.float32([1, 2, 6]))
    measured = task.measure(jnp.ones((4, 1)), jnp.full(4, 2.5))
    sums = {name: values.sum() for name, values in measured.items()}
    assert task.averages(sums, 4)["r2"] == 0


def test_lower_errors_and_a_higher_r2_are_better():
    task = tasks.regression(np.float32([1, 2, 6]))
    rows = [{"mae": 2.0, "rmse": 3.0, "r2": 0.5}, {"mae": 1.0, "rmse": 2.0, "r2": 0.7}]
    assert [task.best(name, rows) for name in ("mae", "rmse", "r2")] == [1, 1, 1]
    assert task.best("r2", rows[::-1]) == 0


@pytest.mark.parametrize(
    ("targets", "sentence"),
    [
        (
            np.arange(4),
            "task must be regression only if targets are floats of the shape [examples] or "
            "[examples, targets], got int64 [4]; pass y_train.astype('float32').",
        ),
        (
            np.ones((4, 2, 2)),
            "task must be regression only if targets are floats of the shape [examples] or "
            "[examples, targets], got float64 [4, 2, 2]; pass y_train.astype('float32').",
        ),
        (
            np.array([[1.0, 5], [2, 5]]),
            "task must have targets that vary, but target 1 of regression is 5 in all training "
            "examples; remove it.",
        ),
    ],
)
def test_unsuitable_targets_are_refused(targets, sentence):
    with pytest.raises(InputError) as caught:
        tasks.regression(targets)
    assert str(caught.value) == sentence


X = np.arange(20.0, dtype=np.float32).reshape(10, 2)


@pytest.mark.parametrize(
    ("data", "name", "sentence"),
    [
        (
            lambda: ctde.data.digits(),
            "regression",
            "task must not be regression for digits, whose labels are 10 classes; pass targets as "
            "floats.",
        ),
        (
            lambda: ctde.data.from_batches(lambda epoch: [(X, X[:, 0])] * 2, 2, X, X[:, 0]),
            "regression",
            "task must not be 'regression' if batches come from an iterable; pass "
            "tasks.regression(targets), with an array of training targets.",
        ),
        (
            lambda: ctde.data.digits(),
            "regresion",
            "task must be one of auto, classification, language_modeling, multilabel, regression, "
            "got 'regresion'; did you mean 'regression'?",
        ),
        (
            lambda: ctde.data.digits(),
            "multilabel",
            "task must be multilabel only if labels are 0 or 1, of the shape [examples, labels], "
            "got int32 [1438] from 0 to 9.",
        ),
        (
            lambda: ctde.data.from_arrays(X, X.astype(np.uint8)),
            "multilabel",
            "task must be multilabel only if labels are 0 or 1, of the shape [examples, labels], "
            "got int32 [8, 2] from 0 to 19.",
        ),
    ],
)
def test_unsuitable_name_of_a_task_is_refused(data, name, sentence):
    with pytest.raises(InputError) as caught:
        tasks.for_data(data(), name)
    assert str(caught.value) == sentence


def test_smoothing_of_regression_is_refused():
    with pytest.raises(
        InputError, match=r"^label_smoothing must be 0 if the task predicts no classes, got 0\.1\.$"
    ):
        tasks.smoothed(tasks.regression(np.float32([1, 2])), 0.1)


def test_metrics_of_several_labels_have_closed_forms():
    logits = np.float32([[2, -1, 0.5], [-3, -2, 0], [np.nan, 1, 1]])
    labels = np.int32([[1, 0, 0], [0, 0, 0], [1, 1, 1]])
    measured = tasks.multilabel.measure(jnp.asarray(logits), jnp.asarray(labels))
    probabilities = 1 / (1 + np.exp(-logits[:2]))
    likelihoods = np.where(labels[:2], probabilities, 1 - probabilities)
    np.testing.assert_allclose(measured["loss"][:2], -np.log(likelihoods).mean(1), rtol=1e-5)
    np.testing.assert_allclose(measured["accuracy"], [2 / 3, 1, 2 / 3], rtol=1e-6)
    np.testing.assert_array_equal(measured["exact_match"], [0, 1, 0])


@pytest.mark.slow
def test_several_labels_are_learned():
    inputs = np.random.default_rng(0).normal(size=(200, 3)).astype(np.float32)
    data = ctde.data.from_arrays(inputs, inputs > 0)
    trained = ctde.fit(
        ctde.models.mlp([3, 3]),
        data,
        optax.adam(0.1),
        task="multilabel",
        epochs=10,
        devices=ctde.devices.start(2),
        show=False,
    )
    assert trained.tested["exact_match"] > 0.8
    hits = (trained.predict(data.test.inputs) > 0) == data.test.labels
    assert trained.tested["exact_match"] == pytest.approx(hits.all(axis=1).mean())
