"""Which devices train: all GPUs or TPUs; without one, a CPU device, or several fake ones that share its cores.

XLA's CPU collectives wait inside a thread pool that has as many threads as the machine has cores. With too few threads
for the fake devices, these wait for each other for ever, and the process aborts after 40 seconds. The pool's size is
read from the environment variable `NPROC` at the moment when JAX starts its CPU backend, so it is set here first.
"""

import os
import platform
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

import jax
from jax.extend.backend import clear_backends
from platformdirs import user_cache_path

from ctde_jax.devices import settings
from ctde_jax.errors import InputError, check_at_least, check_at_most, quoted, shortened

FAKE_DEVICES = 4
"""CPU devices that the commands start by default, to show how devices agree."""

_THREADS_A_DEVICE = (
    2  # measured: with fewer than two threads a device, collectives can wait for ever
)
_MOST_DEVICES = 1024  # each fake device takes three threads and milliseconds of start-up


def start(count: int | None = None, cpu_devices: int = 1) -> list[jax.Device]:
    """Starts JAX if needed and returns the devices to train on.

    A CPU backend that is already up with too few devices or too few threads (a notebook that has used JAX before) is
    started anew; arrays made before stay readable, but belong to the old devices.

    What is compiled is kept for later starts, at most 1 GiB of it, in the user's cache folder; or as the user has set
    JAX's compilation cache.

    Args:
        count: Number of devices of each host; by default all accelerators, or `cpu_devices` if there is none.
        cpu_devices: Default number of devices on a machine without accelerators. More than one are fake: they share the
            cores, and are slower together than one. With several hosts it is 1 each.

    Returns:
        The devices of all hosts, those of host 0 first.

    Raises:
        InputError: There are fewer accelerators than `count`, JAX cannot start the platform that JAX_PLATFORMS
            names, or a JAX setting rules out training.
    """
    check_at_least(1, devices=count)
    check_at_most(_MOST_DEVICES, devices=count)
    settings.check()
    _keep_programs()
    wanted = count or (1 if jax.distributed.is_initialized() else cpu_devices)
    try:
        _request_fake_devices(wanted)
    except RuntimeError:
        if jax.default_backend() == "cpu" and (
            jax.local_device_count() < wanted or not _threads_suffice(wanted)
        ):
            clear_backends()
            _request_fake_devices(wanted)
    _start_platform()

    hosts = range(jax.process_count())
    by_host = [
        [device for device in jax.devices() if device.process_index == host] for host in hosts
    ]
    here, kind = len(by_host[jax.process_index()]), by_host[0][0].platform
    if count is None and kind == "cpu":
        count = wanted
    if count is not None and count > here:
        raise InputError(
            "devices",
            f"must be at most {here}, the {kind.upper()} devices of this machine, got {count}; "
            "to train on fake CPU devices instead, set the environment variable JAX_PLATFORMS=cpu.",
        )
    return [device for devices in by_host for device in devices[:count]]


def check_backend(devices: Sequence[jax.Device]) -> None:
    """Raises InputError for a JAX setting that rules out training, or for a thread pool too small for the devices."""
    settings.check()
    here = sum(device.process_index == jax.process_index() for device in devices)
    if devices[0].platform == "cpu" and len(devices) > 1 and not _threads_suffice(here):
        raise InputError(
            "devices",
            f"are {here} fake CPU devices on a thread pool that was started too small for them; get them from "
            f"ctde_jax.devices.start({here}), which starts the CPU backend anew.",
        )


def count_cores() -> int:
    """Returns how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _start_platform() -> None:
    """Raises InputError if JAX cannot start the platform that the user chose, such as CUDA on a machine without it."""
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # the latter if jaxlib has no plugin for CUDA
        chosen = jax.config.jax_platforms  # pyright: ignore[reportAttributeAccessIssue]
        raise InputError(
            "JAX_PLATFORMS",
            f"must name a platform that JAX can start here, got {quoted(chosen)} ({_reason(error)}); set the "
            "environment variable JAX_PLATFORMS=cpu to train on fake CPU devices, or unset it.",
        ) from error


def _reason(error: Exception) -> str:
    return shortened(str(error).split(" (set JAX_PLATFORMS")[0] or "there is no plugin for it")


def _keep_programs() -> None:
    if jax.config.jax_compilation_cache_dir is not None:  # pyright: ignore[reportAttributeAccessIssue]
        return
    jax.config.update(
        "jax_compilation_cache_dir",
        str(user_cache_path("ctde_jax") / "programs" / _kind_of_machine()),
    )
    jax.config.update("jax_compilation_cache_max_size", 2**30)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def _kind_of_machine() -> str:
    """Names what machine code depends on, for JAX does not: a home folder may be on machines of several kinds."""
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text().splitlines() if facts.exists() else []
    abilities = next(
        (line for line in lines if line.lower().startswith(("flags", "features"))),
        platform.processor(),
    )
    return f"{platform.machine()}-{sha256(abilities.encode()).hexdigest()[:12]}"


def _request_fake_devices(count: int) -> None:
    """Raises RuntimeError where a backend is up already."""
    for value in (
        count + 1,
        count,
    ):  # one of them is a change, and JAX refuses changes once its backend is up
        jax.config.update("jax_num_cpu_devices", value)
    os.environ["NPROC"] = str(max(_THREADS_A_DEVICE * count, _threads()))


def _threads_suffice(count: int) -> bool:
    return _threads() >= _THREADS_A_DEVICE * count


def _threads() -> int:
    """The size of the thread pool of a CPU backend that would start now."""
    chosen = os.environ.get("NPROC", "")
    if chosen.isdecimal():
        return min(
            int(chosen), _THREADS_A_DEVICE * _MOST_DEVICES
        )  # XLA would start each of a million threads
    return count_cores()
