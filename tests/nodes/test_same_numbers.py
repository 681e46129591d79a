"""Nodes that all answer compute the bits of `fit` on as many fake devices."""

import jax
import numpy as np
import optax
import pytest
from conftest import ALL_DEVICES
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


def check_bits(folder, federation, data):
    labels = data.train.labels
    parts = ctde.data.partition.iid(labels, NODES)
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
    jax.tree.map(np.testing.assert_array_equal, model_state, trained.model_state)
    rows = [row for row in server.record.log.rows if row["split"] == "test"]
    assert rows[-1]["accuracy"] == trained.tested["accuracy"]


@pytest.mark.parametrize("name", STRATEGIES)
def test_nodes_compute_the_bits_of_fit(tmp_path, digits, name):
    check_bits(tmp_path, federation_of(STRATEGIES[name]), digits)
