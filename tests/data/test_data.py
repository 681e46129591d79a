"""Data sets are checked once; every epoch gives each example to exactly one replica once."""

import numpy as np
import pytest

from ctde_jax import data
from ctde_jax.data import Split, batches, partition
from ctde_jax.errors import InputError

RNG = np.random.default_rng(0)
LABELS = RNG.integers(0, 10, 1000, dtype=np.int32)
SPLIT = data.Split(RNG.normal(size=(1000, 3)).astype(np.float32), LABELS)
PARTITIONS = {
    "iid": lambda replicas: partition.iid(LABELS, replicas),
    "by_label": lambda replicas: partition.by_label(LABELS, replicas),
    "dirichlet": lambda replicas: partition.dirichlet(LABELS, replicas, alpha=0.1),
}


@pytest.mark.parametrize("name", PARTITIONS)
@pytest.mark.parametrize("replicas", [1, 4, 7])
def test_partition_gives_every_example_to_one_replica(name, replicas):
    parts = PARTITIONS[name](replicas)
    assert len(parts) == replicas
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(1000))
    np.testing.assert_array_equal(
        partition.count_labels(LABELS, parts, 10).sum(axis=0), np.bincount(LABELS, minlength=10)
    )


def test_iid_parts_have_equal_sizes_and_all_labels():
    counts = partition.count_labels(LABELS, partition.iid(LABELS, 4), 10)
    assert set(counts.sum(axis=1)) == {250}
    assert (counts > 0).all()


def test_by_label_leaves_few_labels_on_each_replica():
    """A shard has at most two labels, and each replica has two shards."""
    counts = partition.count_labels(LABELS, partition.by_label(LABELS, 10, shards=2), 10)
    assert (counts > 0).sum(axis=1).max() <= 4


def test_dirichlet_parts_are_more_even_with_larger_alpha():
    def unevenness(alpha: float) -> float:
        counts = partition.count_labels(LABELS, partition.dirichlet(LABELS, 4, alpha), 10)
        return float((counts / counts.sum(axis=0)).std())

    assert unevenness(0.05) > unevenness(1.0) > unevenness(1000.0)
    assert unevenness(1000.0) < 0.02


def test_plot_of_the_partition_shows_every_count():
    parts = partition.dirichlet(LABELS, 4)
    axes = partition.plot(LABELS, parts, [str(i) for i in range(10)]).axes[0]
    assert [int(text.get_text()) for text in axes.texts] == list(
        partition.count_labels(LABELS, parts, 10).flat
    )


@pytest.mark.parametrize("name", [None, *PARTITIONS])
@pytest.mark.parametrize("batch_size", [4, 64, 1000])
def test_epoch_contains_every_example_once(name, batch_size):
    parts = None if name is None else PARTITIONS[name](4)
    batches = data.deal(SPLIT, 4, batch_size, seed=0, partition=parts)
    for number in range(2):
        epoch = batches.draw(number)
        assert epoch.shape == (batches.steps_per_epoch, 4, batch_size // 4)
        seen = []
        for replica in range(4):
            rows = epoch[:, replica]
            inputs = batches.split.inputs if parts is None else batches.split.inputs[replica]
            seen.append(inputs[rows[rows >= 0]])
        np.testing.assert_array_equal(
            np.sort(np.concatenate(seen), axis=0), np.sort(SPLIT.inputs, axis=0)
        )


def test_global_batch_is_the_same_on_any_number_of_replicas():
    orders = [data.deal(SPLIT, replicas, 48, seed=5).steps(0, 30) for replicas in (1, 2, 4, 8)]
    for order in orders:
        np.testing.assert_array_equal(
            np.sort(order.reshape(30, -1)), np.sort(orders[0].reshape(30, -1))
        )


def test_short_batch_is_distributed_evenly():
    """1,000 examples in batches of 48 leave 40 for the last, 10 for each of 4 replicas."""
    last = data.deal(SPLIT, 4, 48, seed=0).draw(0)[-1]
    assert ((last >= 0).sum(axis=1) == 10).all()


def test_short_batch_is_padded_with_its_examples():
    """Batch statistics must not depend on examples of another batch."""
    last = data.deal(SPLIT, 4, 48, seed=0).draw(0)[-1]
    assert set(~last[last < 0]) <= set(last[last >= 0])


def test_device_without_further_examples_repeats_those_of_its_part():
    parts = [np.arange(990), np.arange(990, 1000)]
    batches = data.deal(SPLIT, 2, 40, seed=0, partition=parts)
    second = batches.draw(0)[:, 1]
    rows = batches.split.inputs[1][np.where(second < 0, ~second, second)]
    assert (rows[..., None, :] == SPLIT.inputs[990:]).all(-1).any(-1).all()


def test_order_depends_only_on_the_seed_and_the_epoch():
    first = data.deal(SPLIT, 4, 64, seed=0)
    np.testing.assert_array_equal(
        first.steps(20, 40), data.deal(SPLIT, 4, 64, seed=0).steps(20, 40)
    )
    assert (first.draw(0) != first.draw(1)).any()
    assert (first.draw(0) != data.deal(SPLIT, 4, 64, seed=1).draw(0)).any()


@pytest.mark.parametrize(("start", "stop"), [(0, 16), (5, 40), (16, 17), (31, 33)])
def test_steps_continue_across_epochs(start, stop):
    batches = data.deal(SPLIT, 4, 64, seed=0)
    whole = np.concatenate([batches.draw(number) for number in range(3)])
    np.testing.assert_array_equal(batches.steps(start, stop), whole[start:stop])


def test_index_blocks_contain_rounds_and_pad_the_last_one():
    batches = data.deal(SPLIT, 4, 64, seed=0)
    blocks, rounds = zip(
        *data.index_blocks(batches, inner_steps=3, most=2, start=0, stop=14), strict=True
    )
    assert rounds == (2, 2, 1)
    assert [block.shape for block in blocks] == [(4, 2, 3, 16)] * 3
    steps = np.concatenate([np.moveaxis(block.reshape(4, 6, 16), 0, 1) for block in blocks])
    np.testing.assert_array_equal(steps[:14], batches.steps(0, 14))
    assert (steps[14:] == -1).all()


def test_digits_are_complete(digits):
    assert len(digits.train.inputs) + len(digits.test.inputs) == 1797
    assert digits.train.inputs.dtype == np.uint8
    assert digits.train.inputs.max() * digits.scale == 1
    assert "359 of the 1,797" in digits.notes[0]


def test_default_test_split_is_disjoint_and_deterministic():
    first, second = (data.from_arrays(SPLIT.inputs, LABELS) for _ in range(2))
    np.testing.assert_array_equal(first.test.inputs, second.test.inputs)
    both = np.concatenate([first.train.inputs, first.test.inputs])
    np.testing.assert_array_equal(np.sort(both, axis=0), np.sort(SPLIT.inputs, axis=0))


def test_standardized_features_have_zero_mean_and_unit_deviation():
    inputs = np.column_stack([RNG.normal(7, 3, 500), RNG.normal(-100, 50, 500), np.full(500, 4.0)])
    dataset = data.standardized(data.from_arrays(inputs, LABELS[:500]))
    seen = (dataset.train.inputs - dataset.shift) * dataset.scale
    np.testing.assert_allclose(seen.mean(axis=0), 0, atol=1e-5)
    np.testing.assert_allclose(seen.std(axis=0), [1, 1, 0], atol=1e-5)


BYTES = np.zeros((4, 2), np.uint8)


@pytest.mark.parametrize(
    ("arrays", "sentence"),
    [
        (
            (BYTES, [0, 1, 2]),
            "y_train must have one label for each of the 4 examples, got 3 labels.",
        ),
        ((BYTES, [0, 1, 2, -1]), "y_train must be class indices from 0, got -1 for example 3."),
        ((BYTES, [0, 1, 0, 1], BYTES, [0, 1, 2, 0]), "y_test must be from 0 to 1"),
        ((BYTES, [0, 1, 0, 1], BYTES), "y_test is missing although x_test is given"),
        (
            (BYTES, [0, 1, 0, 1], np.zeros((2, 2)), [0, 1]),
            "x_test must have the dtype of x_train, uint8, got float32",
        ),
        (
            (BYTES[:1], [0]),
            "x_train must contain at least two examples if there is no test split, got one.",
        ),
        (
            (BYTES, [0, 1, 0, 1], np.zeros((2, 3), np.uint8), [0, 1]),
            "x_test must have examples of the shape of x_train, (2,)",
        ),
        (
            ([[1.0], [np.nan]], [0, 1]),
            "x_train must be finite in float32, got NaN or infinity at [1, 0]",
        ),
        (
            ([[1e300], [0.0]], [0, 1]),
            "x_train must be finite in float32, got NaN or infinity at [0, 0]",
        ),
        (([["a"], ["b"]], [0, 1]), "x_train must contain real numbers, got the dtype <U1."),
        (([0.0, 1.0], [0, 1]), "x_train must have the shape [examples, ...], got (2,)."),
        ((np.zeros((0, 2)), []), "x_train must contain at least one example"),
        (
            (BYTES, [["a", "b"]] * 4),
            "y_train must contain integers from 0 or real-valued targets, got the dtype <U1.",
        ),
        ((BYTES, [0.0, 1.0, np.inf, 0.0]), "y_train must be finite, got NaN or infinity"),
        (
            (BYTES, [[0], [1], [0], [1]]),
            (
                "y_train must have the shape [examples], got (4, 1); flatten the labels with "
                "numpy.ravel."
            ),
        ),
    ],
)
def test_invalid_arrays_are_refused(arrays, sentence):
    with pytest.raises(InputError) as caught:
        data.from_arrays(*arrays)
    assert sentence in str(caught.value)


def test_more_devices_than_examples_are_refused():
    with pytest.raises(
        InputError, match="devices must be at most the number of training examples, 1000, got 1001"
    ):
        data.deal(SPLIT, 1001, 1001, seed=0)


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        (lambda: partition.by_label(LABELS, 4, 251), "label_shards must be from 1 to 250"),
        (lambda: partition.by_label(LABELS, 4, 0), "label_shards must be from 1 to 250"),
        (
            lambda: partition.dirichlet(LABELS, 4, 0.0),
            "dirichlet_alpha must be greater than 0 and at most 1e6",
        ),
    ],
)
def test_invalid_partition_is_refused(build, sentence):
    with pytest.raises(InputError, match=sentence):
        build()


def test_held_out_examples_are_removed_from_the_training_split(digits):
    held = data.hold_out(digits, 0.25, seed=3)
    together = np.concatenate([held.train.inputs, held.validation.inputs]).reshape(-1, 64)
    assert len(held.validation.inputs) == round(0.25 * len(digits.train.inputs))
    np.testing.assert_array_equal(
        np.sort(together, axis=0), np.sort(digits.train.inputs.reshape(-1, 64), axis=0)
    )
    assert held.test is digits.test
    assert "held out at random for validation" in held.notes[-1]


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.5, 1e-6])
def test_fraction_that_leaves_an_empty_split_is_refused(digits, fraction):
    with pytest.raises(
        InputError, match="validation_fraction must leave some of the 1,438 training examples"
    ):
        data.hold_out(digits, fraction)


@pytest.mark.parametrize("replicas", [1, 2, 4])
def test_inputs_of_a_batch_are_those_of_its_examples_on_any_number_of_replicas(replicas):
    """The last batch of an epoch has two examples, and is padded."""
    inputs = np.arange(10, dtype=np.float32)[:, None]
    dealt = batches.deal(Split(inputs, np.zeros(10, np.int32)), replicas, 4, seed=3)
    alone = batches.deal(Split(inputs, np.zeros(10, np.int32)), 1, 4, seed=3)
    for step in range(3):
        np.testing.assert_array_equal(dealt.inputs(step), alone.inputs(step))
        (indices,) = dealt.steps(step, step + 1)
        assert sorted(dealt.inputs(step).ravel()) == sorted(indices[indices >= 0])
    assert [len(dealt.inputs(step)) for step in range(3)] == [4, 4, 2]


@pytest.mark.parametrize(
    ("replicas", "batch_size", "suggested"), [(4, 13, 8), (4, 0, 4), (3, 7, 6), (3, 8, 9)]
)
def test_batch_size_that_does_not_fit_gets_the_nearest_one_that_does(
    replicas, batch_size, suggested
):
    split = Split(np.zeros((10, 1), np.float32), np.zeros(10, np.int32))
    with pytest.raises(InputError, match=f"got {batch_size}; use {suggested}"):
        batches.deal(split, replicas, batch_size, seed=0)


def test_clients_may_have_one_example_each():
    split = Split(np.arange(3, dtype=np.float32)[:, None], np.zeros(3, np.int32))
    parts = [np.array([place]) for place in range(3)]
    dealt = batches.deal(split, 2, 2, seed=0, partition=parts)
    assert {len(dealt.inputs(step)) for step in range(4)} == {2}


@pytest.mark.parametrize(
    "given", [{"epochs": None, "steps": 2**31}, {"epochs": 2**30, "steps": None}]
)
def test_steps_that_int32_cannot_count_are_refused(given):
    with pytest.raises(InputError, match="must result in at most 2,147,483,647 optimizer steps"):
        batches.count_steps(2, **given)
    assert batches.count_steps(2, None, 2**31 - 1) == 2**31 - 1
