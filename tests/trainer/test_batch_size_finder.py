"""The batch size finder: where the search ends, and what it finds. Asserts no times."""

from dataclasses import replace

import jax
import optax
import pytest
from conftest import ALL_DEVICES

from ctde_jax import Strategy, data, models
from ctde_jax.devices import memory
from ctde_jax.errors import InputError
from ctde_jax.models.tasks import classification
from ctde_jax.trainer import Training, batch_size_finder
from ctde_jax.trainer.batch_size_finder import Measurement, Search, advice, find
from ctde_jax.trainer.contestant import Spread


def measurement(batch_size: int, speed: float) -> Measurement:
    seconds = batch_size / speed
    return Measurement(batch_size, batch_size, Spread(seconds, seconds, seconds), 1000 * batch_size)


@pytest.fixture
def training(digits: data.Dataset) -> Training:
    """Local steps on two devices, 16 of 40 examples per step."""
    few = data.Split(*(array[:40] for array in digits.train))
    return Training(
        model=models.mlp([64, 10]),
        data=replace(digits, train=few),
        devices=ALL_DEVICES[:2],
        optimizer=optax.adam(0.001),
        strategy=Strategy(2),
        task=classification,
        batch_size=16,
        steps=4,
    )


def search_with(monkeypatch, training: Training, speeds: list[float], most: int = 10**6) -> Search:
    """Searches with these speeds; a batch of more than `most` examples exceeds the memory."""
    remaining = iter(speeds)

    def measure(training: Training, *_) -> Measurement:
        if training.batch_size > most:
            raise InputError("batch_size", "must fit into memory.")
        return measurement(training.batch_size, next(remaining))

    monkeypatch.setattr(batch_size_finder, "_measure", measure)
    return find(replace(training, batch_size=2), seconds=0, say=lambda text: None)


@pytest.mark.parametrize(
    ("speeds", "end"),
    [
        (
            [100, 109, 100],
            " at 8 examples, as the last two doublings raised the speed by less than",
        ),
        ([100, 200, 210, 220], " at 16 examples, as the last two doublings raised"),
        ([100, 105, 200, 210, 400], ", as 64 examples exceed the 40 training examples."),
    ],
)
def test_search_ends_after_two_doublings_without_gain(monkeypatch, training, speeds, end):
    search = search_with(monkeypatch, training, speeds)
    assert [each.batch_size for each in search.measured] == [2, 4, 8, 16, 32][: len(speeds)]
    assert search.end.startswith(f"The search ended{end}")


def test_search_ends_at_the_first_batch_that_exceeds_the_memory(monkeypatch, training):
    search = search_with(monkeypatch, training, [100, 200], most=4)
    assert [each.batch_size for each in search.measured] == [2, 4]
    assert search.end == ("The search ended at 8 examples: batch_size must fit into memory.")
    with pytest.raises(InputError, match="batch_size must fit into memory"):
        search_with(monkeypatch, training, [], most=1)


def test_smallest_batch_size_near_the_best_speed_is_found():
    speeds = {8: 100, 16: 500, 32: 901, 64: 1000, 128: 950}
    search = Search([measurement(*pair) for pair in speeds.items()], "The search ended.")
    assert (search.found.batch_size, search.best.batch_size) == (32, 64)
    end, found, caution = advice(search)
    assert end == search.end
    assert found.startswith("Of the measured batch sizes, 32 is the smallest that reaches 90%")
    assert "tune the learning rate again" in caution


def test_lack_of_memory_on_a_device_is_an_input_error(monkeypatch, training):
    def contestant(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes.")

    monkeypatch.setattr(batch_size_finder, "Contestant", contestant)
    with pytest.raises(InputError, match="batch_size must fit into memory, but the arrays of a"):
        find(training, seconds=0, say=lambda text: None)


@pytest.mark.slow
def test_search_measures_and_respects_the_memory(monkeypatch, training):
    """The second batch size is measured if its temporary arrays fit, and refused otherwise."""
    search = find(training, seconds=0, say=lambda text: None)
    assert [each.batch_size for each in search.measured] == [16, 32]
    assert [each.examples for each in search.measured] == [40 / 3, 40 / 2]
    assert all(0 < each.step.low <= each.step.median for each in search.measured)
    smaller, larger = (each.temporary for each in search.measured)
    assert smaller < larger

    monkeypatch.setattr(memory, "of_this_machine", lambda: 2 * larger - 1)
    limited = find(training, seconds=0, say=lambda text: None)
    assert [each.batch_size for each in limited.measured] == [16]
    assert limited.end.startswith(
        "The search ended at 32 examples: batch_size must fit into memory: the temporary arrays of "
        "a step on 2 CPU devices take at least "
    )
