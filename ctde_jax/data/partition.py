"""Partitions: the examples that each replica keeps if data must not leave its device.

A partition is a list with one index array `int[examples]` per replica; every example belongs to
exactly one replica. Without a partition, the examples are reshuffled over all devices in every
epoch (see `batches.py`).
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from ctde_jax.data.dataset import Dataset
from ctde_jax.data.disk import DiskArray
from ctde_jax.data.split import select
from ctde_jax.errors import InputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def iid(labels: np.ndarray | DiskArray, replicas: int, seed: int = 0) -> list[np.ndarray]:
    """Assigns random examples to every replica; their numbers differ by at most 1.

    Args:
        labels: Labels, `[examples, ...]`; only their number is used.
        replicas: Number of replicas.
        seed: Random seed.

    Returns:
        Sorted indices of each replica's examples, `int64[examples]` each.

    Examples:
        >>> labels = ctde.data.digits().train.labels
        >>> parts = ctde.data.partition.iid(labels, replicas=4)
        >>> [len(part) for part in parts]
        [360, 360, 359, 359]
    """
    order = np.random.default_rng(seed).permutation(len(labels))
    # The sizes of the parts differ by at most 1.
    return [np.sort(part) for part in np.array_split(order, replicas)]


def by_label(labels: np.ndarray, replicas: int, shards: int = 2, seed: int = 0) -> list[np.ndarray]:
    """Assigns `shards` contiguous shards of the examples sorted by label to every replica.

    This is the pathological non-IID partition of McMahan et al. (2017, section 3).

    Args:
        labels: Labels, `int[examples]`.
        replicas: Number of replicas.
        shards: Number of shards per replica.
        seed: Random seed.

    Returns:
        Sorted indices of each replica's examples, `int64[examples]` each.

    Raises:
        InputError: If `shards` is less than 1, or there are more shards than examples.

    Examples:
        >>> labels = np.array([0, 1, 2, 3, 0, 1, 2, 3])
        >>> parts = ctde.data.partition.by_label(labels, replicas=2, shards=1)
        >>> sorted(labels[parts[0]].tolist() + labels[parts[1]].tolist())
        [0, 0, 1, 1, 2, 2, 3, 3]
    """
    if shards < 1 or replicas * shards > len(labels):
        raise InputError(
            "label_shards",
            f"must be from 1 to {len(labels) // replicas}, so that each of the {replicas} devices "
            f"gets examples, got {shards}.",
        )
    # A stable sort orders equal labels in the same way on every platform.
    pieces = np.array_split(np.argsort(labels, kind="stable"), replicas * shards)
    order = np.random.default_rng(seed).permutation(len(pieces)).reshape(replicas, shards)
    return [np.sort(np.concatenate([pieces[i] for i in row])) for row in order]


def dirichlet(
    labels: np.ndarray, replicas: int, alpha: float = 0.5, seed: int = 0
) -> list[np.ndarray]:
    """Draws the fractions of each label on the replicas from Dirichlet(alpha) (Hsu et al., 2019).

    A small alpha assigns most of a label to one replica; a large alpha approaches `iid`.

    Args:
        labels: Labels, `int[examples]`.
        replicas: Number of replicas.
        alpha: Concentration of the distribution, at most 1e6.
        seed: Random seed.

    Returns:
        Sorted indices of each replica's examples, `int64[examples]` each. A replica may have none.

    Raises:
        InputError: If `alpha` is not greater than 0 and at most 1e6.

    Examples:
        >>> labels = ctde.data.digits().train.labels
        >>> parts = ctde.data.partition.dirichlet(labels, replicas=4, alpha=0.3)
        >>> sum(len(part) for part in parts)
        1438
    """
    if not 0 < alpha <= 1e6:
        raise InputError("dirichlet_alpha", f"must be greater than 0 and at most 1e6, got {alpha}.")
    rng = np.random.default_rng(seed)
    parts: list[list[np.ndarray]] = [[] for _ in range(replicas)]
    for label in np.unique(labels):
        # Split the label's shuffled examples at the cumulative fractions, rounded to integers.
        members = rng.permutation(np.flatnonzero(labels == label))
        shares = rng.dirichlet(np.full(replicas, alpha))
        cuts = np.round(np.cumsum(shares)[:-1] * len(members)).astype(int)
        for part, piece in zip(parts, np.split(members, cuts), strict=True):
            part.append(piece)
    return [np.sort(np.concatenate(part)) for part in parts]


def part(data: Dataset, rows: np.ndarray) -> Dataset:
    """Returns a data set with some of the training examples, such as the part of one node.

    Args:
        data: Data set of arrays.
        rows: Indices of the training examples, `int[examples]`.

    Examples:
        >>> digits = ctde.data.digits()
        >>> parts = ctde.data.partition.iid(digits.train.labels, replicas=4)
        >>> ctde.data.partition.part(digits, parts[0])
        Dataset('digits', 360 training and 359 test examples, 10 classes)
    """
    data.check_arrays("data")
    return replace(data, train=select(data.train, rows))


def count_labels(labels: np.ndarray, parts: Sequence[np.ndarray], classes: int) -> np.ndarray:
    """Counts the examples of each label on each replica, `int64[replica, class]`.

    Args:
        labels: Labels from 0 to `classes - 1`, `int[examples]`.
        parts: Indices of each replica's examples, `int[examples]` each.
        classes: Number of classes.

    Examples:
        >>> labels = np.array([0, 1, 1, 2])
        >>> parts = [np.array([0, 1]), np.array([2, 3])]
        >>> ctde.data.partition.count_labels(labels, parts, classes=3)
        array([[1, 1, 0],
               [0, 1, 1]])
    """
    return np.stack([np.bincount(labels[part], minlength=classes) for part in parts])


def plot(labels: np.ndarray, parts: Sequence[np.ndarray], classes: Sequence[str]) -> "Figure":
    """Plots the number of examples of each label on each device: a row per device.

    With at most 25 classes, the class names are shown and every cell shows its count.

    Args:
        labels: Labels, `int[examples]`.
        parts: Indices of each device's examples, `int[examples]` each.
        classes: Names of the classes, one for each column.

    Returns:
        The matplotlib figure, which is not shown.

    Examples:
        >>> digits = ctde.data.digits()
        >>> parts = ctde.data.partition.dirichlet(digits.train.labels, replicas=4)
        >>> figure = ctde.data.partition.plot(digits.train.labels, parts, digits.classes)
        >>> figure.savefig("partition.png")
    """
    # Matplotlib is imported here, because nothing else in this module needs it.
    from matplotlib.figure import Figure

    # The figure grows with the number of classes as long as names and counts fit.
    counts = count_labels(labels, parts, len(classes))
    few = len(classes) <= 25
    width = 2 + 0.6 * len(classes) if few else 17
    figure = Figure(figsize=(width, 1.4 + 0.4 * len(parts)), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(counts, cmap="Blues", vmin=0, aspect="auto")

    # Name the classes and the devices.
    if few:
        axes.set_xticks(
            range(len(classes)), classes, rotation=0 if max(map(len, classes)) < 4 else 45
        )
    axes.set_yticks(
        range(len(parts)), [f"device {i}: {len(part):,}" for i, part in enumerate(parts)]
    )
    axes.set_xlabel("label")
    axes.set_title("examples of each label on each device")

    # Write each count into its cell, in white on dark cells.
    for (row, column), count in np.ndenumerate(counts) if few else ():
        color = "white" if count > counts.max() / 2 else "black"
        axes.text(column, row, f"{count}", ha="center", va="center", fontsize=8, color=color)
    figure.colorbar(image)
    return figure
