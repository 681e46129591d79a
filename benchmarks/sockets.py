"""Compares the bytes that `traffic.py` counts in compiled programs with the bytes of real sockets.

Processes on this machine with one CPU device each communicate over loopback sockets through Gloo.
The bytes on the wire are those that `/proc/net/dev` counts as sent through `lo`, minus those of the
same barriers without a program between them. They include the headers of TCP and IP, which are
0.2 % of long messages.

    python benchmarks/sockets.py                      # every program and strategy, four processes
    python benchmarks/sockets.py --processes 3 --only all-reduce,synchronous --size 65536
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import optax
import tyro
from harness import (
    Failed,
    Row,
    Table,
    command_line,
    console,
    machine,
    point_command,
    print_table,
    started,
)
from jax import lax
from jax import numpy as jnp
from jax.experimental import multihost_utils

import ctde_jax as ctde
from ctde_jax.config.presets import PRESETS
from ctde_jax.cost import traffic
from ctde_jax.cost.targets import compile_rounds
from ctde_jax.data import deal
from ctde_jax.devices import replica
from ctde_jax.devices.replica import AXIS
from ctde_jax.rounds import Resident, state

REPEATS = 20
BATCH_SIZE = 24  # divides over 2, 3, 4, 6 and 8 processes
TIMEOUT = 120  # seconds for one program; ends processes that wait for each other


COLLECTIVES: dict[str, Callable[[jax.Array], jax.Array]] = {
    "all-reduce": lambda x: lax.psum(x, AXIS),
    "reduce-scatter": lambda x: lax.psum_scatter(x, AXIS, tiled=True),
    "all-gather u8": lambda x: lax.all_gather(x.astype(jnp.uint8), AXIS, tiled=True),
    "all-to-all u8": lambda x: lax.all_to_all(x.astype(jnp.uint8), AXIS, 0, 0, tiled=True),
    "collective-permute": lambda x: lax.ppermute(
        x, AXIS, [(i, (i + 1) % len(jax.devices())) for i in range(len(jax.devices()))]
    ),
    "all-reduce int8": lambda x: lax.psum(x.astype(jnp.int8), AXIS),
    "all-reduce bf16": lambda x: lax.psum(x.astype(jnp.bfloat16), AXIS),
}

OPTIONS: dict[str, dict[str, Any]] = {
    **{
        f"diloco {bits}": {"reduce": bits, "error_feedback": True}
        for bits in ("int8", "int4", "int2", "sign")
    },
    "diloco top_k": {"reduce": "top_k"},
    "diloco top_k gathered": {"reduce": "top_k", "exchange": "gathered"},
    "diloco random_k": {"reduce": "random_k", "error_feedback": True},
    "diloco power_sgd": {"reduce": "power_sgd"},
    **{
        f"diloco {rule}": {"combine": rule, "byzantine": 0}
        for rule in ("median", "trimmed_mean", "krum")
    },
    **{f"diloco {rule}": {"combine": rule} for rule in ("geometric_median", "centered_clipping")},
    "diloco private": {"dp_clip_norm": 1.0, "dp_noise_multiplier": 1.0},
    "gossip exponential": {"graph": "exponential"},
    "streaming-diloco int4": {"reduce": "int4"},
}
"""Variants of the presets, by the name of a preset and a suffix."""

# Four local steps in a round, except for ddp, which communicates at every step. The rounds of qsr
# are those of local-sgd.
STRATEGIES = {
    **{
        name: ctde.strategy(name, sync_every=4 * (name != "ddp"), synchronous_steps=0)
        for name in PRESETS
        if name != "qsr"
    },
    **{
        name: ctde.strategy(name.split()[0], **{"sync_every": 4, **options})
        for name, options in OPTIONS.items()
    },
}

# A function that runs one round, its HLO, and the number of local steps in a round.
Program = tuple[Callable[[], object], str, int]


def collective(function: Callable[[jax.Array], jax.Array], size: int) -> Program:
    """Compiles a collective over float32 messages of `size` numbers on each device."""
    devices = jax.devices()
    # Rounded down to a multiple of the devices, as scattered collectives need it.
    message = replica.shard(
        np.ones((len(devices), size - size % len(devices)), np.float32), devices
    )
    program = replica.parallel(function, devices, in_axes=(0,), out_axes=0).lower(message).compile()
    return lambda: program(message), program.as_text() or "", 0


def strategy_round(strategy: ctde.Strategy, size: int) -> Program:
    """Compiles a round of a strategy for a perceptron of about `size` parameters."""
    # The model and its data. A hidden unit has 32 + 4 weights.
    devices = jax.devices()
    width = size // (32 + 4)
    inputs = np.random.default_rng(0).normal(size=(BATCH_SIZE * 4, 32)).astype(np.float32)
    data = ctde.data.from_arrays(
        inputs, np.arange(len(inputs)) % 4, inputs, np.arange(len(inputs)) % 4
    )
    model = ctde.models.mlp([32, width, 4])
    optimizer = optax.sgd(0.1)
    batches = deal(data.train, len(devices), BATCH_SIZE, seed=0)

    # The arguments of the program: state, examples, and the order of one round.
    params, model_state = jax.jit(model.init)(jax.random.key(0), data.train.inputs[:1])
    train_state = state.place(params, model_state, optimizer, strategy, devices)
    examples, key = replica.replicate((batches.split, jax.random.key(1)), devices)
    steps = max(1, strategy.inner_steps)
    # int32[replica, round, step, example]
    indices = replica.shard(batches.steps(0, steps).swapaxes(0, 1)[:, None], devices)
    program = compile_rounds(
        model, data, ctde.tasks.classification, optimizer, strategy, Resident(batches), devices
    )

    def run() -> object:
        nonlocal train_state
        train_state, sums = program(train_state, examples, indices, np.int32(0), np.int32(1), key)
        return sums

    return run, program.as_text() or "", strategy.inner_steps


def sent_through_loopback() -> int:
    """Returns the bytes sent through `lo` so far in this network namespace."""
    (line,) = (
        line
        for line in Path("/proc/net/dev").read_text().splitlines()
        if line.strip().startswith("lo:")
    )
    # Eight columns for received data precede the bytes sent.
    return int(line.split(":")[1].split()[8])


def count(run: Callable[[], object], repeats: int) -> int:
    """Returns the bytes that all processes send in `repeats` runs and the barriers around them."""
    # Other processes may leave a barrier later, so wait until all its packets have been counted.
    multihost_utils.sync_global_devices("before")
    time.sleep(0.1)
    before = sent_through_loopback()
    multihost_utils.sync_global_devices("start")
    for _ in range(repeats):
        jax.block_until_ready(run())
    multihost_utils.sync_global_devices("stop")
    time.sleep(0.1)
    return sent_through_loopback() - before


def run_process(point: Row) -> None:
    """Runs one of the processes; the first one prints a JSON line for each program."""
    # Gloo prints to stdout, which is read only from the first process.
    if point["index"]:
        os.dup2(2, 1)
    jax.config.update("jax_num_cpu_devices", 1)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{point['port']}", point["processes"], point["index"])
    for name in point["names"]:
        make = (
            partial(collective, COLLECTIVES[name])
            if name in COLLECTIVES
            else partial(strategy_round, STRATEGIES[name])
        )
        run, hlo, steps = make(point["size"])
        measured = traffic.measure(hlo, steps, [device.process_index for device in jax.devices()])
        # The first run opens the sockets; a count without runs is that of the barriers.
        jax.block_until_ready(run())
        idle = count(run, 0)
        row = {
            "name": name,
            "wire": measured.across,
            "sockets": (count(run, REPEATS) - idle) / REPEATS,
        }
        if point["index"] == 0:
            print(json.dumps({"program": row}), flush=True)
    jax.distributed.shutdown()


def measure(processes: int, names: list[str], size: int) -> list[Row]:
    """Runs the processes; returns a row for each program with bytes per round of all processes."""
    # Port 0 lets the system choose a free one, at which the processes meet.
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        point = {
            "processes": processes,
            "port": free.getsockname()[1],
            "names": names,
            "size": size,
        }
    with ExitStack() as at_end:
        threads = {"NPROC": "4"}  # size of XLA's thread pool, in which collectives wait
        commands = [
            point_command(__file__, {**point, "index": index}) for index in range(processes)
        ]
        running = [at_end.enter_context(started(command, threads)) for command in commands]
        try:
            return [running[0].hear("program", TIMEOUT) for _ in names]
        except Failed as failure:
            raise RuntimeError(
                "\n".join([str(failure), *(each.last_words() for each in running)])
            ) from None


def enter_namespace() -> None:
    """Restarts this command, if possible, in a network namespace whose `lo` nobody else uses.

    All its processes end with it (`--kill-child`).
    """
    enter = ["unshare", "--map-root-user", "--net", "--pid", "--fork", "--kill-child"]
    tools = shutil.which("unshare") and shutil.which("ip")
    if (
        "ALONE" not in os.environ
        and tools
        and not subprocess.run([*enter, "true"], capture_output=True).returncode
    ):
        # `lo` is down in a new namespace.
        up = ["env", "ALONE=1", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]
        os.execvp(enter[0], [*enter, *up, sys.executable, *sys.argv])


def main(
    processes: int = 4,
    size: int = 1 << 20,
    only: str = ",".join([*COLLECTIVES, *STRATEGIES]),
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False,
) -> None:
    """Prints a table of the bytes of each program.

    Args:
        processes: Number of processes.
        size: Numbers in a message, or parameters of the model.
        only: Comma-separated names of programs.
        as_json: Print JSON lines instead of a table.
    """
    enter_namespace()
    rows = measure(processes, only.split(","), size)
    if as_json:
        print("\n".join(map(json.dumps, rows)))
        return
    lines = [
        [
            row["name"],
            f"{row['wire']:,.0f}",
            f"{row['sockets']:,.0f}",
            f"{row['sockets'] / row['wire'] - 1:+.2%}",
        ]
        for row in rows
    ]
    title = f"{processes} Gloo processes, {size:,} numbers, bytes a round"
    print_table(Table(title, ("program", "compiled program", "sockets", "difference"), lines))
    console.print(machine())


if __name__ == "__main__":
    command_line(main, run_process)
