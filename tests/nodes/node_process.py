"""A node, started by the tests of Flower: `node_process.py FOLDER ADDRESS [CA]`.

A request `sleep SECONDS` waits, `raise` fails, `size BYTES` returns many bytes; others are echoed.
"""

import sys
import time
from pathlib import Path

from ctde_jax.errors import InputError
from ctde_jax.nodes.flower.node import run_node


def answer(request: bytes) -> bytes:
    verb, _, number = request.decode().partition(" ")
    if verb == "sleep":
        time.sleep(float(number))
    if verb == "raise":
        raise ValueError("a request for the test")
    return bytes(int(number)) if verb == "size" else request


if __name__ == "__main__":
    authority = Path(sys.argv[3]) if len(sys.argv) > 3 else None
    try:
        run_node(Path(sys.argv[1]), sys.argv[2], answer, authority=authority)
    except InputError as error:
        raise SystemExit(str(error)) from None
