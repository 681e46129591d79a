"""If a partition has more parts than devices, its parts are clients, sampled in every round."""

import jax
import numpy as np
import optax
import pytest
from jax import numpy as jnp

import ctde_jax as ctde
from ctde_jax import data, models
from ctde_jax.errors import InputError

RNG = np.random.default_rng(0)
SIZES = [7, 20, 1, 12, 0, 24]
LABELS = RNG.integers(0, 3, sum(SIZES), dtype=np.int32)
INPUTS = RNG.normal(size=(sum(SIZES), 4)).astype(np.float32)
SPLIT = data.Split(INPUTS, LABELS)
CLIENTS = np.split(RNG.permutation(sum(SIZES)), np.cumsum(SIZES)[:-1])
CLIENT_EPOCH = 6  # steps of an epoch of the largest client, with four examples per step
EVEN = np.split(np.arange(64), 8)


def deal(epochs: int = 1, seed: int = 0) -> data.Batches:
    return data.deal(SPLIT, 2, 8, seed, CLIENTS, inner_steps=epochs * CLIENT_EPOCH)


def client_of(rows: np.ndarray) -> int:
    """Returns the client whose examples these rows are, including padding by repetition."""
    (client,) = [
        i
        for i, examples in enumerate(CLIENTS)
        if set(np.where(rows < 0, ~rows, rows).flat) <= set(examples)
    ]
    return client


@pytest.mark.parametrize("epochs", [1, 3])
def test_client_uses_each_example_once_per_epoch(epochs):
    batches = deal(epochs)
    for number in range(8):
        for rows in batches.draw(number).swapaxes(0, 1):
            examples = CLIENTS[client_of(rows)]
            for epoch_rows in rows.reshape(epochs, -1):
                np.testing.assert_array_equal(
                    np.sort(epoch_rows[epoch_rows >= 0]), np.sort(examples)
                )


def test_examples_of_a_client_fill_its_batches_from_the_front():
    """A client takes one step per batch, and is idle until the largest client has finished."""
    for rows in deal().draw(0).swapaxes(0, 1):
        assert (np.diff((rows >= 0).ravel().astype(int)) <= 0).all()


def test_every_pass_has_another_order():
    """Orders differ between rounds, between epochs of a round, and between clients."""
    batches = data.deal(SPLIT, 2, 16, seed=0, partition=np.split(np.arange(64), 4), inner_steps=4)
    passes = [
        rows for number in range(6) for rows in batches.draw(number).swapaxes(0, 1).reshape(4, 16)
    ]
    assert len({tuple(rows % 16) for rows in passes}) == 24


def test_order_of_the_first_client_is_not_that_of_the_draw_of_clients():
    """The seeds `(seed, round, 0)` and `(seed, round)`, that of the draw, are equal in numpy."""
    batches = data.deal(SPLIT, 2, 32, seed=0, partition=np.split(np.arange(64), 4), inner_steps=1)
    compared = 0
    for number in range(8):
        order = np.random.default_rng((0, number)).permutation(16)
        for rows in batches.draw(number)[0]:
            if max(rows) < 16:
                assert not np.array_equal(rows, order)
                compared += 1
    assert compared >= 2


def test_round_after_a_partial_epoch_starts_a_new_epoch():
    """Nine steps are one and a half epochs of six steps; the next round starts with a new epoch."""
    nine, twelve = data.deal(SPLIT, 2, 8, 0, CLIENTS, inner_steps=9), deal(epochs=2)
    for number in range(3):
        np.testing.assert_array_equal(nine.draw(number), twelve.draw(number)[:9])
        np.testing.assert_array_equal(nine.steps(number * 9, number * 9 + 9), nine.draw(number))


def test_draws_depend_only_on_the_seed_and_the_round():
    batches, again = deal(), deal()
    backwards = [again.draw(number) for number in reversed(range(6))]
    np.testing.assert_array_equal(batches.steps(0, 36), np.concatenate(backwards[::-1]))
    assert any((batches.draw(number) != deal(seed=1).draw(number)).any() for number in range(3))


def test_clients_are_drawn_without_replacement_and_equally_often():
    """With 2 of 8 drawn: clients 1/4 of the time, pairs 1/28, within 5 standard deviations."""
    batches, rounds = data.deal(SPLIT, 2, 16, 0, EVEN), 2000
    first = batches.steps(0, rounds)[:, :, 0]  # [round, replica]
    drawn = np.where(first < 0, ~first, first) // 8
    assert (drawn[:, 0] != drawn[:, 1]).all()

    together = np.zeros((8, 8))
    np.add.at(together, (drawn[:, 0], drawn[:, 1]), 1)
    pairs = (together + together.T)[np.triu_indices(8, 1)]
    for counts, probability in [(np.bincount(drawn.ravel()), 1 / 4), (pairs, 1 / 28)]:
        deviation = np.sqrt(rounds * probability * (1 - probability))
        assert abs(counts - rounds * probability).max() < 5 * deviation


def test_client_without_examples_is_never_drawn():
    batches = deal()
    assert {
        client_of(rows) for number in range(50) for rows in batches.draw(number).swapaxes(0, 1)
    } == {0, 1, 2, 3, 5}


def test_every_example_is_used_once_per_epoch_on_average():
    """Eight clients on two devices: an epoch is as many steps as four client epochs."""
    batches = data.deal(SPLIT, 2, 8, 0, EVEN, inner_steps=2)
    assert batches.steps_per_epoch == 8
    epochs = 500
    counts = sum(
        np.bincount(rows[rows >= 0], minlength=64) for rows in batches.steps(0, 8 * epochs)
    )
    assert counts.mean() == epochs
    assert abs(counts - epochs).max() < 5 * np.sqrt(4 * epochs * 3 / 16)


def test_split_is_replicated_with_clients_and_sharded_without():
    assert deal().axis is None
    assert deal().split is SPLIT
    assert data.deal(SPLIT, 8, 8, 0, EVEN).axis == 0


def softmax_regression(params: dict[str, np.ndarray], rows: np.ndarray) -> dict[str, np.ndarray]:
    """Returns the gradient of the mean loss over these examples, in closed form."""
    outputs = INPUTS[rows] @ params["kernel"] + params["bias"][None]
    probabilities = np.exp(outputs) / np.exp(outputs).sum(axis=1, keepdims=True)
    error = (probabilities - np.eye(3)[LABELS[rows]]) / len(rows)
    return {"kernel": INPUTS[rows].T @ error, "bias": error.sum(axis=0)}


@pytest.mark.parametrize("epochs", [1, 2])
def test_fit_with_clients_equals_federated_averaging(epochs):
    """Compares with Algorithm 1 of McMahan et al. (2017), written in numpy in float64."""
    batches, learning_rate, rounds = deal(epochs, seed=3), 0.3, 7
    center = {"kernel": np.zeros((4, 3)), "bias": np.zeros(3)}
    for number in range(rounds):
        returned, sizes = [], []
        for rows in batches.draw(number).swapaxes(0, 1):
            local = center
            for step in rows:
                if (step >= 0).any():
                    grads = softmax_regression(local, step[step >= 0])
                    local = {name: local[name] - learning_rate * grads[name] for name in local}
            returned.append(local)
            sizes.append(len(CLIENTS[client_of(rows)]))
        center = {
            name: np.average([local[name] for local in returned], axis=0, weights=sizes)
            for name in center
        }

    def apply(params, model_state, inputs, key):
        return inputs @ params["kernel"] + params["bias"][None], model_state

    trained = ctde.fit(
        models.Model(
            lambda key, inputs: ({"kernel": jnp.zeros((4, 3)), "bias": jnp.zeros(3)}, {}), apply
        ),
        data.from_arrays(INPUTS, LABELS, INPUTS[:8], LABELS[:8]),
        optax.sgd(learning_rate),
        ctde.Strategy(inner_steps=epochs * CLIENT_EPOCH),
        batch_size=8,
        steps=rounds * epochs * CLIENT_EPOCH,
        partition=CLIENTS,
        devices=jax.devices()[:2],
        seed=3,
        show=False,
    )
    for name, expected in center.items():
        np.testing.assert_allclose(trained.params[name], expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("clients", "sentence"),
    [
        (
            np.split(np.arange(64), 2),
            "must have at least one part for each of the 4 devices, got 2",
        ),
        (
            [*np.split(np.arange(64), 2), *[np.arange(0)] * 4],
            "must have at least 4 parts with examples, .* got 2",
        ),
        (
            [*EVEN[:-1], np.arange(48, 64)],
            "must assign each of the 64 training examples to exactly one part, got 8",
        ),
    ],
)
def test_invalid_partition_is_refused(clients, sentence):
    with pytest.raises(InputError, match=f"partition {sentence}"):
        data.deal(SPLIT, 4, 8, 0, clients)


def test_round_without_steps_is_refused():
    with pytest.raises(InputError, match="inner_steps must be at least 1, got 0"):
        data.deal(SPLIT, 2, 8, 0, CLIENTS, inner_steps=0)
