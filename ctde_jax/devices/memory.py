"""Checks that sizes fit into memory, before anything is allocated.

An operating system may promise memory that it does not have and then kill the process, and XLA
aborts if a size overflows. So sizes that are known beforehand are compared with the total memory of
the machine: a larger size cannot fit, whatever else is running.
"""

import os
from collections.abc import Sequence
from contextlib import suppress
from math import prod
from pathlib import Path
from typing import Any

import jax
from rich.filesize import decimal

from ctde_jax.devices.replica import distinct, is_virtual
from ctde_jax.errors import InputError

_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
"""Files with the memory limit of the process's container, in versions 2 and 1 of cgroups."""


def of_this_machine() -> int:
    """Returns this machine's memory and swap in bytes, or its container's limit if lower."""
    found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") + _swap()]
    for path in _LIMITS:
        # The file does not exist in the other version, and contains `max` if there is no limit.
        with suppress(OSError, ValueError):
            found.append(int(Path(path).read_text()))
    return min(found)


def check(option: str, what: str, needed: int, way_out: str) -> None:
    """Raises InputError if something needs more bytes than this machine has.

    Args:
        option: Argument that determines the size.
        what: Plural subject of the error message: the values that take the memory.
        needed: Lower bound on the required bytes.
        way_out: Remedy, such as an option to lower, as an imperative.
    """
    _check(option, what, needed, of_this_machine(), way_out)


def size_of(tree: Any) -> int:
    """Returns the total bytes of the arrays in a tree, from their shapes and dtypes alone."""
    return sum(
        prod(leaf.shape) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
        if hasattr(leaf, "dtype")
    )


def check_training(
    train_state: Sequence[Any], axes: Sequence[Any], params: Any, devices: Sequence[jax.Device]
) -> None:
    """Raises InputError if training state and gradients exceed the memory of the devices.

    Fake CPU devices share the memory of the machine. An accelerator is checked only if JAX reports
    the size of its memory.

    Args:
        train_state: Training state of all replicas, `[replica, ...]`; only shapes and dtypes are
            read.
        axes: Axis of each part of the state: None if a device holds it once, 0 if once for each
            replica.
        params: Parameters of one replica; only shapes and dtypes are read.
        devices: Devices of all hosts.
    """
    # Each device holds its replicas' parts of the state, and gradients of the size of `params`.
    numbers = sum(prod(leaf.shape) for leaf in jax.tree.leaves(params))
    what = f"{numbers:,} parameters, their gradients and the states of optimizer and strategy"
    on_device = len(devices) // len(distinct(devices))
    a_device = size_of(params) + sum(
        size_of(part) // len(devices) * (1 if axis is None else on_device)
        for part, axis in zip(train_state, axes, strict=True)
    )

    # From 16 times the parameters on, most of it is strategy state, such as padded chunks.
    is_model = a_device < 16 * size_of(params)
    way_out = (
        "use a smaller model" if is_model else "lower chunk, rank or fragments of the strategy"
    )
    _check_devices("model" if is_model else "strategy", what, a_device, devices, way_out)


def check_runs(train_states: Any, params: Any, runs: int, devices: Sequence[jax.Device]) -> None:
    """Raises InputError if the training states of many runs exceed the memory of the devices.

    Args:
        train_states: Training states of all runs, which the devices share equally; only shapes and
            dtypes are read.
        params: Parameters of one run; only shapes and dtypes are read.
        runs: Number of runs.
        devices: Devices of this host.
    """
    needed = size_of(train_states)
    there = _memory_of(devices)
    if there is not None and needed + size_of(params) > there:
        most = max(0, there - size_of(params)) * runs // needed
        raise InputError(
            "seeds",
            f"must be fewer, or the model smaller: the states of {runs:,} runs take at least "
            f"{decimal(needed)}, but there are only {decimal(there)}; at most {most:,} runs fit.",
        )


def _memory_of(devices: Sequence[jax.Device]) -> int | None:
    """Returns the memory of all devices of this host together; None if JAX does not report it."""
    # Every accelerator has separate memory; fake CPU devices share that of the machine.
    here = distinct(devices)
    if here[0].platform == "cpu":
        return of_this_machine()
    limit = (here[0].memory_stats() or {}).get("bytes_limit")
    return None if limit is None else limit * len(here)


def check_program(program: Any, devices: Sequence[jax.Device]) -> None:
    """Raises InputError if a program's temporary arrays, such as activations, exceed memory.

    Nothing is checked if the backend reports no memory analysis.

    Args:
        program: A compiled program of a training step; see `replica.Program`.
        devices: Devices of all hosts.
    """
    size = temporary(program)
    if size is not None:
        lower = "lower batch_size, sync_every or chunk, or use a smaller model"
        _check_devices("batch_size", "the temporary arrays of a step", size, devices, lower)


def temporary(program: Any) -> int | None:
    """Returns the bytes of a program's temporary arrays on a device; None if they are unknown.

    Args:
        program: A compiled program; see `replica.Program`.
    """
    # A backend may return None.
    analysis = program.memory_analysis()
    return None if analysis is None else analysis.temp_size_in_bytes


def _check_devices(
    option: str, what: str, a_device: int, devices: Sequence[jax.Device], way_out: str
) -> None:
    here = [dev for dev in distinct(devices) if dev.process_index == jax.process_index()]
    if is_virtual(devices):
        way_out = f"{way_out}, or fewer replicas"

    # Every accelerator has separate memory; fake CPU devices share that of the machine.
    if here[0].platform != "cpu":
        there = (here[0].memory_stats() or {}).get("bytes_limit")
        if there is not None:
            _check(option, f"{what} on a device", a_device, there, way_out)
    elif len(here) > 1:
        _check(
            option,
            f"{what} on {len(here)} CPU devices",
            len(here) * a_device,
            of_this_machine(),
            f"{way_out}, or fewer devices",
        )
    else:
        _check(option, what, a_device, of_this_machine(), way_out)


def _check(option: str, what: str, needed: int, there: int, way_out: str) -> None:
    if needed > there:
        rule = (
            f"must fit into memory: {what} take at least {decimal(needed)}, "
            f"but there are only {decimal(there)}"
        )
        raise InputError(option, f"{rule}; {way_out}.")


def _swap() -> int:
    # Only Linux has this file; elsewhere swap space is not counted.
    with suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024 * int(next(line.split()[1] for line in lines if line.startswith("SwapTotal:")))
    return 0
