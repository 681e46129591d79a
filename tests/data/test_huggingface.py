"""Data sets of Hugging Face become arrays of the same values."""

import io

import numpy as np
import pytest
from PIL import Image

import ctde_jax as ctde
from ctde_jax.data.dataset import split_rows
from ctde_jax.errors import InputError

datasets = pytest.importorskip("datasets", reason="needs datasets of Hugging Face")
Features, Value, ClassLabel = datasets.Features, datasets.Value, datasets.ClassLabel
read = ctde.data.from_huggingface
RNG = np.random.default_rng(0)
COLOR = RNG.integers(0, 256, (10, 6, 5, 3), np.uint8)
GRAY = RNG.integers(0, 256, (10, 6, 5), np.uint8)
NAMES = ["cat", "dog"]
LABELS = np.arange(10) % 2


def of_pictures(pixels, labels=LABELS) -> "datasets.Dataset":
    features = Features({"image": datasets.Image(), "label": ClassLabel(names=NAMES)})
    images = [Image.fromarray(each) if isinstance(each, np.ndarray) else each for each in pixels]
    columns = {"image": images, "label": [int(label) for label in labels[: len(images)]]}
    return datasets.Dataset.from_dict(columns, features=features)


def of_columns(**columns) -> "datasets.Dataset":
    return datasets.Dataset.from_dict({"label": [0, 1] * 5, **columns})


@pytest.mark.parametrize("pixels", [COLOR, GRAY], ids=["color", "gray"])
def test_pictures_have_the_pixels_and_classes_of_the_data_set(pixels):
    ds = datasets.DatasetDict(
        train=of_pictures(pixels), test=of_pictures(pixels[:4]), validation=of_pictures(pixels[2:5])
    )
    data = read(ds)
    np.testing.assert_array_equal(data.train.inputs, pixels)
    np.testing.assert_array_equal(data.test.inputs, pixels[:4])
    np.testing.assert_array_equal(data.validation.inputs, pixels[2:5])
    np.testing.assert_array_equal(data.validation.labels, LABELS[:3])
    assert data.classes == ("cat", "dog")
    assert data.train.inputs.dtype == np.uint8


def test_data_set_without_test_split_is_divided_like_arrays():
    data = read(of_pictures(COLOR).with_format("numpy"))
    expected = ctde.data.from_arrays(COLOR, LABELS, classes=NAMES)
    np.testing.assert_array_equal(data.train.inputs, expected.train.inputs)
    np.testing.assert_array_equal(data.test.labels, expected.test.labels)
    assert data.notes == expected.notes
    given = read(of_pictures(COLOR), test=of_pictures(COLOR[:3]))
    assert (len(given.train.inputs), len(given.test.inputs)) == (10, 3)


def test_pictures_of_different_sizes_and_modes_are_converted_like_files(tmp_path):
    """Gray, with transparency, with a palette and rotated; resized as in a folder."""
    transparent = Image.fromarray(RNG.integers(0, 256, (9, 8, 4), np.uint8))
    pictures = [Image.fromarray(GRAY[0]), transparent, Image.fromarray(COLOR[0]).convert("P")]
    for number, picture in enumerate(pictures):
        for name in NAMES:
            (tmp_path / "train" / name).mkdir(parents=True, exist_ok=True)
            picture.save(tmp_path / "train" / name / f"{number}.png")
    paths = sorted(tmp_path.rglob("*.png"))
    ds = of_pictures([{"bytes": path.read_bytes()} for path in paths], np.repeat([0, 1], 3))
    expected = ctde.data.from_folder(tmp_path, image_size=(4, 6))
    np.testing.assert_array_equal(read(ds, image_size=(4, 6)).train.inputs, expected.train.inputs)


INPUTS = {
    "lists": {"x": RNG.normal(size=(10, 3)).tolist()},
    "bytes": {"x": GRAY.tolist()},
    "numbers": {"x": RNG.normal(size=10).tolist()},
}


@pytest.mark.parametrize("kind", INPUTS)
def test_numbers_keep_their_values(kind):
    dtype = "uint8" if kind == "bytes" else "float64"
    feature = {
        "lists": datasets.List(Value(dtype)),
        "bytes": datasets.Array2D((6, 5), dtype),
        "numbers": Value(dtype),
    }[kind]
    features = Features({"label": Value("string"), "x": feature})
    columns = {"label": ["no", "yes"] * 5, **INPUTS[kind]}
    data = read(datasets.Dataset.from_dict(columns, features=features), "x")
    x = np.asarray(INPUTS[kind]["x"], dtype)
    rows, _ = split_rows(10)
    expected = x.reshape(10, -1, *x.shape[2:])[rows]
    np.testing.assert_array_equal(
        data.train.inputs, expected.astype(np.uint8 if kind == "bytes" else np.float32)
    )
    assert data.classes == ("no", "yes")


def test_several_columns_are_features_and_one_may_be_weights():
    columns = {name: RNG.uniform(1, 2, 10) for name in "abw"}
    data = read(of_columns(**columns), ["b", "a"], weights="w")
    rows, _ = split_rows(10)
    expected = np.stack([columns["b"], columns["a"]], axis=1)[rows]
    np.testing.assert_array_equal(data.train.inputs, expected.astype(np.float32))
    np.testing.assert_array_equal(data.train.weights, columns["w"][rows].astype(np.float32))
    assert data.columns == ("b", "a")


def test_floats_are_targets():
    data = read(of_columns(x=np.ones((10, 2)), y=np.linspace(0, 1, 10)), "x", "y")
    assert (data.classes, data.train.labels.dtype) == ((), np.float32)


def damaged() -> "datasets.Dataset":
    png = io.BytesIO()
    Image.fromarray(COLOR[0]).save(png, "PNG")
    features = Features({"image": datasets.Image(), "label": ClassLabel(names=NAMES)})
    images = [{"bytes": png.getvalue()}, {"bytes": png.getvalue()[:40]}]
    return datasets.Dataset.from_dict({"image": images, "label": [0, 1]}, features=features)


DEEP = Image.fromarray(np.zeros((6, 5), np.uint16))
OTHER = Features({"image": datasets.Image(), "label": ClassLabel(names=["dog", "cat"])})
MISTAKES = {
    "no data set": (lambda: read([1, 2]), "ds must be a datasets.Dataset or DatasetDict with a l"),
    "a stream": (
        lambda: read(of_pictures(COLOR).to_iterable_dataset()),
        "ds must be a datasets.Dataset or DatasetDict with a length, got IterableDataset as train;",
    ),
    "no training split": (
        lambda: read(datasets.DatasetDict(test=of_pictures(COLOR))),
        "ds must have a split named train, got test; pass one of them.",
    ),
    "unknown column": (
        lambda: read(of_pictures(COLOR), "picture"),
        "inputs must be one of image, label, got 'picture'.",
    ),
    "unknown label": (
        lambda: read(of_pictures(COLOR), labels="fine_label"),
        "labels must be one of image, label, got 'fine_label'",
    ),
    "classes of the test split": (
        lambda: read(of_pictures(COLOR), test=of_pictures(COLOR).cast(OTHER)),
        "ds must have the same classes in all splits, but those of train and test differ; cast",
    ),
    "different sizes": (
        lambda: read(of_pictures([COLOR[0], GRAY[0][:3]])),
        "image_size must be given if pictures have different sizes, but row 0 of train has 6 x 5 "
        "and row 1 of train 3 x 5 pixels; pass the height and width to resize to.",
    ),
    "missing picture": (
        lambda: read(of_pictures([COLOR[0], None])),
        "ds must contain a picture of 8 bits in each row, got none in row 1 of train; remove such",
    ),
    "16 bits": (
        lambda: read(of_pictures([DEEP])),
        "ds must contain a picture of 8 bits in each row, got one of the mode I;16 in row 0 of tr",
    ),
    "damaged picture": (
        lambda: read(damaged()),
        "ds must contain a picture of 8 bits in each row, got one that cannot be decoded (",
    ),
    "missing integer": (
        lambda: read(of_columns(x=[1, None] * 5), "x"),
        "ds must not have missing numbers, but 'x' has one in row 1 of train; remove or impute",
    ),
    "missing number in a list": (
        lambda: read(of_columns(x=[[1, 2], [3, None]] * 5), "x"),
        "ds must not have missing numbers, but 'x' has one in row 1 of train; remove or impute",
    ),
    "ragged lists": (
        lambda: read(of_columns(x=[[1], [1, 2]] * 5), "x"),
        "ds must have lists of the same length in 'x'; pad or cut them.",
    ),
    "missing text": (
        lambda: read(of_columns(x=np.ones((10, 2)), y=["a", None] * 5), "x", "y"),
        "y_train must contain only text or only numbers, got text and NoneType None at [1];",
    ),
    "dictionaries": (
        lambda: read(of_columns(x=[{"a": 1}] * 10), "x"),
        "ds must contain numbers, texts or pictures in 'x', got {'a': Value('int64')}; convert",
    ),
    "several columns of words": (
        lambda: read(of_columns(x=np.ones(10), y=["a"] * 10), ["x", "y"]),
        "inputs must be columns of numbers if there are several, but 'y' is Value('string').",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_unsuitable_data_set_is_refused(mistake):
    make, sentence = MISTAKES[mistake]
    with pytest.raises(InputError) as caught:
        make()
    assert str(caught.value).startswith(sentence)
