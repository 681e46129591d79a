"""How long collectives and rounds take between processes of one core each, which talk through Gloo over loopback.

`scale_model.py` starts it with `--point`, and holds its model of time against what comes out. The first process starts
the others and measures; they do the same in step with it, and end when it does.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from itertools import product

import jax
import numpy as np
import points
import sockets
from jax.experimental import multihost_utils
from points import Row
from ways import CODECS, WAYS, launches, time_codec

PLAIN = ("all-reduce", "all-gather u8", "all-to-all u8")
SIZES = (2**10, 2**14, 2**16, 2**18, 2**20, 2**22)
PARAMETERS, BATCH_SIZE = 1_000_000, 8  # of a round's model, and of each process
PATIENCE = 0.3  # seconds for which a program is repeated


def join(index: int, processes: int, port: int) -> None:
    """Makes this process one of several, on a core that it may share."""
    if hasattr(os, "sched_setaffinity"):
        own = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {own[index % len(own)]})
    os.environ["NPROC"] = "4"  # threads of XLA's pool, in which collectives wait
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 1)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", processes, index)


def time_program(program: sockets.Program) -> float:
    """Returns the seconds of a call; all processes make the same number of calls."""
    run, _ = program
    for _ in range(2):  # opens the sockets, and then shows how often to repeat
        multihost_utils.sync_global_devices("start")
        before = time.perf_counter()
        jax.block_until_ready(run())
        took = time.perf_counter() - before
    repeats = int(multihost_utils.broadcast_one_to_all(np.int32(np.clip(PATIENCE / took, 3, 300))))
    seconds = []
    for _ in range(3):
        multihost_utils.sync_global_devices("start")
        before = time.perf_counter()
        for _ in range(repeats):
            jax.block_until_ready(run())
        seconds.append((time.perf_counter() - before) / repeats)
    return min(seconds)  # a stall of the network or the machine can only make it longer


def measure_all(part: str, processes: int) -> list[Row]:
    """Times the plain collectives, or the rounds; a single process exchanges nothing, but it encodes."""
    sockets.BATCH_SIZE = BATCH_SIZE * processes
    rows: list[Row] = []

    def add(program: sockets.Program, **says: object) -> None:
        before = time.perf_counter()
        rows.append({**says, "launches": launches(program[1]), "seconds": time_program(program)})
        print(f"{rows[-1]}, {time.perf_counter() - before:.1f} s", file=sys.stderr, flush=True)

    if part == "plain":
        for name, size in product(PLAIN, SIZES):
            add(sockets.collective(sockets.COLLECTIVES[name], size), name=name, size=size)
        return rows
    for name, way in WAYS.items():
        add(sockets.strategy_round(way.strategy, PARAMETERS), name=name)
    if processes == 1:
        rows += [{"name": name, **time_codec(codec, PARAMETERS)} for name, codec in CODECS.items()]
    return rows


def measure_point(part: str, processes: int) -> Row:
    """Starts the other processes, and is the first of them itself."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with ExitStack() as at_end:
        for index in range(1, processes):
            command = [sys.executable, __file__, "--follow", part, str(index), str(processes), str(port)]
            quiet = subprocess.DEVNULL
            follower = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=quiet, stderr=quiet)
            at_end.callback(follower.wait)
            at_end.callback(follower.kill)
        cores = points.cores()
        join(0, processes, port)
        programs = measure_all(part, processes)
        jax.distributed.shutdown()  # together with the others, or it would wait for them at the end
        return {"cores": cores, "programs": programs}


def follow(part: str, index: int, processes: int, port: int) -> None:
    """Is one of the other processes, and ends at once when the first one is gone."""

    def end_with_first() -> None:
        sys.stdin.read()
        os._exit(1)

    threading.Thread(target=end_with_first, daemon=True).start()
    join(index, processes, port)
    measure_all(part, processes)
    jax.distributed.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--point", type=json.loads, default={"part": "plain", "processes": 2}, help="what, in JSON")
    parser.add_argument("--follow", nargs=4, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.follow:
        part, *numbers = chosen.follow
        follow(part, *map(int, numbers))
    else:
        print(json.dumps(measure_point(chosen.point["part"], chosen.point["processes"])))


if __name__ == "__main__":
    main()
