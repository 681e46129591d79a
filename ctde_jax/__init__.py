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
    from ctde_jax import (
        aggregate,
        augment,
        build,
        bundle,
        checks,
        data,
        devices,
        hosts,
        initializers,
        log,
        models,
        mup,
        optimizers,
        replica,
        report,
        run_folder,
        state,
        supervisor,
        tasks,
        traffic,
    )
    from ctde_jax.aggregate import Strategy
    from ctde_jax.build import strategy
    from ctde_jax.bundle import open_bundle
    from ctde_jax.errors import HostLost, InputError, NonFiniteLoss, Preempted, ReplicasDiverged
    from ctde_jax.export import write_bundle, write_page
    from ctde_jax.generation import generate
    from ctde_jax.loading import load_run
    from ctde_jax.loop import fit
    from ctde_jax.tasks import Task
    from ctde_jax.trained import Trained

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
