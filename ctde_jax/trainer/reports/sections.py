"""The sections of a report's page."""

from collections.abc import Mapping, Sequence
from functools import partial
from math import isnan

import numpy as np

from ctde_jax.models import RESERVED
from ctde_jax.trainer import log
from ctde_jax.trainer.history import Row
from ctde_jax.trainer.reports import figures, page, tables
from ctde_jax.trainer.reports.classes import BINS, ClassMetrics
from ctde_jax.trainer.reports.targets import TargetMetrics
from ctde_jax.trainer.reports.worst import WorstExample, are_pictures, describe_numbers, pictures

_CARDS = ("accuracy", "macro_f1", "auroc", "log_loss", "mae", "rmse", "r2")
"""Metrics that are shown as large numbers."""

_MOST_CLASSES = 40
"""Maximum number of classes of a confusion matrix; of more classes, the most frequent confusions
are listed."""

_CONFUSIONS = 20
"""Number of most frequent confusions in that list."""

_PANELS = 4
"""Maximum number of outputs with a figure."""

_MOST_ROWS = 1000
"""Maximum number of rows in the table of classes or outputs."""


def make_sections(
    numbers: ClassMetrics | TargetMetrics,
    worst: Sequence[WorstExample],
    history: Sequence[Row],
    plan: Sequence[tuple[str, str]],
    versions: Mapping[str, str],
) -> list[str]:
    """Returns all sections in order; the arguments are the fields of a `Report`."""
    of_kind = (
        [_confusion(numbers), _calibration(numbers)]
        if isinstance(numbers, ClassMetrics)
        else [_predictions(numbers)]
    )
    return [
        _metrics(numbers),
        *of_kind,
        _worst(worst),
        _curves(history),
        page.section("Training", page.table("Plan of the training", ["part", "plan"], plan, "plan"))
        if plan
        else page.section("Training", page.paragraph("The plan of this training is not known.")),
        page.section(
            "Versions",
            page.table("When this report was made", ["package", "version"], versions.items()),
        ),
    ]


def _metrics(numbers: ClassMetrics | TargetMetrics) -> str:
    metrics = numbers.metrics
    cards = [
        (
            tables.title(name),
            tables.number(metrics[name].value),
            tables.interval(metrics[name]) or metrics[name].reason,
        )
        for name in _CARDS
        if name in metrics
    ]
    others = [
        [tables.title(name), tables.number(estimate.value)]
        for name, estimate in metrics.items()
        if name not in _CARDS
    ]
    header, rows = tables.details(numbers)
    more = [page.paragraph(f"{len(rows) - _MOST_ROWS:,} more rows are left out.")]
    return page.section(
        "Metrics",
        page.cards(cards),
        page.table("Further metrics", ["metric", "value"], others, "numbers"),
        page.table(f"By {header[0]}", header, rows[:_MOST_ROWS], "numbers") if rows else "",
        *(more if len(rows) > _MOST_ROWS else []),
        *map(page.paragraph, tables.notes(numbers)),
    )


def _confusion(numbers: ClassMetrics) -> str:
    """Returns the matrix, or a list of the most frequent confusions of many classes."""
    names, matrix = numbers.classes, numbers.confusion
    if len(names) > _MOST_CLASSES:
        wrong = matrix - np.diag(matrix.diagonal())
        places = np.argsort(-wrong, axis=None, kind="stable")[:_CONFUSIONS]
        pairs = [np.unravel_index(place, wrong.shape) for place in places]
        rows = [
            [names[row], names[column], f"{wrong[row, column]:,}"]
            for row, column in pairs
            if wrong[row, column]
        ]
        table = page.table(
            f"The most frequent confusions of {len(names):,} classes",
            ["class", "predicted", "examples"],
            rows,
        )
        return page.section("Confusion matrix", table)

    # A cell is shaded by its fraction of the row; a row without examples has no shade.
    fractions = matrix / np.maximum(numbers.support, 1)[:, None]
    body = []
    for row, name in enumerate(names):
        cells = [
            _shaded(matrix[row, column], fractions[row, column], row == column)
            for column in range(len(names))
        ]
        body.append(page.row_of([page.heading_cell(name, "row"), *cells]))
    header = [page.heading_cell(text, "col") for text in ("class", *names)]
    caption = "Examples by class (row) and predicted class (column)"
    return page.section(
        "Confusion matrix",
        page.framed(caption, header, body, "confusion"),
        page.paragraph("A cell is shaded by its fraction of the examples in the row."),
    )


def _shaded(count: int, fraction: float, is_correct: bool) -> str:
    if not count:
        return '<td class="none">0</td>'
    kind = "right" if is_correct else "wrong"
    return f'<td class="{kind}" style="--share: {fraction:.3f}">{count:,}</td>'


def _calibration(numbers: ClassMetrics) -> str:
    calibration = numbers.calibration
    caption = (
        "Accuracy and number of examples by confidence, the probability of the predicted class"
    )
    ranges = [f"{place / BINS:.2f} to {(place + 1) / BINS:.2f}" for place in range(BINS)]
    columns = zip(
        ranges, calibration.counts, calibration.confidence, calibration.accuracy, strict=True
    )
    rows = [
        [bounds, f"{count:,}", tables.number(confidence), tables.number(accuracy)]
        for bounds, count, confidence, accuracy in columns
    ]
    header = ["confidence", "examples", "mean confidence", "accuracy"]
    return page.section(
        "Calibration",
        page.figures(
            [
                page.figure(
                    partial(figures.reliability, calibration), "reliability", caption, caption
                )
            ]
        ),
        page.paragraph(
            f"The expected calibration error is {calibration.error:.4f}: the mean distance between "
            f"accuracy and confidence over {BINS} bins, weighted by examples (Guo et al., 2017)."
        ),
        page.folded(
            "Numbers of the figure", page.table("Bins of the confidence", header, rows, "numbers")
        ),
    )


def _predictions(numbers: TargetMetrics) -> str:
    outputs = len(numbers.mae)
    drawn = []
    for place in range(min(_PANELS, outputs)):
        targets = numbers.targets[:, place]
        draw = partial(figures.predicted_over_true, targets, numbers.predictions[:, place])
        of_which = f" of output {place}" if outputs > 1 else ""
        label = f"Predictions{of_which} over targets"
        drawn.append(page.figure(draw, f"predictions-{place}", label, label))
    left_out = f"Figures of {outputs - _PANELS:,} more outputs are left out."
    note = page.paragraph(left_out) if outputs > _PANELS else ""
    return page.section("Predictions", page.figures(drawn), note)


def _worst(worst: Sequence[WorstExample]) -> str:
    """Returns pictures, or a table with the first features."""
    has_probability = worst[0].probability is not None
    note = page.paragraph(
        "Examples are numbered from 0, in the order of the split."
        f"{' The probability is that of the prediction.' if has_probability else ''}"
    )
    inputs = [example.inputs for example in worst]
    if are_pictures(np.stack(inputs)):
        shown = [
            (uri, *_facts(example)) for uri, example in zip(pictures(inputs), worst, strict=True)
        ]
        return page.section("Highest losses", page.gallery(shown), note)

    header = ["example", "label", "prediction", "probability", "loss", "inputs"]
    rows = [
        [
            f"{example.example:,}",
            example.label,
            example.prediction,
            *([] if example.probability is None else [tables.number(example.probability)]),
            tables.number(example.loss),
            describe_numbers(example.inputs),
        ]
        for example in worst
    ]
    if not has_probability:
        header.remove("probability")
    table = page.table("The examples with the highest loss", header, rows)
    return page.section("Highest losses", table, note)


def _facts(example: WorstExample) -> tuple[str, list[str]]:
    """Returns the title of a picture, and the lines below it."""
    lines = [f"label {example.label}", f"prediction {example.prediction}"]
    if example.probability is not None:
        lines.append(f"probability {tables.number(example.probability)}")
    lines.append(f"loss {tables.number(example.loss)}")
    return f"example {example.example:,}", lines


def _curves(history: Sequence[Row]) -> str:
    """Returns a figure for the loss and every metric, as narrow as a phone."""
    names = [name for name in history[0] if name not in RESERVED]
    drawn = []
    for name in names:
        rows = [
            {key: row[key] for key in ("split", "step", name)}
            for row in history
            if not isnan(row.get(name, np.nan))
        ]
        if rows:
            label = f"{tables.title(name)} over the optimizer steps"
            drawn.append(page.figure(partial(log.plot_curves, rows), f"curve-{name}", label))
    return page.section("Curves", page.figures(drawn))
