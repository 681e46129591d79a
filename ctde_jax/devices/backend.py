"""Selects the training devices: all GPUs or TPUs, else one CPU device or several fake ones.

Fake devices share the cores of the CPU. XLA's CPU collectives block inside a thread pool with one
thread per core. If the pool has too few threads for the fake devices, they deadlock and the process
aborts after 40 seconds. XLA reads the pool size from the environment variable `NPROC` when JAX
starts its CPU backend, so this module sets it first.
"""

import os
import platform
from collections.abc import Sequence
from functools import cache
from hashlib import sha256
from pathlib import Path

import jax
from jax.extend.backend import clear_backends
from jaxlib.xla_client import make_cpu_client
from platformdirs import user_cache_path

from ctde_jax.devices import settings
from ctde_jax.devices.replica import distinct, is_virtual
from ctde_jax.errors import InputError, check_at_least, check_at_most, quoted, shortened

FAKE_DEVICES = 4
"""Default number of fake CPU devices in the commands."""

# Measured: with fewer than two threads per device, collectives can deadlock.
_THREADS_A_DEVICE = 2

# Each fake device takes three threads and milliseconds of start-up.
_MOST_DEVICES = 1024


def start(
    count: int | None = None, cpu_devices: int = 1, replicas: int | None = None
) -> list[jax.Device]:
    """Starts JAX if needed and returns the device of each replica to train.

    If a CPU backend is already up with too few devices or threads, as in a notebook that has used
    JAX before, it is restarted. Existing arrays stay readable but belong to the old devices.

    Compiled programs are cached for later starts, at most 1 GiB in the user's cache folder, unless
    the user has configured JAX's compilation cache.

    Args:
        count: Number of devices on each host (default: all accelerators, or `cpu_devices` if there
            are none).
        cpu_devices: Default number of devices on a machine without accelerators. More than one are
            fake: they share the cores, and together are slower than one. With several hosts, the
            default is 1 on each.
        replicas: Number of replicas on all devices together, a multiple of the number of devices
            (default: one on each device). Without accelerators and `count`, each replica has a fake
            device.

    Returns:
        The devices of all hosts, those of host 0 first. A device with several replicas occurs once
        for each of them, so the length is the number of replicas.

    Raises:
        InputError: If `count` is out of range or exceeds the devices of this host, `replicas` is
            not a multiple of the number of devices, JAX cannot start the platform in JAX_PLATFORMS,
            or a JAX setting rules out training.

    Examples:
        >>> devices = ctde.devices.start(cpu_devices=4)
        >>> len(devices)
        4
        >>> on_one_device = ctde.devices.start(1, replicas=8)
        >>> len(on_one_device), len(set(on_one_device))
        (8, 1)
    """
    check_at_least(1, devices=count, replicas=replicas)
    check_at_most(_MOST_DEVICES, devices=count, replicas=replicas)
    settings.check()
    _keep_programs()

    # The number of CPU devices must be set before a backend starts. If one is up, restart it only
    # if it is a CPU backend that is too small; a backend with accelerators is used as it is.
    wanted = count or (1 if jax.distributed.is_initialized() else replicas or cpu_devices)
    try:
        _request_fake_devices(wanted)
    except RuntimeError:
        if jax.default_backend() == "cpu" and (
            jax.local_device_count() < wanted or not _threads_suffice(wanted)
        ):
            clear_backends()
            _request_fake_devices(wanted)
    _start_platform()

    # Every host contributes its first `count` devices, or all of them.
    hosts = range(jax.process_count())
    by_host = [
        [device for device in jax.devices() if device.process_index == host] for host in hosts
    ]
    here = len(by_host[jax.process_index()])
    kind = by_host[0][0].platform
    if count is None and kind == "cpu":
        count = wanted
    if count is not None and count > here:
        raise InputError(
            "devices",
            f"must be at most {here}, the number of {kind.upper()} devices of this machine, got "
            f"{count}; to train on fake CPU devices, set the environment variable "
            "JAX_PLATFORMS=cpu.",
        )
    devices = [device for devices in by_host for device in devices[:count]]
    return devices if replicas is None else _repeated(devices, replicas)


def _repeated(devices: Sequence[jax.Device], replicas: int) -> list[jax.Device]:
    """Returns each device once for every replica on it; raises InputError if it does not divide."""
    a_device, rest = divmod(replicas, len(devices))
    if rest or not a_device:
        here = f"the {len(devices)} {devices[0].platform.upper()} devices"
        multiples = [len(devices) * max(1, a_device), len(devices) * (a_device + 1)]
        nearest = " or ".join(map(str, sorted(set(multiples))))
        raise InputError(
            "replicas",
            f"must be a multiple of {here}, got {replicas}; use {nearest}, or fewer devices.",
        )
    return [device for device in devices for _ in range(a_device)]


def one_for_each(devices: Sequence[jax.Device]) -> Sequence[jax.Device]:
    """Returns devices for which a program with one replica on each can be compiled.

    For virtual replicas, these are fake CPU devices on which nothing runs. They belong to a
    separate client, because XLA's thread pool has at least one thread for each CPU device, and more
    threads than cores slow down training.
    """
    if not is_virtual(devices):
        return devices
    return _fake_devices(len(devices))


@cache
def _fake_devices(count: int) -> Sequence[jax.Device]:
    return make_cpu_client(num_devices=count).devices()


def check_backend(devices: Sequence[jax.Device]) -> None:
    """Raises InputError if a JAX setting rules out training, or collectives may deadlock.

    They may deadlock if the thread pool of the CPU backend is too small for fake `devices`.
    """
    settings.check()
    present = distinct(devices)
    here = sum(device.process_index == jax.process_index() for device in present)
    if devices[0].platform == "cpu" and len(present) > 1 and not _threads_suffice(here):
        raise InputError(
            "devices",
            f"must have {_THREADS_A_DEVICE} threads for each fake CPU device, but the thread pool "
            f"is too small for {here} devices; call ctde_jax.devices.start({here}), which restarts "
            "the CPU backend.",
        )


def count_cores() -> int:
    """Returns the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _start_platform() -> None:
    """Raises InputError if JAX cannot start the user's platform, such as CUDA without a GPU."""
    try:
        jax.devices()
    # JAX raises AssertionError if jaxlib has no plugin for CUDA, else RuntimeError.
    except (RuntimeError, AssertionError) as error:
        chosen = jax.config.jax_platforms  # pyright: ignore[reportAttributeAccessIssue]
        raise InputError(
            "JAX_PLATFORMS",
            f"must name a platform that JAX can start here, got {quoted(chosen)} "
            f"({_reason(error)}); set the environment variable JAX_PLATFORMS=cpu to train on fake "
            "CPU devices, or unset it.",
        ) from error


def _reason(error: Exception) -> str:
    return shortened(str(error).split(" (set JAX_PLATFORMS")[0] or "no plugin for it is installed")


def _keep_programs() -> None:
    # A cache that the user has configured takes precedence.
    if (
        jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]
        is not None
    ):
        return
    jax.config.update(
        "jax_compilation_cache_dir",
        str(user_cache_path("ctde_jax") / "programs" / _kind_of_machine()),
    )
    jax.config.update("jax_compilation_cache_max_size", 2**30)
    # JAX's default does not cache programs that compile in less than a second.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def _kind_of_machine() -> str:
    """Returns a name for this type of CPU, for the cache folder of compiled programs.

    JAX's cache keys do not include it, and different machines may share a home folder.
    """
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text().splitlines() if facts.exists() else []
    abilities = next(
        (line for line in lines if line.lower().startswith(("flags", "features"))),
        platform.processor(),
    )
    return f"{platform.machine()}-{sha256(abilities.encode()).hexdigest()[:12]}"


def _request_fake_devices(count: int) -> None:
    """Requests CPU devices and threads for them.

    Raises:
        RuntimeError: If a backend is already up.
    """
    # JAX rejects only changes once a backend is up, and at least one of these two is a change.
    for value in (count + 1, count):
        jax.config.update("jax_num_cpu_devices", value)
    os.environ["NPROC"] = str(max(_THREADS_A_DEVICE * count, _threads()))


def _threads_suffice(count: int) -> bool:
    return _threads() >= _THREADS_A_DEVICE * count


def _threads() -> int:
    """Returns the thread pool size of a CPU backend if it starts now."""
    chosen = os.environ.get("NPROC", "")
    if chosen.isdecimal():
        # XLA would start every thread that is requested, even a million.
        return min(int(chosen), _THREADS_A_DEVICE * _MOST_DEVICES)
    return count_cores()
