"""Pictures in folders: one for each class, or such folders below train, test and validation."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias

import numpy as np
from rich.filesize import decimal

from ctde_jax.bundle import finder
from ctde_jax.data import pictures
from ctde_jax.data.classes import from_words
from ctde_jax.data.dataset import Dataset, from_arrays
from ctde_jax.data.disk import DiskArray
from ctde_jax.data.split import Split
from ctde_jax.errors import InputError, check_at_least, check_at_most, check_whole, did_you_mean

_SPLITS = ("train", "test", "validation")

_LARGEST_SIDE = 10_000
"""Maximum height and width, at which one picture takes 300 MB in memory."""

_Classes: TypeAlias = dict[str, list[Path]]
"""The pictures in each class folder, by its name."""


def from_folder(
    path: Path | str,
    image_size: int | Sequence[int] | None = None,
    *,
    skip_unreadable: bool = False,
) -> Dataset:
    """Loads PNG and JPEG pictures from a folder with one subfolder for each class.

    The subfolders may also be in the folders `train`, `test` and `validation`. Without `test`, a
    random fifth of the pictures (always the same) becomes the test split. The sorted names of the
    subfolders are the classes, sorted as numbers if all of them are.

    Inputs are `uint8[examples, height, width]` if all pictures are gray, otherwise
    `uint8[examples, height, width, 3]` in RGB. EXIF orientation is applied, palettes become RGB,
    and transparent pixels are composited over white. Pictures are decoded once, into a file in the
    user's cache folder that the notes name; from a gigabyte on, training reads them from it.

    Args:
        path: Folder of the pictures.
        image_size: Height and width, or one number for both. Pictures are resized bilinearly so
            that they cover this size, and cropped at the center. By default all pictures must have
            the same size.
        skip_unreadable: Whether to leave out files that are not complete pictures.

    Raises:
        InputError: If there are fewer than two class folders, one has no pictures or contains
            folders, pictures are unreadable, have 16 bits per channel or different sizes, or the
            cache folder is not writable or too small.

    Examples:
        >>> data = ctde.data.from_folder("pictures", image_size=64)  # doctest: +SKIP
    """
    size = height_and_width(image_size)
    folder = Path(os.path.abspath(os.path.expanduser(path)))

    # List the pictures of each split and class.
    unused: list[Path] = []
    splits = {name: _classes_in(part, unused) for name, part in _parts(folder, unused).items()}
    classes, labels = _numbered(folder, splits)
    paths = [path for split in splits.values() for files in split.values() for path in files]

    # Decode all of them into one file, and remove the labels of unreadable ones.
    decoded = pictures.decoded(paths, size)
    notes = _notes(paths, decoded, unused)
    if not skip_unreadable:
        _check_readable(paths, decoded.is_readable)
    ends = np.cumsum([len(labels[name]) for name in splits])
    is_readable = dict(zip(splits, np.split(decoded.is_readable, ends[:-1]), strict=True))
    kept = {name: labels[name][is_readable[name]] for name in splits}
    _check_kept(classes, labels, kept)

    # Make the data set of the rows of each split.
    arrays = _in_splits(decoded.pixels, kept)
    test = arrays.get("test") or (None, None)
    dataset = from_arrays(*arrays["train"], *test, name=folder.name, classes=classes)
    return replace(dataset, validation=arrays.get("validation"), notes=(*notes, *dataset.notes))


def height_and_width(image_size: int | Sequence[int] | None) -> tuple[int, int] | None:
    """Returns the height and width to which pictures are resized, or None.

    Raises:
        InputError: If they are not one or two whole numbers from 1 to `_LARGEST_SIDE`.
    """
    if image_size is None:
        return None
    sizes = np.atleast_1d(image_size).tolist()
    if len(sizes) not in (1, 2):
        raise InputError(
            "image_size", f"must be height and width, or one number for both, got {image_size}."
        )
    for side in sizes:
        check_whole(image_size=side)
        check_at_least(1, image_size=side)
        check_at_most(_LARGEST_SIDE, image_size=side)
    return sizes[0], sizes[-1]


def _parts(folder: Path, unused: list[Path]) -> dict[str, Path]:
    """Returns the folders of the splits by name; without them, the folder is the training split."""
    if not folder.is_dir():
        raise InputError("data_dir", f"must be an existing folder of pictures, got {folder}.")
    folders, files = _entries(folder)
    names = [path.name for path in folders]
    # A folder named train that has no folders is a class.
    if "train" not in names or not _entries(folder / "train")[0]:
        return {"train": folder}
    for name in names:
        if name not in _SPLITS:
            raise InputError(
                "data_dir",
                f"must contain only the folders train, test and validation, as {folder}/train "
                f"contains class folders, but has {name}; rename or move it.",
            )
    unused += files
    return {name: folder / name for name in _SPLITS if name in names}


def _classes_in(folder: Path, unused: list[Path]) -> _Classes:
    """Returns the pictures of each class folder, and appends other files to `unused`."""
    folders, files = _entries(folder)
    unused += files
    if not folders:
        raise InputError(
            "data_dir",
            f"must contain a folder of pictures for each class, but {folder} has no folders; move "
            "the pictures of each class to a folder with its name.",
        )
    found = {}
    for class_folder in folders:
        inner, files = _entries(class_folder)
        if inner:
            raise InputError(
                "data_dir",
                f"must contain pictures directly in the class folders, but {class_folder} contains "
                f"the folder {inner[0].name}; pass the folder whose subfolders are the classes.",
            )
        found[class_folder.name] = [
            file for file in files if file.suffix.lower() in pictures.SUFFIXES
        ]
        others = [file for file in files if file.suffix.lower() not in pictures.SUFFIXES]
        if not found[class_folder.name]:
            has = f", only others such as {others[0].name}" if others else ""
            raise InputError(
                "data_dir",
                f"must contain pictures of each class, but {class_folder} has no PNG or JPEG files"
                f"{has}; add pictures, or remove the folder.",
            )
        unused += others
    return found


def _entries(folder: Path) -> tuple[list[Path], list[Path]]:
    """Returns the folders and the files in a folder, sorted and without hidden ones."""
    try:
        inside = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise InputError(
            "data_dir",
            f"contains {folder}, which cannot be read ({error.strerror}); change its permissions.",
        ) from error
    folders = [path for path in inside if path.is_dir()]
    return folders, [path for path in inside if not path.is_dir()]


def _numbered(
    folder: Path, splits: Mapping[str, _Classes]
) -> tuple[tuple[str, ...], dict[str, np.ndarray]]:
    """Returns the class names, and the class index of each picture by split, `int32[pictures]`."""
    classes, _ = from_words([*splits["train"]])
    if len(classes) < 2:
        raise InputError(
            "data_dir",
            f"must contain folders of at least two classes, but {folder} has only "
            f"{', '.join(classes)}; add a folder for each further class.",
        )
    find = finder(classes)
    labels = {}
    for name, split in splits.items():
        for word in split:
            if find(word) is None:
                raise InputError(
                    "data_dir",
                    f"must contain the same classes in {name} as in train, but train has no folder "
                    f"{word}{did_you_mean(word, classes)}",
                )
        labels[name] = np.repeat(
            np.array([find(word) for word in split], np.int32),
            [len(files) for files in split.values()],
        )
    return classes, labels


def _check_readable(paths: Sequence[Path], is_readable: np.ndarray) -> None:
    unreadable = np.flatnonzero(~is_readable)
    if len(unreadable):
        raise InputError(
            "data_dir",
            "must contain complete PNG and JPEG pictures, but has damaged ones "
            f"({len(unreadable):,} of {len(paths):,}, such as {paths[unreadable[0]]}); restore or "
            "remove them, or pass skip_unreadable (--skip-unreadable).",
        )


def _check_kept(
    classes: Sequence[str], labels: Mapping[str, np.ndarray], kept: Mapping[str, np.ndarray]
) -> None:
    """Raises InputError if all pictures of a class in a split are unreadable."""
    for name in labels:
        lost = np.setdiff1d(labels[name], kept[name])
        if len(lost):
            raise InputError(
                "data_dir",
                "must contain readable pictures of each class, but all pictures of "
                f"{classes[lost[0]]} in the {name} split are damaged; restore them, or remove "
                "their folder.",
            )


def _in_splits(
    pixels: np.ndarray | DiskArray, labels: Mapping[str, np.ndarray]
) -> dict[str, Split]:
    """Assigns consecutive rows to the splits, which have one label for each row."""
    splits = {}
    start = 0
    for name, of_split in labels.items():
        end = start + len(of_split)
        if isinstance(pixels, DiskArray):
            inputs = pixels.select(np.arange(start, end))
        else:
            inputs = pixels[start:end]
        splits[name] = Split(inputs, of_split)
        start = end
    return splits


def _notes(paths: Sequence[Path], decoded: pictures.Decoded, unused: Sequence[Path]) -> list[str]:
    pixels = decoded.pixels
    notes = []
    if unused:
        notes.append(
            f"Other files are not used ({len(unused):,}, such as {unused[0]}); pictures are PNG "
            "and JPEG files in class folders."
        )
    unreadable = np.flatnonzero(~decoded.is_readable)
    if len(unreadable):
        notes.append(
            f"Files that are not complete pictures are skipped ({len(unreadable):,} of "
            f"{len(paths):,}, such as {paths[unreadable[0]]})."
        )
    color = "in RGB" if pixels.ndim == 4 else "in gray"
    read = ", from which training reads them" if isinstance(pixels, DiskArray) else ""
    notes.append(
        f"The pictures were decoded to {pixels.shape[1]} x {pixels.shape[2]} pixels {color}, into "
        f"{decoded.path} ({decimal(decoded.path.stat().st_size)}){read}."
    )
    return notes
