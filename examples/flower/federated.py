"""A Flower app: rounds between a server and nodes, as two functions.

flower-superlink --insecure --disable-runtime-dependency-installation
flower-supernode --insecure --port 9094 --node-config 'folder="/tmp/north" number=1'
flower-supernode --insecure --port 9095 --node-config 'folder="/tmp/south" number=3'
flwr run examples/flower
"""

import time

from ctde_jax.nodes.flower.app import client_app, server_app


def coordinate(link, config):
    """Runs in the ServerApp: asks every node for its number, and prints the mean."""
    for number in range(config["rounds"]):
        while len(link.nodes()) < config["nodes"]:
            time.sleep(0.5)
        nodes = link.nodes()
        link.push({node: b"number" for node in nodes}, deadline=60)
        numbers = []
        while len(numbers) < len(nodes):
            numbers += [float(reply) for _, reply in link.pull()]
            time.sleep(0.1)
        print(f"round {number}: mean {sum(numbers) / len(numbers)}")


def build(folder, config):
    """Runs once, in the worker of a node, which stays between rounds."""
    number = config["number"]

    def answer(request):
        return str(number).encode()

    return answer


server = server_app(coordinate)
client = client_app(build)
