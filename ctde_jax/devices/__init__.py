"""The devices that training runs on: backend, replicas, hosts, memory and settings."""

from ctde_jax.devices import groups, hosts, memory, replica, supervisor
from ctde_jax.devices.backend import FAKE_DEVICES, check_backend, count_cores, one_for_each, start
from ctde_jax.devices.groups import AXIS, is_vmapped
from ctde_jax.devices.replica import (
    SHARD,
    Program,
    PyTree,
    agreed_state,
    as_complex,
    as_real,
    is_changed,
    largest,
    weighted_mean,
)
from ctde_jax.devices.runs import divide, over_runs

__all__ = [
    "AXIS",
    "FAKE_DEVICES",
    "SHARD",
    "Program",
    "PyTree",
    "agreed_state",
    "as_complex",
    "as_real",
    "check_backend",
    "count_cores",
    "divide",
    "groups",
    "hosts",
    "is_changed",
    "is_vmapped",
    "largest",
    "memory",
    "one_for_each",
    "over_runs",
    "replica",
    "start",
    "supervisor",
    "weighted_mean",
]
