"""Reads examples from files: numpy arrays, tables, and PNG pictures."""

import math
import re
import warnings
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ctde_jax.bundle.card import Card
from ctde_jax.bundle.reading import finder, number_of
from ctde_jax.bundle.tables import STANDARD_INPUT, cells_of, encode, faulty, read_csv, read_table
from ctde_jax.errors import InputError, quoted, shortened

INPUTS = "x_test"
LABELS = "y_test"
"""Names of the arrays in a .npz file, as in the files for training."""

_KINDS = {".npy", ".npz", ".csv", ".png"}

# Uncompressed size of a .npz file.
_MOST_BYTES = 2**33


class Examples(NamedTuple):
    """Inputs and labels that were read from files."""

    inputs: np.ndarray  # [examples, *input_shape], in the dtype of the card
    labels: np.ndarray | None  # int32[examples] or int32[examples, length]


def read(
    paths: Sequence[Path], card: Card, label_column: str | None = None, *, labeled: bool = False
) -> Examples:
    """Reads examples from one .npy, .npz or .csv file, or from one or more .png files.

    If the card has a recipe, they are rows of a table: a .csv file, a .jsonl file, or JSON lines
    from the standard input.

    Args:
        paths: Paths of the files.
        card: Card of the model that is to run on the examples.
        label_column: Name of the label column of a .csv file (default: the last column that holds
            no feature). If the card names the columns of the training table and the file has a
            header, features are found by these names and other columns are ignored.
        labeled: Whether labels are required; if not, they are ignored.

    Returns:
        The inputs, and the labels if `labeled`, else None.

    Raises:
        InputError: If a file cannot be read, its content does not fit the card, or required labels
            are missing.
    """
    # A score is defined only for logits of classes or tokens.
    if labeled and card.predicts not in ("classes", "tokens"):
        raise InputError(
            "input",
            "cannot be scored, as the model predicts neither classes nor tokens.",
        )
    examples = _read(paths, card, label_column, labeled)

    # One label for each example, if there are labels.
    if labeled and examples.labels is None:
        raise InputError(
            "input", f"requires labels: {LABELS} in a .npz file, or a label column in a .csv file."
        )
    if examples.labels is not None and len(examples.labels) != len(examples.inputs):
        fault = f"has {len(examples.labels)} labels for {len(examples.inputs)} examples"
        raise faulty(paths[0], fault, "provide one label per example")
    return examples


def _read(paths: Sequence[Path], card: Card, label_column: str | None, labeled: bool) -> Examples:
    # Several files may be given only for pictures, each of which is one example.
    kinds = {path.suffix.lower() for path in paths}
    if len(paths) > 1 and kinds != {".png"}:
        raise InputError(
            "input", f"must be one file, or several .png files, got {', '.join(map(str, paths))}."
        )
    if card.recipe is not None:
        return _of_table(paths[0], card, label_column, labeled)
    if label_column is not None and kinds != {".csv"}:
        raise InputError("label_column", f"requires a .csv file, got {paths[0]}.")
    for path in paths:
        if kinds <= _KINDS and not path.is_file():
            raise InputError("input", f"must be a file, but {path} is not one.")
    match kinds.pop():
        case ".npy":
            return Examples(_fitting(paths[0], _array(paths[0]), card), None)
        case ".npz":
            return _of_npz(paths[0], card, labeled)
        case ".csv":
            return _of_csv(paths[0], card, label_column, labeled)
        case ".png":
            return Examples(np.stack([_of_png(path, card) for path in paths]), None)
        case other:
            raise InputError(
                "input",
                f"must be a .npy, .npz, .csv or .png file, got {quoted(other or str(paths[0]))}.",
            )


def _array(path: Path) -> np.ndarray:
    # Map the file into memory, so that the shape is checked before the content is read.
    try:
        with warnings.catch_warnings(action="ignore"):
            array = np.load(path, mmap_mode="r", allow_pickle=False)
            if not isinstance(array, np.ndarray):
                raise faulty(path, "contains no array", "save one with numpy.save")
            return array
    except InputError:
        raise
    # A malformed header raises exceptions of many types.
    except Exception as error:
        raise faulty(
            path,
            f"is not a complete .npy file ({shortened(str(error))})",
            "save it with numpy.save",
        ) from error


def _of_npz(path: Path, card: Card, labeled: bool) -> Examples:
    try:
        with warnings.catch_warnings(action="ignore"), np.load(path, allow_pickle=False) as archive:
            # A small file can decompress to any size; the index of the archive has the real sizes.
            if sum(member.file_size for member in archive.zip.infolist()) > _MOST_BYTES:
                raise faulty(
                    path, "would take more than 8 GiB of memory", "split it into several files"
                )

            # A single array needs no particular name.
            names = archive.files
            inputs = INPUTS if INPUTS in names else names[0] if len(names) == 1 else None
            if inputs is None:
                raise faulty(
                    path,
                    f"has the arrays {', '.join(names[:9]) or 'none'}",
                    f"name its inputs {INPUTS}",
                )
            arrays = archive[inputs], archive[LABELS] if labeled and LABELS in names else None
    except InputError:
        raise
    # Malformed content raises many types, in zipfile, its decompressors and numpy.
    except Exception as error:
        raise faulty(
            path,
            f"is not a complete .npz file ({shortened(str(error))})",
            "save it with numpy.savez",
        ) from error
    return Examples(
        _fitting(path, arrays[0], card),
        None if arrays[1] is None else _labels(path, arrays[1], card),
    )


def _labels(path: Path, labels: np.ndarray, card: Card) -> np.ndarray:
    # Strings are names of classes.
    if labels.dtype.kind in "SU" and labels.ndim == 1:
        words = np.char.decode(labels, "utf-8", "replace") if labels.dtype.kind == "S" else labels
        return _labels_of_words(path, words.tolist(), card)

    # Integers are indices: one per example, or one per position of a sequence.
    wanted = card.output_shape[:-1]
    highest = card.output_shape[-1]
    if labels.dtype.kind not in "iu" or labels.shape[1:] != wanted:
        shape = ", ".join(["examples", *map(str, wanted)])
        raise faulty(
            path,
            f"has labels of {labels.dtype} {list(labels.shape)}",
            f"provide integers of the shape [{shape}]",
        )
    if labels.size and not (labels.min() >= 0 and labels.max() < highest):
        raise faulty(
            path,
            f"has labels from {labels.min()} to {labels.max()}",
            f"provide labels from 0 to {highest - 1}",
        )
    return labels.astype(np.int32)


def _fitting(path: Path, array: np.ndarray, card: Card) -> np.ndarray:
    """Validates an array of examples, or a single example, and converts it to the card's dtype.

    Returns:
        Inputs `[examples, *input_shape]`, at least one example.

    Raises:
        InputError: If the shape, dtype or range of the array does not match the card.
    """
    shape = card.input_shape
    if array.shape == shape:
        array = array[None]
    if array.shape[1:] != shape or not array.ndim:
        raise faulty(
            path,
            f"has the shape {list(array.shape)}",
            f"provide examples of the shape {list(shape)}",
        )
    if array.dtype.kind not in "biuf":
        raise faulty(path, f"contains {array.dtype}", f"provide numbers of {card.input_dtype}")
    if not len(array):
        raise faulty(path, "contains no example", "provide at least one")
    try:
        return card.accepted.conform("inputs", array)
    except InputError as error:
        raise InputError("input", f"{path} {error.sentence}") from error


def _of_table(path: Path, card: Card, label_column: str | None, labeled: bool) -> Examples:
    """Reads raw rows, and converts them by the recipe of the card."""
    assert card.recipe is not None
    if path != STANDARD_INPUT and not path.is_file():
        raise InputError("input", f"must be a file, but {path} is not one.")
    table = read_table(path)
    inputs = encode(path, table, card.recipe)
    if not labeled:
        return Examples(inputs, None)
    words = cells_of(path, table, label_column or card.recipe.label)
    return Examples(inputs, _labels_of_words(path, words, card))


class _Columns(NamedTuple):
    """Indices of the table columns that hold the features and the label."""

    has_header: bool
    features: list[int]
    label: int | None


def _of_csv(path: Path, card: Card, label_column: str | None, labeled: bool) -> Examples:
    rows = [row.cells for row in read_csv(path)]
    columns = _columns(path, rows, card, label_column)
    examples = rows[columns.has_header :]
    numbers = _numbers(
        path, [[cells[place] for place in columns.features] for cells in examples], card
    )
    inputs = _fitting(path, numbers, card)
    if columns.label is None or not labeled:
        return Examples(inputs, None)
    return Examples(
        inputs, _labels_of_words(path, [cells[columns.label] for cells in examples], card)
    )


def _columns(path: Path, rows: list[list[str]], card: Card, label_column: str | None) -> _Columns:
    """Determines whether the table has a header, and which columns hold the features and the label.

    Columns are found by the names of the training table if the header has all of them, otherwise by
    their position.

    Raises:
        InputError: If the columns do not match the card.
    """
    # The first line is a header if it has the names of the training table, the numbers with which
    # pandas names columns, text, or other column numbers.
    width = math.prod(card.input_shape)
    is_named = bool(card.columns) and {*card.columns} <= {*rows[0]}
    is_counted = width > 1 and rows[0][:width] == [str(place) for place in range(width)]
    has_words = any(cell and number_of(cell) is None for cell in rows[0][:width])
    has_header = is_named or is_counted or has_words or _has_column_numbers(rows, width, card)
    if has_header and len(rows) == 1:
        raise faulty(path, "has a header line but no examples", "add one line per example")
    names = rows[0] if has_header else []
    if label_column is not None and label_column not in names:
        raise InputError("label_column", f"must be a column of {path}, got {quoted(label_column)}.")

    # By name: the columns may have any order, and others may stand between them.
    if is_named:
        features = [names.index(name) for name in card.columns]
        others = [place for place in range(len(names)) if place not in features]
        label = names.index(label_column) if label_column is not None else max(others, default=None)
        return _Columns(True, features, label)

    # By position: the features in the order of the training table, and possibly a label.
    if has_header and card.columns:
        missing = ", ".join(quoted(name) for name in card.columns if name not in names)
        raise faulty(
            path, f"has no column {missing}", "name its columns like those of the training table"
        )
    count = len(rows[0])
    if count not in (width, width + 1):
        fault = f"has {count} columns"
        raise faulty(
            path, fault, f"provide {width} features per line, optionally followed by the label"
        )

    # With an index column, every feature would be read from the column before it.
    if label_column is None and count == width + 1 and _starts_with_index(rows[has_header:], card):
        fault = "numbers its lines in the first column, like the index that pandas writes"
        raise faulty(path, fault, "remove the index, or add a header and pass label_column")

    # The label is the last column, unless the user has named another one.
    label = None
    if count == width + 1:
        label = width if label_column is None else names.index(label_column)
    return _Columns(has_header, [place for place in range(count) if place != label], label)


def _numbers(path: Path, cells: list[list[str]], card: Card) -> np.ndarray:
    """Parses the features, float64 or int64 `[examples, *input_shape]`."""
    for example, row in enumerate(cells, start=1):
        for cell in row:
            if number_of(cell) is None:
                raise faulty(path, f"has {quoted(cell)} in example {example}", "provide a number")
    numbers = np.array([[number_of(cell) for cell in row] for row in cells]).reshape(
        -1, *card.input_shape
    )
    if card.input_dtype == "float32":
        return numbers
    if not (np.isfinite(numbers).all() and np.array_equal(numbers, np.rint(numbers))):
        raise faulty(path, f"contains numbers that are not {card.input_dtype}", "provide integers")
    # Clip to what int64 can hold; `_fitting` checks the range of the card.
    return np.clip(numbers, -(2.0**62), 2.0**62).astype(np.int64)


def _has_column_numbers(rows: list[list[str]], width: int, card: Card) -> bool:
    """Returns whether the first line holds column numbers instead of features.

    Its first `width` cells must be two or more distinct integers from 0 to 9999, and other lines
    must follow. Besides, one of these must hold:

    - no other line contains an integer;
    - there are more than three cells, each one more than the previous one, and no other line has
      such cells;
    - there are more than three cells in ascending order, all column names of the card are integers,
      and more than half of the cells are among them.
    """
    first = rows[0][:width]
    others = [row[:width] for row in rows[1:]]
    if width < 2 or not others or len({*first}) < width or not all(map(_is_column_number, first)):
        return False
    # Integers above columns of decimals are names.
    if not any(re.fullmatch(r"[-+]?\d+", cell) for cells in others for cell in cells):
        return True
    # A sequence such as 5, 6, 7, 8 that no other line has is that of the column numbers.
    if width > 3 and _counts(first) and not any(map(_counts, others)):
        return True
    # Some columns of the training table, in their order.
    names = {*card.columns}
    are_known = all(map(_is_column_number, names)) and 2 * len(names.intersection(first)) > width
    return are_known and width > 3 and first == sorted(first, key=int)


def _is_column_number(name: str) -> bool:
    return re.fullmatch(r"0|[1-9]\d{0,3}", name) is not None


def _counts(cells: list[str]) -> bool:
    """Returns whether each number is one more than the previous one."""
    numbers = [number_of(cell) for cell in cells]
    return all(one is not None and two == one + 1 for one, two in pairwise(numbers))


def _starts_with_index(rows: list[list[str]], card: Card) -> bool:
    """Returns whether the first column is probably an index, and not a feature.

    It must number the lines from 0 or 1, and the last column must possibly be a feature: it has a
    cell that is not a class name, or numbers only. A single line has an index only if the card has
    class names and the last cell is none of them.
    """
    first = [number_of(row[0]) for row in rows]
    if not any(
        all(number == place for place, number in enumerate(first, start)) for start in (0, 1)
    ):
        return False
    last = {row[-1] for row in rows}
    are_labels = bool(card.classes) and None not in map(finder(card.classes), last)
    if len(rows) == 1:
        return bool(card.classes) and not are_labels
    return not are_labels or all(number_of(cell) is not None for cell in last)


def _labels_of_words(path: Path, words: list[str], card: Card) -> np.ndarray:
    # A language model has a label at every position, which one column cannot hold.
    if card.predicts != "classes":
        raise faulty(
            path,
            "has one label per example, but the model predicts every position",
            "provide the labels of all positions in a .npz file",
        )
    # Classes without names are called by their indices.
    names = card.classes or [str(number) for number in range(card.output_shape[0])]
    labels = list(map(finder(names), words))
    if None in labels:
        fault = f"has the label {quoted(words[labels.index(None)])}"
        raise faulty(path, fault, f"use one of {', '.join(names[:20])}")
    return np.array(labels, np.int32)


def _of_png(path: Path, card: Card) -> np.ndarray:
    """Reads a picture as uint8 `input_shape`, from 0 for black to `card.highest` for white.

    Raises:
        InputError: If Pillow is not installed, the model does not take uint8 images, or the picture
            cannot be read, has a different size or is transparent.
    """
    # Pillow is optional, since only pictures need it.
    try:
        from PIL import Image
    except ImportError as error:
        raise InputError(
            "input",
            "requires Pillow for .png files; run `pip install pillow`, or pass a .npy file.",
        ) from error

    # Models of other dtypes or shapes have no defined conversion from pixels.
    shape = card.input_shape
    channels = shape[2] if len(shape) == 3 else 1
    if card.input_dtype != "uint8" or len(shape) not in (2, 3) or channels not in (1, 3):
        raise InputError(
            "input",
            f"must be a .npy, .npz or .csv file, as the model reads {card.input_dtype} "
            f"{list(shape)}.",
        )

    # Decode to float64 from 0 to 255. Pillow's `convert` would clip 16-bit pixels, so these are
    # divided by 257 = 65535 / 255 instead.
    try:
        with Image.open(path, formats=["PNG"]) as picture:
            if (picture.height, picture.width) != shape[:2]:
                fault = f"has {picture.height} x {picture.width} pixels"
                raise faulty(path, fault, f"provide an image of {shape[0]} x {shape[1]}")
            if (
                picture.has_transparency_data
                and np.asarray(picture.convert("RGBA"))[..., 3].min() < 255
            ):
                raise faulty(path, "has transparent pixels", "save it without transparency")
            is_deep = picture.mode.startswith("I")
            plain = picture if is_deep else picture.convert("L" if channels == 1 else "RGB")
            pixels = np.asarray(plain, np.float64) / (257 if is_deep else 1)
            if is_deep and channels == 3:
                pixels = np.repeat(pixels[..., None], 3, axis=-1)
    except InputError:
        raise
    # A malformed picture raises exceptions of many types.
    except Exception as error:
        raise faulty(
            path, f"is not a complete PNG image ({shortened(str(error))})", "save it again"
        ) from error

    # White, 255, becomes `card.highest`.
    return np.rint(pixels * card.highest / 255).astype(np.uint8).reshape(shape)
