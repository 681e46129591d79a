"""The worker of a node: a process that keeps JAX and compiled programs between requests.

The processes that receive the messages of a node live for one message each. `ask` passes a request
from such a process to the node's worker and starts the worker if there is none; `serve` is the loop
of the worker. Neither imports JAX or numpy.
"""

from ctde_jax.nodes.worker.asking import WorkerFailed, ask
from ctde_jax.nodes.worker.serving import serve

__all__ = ["WorkerFailed", "ask", "serve"]
