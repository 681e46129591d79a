"""Multi-host training: the same command on every host, connected by JAX's coordinator.

Each process is a host, started by any launcher; nothing here starts a process on another machine.
Host 0 runs the coordinator, to whose address all hosts connect. Before there are arrays, the hosts
communicate through its key-value store.
"""

import ipaddress
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from itertools import count as numbers
from typing import Any, NoReturn, TypeVar

import jax
import numpy as np

# JAX has no public API for what its detection of launchers finds, nor for the key-value store.
from jax._src.clusters import ClusterEnv
from jax._src.distributed import global_state
from jax.experimental import multihost_utils

from ctde_jax.devices.replica import PyTree
from ctde_jax.errors import HostLost, InputError, check_at_least

T = TypeVar("T")
HEARTBEAT_SECONDS = 10
"""A host is lost, and the run ends, if the coordinator receives no heartbeat for this time."""

LOST = os.EX_UNAVAILABLE
"""Exit status of a run that has lost a host, or that not all hosts have joined."""

# Polling period of the thread that ends this process together with the others.
_POLL_SECONDS = 1.0
_PATIENCE_SECONDS = 3600
"""Timeout for a host that has joined and is reading its data or a checkpoint."""

# Maximum size of a message in characters, and of a broadcast in uint32 words.
_PIECE = 2**20

# Key under which a host that ends the run stores its exit status and message.
_ENDED = "ctde_jax/ended"

# Numbers the keys of exchanges. All hosts make the same calls in the same order, so they agree.
_calls = numbers()


@dataclass(frozen=True)
class Meeting:
    """Address of the coordinator of a run, and the index of this process among the hosts."""

    coordinator: str
    """Address and port of host 0, to which the hosts connect."""

    count: int
    """Number of hosts."""

    index: int
    """Index of this process among the hosts."""

    listens_on: str
    """Address and port on which host 0 listens."""

    patience: int
    """Seconds to wait for all hosts to join."""

    local_devices: list[int] | None = None
    """Indices of this machine's accelerators that this process uses (default: all)."""


def find_meeting(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    coordinator_bind: str | None = None,
    join_timeout: int = 300,
) -> Meeting | None:
    """Returns how this process connects to the other hosts, or None for a single host.

    If the first three arguments are omitted, they are taken from the environment of a launcher that
    JAX supports, such as Slurm.

    Args:
        coordinator: Address and port of host 0, reachable from all hosts.
        num_processes: Number of hosts.
        process_id: Index of this host.
        coordinator_bind: Address and port on which host 0 listens (default: `coordinator`).
        join_timeout: Seconds to wait for the other hosts.

    Raises:
        InputError: If only some of the first three arguments are given, a number is out of range,
            the environment of the launcher cannot be read, or an address has no valid port or is
            not one to which other hosts can connect.
    """
    # One process is a single host, even under a launcher.
    given = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
    if num_processes == 1:
        return None

    # The three arguments are given together, or not at all.
    missing = [name for name, value in given.items() if value is None]
    check_at_least(1, num_processes=num_processes, join_timeout=join_timeout)
    check_at_least(0, process_id=process_id)
    if 0 < len(missing) < len(given):
        raise InputError(
            missing[0],
            "is missing; pass coordinator, num_processes and process_id together, or none of them.",
        )

    # Without arguments, ask JAX's detection of launchers. It may recognize a launcher in whose
    # environment it then fails, with an exception of any type.
    address = coordinator
    count = num_processes
    index = process_id
    local_devices = None
    if address is None:
        try:
            address, count, index, local_devices = ClusterEnv.auto_detect_unset_distributed_params(
                None, None, None, None, None, join_timeout
            )
        except Exception as error:
            raise InputError(
                "coordinator",
                f"could not be detected from the environment of the launcher ({error}); pass it "
                "with --num-processes and --process-id, or pass --num-processes 1 for one host.",
            ) from error

    # Neither arguments nor a launcher name several hosts.
    if address is None or count is None or index is None or count == 1:
        return None
    if index >= count:
        raise InputError(
            "process_id", f"must be less than --num-processes, which is {count}, got {index}."
        )

    # Host 0 may listen on all interfaces (0.0.0.0), but the others need an address to connect to.
    if _listens_everywhere(_parts("coordinator", address)[0]):
        raise InputError(
            "coordinator",
            f"must be an address of host 0 that all hosts can reach, got {address}.",
        )
    listens_on = coordinator_bind or address
    _parts("coordinator_bind", listens_on)
    return Meeting(
        address,
        count,
        index,
        listens_on,
        join_timeout,
        None if local_devices is None else [*local_devices],
    )


def check_alone(meeting: Meeting | None) -> None:
    """Raises InputError if the run has several hosts; for commands that run on one host."""
    if meeting is not None:
        raise InputError(
            "num_processes",
            f"must be 1 for this command, which runs on one host, got {meeting.count}.",
        )


def join(meeting: Meeting) -> None:
    """Connects this process to the other hosts, and waits until all have joined.

    It must be called before JAX starts a backend. A thread then ends this process if another host
    reports, through `leave`, that it has ended the run.

    Raises:
        InputError: If host 0 cannot open its port.
    """
    if meeting.index == 0:
        _check_port(meeting.listens_on, meeting.patience)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # SIGTERM is handled in trainer/stop.py.
    jax.config.update("jax_enable_preemption_service", False)

    # `find_meeting` has already read the environment, so detection is deactivated.
    jax.distributed.initialize(
        meeting.coordinator,
        meeting.count,
        meeting.index,
        meeting.local_devices,
        cluster_detection_method="deactivate",
        initialization_timeout=meeting.patience,
        heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        coordinator_bind_address=meeting.listens_on,
    )
    _watch.append(threading.Thread(target=_end_with_others, name="hosts", daemon=True))
    _watch[0].start()


def count() -> int:
    """Returns the number of hosts."""
    return jax.process_count() if jax.distributed.is_initialized() else 1


def index() -> int:
    """Returns the index of this host; host 0 writes files and prints."""
    return jax.process_index() if jax.distributed.is_initialized() else 0


def platform() -> dict[str, Any]:
    """Returns this host's package versions and devices, which must be the same on all hosts."""
    here = jax.local_devices()
    versions = {
        f"the version of {name}": version(name)
        for name in ("ctde_jax", "jax", "jaxlib", "flax", "optax")
    }
    return {
        **versions,
        "the kind of the devices": here[0].device_kind,
        "the number of devices": len(here),
    }


def compare(
    facts: Callable[[], Mapping[str, Any]], digests: Callable[[], Mapping[str, Any]] = dict
) -> None:
    """Checks that all hosts have the same facts, so that no collective can hang.

    The hosts exchange the facts through the coordinator.

    Args:
        facts: Returns JSON-serializable values by name; called only if there are several hosts.
        digests: Returns digests by the name of the hashed value; called only if there are several
            hosts.

    Raises:
        InputError: On every host, if a fact or digest differs between host 0 and another host. The
            message contains its name, and for a fact both values.
        HostLost: If another host does not make this call within an hour.
    """
    if count() == 1:
        return

    # All hosts compare in the same order, so all raise the same error.
    texts = _exchange(json.dumps([facts(), digests()]))
    first, first_digests = json.loads(texts[0])
    for host, text in sorted(texts.items()):
        others, other_digests = json.loads(text)
        for name in [*first, *(name for name in others if name not in first)]:
            if first.get(name) != others.get(name):
                raise InputError(
                    name,
                    f"must be the same on all hosts, but is {first.get(name, 'not set')} on host "
                    f"0 and {others.get(name, 'not set')} on host {host}.",
                )
        for name in [*first_digests, *other_digests]:
            if first_digests.get(name) != other_digests.get(name):
                raise InputError(
                    name,
                    f"must be the same on all hosts, but differs between host 0 and host {host}.",
                )


def of_the_first(make: Callable[[], T]) -> T:
    """Calls `make` on host 0 and returns its JSON-serializable result on all hosts.

    Raises:
        InputError: On all hosts, if `make` raises it on host 0.
        HostLost: On the other hosts, if `make` raises any other exception or takes more than an
            hour. On host 0, the exception propagates.
    """
    if count() == 1:
        return make()

    # Host 0 publishes the result or the failure, so that the others do not wait in vain.
    key = f"ctde_jax/{next(_calls)}"
    if index() == 0:
        try:
            made = make()
        except InputError as error:
            _publish(key, {"option": error.option, "sentence": error.sentence})
            raise
        except Exception as error:
            _publish(key, {"failed": f"host 0 failed: {error}"})
            raise
        _publish(key, {"made": made})
        return made

    # The others read it and raise the same error.
    pieces = int(_wait_for(0, key))
    received = json.loads("".join(_wait_for(0, f"{key}/{number}") for number in range(pieces)))
    if "sentence" in received:
        raise InputError(received["option"], received["sentence"])
    if "failed" in received:
        raise HostLost(received["failed"])
    return received["made"]


def arrays_of_the_first(arrays: PyTree) -> PyTree:
    """Broadcasts the arrays of host 0 to all hosts, bit for bit.

    Args:
        arrays: Tree of arrays, with the same structure, shapes and dtypes on every host.

    Returns:
        The arrays of host 0 as numpy arrays; on a single host, `arrays` itself.
    """
    if count() == 1:
        return arrays
    return jax.tree.map(_array_of_the_first, arrays)


def largest(value: int) -> int:
    """Returns the maximum of an int32 over all hosts, which must all make this call."""
    return int(multihost_utils.process_allgather(np.int32(value)).max()) if count() > 1 else value


def part() -> None:
    """Waits until all hosts have reached the end of the run, then disconnects from them."""
    if count() > 1:
        _exchange("")
        _end_watch()
        jax.distributed.shutdown()


def leave(status: int, sentence: str) -> NoReturn:
    """Ends this process, and makes the other hosts end with the same exit status.

    Args:
        status: Exit status.
        sentence: Error message, which every host prints; if empty, this host prints nothing.
    """
    _end_watch()
    if sentence:
        print(f"error: host {index()}: {sentence}", file=sys.stderr, flush=True)
    if jax.distributed.is_initialized():
        try:
            ended = json.dumps({"host": index(), "status": status, "sentence": sentence})
            _store().key_value_set(_ENDED, ended)
        except jax.errors.JaxRuntimeError:
            pass  # another host was faster

        # The key-value store ends with host 0, so the others need time to poll it.
        if index() == 0:
            time.sleep(2.5 * _POLL_SECONDS)

    # A regular exit would run JAX's shutdown, which waits for the other hosts.
    os._exit(status)


def wait_for_verdict() -> None:
    """Waits long enough for the coordinator to end this process if another host is lost."""
    time.sleep(1.5 * HEARTBEAT_SECONDS)


def may_be_lost(error: Exception) -> bool:
    """Returns whether a lost host may be the cause of an error in a collective or a wait."""
    return isinstance(error, HostLost | jax.errors.JaxRuntimeError) or "Gloo" in str(error)


_is_over = threading.Event()
_watch: list[threading.Thread] = []


def _end_watch() -> None:
    _is_over.set()
    for thread in _watch:
        thread.join()


def _store() -> Any:
    """Returns the coordinator's key-value store."""
    return global_state.client


def _end_with_others() -> None:
    while not _is_over.wait(_POLL_SECONDS):
        try:
            ended = json.loads(_store().key_value_try_get(_ENDED))
        # The key does not exist: no host has ended the run.
        except jax.errors.JaxRuntimeError:
            continue

        # Meanwhile this host may have begun to end by itself, with its exit status.
        if not _is_over.is_set():
            why = ended["sentence"] or "see its output"
            print(
                f"error: host {index()}: host {ended['host']} ended the run: {why}",
                file=sys.stderr,
                flush=True,
            )
            os._exit(ended["status"])


def _exchange(text: str) -> dict[int, str]:
    """Sends a text to all hosts through the key-value store; returns the texts of all by host."""
    folder = f"ctde_jax/{next(_calls)}"
    _store().key_value_set(f"{folder}/{index()}", text)
    return {host: _wait_for(host, f"{folder}/{host}") for host in range(count())}


def _array_of_the_first(array: jax.typing.ArrayLike) -> np.ndarray:
    """Broadcasts an array in pieces of at most 4 MiB, to bound the memory used on the devices."""
    # As raw bytes in uint32 words, since JAX would convert 64-bit dtypes.
    own = np.asarray(array)
    words = np.frombuffer(own.tobytes() + b"\0" * (-own.nbytes % 4), np.uint32)
    pieces = [words[start : start + _PIECE] for start in range(0, len(words), _PIECE)]
    sent = b"".join(
        np.asarray(multihost_utils.broadcast_one_to_all(piece)).tobytes() for piece in pieces
    )
    return np.frombuffer(sent[: own.nbytes], own.dtype).reshape(own.shape)


def _publish(key: str, fact: Any) -> None:
    """Stores a JSON-serializable value, in pieces that fit into one message each."""
    text = json.dumps(fact)
    pieces = [text[start : start + _PIECE] for start in range(0, len(text), _PIECE)]
    for number, piece in enumerate(pieces):
        _store().key_value_set(f"{key}/{number}", piece)
    # The count comes last: once a reader has it, all pieces are there.
    _store().key_value_set(key, str(len(pieces)))


def _wait_for(host: int, key: str) -> str:
    try:
        return _store().blocking_key_value_get(key, 1000 * _PATIENCE_SECONDS)
    except jax.errors.JaxRuntimeError as error:
        raise HostLost(
            f"host {host} has joined, but did not reach a point at which the other hosts wait."
        ) from error


def _parts(option: str, address: str) -> tuple[str, int]:
    # IPv6 addresses are in brackets, such as [::1]:1234.
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise InputError(
            option, f"must be an address and a port, such as 10.0.0.1:1234, got {address}."
        )
    return host.removeprefix("[").removesuffix("]"), int(port)


def _listens_everywhere(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_unspecified
    # A name is not an IP address.
    except ValueError:
        return host == "*"


def _check_port(address: str, patience: float) -> None:
    """Raises InputError if host 0 cannot open its port, because JAX would abort the process.

    Args:
        address: Address and port.
        patience: Seconds to wait until the host name can be resolved.
    """
    host, port = _parts("coordinator_bind", address)
    deadline = time.monotonic() + patience
    try:
        # A host name may take a while to become resolvable.
        while True:
            try:
                family, kind, protocol, _, place = socket.getaddrinfo(
                    host, port, type=socket.SOCK_STREAM
                )[0]
                break
            except socket.gaierror:
                if time.monotonic() > deadline:
                    raise
                time.sleep(1)

        # SO_REUSEADDR: a port in TIME_WAIT after an earlier run counts as free.
        with socket.socket(family, kind, protocol) as tried:
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            tried.bind(place)
    except OSError as error:
        raise InputError(
            "coordinator",
            f"must be an address and a free port of host 0, but {address} cannot be opened "
            f"({error.strerror}).",
        ) from error
