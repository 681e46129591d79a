"""A host whose replicas average every gradient of their local steps is one replica."""

import jax
import numpy as np
import optax
import pytest
from flax import nnx
from jax import numpy as jnp
from virtual_replicas import FEATURES, OPTIMIZER, REPLICAS, initial_state, under_vmap

from ctde_jax import models
from ctde_jax.aggregate import (
    Strategy,
    error_feedback,
    gathered,
    gossip,
    hierarchical_mean,
    mean,
    median,
    private,
    quantize,
    two_phase,
)
from ctde_jax.data import Split
from ctde_jax.errors import InputError
from ctde_jax.models.tasks import classification
from ctde_jax.nodes.center import make_star
from ctde_jax.rounds import state
from ctde_jax.rounds.gradient import make_gradient
from ctde_jax.rounds.round import make_round

MODEL = models.mlp([FEATURES, 6, 3])
STEPS = 3

ACROSS = {
    "mean": mean(),
    "hierarchical mean": hierarchical_mean(2),
    "two-phase": two_phase(),
    "two-phase across hosts": two_phase(per_host=2),
    "gathered across hosts": gathered(error_feedback(quantize(8, block=8)), per_host=2),
}
"""Reducers for two hosts of two replicas."""


@pytest.fixture
def split() -> Split:
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(40, FEATURES)).astype(np.float32)
    return Split(jnp.asarray(inputs), jnp.asarray(rng.integers(0, 3, 40), jnp.int32))


def uneven_batches() -> np.ndarray:
    """Returns `[replica, steps, 2]`; in the last step, only the second replica has examples."""
    batches = np.arange(REPLICAS * STEPS * 2, dtype=np.int32).reshape(REPLICAS, STEPS, 2)
    batches[0, 1] = -1
    batches[3, :2, 1] = -1
    batches[[0, 2, 3], 2] = -1
    return batches


def by_host(batches: np.ndarray) -> np.ndarray:
    """Returns the batches of two replicas, each with the examples of two of the four."""
    return batches.reshape(2, 2, STEPS, 2).swapaxes(1, 2).reshape(2, STEPS, 4)


class Normalized(nnx.Module):
    """Synchronizes batch statistics."""

    def __init__(self, rngs: nnx.Rngs):
        self.first, self.norm = nnx.Linear(FEATURES, 8, rngs=rngs), nnx.BatchNorm(8, rngs=rngs)
        self.last = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        return self.last(self.norm(self.first(x)))


def run(strategy, split, rounds, key, replicas=REPLICAS, model=MODEL):
    """Runs rounds with these batches; returns the last state and all sums over the replicas."""
    before = initial_state(model, strategy, key, replicas=replicas)
    train_round = under_vmap(
        make_round(make_gradient(model, classification), OPTIMIZER, strategy), strategy
    )
    of_rounds = []
    for batches in rounds:
        before, sums = train_round(before, split, batches, key)
        of_rounds.append(jax.tree.map(lambda x: x.sum(axis=0), sums))
    return before, jax.tree.map(lambda *x: np.concatenate(x), *of_rounds)


def assert_close(tree, other, atol=1e-6):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=atol), tree, other)


@pytest.mark.slow
@pytest.mark.parametrize("name", ACROSS)
def test_host_is_one_replica_with_all_its_examples(name, split, key):
    """Two rounds; in some steps a replica, or all of a host, have no examples."""
    strategy = Strategy(STEPS, ACROSS[name], outer=optax.sgd(0.7, momentum=0.9), per_host=2)
    alone = Strategy(STEPS, outer=optax.sgd(0.7, momentum=0.9))
    rounds = [uneven_batches(), (uneven_batches() + 7) % 40 - 40 * (uneven_batches() < 0)]

    four, sums = run(strategy, split, rounds, key)
    two, sums_of_two = run(alone, split, [by_host(each) for each in rounds], key, replicas=2)

    # Error feedback in 8 bits changes the messages by up to 1/127 of them.
    atol = 1e-6 if "gathered" not in name else 2e-3
    assert_close(four.params, two.params, atol)
    assert_close(sums, sums_of_two, atol=1e-5 if "gathered" not in name else 1e-2)
    assert_close(jax.tree.map(lambda x: x[::2], four.opt_state), two.opt_state, 10 * atol)
    for leaf in jax.tree.leaves(four.opt_state):
        np.testing.assert_array_equal(leaf[::2], leaf[1::2])


@pytest.mark.slow
@pytest.mark.parametrize("model", [MODEL, models.from_nnx(Normalized)], ids=["mlp", "batch norm"])
def test_one_host_takes_the_steps_of_synchronous_training(model, split, key):
    """The average of one host is its parameters, so each local step is a synchronous step."""
    batches = uneven_batches()
    by_steps = [batches[:, [step]] for step in range(STEPS)]

    local, sums = run(Strategy(STEPS, per_host=REPLICAS), split, [batches], key, model=model)
    synchronous, sums_of_steps = run(Strategy(), split, by_steps, key, model=model)

    assert_close(local.params, synchronous.params)
    assert_close(local.model_state, synchronous.model_state)
    assert_close(sums, sums_of_steps, atol=1e-5)
    for leaf in jax.tree.leaves(jax.tree.map(lambda x: x[1:] - x[:1], local.opt_state)):
        assert not leaf.any()


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        (lambda: Strategy(2, per_host=0), "per_host must be at least 1, got 0"),
        (
            lambda: Strategy(per_host=4),
            "per_host requires inner_steps of at least 1; with inner_steps=0, there are no local",
        ),
        (
            lambda: Strategy(2, gossip(), diverges=True, per_host=2),
            "per_host must be 1 if replicas diverge, got 2",
        ),
        (
            lambda: Strategy(2, two_phase(combine=median()), per_host=2),
            "per_host must divide that of a reducer .* independent messages, which is 1, got 2",
        ),
        (
            lambda: Strategy(2, private(1.0, 1.0), per_host=2),
            "per_host must divide that of a reducer .* independent messages, which is 1, got 2",
        ),
        (
            lambda: state.check(jnp.zeros(8), Strategy(2, per_host=3), replicas=4),
            "per_host must divide the 4 devices, got 3",
        ),
        (
            lambda: make_star(Strategy(2, per_host=2), nodes=4),
            "per_host must be 1 between nodes, .* got 2",
        ),
        (
            lambda: make_star(Strategy(2, two_phase(per_host=2)), nodes=4),
            "reduce must be mean",
        ),
    ],
)
def test_unsuitable_hosts_are_refused(build, sentence):
    with pytest.raises(InputError, match=sentence):
        build()


@pytest.mark.slow
def test_robust_rule_combines_the_messages_of_hosts(split, key):
    """If the reducer averages within the same hosts; the median of two messages is their mean."""
    reduce = two_phase(combine=median(), per_host=2)
    batches = np.arange(REPLICAS * STEPS * 2, dtype=np.int32).reshape(REPLICAS, STEPS, 2)
    robust, _ = run(Strategy(STEPS, reduce, per_host=2), split, [batches], key)
    averaged, _ = run(Strategy(STEPS, per_host=2), split, [batches], key)
    assert_close(robust.params, averaged.params)
