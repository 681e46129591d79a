"""Who keeps which examples, where data must not leave its device.

A partition is a list with one index array for each replica; every example belongs to exactly one. Without a partition
the examples are dealt anew to all devices in every epoch (see `batches.py`).
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ctde_jax.data.disk import DiskArray
from ctde_jax.errors import InputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def iid(labels: np.ndarray | DiskArray, replicas: int, seed: int = 0) -> list[np.ndarray]:
    """Gives every replica an equal random share."""
    order = np.random.default_rng(seed).permutation(len(labels))
    return [np.sort(part) for part in np.array_split(order, replicas)]


def by_label(labels: np.ndarray, replicas: int, shards: int = 2, seed: int = 0) -> list[np.ndarray]:
    """Sorts the examples by label and gives every replica this many contiguous shards (McMahan et al., 2017, 3)."""
    if shards < 1 or replicas * shards > len(labels):
        raise InputError(
            "label_shards",
            f"must be from 1 to {len(labels) // replicas}, so that each of the {replicas} devices gets examples, "
            f"got {shards}.",
        )
    pieces = np.array_split(np.argsort(labels, kind="stable"), replicas * shards)
    order = np.random.default_rng(seed).permutation(len(pieces)).reshape(replicas, shards)
    return [np.sort(np.concatenate([pieces[i] for i in row])) for row in order]


def dirichlet(
    labels: np.ndarray, replicas: int, alpha: float = 0.5, seed: int = 0
) -> list[np.ndarray]:
    """Draws each label's shares over the replicas from Dirichlet(alpha) (Hsu et al., 2019).

    A small alpha leaves most of a label with one replica; a large one is nearly `iid`.
    """
    if not 0 < alpha <= 1e6:
        raise InputError("dirichlet_alpha", f"must be greater than 0 and at most 1e6, got {alpha}.")
    rng = np.random.default_rng(seed)
    parts: list[list[np.ndarray]] = [[] for _ in range(replicas)]
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        shares = rng.dirichlet(np.full(replicas, alpha))
        cuts = np.round(np.cumsum(shares)[:-1] * len(members)).astype(int)
        for part, piece in zip(parts, np.split(members, cuts), strict=True):
            part.append(piece)
    return [np.sort(np.concatenate(part)) for part in parts]


def count_labels(labels: np.ndarray, parts: Sequence[np.ndarray], classes: int) -> np.ndarray:
    """Counts how often each replica holds each label, int `[replica, class]`."""
    return np.stack([np.bincount(labels[part], minlength=classes) for part in parts])


def plot(labels: np.ndarray, parts: Sequence[np.ndarray], classes: Sequence[str]) -> "Figure":
    """Draws who holds which labels: a row for each device, a column for each class.

    Up to 25 classes, the classes are named and every cell has its number.
    """
    from matplotlib.figure import Figure

    counts = count_labels(labels, parts, len(classes))
    few = len(classes) <= 25
    width = 2 + 0.6 * len(classes) if few else 17
    figure = Figure(figsize=(width, 1.4 + 0.4 * len(parts)), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(counts, cmap="Blues", vmin=0, aspect="auto")
    if few:
        axes.set_xticks(
            range(len(classes)), classes, rotation=0 if max(map(len, classes)) < 4 else 45
        )
    axes.set_yticks(
        range(len(parts)), [f"device {i}: {len(part):,}" for i, part in enumerate(parts)]
    )
    axes.set_xlabel("label")
    axes.set_title("examples of each label on each device")
    for (row, column), count in np.ndenumerate(counts) if few else ():
        color = "white" if count > counts.max() / 2 else "black"
        axes.text(column, row, f"{count}", ha="center", va="center", fontsize=8, color=color)
    figure.colorbar(image)
    return figure
