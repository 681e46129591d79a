"""A text becomes windows of tokens, with the next characters as labels; decoding inverts it."""

from pathlib import Path

import jax
import numpy as np
import pytest

from ctde_jax.data import Dataset, decode, encode, from_text
from ctde_jax.errors import InputError

TEXT = "Größe 5\r\n🙂 \0 the quick brown fox jumps over the lazy dog; " * 4
SHAKESPEARE = Path(__file__).parents[3] / "shared" / "data" / "text" / "tinyshakespeare.txt"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Returns the path of the user's text."""
    return tmp_path / "mine.txt"


def load(path: Path, stored: str | bytes, *window: int) -> Dataset:
    """Writes a text and loads it."""
    path.write_bytes(stored.encode() if isinstance(stored, str) else stored)
    return from_text(path, *window)


def error_message(path: Path, stored: str | bytes, *window: int) -> str:
    """Returns the message of the error that loading raises."""
    with pytest.raises(InputError) as caught:
        load(path, stored, *window)
    return str(caught.value)


def test_windows_and_their_labels_are_slices_of_the_text(path: Path):
    """The training windows start every stride, those for testing every length."""
    data, cut = load(path, TEXT, 10, 3), len(TEXT) * 9 // 10

    for split, part, stride in [(data.train, TEXT[:cut], 3), (data.test, TEXT[cut:], 10)]:
        starts = range(0, len(part) - 10, stride)
        assert [decode(window, data.vocabulary) for window in split.inputs] == [
            part[s : s + 10] for s in starts
        ]
        assert [decode(window, data.vocabulary) for window in split.labels] == [
            part[s + 1 : s + 11] for s in starts
        ]


def test_every_character_is_predicted_once_by_default(path: Path):
    """The labels in sequence are the text without the first character and a partial window."""
    data, cut = load(path, TEXT, 10), len(TEXT) * 9 // 10

    for split, part in [(data.train, TEXT[:cut]), (data.test, TEXT[cut:])]:
        assert (
            decode(split.labels.ravel(), data.vocabulary)
            == part[1 : 1 + (len(part) - 1) // 10 * 10]
        )


def test_tokens_are_not_converted_or_scaled(path: Path):
    data = load(path, TEXT, 10)
    arrays = (*data.train, *data.test, data.shift, data.scale)
    assert {array.dtype for array in arrays} == {np.dtype(np.int32)}
    assert all(array.flags.c_contiguous for array in arrays)
    assert (data.shift, data.scale, data.classes) == (0, 1, ())


def test_vocabulary_is_the_sorted_characters_of_the_whole_text(path: Path):
    data = load(path, "ba" * 50 + "c" * 10, 4)
    assert data.vocabulary == ("a", "b", "c")
    assert repr(data) == "Dataset('mine', 24 training and 2 test examples, 3 characters)"


def test_decoding_inverts_encoding():
    vocabulary = tuple(sorted(set(TEXT)))
    tokens = encode(TEXT, vocabulary)
    assert tokens.dtype == np.int32
    assert [vocabulary[token] for token in tokens] == list(TEXT)
    assert decode(tokens, vocabulary) == decode(jax.numpy.asarray(tokens), vocabulary) == TEXT
    assert decode(encode("", vocabulary), vocabulary) == ""


@pytest.mark.parametrize("text", ["abx", "ab\ud800"])
def test_unknown_character_is_named(text: str):
    with pytest.raises(InputError) as caught:
        encode(text, ("a", "b"))
    assert str(caught.value) == (
        f"text must consist of the 2 characters of the vocabulary, got {text[2]!r} at position 2; "
        "remove or replace it."
    )


@pytest.mark.parametrize("token", [-1, 2])
def test_token_outside_the_vocabulary_is_named(token: int):
    with pytest.raises(InputError, match=f"tokens must be from 0 to 1, got {token}"):
        decode([0, token], ("a", "b"))


@pytest.mark.parametrize("stride", [1, 3, 4, 5, 6, 9])
@pytest.mark.parametrize("characters", [60, 61, 62, 63, 99])
def test_characters_that_no_window_covers_are_counted(path: Path, characters: int, stride: int):
    """The count is that of the positions that occur in no input and no label."""
    text = "".join(map(chr, range(0x4E00, 0x4E00 + characters)))  # each character occurs once
    data = load(path, text, 4, stride)

    seen = [
        len(np.unique(np.concatenate([split.inputs, split.labels], axis=1)))
        for split in (data.train, data.test)
    ]
    train = characters * 9 // 10
    test = characters - train
    train_unused, test_unused = train - seen[0], test - seen[1]
    parts, *left_out = data.notes
    assert (
        parts == f"The first {train} characters are for training and the last {test} for testing."
    )
    unused = (
        f"The windows omit {train_unused} characters of the training part and {test_unused} "
        "of the test part."
    )
    assert left_out == ([unused] if train_unused or test_unused else [])


def test_byte_order_mark_is_not_a_character(path: Path):
    assert load(path, b"\xef\xbb\xbf" + b"ab" * 50, 4).vocabulary == ("a", "b")


@pytest.mark.parametrize(
    ("stored", "window", "fault"),
    [
        (b"", (), "is empty; pass a file that contains text."),
        (b"\xef\xbb\xbf", (), "is empty; pass a file that contains text."),
        (
            b"abc\xff",
            (),
            "has the byte 0xff at the offset 3, which is not valid UTF-8; save it in UTF-8.",
        ),
        (
            b"\xef\xbb\xbfabc\xff",
            (),
            "has the byte 0xff at the offset 6, which is not valid UTF-8; save it in UTF-8.",
        ),
        (
            "ä" * 9,
            (),
            (
                "has 1 characters in the test part, but a window and its last label need 129; "
                "pass a longer text."
            ),
        ),
        (
            "ab" * 50,
            (10,),
            "has 10 characters in the test part, but a window and its last label need 11; pass a "
            "longer text, or a window of at most 9.",
        ),
        (
            "a",
            (1,),
            "has 0 characters in the training part, but a window and its last label need 2",
        ),
    ],
)
def test_unusable_text_is_refused(
    path: Path, stored: str | bytes, window: tuple[int, ...], fault: str
):
    assert error_message(path, stored, *window).startswith(f"data_file {path} {fault}")


def test_longest_window_in_the_error_message_works(path: Path):
    assert len(load(path, "ab" * 50, 9).test.inputs) == 1


def test_file_that_cannot_be_opened_is_named(path: Path):
    with pytest.raises(
        InputError, match=r"mine\.txt cannot be opened \(No such file or directory\)"
    ):
        from_text(path)


@pytest.mark.parametrize(
    ("window", "fault"), [((0,), "length must be at least 1"), ((4, 0), "stride must be at least")]
)
def test_window_or_stride_of_zero_is_refused(path: Path, window: tuple[int, ...], fault: str):
    assert error_message(path, "ab" * 50, *window).startswith(fault)


@pytest.mark.skipif(not SHAKESPEARE.is_file(), reason="the text is not in ../shared/data/text")
def test_shakespeare_has_65_characters():
    data = from_text(SHAKESPEARE)
    assert (
        repr(data)
        == "Dataset('tinyshakespeare', 7,842 training and 871 test examples, 65 characters)"
    )
    assert decode(data.train.inputs[0][:14], data.vocabulary) == "First Citizen:"
