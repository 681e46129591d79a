"""Reports: closed forms of the numbers, reasons of missing ones, and a page without references."""

import base64
import io
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from math import isnan, log

import jax
import matplotlib.image
import numpy as np
import optax
import pytest

import ctde_jax as ctde
from ctde_jax import train
from ctde_jax.data import Split
from ctde_jax.errors import InputError
from ctde_jax.trainer import reports
from ctde_jax.trainer.reports import classes, estimate, make_report
from ctde_jax.trainer.reports.targets import measure_targets

CONFUSION = np.array([[5, 2, 0], [1, 6, 1], [0, 3, 4]])
LABELS = np.repeat(np.arange(3), CONFUSION.sum(axis=1))
PREDICTIONS = np.concatenate([np.repeat(np.arange(3), row) for row in CONFUSION])
NAMES = ("cat", "dog", "owl")
RNG = np.random.default_rng(0)


def logits_of(predictions: np.ndarray, count: int = 3) -> np.ndarray:
    """Returns logits with these predictions, each with the odds e^2 against every other class."""
    return 2 * np.eye(count, dtype=np.float32)[predictions]


def scores(examples: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns random logits, many of them equal, and labels."""
    drawn = RNG.integers(-2, 3, (examples, count)).astype(np.float32)
    return drawn, RNG.integers(count, size=examples)


def report_of(logits, labels, names=NAMES, inputs=None, plan=()):
    """Returns the report on a classifier with these outputs."""
    inputs = np.zeros((len(labels), 4), np.float32) if inputs is None else inputs
    history = [{"split": "test", "step": 7, "loss": 1.0, "accuracy": 0.5, "examples": 9}]
    split = Split(inputs, labels.astype(np.int32))
    return make_report(ctde.tasks.classification, logits, split, names, 7, history, plan)


@pytest.fixture(scope="module")
def trained():
    """A classifier of the digits, trained on four devices."""
    return ctde.fit(
        ctde.models.mlp([64, 10]),
        ctde.data.digits(),
        optax.adam(0.01),
        devices=ctde.devices.start(4),
        epochs=1,
        show=False,
    )


@pytest.fixture(scope="module")
def regression():
    """A model of two targets."""
    inputs = RNG.normal(size=(40, 3)).astype(np.float32)
    data = ctde.data.from_arrays(inputs, inputs[:, :2] * [1, -2] + 5)
    task = ctde.Task(lambda outputs, targets: optax.squared_error(outputs, targets).mean(axis=-1))
    model = ctde.models.mlp([3, 2])
    return ctde.fit(model, data, optax.sgd(0.1), task=task, steps=5, batch_size=8, show=False), data


# Numbers of a classifier.


def test_numbers_equal_the_closed_forms_of_a_confusion_matrix():
    found = classes.measure_classes(logits_of(PREDICTIONS), LABELS, NAMES)
    support = CONFUSION.sum(axis=1)
    precision = np.array([5 / 6, 6 / 11, 4 / 5])
    recall = np.array([5 / 7, 6 / 8, 4 / 7])
    f1 = 2 * precision * recall / (precision + recall)
    np.testing.assert_array_equal(found.confusion, CONFUSION)
    np.testing.assert_array_equal(found.support, support)
    for name, values in (("precision", precision), ("recall", recall), ("f1", f1)):
        np.testing.assert_allclose(getattr(found, name), values)
        assert found.metrics[f"macro_{name}"].value == pytest.approx(values.mean())
        weighted = (values * support).sum() / support.sum()
        assert found.metrics[f"weighted_{name}"].value == pytest.approx(weighted)
    assert found.metrics["accuracy"].value == 15 / 22

    # A correct example has the probability e^2 / (e^2 + 2), a wrong one 1 / (e^2 + 2).
    loss = log(np.e**2 + 2) - 2 * 15 / 22
    assert found.metrics["log_loss"].value == pytest.approx(loss)
    confidence = np.e**2 / (np.e**2 + 2)
    assert found.metrics["calibration_error"].value == pytest.approx(confidence - 15 / 22)
    assert found.notes == []


@pytest.mark.parametrize("count", [2, 3])
def test_auroc_is_the_fraction_of_pairs_in_the_right_order(count):
    logits, labels = scores(50, count)
    found = classes.measure_classes(logits, labels, NAMES[:count])
    probabilities = np.exp(classes.log_softmax(logits))
    expected = []
    for place in range(count):
        positive = probabilities[labels == place, place][:, None]
        negative = probabilities[labels != place, place][None]
        expected.append(np.mean((positive > negative) + (positive == negative) / 2))
    np.testing.assert_allclose(found.auroc, expected)
    assert found.metrics["auroc"].value == pytest.approx(np.mean(expected))
    if count == 2:
        assert expected[0] == pytest.approx(expected[1])


@pytest.mark.parametrize("count", [2, 3])
def test_average_precision_sums_precision_over_steps_of_recall(count):
    logits, labels = scores(50, count)
    found = classes.measure_classes(logits, labels, NAMES[:count])
    probabilities = np.exp(classes.log_softmax(logits))
    expected = []
    for place in range(count):
        is_positive = labels == place
        area, before = 0.0, 0.0
        for threshold in np.unique(probabilities[:, place])[::-1]:
            chosen = probabilities[:, place] >= threshold
            recall = is_positive[chosen].sum() / is_positive.sum()
            area += (recall - before) * is_positive[chosen].mean()
            before = recall
        expected.append(area)
    np.testing.assert_allclose(found.average_precision, expected)
    overall = expected[1] if count == 2 else np.mean(expected)
    assert found.metrics["average_precision"].value == pytest.approx(overall)


def test_calibration_is_the_mean_gap_over_bins():
    confidence = np.array([0.51, 0.52, 0.53, 0.91, 0.95, 1.0])
    is_correct = np.array([True, False, False, True, False, True])
    found = classes.calibrate(confidence, is_correct)
    # Bins of width 1/15: three examples from 7/15 to 8/15, one from 13/15, and two from 14/15.
    np.testing.assert_array_equal(np.flatnonzero(found.counts), [7, 13, 14])
    np.testing.assert_array_equal(found.counts[[7, 13, 14]], [3, 1, 2])
    np.testing.assert_allclose(found.confidence[[7, 13, 14]], [0.52, 0.91, 0.975])
    np.testing.assert_allclose(found.accuracy[[7, 13, 14]], [1 / 3, 1, 1 / 2])
    assert np.isnan(found.accuracy[found.counts == 0]).all()
    gaps = np.array([0.52 - 1 / 3, 0.09, 0.475])
    assert found.error == pytest.approx((gaps * [3, 1, 2]).sum() / 6)


# Intervals.


@pytest.mark.parametrize("count", [2, 4])
def test_metrics_of_weighted_examples_equal_those_of_repeated_ones(count):
    logits, labels = scores(60, count)
    probabilities = np.exp(classes.log_softmax(logits))
    counts = np.bincount(RNG.integers(60, size=60), minlength=60)
    rows = np.repeat(np.arange(60), counts)
    names = tuple("abcd"[:count])
    resample = classes._resampler(probabilities, labels, logits.argmax(axis=1))
    repeated = classes.measure_classes(logits[rows], labels[rows], names).metrics
    for name, value in resample(counts.astype(float)).items():
        assert value == pytest.approx(repeated[name].value), name


def test_interval_is_between_percentiles_of_resamples():
    is_correct = PREDICTIONS == LABELS
    rng = np.random.default_rng(estimate.SEED)
    means = [is_correct[rng.integers(22, size=22)].mean() for _ in range(estimate.RESAMPLES)]
    found = classes.measure_classes(logits_of(PREDICTIONS), LABELS, NAMES).metrics
    accuracy = found["accuracy"]
    np.testing.assert_allclose(accuracy[1:3], np.quantile(means, [0.025, 0.975]))
    assert {name for name in found if not isnan(found[name].low)} == {
        "accuracy",
        "macro_f1",
        "auroc",
    }


def test_equal_outputs_have_equal_intervals():
    logits, labels = scores(30, 3)
    one, two = (report_of(logits, labels).metrics for _ in range(2))
    assert repr(one) == repr(two)


def test_single_example_has_no_interval():
    report = report_of(logits_of(np.array([1])), np.array([1]))
    assert report.metrics["accuracy"].value == 1
    assert isnan(report.metrics["accuracy"].low)


def test_auroc_of_too_many_probabilities_has_no_interval(monkeypatch):
    monkeypatch.setattr(classes, "_MOST_SCORES", 10)
    found = classes.measure_classes(logits_of(PREDICTIONS), LABELS, NAMES)
    assert isnan(found.metrics["auroc"].low)
    assert not isnan(found.metrics["auroc"].value)
    assert found.notes == ["AUROC has no interval, because there are more than 10 probabilities."]


# Undefined values.


def test_class_without_examples_is_missing_and_not_in_the_macro_averages():
    labels = np.array([0, 0, 1, 1])
    found = classes.measure_classes(logits_of(np.array([0, 2, 1, 1])), labels, NAMES)
    for values in (found.recall, found.auroc, found.average_precision):
        np.testing.assert_array_equal(np.isnan(values), [False, False, True])
    assert found.precision[2] == 0
    assert found.metrics["macro_recall"].value == pytest.approx((1 / 2 + 1) / 2)
    assert found.notes == [
        "Recall, AUROC and average precision are undefined for classes without examples, and the "
        "macro averages do not include these classes: owl."
    ]


def test_class_without_examples_and_predictions_has_no_f1():
    found = classes.measure_classes(logits_of(np.array([0, 1])), np.array([0, 1]), NAMES)
    np.testing.assert_array_equal(np.isnan(found.f1), [False, False, True])
    assert found.metrics["macro_f1"].value == 1
    assert found.notes[-1] == (
        "F1 is undefined for classes that have no examples and are never predicted: owl."
    )


def test_class_that_is_never_predicted_has_no_precision():
    found = classes.measure_classes(logits_of(np.zeros(3, int)), np.arange(3), NAMES)
    np.testing.assert_array_equal(np.isnan(found.precision), [False, True, True])
    assert str(found.metrics["macro_precision"]) == (
        "undefined: no example is predicted as dog, owl"
    )
    assert isnan(found.metrics["weighted_precision"].value)
    assert found.metrics["macro_f1"].value == pytest.approx((1 / 2 + 0 + 0) / 3)
    assert found.notes == ["Precision is undefined for classes that are never predicted: dog, owl."]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_one_class_alone_has_no_ranking(count):
    logits = RNG.normal(size=(5, count)).astype(np.float32)
    metrics = classes.measure_classes(logits, np.zeros(5, int), NAMES[:count]).metrics
    for name in ("auroc", "average_precision"):
        assert str(metrics[name]) == "undefined: all examples have the class cat"


def test_undefined_values_are_named_in_text_and_page():
    report = report_of(logits_of(np.zeros(3, int)), np.arange(3))
    sentence = "Macro precision is undefined: no example is predicted as dog, owl."
    assert sentence in " ".join(str(report).split())
    assert sentence in report._repr_html_()
    assert re.search("dog +│ +\N{EN DASH} ", str(report))


# Targets.


def test_numbers_of_targets_equal_closed_forms():
    targets = RNG.normal(3, 2, (30, 2))
    predictions = targets + RNG.normal(0, 1, (30, 2))
    found = measure_targets(predictions, targets, 0.5)
    error = predictions - targets
    deviation = targets - targets.mean(axis=0)
    r2 = 1 - (error**2).sum(axis=0) / (deviation**2).sum(axis=0)
    for name, values in (
        ("mae", np.abs(error).mean(axis=0)),
        ("rmse", np.sqrt((error**2).mean(axis=0))),
        ("r2", r2),
    ):
        np.testing.assert_allclose(getattr(found, name), values)
        assert found.metrics[name].value == pytest.approx(values.mean())
        assert found.metrics[name].low < values.mean() < found.metrics[name].high
    assert found.metrics["loss"].value == 0.5


def test_targets_of_weighted_examples_equal_those_of_repeated_ones():
    targets, predictions = RNG.normal(1000, 1, (2, 40, 3))
    counts = np.bincount(RNG.integers(40, size=40), minlength=40)
    rows = np.repeat(np.arange(40), counts)
    repeated = measure_targets(predictions[rows], targets[rows], 0.0).metrics
    resample = reports.targets._resampler(predictions, targets)
    for name, value in resample(counts.astype(float)).items():
        assert value == pytest.approx(repeated[name].value), name


def test_constant_targets_have_no_r2():
    targets = np.stack([np.arange(4.0), np.ones(4)], axis=1)
    found = measure_targets(targets + 0.1, targets, 0.0)
    assert found.r2[0] == pytest.approx(1 - 0.04 / 5)
    assert isnan(found.r2[1])
    assert str(found.metrics["r2"]) == "undefined: the targets of output 1 are constant"
    alone = measure_targets(targets[:, 1:], targets[:, 1:], 0.0)
    assert str(alone.metrics["r2"]) == "undefined: the targets are constant"


def test_report_of_a_regression_equals_numpy(regression):
    trained, data = regression
    report = trained.report(data.test)
    error = trained.predict(data.test.inputs) - data.test.labels
    assert report.metrics["mae"].value == pytest.approx(np.abs(error).mean())
    assert report.metrics["loss"].value == pytest.approx(trained.evaluate(data.test)["loss"])
    assert report.worst[0].example == np.square(error).mean(axis=1).argmax()
    assert "Predictions of output 1 over targets" in report._repr_html_()
    assert repr(report).startswith("Report(8 examples, mae ")


def test_outputs_in_a_column_predict_labels_without_one():
    labels = RNG.normal(size=9).astype(np.float32)
    task = ctde.Task(lambda outputs, targets: optax.l2_loss(outputs[:, 0], targets))
    history = [{"split": "test", "step": 1, "loss": 1.0}]
    split = Split(np.zeros((9, 2), np.float32), labels)
    report = make_report(task, labels[:, None] + 1, split, (), 1, history, ())
    assert report.metrics["mae"].value == pytest.approx(1)


@pytest.fixture(scope="module")
def fit_briefly():
    """Trains a linear model on float inputs for one step."""
    x = RNG.normal(size=(40, 3)).astype(np.float32)
    options = {"batch_size": 8, "steps": 1, "show": False, "devices": jax.devices()[:1]}

    def fit(labels, task):
        data = ctde.data.from_arrays(x, labels(x))
        width = data.train.labels[0].size
        return ctde.fit(
            ctde.models.mlp([3, width]), data, optax.sgd(0.1), task=task, **options
        ), data

    return fit


def test_report_of_the_task_regression_has_its_averages(fit_briefly):
    trained, data = fit_briefly(lambda x: 100 + 20 * x[:, 0], "regression")
    report, averages = trained.report(data.test), trained.evaluate(data.test)
    for name in ("loss", "mae", "rmse", "r2"):
        assert report.metrics[name].value == pytest.approx(averages[name], rel=1e-4), name


def test_labels_of_a_multilabel_task_are_no_targets(fit_briefly):
    trained, data = fit_briefly(lambda x: (x > 0).astype(np.int32), "multilabel")
    with pytest.raises(InputError, match="must predict float targets in outputs of the same shape"):
        trained.report(data.test)


# Every example counts once, on any number of devices.


def test_report_equals_the_evaluation_on_one_and_four_devices(trained, digits):
    one = replace(trained, devices=jax.devices()[:1])
    report = trained.report(digits.test)
    assert repr(one.report(digits.test).metrics) == repr(report.metrics)
    assert report.numbers.confusion.sum() == report.examples == 359
    for model in (trained, one):
        averages = model.evaluate(digits.test)
        assert report.metrics["accuracy"].value == pytest.approx(averages["accuracy"])
        assert report.metrics["log_loss"].value == pytest.approx(averages["loss"], rel=1e-5)
    predictions = trained.predict(digits.test.inputs).argmax(axis=1)
    for row in range(10):
        for column in range(10):
            both = (digits.test.labels == row) & (predictions == column)
            assert report.numbers.confusion[row, column] == both.sum()


def test_worst_examples_have_the_highest_losses(trained, digits):
    report = trained.report(digits.test)
    logits = trained.predict(digits.test.inputs)
    losses = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(359), digits.test.labels]
    places = np.argsort(-losses)[: len(report.worst)]
    assert [example.example for example in report.worst] == places.tolist()
    first = report.worst[0]
    assert first.loss == pytest.approx(losses[places[0]], rel=1e-5)
    assert first.label == str(digits.test.labels[places[0]])
    assert first.prediction == str(logits[places[0]].argmax())
    assert first.probability == pytest.approx(
        float(jax.nn.softmax(logits[places[0]]).max()), rel=1e-5
    )
    np.testing.assert_array_equal(first.inputs, digits.test.inputs[places[0]])


def test_report_contains_the_plan_of_the_training(trained, digits):
    plan = dict(trained.report(digits.test).plan)
    assert plan["devices"] == "4 fake CPU devices"
    assert plan["data"] == "digits: 1,438 training and 359 test examples, 10 classes"
    assert plan["model"] == "650 parameters"


# Refusals.


def refusal(function, *arguments) -> str:
    with pytest.raises(InputError) as caught:
        function(*arguments)
    return str(caught.value)


def test_report_of_a_language_model_is_refused(trained, digits):
    model = replace(trained, task=ctde.tasks.language_modeling)
    assert refusal(model.report, digits.test) == (
        "task must predict classes or targets for a report, got a language model; "
        "trained.evaluate(split) returns its loss, bits per character and perplexity."
    )


def test_class_labels_of_a_task_without_logits_are_refused(trained, digits):
    task = ctde.Task(optax.softmax_cross_entropy_with_integer_labels)
    assert refusal(replace(trained, task=task).report, digits.test) == (
        "task must have predicts='classes' for a report on class labels, which states that "
        "outputs are logits, got predicts='anything'; pass Task(loss, metrics, predicts='classes')."
    )


def test_too_many_classes_are_refused(trained, digits):
    accepted = trained.accepts._replace(classes=tuple(map(str, range(5000))))
    assert refusal(replace(trained, accepts=accepted).report, digits.test) == (
        "trained must have at most 4,096 classes for a report, whose confusion matrix has a row "
        "and a column for each, got 5,000; use trained.evaluate(split)."
    )


@pytest.mark.parametrize(
    ("split", "sentence"),
    [
        (None, "split must be a Split, such as data.test or data.Split(inputs, labels), got "),
        (
            Split(np.zeros((2, 8, 8), np.uint8), np.zeros(1, int)),
            "split must have one label for each example, got 1 for 2.",
        ),
        (
            Split(np.zeros((0, 8, 8), np.uint8), np.zeros(0, int)),
            "split must have one label for each example, got 0 for 0.",
        ),
        (
            Split(np.zeros((1, 8, 8), np.uint8), np.full(1, 10)),
            "labels must be from 0 to 9, as in training, got numbers from 10 to 10.",
        ),
    ],
)
def test_invalid_split_is_refused(trained, split, sentence):
    assert refusal(trained.report, split).startswith(sentence)


def test_outputs_of_another_shape_than_the_targets_are_refused():
    task = ctde.Task(lambda outputs, targets: optax.squared_error(outputs[:, 0], targets))
    split = Split(np.zeros((4, 2), np.float32), np.zeros(4, np.float32))
    outputs = np.zeros((4, 2), np.float32)
    assert refusal(make_report, task, outputs, split, (), 1, [], ()) == (
        "task must predict float targets in outputs of the same shape for a report, got outputs "
        "float32[4, 2] for labels float32[4]; use trained.evaluate(split)."
    )


@pytest.mark.parametrize(
    ("loss", "labels", "end"),
    [
        # The logarithm of a Poisson rate, the logit of a probability, and a score of two classes.
        (lambda o, t: jax.numpy.exp(o) - t * o, [4.0, 1.0, 7.0], "0 is not higher at its label -2"),
        (optax.sigmoid_binary_cross_entropy, [0.0, 1.0, 1.0], "0 is not higher at its label -0.4"),
        (optax.hinge_loss, [-1.0, 1.0, 1.0], "0 is not higher at its label -0.9"),
    ],
)
def test_outputs_that_do_not_predict_labels_of_their_shape_are_refused(loss, labels, end):
    labels = np.array(labels, np.float32)
    split = Split(np.zeros((3, 2), np.float32), labels)
    sentence = refusal(make_report, ctde.Task(loss), labels, split, (), 1, [], ())
    assert sentence.startswith(
        "task must have a loss that is lowest if the outputs equal the labels for a report, which "
        f"regards them as predictions, but the loss of example {end}"
    )
    assert sentence.endswith("; use trained.evaluate(split).")


@pytest.mark.parametrize(
    "loss",
    [optax.squared_error, optax.huber_loss, optax.log_cosh, lambda o, t: abs(o - t) + (o < t)],
)
def test_losses_that_are_lowest_at_the_label_are_accepted(loss):
    labels = RNG.normal(100, 3, 20).astype(np.float32)
    split = Split(np.zeros((20, 2), np.float32), labels)
    history = [{"split": "test", "step": 1, "loss": 1.0}]
    report = make_report(ctde.Task(loss), labels + 1, split, (), 1, history, ())
    assert report.metrics["rmse"].value == pytest.approx(1, rel=1e-4)


def test_outputs_that_are_not_finite_are_refused():
    logits = logits_of(PREDICTIONS)
    logits[3, 1] = np.nan
    assert refusal(report_of, logits, LABELS) == (
        "trained must have finite outputs for a report, got NaN or infinity for example 3; lower "
        "the learning rate, and train again."
    )


def test_unwritable_file_is_refused(tmp_path):
    report = report_of(logits_of(PREDICTIONS), LABELS)
    path = tmp_path / "missing" / "report.html"
    assert refusal(report.save, path) == (
        f"path must be a writable file, but writing to {path} failed: No such file or directory."
    )


# Text and page.


class Checker(HTMLParser):
    """Checks that tags are nested, and collects tags, texts and the values of attributes."""

    VOID = ("meta", "img", "br", "hr", "link")

    def __init__(self, page: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.texts: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


SECTIONS = ["Metrics", "Confusion matrix", "Calibration", "Highest losses"]
SECTIONS += ["Curves", "Training", "Versions"]


@pytest.mark.curves
def test_page_is_well_formed_and_refers_to_nothing_outside(trained, digits, tmp_path):
    path = trained.report(digits.test).save(tmp_path / "report.html")
    text = path.read_text(encoding="utf-8")
    page = Checker(text)
    assert re.findall("<h2>(.*?)</h2>", text) == SECTIONS
    assert page.tags.count("svg") == 3
    assert page.tags.count("img") == 12
    references = [
        value
        for name, value in page.attributes
        if name.split(":")[-1] in ("src", "href", "srcset", "action", "data", "poster")
    ]
    assert references
    assert all(value.startswith(("data:image/png;base64,", "#")) for value in references)
    assert set(re.findall(r"url\((.)", text)) <= {"#"}
    assert not {"script", "link", "iframe", "object", "base"} & {*page.tags}
    assert "@import" not in text
    identifiers = [value for name, value in page.attributes if name == "id"]
    assert len(identifiers) == len(set(identifiers))


def test_page_has_the_numbers_of_the_report(trained, digits):
    report = trained.report(digits.test)
    page = Checker(report._repr_html_())
    for name in ("accuracy", "macro_f1", "auroc", "log_loss", "macro_precision"):
        assert f"{report.metrics[name].value:.4f}" in page.texts
    assert f"{report.metrics['accuracy'].low:.4f} to {report.metrics['accuracy'].high:.4f}" in (
        page.texts
    )
    for value in (ctde.__version__, jax.__version__, optax.__version__):
        assert value in page.texts
    assert "Report on digits" in page.texts


HOSTILE = ("<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "[bold red]& \x1b[31m")


def test_names_of_classes_are_text():
    """Neither markup in a page, nor markup or escape sequences in a terminal."""
    plan = (("data", f"{HOSTILE[0]}: 9 training and 9 test examples"),)
    report = report_of(logits_of(PREDICTIONS), LABELS, HOSTILE, plan=plan)
    page = Checker(report._repr_html_())
    assert not {"script", "img"} & {*page.tags}
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert {*HOSTILE} <= {*page.texts}
    assert "[bold red]& \\x1b[31m" in str(report)


def test_text_has_the_confusion_matrix_of_few_classes():
    text = str(report_of(logits_of(PREDICTIONS), LABELS))
    for name, counts in zip(("cat", "dog", "owl"), CONFUSION, strict=True):
        cells = " +│ +".join(map(str, counts))
        assert re.search(f"{name} +│ +{cells} ", text)


def test_confusion_matrix_is_shaded_by_the_fraction_of_the_row():
    text = report_of(logits_of(PREDICTIONS), LABELS)._repr_html_()
    for share, count in ((5 / 7, 5), (2 / 7, 2), (3 / 7, 3)):
        assert re.search(rf'style="--share: {share:.3f}">{count}</td>', text)
    assert '<th scope="row">owl</th><td class="none">0</td>' in text


def test_many_classes_have_a_list_of_confusions():
    names = tuple(f"kind {place}" for place in range(50))
    labels = np.repeat(np.arange(50), 3)
    predictions = labels.copy()
    predictions[:3] = 7
    predictions[3] = 8
    report = report_of(logits_of(predictions, 50), labels, names)
    text = report._repr_html_()
    assert '<th scope="row">kind 0</th><td>kind 7</td><td>3</td>' in text
    assert '<th scope="row">kind 1</th><td>kind 8</td><td>1</td>' in text
    assert "10 more rows are in the page; see report.save(path)." in str(report)


@pytest.mark.parametrize("shape", [(8, 6), (8, 6, 1), (8, 6, 3)])
def test_pictures_are_the_inputs(shape):
    inputs = RNG.integers(0, 17, (22, *shape)).astype(np.uint8)
    inputs[:, 0, 0], inputs[:, 0, 1] = 0, 16
    report = report_of(logits_of(PREDICTIONS), LABELS, inputs=inputs)
    sources = re.findall(r'src="data:image/png;base64,(.*?)"', report._repr_html_())
    for source, example in zip(sources, report.worst, strict=True):
        picture = matplotlib.image.imread(io.BytesIO(base64.b64decode(source)), format="png")
        expected = np.broadcast_to(example.inputs.reshape(8, 6, -1) / 16, (8, 6, 3))
        np.testing.assert_allclose(picture[..., :3], expected, atol=1 / 255)


def test_inputs_that_are_no_pictures_are_shown_as_numbers():
    inputs = np.arange(22 * 9, dtype=np.float32).reshape(22, 9) / 8
    report = report_of(logits_of(PREDICTIONS), LABELS, inputs=inputs)
    first = report.worst[0].example * 9 / 8
    assert f"<td>{first:.4g}, {first + 1 / 8:.4g}, " in report._repr_html_()
    assert ", … 9 in total</td>" in report._repr_html_()


def test_text_has_the_metrics_and_the_classes():
    text = str(report_of(logits_of(PREDICTIONS), LABELS))
    assert text.startswith("22 examples, parameters after 7 steps\n")
    assert re.search(r"accuracy +│ 0\.6818 │ 0\.\d{4} to 0\.\d{4}", text)
    assert re.search(r"dog +│ +0\.5455 │ 0\.7500 │ 0\.6316 │", text)
    assert "1,000 bootstrap resamples" in text


# The command.


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """The folder of a run with a report."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    options = ["--devices", "1", "--steps", "2", "--hidden-sizes", "8", "--report"]
    assert train.main([*options, "--run-dir", str(folder)]) == 0
    return folder


@pytest.mark.slow
def test_command_writes_the_report_with_its_plan(run_dir):
    page = Checker((run_dir / "report.html").read_text(encoding="utf-8"))
    assert "mlp 64-8-10 with tanh, f32, 610 parameters" in page.texts
    assert f"python -m ctde_jax.train --config {run_dir / 'config.json'}" in page.texts


def test_loaded_run_has_a_report(run_dir):
    trained, data, _ = ctde.load_run(run_dir)
    report = trained.report(data.test)
    assert report.metrics["accuracy"].value == pytest.approx(trained.tested["accuracy"])
    assert dict(report.plan)["model"] == "mlp 64-8-10 with tanh, f32"
    assert "Report on digits" in report._repr_html_()


def test_report_that_cannot_be_written_does_not_change_the_status(run_dir, capsys, monkeypatch):
    monkeypatch.setattr(reports.Report, "save", lambda report, path: 1 / 0)
    options = ["--devices", "1", "--steps", "2", "--hidden-sizes", "8", "--report"]
    assert train.main([*options, "--run-dir", str(run_dir)]) == 0
    path = run_dir / "report.html"
    assert f"could not write {path} (ZeroDivisionError: division by zero); nothing else" in (
        capsys.readouterr().out
    )


def test_command_refuses_the_report_of_a_text_before_training(tmp_path, capsys):
    options = ["--dataset", "text", "--data-file", "absent.txt", "--report"]
    assert train.main([*options, "--run-dir", str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err == (
        "error: --report requires --dataset digits or --dataset mnist or --dataset fashion_mnist "
        "or --dataset cifar10 or --dataset folder or --dataset npz or --dataset csv or --dataset "
        "parquet.\n"
    )
    assert not (tmp_path / "run").exists()


# The page in a browser.


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("needs chromium and chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    profile = tmp_path_factory.mktemp("chromium")
    for flag in ("--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with webdriver.Chrome(options, webdriver.ChromeService(driver)) as browser:
        yield browser


@pytest.mark.slow
@pytest.mark.curves
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [375, 1200])
def test_page_is_readable_in_a_browser(
    browser, trained, digits, regression, tmp_path, scheme, width
):
    """It does not scroll horizontally, and text is light on dark or dark on light."""
    feature = {"name": "prefers-color-scheme", "value": scheme}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    for model, data in ((trained, digits), regression):
        path = model.report(data.test).save(tmp_path / "report.html")
        browser.get(path.as_uri())
        script = "const { scrollWidth, clientWidth } = document.documentElement;"
        shown, visible = browser.execute_script(f"{script} return [scrollWidth, clientWidth]")
        assert shown == visible
        assert browser.get_log("browser") == []
        pictures = browser.find_elements("css selector", "img")
        assert all(each.get_property("naturalWidth") > 0 for each in pictures)
        ink, paper = (
            browser.execute_script(
                "return getComputedStyle(document.querySelector(arguments[0]))[arguments[1]]", *of
            )
            for of in ((".ctde-report", "color"), (".ctde-report section", "backgroundColor"))
        )
        dark = [sum(map(int, re.findall(r"\d+", color)[:3])) < 384 for color in (ink, paper)]
        assert dark == ([False, True] if scheme == "dark" else [True, False])
        label = browser.find_element("css selector", "figure svg text")
        assert label.value_of_css_property("fill") in (ink, ink.replace("rgb", "rgba"))
