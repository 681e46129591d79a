"""A data set whose training batches come from an iterable, such as a loader of Grain."""

from collections.abc import Callable, Iterable
from dataclasses import replace

import numpy as np

from ctde_jax.data.classes import note_on_numbers, numbered
from ctde_jax.data.dataset import Dataset, from_arrays, notes_on_inputs
from ctde_jax.data.disk import DiskArray
from ctde_jax.data.split import as_batch
from ctde_jax.data.stream import Pair, Stream, of_pair
from ctde_jax.errors import InputError, check_at_least


def from_batches(
    batches: Callable[[int], Iterable[Pair]],
    steps_per_epoch: int,
    x_test: np.ndarray | DiskArray,
    y_test: np.ndarray | DiskArray,
    *,
    name: str = "batches",
    classes: tuple[str, ...] | None = None,
) -> Dataset:
    """Makes a data set of training batches that come from an iterable, and of test arrays.

    The batches train in the order in which they come, and a thread draws them while the devices compute: what goes
    wrong there is raised by `fit`. Types and labels are those of `from_arrays`. A loader of Grain that gives pairs goes
    in as `from_batches(lambda epoch: loader, ...)`.

    Args:
        batches: Called with the number of an epoch, counted from 0, it returns an iterable of pairs of inputs
            `[examples, ...]` and labels. A batch has as many examples as `fit` is told, or fewer, as the last one of an
            epoch may. It is also called here, to see the first batch.
        steps_per_epoch: How many batches are drawn in an epoch.
        x_test: Test inputs, shaped like those of the batches.
        y_test: Test labels.
        name: What to call the data set.
        classes: Label names; by default the numbers from 0 to the largest label of the test split and the first batch.

    Raises:
        InputError: The first batch is no pair of arrays, or does not go with the test arrays.
    """
    check_at_least(1, steps_per_epoch=steps_per_epoch)
    if not callable(batches):
        raise InputError(
            "batches",
            f"must be a function from the number of an epoch to an iterable, got {type(batches).__name__}; pass "
            "lambda epoch: loader.",
        )
    first = next(iter(batches(0)), None)
    if first is None:
        raise InputError("batches", "must give at least one batch, got none in epoch 0.")
    like = of_pair("batch 0 of epoch 0", first)
    is_numbered = classes is None
    if classes is None:
        test = as_batch("the test split", x_test, y_test)
        own = numbered(like.labels)
        classes = (
            max(own, numbered(test.labels), key=len) if own else ()
        )  # integers may test targets that are floats
    dataset = from_arrays(*like, x_test, y_test, name=name, classes=classes)
    stream = Stream(batches, steps_per_epoch, like, len(classes))
    # Of the notes on classes only the one on their number holds, as one batch lacks some of them.
    notes = [
        *(note_on_numbers(len(classes), "the labels") if is_numbered else []),
        *notes_on_inputs(dataset),
    ]
    return replace(dataset, stream=stream, notes=tuple(notes))
