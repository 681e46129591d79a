"""Nodes and servers in this process, for tests of the algorithm."""

import jax

import ctde_jax as ctde
from ctde_jax.nodes.link import run_rounds
from ctde_jax.nodes.node import Node, Setup
from ctde_jax.nodes.opening import open_server


class Direct:
    """A link to nodes in this process, which answer at once; `away` nodes are not connected."""

    def __init__(self, nodes, away=lambda identity: False):
        self.nodes = nodes
        self.away = away
        self.replies = []
        self.pulls = 0

    def connected(self):
        return [identity for identity in self.nodes if not self.away(identity)]

    def push(self, requests):
        for identity, request in requests.items():
            self.replies.append((identity, self.nodes[identity].answer(request)))

    def pull(self):
        # A run that waits for ever must fail.
        self.pulls += 1
        assert self.pulls < 2000, "no round was closed"
        replies, self.replies = self.replies, []
        return replies


def setup_of(data, rows, federation):
    return lambda options: Setup(ctde.data.partition.part(data, rows), lambda data: federation)


def make_nodes(folder, federation, data, parts, **options):
    device = jax.local_devices(backend="cpu")[0]
    return {
        f"key {index}": Node(
            folder / f"node-{index}",
            setup_of(data, rows, federation),
            [device],
            f"node {index}",
            index,
            **options,
        )
        for index, rows in enumerate(parts)
    }


def run_federation(folder, federation, data, parts, away=lambda identity: False, **options):
    """Runs a federation in this process; returns the server."""
    nodes = make_nodes(folder, federation, data, parts)
    saving = ctde.Saving(folder / "server")
    with open_server(federation, data, saving, show=False, **options) as server:
        run_rounds(server, Direct(nodes, away))
    return server
