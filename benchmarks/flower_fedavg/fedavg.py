"""Flower's FedAvg, as a user of Flower writes it; see `nodes_bytes.py`.

Flower starts a process for each message, which would import JAX each time. Training and evaluation
are therefore done in the process of the benchmark, over a Unix socket whose bytes are not counted.
"""

import os
from multiprocessing.connection import Client

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

server = ServerApp()
client = ClientApp()


def ask(*request):
    """Returns the result of a call in the process of the benchmark."""
    with Client(os.environ["FEDAVG_SOCKET"]) as connection:
        connection.send(request)
        return connection.recv()


@client.train()
def train(message: Message, context: Context) -> Message:
    """Takes the local steps of a round."""
    arrays = message.content["arrays"].to_numpy_ndarrays()
    trained, examples = ask("train", context.node_config["part"], arrays)
    content = RecordDict(
        {
            "arrays": ArrayRecord(trained),
            "metrics": MetricRecord({"num-examples": examples}),
        }
    )
    return Message(content, reply_to=message)


@server.main()
def main(grid: Grid, context: Context) -> None:
    """Runs the rounds, and evaluates after each on the server, which nodes need not do."""
    nodes = int(context.run_config["nodes"])
    strategy = FedAvg(
        fraction_evaluate=0.0,
        min_train_nodes=nodes,
        min_available_nodes=nodes,
    )

    def evaluate(number: int, arrays: ArrayRecord) -> MetricRecord:
        return MetricRecord({"accuracy": ask("evaluate", number, arrays.to_numpy_ndarrays())})

    strategy.start(
        grid,
        ArrayRecord(ask("begin")),
        num_rounds=int(context.run_config["rounds"]),
        evaluate_fn=evaluate,
    )
    ask("end")
