"""Sample weights are those of each training example, from every source of data."""

import numpy as np
import pytest

from ctde_jax import config, data
from ctde_jax.config import build
from ctde_jax.data.dataset import split_rows
from ctde_jax.errors import InputError

RNG = np.random.default_rng(0)
X = RNG.normal(size=(40, 2)).astype(np.float32)
Y = np.arange(40) % 2
W = RNG.uniform(0.5, 2, 40).astype(np.float32)
TRAIN, _ = split_rows(40)


def lines(word: str = "") -> str:
    """Returns a csv file; with a word, the table needs a recipe."""
    rows = [f"{a},{b}{word},{w},{y}\n" for (a, b), w, y in zip(X, W, Y, strict=True)]
    return f"a,b{word and ',c'},w,label\n" + "".join(rows)


def of_npz(folder):
    np.savez(folder / "small.npz", x_train=X, y_train=Y, weights=W)
    return data.from_npz(folder / "small.npz")


def of_npy(folder):
    for name, array in {"x_train": X, "y_train": Y, "weights": W}.items():
        np.save(folder / f"{name}.npy", array)
    return data.from_npz(folder)


def of_csv(folder, word: str = ""):
    (folder / "small.csv").write_text(lines(word))
    return data.from_table(folder / "small.csv", "label", weights="w")


def of_the_command_line(folder):
    (folder / "small.csv").write_text(lines())
    arguments = ["--dataset", "csv", "--data-file", str(folder / "small.csv"), "--weights", "w"]
    return build.load_data(config.parse(arguments).data)


SOURCES = {
    "arrays": lambda folder: data.from_arrays(X, Y, weights=W),
    "lists": lambda folder: data.from_arrays(X, Y, weights=W.tolist()),
    "npz": of_npz,
    "npy": of_npy,
    "csv": of_csv,
    "csv with words": lambda folder: of_csv(folder, ",word"),
    "command line": of_the_command_line,
    "sequence": lambda folder: data.as_sequence(data.from_arrays(X[:, None], Y, weights=W), "rows"),
}


@pytest.mark.parametrize("source", SOURCES)
def test_weights_follow_their_examples(source, tmp_path):
    dataset = SOURCES[source](tmp_path)
    np.testing.assert_array_equal(dataset.train.weights, W[TRAIN])
    np.testing.assert_array_equal(dataset.train.labels, Y[TRAIN])
    assert dataset.test.weights is None
    assert "w" not in dataset.columns

    kept = data.hold_out(dataset, 0.25)
    place = dict(zip(W.tolist(), Y.tolist(), strict=True))
    assert len(kept.train.weights) == 24
    assert [place[each] for each in kept.train.weights.tolist()] == kept.train.labels.tolist()
    assert kept.validation.weights is None


def test_any_data_set_of_arrays_can_be_weighted(tmp_path):
    """On disk, the weights are in memory."""
    np.save(tmp_path / "x.npy", X)
    on_disk = data.from_arrays(np.load(tmp_path / "x.npy", mmap_mode="r"), Y, X, Y)
    assert data.weighted(on_disk, W).train.is_on_disk
    again = data.weighted(data.weighted(on_disk, W), 2 * W)
    np.testing.assert_array_equal(again.train.weights, 2 * W)
    assert again.train.inputs is on_disk.train.inputs


def test_digest_names_the_weights():
    plain = data.from_arrays(X, Y, X, Y)
    before = data.digests_of(plain)
    one = data.digests_of(data.weighted(plain, W))
    other = data.digests_of(data.weighted(plain, W[::-1]))
    name = "the weights of the training split"
    assert one == before | {name: one[name]}
    assert other == before | {name: other[name]}
    assert one[name] != other[name]


@pytest.mark.parametrize(
    ("weights", "sentence"),
    [
        (W[:39], "must have one number for each of the 40 examples, got float32 of the shape [39]"),
        (
            W[:, None],
            "must have one number for each of the 40 examples, got float32 of the shape [",
        ),
        (["a"] * 40, "must have one number for each of the 40 examples, got <U1 of the shape [40]"),
        (np.where(Y, W, -1.0), "must be finite and at least 0, got -1.0 for example 0."),
        (np.where(Y, np.nan, W), "must be finite and at least 0, got nan for example 1."),
        (np.where(Y, np.inf, W), "must be finite and at least 0, got inf for example 1."),
        (
            np.where(Y, 1e39, W.astype(float)),
            "must be finite and at least 0, got 1e+39 for example 1.",
        ),
        (0 * W, "must be above 0 for at least one of the 40 training examples, got only 0."),
    ],
)
def test_invalid_weights_are_refused(weights, sentence):
    with pytest.raises(InputError) as caught:
        data.from_arrays(X, Y, X, Y, weights=weights)
    assert str(caught.value).startswith(f"weights {sentence}")


def test_weights_that_are_held_out_are_refused():
    dataset = data.from_arrays(X, Y, X, Y)
    validation = data.hold_out(dataset, 0.25).validation.inputs
    weights = (X[:, None] == validation).all(axis=2).any(axis=1)
    with pytest.raises(InputError, match="weights must be above 0 for at least one of the 30"):
        data.hold_out(data.weighted(dataset, weights), 0.25)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"weights": "v"}, "weights must be one of a, b, w, label, got 'v'."),
        ({"weights": "label"}, "weights must not contain the label 'label'; pass another column."),
        (
            {"weights": "b"},
            "small.csv has '-2.20350980758667' in line 36, column 'b', which is a negative weight; "
            "weights must be at least 0.",
        ),
    ],
)
def test_unsuitable_column_of_weights_is_refused(arguments, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.csv").write_text(lines())
    with pytest.raises(InputError) as caught:
        data.from_table("small.csv", "label", **arguments)
    assert sentence in str(caught.value)


def test_weights_that_are_no_numbers_are_refused(tmp_path):
    (tmp_path / "small.csv").write_text(lines().replace(f",{W[3]},", ",heavy,"))
    with pytest.raises(
        InputError, match="has 'heavy' in line 5, column 'w', which is not a finite"
    ):
        data.from_table(tmp_path / "small.csv", "label", weights="w")
    with pytest.raises(InputError, match="weights requires --dataset csv or parquet, got --data"):
        build.load_data(config.parse(["--weights", "w"]).data)


@pytest.mark.parametrize(
    ("batch", "sentence"),
    [
        (
            (X, Y),
            "batches must match the first batch, which has weights, got no weights in batch 1",
        ),
        ((X, Y, -W), "weights of batch 1 of epoch 0 must be finite and at least 0, got -"),
        ((X, Y, W[:3]), "weights of batch 1 of epoch 0 must have one number for each of the 40"),
        ((X, Y, W, W), "batches must yield pairs of inputs and labels, or triples with weights, "),
    ],
)
def test_batch_with_invalid_weights_is_refused(batch, sentence):
    dataset = data.from_batches(lambda epoch: [(X, Y, W), batch], 2, X, Y)
    with pytest.raises(InputError) as caught:
        [*zip(range(2), dataset.stream.steps(), strict=True)]
    assert str(caught.value).startswith(sentence)


def test_batches_keep_their_weights_and_may_all_be_zero():
    batches = [(X, Y, 0 * W), (X, Y, W)]
    dataset = data.from_batches(lambda epoch: batches, 2, X, Y)
    drawn = [batch for _, batch in zip(range(2), dataset.stream.steps(), strict=False)]
    np.testing.assert_array_equal(drawn[0].weights, 0 * W)
    np.testing.assert_array_equal(drawn[1].weights, W)
    with pytest.raises(InputError, match="weights requires a data set of arrays, but batches"):
        data.weighted(dataset, W)
