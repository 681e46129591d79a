"""Nodes that were away, or too late, receive no more than they lack."""

import optax
import pytest
from nodes_here import Direct, make_nodes

import ctde_jax as ctde
from ctde_jax.nodes.envelope import unpack
from ctde_jax.nodes.link import run_rounds
from ctde_jax.nodes.opening import open_server


@pytest.fixture
def two(tmp_path, digits):
    """Returns a server with two nodes after three rounds, and a function that makes the nodes."""
    strategy = ctde.strategy("diloco", sync_every=2, reduce="int4")
    model = ctde.models.mlp([64, 8, 10])
    federation = ctde.nodes.Federation(model, optax.adam(0.01), strategy, nodes=2, rounds=9)
    parts = ctde.data.partition.iid(digits.train.labels, 2)

    def make():
        return make_nodes(tmp_path, federation, digits, parts)

    saving = ctde.Saving(tmp_path / "server")
    with open_server(federation, digits, saving, quorum=1, show=False) as server:
        nodes = make()
        run_rounds(server, Direct(nodes), rounds=3)
        yield server, nodes, make


def close_with(server, node, nodes):
    server.accept(node, nodes[node].answer(server.request(node)), 0.0)
    server.close()


@pytest.mark.slow
def test_node_that_was_lost_is_introduced_before_it_is_asked(two):
    """Its new process would not understand a long request, such as the center."""
    server, _, make = two
    server.request("key 1")
    server.report("key 1", "The node was restarted.", 0.0)
    request = server.request("key 1")
    assert unpack(request).header["kind"] == "join"
    server.accept("key 1", make()["key 1"].answer(request), 1.0)
    assert unpack(server.request("key 1")).header["kind"] == "round"


@pytest.mark.slow
def test_node_that_is_late_receives_the_answers_that_it_lacks(two):
    server, nodes, _ = two
    request = server.request("key 1")
    close_with(server, "key 0", nodes)
    close_with(server, "key 0", nodes)
    server.accept("key 1", nodes["key 1"].answer(request), 0.0)
    header = unpack(server.request("key 1")).header
    assert header["since"] == 3
    assert len(header["values"]) == 2
    assert not header["taken"]
