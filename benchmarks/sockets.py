"""Holds the bytes that `traffic.py` reads off compiled programs against the machine's own count of bytes sent.

Real processes on this machine, one CPU device each, talk over loopback sockets through Gloo. What `/proc/net/dev` says
was sent through `lo`, minus what the same barriers send without a program between them, is what went over the wire:
with the headers of TCP and IP, which are 0.2 % of long messages.

    python benchmarks/sockets.py                      # every program and strategy, four processes
    python benchmarks/sockets.py --processes 3 --only all-reduce,synchronous --size 65536
"""

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from jax import lax
from jax import numpy as jnp
from jax.experimental import multihost_utils
from rich.console import Console
from rich.table import Table

import ctde_jax as ctde
from ctde_jax.config.presets import PRESETS
from ctde_jax.cost import traffic
from ctde_jax.cost.targets import compile_rounds
from ctde_jax.data import deal
from ctde_jax.devices import replica
from ctde_jax.devices.replica import AXIS
from ctde_jax.rounds import state

REPEATS = 20
BATCH_SIZE = 24  # divides over 2, 3, 4, 6 and 8 processes
TIMEOUT = 120  # seconds for one program, after which processes that wait for each other are ended


def next_one(x: jax.Array) -> jax.Array:
    """Sends everything to the next replica on a ring."""
    replicas = lax.axis_size(AXIS)
    return lax.ppermute(x, AXIS, [(i, (i + 1) % replicas) for i in range(replicas)])


COLLECTIVES: dict[str, Callable[[jax.Array], jax.Array]] = {
    "all-reduce": lambda x: lax.psum(x, AXIS),
    "reduce-scatter": lambda x: lax.psum_scatter(x, AXIS, tiled=True),
    "all-gather u8": lambda x: lax.all_gather(x.astype(jnp.uint8), AXIS, tiled=True),
    "all-to-all u8": lambda x: lax.all_to_all(x.astype(jnp.uint8), AXIS, 0, 0, tiled=True),
    "collective-permute": next_one,
    "all-reduce int8": lambda x: lax.psum(x.astype(jnp.int8), AXIS),
    "all-reduce bf16": lambda x: lax.psum(x.astype(jnp.bfloat16), AXIS),
}

OPTIONS: dict[str, dict[str, Any]] = {
    **{f"diloco {bits}": {"reduce": bits, "error_feedback": True} for bits in ("int8", "int4", "int2", "sign")},
    "diloco top_k": {"reduce": "top_k"},
    "diloco top_k gathered": {"reduce": "top_k", "exchange": "gathered"},
    "diloco random_k": {"reduce": "random_k", "error_feedback": True},
    "diloco power_sgd": {"reduce": "power_sgd"},
    **{f"diloco {rule}": {"combine": rule, "byzantine": 0} for rule in ("median", "trimmed_mean", "krum")},
    **{f"diloco {rule}": {"combine": rule} for rule in ("geometric_median", "centered_clipping")},
    "diloco private": {"clip_norm": 1.0, "noise_multiplier": 1.0},
    "gossip exponential": {"graph": "exponential"},
    "streaming-diloco int4": {"reduce": "int4"},
}
"""Variants of the presets, by a preset's name and a word."""

STRATEGIES = {
    **{name: ctde.strategy(name, sync_every=4 * (name != "ddp"), synchronous_steps=0) for name in PRESETS},
    **{name: ctde.strategy(name.split()[0], **{"sync_every": 4, **options}) for name, options in OPTIONS.items()},
}

Program = tuple[Callable[[], object], traffic.Traffic]
"""One call of it runs one round; and what the ruler says of it."""


def collective(function: Callable[[jax.Array], jax.Array], size: int) -> Program:
    """Compiles a collective over messages of so many numbers."""
    devices = jax.devices()
    message = replica.shard(np.ones((len(devices), size - size % len(devices)), np.float32), devices)
    program = replica.parallel(function, devices, in_axes=(0,), out_axes=0).lower(message).compile()
    return lambda: program(message), traffic.measure(program.as_text() or "", 0, hosts())


def strategy_round(strategy: ctde.Strategy, size: int) -> Program:
    """Compiles a round of a strategy for a model of about so many parameters."""
    devices = jax.devices()
    width = size // (32 + 4)
    inputs = np.random.default_rng(0).normal(size=(BATCH_SIZE * 4, 32)).astype(np.float32)
    data = ctde.data.from_arrays(inputs, np.arange(len(inputs)) % 4, inputs, np.arange(len(inputs)) % 4)
    model, optimizer = ctde.models.mlp([32, width, 4]), optax.sgd(0.1)
    batches = deal(data.train, len(devices), BATCH_SIZE, seed=0)
    params, model_state = jax.jit(model.init)(jax.random.key(0), data.train.inputs[:1])
    train_state = state.place(params, model_state, optimizer, strategy, devices)
    examples, key = replica.replicate((batches.split, jax.random.key(1)), devices)
    steps = max(1, strategy.inner_steps)
    indices = replica.shard(batches.steps(0, steps).swapaxes(0, 1)[:, None], devices)  # [replica, round, step, example]
    program = compile_rounds(model, data, ctde.tasks.classification, optimizer, strategy, batches, devices)

    def run() -> object:
        nonlocal train_state
        train_state, sums = program(train_state, examples, indices, np.int32(0), np.int32(1), key)
        return sums

    return run, traffic.measure(program.as_text() or "", strategy.inner_steps, hosts())


def hosts() -> list[int]:
    """Each process stands for a host."""
    return [device.process_index for device in jax.devices()]


def sent_through_loopback() -> int:
    """Reads how many bytes this machine, or this network namespace, has sent to itself."""
    (line,) = (line for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith("lo:"))
    return int(line.split(":")[1].split()[8])


def count(run: Callable[[], object], repeats: int) -> int:
    """Returns the bytes sent by so many runs, all processes together, and by the barriers around them."""
    multihost_utils.sync_global_devices("before")
    time.sleep(0.1)  # the other processes leave the barrier later
    before = sent_through_loopback()
    multihost_utils.sync_global_devices("start")
    for _ in range(repeats):
        jax.block_until_ready(run())
    multihost_utils.sync_global_devices("stop")
    time.sleep(0.1)
    return sent_through_loopback() - before


def process(index: int, processes: int, port: int, names: list[str], size: int) -> None:
    """Is one of the processes; the first one prints a line of JSON for each program."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 1)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", processes, index)
    for name in names:
        if name in COLLECTIVES:
            run, measured = collective(COLLECTIVES[name], size)
        else:
            run, measured = strategy_round(STRATEGIES[name], size)
        jax.block_until_ready(run())  # opens the sockets
        idle = count(run, 0)
        socket_bytes = (count(run, REPEATS) - idle) / REPEATS
        if index == 0:
            print(json.dumps({"name": name, "wire": measured.across, "sockets": socket_bytes}), flush=True)
    jax.distributed.shutdown()


def measure(processes: int, names: list[str], size: int) -> list[dict[str, Any]]:
    """Runs the processes and returns the bytes of each program by name, of all processes together, a round."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, __file__, "--processes", str(processes), "--only", ",".join(names), "--size", str(size)]
    environment = {**os.environ, "NPROC": "4"}  # threads of XLA's pool, in which collectives wait
    with tempfile.TemporaryFile("w+") as errors, ExitStack() as at_end:
        started = []
        for index in range(processes):
            arguments = [*command, "--index", str(index), "--port", str(port)]
            output = subprocess.DEVNULL if index else subprocess.PIPE
            started.append(subprocess.Popen(arguments, stdout=output, stderr=errors, env=environment, text=True))
            at_end.callback(started[-1].wait)
            at_end.callback(started[-1].kill)

        rows: list[dict[str, Any]] = []
        for name in names:
            impatient = threading.Timer(TIMEOUT, started[0].kill)
            impatient.start()
            line = next((line for line in started[0].stdout if line.startswith("{")), "")  # Gloo prints, too
            impatient.cancel()
            if not line:
                errors.seek(0)
                raise RuntimeError(f"{name} failed, or took more than {TIMEOUT} s:\n{errors.read()[-4000:]}")
            rows.append(json.loads(line))
    return rows


def alone() -> list[str]:
    """Returns how to start a command with a loopback that nobody else uses, and that leaves no process behind."""
    enter = ["unshare", "--map-root-user", "--net", "--pid", "--fork", "--kill-child"]
    if (
        not shutil.which("unshare")
        or not shutil.which("ip")
        or subprocess.run([*enter, "true"], capture_output=True).returncode
    ):
        return []
    return [*enter, "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]


def main() -> None:
    """Prints the table, or with `--json` a line for each program."""
    parser = argparse.ArgumentParser(description="bytes by the compiled program and by the socket counters")
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--size", type=int, default=1 << 20, help="numbers in a message, or parameters of the model")
    parser.add_argument("--only", default=",".join([*COLLECTIVES, *STRATEGIES]), help="names, with commas between")
    parser.add_argument("--json", action="store_true", help="print lines of JSON instead of a table")
    for internal in ("--index", "--port"):
        parser.add_argument(internal, type=int, help=argparse.SUPPRESS)
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    names = chosen.only.split(",")
    if chosen.index is not None:
        process(chosen.index, chosen.processes, chosen.port, names, chosen.size)
        return
    if not chosen.alone and (namespace := alone()):
        os.execvp(namespace[0], [*namespace, sys.executable, *sys.argv, "--alone"])

    rows = measure(chosen.processes, names, chosen.size)
    if chosen.json:
        print("\n".join(map(json.dumps, rows)))
        return
    shown = Table(
        title=f"{chosen.processes} Gloo processes, {chosen.size:,} numbers, bytes a round", caption=jax.__version__
    )
    for column in ("program", "compiled program", "sockets", "difference"):
        shown.add_column(column, justify="left" if column == "program" else "right")
    for row in rows:
        difference = f"{row['sockets'] / row['wire'] - 1:+.2%}"
        shown.add_row(row["name"], f"{row['wire']:,.0f}", f"{row['sockets']:,.0f}", difference)
    Console().print(shown)


if __name__ == "__main__":
    main()
