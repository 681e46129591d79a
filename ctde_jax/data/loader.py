"""A data set whose training batches come from an iterable, such as a Grain data loader."""

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
    """Makes a data set of training batches from an iterable, and of test arrays.

    Batches are used in the order of the iterable. A thread reads them while the devices compute,
    and `fit` raises the exceptions of the iterable. Dtypes and labels are those of `from_arrays`. A
    Grain loader that yields pairs is passed as `from_batches(lambda epoch: loader, ...)`.

    Args:
        batches: Function from the number of an epoch, counted from 0, to an iterable of pairs of
            inputs `[examples, ...]` and labels, or triples with weights `[examples]` as in
            `weighted`. A batch has at most the batch size of `fit`. The function is also called by
            `from_batches`, for the first batch.
        steps_per_epoch: Number of batches per epoch.
        x_test: Test inputs `[examples, ...]`, shaped like those of the batches.
        y_test: Test labels.
        name: Name of the data set.
        classes: Label names; by default the numbers from 0 to the largest label of the test split
            and the first batch.

    Raises:
        InputError: If `batches` is not a function or yields nothing, `steps_per_epoch` is less than
            1, or the first batch is not a pair of arrays or does not match the test arrays.

    Examples:
        >>> digits = ctde.data.digits()
        >>> def loader(epoch):
        ...     order = np.random.default_rng(epoch).permutation(1438)
        ...     for rows in np.array_split(order, 23):
        ...         yield digits.train.inputs[rows], digits.train.labels[rows]
        >>> data = ctde.data.from_batches(loader, 23, *digits.test)
    """
    check_at_least(1, steps_per_epoch=steps_per_epoch)
    if not callable(batches):
        raise InputError(
            "batches",
            "must be a function from the number of an epoch to an iterable, got "
            f"{type(batches).__name__}; pass lambda epoch: loader.",
        )

    # The first batch determines the dtypes and shapes of all others.
    first = next(iter(batches(0)), None)
    if first is None:
        raise InputError("batches", "must yield at least one batch, got none in epoch 0.")
    like = of_pair("batch 0 of epoch 0", first)

    # Number the classes if they have no names. Float targets name no classes, even if the test
    # targets are integers.
    is_numbered = classes is None
    if classes is None:
        test = as_batch("the test split", x_test, y_test)
        own = numbered(like.labels)
        classes = max(own, numbered(test.labels), key=len) if own else ()

    # `from_arrays` checks the first batch against the test arrays.
    dataset = from_arrays(like.inputs, like.labels, x_test, y_test, name=name, classes=classes)
    stream = Stream(batches, steps_per_epoch, like, len(classes))

    # The first batch may lack classes, so the only note on classes is that on their number.
    notes = [
        *(note_on_numbers(len(classes), "the labels") if is_numbered else []),
        *notes_on_inputs(dataset),
    ]
    return replace(dataset, train=like, stream=stream, notes=tuple(notes))
