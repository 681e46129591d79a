"""Tests of the guarantees of training, which run on the user's machine; see `verify.py`.

`arguments` are command-line options of `ctde_jax.train`, except those of `prove_checkpoint`. Every
test raises InputError if they are invalid or the guarantee cannot be tested with them.
"""

import json
import random
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import jax
import numpy as np
from jax import numpy as jnp

from ctde_jax import checkpoint
from ctde_jax.checkpoint import CHECKPOINTS, METRICS, Checkpoint, Damaged
from ctde_jax.config import build
from ctde_jax.config.command_line import parse
from ctde_jax.config.options import Config
from ctde_jax.config.walk import train
from ctde_jax.devices import FAKE_DEVICES, hosts, start
from ctde_jax.errors import InputError
from ctde_jax.trainer import Row, console

KILLS = 5
"""Number of times that `prove_resume` kills a run."""

Verdict = tuple[list[str], str]
"""A sentence for each violation, and the sentence to print if there are none."""


def prove_resume(arguments: Sequence[str]) -> Verdict:
    """Tests that a run killed at random moments ends with the bits of an uninterrupted run."""
    chosen = _parse(arguments)
    screen = console()
    draw = random.Random()
    with TemporaryDirectory() as folder:
        # Train once without interruption, as the reference.
        whole = Path(folder) / "whole"
        killed = Path(folder) / "killed"
        command = [sys.executable, "-m", "ctde_jax.train", *arguments, "--run-dir"]
        with screen.status("training without interruption"):
            _end([*command, str(whole)])
        saved_steps = checkpoint.steps(whole / CHECKPOINTS)
        first = min(saved_steps)
        last = max(saved_steps)

        # By default, checkpoints are about a minute apart, too few for a short run to be resumed.
        every = chosen.run.save_every or chosen.run.log_every
        kills = 0
        if chosen.run.save_every is None:
            command[-1:-1] = ["--save-every", str(every)]

        # Kill the second run several times, each time within about the time that `every` steps take
        # after its next checkpoint. At least one kill must leave it in the middle of its steps.
        seconds = (_written(whole, last) - _written(whole, first)) * every / max(1, last - first)
        for _ in range(KILLS):
            with screen.status("training until killed"):
                is_killed = _kill(
                    [*command, str(killed)], killed / CHECKPOINTS, draw.uniform(0, seconds)
                )
            steps = checkpoint.steps(killed / CHECKPOINTS)
            kills += is_killed and any(0 < step < last for step in steps[:1])
            saved = f"newest checkpoint at step {steps[0]:,}" if steps else "no checkpoint yet"
            screen.print(f"{'killed' if is_killed else 'completed before the kill'}, {saved}")
        if not kills:
            raise InputError(
                "verify",
                "resume killed no run between its steps, so nothing was verified; train longer.",
            )

        # Let the second run end, and compare the two.
        with screen.status("training without kills"):
            _end([*command, str(killed)])
        one = _newest(whole)
        wrong = _differing(whole, killed)
        rows = [_rows(whole), _rows(killed)]
    differences = [f"the bits of {name} differ" for name in wrong]
    differences += [] if rows[0] == rows[1] else [f"the rows of {METRICS} differ"]
    return (
        differences,
        f"all {len(one.tensors)} tensors and {len(rows[0])} rows equal those of the uninterrupted "
        "run",
    )


def prove_exact(arguments: Sequence[str]) -> Verdict:
    """Tests that `--exact` trains to the same bits on 1, 2, 4 and 8 devices.

    On accelerators, numbers of devices that exceed those present are left out.
    """
    arguments = ["--exact", *(word for word in arguments if word != "--exact")]
    chosen = _parse(arguments).aggregation
    if chosen.devices is not None or chosen.replicas is not None:
        option = "replicas" if chosen.devices is None else "devices"
        raise InputError(option, "must not be set, as exact trains on 1, 2, 4 and 8 devices.")

    # The number of fake CPU devices is not limited, that of accelerators is.
    available = start()
    is_cpu = available[0].platform == "cpu"
    counts = [count for count in (1, 2, 4, 8) if is_cpu or count <= len(available)]
    screen = console()
    wrong = []

    # Train on each number of devices, and compare with one device.
    with TemporaryDirectory() as folder:
        folders = {count: Path(folder) / str(count) for count in counts}
        for count, run_folder in folders.items():
            with screen.status(f"training, --devices {count}"):
                command = [sys.executable, "-m", "ctde_jax.train", *arguments]
                _end([*command, "--devices", str(count), "--run-dir", str(run_folder)])
            differing = _differing(folders[1], run_folder)
            screen.print(f"{count} devices: {len(differing)} tensors differ from those on 1 device")
            wrong += [
                f"the bits of {name} differ between 1 and {count} devices" for name in differing
            ]
        tensors = len(_newest(folders[1]).tensors)
    return (
        wrong,
        f"all {tensors} tensors have the same bits on {', '.join(map(str, counts))} devices",
    )


def prove_replicas(arguments: Sequence[str]) -> Verdict:
    """Tests that replicated state is equal on all devices: trains, which compares it.

    Raises:
        ReplicasDiverged: If it differs after a dispatch.
    """
    chosen = _parse(arguments)
    aggregation = chosen.aggregation
    if len(start(aggregation.devices, FAKE_DEVICES, aggregation.replicas)) == 1:
        raise InputError("devices", "must be at least 2, so that replicas can be compared, got 1.")

    # A difference raises ReplicasDiverged, which the command reports.
    trained = train(chosen, time.perf_counter())
    devices = f"{len(trained.devices)} devices"
    steps = trained.history[-1]["step"]
    return (
        [],
        f"the replicated state was equal on all {devices} after every dispatch, for {steps:,} "
        "steps",
    )


def prove_eval(arguments: Sequence[str]) -> Verdict:
    """Tests that an evaluation on all devices includes every test example exactly once.

    Trains, and compares the test metrics with an evaluation of the examples one by one.
    """
    chosen = _parse(arguments)
    trained = train(chosen, time.perf_counter())

    # Evaluate each example by itself, so that neither padding nor sharding can matter.
    test = build.load_data(chosen.data, chosen.optimization.seed).test
    inputs = np.asarray(test.inputs)
    labels = np.asarray(test.labels)
    infer = jax.jit(trained.model.apply)
    outputs = [
        infer(trained.params, trained.model_state, inputs[i : i + 1], None)[0]
        for i in range(len(inputs))
    ]
    measured = jax.device_get(trained.task.measure(jnp.concatenate(outputs), jnp.asarray(labels)))
    sums = {name: values.sum(dtype=np.float64) for name, values in measured.items()}
    alone = trained.task.averages(sums, len(inputs))

    # The order of summation differs, so the averages agree only up to rounding.
    tested = trained.tested
    differences = [
        f"the test {name} is {tested[name]:.6f} on all devices, but {value:.6f} one by one"
        for name, value in alone.items()
        if not np.isclose(tested[name], value, rtol=1e-4, atol=1e-6)
    ]
    if tested["examples"] != len(inputs):
        differences.append(f"{tested['examples']:,} of {len(inputs):,} examples were counted")
    return (
        differences,
        f"all {len(inputs):,} test examples count once: the metrics of {len(trained.devices)} "
        "devices equal those of an evaluation one by one",
    )


def prove_checkpoint(arguments: Sequence[str]) -> Verdict:
    """Tests that every checkpoint of a run, or a single checkpoint, matches its checksums.

    Args:
        arguments: One argument, the folder of the run or of the checkpoint.
    """
    if len(arguments) != 1:
        raise InputError(
            "verify",
            f"checkpoint requires one argument, the folder of a run or a checkpoint, got "
            f"{len(arguments)}.",
        )

    # Find the checkpoints of a run; otherwise the folder must be a checkpoint.
    folder = Path(arguments[0])
    within = folder / CHECKPOINTS
    paths = [checkpoint.path_of(within, step) for step in checkpoint.steps(within)]
    if not paths and not (folder / checkpoint.MANIFEST).exists():
        raise InputError(
            "verify",
            f"checkpoint requires the folder of a run or a checkpoint, but {folder} is neither.",
        )
    paths = paths or [folder]

    # Reading a checkpoint verifies its checksums.
    damaged = []
    tensors = 0
    for path in paths:
        try:
            tensors += len(checkpoint.read(path).tensors)
        except Damaged as error:
            damaged.append(str(error))
    return (
        damaged,
        f"{tensors} tensors in {', '.join(path.name for path in paths)} match their SHA-256",
    )


def _parse(arguments: Sequence[str]) -> Config:
    # A proof runs on this host alone, and must train instead of loading a complete run.
    chosen = parse(arguments)
    hosts.check_alone(hosts.find_meeting(**vars(chosen.hosts)))
    if chosen.run.run_dir is not None:
        raise InputError(
            "run_dir", "must not be set, as an existing run in this folder would not be trained."
        )
    if chosen.run.mirror is not None:
        raise InputError("mirror", "must not be set, as the runs of a proof are temporary.")
    return chosen


def _end(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise InputError("verify", f"failed to train: {done.stderr.strip()}")


def _kill(command: Sequence[str], folder: Path, seconds: float) -> bool:
    """Kills a process `seconds` after its next checkpoint; returns whether it was still alive."""
    before = checkpoint.steps(folder)
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and checkpoint.steps(folder) == before:
            time.sleep(0.001)
        try:
            process.wait(seconds)
            return False
        except subprocess.TimeoutExpired:
            process.kill()
            return True


def _written(folder: Path, step: int) -> float:
    """Returns the time at which a run wrote a checkpoint, in seconds since 1970."""
    return (checkpoint.path_of(folder / CHECKPOINTS, step) / checkpoint.MANIFEST).stat().st_mtime


def _newest(folder: Path) -> Checkpoint:
    return checkpoint.read(checkpoint.newest(folder / CHECKPOINTS))


def _differing(one: Path, other: Path) -> list[str]:
    """Returns the names of the tensors whose bits differ between two runs."""
    # Compare bytes: 0.0 equals -0.0, and NaN does not equal itself.
    these = _newest(one).tensors
    those = _newest(other).tensors
    names = sorted(these.keys() | those.keys())
    return [
        name
        for name in names
        if name not in these or name not in those or these[name].tobytes() != those[name].tobytes()
    ]


def _rows(folder: Path) -> list[Row]:
    """Returns the rows of a run without speed and time, which differ between runs."""
    rows = map(json.loads, (folder / METRICS).read_text(encoding="utf-8").splitlines())
    return [
        {name: value for name, value in row.items() if name not in ("examples_per_second", "time")}
        for row in rows
    ]


PROOFS: Mapping[str, Callable[[Sequence[str]], Verdict]] = {
    "resume": prove_resume,
    "exact": prove_exact,
    "replicas": prove_replicas,
    "eval": prove_eval,
    "checkpoint": prove_checkpoint,
}
"""Tests by their names on the command line."""
