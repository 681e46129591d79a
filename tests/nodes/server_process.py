"""A server, started by the tests of Flower: prints the nodes, and a line for each round.

`server_process.py FOLDER PORT`
"""

import sys
import time
from pathlib import Path

from ctde_jax.nodes.certificates import create_certificates
from ctde_jax.nodes.flower.serving import serve
from ctde_jax.nodes.keys import read_allowed

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    certificates = create_certificates(folder, [])
    allowed = read_allowed(folder / "allowed")
    port = int(sys.argv[2])
    with serve(folder, "127.0.0.1", port, certificates=certificates, allowed=allowed) as link:
        while True:
            for node, reply in link.pull():
                print(link.identity(node), reply, flush=True)
                time.sleep(0.1)
                link.push({node: b"round"}, 30)
            for node in link.nodes() if not link._outstanding else ():
                link.push({node: b"round"}, 30)
            time.sleep(0.05)
