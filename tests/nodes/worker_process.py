"""A worker without JAX for `test_worker.py`; the request determines its answer.

    python worker_process.py FOLDER [IDLE_SECONDS [PARENT]]

Each start appends its process to the file `starts` in the folder, and each request to `requests`.
"""

import os
import sys
import time
from pathlib import Path

from ctde_jax.errors import InputError
from ctde_jax.nodes.worker import frames, serve, serving

FOLDER = Path(sys.argv[1])

# Tests of silent connections should not take a minute.
serving._TRANSFER_SECONDS = 0.3


def append(name: str, text: str) -> None:
    with (FOLDER / name).open("a") as file:
        file.write(f"{text}\n")


def answer(request: bytes) -> bytes:
    word, _, argument = request.partition(b" ")
    append("requests", word.decode())
    if word == b"sleep":
        time.sleep(float(argument))
    elif word == b"die":
        os.abort()
    elif word == b"input":
        raise InputError("data_file", "must exist, got 'x.npz'; choose another file.")
    elif word == b"bug":
        raise KeyError("a\nb" * 500)
    elif word == b"full":
        # The error of a full disk, for every write.
        with open("/dev/full", "w") as full:
            full.write("x")
    elif word == b"print":
        print("x" * int(argument), flush=True)
    return str(os.getpid()).encode() if word != b"echo" else argument


if __name__ == "__main__":
    append("starts", str(os.getpid()))
    if (FOLDER / "refuse").exists():
        print("reading the data\nerror: data_file must exist.", flush=True)
        sys.exit(2)
    if (FOLDER / "killed").exists():
        (FOLDER / "killed").unlink()
        os.kill(os.getpid(), 9)
    frames.MOST_BYTES = 2**24
    idle = float(sys.argv[2]) if len(sys.argv) > 2 else 30.0
    serve(FOLDER, answer, idle, int(sys.argv[3]) if len(sys.argv) > 3 else None)
