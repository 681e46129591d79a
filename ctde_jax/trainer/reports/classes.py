"""Metrics of a classifier: confusion matrix, precision and recall, ranking, calibration."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import nan
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from ctde_jax.trainer.reports.estimate import Estimate, name_some, with_intervals

BINS = 15
"""Number of bins of equal width for the confidence, as in Guo et al. (2017)."""

_MOST_SCORES = 2**20
"""Maximum number of probabilities for which the AUROC of the resamples is computed."""


@dataclass(frozen=True)
class Calibration:
    """A reliability diagram: confidence and accuracy by bin (Guo et al., 2017).

    The confidence is the probability of the predicted class. Bin `b` has the confidences in
    `(b / bins, (b + 1) / bins]`. Means over an empty bin are NaN.
    """

    counts: Int[np.ndarray, " bins"]
    """Number of examples."""

    confidence: Float[np.ndarray, " bins"]
    """Mean confidence."""

    accuracy: Float[np.ndarray, " bins"]
    """Fraction of correct predictions."""

    @property
    def error(self) -> float:
        """Expected calibration error: mean of |accuracy - confidence| over all examples."""
        filled = self.counts > 0
        gaps = np.abs(self.accuracy - self.confidence)[filled]
        return float(np.average(gaps, weights=self.counts[filled]))


@dataclass(frozen=True)
class ClassMetrics:
    """Metrics of a classifier, over all examples of a split and for each class.

    Values for a class are NaN if they are undefined: the precision of a class that is never
    predicted, the recall of a class without examples, the F1 of a class with neither, and AUROC and
    average precision of a class that no example has, or all. Macro averages are over the classes
    that have examples.
    """

    classes: tuple[str, ...]
    """Names of the classes."""

    metrics: Mapping[str, Estimate]
    """Estimates by name.

    `accuracy`, `macro_f1` and `auroc` have intervals. `auroc` is the macro average of one class
    against the rest, which for two classes is the usual AUROC. `average_precision` is that of the
    second of two classes, or else the macro average.
    """

    confusion: Int[np.ndarray, "classes classes"]
    """Number of examples by class (row) and predicted class (column)."""

    precision: Float[np.ndarray, " classes"]
    """Fraction of the examples predicted as the class that have it."""

    recall: Float[np.ndarray, " classes"]
    """Fraction of the examples of the class that are predicted as it."""

    f1: Float[np.ndarray, " classes"]
    """Harmonic mean of precision and recall."""

    auroc: Float[np.ndarray, " classes"]
    """Area under the ROC curve of the class against the rest."""

    average_precision: Float[np.ndarray, " classes"]
    """Mean precision over the steps of recall, of the class against the rest."""

    calibration: Calibration
    """The reliability diagram of the predicted classes."""

    @property
    def support(self) -> Int[np.ndarray, " classes"]:
        """Number of examples of each class."""
        return self.confusion.sum(axis=1)

    @property
    def notes(self) -> list[str]:
        """Sentences on undefined values, and on intervals that were not computed."""
        absent = self.support == 0
        never = self.confusion.sum(axis=0) == 0
        notes = []
        if absent.any():
            notes.append(
                "Recall, AUROC and average precision are undefined for classes without examples, "
                "and the macro averages do not include these classes: "
                f"{self._names(absent)}."
            )
        if never.any():
            notes.append(
                "Precision is undefined for classes that are never predicted: "
                f"{self._names(never)}."
            )
        if (absent & never).any():
            notes.append(
                "F1 is undefined for classes that have no examples and are never predicted: "
                f"{self._names(absent & never)}."
            )
        if self.support.sum() * len(self.classes) > _MOST_SCORES:
            notes.append(
                f"AUROC has no interval, because there are more than {_MOST_SCORES:,} "
                "probabilities."
            )
        return notes

    def _names(self, mask: np.ndarray) -> str:
        return name_some([self.classes[place] for place in np.flatnonzero(mask)])


def measure_classes(
    logits: Float[np.ndarray, "examples classes"],
    labels: Int[np.ndarray, " examples"],
    classes: tuple[str, ...],
) -> ClassMetrics:
    """Computes the metrics of a classifier.

    Args:
        logits: Finite outputs of the model.
        labels: Indices of the classes.
        classes: Names of the classes.
    """
    # Imported here, as the import takes a second.
    from sklearn.metrics import precision_recall_fscore_support

    log_probabilities = log_softmax(logits)
    probabilities = np.exp(log_probabilities)
    # As in `tasks.is_correct`, ties resolve to the lowest index.
    predictions = logits.argmax(axis=1)
    undefined: Any = nan  # the annotation in scikit-learn lacks numbers
    precision, recall, f1, support = map(
        np.asarray,
        precision_recall_fscore_support(
            labels, predictions, labels=np.arange(len(classes)), zero_division=undefined
        ),
    )
    auroc, average_precision = _rank(probabilities, labels)
    # One number for each pair of class and predicted class, in int64.
    pairs = labels.astype(np.int64) * len(classes) + predictions
    is_correct = predictions == labels
    calibration = calibrate(probabilities.max(axis=1), is_correct)

    # A class that is never predicted has no precision, and neither has the macro average then.
    present = support > 0
    never = [classes[place] for place in np.flatnonzero(present & np.isnan(precision))]
    unpredicted = f"no example is predicted as {name_some(never)}"
    one_class = f"all examples have the class {classes[labels[0]]}"
    ranked = average_precision[1:] if len(classes) == 2 else average_precision[present]

    metrics = {"accuracy": Estimate(float(np.mean(is_correct)))}
    averaged = {"precision": precision, "recall": recall, "f1": f1}
    for kind, weights in (("macro", None), ("weighted", support[present])):
        for name, values in averaged.items():
            metrics[f"{kind}_{name}"] = _mean(values[present], unpredicted, weights)
    metrics["auroc"] = _mean(auroc[present], one_class)
    metrics["average_precision"] = _mean(ranked, one_class)
    metrics["log_loss"] = Estimate(float(-log_probabilities[np.arange(len(labels)), labels].mean()))
    metrics["calibration_error"] = Estimate(calibration.error)
    return ClassMetrics(
        classes,
        with_intervals(metrics, len(labels), _resampler(probabilities, labels, predictions)),
        np.bincount(pairs, minlength=len(classes) ** 2).reshape(len(classes), -1),
        precision,
        recall,
        f1,
        auroc,
        average_precision,
        calibration,
    )


def calibrate(
    confidence: Float[np.ndarray, " examples"], is_correct: Bool[np.ndarray, " examples"]
) -> Calibration:
    """Computes the reliability diagram, given the probability of each predicted class."""
    # Bins are open on the left, and the probability of a predicted class is positive.
    bins = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)
    counts = np.bincount(bins, minlength=BINS)
    filled = np.maximum(counts, 1)

    def means(values: np.ndarray) -> np.ndarray:
        sums = np.bincount(bins, weights=values, minlength=BINS)
        return np.where(counts > 0, sums / filled, nan)

    return Calibration(counts, means(confidence), means(is_correct))


def log_softmax(
    logits: Float[np.ndarray, "examples classes"],
) -> Float[np.ndarray, "examples classes"]:
    """Returns the logarithms of the probabilities, computed in float64."""
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def _rank(
    probabilities: Float[np.ndarray, "examples classes"], labels: Int[np.ndarray, " examples"]
) -> tuple[Float[np.ndarray, " classes"], Float[np.ndarray, " classes"]]:
    """Returns AUROC and average precision of each class against the rest, or NaN."""
    from sklearn.metrics import average_precision_score, roc_auc_score

    count = probabilities.shape[1]
    auroc = np.full(count, nan)
    average_precision = np.full(count, nan)
    for place in np.unique(labels):
        is_positive = labels == place
        if not is_positive.all():
            scores = probabilities[:, place]
            auroc[place] = roc_auc_score(is_positive, scores)
            average_precision[place] = average_precision_score(is_positive, scores)
    return auroc, average_precision


def _mean(values: np.ndarray, reason: str, weights: np.ndarray | None = None) -> Estimate:
    """Returns the mean over classes; undefined for `reason` if a class has no value."""
    mean = float(np.average(values, weights=weights))
    return Estimate(reason=reason) if np.isnan(mean) else Estimate(mean)


def _resampler(
    probabilities: Float[np.ndarray, "examples classes"],
    labels: Int[np.ndarray, " examples"],
    predictions: Int[np.ndarray, " examples"],
) -> Callable[[Float[np.ndarray, " examples"]], dict[str, float]]:
    """Returns the function that computes the metrics with intervals for a resample."""
    examples, count = probabilities.shape
    is_correct = predictions == labels
    auroc = weighted_auroc(probabilities, labels) if examples * count <= _MOST_SCORES else None

    def resample(counts: Float[np.ndarray, " examples"]) -> dict[str, float]:
        support = np.bincount(labels, counts, count)
        predicted = np.bincount(predictions, counts, count)
        correct = np.bincount(labels, counts * is_correct, count)
        present = support > 0
        values = {
            "accuracy": float(correct.sum() / examples),
            "macro_f1": float(np.mean(2 * correct[present] / (support + predicted)[present])),
        }
        if auroc is not None:
            values["auroc"] = float(auroc(counts)[present].mean())
        return values

    return resample


def weighted_auroc(
    scores: Float[np.ndarray, "examples classes"], labels: Int[np.ndarray, " examples"]
) -> Callable[[Float[np.ndarray, " examples"]], Float[np.ndarray, " classes"]]:
    """Returns a function from weights of the examples to the AUROC of each class.

    It equals `sklearn.metrics.roc_auc_score(..., sample_weight=weights)` for one class against the
    rest, which takes a millisecond for each class and each resample.
    """
    # Sort the scores of each class once, and find the group of equal scores of each example in its
    # class: from `start` to before `end`.
    examples, count = scores.shape
    order = scores.T.argsort(axis=1)
    start, end = np.zeros((2, examples), np.int64)
    for place in np.unique(labels):
        is_positive = labels == place
        ordered = scores[order[place], place]
        start[is_positive] = np.searchsorted(ordered, scores[is_positive, place], "left")
        end[is_positive] = np.searchsorted(ordered, scores[is_positive, place], "right")
    below = np.zeros((count, examples + 1))

    def auroc(weights: Float[np.ndarray, " examples"]) -> Float[np.ndarray, " classes"]:
        # The sum of the ranks of the positives (Mann and Whitney, 1947), whose ranks among
        # themselves add up to half the square of their weight. Equal scores have their mean rank.
        np.cumsum(weights[order], axis=1, out=below[:, 1:])
        ranks = (below[labels, start] + below[labels, end]) / 2
        positives = np.bincount(labels, weights, count)
        won = np.bincount(labels, weights * ranks, count) - np.square(positives) / 2
        pairs = positives * (weights.sum() - positives)
        return np.divide(won, pairs, out=np.full(count, nan), where=pairs > 0)

    return auroc
