"""An exception in a user's module or loss, as one sentence with the shapes it was called with and its own line."""

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
_OURS, _STANDARD = str(Path(__file__).parents[1]), sysconfig.get_path("stdlib")

_WHERE_IN_JAX = re.compile(
    r" The error occurred| The problem arose| This concrete value| See https| \(https"
)

_PASSED_ON = (InputError, MemoryError, jax.errors.JaxRuntimeError)

_NOT_TRACEABLE = (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
    jax.errors.NonConcreteBooleanIndexError,
)


@contextmanager
def reported(option: str, subject: str, **arguments: PyTree) -> Iterator[None]:
    """Turns an exception in code of the user's into a sentence.

    Args:
        option: The argument that contains the code.
        subject: What is called, such as "your module".
        **arguments: What it is called with.

    Raises:
        InputError: Instead of any other exception, which is its cause. Exceptions that are no fault of the code, such
            as exhausted memory, pass unchanged.
    """
    try:
        yield
    except _PASSED_ON:
        raise
    except Exception as error:
        with_what = " and ".join(f"{name} {describe(value)}" for name, value in arguments.items())
        reason = shortened(_WHERE_IN_JAX.split(" ".join(str(error).split()))[0]).rstrip(". ")
        where = _own_line(error)
        hint = _hint(error, where, arguments)
        sentence = f"failed: {subject}{f', called with {with_what},' if with_what else ''} raised "
        raise InputError(
            option,
            f"{sentence}{type(error).__name__}: {reason}{where}.{f' {hint}' if hint else ''}",
        ) from error


def describe(tree: PyTree) -> str:
    """Describes arrays by dtype and shape, such as `float32[8, 28, 28]` or `(float32[8, 3], float32[8, 6])`."""
    if isinstance(tree, dict):
        return f"{{{', '.join(f'{key!r}: {describe(value)}' for key, value in tree.items())}}}"
    if isinstance(tree, (tuple, list)):
        return f"({', '.join(map(describe, tree))})"
    if hasattr(tree, "shape") and hasattr(tree, "dtype"):
        return f"{tree.dtype}[{', '.join(map(str, tree.shape))}]"
    return "nothing" if tree is None else type(tree).__name__


def _own_line(error: Exception) -> str:
    """Returns the innermost line that belongs to no library, in parentheses."""
    for frame, line in reversed(list(traceback.walk_tb(error.__traceback__))):
        file = frame.f_code.co_filename
        if not _is_library(file):
            source = linecache.getline(file, line, frame.f_globals).strip()
            return f" ({Path(file).name}:{line}{f': {source}' if source else ''})"
    return ""


def _is_library(file: str) -> bool:
    if file.startswith("<ipython"):
        return False
    is_installed = "site-packages" in file or "dist-packages" in file
    return file.startswith((*_PACKAGES, _OURS, "<")) or (
        file.startswith(_STANDARD) and not is_installed
    )


def _hint(error: Exception, where: str, arguments: dict[str, Any]) -> str:
    """Names the way out of the usual mistakes."""
    text, inputs = str(error), arguments.get("inputs")
    if isinstance(error, _NOT_TRACEABLE):
        return (
            "It is compiled: use jnp.where or lax.cond in place of if, and jnp or lax in place of numpy and Python "
            "numbers. If only the constructor does this, build the module first and pass the instance."
        )
    if isinstance(error, jax.errors.UnexpectedTracerError):
        return (
            "An array made in the constructor is kept where flax does not see it, such as a closure or a list: make "
            "it an attribute or an nnx.Variable, or build the module first and pass the instance."
        )
    if isinstance(error, InvalidRngError) and '"dropout"' in text:
        return (
            "Dropout is active in inference: give __call__ an argument such as train, or pass "
            "from_linen(module, train={...}, infer={...})."
        )
    if isinstance(error, NameError) and "axis name" in text:
        return "Leave out axis_name: batch statistics are shared over the batch."
    if "no `rngs` argument was provided" in text:
        return "Build the layer with random streams, as nnx.Dropout(0.1, rngs=rngs)."
    if "deterministic" in text or "use_running_average" in text:
        return "Give __call__ an argument such as train, and pass deterministic=not train on to the layer."
    if isinstance(error, ModifyScopeVariableError) and "batch_stats" in text:
        return "A layer trains in inference: give __call__ an argument such as train, and pass it on to the layer."
    if inputs is None or not hasattr(inputs, "dtype"):
        return ""
    return _hint_for_inputs(error, text, where, inputs)


def _hint_for_inputs(error: Exception, text: str, where: str, inputs: Any) -> str:
    """Names the way out if the shape or the dtype of the inputs is the reason."""
    is_type_or_value = isinstance(error, (TypeError, ValueError))
    if (
        "integer" in text.lower()
        and is_type_or_value
        and jnp.issubdtype(inputs.dtype, jnp.floating)
    ):
        return "It reads integers: pass integer features to data.from_arrays, which reach it unchanged."
    if "reshape" in text and "reshape" in where:
        return "It is called with batches of any size: reshape to (len(x), -1)."
    layer = _layer_with_other_features(error)
    is_first = layer is not None and layer.given.shape[1:] == inputs.shape[1:]
    if (
        jnp.issubdtype(inputs.dtype, jnp.integer)
        and isinstance(error, TypeError)
        and (is_first or layer is None)
    ):
        return (
            "Its inputs are integers: pass float features, or look tokens up in an embedding first."
        )
    if layer is None:
        return ""
    length = layer.given.shape[-1]
    if layer.axes == inputs.ndim + 1 and length == inputs.shape[-1]:
        return "A convolution needs a channel axis: x[..., None]."
    if layer.axes == 0 and is_first and layer.wanted == prod(inputs.shape[1:]):
        return "Flatten its inputs: x.reshape(len(x), -1)."
    return f"{layer.kind} was built with in_features={layer.wanted}, but its inputs have {length} in the last axis."


class _Layer(NamedTuple):
    """A layer of flax that was built for another number of input features than its inputs have."""

    kind: str
    wanted: int
    given: jax.Array
    axes: int
    """How many axes the inputs of a convolution have, or 0."""


def _layer_with_other_features(error: Exception) -> _Layer | None:
    """Returns the outermost such layer among those that were called when the error was raised."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        layer, given = frame.f_locals.get("self"), frame.f_locals.get("inputs")
        is_of_flax = frame.f_code.co_filename.startswith(_PACKAGES[0]) and isinstance(
            layer, nnx.Module
        )
        if not is_of_flax or not isinstance(given, jax.Array):
            continue
        wanted, kernel_size = (
            getattr(layer, "in_features", None),
            getattr(layer, "kernel_size", None),
        )
        if isinstance(wanted, int) and given.ndim and given.shape[-1] != wanted:
            axes = 0 if kernel_size is None else len(kernel_size) + 2
            return _Layer(f"nnx.{type(layer).__name__}", wanted, given, axes)
    return None
