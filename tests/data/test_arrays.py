"""Arrays of any library and dtype train with the same numbers, or are refused clearly."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from scipy import sparse

from ctde_jax import data, models
from ctde_jax.errors import InputError

RNG = np.random.default_rng(0)
X = RNG.normal(size=(60, 4)).astype(np.float32)
Y = np.arange(60) % 3
WORDS = np.array(["cat", "dog", "owl"])[Y]


class Frame:
    """The part of a pandas table that numpy uses."""

    def __init__(self, array: np.ndarray):
        self.array = array

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return self.array.astype(dtype or self.array.dtype)

    def __len__(self) -> int:
        return len(self.array)


def mixed() -> np.ndarray:
    """Returns a table with columns of several types, which is an array of objects."""
    objects = np.empty((60, 3), object)
    objects[:, 0], objects[:, 1], objects[:, 2] = X[:, 0].tolist(), Y.tolist(), (Y == 1).tolist()
    return objects


def error_message(*arrays, **options) -> str:
    with pytest.raises(InputError) as caught:
        data.from_arrays(*arrays, **options)
    return str(caught.value)


KINDS = {
    "float64": (X.astype(np.float64), X),
    "float16": (X.astype(np.float16), X.astype(np.float16)),
    "longdouble": (X.astype(np.longdouble), X),
    "bfloat16": (X.astype(ml_dtypes.bfloat16), X.astype(ml_dtypes.bfloat16)),
    "JAX": (jnp.asarray(X), X),
    "list": (X.tolist(), X),
    "masked array without masked values": (np.ma.array(X), X),
    "table": (Frame(X), X),
    "table of several types": (Frame(mixed()), np.column_stack([X[:, 0], Y, Y == 1])),
    "table of integers": (Frame(mixed()[:, 1:]), np.column_stack([Y, Y == 1])),
    "booleans": (X > 0, X > 0),
    "int64": (Y[:, None] - 7, Y[:, None] - 7),
}


@pytest.mark.parametrize("name", KINDS)
def test_inputs_of_any_library_and_type_keep_their_values(name):
    inputs, right = KINDS[name]
    dataset = data.from_arrays(inputs, Y, inputs, Y)
    np.testing.assert_array_equal(
        dataset.train.inputs, np.asarray(right, dataset.train.inputs.dtype)
    )
    assert dataset.train.inputs.dtype in (np.float32, np.int32)


LABELS = {
    "words": WORDS,
    "bytes": WORDS.astype("S"),
    "objects": WORDS.astype(object),
    "list": WORDS.tolist(),
    "table": Frame(WORDS.astype(object)),
}


@pytest.mark.parametrize("name", LABELS)
def test_words_are_classes_in_sorted_order(name):
    dataset = data.from_arrays(X, LABELS[name], X, LABELS[name])
    assert dataset.classes == ("cat", "dog", "owl")
    np.testing.assert_array_equal(dataset.train.labels, Y)
    np.testing.assert_array_equal(dataset.test.labels, Y)


def test_words_that_are_numbers_are_sorted_as_numbers():
    assert data.from_arrays(X, np.array(["1", "10", "9"])[Y]).classes == ("1", "9", "10")


def test_spellings_of_one_number_are_one_class():
    """Also in the test split."""
    dataset = data.from_arrays(
        X, np.array(["1", "10", "9"])[Y], X, np.array(["1.0", "10", "+9"])[Y]
    )
    np.testing.assert_array_equal(dataset.test.labels, np.array([0, 2, 1])[Y])
    dataset = data.from_arrays(X[:4], ["9", "1", "9.0", "1"], X[:1], ["9"])
    assert dataset.classes == ("1", "9")
    np.testing.assert_array_equal(dataset.train.labels, [1, 0, 1, 0])


def test_words_follow_given_classes():
    dataset = data.from_arrays(X, WORDS, X, WORDS, classes=("owl", "dog", "cat", "emu"))
    np.testing.assert_array_equal(dataset.train.labels, 2 - Y)
    sentence = "y_test must be one of cat, dog, owl, got 'cow'; did you mean 'owl'?"
    assert error_message(X, WORDS, X[:1], ["cow"]) == sentence
    assert "y_test must contain class names of the shape [examples], got int64" in error_message(
        X, WORDS, X, Y
    )


def test_npz_may_contain_words(tmp_path):
    np.savez(tmp_path / "mine.npz", x_train=X, y_train=WORDS, x_test=X, y_test=WORDS)
    assert data.from_npz(tmp_path / "mine.npz").classes == ("cat", "dog", "owl")


MIXED = "y_train must contain only text or only numbers, got text and"
FILL = "impute or remove such examples."
REFUSED = {
    "sparse": (
        (sparse.csr_matrix(X), Y),
        "must be a dense array, got a sparse csr_matrix; pass its .toarray().",
    ),
    "sparse array": ((sparse.coo_array(X), Y), "got a sparse coo_array; pass its .toarray()."),
    "masked": (
        (np.ma.masked_less(X, 0), Y),
        "must not contain masked values; replace them with .filled(...).",
    ),
    "fields": (
        (np.zeros(60, [("a", float), ("b", int)]), Y),
        "without fields, got the fields a, b; stack them along an axis.",
    ),
    "ragged": (
        ([[1.0, 2.0], [1.0]], [0, 1]),
        "must contain examples of the same shape, got a ragged list.",
    ),
    "complex": ((X * 1j, Y), "x_train must contain real numbers, got the dtype complex"),
    "dates": (
        (np.zeros((60, 2), "M8[s]"), Y),
        "x_train must contain real numbers, got the dtype datetime64[s].",
    ),
    "words among numbers": (
        (np.array([["a", 1.5]] * 60, object), Y),
        "got str 'a' at [0, 0]; convert or remove it.",
    ),
    "no label": ((X, [None, *WORDS[1:]]), f"{MIXED} NoneType None at [0]; {FILL}"),
    "NaN among words": (
        (X, np.array([*WORDS[1:], np.nan], object)),
        f"{MIXED} float nan at [59]; {FILL}",
    ),
    "NaN in a list of words": ((X, [*WORDS[1:], np.nan]), f"{MIXED} float nan at [59]; {FILL}"),
    "NaN among numbers": (
        (X, np.array([*Y[1:], np.nan])),
        (
            "y_train must be finite, got NaN or infinity for example 59; remove or impute such "
            "examples."
        ),
    ),
    "a column of words": (
        (X, np.array(WORDS, object)[:, None]),
        "y_train must have the shape [examples], got (60, 1); flatten the labels with numpy.ravel.",
    ),
    "a number": ((3, Y), "x_train must have the shape [examples, ...], got ()."),
    "seconds since 1970": (
        (1.7e9 + RNG.integers(0, 60, (60, 1)).astype(np.float64), Y),
        "x_train must contain numbers that float32 distinguishes, got numbers around 17000000",
    ),
    "prices": (
        (X, RNG.integers(10_000, 60_000, 60)),
        "which look like measurements; number the classes without gaps",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_unusable_arrays_are_refused(name):
    arrays, sentence = REFUSED[name]
    assert sentence in error_message(*arrays)


def test_standardized_integers_that_float32_merges_are_refused():
    timestamps = data.from_arrays(1_700_000_000 + RNG.integers(0, 60, (60, 1)), Y)
    with pytest.raises(
        InputError, match="standardized must contain numbers that float32 distinguishes"
    ):
        data.standardized(timestamps)


def test_nearly_equal_float64_numbers_are_accepted():
    """Rounding errors of float64 are not differences that float32 must keep."""
    equal = np.full((60, 1), 1e9)
    equal[::2] = np.nextafter(equal[::2], np.inf)
    assert data.from_arrays(np.hstack([equal, X]), Y).train.inputs.shape == (48, 5)


@pytest.mark.parametrize(("largest", "highest"), [(65_535, 65_535), (4_000, 4_095), (1_023, 1_023)])
def test_images_of_sixteen_bits_are_scaled_between_0_and_1(largest, highest):
    images = RNG.integers(0, largest, (60, 8, 8), np.uint16)
    images[0, 0, 0] = largest
    dataset = data.from_arrays(images, Y, images, Y)
    seen = (dataset.train.inputs - dataset.shift) * dataset.scale
    np.testing.assert_allclose(seen, images / highest, rtol=1e-6)
    assert dataset.notes == (
        (
            f"Images of 16 bits are divided by {highest:,}, as their brightest pixel needs "
            f"{(highest + 1).bit_length() - 1} bits."
        ),
    )


def test_tokens_of_sixteen_bits_stay_tokens():
    tokens = RNG.integers(0, 9, (60, 8), np.uint16)
    assert data.from_arrays(tokens, Y, tokens, Y).scale.dtype == np.int32


PIXELS = RNG.integers(0, 256, (60, 8, 8))
SCALES = {
    "pixels as floats": (
        PIXELS.astype(float),
        "from 0 to 255, but networks train best on numbers around 1; save pixels",
    ),
    "pixels as int64": (PIXELS, "save pixels as uint8, which are divided by 255"),
    "large": (1000 * X, "ctde_jax.data.standardized(data) scales every feature"),
    "small": (1e-5 * X, "ctde_jax.data.standardized(data) scales every feature"),
    "integers": (
        RNG.integers(0, 5000, (60, 3)),
        "this is correct for tokens; for measurements, ctde_jax.data.standardized(data)",
    ),
    "large integers": (
        RNG.integers(0, 2**30, (60, 3)),
        "but float32 rounds those above 16,777,216",
    ),
}


@pytest.mark.parametrize("name", SCALES)
def test_badly_scaled_inputs_are_noted_until_they_are_standardized(name):
    inputs, sentence = SCALES[name]
    dataset = data.from_arrays(inputs, Y, inputs, Y)
    (note,) = dataset.notes
    assert note.startswith("Inputs are not scaled and range from ")
    assert sentence in note
    assert data.standardized(dataset).notes[:-1] == ()


@pytest.mark.parametrize("inputs", [X, X > 0, PIXELS.astype(np.uint8), RNG.integers(0, 9, (60, 3))])
def test_inputs_around_1_are_not_noted(inputs):
    assert data.from_arrays(inputs, Y, inputs, Y).notes == ()


def test_channels_first_are_noted_and_refused_by_networks():
    images = RNG.integers(0, 256, (60, 3, 32, 32), np.uint8)
    (note,) = data.from_arrays(images, Y, images, Y).notes
    assert note.endswith("pass inputs.transpose(0, 2, 3, 1).")
    for build in (lambda: models.cnn((3, 32, 32), 3), lambda: models.resnet((1, 28, 28), 3)):
        with pytest.raises(
            InputError, match=r"which appears to have the channels first; transpose the images with"
        ):
            build()


@pytest.mark.parametrize("shape", [(28, 28), (32, 32, 3), (3, 4, 4), (4, 4, 1), (64, 64, 64)])
def test_other_images_are_not_taken_for_channels_first(shape):
    assert not data.dataset.is_channels_first(shape)


def test_gaps_between_classes_and_classes_without_training_examples_are_noted():
    gap, unseen = (
        data.from_arrays(X, np.where(Y == 0, 3, Y), X[:2], [1, 2]),
        data.from_arrays(X, Y % 2 * 2, X[:2], [0, 1]),
    )
    assert gap.notes == ("No example has the label 0, although classes range from 0 to 3.",)
    assert unseen.notes == (
        "The test split has examples of the classes 1, but the training split has none.",
    )
    assert data.from_arrays(X, Y, X, Y).notes == ()


def test_batches_must_come_from_a_function():
    with pytest.raises(
        InputError,
        match=r"batches must be a function .* got list_iterator; pass lambda epoch: loader",
    ):
        data.from_batches(iter([(X, Y)]), 1, X, Y)


def test_missing_classes_in_batches_are_not_noted():
    """Only the first batch is inspected."""
    dataset = data.from_batches(lambda epoch: [(X[:2], Y[:2])], 1, X, Y)
    assert (dataset.notes, dataset.classes) == ((), ("0", "1", "2"))


TARGETS = X[:, 0] * 3


@pytest.mark.parametrize("shape", [(-1,), (-1, 1)])
@pytest.mark.parametrize("source", ["arrays", "batches"])
def test_integer_test_targets_become_floats_like_the_training_targets(source, shape):
    train, test = TARGETS.reshape(shape), np.arange(60).reshape(shape)
    test = test if test.ndim == 1 else np.hstack([test, test])
    train = train if train.ndim == 1 else np.hstack([train, train])
    if source == "arrays":
        dataset = data.from_arrays(X, train, X, test)
    else:
        dataset = data.from_batches(lambda epoch: [(X, train)], 1, X, test)
    assert (dataset.train.labels.dtype, dataset.test.labels.dtype, dataset.classes) == (
        np.float32,
        np.float32,
        (),
    )
    np.testing.assert_array_equal(dataset.test.labels, test)


@pytest.mark.parametrize(
    ("train", "test", "sentence"),
    [
        (
            TARGETS[:, None],
            TARGETS,
            "y_test must have the shape [examples, 1] like y_train, got [examples]; reshape",
        ),
        (
            TARGETS,
            TARGETS[:, None],
            "y_test must have the shape [examples] like y_train, got [examples, 1]; reshape",
        ),
        (
            np.stack([Y, Y], 1),
            np.stack([Y, Y, Y], 1),
            "y_test must have the shape [examples, 2] like y_train, got",
        ),
        (
            Y,
            Y.astype(float),
            "y_test must be integers like y_train, got float32; convert one of them.",
        ),
    ],
)
def test_test_labels_of_another_kind_are_refused(train, test, sentence):
    assert sentence in error_message(X, train, X, test)
    with pytest.raises(InputError) as caught:
        data.from_batches(lambda epoch: [(X, train)], 1, X, test)
    assert sentence in str(caught.value)


@pytest.mark.parametrize("kind", [int, str])
def test_many_distinct_integers_used_as_classes_are_noted(kind):
    inputs = np.repeat(X, 2, axis=0)
    labels = {different: (np.arange(120) % different).astype(kind) for different in (20, 21)}
    notes = {
        different: data.from_arrays(inputs, each, inputs, each).notes
        for different, each in labels.items()
    }
    assert notes[20] == ()
    (note,) = notes[21]
    assert note.startswith(
        "The 21 distinct integers in y_train are used as classes; if they are measurements,"
    )
