"""A Flower app: handwritten digits, with DiLoCo and messages in 4 bits.

flower-superlink --insecure --disable-runtime-dependency-installation
flower-supernode --insecure --port 9094 --node-config 'folder="/tmp/north" part=1'
flower-supernode --insecure --port 9095 --node-config 'folder="/tmp/south" part=2'
flwr run examples/flower --stream

The process of a ClientApp lives for one message, so optax and JAX are imported in functions only,
which run in the ServerApp and in the worker of a node. `import ctde_jax` is lazy.
"""

import ctde_jax as ctde
from ctde_jax.nodes.flower.app import client_app, server_app

PARTS = 2


def make_federation(data, config):
    """Returns model, optimizer and strategy, from the configuration of the run."""
    import optax

    return ctde.nodes.Federation(
        ctde.models.mlp([64, 128, 10]),
        optax.adamw(0.005),
        ctde.strategy("diloco", sync_every=16, reduce="int4", error_feedback=True),
        nodes=PARTS,
        rounds=config["rounds"],
    )


def server_data(config):
    """Returns the data of the server, of which it uses the test split alone."""
    return ctde.data.digits()


def node_data(config):
    """Returns the data of a node, from its configuration: one of two parts of the examples."""
    data = ctde.data.digits()
    parts = ctde.data.partition.iid(data.train.labels, PARTS)
    return ctde.data.partition.part(data, parts[config["part"] - 1])


server = server_app(make_federation, server_data)
client = client_app(make_federation, node_data)
