"""Reports exceptions in user code as one sentence, with the argument shapes and the source line."""

import linecache
import re
import sysconfig
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import flax
import jax
import numpy as np
import optax
from flax import nnx
from flax.errors import InvalidRngError, ModifyScopeVariableError
from jax import numpy as jnp

from ctde_jax.devices import PyTree
from ctde_jax.errors import InputError, shortened

_PACKAGES = [str(Path(str(package.__file__)).parent) for package in (flax, jax, np, optax)]
_OURS = str(Path(__file__).parents[1])
_STANDARD = sysconfig.get_path("stdlib")

# From here on, messages of JAX describe the place of the error in the trace, or link to a page.
_WHERE_IN_JAX = re.compile(
    r" The error occurred| The problem arose| This concrete value| See https| \(https"
)

# Exceptions that are not the fault of user code, such as exhausted memory.
_PASSED_ON = (InputError, MemoryError, jax.errors.JaxRuntimeError)

_NOT_TRACEABLE = (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
    jax.errors.NonConcreteBooleanIndexError,
)


@contextmanager
def reported(option: str, subject: str, **arguments: PyTree) -> Iterator[None]:
    """Replaces an exception in user code by an `InputError` with one sentence.

    Args:
        option: Name of the argument that contains the code.
        subject: Description of the code that is called, such as "your module".
        **arguments: Arguments of the call, by name.

    Raises:
        InputError: If the code raises an exception, which becomes the cause. Exceptions that are
            not the fault of the code, such as exhausted memory, propagate unchanged.
    """
    try:
        yield
    except _PASSED_ON:
        raise
    except Exception as error:
        # The first sentences of the message, on one line.
        with_what = " and ".join(f"{name} {describe(value)}" for name, value in arguments.items())
        reason = shortened(_WHERE_IN_JAX.split(" ".join(str(error).split()))[0]).rstrip(". ")
        where = _user_line(error)
        hint = _hint(error, where, arguments)
        sentence = f"failed: {subject}{f', called with {with_what},' if with_what else ''} raised "
        raise InputError(
            option,
            f"{sentence}{type(error).__name__}: {reason}{where}.{f' {hint}' if hint else ''}",
        ) from error


def describe(tree: PyTree) -> str:
    """Describes a tree by dtypes and shapes, such as `(float32[8, 3], int32[8])`."""
    if isinstance(tree, dict):
        return f"{{{', '.join(f'{key!r}: {describe(value)}' for key, value in tree.items())}}}"
    if isinstance(tree, (tuple, list)):
        return f"({', '.join(map(describe, tree))})"
    if hasattr(tree, "shape") and hasattr(tree, "dtype"):
        return f"{tree.dtype}[{', '.join(map(str, tree.shape))}]"
    return "None" if tree is None else type(tree).__name__


def _user_line(error: Exception) -> str:
    """Returns the innermost source line of user code, in parentheses, or an empty string."""
    for frame, line in reversed(list(traceback.walk_tb(error.__traceback__))):
        file = frame.f_code.co_filename
        if not _is_library(file):
            source = linecache.getline(file, line, frame.f_globals).strip()
            return f" ({Path(file).name}:{line}{f': {source}' if source else ''})"
    return ""


def _is_library(file: str) -> bool:
    # A notebook cell is user code; other names in angle brackets, such as <string>, are not.
    if file.startswith("<ipython"):
        return False
    # Installed packages lie inside the folder of the standard library, but may be user code.
    is_installed = "site-packages" in file or "dist-packages" in file
    return file.startswith((*_PACKAGES, _OURS, "<")) or (
        file.startswith(_STANDARD) and not is_installed
    )


def _hint(error: Exception, where: str, arguments: dict[str, Any]) -> str:
    """Returns a sentence with the fix of a common mistake, or an empty string.

    Args:
        error: Exception that user code raised.
        where: User source line that raised it, as returned by `_user_line`.
        arguments: Arguments of the call, by name.
    """
    text = str(error)
    inputs = arguments.get("inputs")

    # Code that cannot be traced.
    if isinstance(error, _NOT_TRACEABLE):
        return (
            "This code is compiled: use jnp.where or lax.cond instead of if, and jnp or lax "
            "instead of numpy and Python numbers. If only the constructor does this, build the "
            "module first and pass the instance."
        )
    if isinstance(error, jax.errors.UnexpectedTracerError):
        return (
            "An array from the constructor is stored where flax does not track it, such as in a "
            "closure or a list: make it an attribute or an nnx.Variable, or build the module first "
            "and pass the instance."
        )

    # Modes and RNG streams, recognized by the error texts of flax and JAX.
    if isinstance(error, InvalidRngError) and '"dropout"' in text:
        return (
            "Dropout is active in inference: add an argument such as train to __call__, or pass "
            "from_linen(module, train={...}, infer={...})."
        )
    if isinstance(error, NameError) and "axis name" in text:
        return "Remove axis_name: batch statistics are synchronized without it."
    if "no `rngs` argument was provided" in text:
        return "Build the layer with random streams, as in nnx.Dropout(0.1, rngs=rngs)."
    if "deterministic" in text or "use_running_average" in text:
        return (
            "Add an argument such as train to __call__, and pass deterministic=not train to the "
            "layer."
        )
    if isinstance(error, ModifyScopeVariableError) and "batch_stats" in text:
        return (
            "A layer updates its batch statistics in inference: add an argument such as train to "
            "__call__, and pass it to the layer."
        )

    # Shapes and dtypes of the inputs.
    if inputs is None or not hasattr(inputs, "dtype"):
        return ""
    return _hint_for_inputs(error, text, where, inputs)


def _hint_for_inputs(error: Exception, text: str, where: str, inputs: Any) -> str:
    """Returns a hint if a shape or dtype probably caused the error, or an empty string.

    Args:
        error: Exception that user code raised.
        text: Message of the error.
        where: User source line that raised it, as returned by `_user_line`.
        inputs: Inputs of the model.
    """
    is_type_or_value = isinstance(error, (TypeError, ValueError))
    if (
        "integer" in text.lower()
        and is_type_or_value
        and jnp.issubdtype(inputs.dtype, jnp.floating)
    ):
        return (
            "This code requires integers: pass integer features to data.from_arrays, which does "
            "not scale them."
        )
    if "reshape" in text and "reshape" in where:
        return "The batch size varies: reshape to (len(x), -1)."

    # A layer whose inputs have the shape of the model's inputs is treated as the first layer.
    layer = _layer_with_other_features(error)
    is_first = layer is not None and layer.given.shape[1:] == inputs.shape[1:]
    if (
        jnp.issubdtype(inputs.dtype, jnp.integer)
        and isinstance(error, TypeError)
        and (is_first or layer is None)
    ):
        return "The inputs are integers: pass float features, or embed tokens first."
    if layer is None:
        return ""
    length = layer.given.shape[-1]
    if layer.axes == inputs.ndim + 1 and length == inputs.shape[-1]:
        return "A convolution needs a channel axis: x[..., None]."
    if layer.axes == 0 and is_first and layer.wanted == prod(inputs.shape[1:]):
        return "Flatten the inputs: x.reshape(len(x), -1)."
    return (
        f"{layer.kind} was built with in_features={layer.wanted}, but the last axis of its inputs "
        f"has {length}."
    )


class _Layer(NamedTuple):
    """A flax layer that was built for a different number of features than its inputs have."""

    kind: str
    wanted: int
    given: jax.Array
    axes: int
    """Number of axes of the inputs that a convolution requires, or 0 for other layers."""


def _layer_with_other_features(error: Exception) -> _Layer | None:
    """Returns the outermost layer in the traceback whose inputs do not match it, or None.

    These are layers of flax that were built for a different number of features.
    """
    # The layers of flax have the arguments `self` and `inputs`. A traceback starts at the outermost
    # frame.
    for frame, _ in traceback.walk_tb(error.__traceback__):
        layer = frame.f_locals.get("self")
        given = frame.f_locals.get("inputs")
        is_of_flax = frame.f_code.co_filename.startswith(_PACKAGES[0]) and isinstance(
            layer, nnx.Module
        )
        if not is_of_flax or not isinstance(given, jax.Array):
            continue
        wanted = getattr(layer, "in_features", None)
        kernel_size = getattr(layer, "kernel_size", None)
        if isinstance(wanted, int) and given.ndim and given.shape[-1] != wanted:
            axes = 0 if kernel_size is None else len(kernel_size) + 2
            return _Layer(f"nnx.{type(layer).__name__}", wanted, given, axes)
    return None
