"""The worker of a node: one for each folder, restarted after any end, closed to other users."""

import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from ctde_jax.errors import InputError
from ctde_jax.nodes import worker
from ctde_jax.nodes.worker import files

PROGRAM = Path(__file__).with_name("worker_process.py")


class Node:
    """A folder and its worker, which ends with the test."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.arguments: list[object] = []

    @property
    def command(self) -> list[str]:
        return [sys.executable, str(PROGRAM), str(self.folder), *map(str, self.arguments)]

    def ask(self, request: bytes = b"pid", timeout: float = 15.0) -> bytes:
        return worker.ask(self.folder, self.command, request, timeout)

    def start_asking(self) -> subprocess.Popen[bytes]:
        """Starts a process that prints the answer of `ask`."""
        program = f"""
from ctde_jax.nodes import worker
print(worker.ask({str(self.folder)!r}, {self.command!r}, b"pid").decode())
"""
        return subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)

    def connect(self) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(str(files.address(self.folder.resolve())))
        return connection

    def lines(self, name: str) -> list[str]:
        path = self.folder / name
        return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def node(tmp_path):
    node = Node(tmp_path / "node")
    node.folder.mkdir()
    starts = node.folder / "starts"
    yield node
    for line in starts.read_text().split() if starts.exists() else []:
        kill(int(line))


def kill(process: int) -> None:
    """Kills a worker, and waits until its lock is free."""
    try:
        os.kill(process, signal.SIGKILL)
    except ProcessLookupError:
        return
    wait_for(lambda: not is_running(process))


def is_running(process: int) -> bool:
    """Returns False for a zombie, too: the system may read the status of a worker late."""
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(process)], capture_output=True)
    return state.stdout.strip()[:1] not in (b"", b"Z")


def wait_for(condition, seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_import_needs_neither_jax_nor_numpy():
    program = """
import sys, ctde_jax.nodes.worker
assert not {"jax", "numpy", "flwr"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_second_request_meets_the_same_worker(node):
    assert node.ask() == node.ask()
    assert len(node.lines("starts")) == 1


@pytest.mark.parametrize("size", [0, 1, 5 * 2**20])
def test_bytes_are_unchanged(node, size):
    content = os.urandom(size)
    assert node.ask(b"echo " + content) == content


def test_worker_outlives_the_process_that_started_it(node):
    answer, _ = node.start_asking().communicate()
    assert node.ask() == answer.strip()


def test_simultaneous_requests_start_one_worker(node):
    with ThreadPoolExecutor(8) as threads:
        answers = {*threads.map(lambda _: node.ask(), range(8))}
    assert len(answers) == len(node.lines("starts")) == 1


def test_simultaneous_processes_start_one_worker(node):
    processes = [node.start_asking() for _ in range(3)]
    answers = {process.communicate()[0] for process in processes}
    assert len(answers) == len(node.lines("starts")) == 1
    assert b"" not in answers


def test_killed_worker_is_replaced(node):
    """Its socket is stale, its lock free."""
    first = int(node.ask())
    kill(first)
    assert (node.folder / files.SOCKET).is_socket()
    assert int(node.ask()) != first


def test_killed_worker_is_replaced_within_a_request(node):
    node.ask()
    with ThreadPoolExecutor() as threads:
        answer = threads.submit(node.ask, b"sleep 0.5")
        wait_for(lambda: "sleep" in node.lines("requests"))
        kill(int(node.lines("starts")[0]))
        assert answer.result().decode() == node.lines("starts")[1]
    assert node.lines("requests").count("sleep") == 2


def test_worker_killed_at_its_start_is_replaced(node):
    (node.folder / "killed").touch()
    assert node.ask().decode() == node.lines("starts")[1]


def test_worker_that_always_crashes_is_started_three_times(node):
    with pytest.raises(worker.WorkerFailed, match="ended before it answered, 3 times in a row"):
        node.ask(b"die")
    assert len(node.lines("starts")) == 3


def test_worker_that_refuses_its_arguments_is_started_once(node):
    (node.folder / "refuse").touch()
    with pytest.raises(worker.WorkerFailed, match=r"with status 2: error: data_file must exist\.$"):
        node.ask()
    assert len(node.lines("starts")) == 1


def test_error_has_no_line_of_an_earlier_worker(node):
    (node.folder / files.LOG).write_text("an old line\n")
    with pytest.raises(worker.WorkerFailed, match=r"status 3: worker\.log has no line\.$"):
        worker.ask(node.folder, [sys.executable, "-c", "raise SystemExit(3)"], b"")


def test_missing_program_is_named(node):
    with pytest.raises(worker.WorkerFailed, match=r"'/missing': No such file or directory\.$"):
        worker.ask(node.folder, ["/missing"], b"")


def test_request_may_have_as_many_bytes_as_the_limit(node):
    assert len(node.ask(b"echo " + bytes(2**24 - 5))) == 2**24 - 5


@pytest.mark.parametrize(
    ("request_bytes", "sentence"),
    [
        (b"input", r"^data_file must exist, got 'x.npz'; choose another file\.$"),
        (b"bug", r"^KeyError: [^\n]{,190}$"),
        (b"full", r"^No space left on device$"),
    ],
    ids=["input", "bug", "full"],
)
def test_failed_request_has_one_sentence_and_the_worker_remains(node, request_bytes, sentence):
    if request_bytes == b"full" and not Path("/dev/full").exists():
        pytest.skip("this system lacks /dev/full")
    with pytest.raises(worker.WorkerFailed, match=sentence):
        node.ask(request_bytes)
    node.ask()
    assert len(node.lines("starts")) == 1


@pytest.mark.parametrize(
    "frame",
    [
        struct.pack(">cQ", b"Q", 2**63),
        struct.pack(">cQ", b"X", 1),
        b"GET / HTTP/1.1\r\n\r\n",
        b"",
        b"Q\0",
        struct.pack(">cQ", b"Q", 10) + b"short",
    ],
    ids=["huge", "kind", "http", "empty", "header", "short"],
)
def test_wrong_frame_does_not_end_the_worker(node, frame):
    first = node.ask()
    with node.connect() as open_connection, node.connect() as closed_connection:
        open_connection.sendall(frame)
        closed_connection.sendall(frame)
        closed_connection.close()
        assert node.ask() == first


def test_huge_length_is_answered_with_a_sentence(node):
    node.ask()
    with node.connect() as connection:
        connection.sendall(struct.pack(">cQ", b"Q", 2**63))
        reply = connection.makefile("rb").read()
    assert reply[:1] == b"E"
    assert b"at most 16,777,216 bytes, got 9,223,372,036,854,775,808" in reply


def test_request_of_an_ended_process_is_left_out(node):
    node.ask()
    with ThreadPoolExecutor() as threads:
        answer = threads.submit(node.ask, b"sleep 0.3")
        wait_for(lambda: "sleep" in node.lines("requests"))
        with node.connect() as connection:
            connection.sendall(struct.pack(">cQ", b"Q", 4) + b"lost")
        answer.result()
    node.ask()
    assert "lost" not in node.lines("requests")


def test_timeout_is_one_sentence_and_the_worker_remains(node):
    first = node.ask()
    with pytest.raises(worker.WorkerFailed, match=r"did not answer within 0\.2 seconds"):
        node.ask(b"sleep 1", timeout=0.2)
    assert node.ask() == first


def test_worker_that_never_listens_is_a_timeout(node):
    sleeper = "import sys, time; print('slow', flush=True); time.sleep(1)"
    with pytest.raises(worker.WorkerFailed, match="did not answer within"):
        worker.ask(node.folder, [sys.executable, "-c", sleeper], b"", timeout=0.3)


def test_files_are_private(node):
    os.chmod(node.folder, 0o755)
    node.ask()
    modes = {
        name: (node.folder / name).stat().st_mode & 0o777
        for name in (".", files.SOCKET, files.LOCK)
    }
    assert modes == {".": 0o700, files.SOCKET: 0o600, files.LOCK: 0o600}


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_other_users_are_refused(node, request):
    """Even if the modes of the files would admit them."""
    # Not in the folder of pytest, which no other user may enter.
    place = TemporaryDirectory(ignore_cleanup_errors=True)
    request.addfinalizer(place.cleanup)
    os.chmod(place.name, 0o755)
    node.folder = Path(place.name) / "node"
    node.folder.mkdir()
    node.ask()
    program = """
import os, socket, sys
os.setuid(65534)
connection = socket.socket(socket.AF_UNIX)
connection.connect(sys.argv[1])
try:
    connection.sendall(b"Q" + bytes(8))
    print(connection.recv(1))
except ConnectionError:
    print(b"")
"""
    command = [sys.executable, "-c", program, str(files.address(node.folder.resolve()))]
    denied = subprocess.run(command, capture_output=True, text=True)
    assert "PermissionError" in denied.stderr

    for path in (node.folder, node.folder / files.SOCKET):
        os.chmod(path, 0o777)
    admitted = subprocess.run(command, capture_output=True, text=True)
    assert admitted.stdout == "b''\n", admitted.stderr
    assert "refused the connection of another user" in (node.folder / files.LOG).read_text()


def test_deep_folder_has_a_link_to_its_socket(node):
    node.folder = node.folder.joinpath(*["deep" * 10] * 5)
    node.folder.mkdir(parents=True)
    first = int(node.ask())
    place = files.address(node.folder.resolve())
    assert place is not None
    assert len(str(node.folder)) > 200 > len(str(place))
    assert place.parent.stat().st_mode & 0o777 == 0o700
    assert place.stat().st_mode & 0o777 == 0o600

    # Neither a killed worker nor one that ends leaves a temporary folder.
    kill(first)
    second = int(node.ask())
    assert not place.parent.exists()
    place = files.address(node.folder.resolve())
    os.kill(second, signal.SIGTERM)
    wait_for(lambda: not place.parent.exists())
    assert not (node.folder / files.SOCKET).is_symlink()


def test_idle_worker_ends_and_removes_its_socket(node):
    node.arguments = [0.3]
    first = int(node.ask())
    wait_for(lambda: not is_running(first))
    assert not (node.folder / files.SOCKET).exists()
    assert "no request for 0.3 seconds" in node.lines(files.LOG)[-1]
    assert int(node.ask()) != first


@pytest.mark.parametrize("is_answering", [False, True], ids=["waiting", "answering"])
@pytest.mark.parametrize("cause", ["SIGTERM", "parent", "folder", "socket"])
def test_worker_ends_at_once(node, cause, is_answering):
    parent = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    node.arguments = [30, parent.pid]
    process = int(node.ask())
    with node.connect() as connection:
        # An answer that would take longer than the test.
        if is_answering:
            connection.sendall(struct.pack(">cQ", b"Q", 8) + b"sleep 99")
            wait_for(lambda: "sleep" in node.lines("requests"))

        # The status of the parent is read at the end of the test only.
        if cause == "SIGTERM":
            os.kill(process, signal.SIGTERM)
        elif cause == "parent":
            parent.kill()
        elif cause == "folder":
            node.folder.rename(node.folder.with_name("moved"))
        else:
            (node.folder / files.SOCKET).unlink()
        wait_for(lambda: not is_running(process), seconds=5)
    parent.kill()
    parent.communicate()
    if cause != "folder":
        assert not (node.folder / files.SOCKET).exists()


def test_worker_of_an_ended_parent_ends(node):
    parent = subprocess.Popen([sys.executable, "-c", ""])
    parent.wait()
    node.arguments = [30, parent.pid]
    result = subprocess.run(node.command, capture_output=True, text=True, timeout=10)
    assert result.returncode == 0
    assert f"ended: its parent, process {parent.pid}, has ended" in result.stderr


def test_second_worker_is_refused(node):
    node.ask()
    result = subprocess.run(node.command, capture_output=True, text=True)
    assert "InputError: folder must have one worker only" in result.stderr


def test_folder_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"^folder must be a writable folder .*: File exists; "):
        worker.ask(tmp_path / "file", ["true"], b"")


def test_log_is_limited(node):
    node.ask(b"print 1500000")
    log = node.folder / files.LOG
    wait_for(lambda: log.stat().st_size < 1000)
    assert (node.folder / "worker.log.1").stat().st_size == 2**20
    node.ask(b"print 10")
    assert log.read_text() == "x" * 10 + "\n"


def test_many_kills_lose_no_request(node):
    """A thread kills the worker of the moment; every request is answered."""
    done = threading.Event()

    def kill_often() -> None:
        while not done.wait(0.7):
            for process in node.lines("starts")[-1:]:
                kill(int(process))

    with ThreadPoolExecutor() as threads:
        killing = threads.submit(kill_often)
        for _ in range(8):
            node.ask(b"sleep 0.2")
        done.set()
        killing.result()
