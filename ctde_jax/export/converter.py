"""jax2onnx without its patches: importing and running it leaves JAX, Flax and the process as they were.

jax2onnx replaces functions of JAX and Flax, to write `jnp.cumsum` as one operator for example. Some of these
patches are made on import and stay (`jnp.cumsum`, `linen.MultiHeadAttention.__call__`), and all of them are visible
to other threads during a conversion. A program that is a list of `jax.lax` primitives needs none of them. So only the
plugins of primitives are imported, the patches are not applied, and what an import changes is restored.
"""

import logging
import pkgutil
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from importlib import import_module
from threading import Lock
from types import ModuleType
from typing import Any
from unittest import mock

from jax import export

from ctde_jax.export.program import Program

_PATCHED = ("jax", "jaxlib", "flax")
"""Packages to which jax2onnx adds attributes on import."""

_PLUGINS = ("jax2onnx.plugins.jax.lax", "jax2onnx.plugins.jax.core")
_LOCK = Lock()


def convert(program: Program, **options: Any) -> Any:
    """Returns the ONNX model of a program of `jax.lax` primitives; `options` are those of `jax2onnx.to_onnx`."""
    with _LOCK, _restored(), _quiet():
        jax2onnx = import_module("jax2onnx")
        conversion = import_module("jax2onnx.converter.conversion_api")
        for package in map(import_module, _PLUGINS):
            for plugin in pkgutil.iter_modules(package.__path__):
                import_module(f"{package.__name__}.{plugin.name}")
        ir = import_module("onnx_ir._core")
        to_dimension = ir._maybe_convert_to_symbolic_dim
        with (
            mock.patch.object(conversion, "_activate_plugin_worlds", nullcontext),
            mock.patch.object(
                ir, "_maybe_convert_to_symbolic_dim", lambda length: to_dimension(_named(length))
            ),
        ):
            return jax2onnx.to_onnx(program.run, program.like, **options)


def _named(length: Any) -> Any:
    """Returns a symbolic length of JAX as its name, which some plugins do not do."""
    return str(length) if export.is_symbolic_dim(length) else length


@contextmanager
def _restored() -> Iterator[None]:
    """Restores the attributes of the modules of JAX and Flax, warning filters and log handlers.

    Submodules imported in between stay.
    """
    before = {module: dict(vars(module)) for module in _modules()}
    handlers = [*logging.root.handlers]
    try:
        with warnings.catch_warnings():
            yield
    finally:
        logging.root.handlers[:] = handlers
        for module, attributes in before.items():
            for name, value in [*vars(module).items()]:
                if name not in attributes and not isinstance(value, ModuleType):
                    delattr(module, name)
            vars(module).update(attributes)


def _modules() -> Sequence[ModuleType]:
    return [
        module
        for name, module in [*sys.modules.items()]
        if name.split(".")[0] in _PATCHED and module
    ]


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences warnings on the shapes inside a graph, which `onnx._tidy` removes."""
    logger = logging.getLogger("onnx_ir.serde")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
