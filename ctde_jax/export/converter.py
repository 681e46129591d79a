"""jax2onnx without its patches: its import and its use leave JAX, Flax and the process unchanged.

jax2onnx replaces functions of JAX and Flax, for example to write `jnp.cumsum` as one operator. Some
of these patches are applied on import and stay (`jnp.cumsum`, `linen.MultiHeadAttention.__call__`),
and all of them are visible to other threads during a conversion. A program that is a list of
`jax.lax` primitives needs none of them. So only the plugins of primitives are imported, the patches
are not applied, and changes made by the import are reverted.
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

from ctde_jax.export.program import Inference

_PATCHED = ("jax", "jaxlib", "flax")
"""Packages to which jax2onnx adds attributes on import."""

_PLUGINS = ("jax2onnx.plugins.jax.lax", "jax2onnx.plugins.jax.core")
# One conversion at a time, as patches and their removal affect the whole process.
_LOCK = Lock()


def convert(program: Inference, **options: Any) -> Any:
    """Converts a program of `jax.lax` primitives to an ONNX model.

    Args:
        program: The program.
        **options: Keyword arguments of `jax2onnx.to_onnx`.

    Returns:
        The `onnx.ModelProto`.
    """
    with _LOCK, _restored(), _quiet():
        jax2onnx = import_module("jax2onnx")
        conversion = import_module("jax2onnx.converter.conversion_api")

        # A plugin registers itself on import. Plugins of functions would also register patches.
        for package in map(import_module, _PLUGINS):
            for plugin in pkgutil.iter_modules(package.__path__):
                import_module(f"{package.__name__}.{plugin.name}")

        # `_activate_plugin_worlds` applies the patches and imports the remaining plugins.
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
    """Returns the name of a symbolic length of JAX; returns any other length unchanged.

    Some plugins of jax2onnx pass the symbolic length itself instead of its name.
    """
    return str(length) if export.is_symbolic_dim(length) else length


@contextmanager
def _restored() -> Iterator[None]:
    """Restores module attributes of JAX and Flax, warning filters and log handlers on exit.

    Submodules that are imported within the body remain.
    """
    before = {module: dict(vars(module)) for module in _modules()}
    handlers = [*logging.root.handlers]
    try:
        with warnings.catch_warnings():
            yield
    finally:
        logging.root.handlers[:] = handlers
        # Attributes that are submodules stay: Python does not set them again once `sys.modules`
        # has the submodule.
        for module, attributes in before.items():
            for name, value in [*vars(module).items()]:
                if name not in attributes and not isinstance(value, ModuleType):
                    delattr(module, name)
            vars(module).update(attributes)


def _modules() -> Sequence[ModuleType]:
    # `sys.modules` is copied first, as another thread may import a module in the meantime.
    return [
        module
        for name, module in [*sys.modules.items()]
        if name.split(".")[0] in _PATCHED and module
    ]


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences warnings about shape annotations within a graph, which `onnx._tidy` removes."""
    logger = logging.getLogger("onnx_ir.serde")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
