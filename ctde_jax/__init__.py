"""Centralized training, decentralized execution: one Flax model, trained over many devices.

To read the package top to bottom, follow the walk:

    errors -> reading -> streams -> bundle -> presets -> config -> hosts -> settings
           -> memory -> devices -> replica -> data -> feed -> augment -> models
           -> initializers -> mup -> tasks -> transformations -> optimizers -> aggregate
           -> build -> state -> schedule -> gradient -> guard -> round -> hlo -> collectives
           -> traffic -> evaluate -> reestimate -> generation -> checks -> picture -> jaxprs
           -> identity -> position -> run_folder -> log -> meter -> atomic -> checkpoint
           -> resume -> stop -> run -> trained -> warm_start -> rollback -> loop -> loading
           -> report -> targets -> wire -> stopwatch -> profile -> supervisor -> train
           -> proofs -> export -> execute -> verify -> object_store

Modules are imported when they are first used: `import ctde_jax` alone neither imports JAX nor touches a device.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ctde_jax import aggregate, bundle, data, devices, models
    from ctde_jax.aggregate import Strategy
    from ctde_jax.bundle import open_bundle
    from ctde_jax.checkpoint import run_folder
    from ctde_jax.config import build, optimizers, report
    from ctde_jax.config.build import strategy
    from ctde_jax.config.load import load_run
    from ctde_jax.cost import traffic
    from ctde_jax.data import augment
    from ctde_jax.devices import hosts, replica, supervisor
    from ctde_jax.errors import HostLost, InputError, NonFiniteLoss, Preempted, ReplicasDiverged
    from ctde_jax.export import write_bundle, write_page
    from ctde_jax.models import initializers, mup, tasks
    from ctde_jax.models.generation import generate
    from ctde_jax.models.tasks import Task
    from ctde_jax.rounds import state
    from ctde_jax.trainer import checks, log
    from ctde_jax.trainer.fit import fit
    from ctde_jax.trainer.trained import Trained

__all__ = [
    "HostLost",
    "InputError",
    "NonFiniteLoss",
    "Preempted",
    "ReplicasDiverged",
    "Strategy",
    "Task",
    "Trained",
    "aggregate",
    "augment",
    "build",
    "bundle",
    "checks",
    "data",
    "devices",
    "fit",
    "generate",
    "hosts",
    "initializers",
    "load_run",
    "log",
    "models",
    "mup",
    "open_bundle",
    "optimizers",
    "replica",
    "report",
    "run_folder",
    "state",
    "strategy",
    "supervisor",
    "tasks",
    "traffic",
    "write_bundle",
    "write_page",
]

_HOME = {
    "HostLost": "errors",
    "InputError": "errors",
    "NonFiniteLoss": "errors",
    "Preempted": "errors",
    "ReplicasDiverged": "errors",
    "Strategy": "aggregate",
    "Task": "tasks",
    "Trained": "trained",
    "fit": "loop",
    "generate": "generation",
    "load_run": "loading",
    "open_bundle": "bundle",
    "strategy": "build",
    "write_bundle": "export",
    "write_page": "export",
}


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    return import_module(f"{__name__}.{name}")
