"""Training from disk, or from an iterator of batches, equals training on data in device memory."""

import os
import signal
import threading
import time

import jax
import numpy as np
import optax
import pytest
from flax import nnx

import ctde_jax as ctde
from ctde_jax import data, devices, models
from ctde_jax.errors import InputError
from ctde_jax.rounds import evaluate
from ctde_jax.rounds.feed import prefetched

MODEL = models.mlp([64, 16, 10])


class Net(nnx.Module):
    """Has dropout and batch statistics."""

    def __init__(self, rngs: nnx.Rngs):
        self.hidden = nnx.Linear(64, 16, rngs=rngs)
        self.norm = nnx.BatchNorm(16, rngs=rngs)
        self.dropout = nnx.Dropout(0.3, rngs=rngs)
        self.out = nnx.Linear(16, 10, rngs=rngs)

    def __call__(self, x):
        return self.out(self.dropout(nnx.relu(self.norm(self.hidden(x.reshape(len(x), -1))))))


@pytest.fixture
def on_disk(digits, tmp_path):
    """Returns the digits as memory-mapped files."""
    arrays = (digits.train.inputs, digits.train.labels, digits.test.inputs, digits.test.labels)
    for i, array in enumerate(arrays):
        np.save(tmp_path / f"{i}.npy", array)
    return data.from_arrays(*(np.load(tmp_path / f"{i}.npy", mmap_mode="r") for i in range(4)))


@pytest.fixture
def in_memory(digits):
    return data.from_arrays(*digits.train, *digits.test)


def train(dataset: data.Dataset, model=MODEL, **options) -> ctde.Trained:
    options = {
        "devices": devices.start(4),
        "batch_size": 64,
        "steps": 30,
        "log_every": 4,
        "show": False,
        **options,
    }
    return ctde.fit(model, dataset, optax.adam(0.01), **options)


def assert_same_run(one: ctde.Trained, other: ctde.Trained):
    jax.tree.map(np.testing.assert_array_equal, one.params, other.params)
    for row, expected in zip(one.history, other.history, strict=True):
        assert row["examples"] == expected["examples"]
        assert row["loss"] == pytest.approx(expected["loss"], rel=1e-5)


PARTS = np.split(np.random.default_rng(0).permutation(1438), [500, 500, 900])
PHASES = ctde.Strategy(
    shared_batches=True, later={4: ctde.Strategy(), 8: ctde.Strategy(4), 16: ctde.Strategy(8)}
)
RUNS = {
    "synchronous": {"eval_every": 10},
    "local, augmented": {
        "strategy": ctde.Strategy(inner_steps=3),
        "augment": ctde.augment.shift(1),
    },
    "parts, one empty": {
        "partition": PARTS,
        "strategy": ctde.Strategy(4),
        "augment": ctde.augment.shift(1),
    },
    "clients": {"partition": np.array_split(np.arange(1438), 6), "strategy": ctde.Strategy(4)},
    "phases": {"strategy": PHASES},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_training_from_disk_gives_the_same_bits(name, in_memory, on_disk):
    assert_same_run(train(on_disk, **RUNS[name]), train(in_memory, **RUNS[name]))


@pytest.mark.slow
def test_dropout_and_batch_statistics_from_disk_are_the_same(in_memory, on_disk):
    model = models.from_nnx(Net)
    one, other = (
        train(d, model, accumulation_steps=2, reestimate_batches=3) for d in (on_disk, in_memory)
    )
    assert_same_run(one, other)
    jax.tree.map(np.testing.assert_array_equal, one.model_state, other.model_state)


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 3])
def test_evaluation_from_disk_counts_every_example_once(in_memory, on_disk, count, monkeypatch):
    """In one piece, in several pieces, and with a last piece that is not full."""
    trained = train(in_memory, devices=devices.start(count), batch_size=48, steps=2)
    expected = trained.evaluate(in_memory.test)
    for size in (1, 100 * 68, 2**25):
        monkeypatch.setattr(evaluate, "BYTES_AT_ONCE", size)
        assert trained.evaluate(on_disk.test) == pytest.approx(expected, rel=1e-5)
    np.testing.assert_array_equal(
        trained.predict(on_disk.test.inputs), trained.predict(in_memory.test.inputs)
    )


def in_batches(dataset: data.Dataset, batch_size: int, seed: int = 0):
    """Returns the batches that `fit` would draw, as a function of the epoch, and their number."""
    order = data.deal(dataset.train, 1, batch_size, seed)

    def batches(epoch: int):
        for row in order.draw(epoch)[:, 0]:
            yield dataset.train.inputs[row[row >= 0]], dataset.train.labels[row[row >= 0]]

    return batches, order.steps_per_epoch


@pytest.mark.slow
def test_training_from_an_iterable_gives_the_same_bits(in_memory):
    """Two epochs, each with a short last batch, and evaluations in the middle of them."""
    streamed = data.from_batches(*in_batches(in_memory, 64), *in_memory.test)
    assert (
        repr(streamed)
        == "Dataset('batches', 64 training examples in a batch and 359 test examples, 10 classes)"
    )
    options = {"steps": 46, "eval_every": 15, "strategy": ctde.Strategy(inner_steps=5)}
    one, other = train(streamed, **options), train(in_memory, **options)
    assert_same_run(one, other)
    assert sum(row["examples"] for row in one.history if row["split"] == "train") == 2 * 1438


class Loader:
    """An iterable object, like a Grain loader."""

    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


def small(batches, steps_per_epoch=3, **options) -> data.Dataset:
    inputs = np.zeros((4, 64), np.float32)
    return data.from_batches(
        batches, steps_per_epoch, inputs, np.arange(4), **{"classes": (*"0123456789",), **options}
    )


BATCH = (np.ones((64, 64)), np.zeros(64, int))
MISTAKES = {
    "another shape": (
        (np.ones((64, 8)), BATCH[1]),
        r"batches must match the first batch.*examples, 64\].*examples, 8\]",
    ),
    "another type": (
        (np.ones((64, 64), np.uint8), BATCH[1]),
        "inputs are float32.* got uint8.* in batch 1 of epoch 0",
    ),
    "larger batch": (
        (np.ones((65, 64)), np.zeros(65, int)),
        "batch_size must be the size .* got 64, but a batch has 65",
    ),
    "unknown class": (
        (BATCH[0], np.full(64, 10)),
        "labels of batch 1 of epoch 0 must be from 0 to 9",
    ),
    "fewer labels": (
        (BATCH[0], np.zeros(63, int)),
        "labels of batch 1 .* for each of the 64 examples, got 63",
    ),
    "empty batch": (
        (np.ones((0, 64)), np.zeros(0, int)),
        "inputs of batch 1 of epoch 0 must contain at least one example",
    ),
    "not a pair": (
        {"inputs": BATCH[0]},
        "batches must yield pairs of inputs and labels, or .* got dict",
    ),
    "NaN": ((np.full((64, 64), np.nan), BATCH[1]), "inputs of batch 1 of epoch 0 must be finite"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_batch_that_differs_from_the_first_is_refused(mistake):
    batch, sentence = MISTAKES[mistake]
    dataset = small(lambda epoch: Loader([BATCH, batch, BATCH]))
    with pytest.raises(InputError, match=sentence):
        train(dataset, steps=4, log_every=1)
    assert_no_thread()


def test_epoch_that_ends_early_is_an_error():
    with pytest.raises(
        InputError, match=r"steps_per_epoch must be the number .* got 3, but epoch 1 ended after 2"
    ):
        train(small(lambda epoch: Loader([BATCH] * (3 - epoch))), steps=8, log_every=1)
    with pytest.raises(
        InputError, match="batches must yield at least one batch, got none in epoch 0"
    ):
        small(lambda epoch: [])


def test_functions_of_all_examples_refuse_batches():
    dataset = small(lambda epoch: Loader([BATCH] * 3))
    for function in (lambda: data.hold_out(dataset, 0.1), lambda: data.standardized(dataset)):
        with pytest.raises(
            InputError, match="requires a data set of arrays, but batches yields batches"
        ):
            function()
    with pytest.raises(InputError, match="partition requires a data set of arrays"):
        train(dataset, partition=PARTS)
    with pytest.raises(
        InputError, match="batch_size must be a multiple of the 4 devices, got 62; use 64"
    ):
        train(dataset, batch_size=62)
    with pytest.raises(
        InputError,
        match="batch_size must be the size of the data set's batches, got 32, but a batch has 64",
    ):
        train(dataset, batch_size=32)


def test_exception_of_the_iterable_is_raised_unchanged():
    class CameraError(Exception):
        pass

    def batches(epoch: int):
        yield BATCH
        yield BATCH
        if threading.current_thread() is not threading.main_thread():
            raise CameraError("the camera is off")

    with pytest.raises(CameraError, match="the camera is off") as caught:
        train(small(batches), steps=8, log_every=1)
    assert caught.traceback[-1].name == "batches"
    assert_no_thread()


def test_grain_loader_is_accepted():
    grain = pytest.importorskip("grain.python")
    examples = [(np.full(64, i / 1000, np.float32), np.int32(i % 10)) for i in range(192)]
    dataset = grain.MapDataset.source(examples).shuffle(seed=0).batch(64)
    trained = train(small(lambda epoch: dataset.to_iter_dataset()), steps=6)
    assert trained.history[-1]["step"] == 6


def assert_no_thread():
    assert [
        thread for thread in threading.enumerate() if thread.name == "feed" and thread.is_alive()
    ] == []


def test_one_item_is_prefetched():
    drawn = []
    with prefetched(drawn.append(i) or i for i in range(9)) as items:
        for expected in range(4):
            assert next(items) == expected
        deadline = time.monotonic() + 10
        while len(drawn) < 5 and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.05)
        assert drawn == [0, 1, 2, 3, 4]
    assert_no_thread()
    with prefetched(i for i in range(3)) as items:
        assert list(items) == [0, 1, 2]
    assert_no_thread()


@pytest.mark.slow
def test_thread_ends_with_the_run(on_disk, tmp_path):
    """At the end of training, on a loss that is not finite, and on Ctrl-C."""
    train(on_disk, steps=3)
    assert_no_thread()

    with pytest.raises(ctde.NonFiniteLoss):
        ctde.fit(
            MODEL,
            on_disk,
            optax.sgd(float("inf")),
            devices=devices.start(2),
            batch_size=64,
            steps=50,
            show=False,
        )
    assert_no_thread()

    def batches(epoch: int):
        for step in range(1000):
            if step == 20:
                os.kill(os.getpid(), signal.SIGINT)
            yield BATCH

    trained = train(small(batches, 1000), steps=1000, log_every=2)
    assert trained.interrupted
    assert trained.step < 100
    assert_no_thread()


def test_second_interrupt_does_not_wait_for_the_iterable():
    """The thread blocks in the user's code, and is released at the end."""
    hangs = threading.Event()

    def interrupted():
        with prefetched(hangs.wait(20) for _ in range(2)):
            raise KeyboardInterrupt

    try:
        started = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            interrupted()
        assert time.monotonic() - started < 10
    finally:
        hangs.set()
        for thread in threading.enumerate():
            if thread.name == "feed":
                thread.join(10)
    assert_no_thread()


def test_memory_stays_bounded(tmp_path):
    """Reading a file of 200 MB row by row adds at most 30 MB of resident memory."""
    with open(tmp_path / "big", "wb") as file:
        file.truncate(200 * 2**20)
    inputs = np.memmap(tmp_path / "big", np.uint8, "r", shape=(200 * 1024, 32, 32))
    split = data.from_arrays(
        inputs, np.zeros(len(inputs), int), inputs[:10], np.zeros(10, int)
    ).train
    order = np.random.default_rng(0).permutation(len(inputs)).reshape(100, -1)
    split.inputs[order[0]]
    before = resident()
    for rows in order:
        split.inputs[rows]
    assert resident() - before < 30 * 2**20


def resident() -> int:
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except FileNotFoundError:
        pytest.skip("needs /proc")
