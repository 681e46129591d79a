"""The meaning of inputs and labels, which the nodes of a federation adopt from their server."""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from ctde_jax.data.dataset import Dataset
from ctde_jax.data.disk import DiskArray
from ctde_jax.errors import InputError, quoted


class Meaning(NamedTuple):
    """The meaning of inputs and labels: the fields of a `Dataset` of these names."""

    classes: tuple[str, ...]
    vocabulary: tuple[str, ...]
    shift: np.ndarray
    scale: np.ndarray


def with_meaning(data: Dataset, meaning: Meaning) -> Dataset:
    """Returns a data set with another meaning, to which labels and tokens are converted by name.

    Args:
        data: Data set of arrays, whose classes and characters are among those of the meaning.
        meaning: The meaning to adopt.

    Raises:
        InputError: The data have classes or characters that the meaning lacks, inputs of another
            kind, or are columns of a table with a recipe.

    Examples:
        >>> points = np.zeros((2, 3), np.float32)
        >>> data = ctde.data.from_arrays(points, ["cat", "dog"])
        >>> zero, one = np.zeros(3, np.float32), np.ones(3, np.float32)
        >>> meaning = ctde.data.Meaning(("bird", "cat", "dog"), (), zero, one)
        >>> ctde.data.with_meaning(data, meaning).classes
        ('bird', 'cat', 'dog')
    """
    data.check_arrays("data")
    if data.recipe is not None:
        raise InputError(
            "data",
            "must not be a table with columns of words or gaps, because each node would convert "
            "them by statistics of its table; pass arrays that all nodes convert in the same way.",
        )
    if (data.shift.dtype, data.scale.dtype) != (meaning.shift.dtype, meaning.scale.dtype):
        raise InputError(
            "data",
            f"must have inputs of the kind of the server, which become {meaning.scale.dtype}, got "
            f"{data.train.inputs.dtype}.",
        )

    # Only what is named differently is converted.
    classes = _numbers_of("classes", data.classes, meaning.classes)
    tokens = _numbers_of("characters", data.vocabulary, meaning.vocabulary)

    def convert(split):
        labels, inputs = split.labels, split.inputs
        if tokens is not None:
            inputs = tokens[_in_memory(inputs)]
            labels = tokens[_in_memory(labels)]
        if classes is not None:
            labels = classes[_in_memory(labels)]
        return split._replace(inputs=inputs, labels=labels)

    changes = {}
    if classes is not None or tokens is not None:
        splits = {"train": data.train, "test": data.test, "validation": data.validation}
        changes = {name: split and convert(split) for name, split in splits.items()}
    return replace(data, **meaning._asdict(), **changes)


def _numbers_of(kind: str, names: Sequence[str], wanted: Sequence[str]) -> np.ndarray | None:
    """Returns the index of each name among the wanted ones, int32[names]; None if all are equal.

    Raises:
        InputError: A name is not among the wanted ones.
    """
    if tuple(names) == tuple(wanted[: len(names)]):
        return None
    place = {name: number for number, name in enumerate(wanted)}
    unknown = [name for name in names if name not in place]
    if unknown:
        few = ", ".join(map(quoted, unknown[:10]))
        raise InputError("data", f"must have {kind} that the server has, but it lacks {few}.")
    return np.array([place[name] for name in names], np.int32)


def _in_memory(array: np.ndarray | DiskArray) -> np.ndarray:
    return np.asarray(array)
