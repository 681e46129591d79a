"""Several hosts, simulated by processes on loopback with Gloo, train and end together."""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from ctde_jax import checkpoint, data
from ctde_jax.devices import hosts
from ctde_jax.errors import InputError

QUICK = ["--epochs", "2", "--eval-every", "23"]
LONG = ["--epochs", "20000", "--eval-every", "10000"]
LOST, PREEMPTED = 69, 75


class Result(NamedTuple):
    """Exit status, output and duration of the command of a host."""

    status: int
    output: str
    errors: str
    seconds: float


class Job:
    """The same command on several hosts."""

    def __init__(self, folder: Path, port: int | None = None):
        self.folder, self.port, self.processes = folder, port or free_port(), []
        folder.parent.mkdir(exist_ok=True)

    def start(
        self,
        index: int,
        *arguments: str,
        count: int = 2,
        environment: dict[str, str] | None = None,
        join: int = 60,
    ):
        coordinator = [
            "--coordinator",
            f"127.0.0.1:{self.port}",
            "--num-processes",
            str(count),
            "--process-id",
            str(index),
        ]
        self.spawn(
            [*coordinator, "--join-timeout", str(join), "--run-dir", str(self.folder), *arguments],
            environment or {},
        )

    def spawn(self, arguments: list[str], environment: dict[str, str]) -> None:
        self.processes.append(
            subprocess.Popen(
                [sys.executable, "-m", "ctde_jax.train", *arguments],
                env={**os.environ, "JAX_PLATFORMS": "cpu", "NO_COLOR": "1", **environment},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
        )

    def signal(self, index: int, number: signal.Signals) -> None:
        """Sends a signal to the command, and to its children if the signal cannot be handled."""
        pid = self.processes[index].pid
        children = Path(f"/proc/{pid}/task/{pid}/children")
        if number in (signal.SIGKILL, signal.SIGSTOP) and children.exists():
            for child in children.read_text().split():
                with suppress(ProcessLookupError):  # it may have ended in the meantime
                    os.kill(int(child), number)
        os.kill(pid, number)

    def saved(self) -> int | None:
        """Returns the newest step with a checkpoint."""
        return next(iter(checkpoint.steps(self.folder / "checkpoints")), None)

    def until(self, condition) -> None:
        """Waits until the condition holds; fails if a host ends before that."""
        deadline = time.monotonic() + 120
        while not condition():
            assert all(process.poll() is None for process in self.processes), self.end()
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def end(self, patience: float = 180) -> list[Result]:
        """Waits until all commands have ended, and kills them after `patience` seconds."""
        since, results = time.monotonic(), {}

        def wait(index: int, process: subprocess.Popen) -> None:
            if process.stdout is None or process.stdout.closed:
                return
            try:
                output, errors = process.communicate(timeout=patience)
            except subprocess.TimeoutExpired:
                self.signal(index, signal.SIGKILL)
                output, errors = process.communicate()
            results[index] = Result(process.returncode, output, errors, time.monotonic() - since)

        threads = [threading.Thread(target=wait, args=each) for each in enumerate(self.processes)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return [results[index] for index in sorted(results)]


@pytest.fixture
def job(tmp_path):
    started = Job(tmp_path / "run")
    yield started
    started.end(0)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def train(folder: Path, *arguments: str) -> None:
    """Runs the same command on one host."""
    subprocess.run(
        [sys.executable, "-m", "ctde_jax.train", "--run-dir", str(folder), *arguments],
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        check=True,
        capture_output=True,
    )


def tensors(folder: Path) -> dict[str, np.ndarray]:
    return checkpoint.read(checkpoint.newest(folder / "checkpoints")).tensors


def rows(folder: Path) -> list[dict]:
    """Returns the rows of a run without speed and time."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [
        {k: v for k, v in json.loads(line).items() if k not in ("examples_per_second", "time")}
        for line in lines
    ]


def one_sentence(result: Result) -> str:
    """Returns the error of a host, which must be the only line on standard error."""
    lines = [line for line in result.errors.splitlines() if line.strip()]
    assert len(lines) == 1, result.errors
    assert lines[0].startswith("error: "), result.errors
    return lines[0]


def test_two_hosts_compute_the_same_as_two_devices(job, tmp_path):
    for index in (0, 1):
        job.start(index, *QUICK)
    first, second = job.end()
    train(tmp_path / "alone", *QUICK, "--devices", "2")

    assert (first.status, second.status) == (0, 0), (first.errors, second.errors)
    assert "test accuracy" in first.output
    assert "test accuracy" not in second.output
    distributed, single = tensors(job.folder), tensors(tmp_path / "alone")
    assert distributed.keys() == single.keys()
    for name, tensor in distributed.items():
        np.testing.assert_allclose(tensor, single[name], rtol=1e-6, atol=1e-6, err_msg=name)
    assert [row["step"] for row in rows(job.folder)] == [
        row["step"] for row in rows(tmp_path / "alone")
    ]
    np.testing.assert_allclose(
        rows(job.folder)[-1]["loss"], rows(tmp_path / "alone")[-1]["loss"], rtol=1e-4
    )


@pytest.mark.slow
def test_different_options_of_hosts_are_named(job):
    job.start(0, *QUICK)
    job.start(1, *QUICK, "--batch-size", "32")
    for index, result in enumerate(job.end()):
        assert result.status == 2
        assert (
            "--batch-size must be the same on all hosts, but is 64 on host 0 and 32 on host 1."
            in one_sentence(result)
        ), index
    assert not job.folder.exists()


@pytest.mark.slow
def test_different_inputs_of_hosts_are_refused(job, tmp_path):
    """One pixel differs; names, sizes and labels are equal."""
    x, y = data.digits().train
    for index in (0, 1):
        (tmp_path / str(index)).mkdir()
        np.savez(tmp_path / str(index) / "d.npz", x_train=x, y_train=y)
        job.start(
            index, *QUICK, "--dataset", "npz", "--data-file", str(tmp_path / str(index) / "d.npz")
        )
        x = x.copy()
        x[7, 3, 3] ^= 1
    for result in job.end():
        assert result.status == 2
        assert (
            "split must be the same on all hosts, but differs between host 0 and host 1."
            in one_sentence(result)
        )
    assert not (job.folder / "checkpoints").exists()


STRATEGIES = {
    "diloco with int4 and error feedback": (
        "--strategy diloco --sync-every 4 --reduce int4 --error-feedback"
    ),
    "gossip": "--strategy gossip",
    "synchronous steps first": "--strategy post-local-sgd --sync-every 4 --synchronous-steps 12",
    "fixed partition": "--strategy fedavg --partition iid",
    "reestimated batch statistics": (
        "--model resnet --channels 4 --norm batch --reestimate-batches 2"
    ),
    "four devices per host": "--devices 4 --steps 400 --batch-size 64",
    "three hosts": "",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", STRATEGIES)
def test_hosts_compute_the_same_as_devices_of_one_host(name, job, tmp_path):
    """Per-replica state is stored on its host, and in the checkpoint of host 0."""
    count = 3 if name == "three hosts" else 2
    more = [
        "--eval-every",
        "23",
        "--batch-size",
        "48",
        *([] if "--steps" in STRATEGIES[name] else ["--epochs", "2"]),
    ]
    more += STRATEGIES[name].split()
    for index in range(count):
        job.start(index, *more, count=count)
    assert [result.status for result in job.end()] == [0] * count
    devices = "8" if name == "four devices per host" else str(count)
    train(tmp_path / "alone", *more, "--devices", devices)

    distributed, single = tensors(job.folder), tensors(tmp_path / "alone")
    assert {name: tensor.shape for name, tensor in distributed.items()} == {
        name: tensor.shape for name, tensor in single.items()
    }
    losses = [
        [row["loss"] for row in rows(folder) if row["split"] == "test"]
        for folder in (job.folder, tmp_path / "alone")
    ]
    np.testing.assert_allclose(*losses, rtol=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 1])
@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP])
def test_lost_host_ends_the_others_within_15_seconds(lost, fault, job):
    for index in (0, 1):
        job.start(index, *LONG, "--save-every", "200")
    job.until(lambda: (job.saved() or 0) > 400)
    job.signal(lost, fault)
    result = job.end(25)[1 - lost]

    assert result.status == LOST
    assert f"host {lost} " in one_sentence(result)
    assert result.seconds < 15


INTERRUPTED = ["--epochs", "80", "--eval-every", "460", "--save-every", "92"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Job:
    """The uninterrupted run."""
    job = Job(tmp_path_factory.mktemp("whole") / "run")
    for index in (0, 1):
        job.start(index, *INTERRUPTED)
    assert [each.status for each in job.end()] == [0, 0]
    return job


@pytest.mark.slow
@pytest.mark.parametrize("signaled", [[0], [1], [0, 1]])
def test_sigterm_saves_the_same_step_on_all_hosts(signaled, job, whole):
    for index in (0, 1):
        job.start(index, *INTERRUPTED)
    job.until(lambda: (job.saved() or 0) > 0)
    for index in signaled:
        job.signal(index, signal.SIGTERM)
    results = job.end(30)
    assert [each.status for each in results] == [PREEMPTED, PREEMPTED], [
        each.errors for each in results
    ]
    steps = [each.errors.split("after step ")[1].split(",")[0:2] for each in results]
    assert steps[0] == steps[1]
    assert job.saved() < whole.saved() == 80 * 23

    again = Job(job.folder)
    for index in (0, 1):
        again.start(index, *INTERRUPTED)
    assert [each.status for each in again.end()] == [0, 0]
    assert rows(job.folder) == rows(whole.folder)
    one, other = tensors(job.folder), tensors(whole.folder)
    assert {name: tensor.tobytes() for name, tensor in one.items()} == {
        name: tensor.tobytes() for name, tensor in other.items()
    }


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["--validation-fraction", "0.2", "--patience", "100"]])
def test_ctrl_c_on_one_host_saves_and_ends_all(more, job):
    """Host 0 prints and writes its results, although the other host ends earlier."""
    for index in (0, 1):
        job.start(index, *LONG, "--save-every", "200", *more)
    job.until(lambda: (job.saved() or 0) > 400)
    job.signal(1, signal.SIGINT)
    first, second = job.end(30)
    assert (first.status, first.errors, second.status, second.errors) == (130, "", 130, "")
    assert "test accuracy" in first.output
    assert (job.folder / "curves.png").exists()
    assert job.saved() == next(
        row["step"] for row in reversed(rows(job.folder)) if row["split"] == "train"
    )


@pytest.mark.slow
def test_training_ends_with_its_killed_command(job):
    """Only the supervisor is killed; the other host reports that this host was lost."""
    for index in (0, 1):
        job.start(index, *LONG, "--save-every", "200")
    job.until(lambda: (job.saved() or 0) > 400)
    os.kill(job.processes[1].pid, signal.SIGKILL)
    first, _ = job.end(30)
    assert first.status == LOST
    assert "host 1 has not answered" in one_sentence(first)


@pytest.mark.slow
def test_write_error_ends_all_hosts_with_its_message(job):
    """The folder is moved away, and cannot be created again."""
    for index in (0, 1):
        job.start(index, *LONG, "--save-every", "200")
    job.until(lambda: (job.saved() or 0) > 400)
    job.folder.rename(job.folder.with_name("elsewhere"))
    job.folder.write_text("a file")
    for result in job.end(60):
        assert result.status == 2
        assert "--run-dir must be a writable folder" in one_sentence(result)


@pytest.mark.slow
def test_run_continues_on_other_numbers_of_hosts(job, tmp_path):
    """2 -> 1, 2 and 4 hosts, with the equal bits that `--exact` guarantees."""
    arguments = ["--exact", "--eval-every", "23", "--save-every", "23", "--batch-size", "48"]
    for index in (0, 1):
        job.start(index, *arguments, "--steps", "200000")
    job.until(lambda: (job.saved() or 0) >= 46)
    job.signal(0, signal.SIGTERM)
    assert [result.status for result in job.end(30)] == [PREEMPTED, PREEMPTED]
    step = checkpoint.steps(job.folder / "checkpoints")[0]
    branch = ["--branch-from", str(checkpoint.newest(job.folder / "checkpoints"))]
    more = [*arguments, *branch, "--steps", str(step + 60)]
    for folder, count in (("four", 4), ("two", 2)):
        again = Job(tmp_path / folder)
        for index in range(count):
            again.start(index, *more, count=count)
        assert [result.status for result in again.end()] == [0] * count
    train(tmp_path / "one", *more, "--devices", "1")
    digests = {
        tuple(tensor.tobytes() for tensor in tensors(tmp_path / folder).values())
        for folder in ("one", "two", "four")
    }
    assert len(digests) == 1


@pytest.mark.slow
def test_hosts_killed_at_random_moments_end_with_the_same_bits(tmp_path):
    # Long enough that the run does not end before the last kill.
    arguments = ["--epochs", "120", "--eval-every", "460", "--save-every", "60"]

    def run(folder: Path, kill_after: float | None) -> list[Result]:
        job = Job(folder)
        for index in (0, 1):
            job.start(index, *arguments)
        if kill_after is not None:
            before = job.saved()
            while job.saved() == before and job.processes[0].poll() is None:
                time.sleep(0.001)
            time.sleep(kill_after)
            for lost in draw.choice([[0], [1], [0, 1]]):
                job.signal(lost, signal.SIGKILL)
        return job.end(180 if kill_after is None else 1)  # another test covers the remaining host

    draw = random.Random(0)
    run(tmp_path / "whole", None)
    for _ in range(4):
        run(tmp_path / "killed", draw.uniform(0, 0.4))
    assert [result.status for result in run(tmp_path / "killed", None)] == [0, 0]
    assert rows(tmp_path / "killed") == rows(tmp_path / "whole")
    one, other = tensors(tmp_path / "killed"), tensors(tmp_path / "whole")
    assert {name: tensor.tobytes() for name, tensor in one.items()} == {
        name: tensor.tobytes() for name, tensor in other.items()
    }


@pytest.mark.slow
def test_duplicate_process_id_ends_all_hosts_with_one_sentence(job):
    for index in (0, 1):
        job.start(index, *LONG)
    job.until(lambda: job.saved() is not None)
    job.start(1, *LONG, join=20)
    for result in job.end(60):
        assert result.status in (2, LOST)
        one_sentence(result)


@pytest.mark.slow
def test_duplicate_process_id_at_the_start_ends_all_hosts_with_one_sentence(job):
    for index in (0, 1, 1):
        job.start(index, *QUICK, count=3, join=15)
    for result in job.end(60):
        assert result.status == LOST
        one_sentence(result)


@pytest.mark.slow
@pytest.mark.parametrize("index", [0, 1])
def test_missing_host_ends_the_other_after_the_join_timeout(index, job):
    job.start(index, *QUICK, join=6)
    (result,) = job.end(60)
    assert result.status == LOST
    assert "within 6 seconds" in one_sentence(result)
    assert result.seconds < 30


@pytest.mark.slow
def test_port_in_use_is_reported(job):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", job.port))
        listener.listen()
        job.start(0, *QUICK)
        (result,) = job.end(60)
    assert result.status == 2
    assert f"127.0.0.1:{job.port} cannot be opened" in one_sentence(result)


@pytest.mark.slow
def test_different_numbers_of_devices_are_reported(job):
    for index in (0, 1):
        job.start(index, *QUICK, "--devices", str(index + 1))
    for result in job.end():
        assert result.status == 2
        assert (
            "the number of devices must be the same on all hosts, but is 1 on host 0 and 2"
            in one_sentence(result)
        )


@pytest.mark.slow
def test_different_versions_are_reported(job, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.metadata as m\nreal = m.version\n"
        "m.version = lambda name: '0.0.1' if name == 'optax' else real(name)\n"
    )
    job.start(0, *QUICK)
    job.start(
        1, *QUICK, environment={"PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"}
    )
    for result in job.end():
        assert result.status == 2
        assert "the version of optax must be the same on all hosts" in one_sentence(result)


@pytest.mark.slow
def test_error_of_one_host_ends_the_others_with_its_message(job):
    """Host 0 finds a run with different options."""
    train(job.folder, *QUICK, "--seed", "1")
    for index in (0, 1):
        job.start(index, *QUICK)
    for result in job.end():
        assert result.status == 2
        assert "seed 1 in the checkpoint and 0 here" in one_sentence(result)


@pytest.mark.slow
def test_hosts_started_by_slurm_connect(job):
    slurm = {
        "SLURM_JOB_ID": str(free_port()),
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": "2",
        "SLURM_STEP_NUM_NODES": "1",
        "JAX_COORDINATOR_PORT": str(job.port),
    }
    for index in ("0", "1"):
        environment = {**slurm, "SLURM_PROCID": index, "SLURM_LOCALID": index}
        job.spawn([*QUICK, "--run-dir", str(job.folder)], environment)
    assert [result.status for result in job.end()] == [0, 0]
    assert rows(job.folder)[-1]["step"] == 46


@pytest.mark.slow
@pytest.mark.skipif(
    shutil.which("mpirun") is None, reason="needs mpirun, such as that of Debian's openmpi-bin"
)
def test_hosts_started_by_mpirun_connect(tmp_path):
    loopback = ["--mca", "oob_tcp_if_include", "lo", "--mca", "btl", "self,vader"]
    command = [
        "mpirun",
        "--allow-run-as-root",
        "--oversubscribe",
        "-n",
        "2",
        *loopback,
        sys.executable,
    ]
    subprocess.run(
        [*command, "-m", "ctde_jax.train", "--run-dir", str(tmp_path / "run"), *QUICK],
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        check=True,
        capture_output=True,
        timeout=120,
    )
    assert rows(tmp_path / "run")[-1]["step"] == 46


PROGRAM = """
import sys
import jax, optax
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
import ctde_jax as ctde
trained = ctde.fit(
    ctde.models.mlp([64, 16, 10]), ctde.data.digits(), optax.adam(0.01), \
devices=ctde.devices.start(2), batch_size=64,
    epochs=2, run_dir=sys.argv[3], show=False,
)
print(len(trained.devices), trained.history[-1]["step"], trained.tested["accuracy"])
"""


@pytest.mark.slow
def test_fit_uses_hosts_that_are_already_connected(tmp_path):
    """Ray Train or a notebook may connect the hosts; both return the same result."""
    address, folder = f"127.0.0.1:{free_port()}", str(tmp_path / "run")
    started = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, address, str(index), folder],
            env={**os.environ, "JAX_PLATFORMS": "cpu"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in (0, 1)
    ]
    outputs = [process.communicate(timeout=120) for process in started]
    lines = [output.splitlines()[-1] for output, _ in outputs]
    assert lines[0] == lines[1]
    assert lines[0].startswith("4 46 0.9"), outputs


ON_DISK = """
import sys
import jax
import numpy as np
import optax
import ctde_jax as ctde
hosts = int(sys.argv[1])
if hosts > 1:
    jax.distributed.initialize(sys.argv[4], hosts, int(sys.argv[5]))
digits = ctde.data.digits()
pictures = np.load(sys.argv[2], mmap_mode="r")
data = ctde.data.from_arrays(pictures, digits.train.labels, *digits.test)
trained = ctde.fit(
    ctde.models.mlp([64, 16, 10]), data, optax.adam(0.01), \
devices=ctde.devices.start(2 // hosts), batch_size=64,
    epochs=2, run_dir=sys.argv[3], show=False,
)
"""


@pytest.mark.slow
def test_two_hosts_train_on_data_on_disk_like_one(tmp_path):
    np.save(tmp_path / "x.npy", data.digits().train.inputs)
    address = f"127.0.0.1:{free_port()}"

    def run(count: int, folder: str, index: int) -> subprocess.Popen:
        arguments = [
            str(count),
            str(tmp_path / "x.npy"),
            str(tmp_path / folder),
            address,
            str(index),
        ]
        environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
        return subprocess.Popen([sys.executable, "-c", ON_DISK, *arguments], env=environment)

    for count, folder in ((2, "run"), (1, "alone")):
        assert [
            process.wait(120) for process in [run(count, folder, index) for index in range(count)]
        ] == [0] * count
    distributed, single = tensors(tmp_path / "run"), tensors(tmp_path / "alone")
    for name, tensor in distributed.items():
        np.testing.assert_allclose(tensor, single[name], rtol=1e-6, atol=1e-6, err_msg=name)


@pytest.mark.slow
def test_hosts_without_a_folder_continue_from_its_mirror(job, tmp_path):
    mirror = tmp_path / "bucket" / "run"
    arguments = [*QUICK, "--save-every", "23", "--mirror", f"file://{mirror}"]
    for index in range(2):
        job.start(index, *arguments)
    assert [result.status for result in job.end()] == [0, 0]
    whole = job.folder.rename(tmp_path / "whole")

    # The last upload is lost as well, so the run continues from an earlier step.
    shutil.rmtree(checkpoint.path_of(mirror / "checkpoints", 46))
    job.processes.clear()
    for index in range(2):
        job.start(index, *arguments)
    first, second = job.end()
    assert (first.status, second.status) == (0, 0)
    assert "was fetched from" in first.output
    assert "fetched" not in second.output
    assert rows(job.folder) == rows(whole)
    for name, tensor in tensors(whole).items():
        np.testing.assert_array_equal(tensors(job.folder)[name], tensor)


@pytest.mark.slow
def test_two_hosts_keep_the_same_best_checkpoint_as_one(job, tmp_path):
    more = [*QUICK, "--eval-every", "8", "--keep-best", "accuracy", "--keep-checkpoints", "1"]
    for index in (0, 1):
        job.start(index, *more)
    assert [result.status for result in job.end()] == [0, 0]
    train(tmp_path / "alone", *more, "--devices", "2")
    distributed, single = (
        checkpoint.steps(folder / "checkpoints") for folder in (job.folder, tmp_path / "alone")
    )
    assert distributed == single
    assert len(distributed) in (1, 2)


@pytest.mark.slow
def test_hosts_roll_back_and_stop_together(job):
    """The learning rate is too high even when halved: three rollbacks, then equal errors."""
    for index in (0, 1):
        job.start(
            index,
            *QUICK,
            "--optimizer",
            "sgd",
            "--learning-rate",
            "1e38",
            "--on-nonfinite",
            "rollback",
        )
    first, second = job.end()
    assert (first.status, second.status) == (2, 2), (first.errors, second.errors)
    assert first.output.count("rollback   loss not finite") == 3
    assert "the loss is not finite at step" in one_sentence(first)
    assert "the loss is not finite at step" in one_sentence(second)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"coordinator": "10.0.0.1:1234"}, "num_processes is missing; pass coordinator"),
        ({"num_processes": 2, "process_id": 0}, "coordinator is missing; pass"),
        (
            {"coordinator": "10.0.0.1", "num_processes": 2, "process_id": 0},
            "must be an address and a port",
        ),
        (
            {"coordinator": "10.0.0.1:99999", "num_processes": 2, "process_id": 0},
            "must be an address and a port",
        ),
        (
            {"coordinator": "0.0.0.0:1234", "num_processes": 2, "process_id": 0},
            "must be an address of host 0",
        ),
        (
            {"coordinator": "[::]:1234", "num_processes": 2, "process_id": 0},
            "must be an address of host 0",
        ),
        (
            {"coordinator": "10.0.0.1:1234", "num_processes": 2, "process_id": 2},
            "must be less than --num-processes, which is 2",
        ),
        (
            {"coordinator": "10.0.0.1:1234", "num_processes": 2, "process_id": -1},
            "must be at least 0",
        ),
    ],
)
def test_invalid_coordinator_is_refused(given, sentence):
    with pytest.raises(InputError, match=sentence.replace("[", r"\[")):
        hosts.find_meeting(**given)


def test_host_0_listens_only_on_the_coordinator_address_by_default(monkeypatch):
    given = {"coordinator": "10.0.0.1:1234", "num_processes": 2, "process_id": 0}
    assert hosts.find_meeting(**given).listens_on == "10.0.0.1:1234"
    on_all_addresses = hosts.find_meeting(**given, coordinator_bind="0.0.0.0:1234")
    assert on_all_addresses.listens_on == "0.0.0.0:1234"


def test_single_host_requires_no_coordinator():
    assert hosts.find_meeting() is None
    assert hosts.count() == 1
    assert hosts.of_the_first(lambda: [1]) == [1]
