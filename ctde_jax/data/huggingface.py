"""Data sets of the library `datasets` of Hugging Face, which is not imported here."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from ctde_jax.data import pictures
from ctde_jax.data.dataset import Dataset, from_arrays
from ctde_jax.data.folder import height_and_width
from ctde_jax.devices import memory
from ctde_jax.errors import InputError, check_known, quoted, shortened

_SPLITS = ("train", "test", "validation")

_NUMBERS = (
    *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    *("float16", "float32", "float64"),
)
"""Dtypes of columns of numbers, and of the numbers in lists."""


def from_huggingface(
    ds: Any,
    inputs: str | Sequence[str] = "image",
    labels: str = "label",
    *,
    test: Any = None,
    image_size: int | Sequence[int] | None = None,
    weights: str | None = None,
) -> Dataset:
    """Loads a `datasets.Dataset`, or a `datasets.DatasetDict`, into memory.

    Of a `DatasetDict`, the splits `train`, `test` and `validation` are used. Without a test split,
    a random fifth of the training examples (always the same) becomes the test split.

    Pictures become `uint8[examples, height, width]` if all pictures of the training split are gray,
    otherwise `uint8[examples, height, width, 3]` in RGB, as in `from_folder`. Numbers, lists and
    arrays of them are treated as in `from_arrays`.

    Args:
        ds: Data set with a length, or a dictionary of such data sets by the name of the split.
        inputs: Name of the column of pictures or of lists of numbers, or names of several columns
            of numbers.
        labels: Name of the column of labels. Those of a `ClassLabel` have the names of its classes.
        test: Test split; by default that of `ds`.
        image_size: Height and width, or one number for both, to which pictures are resized as in
            `from_folder`. By default all pictures must have the same size.
        weights: Name of the column of sample weights of the training split; see `weighted`.

    Raises:
        InputError: If `ds` is not such a data set or has no training split, a column is missing or
            contains other values, pictures are missing, damaged, of 16 bits or of different sizes,
            the pixels do not fit into memory, or the arrays do not make a data set.

    Examples:
        >>> import datasets  # doctest: +SKIP
        >>> ds = datasets.load_dataset("uoft-cs/cifar10")  # doctest: +SKIP
        >>> data = ctde.data.from_huggingface(ds, inputs="img")  # doctest: +SKIP
    """
    splits = _splits(ds, test)
    names = (inputs,) if isinstance(inputs, str) else tuple(inputs)
    weighted = () if weights is None else (weights,)
    for name, split in splits.items():
        of_split = weighted if name == "train" else ()
        _check(name, split, {"inputs": names, "labels": (labels,), "weights": of_split})

    # The numbers of labels are those of the same classes in all splits.
    train = splits["train"]
    classes = getattr(train.features[labels], "names", None)
    for name, split in splits.items():
        if getattr(split.features[labels], "names", None) != classes:
            raise InputError(
                "ds",
                f"must have the same classes in all splits, but those of train and {name} differ; "
                "cast the column of labels.",
            )

    # Read the columns of each split.
    if len(names) == 1 and _is_picture(train, names[0]):
        arrays = _pictures(splits, names[0], height_and_width(image_size))
    else:
        arrays = {name: _stacked(name, split, names) for name, split in splits.items()}
    targets = {name: _values(name, split, labels) for name, split in splits.items()}

    # Make the data set of the arrays, with the validation split like the test split.
    make = partial(
        from_arrays,
        arrays["train"],
        targets["train"],
        name=getattr(train.info, "dataset_name", None) or "huggingface",
        classes=classes,
        weights=None if weights is None else _values("train", train, weights),
    )
    dataset = make(arrays.get("test"), targets.get("test"))
    validation = None
    if "validation" in splits:
        validation = make(arrays["validation"], targets["validation"]).test
    return replace(dataset, validation=validation, columns=() if isinstance(inputs, str) else names)


def _splits(ds: Any, test: Any) -> dict[str, Any]:
    """Returns the splits that are used, by name, with the training split first."""
    found = dict(ds) if isinstance(ds, Mapping) else {"train": ds}
    if test is not None:
        found["test"] = test
    if "train" not in found:
        raise InputError(
            "ds", f"must have a split named train, got {', '.join(found)}; pass one of them."
        )
    return {name: found[name] for name in _SPLITS if name in found}


def _check(name: str, split: Any, columns: Mapping[str, Sequence[str]]) -> None:
    """Raises InputError unless a split has a length and these columns, by option."""
    if not (hasattr(split, "features") and hasattr(split, "__len__")):
        raise InputError(
            "ds",
            "must be a datasets.Dataset or DatasetDict with a length, got "
            f"{type(split).__name__} as {name}; pass batches of a stream to data.from_batches.",
        )
    for option, names in columns.items():
        for column in names:
            check_known(option, column, split.column_names)


def _is_picture(split: Any, column: str) -> bool:
    # The class itself belongs to a library that is not imported.
    return type(split.features[column]).__name__ == "Image"


def _stacked(name: str, split: Any, columns: Sequence[str]) -> np.ndarray:
    """Returns the numbers of one column, or of several, one feature each."""
    if len(columns) == 1:
        values = _values(name, split, columns[0])
        return values[:, None] if values.ndim == 1 else values
    features = [_values(name, split, column) for column in columns]
    for column, values in zip(columns, features, strict=True):
        if values.ndim != 1 or values.dtype.kind not in "biuf":
            raise InputError(
                "inputs",
                f"must be columns of numbers if there are several, but {quoted(column)} is "
                f"{split.features[column]}.",
            )
    return np.stack(features, axis=1)


def _values(name: str, split: Any, column: str) -> np.ndarray:
    """Returns the numbers or texts of a column, `[rows, ...]`, in their dtype."""
    innermost = split.features[column]
    while hasattr(innermost, "feature"):
        innermost = innermost.feature
    stored = getattr(innermost, "dtype", "")
    only = split.select_columns([column])
    if stored in ("string", "large_string"):
        return only.with_format("numpy")[:][column]
    if stored not in _NUMBERS:
        raise InputError(
            "ds",
            f"must contain numbers, texts or pictures in {quoted(column)}, got "
            f"{split.features[column]}; convert the column with ds.map.",
        )

    # In float64, missing integers are NaN; in their dtype, `datasets` gives an arbitrary integer.
    values = only.with_format("numpy", dtype=np.float64)[:][column]
    if values.dtype != np.float64:
        raise InputError(
            "ds", f"must have lists of the same length in {quoted(column)}; pad or cut them."
        )
    missing = np.flatnonzero(np.isnan(values.reshape(len(values), -1)).any(axis=1))
    if len(missing):
        raise InputError(
            "ds",
            f"must not have missing numbers, but {quoted(column)} has one in row {missing[0]} of "
            f"{name}; remove or impute such rows.",
        )
    return values.astype(stored)


def _pictures(
    splits: Mapping[str, Any], column: str, size: tuple[int, int] | None
) -> dict[str, np.ndarray]:
    """Returns the pixels of each split, gray if all pictures are, otherwise RGB."""
    decoded = {name: _decoded(name, split, column, size) for name, split in splits.items()}
    is_gray = all(pixels.ndim == 2 for of_split in decoded.values() for pixels in of_split)
    like = decoded["train"][0].shape[:2]
    for name, of_split in decoded.items():
        for row, pixels in enumerate(of_split):
            if pixels.shape[:2] != like:
                raise InputError(
                    "image_size",
                    "must be given if pictures have different sizes, but row 0 of train has "
                    f"{like[0]} x {like[1]} and row {row} of {name} {pixels.shape[0]} x "
                    f"{pixels.shape[1]} pixels; pass the height and width to resize to.",
                )

    def in_color(pixels: np.ndarray) -> np.ndarray:
        # As Pillow converts gray to RGB: three equal channels.
        is_colored = is_gray or pixels.ndim == 3
        return pixels if is_colored else np.repeat(pixels[..., None], 3, axis=2)

    return {name: np.stack([*map(in_color, of_split)]) for name, of_split in decoded.items()}


def _decoded(name: str, split: Any, column: str, size: tuple[int, int] | None) -> list[np.ndarray]:
    """Decodes the pictures of a column, each to gray or RGB pixels."""
    rows = split.select_columns([column]).with_format(None)
    decoded = []
    for row in range(len(rows)):
        try:
            image = rows[row][column]
        # A damaged picture raises exceptions of many types.
        except Exception as error:
            raise _faulty(
                name, row, f"one that cannot be decoded ({shortened(str(error))})"
            ) from error
        if image is None:
            raise _faulty(name, row, "none")
        # Modes of more than 8 bits, which `convert` would clip.
        if image.mode.startswith(("I", "F")):
            raise _faulty(name, row, f"one of the mode {image.mode}")
        mode = "L" if image.mode in pictures.GRAY else "RGB"
        plain = pictures.without_transparency(image).convert(mode)
        pixels = np.asarray(plain if size is None else pictures.resized(plain, size))
        if not row:
            memory.check(
                "ds",
                f"the pixels of {len(rows):,} pictures",
                len(rows) * pixels.nbytes,
                "lower image_size, or pass batches to data.from_batches",
            )
        decoded.append(pixels)
    return decoded


def _faulty(name: str, row: int, found: str) -> InputError:
    return InputError(
        "ds",
        f"must contain a picture of 8 bits in each row, got {found} in row {row} of {name}; remove "
        "such rows with ds.filter.",
    )
