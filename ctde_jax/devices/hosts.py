"""Several hosts: the same command on each, under the launcher that is there; JAX's coordinator brings them together.

Each process is a host. Host 0 has the coordinator, through whose store of keys and values the others learn what it has
to say before there are arrays, and at which address they all meet. Nothing here starts a process on another machine.
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
from jax._src.clusters import (
    ClusterEnv,
)  # JAX has no public way to what its detection of launchers finds,
from jax._src.distributed import global_state  # nor to the coordinator's keys and values
from jax.experimental import multihost_utils

from ctde_jax.devices.replica import PyTree
from ctde_jax.errors import HostLost, InputError, check_at_least

T = TypeVar("T")
HEARTBEAT_SECONDS = 10
"""A host that has not answered for so long is given up, and with it the run."""

LOST = os.EX_UNAVAILABLE
"""The exit status of a run that has lost a host, or never had all of them."""

_LOOK_SECONDS = 1.0
_PATIENCE_SECONDS = 3600
"""For a host that is there, and reads its data or a checkpoint."""

_PIECE = 2**20
_ENDED = "ctde_jax/ended"
_calls = numbers()


@dataclass(frozen=True)
class Meeting:
    """Where the hosts of a run meet, and which of them this process is."""

    coordinator: str
    """Address and port of host 0."""

    count: int
    index: int
    listens_on: str
    """Address and port that host 0 opens."""

    patience: int
    """Seconds that the hosts may take to come."""

    local_devices: list[int] | None = None
    """Of this host, the accelerators that are this process's own; by default all."""


def find_meeting(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    coordinator_bind: str | None = None,
    join_timeout: int = 300,
) -> Meeting | None:
    """Returns where the hosts meet, from these arguments or the environment of the launcher; None for one host alone.

    Args:
        coordinator: Address and port of host 0, which all hosts reach.
        num_processes: Number of hosts.
        process_id: Index of this host.
        coordinator_bind: Address and port that host 0 opens, if it differs from `coordinator`.
        join_timeout: Seconds to wait for the other hosts.

    Raises:
        InputError: The first three are not all given, or an address is none at which all hosts could meet.
    """
    given = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
    if num_processes == 1:
        return None
    missing = [name for name, value in given.items() if value is None]
    check_at_least(1, num_processes=num_processes, join_timeout=join_timeout)
    check_at_least(0, process_id=process_id)
    if 0 < len(missing) < len(given):
        raise InputError(
            missing[0],
            "goes with coordinator, num_processes and process_id; give all three or none.",
        )
    address, count, index, local_devices = coordinator, num_processes, process_id, None
    if address is None:
        try:
            address, count, index, local_devices = ClusterEnv.auto_detect_unset_distributed_params(
                None, None, None, None, None, join_timeout
            )
        except (
            Exception
        ) as error:  # of a launcher that JAX knows, in an environment that it cannot read
            raise InputError(
                "coordinator",
                f"could not be found in the environment of the launcher ({error}); give it with --num-processes and "
                "--process-id, or --num-processes 1 for one host alone.",
            ) from error
    if address is None or count is None or index is None or count == 1:
        return None
    if index >= count:
        raise InputError(
            "process_id", f"must be less than the {count} of --num-processes, got {index}."
        )
    if _listens_everywhere(_parts("coordinator", address)[0]):
        raise InputError(
            "coordinator", f"must be the address of host 0 that all hosts reach, got {address}."
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
    """Raises InputError for a command that runs on one host if several hosts are to meet."""
    if meeting is not None:
        raise InputError(
            "num_processes",
            f"must be 1 for this command, which runs on one host, got {meeting.count}.",
        )


def join(meeting: Meeting) -> None:
    """Makes this process one of several hosts; before JAX starts. Waits for all of them.

    From here on this process ends when another one has said why it ends.

    Raises:
        InputError: Host 0 cannot open its port.
    """
    if meeting.index == 0:
        _check_port(meeting.listens_on, meeting.patience)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_preemption_service", False)  # SIGTERM is ours, see stop.py
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
    """Returns how many hosts there are."""
    return jax.process_count() if jax.distributed.is_initialized() else 1


def index() -> int:
    """Returns which of them this is; host 0 writes and shows."""
    return jax.process_index() if jax.distributed.is_initialized() else 0


def platform() -> dict[str, Any]:
    """Says what a host brings to a run: versions, and its devices; all hosts must bring the same."""
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
    tell: Callable[[], Mapping[str, Any]], digests: Callable[[], Mapping[str, Any]] = dict
) -> None:
    """Checks that all hosts have the same facts, through the coordinator, so that no collective can hang.

    Args:
        tell: Returns what JSON can write, by name; called only if there are several hosts.
        digests: Returns digests by the name of what they are of; called only if there are several hosts.

    Raises:
        InputError: On every host; names the fact, and its values on host 0 and on another host; of a digest the name.
        HostLost: A host has not come here within an hour.
    """
    if count() == 1:
        return
    told = _exchange(json.dumps([tell(), digests()]))
    first, first_digests = json.loads(told[0])
    for host, text in sorted(told.items()):
        others, other_digests = json.loads(text)
        for name in [*first, *(name for name in others if name not in first)]:
            if first.get(name) != others.get(name):
                raise InputError(
                    name,
                    f"must be the same on all hosts, but is {first.get(name, 'not known')} on host 0 and "
                    f"{others.get(name, 'not known')} on host {host}.",
                )
        for name in [*first_digests, *other_digests]:
            if first_digests.get(name) != other_digests.get(name):
                raise InputError(
                    name,
                    f"must be the same on all hosts, but differs between host 0 and host {host}.",
                )


def of_the_first(make: Callable[[], T]) -> T:
    """Returns on all hosts what JSON can write of the result of host 0, where alone it is made.

    Raises:
        InputError: On all hosts where it was raised on host 0.
        HostLost: Host 0 has failed otherwise, or has not made it within an hour.
    """
    if count() == 1:
        return make()
    key = f"ctde_jax/{next(_calls)}"
    if index() == 0:
        try:
            made = make()
        except InputError as error:
            _tell(key, {"option": error.option, "sentence": error.sentence})
            raise
        except Exception as error:
            _tell(key, {"failed": f"host 0 has failed: {error}"})
            raise
        _tell(key, {"made": made})
        return made
    pieces = int(_wait_for(0, key))
    told = json.loads("".join(_wait_for(0, f"{key}/{number}") for number in range(pieces)))
    if "sentence" in told:
        raise InputError(told["option"], told["sentence"])
    if "failed" in told:
        raise HostLost(told["failed"])
    return told["made"]


def arrays_of_the_first(arrays: PyTree) -> PyTree:
    """Returns on all hosts the arrays of host 0, bit for bit; the others give arrays of the same shapes and types."""
    if count() == 1:
        return arrays
    return jax.tree.map(_array_of_the_first, arrays)


def largest(value: int) -> int:
    """Returns the largest of all hosts' values; every host must ask at the same moment of its run."""
    return int(multihost_utils.process_allgather(np.int32(value)).max()) if count() > 1 else value


def part() -> None:
    """Leaves the other hosts at the end of a run, when all of them have come here."""
    if count() > 1:
        _exchange("")
        _end_watch()
        jax.distributed.shutdown()


def leave(status: int, sentence: str) -> NoReturn:
    """Ends this process with a sentence, and tells the other hosts why, who end as well."""
    _end_watch()
    if sentence:
        print(f"error: host {index()}: {sentence}", file=sys.stderr, flush=True)
    if jax.distributed.is_initialized():
        try:
            told = json.dumps({"host": index(), "status": status, "sentence": sentence})
            _store().key_value_set(_ENDED, told)
        except jax.errors.JaxRuntimeError:
            pass  # another host was faster
        if index() == 0:
            time.sleep(
                2.5 * _LOOK_SECONDS
            )  # the others look, for with host 0 goes what they look at
    os._exit(status)


def wait_for_verdict() -> None:
    """Waits for the coordinator, which ends this process where it misses another host."""
    time.sleep(1.5 * HEARTBEAT_SECONDS)


def may_be_lost(error: Exception) -> bool:
    """Says whether an error may be that of a collective in which another host is missing, or of a wait for it."""
    return isinstance(error, HostLost | jax.errors.JaxRuntimeError) or "Gloo" in str(error)


_is_over = threading.Event()
_watch: list[threading.Thread] = []


def _end_watch() -> None:
    _is_over.set()
    for thread in _watch:
        thread.join()


def _store() -> Any:
    """The coordinator's keys and values."""
    return global_state.client


def _end_with_others() -> None:
    while not _is_over.wait(_LOOK_SECONDS):
        try:
            told = json.loads(_store().key_value_try_get(_ENDED))
        except jax.errors.JaxRuntimeError:
            continue
        if not _is_over.is_set():
            why = told["sentence"] or "its output says why"
            print(
                f"error: host {index()}: host {told['host']} has ended the run: {why}",
                file=sys.stderr,
                flush=True,
            )
            os._exit(told["status"])


def _exchange(text: str) -> dict[int, str]:
    folder = f"ctde_jax/{next(_calls)}"
    _store().key_value_set(f"{folder}/{index()}", text)
    return {host: _wait_for(host, f"{folder}/{host}") for host in range(count())}


def _array_of_the_first(array: jax.typing.ArrayLike) -> np.ndarray:
    """Sends an array in pieces of one size, for each of which devices need room."""
    own = np.asarray(array)
    words = np.frombuffer(own.tobytes() + b"\0" * (-own.nbytes % 4), np.uint32)
    pieces = [words[start : start + _PIECE] for start in range(0, len(words), _PIECE)]
    sent = b"".join(
        np.asarray(multihost_utils.broadcast_one_to_all(piece)).tobytes() for piece in pieces
    )
    return np.frombuffer(sent[: own.nbytes], own.dtype).reshape(own.shape)


def _tell(key: str, fact: Any) -> None:
    """Writes what JSON can write, in pieces that a message may have."""
    text = json.dumps(fact)
    pieces = [text[start : start + _PIECE] for start in range(0, len(text), _PIECE)]
    for number, piece in enumerate(pieces):
        _store().key_value_set(f"{key}/{number}", piece)
    _store().key_value_set(key, str(len(pieces)))


def _wait_for(host: int, key: str) -> str:
    try:
        return _store().blocking_key_value_get(key, 1000 * _PATIENCE_SECONDS)
    except jax.errors.JaxRuntimeError as error:
        raise HostLost(
            f"host {host} is there, but has not come to where the others wait for it."
        ) from error


def _parts(option: str, address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise InputError(
            option, f"must be an address and a port, such as 10.0.0.1:1234, got {address}."
        )
    return host.removeprefix("[").removesuffix("]"), int(port)


def _listens_everywhere(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return host == "*"


def _check_port(address: str, patience: float) -> None:
    """Raises InputError where a port cannot be opened, for JAX would crash; a name may take a while to be known."""
    host, port = _parts("coordinator_bind", address)
    deadline = time.monotonic() + patience
    try:
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
        with socket.socket(family, kind, protocol) as tried:
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            tried.bind(place)
    except OSError as error:
        raise InputError(
            "coordinator",
            f"must name an address of host 0 and a free port of it, but {address} cannot be opened ({error.strerror}).",
        ) from error
