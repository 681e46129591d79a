"""Tasks of a model: a loss and metrics, each of which returns one number for each example.

The caller sums them and divides by the number of examples, so averages are correct for any split
into batches and devices.
"""

from ctde_jax.models.tasks.named import (
    BY_NAME,
    LARGEST_LOSS,
    Name,
    classification,
    for_data,
    language_modeling,
    multilabel,
    name_of,
)
from ctde_jax.models.tasks.objectives import calibrated, focal, smoothed, weighted
from ctde_jax.models.tasks.targets import regression, regression_in
from ctde_jax.models.tasks.task import (
    RESERVED,
    PerExample,
    Task,
    Units,
    cross_entropy,
    is_correct,
)

__all__ = [
    "BY_NAME",
    "LARGEST_LOSS",
    "RESERVED",
    "Name",
    "PerExample",
    "Task",
    "Units",
    "calibrated",
    "classification",
    "cross_entropy",
    "focal",
    "for_data",
    "is_correct",
    "language_modeling",
    "multilabel",
    "name_of",
    "regression",
    "regression_in",
    "smoothed",
    "weighted",
]
