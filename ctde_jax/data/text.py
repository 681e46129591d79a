"""A text, character by character: each window is an example, and its next characters the labels."""

import codecs
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ctde_jax.data.dataset import Dataset
from ctde_jax.data.files import check_size, faulty, not_utf8, opened
from ctde_jax.data.split import Split
from ctde_jax.devices import memory
from ctde_jax.errors import InputError, check_at_least

TRAINING_TENTHS = 9


def from_text(path: Path | str, length: int = 128, stride: int | None = None) -> Dataset:
    """Loads a UTF-8 text as windows: the first nine tenths for training, the rest for testing.

    A character's token is its index in the vocabulary, the sorted characters of the whole text.
    Inputs and labels are `int32[examples, length]`; a label is the token after its input.

    By default, windows do not overlap, so every character is predicted once per epoch. With a
    stride smaller than the length, it is predicted in several windows, which multiplies the memory
    and the steps per epoch.

    Args:
        path: Text file.
        length: Window length, in characters.
        stride: Distance between the starts of training windows, in characters; by default the
            length, so that windows do not overlap. Test windows never overlap.

    Raises:
        InputError: If the file cannot be opened or is not UTF-8, the training or test part has
            fewer than `length + 1` characters, the windows do not fit into memory, or the length or
            the stride is less than 1.

    Examples:
        >>> from pathlib import Path
        >>> characters = Path("song.txt").write_text("la la li lu " * 100)
        >>> data = ctde.data.from_text("song.txt", length=32)
        >>> data.vocabulary, data.train.inputs.shape
        ((' ', 'a', 'i', 'l', 'u'), (33, 32))
    """
    check_at_least(1, length=length, stride=stride)

    # The vocabulary covers the test part, too, so that all of its characters have tokens.
    path = Path(os.path.expanduser(path))
    text = _read(path)
    vocabulary = tuple(sorted(set(text)))
    tokens = encode(text, vocabulary)
    train, test = np.split(tokens, [len(tokens) * TRAINING_TENTHS // 10])
    _check_long_enough(path, length, training=len(train), test=len(test))

    # Overlapping windows may take a multiple of the text: 4 bytes each for an input and its label.
    stride = stride or length
    windows = (len(train) - length - 1) // stride + 1
    memory.check(
        "window", f"{windows:,} training windows", 8 * windows * length, "lower it, or raise stride"
    )

    # Report the characters after the last window of each part, and those between sparse windows.
    unused = (
        len(train) - _covered(len(train), length, stride),
        len(test) - _covered(len(test), length, length),
    )
    notes = (
        f"The first {len(train):,} characters are for training and the last {len(test):,} for "
        "testing.",
        f"The windows omit {unused[0]:,} characters of the training part and {unused[1]:,} of the "
        "test part.",
    )
    return Dataset(
        name=path.stem,
        train=_windows(train, length, stride),
        test=_windows(test, length, length),
        classes=(),
        shift=np.zeros((), np.int32),
        scale=np.ones((), np.int32),
        notes=notes if any(unused) else notes[:1],
        vocabulary=vocabulary,
    )


def encode(text: str, vocabulary: Sequence[str]) -> np.ndarray:
    """Converts a text to tokens, `int32[characters]`.

    Args:
        text: Text of any length.
        vocabulary: Characters, in the order of their tokens; `vocabulary` of a `Dataset`.

    Raises:
        InputError: If a character is not in the vocabulary.

    Examples:
        >>> ctde.data.encode("abba", vocabulary=["a", "b"])
        array([0, 1, 1, 0], dtype=int32)
    """
    # A table of all code points, because a loop over the characters would be slow.
    token_of = np.full(sys.maxunicode + 1, -1, np.int32)
    token_of[_code_points("".join(vocabulary))] = np.arange(len(vocabulary))
    tokens = token_of[_code_points(text)]

    unknown = tokens < 0
    if unknown.any():
        place = int(unknown.argmax())
        raise InputError(
            "text",
            f"must consist of the {len(vocabulary)} characters of the vocabulary, got "
            f"{text[place]!r} at position {place:,}; remove or replace it.",
        )
    return tokens


def decode(tokens: np.typing.ArrayLike, vocabulary: Sequence[str]) -> str:
    """Converts tokens to a text.

    Args:
        tokens: Indices into the vocabulary, `int[characters]`.
        vocabulary: Characters, in the order of their tokens.

    Raises:
        InputError: If a token is not an index into the vocabulary.

    Examples:
        >>> ctde.data.decode([0, 1, 1, 0], vocabulary=["a", "b"])
        'abba'
    """
    tokens = np.asarray(tokens)
    outside = (tokens < 0) | (tokens >= len(vocabulary))
    if outside.any():
        raise InputError(
            "tokens", f"must be from 0 to {len(vocabulary) - 1}, got {tokens[outside][0]}."
        )
    return "".join(vocabulary[int(token)] for token in tokens)


def _read(path: Path) -> str:
    with opened(path) as file:
        check_size(file)
        stored = file.read()
    try:
        text = stored.removeprefix(codecs.BOM_UTF8).decode()
    except UnicodeDecodeError as error:
        # The offsets of the decoder start after the byte order mark.
        offset = len(stored) - len(error.object) + error.start
        fault = f"has the byte 0x{stored[offset]:02x} at the offset {offset:,}"
        raise not_utf8(path, stored, fault) from error
    if not text:
        raise faulty(path, "is empty", "pass a file that contains text")
    return text


def _check_long_enough(path: Path, length: int, **characters: int) -> None:
    """Raises InputError if a part of the text has fewer than `length + 1` characters.

    Args:
        path: Path of the text.
        length: Window length.
        **characters: Number of characters of each part, by its name.
    """
    part, shortest = min(characters.items(), key=lambda item: item[1])
    if shortest <= length:
        longest = shortest - 1
        raise faulty(
            path,
            f"has {shortest:,} characters in the {part} part, but a window and its last label need "
            f"{length + 1:,}",
            f"pass a longer text{f', or a window of at most {longest:,}' if longest > 0 else ''}",
        )


def _windows(tokens: np.ndarray, length: int, stride: int) -> Split:
    # A window and the label of its last character; inputs and labels overlap, and are copied.
    windows = np.lib.stride_tricks.sliding_window_view(tokens, length + 1)[::stride]
    return Split(np.ascontiguousarray(windows[:, :-1]), np.ascontiguousarray(windows[:, 1:]))


def _covered(characters: int, length: int, stride: int) -> int:
    """Counts the characters that occur in a window or as a label."""
    # Each further window adds `stride` characters, or all of its characters if there are gaps.
    others = (characters - length - 1) // stride
    return others * min(stride, length + 1) + length + 1


def _code_points(text: str) -> np.ndarray:
    # `surrogatepass`, as a string may hold lone surrogates, which UTF-32 does not encode otherwise.
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")
