"""Nodes that all answer compute the bits of `fit` on as many fake devices."""

from functools import partial

import jax
import numpy as np
import optax
import pytest
from cases import some
from conftest import ALL_DEVICES
from flax import linen
from nodes_here import run_federation

import ctde_jax as ctde
from ctde_jax.nodes.federation import Federation

two_phase, feedback = ctde.aggregate.two_phase, ctde.aggregate.error_feedback
NODES = 3
STRATEGIES = {
    "mean": ctde.aggregate.mean(),
    "int4": two_phase(feedback(ctde.aggregate.quantize(bits=4))),
    "top_k": two_phase(feedback(ctde.aggregate.top_k(k=16, chunk=256))),
    "gathered": ctde.aggregate.gathered(feedback(ctde.aggregate.top_k(k=16, chunk=256))),
    "median": two_phase(combine=ctde.aggregate.median()),
}


def federation_of(reduce, model=None, rounds=20, **options):
    outer = options.pop("outer", ctde.aggregate.AVERAGE)
    strategy = ctde.Strategy(inner_steps=2, reduce=reduce, outer=outer)
    optimizer = optax.adam(0.01)
    model = model or ctde.models.mlp([64, 16, 10])
    return Federation(model, optimizer, strategy, NODES, rounds, batch_size=24, **options)


class Net(linen.Module):
    """A network with random numbers and a state."""

    @linen.compact
    def __call__(self, x, train: bool):
        x = linen.Dense(16)(x.reshape(len(x), -1))
        x = linen.BatchNorm(use_running_average=not train)(x)
        x = linen.Dropout(0.2, deterministic=not train)(jax.nn.relu(x))
        return linen.Dense(10)(x)


def check_bits(folder, federation, data, parts=None):
    parts = parts or ctde.data.partition.iid(data.train.labels, NODES)
    trained = ctde.fit(
        federation.model,
        data,
        federation.optimizer,
        federation.strategy,
        batch_size=24,
        steps=federation.steps,
        devices=ALL_DEVICES[:NODES],
        partition=parts,
        show=False,
    )
    server = run_federation(folder, federation, data, parts)
    params, model_state = server.evaluated_center()
    jax.tree.map(np.testing.assert_array_equal, params, trained.params)
    # XLA computes a variance in other fusions, so batch statistics agree up to rounding.
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6), model_state, trained.model_state)
    rows = [row for row in server.record.log.rows if row["split"] == "test"]
    assert rows[-1]["accuracy"] == trained.tested["accuracy"]


@pytest.mark.parametrize("name", some(STRATEGIES, "median"))
def test_nodes_compute_the_bits_of_fit(tmp_path, digits, name):
    check_bits(tmp_path, federation_of(STRATEGIES[name]), digits)


@pytest.mark.slow
def test_momentum_of_the_outer_optimizer_has_the_bits_of_fit(tmp_path, digits):
    outer = optax.sgd(0.7, momentum=0.9, nesterov=True)
    int2 = two_phase(feedback(ctde.aggregate.quantize(bits=2, levels="statistical"), 0.95))
    check_bits(tmp_path, federation_of(int2, outer=outer), digits)


@pytest.mark.slow
def test_dropout_and_batch_statistics_have_the_bits_of_fit(tmp_path, digits):
    check_bits(tmp_path, federation_of(ctde.aggregate.mean(), Net(), rounds=5), digits)


@pytest.mark.slow
def test_uneven_nodes_have_the_bits_of_fit(tmp_path, digits):
    parts = ctde.data.partition.dirichlet(digits.train.labels, NODES, alpha=0.5)
    longest = max(-(-len(part) // 8) for part in parts)
    federation = federation_of(ctde.aggregate.mean(), rounds=longest, epoch_steps=longest)
    check_bits(tmp_path, federation, digits, parts)
