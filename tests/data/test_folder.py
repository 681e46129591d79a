"""Pictures in folders give the arrays that they were saved from, and every mistake a sentence."""

import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import optax
import pytest
from PIL import Image

import ctde_jax as ctde
from ctde_jax import config, train
from ctde_jax.config import build
from ctde_jax.data import DiskArray, digests_of, from_arrays, from_folder, hold_out, pictures
from ctde_jax.errors import InputError

GRAY = np.random.default_rng(0).integers(0, 256, (6, 8), np.uint8)
COLOR = np.random.default_rng(1).integers(0, 256, (6, 8, 3), np.uint8)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "ctde_jax" / "pictures"


def save(path: Path, pixels: np.ndarray | Image.Image = GRAY, **options) -> Path:
    """Saves a picture, and creates its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(path, **options)
    return path


@pytest.fixture
def two(tmp_path) -> Path:
    """A folder with two classes of two pictures."""
    for name in ("a/0.png", "a/1.png", "b/0.png", "b/1.png"):
        save(tmp_path / "pics" / name)
    return tmp_path / "pics"


def read(path: Path, size: tuple[int, int] | None = None, is_gray: bool = False) -> np.ndarray:
    found = pictures.read_picture(path, size, is_gray)
    assert found is not None
    return found


def save_split(folder: Path, inputs: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Saves examples as PNG, and returns their indices in the order of the folders."""
    for number, (pixels, label) in enumerate(zip(inputs, labels, strict=True)):
        save(folder / str(label) / f"{number:04}.png", pixels)
    return np.argsort(labels, kind="stable")


# Equality with arrays.


def test_folders_give_the_arrays_that_they_were_saved_from(tmp_path, digits):
    train_rows = save_split(tmp_path / "train", *(part[:60] for part in digits.train))
    test_rows = save_split(tmp_path / "test", *(part[:20] for part in digits.test))
    data = from_folder(tmp_path)
    expected = from_arrays(
        *(part[:60][train_rows] for part in digits.train),
        *(part[:20][test_rows] for part in digits.test),
        name=tmp_path.name,
    )
    assert (data.name, data.classes) == (expected.name, expected.classes)
    assert digests_of(data) == digests_of(expected)


def test_random_fifth_is_that_of_arrays(tmp_path, digits):
    rows = save_split(tmp_path / "x", *(part[:60] for part in digits.train))
    expected = from_arrays(*(part[:60][rows] for part in digits.train))
    data = from_folder(tmp_path / "x")
    assert digests_of(data) == digests_of(expected)
    assert data.notes[-1] == expected.notes[-1]


def test_pixels_that_stay_in_the_file_are_equal(tmp_path, digits, monkeypatch):
    save_split(tmp_path / "x", *(part[:60] for part in digits.train))
    in_memory = from_folder(tmp_path / "x")
    monkeypatch.setattr(pictures, "STREAMED_FROM", 1)
    in_file = from_folder(tmp_path / "x")
    assert isinstance(in_file.train.inputs, DiskArray)
    assert digests_of(in_file) == digests_of(in_memory)
    assert ".npy (4.2 kB), from which training reads them." in in_file.notes[0]


@pytest.mark.slow
def test_digits_in_folders_train_to_the_same_parameters(tmp_path, digits):
    arrays = {}
    for split, (inputs, labels) in {"train": digits.train, "test": digits.test}.items():
        bright = 15 * inputs  # up to 240
        rows = save_split(tmp_path / "pics" / split, bright, labels)
        arrays |= {f"x_{split}": bright[rows], f"y_{split}": labels[rows]}
    np.savez(tmp_path / "arrays.npz", **arrays)
    results = []
    for name, source in {
        "folder": ["--data-dir", str(tmp_path / "pics")],
        "npz": ["--data-file", str(tmp_path / "arrays.npz")],
    }.items():
        run = tmp_path / name
        assert train.main(["--dataset", name, *source, "--run-dir", str(run)]) == 0
        results.append(ctde.load_run(run).trained)
    jax.tree.map(np.testing.assert_array_equal, results[0].params, results[1].params)
    assert results[0].tested["accuracy"] == results[1].tested["accuracy"] > 0.95


@pytest.mark.slow
def test_resuming_recognizes_moved_and_changed_pictures(two, tmp_path):
    def fit(folder):
        data = from_folder(folder)
        options = {"batch_size": 3, "epochs": 1, "show": False, "run_dir": tmp_path / "run"}
        model = ctde.models.mlp([48, 2])
        return ctde.fit(model, data, optax.sgd(0.1), devices=jax.devices()[:1], **options)

    fit(two)
    (tmp_path / "moved").mkdir()
    moved = two.rename(tmp_path / "moved" / "pics")
    assert "train" not in fit(moved).seconds
    save(moved / "a" / "1.png", 255 - GRAY)
    with pytest.raises(InputError, match="the inputs of the training split"):
        fit(moved)


# One picture.


MODES = {
    "gray": (GRAY, np.dstack([GRAY] * 3)),
    "color": (COLOR, COLOR),
    "one bit": (GRAY > 99, np.dstack([np.where(GRAY > 99, 255, 0)] * 3)),
    "opaque": (np.dstack([COLOR, np.full_like(GRAY, 255)]), COLOR),
    "transparent": (np.dstack([COLOR, np.zeros_like(GRAY)]), np.full_like(COLOR, 255)),
    "fifth of 55": (np.full((6, 8, 2), (55, 51), np.uint8), np.full_like(COLOR, 215)),
}
"""Pixels of modes of Pillow, and their RGB; a fifth of 55 and four fifths of white are 215."""


@pytest.mark.parametrize("name", MODES)
def test_modes_become_rgb_over_white(tmp_path, name):
    pixels, expected = MODES[name]
    np.testing.assert_array_equal(read(save(tmp_path / "x.png", pixels)), expected)


def test_palette_becomes_rgb_and_its_transparent_color_white(tmp_path):
    image = Image.fromarray(np.array([[0, 1, 2]] * 2, np.uint8), "P")
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    save(tmp_path / "x.png", image, transparency=1)
    expected = [[[10, 20, 30], [255, 255, 255], [70, 80, 90]]] * 2
    assert read(tmp_path / "x.png").tolist() == expected


@pytest.mark.parametrize("suffix", ["png", "jpg"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path, orientation, suffix):
    flat = np.zeros((16, 32, 3), np.uint8)
    flat[:, :8] = 255
    turns = {
        1: lambda x: x,
        2: lambda x: x[:, ::-1],
        3: lambda x: x[::-1, ::-1],
        4: lambda x: x[::-1],
        5: lambda x: x.swapaxes(0, 1),
        6: lambda x: np.rot90(x, -1),
        7: lambda x: x.swapaxes(0, 1)[::-1, ::-1],
        8: lambda x: np.rot90(x),
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(tmp_path / f"x.{suffix}", flat, exif=exif)
    np.testing.assert_array_equal(read(path), turns[orientation](flat))


def test_pictures_are_resized_to_cover_the_size_and_cropped_at_the_center(tmp_path):
    wide = np.repeat(np.repeat(GRAY, 4, axis=0), 4, axis=1)  # 24 x 32
    path = save(tmp_path / "x.png", wide)
    for height, width in [(24, 32), (12, 12), (12, 24), (48, 30)]:
        scale = max(height / 24, width / 32)
        covering = Image.fromarray(wide).resize((round(32 * scale), round(24 * scale)), 2)
        top = (covering.height - height) // 2
        left = (covering.width - width) // 2
        expected = np.asarray(covering)[top : top + height, left : left + width]
        # Pillow crops before it resizes, so pixels near the border see those beyond it no more.
        found = read(path, (height, width), is_gray=True)
        assert found.shape == (height, width)
        inner = np.s_[3:-3, 3:-3]
        np.testing.assert_allclose(found[inner].astype(int), expected[inner], atol=1)
    np.testing.assert_array_equal(read(path, (24, 32), is_gray=True), wide)


def test_pictures_are_gray_only_if_all_are(two):
    assert from_folder(two).train.inputs.shape == (3, 6, 8)
    save(two / "b" / "2.png", COLOR)
    data = from_folder(two)
    assert data.train.inputs.shape == (4, 6, 8, 3)
    assert "6 x 8 pixels in RGB" in data.notes[0]


def test_image_size_is_height_and_width_or_one_number(two):
    save(two / "b" / "2.png", GRAY[:5])
    assert from_folder(two, (4, 3)).train.inputs.shape == (4, 4, 3)
    for one in (5, [5], np.int64(5)):
        assert from_folder(two, one).train.inputs.shape == (4, 5, 5)


# Folders.


def test_validation_folder_is_the_validation_split(two, tmp_path):
    for name, count in {"train": 2, "validation": 1}.items():
        for number in range(count):
            for label in ("a", "b"):
                save(tmp_path / "x" / name / label / f"{number}.png", GRAY + number)
    data = from_folder(tmp_path / "x")
    assert data.validation is not None
    assert data.validation.labels.tolist() == [0, 1]
    np.testing.assert_array_equal(data.validation.inputs, [GRAY, GRAY])
    assert len(data.train.inputs) + len(data.test.inputs) == 4
    with pytest.raises(InputError) as caught:
        hold_out(data, 0.5)
    assert str(caught.value) == (
        "validation_fraction must not be set, as x has a validation split of 2 examples, got 0.5."
    )


@pytest.mark.parametrize(
    ("names", "classes"),
    [
        (["10", "9", "0"], ("0", "9", "10")),
        (["010", "9"], ("010", "9")),
        (["b", "train", "a"], ("a", "b", "train")),
    ],
)
def test_sorted_folder_names_are_the_classes(tmp_path, names, classes):
    for name in names:
        save(tmp_path / name / "x.PNG")
    assert from_folder(tmp_path, 6).classes == classes


def test_other_files_are_counted_and_hidden_ones_ignored(two):
    (two / "notes.txt").touch()
    (two / "a" / "x.webp").touch()
    (two / "a" / ".DS_Store").touch()
    (two / ".git").mkdir()
    data = from_folder(two)
    assert len(data.train.labels) + len(data.test.labels) == 4
    assert data.notes[0] == (
        f"Other files are not used (2, such as {two}/notes.txt); pictures are PNG and JPEG files "
        "in class folders."
    )


# The cache.


def test_pictures_are_decoded_once_until_one_changes(two, cache, monkeypatch):
    decoded = []

    def counting(path, size, is_gray, original=pictures.read_picture):
        decoded.append(path)
        return original(path, size, is_gray)

    monkeypatch.setattr(pictures, "read_picture", counting)
    first = from_folder(two)
    assert digests_of(from_folder(two)) == digests_of(first)
    assert len(decoded) == 4
    (file,) = cache.iterdir()
    assert first.notes[0] == (
        f"The pictures were decoded to 6 x 8 pixels in gray, into {file} (452 bytes)."
    )

    save(two / "a" / "0.png", 255 - GRAY)
    assert digests_of(from_folder(two)) != digests_of(first)
    from_folder(two, 4)
    assert len(decoded) == 12
    assert len([*cache.iterdir()]) == 3


@pytest.mark.parametrize("is_terminal", [True, False])
def test_long_decoding_is_announced(two, monkeypatch, capsys, is_terminal):
    monkeypatch.setattr(pictures, "_MANY", 4)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal)
    from_folder(two)
    shown = capsys.readouterr().err
    assert "Decoding 4 pictures" in shown
    assert ("100%" in shown) == is_terminal
    from_folder(two)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY", b"cut"])
def test_damaged_cache_file_is_refused(two, cache, content):
    from_folder(two)
    (file,) = cache.iterdir()
    file.write_bytes(content if content != b"cut" else file.read_bytes()[:-150])
    with pytest.raises(InputError) as caught:
        from_folder(two)
    sentence = rf"data_dir was decoded into {file}, which is damaged \(.+\); remove that file\."
    assert re.fullmatch(sentence, str(caught.value))


def test_cache_folder_that_is_not_writable_is_refused(two, cache):
    cache.parent.mkdir(parents=True)
    cache.touch()
    with pytest.raises(InputError) as caught:
        from_folder(two)
    assert str(caught.value) == (
        f"data_dir cannot be decoded into {cache} (File exists); make it writable, or a link to "
        "another folder."
    )


def test_pixels_that_do_not_fit_on_the_disk_are_refused(two, cache, monkeypatch):
    full = SimpleNamespace(free=100)
    monkeypatch.setattr(pictures.shutil, "disk_usage", lambda folder: full)
    with pytest.raises(InputError) as caught:
        from_folder(two)
    assert str(caught.value) == (
        f"data_dir must fit on the disk when decoded: the pixels take 192 bytes, but {cache} has "
        "100 bytes free; lower image_size, or make that folder a link to another disk."
    )
    assert not [*cache.iterdir()]


# Damaged and unsuitable pictures.


def test_unreadable_pictures_are_refused_or_skipped(two):
    expected = from_folder(two)
    whole = (two / "b" / "1.png").read_bytes()
    (two / "b" / "2.png").write_bytes(whole[:-30])
    with pytest.raises(InputError) as caught:
        from_folder(two)
    assert str(caught.value) == (
        f"data_dir must contain complete PNG and JPEG pictures, but has damaged ones (1 of 5, such "
        f"as {two}/b/2.png); restore or remove them, or pass skip_unreadable (--skip-unreadable)."
    )

    (two / "a" / "00.jpg").write_bytes(b"")
    with pytest.raises(InputError) as caught:
        from_folder(two)
    assert f"damaged ones (2 of 6, such as {two}/a/00.jpg); restore" in str(caught.value)
    data = from_folder(two, skip_unreadable=True)
    assert digests_of(data) == digests_of(expected)
    assert data.notes[0] == (
        f"Files that are not complete pictures are skipped (2 of 6, such as {two}/a/00.jpg)."
    )


@pytest.mark.parametrize("split", ["test", "train"])
def test_class_with_only_damaged_pictures_is_refused(two, tmp_path, split):
    (tmp_path / "x").mkdir()
    two.rename(tmp_path / "x" / "train")
    for name in ("a", "b"):
        save(tmp_path / "x" / "test" / name / "0.png")
    for file in (tmp_path / "x" / split / "b").iterdir():
        file.write_bytes(b"")
    with pytest.raises(InputError) as caught:
        from_folder(tmp_path / "x", skip_unreadable=True)
    assert str(caught.value) == (
        f"data_dir must contain readable pictures of each class, but all pictures of b in the "
        f"{split} split are damaged; restore them, or remove their folder."
    )


def test_class_unknown_to_the_training_split_is_refused(two, tmp_path):
    (tmp_path / "x").mkdir()
    two.rename(tmp_path / "x" / "train")
    save(tmp_path / "x" / "test" / "bb" / "0.png")
    with pytest.raises(InputError) as caught:
        from_folder(tmp_path / "x")
    assert str(caught.value) == (
        "data_dir must contain the same classes in test as in train, but train has no folder bb; "
        "did you mean 'b'?"
    )


# Changes of a valid folder `{0}`, and the sentences that they lead to.
MISTAKES = {
    "no folder": (
        lambda two: two.rename(two.parent / "moved"),
        "data_dir must be an existing folder of pictures, got {0}.",
    ),
    "no class folders": (
        lambda two: [path.rename(two.parent / path.name) for path in two.iterdir()],
        "data_dir must contain a folder of pictures for each class, but {0} has no folders; move "
        "the pictures of each class to a folder with its name.",
    ),
    "one class": (
        lambda two: (two / "b").rename(two.parent / "b"),
        "data_dir must contain folders of at least two classes, but {0} has only a; add a folder "
        "for each further class.",
    ),
    "empty class": (
        lambda two: (two / "c").mkdir(),
        "data_dir must contain pictures of each class, but {0}/c has no PNG or JPEG files; add "
        "pictures, or remove the folder.",
    ),
    "other formats": (
        lambda two: save(two / "c" / "x.webp"),
        "data_dir must contain pictures of each class, but {0}/c has no PNG or JPEG files, only "
        "others such as x.webp; add pictures, or remove the folder.",
    ),
    "nested folder": (
        lambda two: save(two / "a" / "inner" / "x.png"),
        "data_dir must contain pictures directly in the class folders, but {0}/a contains the "
        "folder inner; pass the folder whose subfolders are the classes.",
    ),
    "unknown split": (
        lambda two: [save(two / split / "a" / "x.png") for split in ("train", "valid")],
        "data_dir must contain only the folders train, test and validation, as {0}/train contains "
        "class folders, but has a; rename or move it.",
    ),
    "sizes": (
        lambda two: save(two / "b" / "1.png", GRAY[:5]),
        "image_size must be given if pictures have different sizes, but {0}/a/0.png has 6 x 8 and "
        "{0}/b/1.png 5 x 8 pixels; pass the height and width to resize to.",
    ),
    "16 bits": (
        lambda two: save(two / "b" / "1.png", GRAY.astype(np.uint16)),
        "data_dir must contain pictures of 8 bits, but {0}/b/1.png has 16 bits per channel; "
        "convert it, or pass the pixels as uint16 to data.from_arrays.",
    ),
    "broken link": (
        lambda two: (two / "b" / "x.png").symlink_to("nowhere"),
        "data_dir contains {0}/b/x.png, which cannot be read (No such file or directory); remove "
        "or repair it.",
    ),
    "pipe": (
        lambda two: os.mkfifo(two / "b" / "x.png"),
        "data_dir contains {0}/b/x.png, which cannot be read (it is a pipe, not a regular file); "
        "remove or repair it.",
    ),
    "no pictures": (
        lambda two: [path.write_bytes(b"text") for path in two.rglob("*.png")],
        "data_dir must contain pictures, but none of 4 files is a complete PNG or JPEG picture, "
        "such as {0}/a/0.png; save them again.",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_unsuitable_folder_is_refused(two, cache, name):
    change, sentence = MISTAKES[name]
    change(two)
    with pytest.raises(InputError) as caught:
        from_folder(two)
    assert str(caught.value) == sentence.format(two)
    assert not cache.exists() or not [*cache.iterdir()]


def test_folder_that_cannot_be_read_is_refused(two, monkeypatch):
    def refuse(folder):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(InputError) as caught:
        from_folder(two)
    assert str(caught.value) == (
        f"data_dir contains {two}, which cannot be read (Permission denied); change its "
        "permissions."
    )


@pytest.mark.parametrize(
    ("image_size", "sentence"),
    [
        ((1, 2, 3), "must be height and width, or one number for both, got (1, 2, 3)."),
        ([], "must be height and width, or one number for both, got []."),
        (0, "must be at least 1, got 0."),
        ((8, 10**5), "must be at most 10,000, got 100000."),
        (2.5, "must be an integer, got 2.5."),
    ],
)
def test_invalid_image_size_is_refused(two, image_size, sentence):
    with pytest.raises(InputError) as caught:
        from_folder(two, image_size)
    assert str(caught.value) == f"image_size {sentence}"


# The command line.


def test_options_of_the_command_line_are_the_arguments(two):
    (two / "b" / "2.png").write_bytes(b"")
    chosen = config.parse(
        f"--dataset folder --data-dir {two} --image-size 4 5 --skip-unreadable".split()
    )
    data = build.load_data(chosen.data)
    assert digests_of(data) == digests_of(from_folder(two, (4, 5), skip_unreadable=True))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--image-size", "4"], "image_size requires --dataset folder."),
        (["--skip-unreadable"], "skip_unreadable requires --dataset folder."),
        (
            ["--dataset", "folder", "--image-size"],
            "--image-size takes at least one value, got none.",
        ),
        (
            ["--dataset", "folder", "--data-file", "x"],
            "data_file requires --dataset text or npz or csv or parquet, got --dataset folder.",
        ),
        (
            ["--dataset", "folder"],
            "data_dir must be the folder of the pictures for --dataset folder, got none.",
        ),
    ],
)
def test_options_that_do_not_fit_are_refused(arguments, sentence):
    with pytest.raises(InputError) as caught:
        build.load_data(config.parse(arguments).data)
    assert str(caught.value) == sentence
