"""Several hosts, each a process on loopback with Gloo, compute as one and end as one."""

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


class Ended(NamedTuple):
    """How a host's command ended, and how long after the fault."""

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
        here = [
            "--coordinator",
            f"127.0.0.1:{self.port}",
            "--num-processes",
            str(count),
            "--process-id",
            str(index),
        ]
        self.spawn(
            [*here, "--join-timeout", str(join), "--run-dir", str(self.folder), *arguments],
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
        """Signals the command; also its child if the signal cannot be handled, like a lost host."""
        pid = self.processes[index].pid
        children = Path(f"/proc/{pid}/task/{pid}/children")
        if number in (signal.SIGKILL, signal.SIGSTOP) and children.exists():
            for child in children.read_text().split():
                with suppress(ProcessLookupError):  # it may have ended by itself just now
                    os.kill(int(child), number)
        os.kill(pid, number)

    def saved(self) -> int | None:
        """The newest step that has a checkpoint."""
        return next(iter(checkpoint.steps(self.folder / "checkpoints")), None)

    def until(self, is_so) -> None:
        """Waits until something is so, or a host has ended."""
        deadline = time.monotonic() + 120
        while not is_so():
            assert all(process.poll() is None for process in self.processes), self.end()
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def end(self, patience: float = 180) -> list[Ended]:
        """Waits for the end of all that still run."""
        since, ended = time.monotonic(), {}

        def wait(index: int, process: subprocess.Popen) -> None:
            if process.stdout is None or process.stdout.closed:
                return
            try:
                output, errors = process.communicate(timeout=patience)
            except subprocess.TimeoutExpired:
                self.signal(index, signal.SIGKILL)
                output, errors = process.communicate()
            ended[index] = Ended(process.returncode, output, errors, time.monotonic() - since)

        threads = [threading.Thread(target=wait, args=each) for each in enumerate(self.processes)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return [ended[index] for index in sorted(ended)]


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
    """The same on one host."""
    subprocess.run(
        [sys.executable, "-m", "ctde_jax.train", "--run-dir", str(folder), *arguments],
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        check=True,
        capture_output=True,
    )


def tensors(folder: Path) -> dict[str, np.ndarray]:
    return checkpoint.read(checkpoint.newest(folder / "checkpoints")).tensors


def rows(folder: Path) -> list[dict]:
    """The rows of a run, but for its speed."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [
        {k: v for k, v in json.loads(line).items() if k != "examples_per_second"} for line in lines
    ]


def one_sentence(ended: Ended) -> str:
    """The error that a host ended with: a line, and nothing else that looks like a crash."""
    lines = [line for line in ended.errors.splitlines() if line.strip()]
    assert len(lines) == 1, ended.errors
    assert lines[0].startswith("error: "), ended.errors
    return lines[0]


def test_two_hosts_compute_what_two_devices_do(job, tmp_path):
    for index in (0, 1):
        job.start(index, *QUICK)
    first, second = job.end()
    train(tmp_path / "alone", *QUICK, "--devices", "2")

    assert (first.status, second.status) == (0, 0), (first.errors, second.errors)
    assert "test accuracy" in first.output
    assert "test accuracy" not in second.output
    here, alone = tensors(job.folder), tensors(tmp_path / "alone")
    assert here.keys() == alone.keys()
    for name, tensor in here.items():
        np.testing.assert_allclose(tensor, alone[name], rtol=1e-6, atol=1e-6, err_msg=name)
    assert [row["step"] for row in rows(job.folder)] == [
        row["step"] for row in rows(tmp_path / "alone")
    ]
    np.testing.assert_allclose(
        rows(job.folder)[-1]["loss"], rows(tmp_path / "alone")[-1]["loss"], rtol=1e-4
    )


def test_hosts_with_other_options_are_told_which(job):
    job.start(0, *QUICK)
    job.start(1, *QUICK, "--batch-size", "32")
    for index, ended in enumerate(job.end()):
        assert ended.status == 2
        assert (
            "--batch-size must be the same on all hosts, but is 64 on host 0 and 32 on host 1."
            in one_sentence(ended)
        ), index
    assert not job.folder.exists()


def test_hosts_with_other_inputs_are_told_which(job, tmp_path):
    """One number of one picture; names, sizes and labels are the same."""
    x, y = data.digits().train
    for index in (0, 1):
        (tmp_path / str(index)).mkdir()
        np.savez(tmp_path / str(index) / "d.npz", x_train=x, y_train=y)
        job.start(
            index, *QUICK, "--dataset", "npz", "--data-file", str(tmp_path / str(index) / "d.npz")
        )
        x = x.copy()
        x[7, 3, 3] ^= 1
    for ended in job.end():
        assert ended.status == 2
        assert (
            "split must be the same on all hosts, but differs between host 0 and host 1."
            in one_sentence(ended)
        )
    assert not (job.folder / "checkpoints").exists()


STRATEGIES = {
    "diloco with int4 and feedback": (
        "--strategy diloco --sync-every 4 --reduce int4 --error-feedback"
    ),
    "gossip": "--strategy gossip",
    "synchronous at first": "--strategy post-local-sgd --sync-every 4 --synchronous-steps 12",
    "clients that keep their examples": "--strategy fedavg --partition iid",
    "batch statistics, estimated anew": (
        "--model resnet --channels 4 --norm batch --reestimate-batches 2"
    ),
    "four devices each": "--devices 4 --steps 400 --batch-size 64",
    "three hosts": "",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", STRATEGIES)
def test_hosts_compute_what_as_many_devices_do(name, job, tmp_path):
    """Per-replica state is on its host, and in the checkpoint of host 0."""
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
    assert [ended.status for ended in job.end()] == [0] * count
    devices = "8" if name == "four devices each" else str(count)
    train(tmp_path / "alone", *more, "--devices", devices)

    here, alone = tensors(job.folder), tensors(tmp_path / "alone")
    assert {name: tensor.shape for name, tensor in here.items()} == {
        name: tensor.shape for name, tensor in alone.items()
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
    ended = job.end(25)[1 - lost]

    assert ended.status == LOST
    assert f"host {lost} " in one_sentence(ended)
    assert ended.seconds < 15


INTERRUPTED = ["--epochs", "80", "--eval-every", "460", "--save-every", "92"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Job:
    """The run that nothing interrupts."""
    job = Job(tmp_path_factory.mktemp("whole") / "run")
    for index in (0, 1):
        job.start(index, *INTERRUPTED)
    assert [each.status for each in job.end()] == [0, 0]
    return job


@pytest.mark.slow
@pytest.mark.parametrize("told", [[0], [1], [0, 1]])
def test_sigterm_saves_the_same_step_on_all_hosts(told, job, whole):
    for index in (0, 1):
        job.start(index, *INTERRUPTED)
    job.until(lambda: (job.saved() or 0) > 0)
    for index in told:
        job.signal(index, signal.SIGTERM)
    ended = job.end(30)
    assert [each.status for each in ended] == [PREEMPTED, PREEMPTED], [
        each.errors for each in ended
    ]
    said = [each.errors.split("after step ")[1].split(",")[0:2] for each in ended]
    assert said[0] == said[1]
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
    """Host 0 shows and writes its results, though the other has less to do."""
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
def test_command_that_is_killed_takes_its_training_along(job):
    """Only the supervisor is killed; the other host reports the same as if both were lost."""
    for index in (0, 1):
        job.start(index, *LONG, "--save-every", "200")
    job.until(lambda: (job.saved() or 0) > 400)
    os.kill(job.processes[1].pid, signal.SIGKILL)
    first, _ = job.end(30)
    assert first.status == LOST
    assert "host 1 has not answered" in one_sentence(first)


@pytest.mark.slow
def test_fault_in_writing_ends_all_with_its_sentence(job):
    """The folder is deleted, and cannot be created again."""
    for index in (0, 1):
        job.start(index, *LONG, "--save-every", "200")
    job.until(lambda: (job.saved() or 0) > 400)
    job.folder.rename(job.folder.with_name("elsewhere"))
    job.folder.write_text("a file")
    for ended in job.end(60):
        assert ended.status == 2
        assert "--run-dir must be a writable folder" in one_sentence(ended)


@pytest.mark.slow
def test_run_goes_on_with_other_numbers_of_hosts(job, tmp_path):
    """2 -> 1, 2 and 4, with the same bits as --exact promises."""
    arguments = ["--exact", "--eval-every", "23", "--save-every", "23", "--batch-size", "48"]
    for index in (0, 1):
        job.start(index, *arguments, "--steps", "200000")
    job.until(lambda: (job.saved() or 0) >= 46)
    job.signal(0, signal.SIGTERM)
    assert [ended.status for ended in job.end(30)] == [PREEMPTED, PREEMPTED]
    step = checkpoint.steps(job.folder / "checkpoints")[0]
    branch = ["--branch-from", str(checkpoint.newest(job.folder / "checkpoints"))]
    more = [*arguments, *branch, "--steps", str(step + 60)]
    for folder, count in (("four", 4), ("two", 2)):
        again = Job(tmp_path / folder)
        for index in range(count):
            again.start(index, *more, count=count)
        assert [ended.status for ended in again.end()] == [0] * count
    train(tmp_path / "one", *more, "--devices", "1")
    digests = {
        tuple(tensor.tobytes() for tensor in tensors(tmp_path / folder).values())
        for folder in ("one", "two", "four")
    }
    assert len(digests) == 1


@pytest.mark.slow
def test_hosts_killed_at_random_moments_end_with_the_same_bits(tmp_path):
    # Long enough that the run does not end before the last kill.
    arguments = ["--epochs", "240", "--eval-every", "460", "--save-every", "60"]

    def run(folder: Path, kill_after: float | None) -> list[Ended]:
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
        return job.end(180 if kill_after is None else 1)  # that who is left ends is another test's

    draw = random.Random(0)
    run(tmp_path / "whole", None)
    for _ in range(8):
        run(tmp_path / "killed", draw.uniform(0, 0.4))
    assert [ended.status for ended in run(tmp_path / "killed", None)] == [0, 0]
    assert rows(tmp_path / "killed") == rows(tmp_path / "whole")
    one, other = tensors(tmp_path / "killed"), tensors(tmp_path / "whole")
    assert {name: tensor.tobytes() for name, tensor in one.items()} == {
        name: tensor.tobytes() for name, tensor in other.items()
    }


@pytest.mark.slow
def test_taken_process_id_ends_all_with_a_sentence(job):
    for index in (0, 1):
        job.start(index, *LONG)
    job.until(lambda: job.saved() is not None)
    job.start(1, *LONG, join=20)
    for ended in job.end(60):
        assert ended.status in (2, LOST)
        one_sentence(ended)


@pytest.mark.slow
def test_process_id_that_is_taken_from_the_start_ends_all_with_a_sentence(job):
    for index in (0, 1, 1):
        job.start(index, *QUICK, count=3, join=15)
    for ended in job.end(60):
        assert ended.status == LOST
        one_sentence(ended)


@pytest.mark.slow
@pytest.mark.parametrize("index", [0, 1])
def test_host_that_never_comes_is_given_up(index, job):
    job.start(index, *QUICK, join=6)
    (ended,) = job.end(60)
    assert ended.status == LOST
    assert "within 6 seconds" in one_sentence(ended)
    assert ended.seconds < 30


@pytest.mark.slow
def test_port_in_use_is_told(job):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", job.port))
        taken.listen()
        job.start(0, *QUICK)
        (ended,) = job.end(60)
    assert ended.status == 2
    assert f"127.0.0.1:{job.port} cannot be opened" in one_sentence(ended)


@pytest.mark.slow
def test_hosts_with_other_numbers_of_devices_are_told(job):
    for index in (0, 1):
        job.start(index, *QUICK, "--devices", str(index + 1))
    for ended in job.end():
        assert ended.status == 2
        assert (
            "the number of devices must be the same on all hosts, but is 1 on host 0 and 2"
            in one_sentence(ended)
        )


@pytest.mark.slow
def test_hosts_with_other_versions_are_told(job, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.metadata as m\nreal = m.version\n"
        "m.version = lambda name: '0.0.1' if name == 'optax' else real(name)\n"
    )
    job.start(0, *QUICK)
    job.start(
        1, *QUICK, environment={"PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"}
    )
    for ended in job.end():
        assert ended.status == 2
        assert "the version of optax must be the same on all hosts" in one_sentence(ended)


@pytest.mark.slow
def test_fault_of_one_host_ends_the_others_with_its_sentence(job):
    """Here host 0 finds a run of other options."""
    train(job.folder, *QUICK, "--seed", "1")
    for index in (0, 1):
        job.start(index, *QUICK)
    for ended in job.end():
        assert ended.status == 2
        assert "seed 1 in the checkpoint and 0 here" in one_sentence(ended)


@pytest.mark.slow
def test_hosts_that_slurm_has_started_find_each_other(job):
    slurm = {
        "SLURM_JOB_ID": str(free_port()),
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": "2",
        "SLURM_STEP_NUM_NODES": "1",
        "JAX_COORDINATOR_PORT": str(job.port),
    }
    for index in ("0", "1"):
        own = {**slurm, "SLURM_PROCID": index, "SLURM_LOCALID": index}
        job.spawn([*QUICK, "--run-dir", str(job.folder)], own)
    assert [ended.status for ended in job.end()] == [0, 0]
    assert rows(job.folder)[-1]["step"] == 46


@pytest.mark.slow
@pytest.mark.skipif(
    shutil.which("mpirun") is None, reason="needs mpirun, such as that of Debian's openmpi-bin"
)
def test_hosts_that_mpirun_has_started_find_each_other(tmp_path):
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
def test_fit_takes_the_hosts_that_others_have_brought_together(tmp_path):
    """As Ray Train or a notebook would; both return the same."""
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
    said = [process.communicate(timeout=120) for process in started]
    lines = [output.splitlines()[-1] for output, _ in said]
    assert lines[0] == lines[1]
    assert lines[0].startswith("4 46 0.9"), said


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
def test_hosts_read_from_disk_what_their_own_devices_get(tmp_path):
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
    here, alone = tensors(tmp_path / "run"), tensors(tmp_path / "alone")
    for name, tensor in here.items():
        np.testing.assert_allclose(tensor, alone[name], rtol=1e-6, atol=1e-6, err_msg=name)


@pytest.mark.slow
def test_best_checkpoint_stays_on_hosts_as_on_one(job, tmp_path):
    more = [*QUICK, "--eval-every", "8", "--keep-best", "accuracy", "--keep-checkpoints", "1"]
    for index in (0, 1):
        job.start(index, *more)
    assert [ended.status for ended in job.end()] == [0, 0]
    train(tmp_path / "alone", *more, "--devices", "2")
    here, alone = (
        checkpoint.steps(folder / "checkpoints") for folder in (job.folder, tmp_path / "alone")
    )
    assert here == alone
    assert len(here) in (1, 2)


@pytest.mark.slow
def test_hosts_roll_back_together_and_give_up_together(job):
    """Halving cannot save this learning rate: three rollbacks, and the same error on both hosts."""
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
def test_meeting_that_cannot_be_is_refused(given, sentence):
    with pytest.raises(InputError, match=sentence.replace("[", r"\[")):
        hosts.find_meeting(**given)


def test_host_0_opens_only_its_own_address_unless_told(monkeypatch):
    given = {"coordinator": "10.0.0.1:1234", "num_processes": 2, "process_id": 0}
    assert hosts.find_meeting(**given).listens_on == "10.0.0.1:1234"
    everywhere = hosts.find_meeting(**given, coordinator_bind="0.0.0.0:1234")
    assert everywhere.listens_on == "0.0.0.0:1234"


def test_one_host_meets_nobody():
    assert hosts.find_meeting() is None
    assert hosts.count() == 1
    assert hosts.of_the_first(lambda: [1]) == [1]
