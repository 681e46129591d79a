"""Sizes that cannot fit into memory, refused before anything is allocated.

A system may promise memory that it does not have and then kill the process, and XLA aborts if a size overflows. So what
is known beforehand is compared with all the memory of the machine: more than that cannot fit, whatever else is running.
"""

import os
from collections.abc import Sequence
from contextlib import suppress
from math import prod
from pathlib import Path
from typing import Any

import jax
from rich.filesize import decimal

from ctde_jax.errors import InputError

_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
"""The memory that the process's container may use, in version 2 and version 1 of cgroups."""


def of_this_machine() -> int:
    """Returns the bytes of memory and swap space of this machine, or the limit of its container if that is lower."""
    found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") + _swap()]
    for path in _LIMITS:
        with suppress(OSError, ValueError):  # there is no such file, or it has no number but `max`
            found.append(int(Path(path).read_text()))
    return min(found)


def check(option: str, what: str, needed: int, way_out: str) -> None:
    """Raises InputError if something needs more bytes than this machine has.

    Args:
        option: The argument that determines the size.
        what: What takes the memory, as the subject of a sentence in the plural.
        needed: Bytes, at least.
        way_out: What to lower, as an imperative.
    """
    _check(option, what, needed, of_this_machine(), way_out)


def size_of(tree: Any) -> int:
    """Returns the bytes of all arrays of a tree, of which only shapes and dtypes are read."""
    return sum(
        prod(leaf.shape) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
        if hasattr(leaf, "dtype")
    )


def check_training(train_state: Any, params: Any, devices: Sequence[jax.Device]) -> None:
    """Raises InputError if the state of the training and the gradients exceed the memory of their devices.

    Fake CPU devices share the memory of the machine; that of an accelerator is compared if JAX knows its size.

    Args:
        train_state: The arrays of all replicas, with a leading replica axis.
        params: The arrays of one replica.
        devices: All of them.
    """
    numbers = sum(prod(leaf.shape) for leaf in jax.tree.leaves(params))
    what = f"{numbers:,} parameters, their gradients and the states of optimizer and strategy"
    a_device = size_of(train_state) // len(devices) + size_of(params)
    is_model = a_device < 16 * size_of(
        params
    )  # else most of it is what a strategy remembers, such as padded chunks
    way_out = (
        "take a smaller model" if is_model else "lower chunk, rank or fragments of the strategy"
    )
    _check_devices("model" if is_model else "strategy", what, a_device, devices, way_out)


def check_program(program: Any, devices: Sequence[jax.Device]) -> None:
    """Raises InputError if a compiled program needs more memory than its devices have, activations included."""
    analysis = getattr(program, "memory_analysis", lambda: None)()
    if analysis is not None:
        lower = "lower batch_size, sync_every or chunk, or take a smaller model"
        _check_devices(
            "batch_size",
            "the temporary arrays of a step",
            analysis.temp_size_in_bytes,
            devices,
            lower,
        )


def _check_devices(
    option: str, what: str, a_device: int, devices: Sequence[jax.Device], way_out: str
) -> None:
    here = [device for device in devices if device.process_index == jax.process_index()]
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
        rule = f"must fit into memory: {what} take at least {decimal(needed)}, and there are {decimal(there)}"
        raise InputError(option, f"{rule}; {way_out}.")


def _swap() -> int:
    with suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024 * int(next(line.split()[1] for line in lines if line.startswith("SwapTotal:")))
    return 0
