"""Digests of jaxprs: equal for equal programs in any process, different if an operation differs.

Every value is digested from its operation and the digests of its inputs. Therefore the names of
functions and variables, source lines, the order of independent operations, operations with unused
results, and `jax.jit` within the program do not affect the digest. All bits of a constant do, such
as those of a learning rate that an optimizer closes over.
"""

# pyright: reportPrivateImportUsage=false

import re
from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import partial
from hashlib import sha256
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal

from ctde_jax.data import digest as digest_of_array
from ctde_jax.devices import AXIS, SHARD, PyTree

Digest = bytes

_INLINED = ("jit", "pjit", "closed_call", "core_call", "custom_jvp_call", "custom_vjp_call")
"""Calls that are digested as their jaxpr.

Custom derivative rules appear in a program only if it is differentiated.
"""

_IGNORED_OPERATIONS = ("debug_callback", "debug_print")
_IGNORED_PARAMETERS = (
    "name",
    "debug_info",
    "name_and_src_info",
    "source_info",
    "ctx_mesh",
    "metadata",
)
"""Parameters that describe the origin of an operation, not what it computes."""


def digest_of(function: Callable[..., PyTree], *like: PyTree, replicas: int = 1) -> str:
    """Traces a function and returns the SHA-256 digest of its jaxpr, in hexadecimal.

    Args:
        function: Function of one replica; it may use collectives over `replica.AXIS` and
            `replica.SHARD`.
        *like: Arguments of the function; only their shapes and dtypes are read.
        replicas: Length of the replica axis.
    """
    program = jax.make_jaxpr(function, axis_env=[(AXIS, replicas), (SHARD, 1)])(*like)
    return _program(program.jaxpr, program.consts).hex()


def digest_of_shapes(*tree: PyTree) -> str:
    """Returns the SHA-256 digest of the paths, shapes and dtypes of all leaves, in hexadecimal."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    lines = [
        f"{jax.tree_util.keystr(path)} {leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves
    ]
    return sha256("\n".join(lines).encode()).hexdigest()


def _program(jaxpr: Jaxpr, consts: Sequence[Any]) -> Digest:
    # A jaxpr that is not closed has constants without values; their positions stand for them.
    known = [_value(const) for const in consts] or [
        _joined("const", place) for place in range(len(jaxpr.constvars))
    ]
    inputs = [_joined("input", place, str(var.aval)) for place, var in enumerate(jaxpr.invars)]
    effects: list[Digest] = []
    return _joined("program", *_outputs(jaxpr, known, inputs, effects), *effects)


def _outputs(
    jaxpr: Jaxpr, consts: Sequence[Digest], inputs: Sequence[Digest], effects: list[Digest]
) -> list[Digest]:
    """Returns the digests of the outputs of a jaxpr.

    Args:
        jaxpr: Program without values for its constants.
        consts: Digests of the constants.
        inputs: Digests of the inputs.
        effects: List to which the digests of operations with side effects are appended.
    """
    digests = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *inputs), strict=True))

    def read(atom: Any) -> Digest:
        if isinstance(atom, Literal):
            return _array(
                np.asarray(atom.val, atom.aval.dtype)  # pyright: ignore[reportAttributeAccessIssue]
            )
        return digests[atom]

    for equation in jaxpr.eqns:
        operands = [read(atom) for atom in equation.invars]
        digests |= zip(equation.outvars, _results(equation, operands, effects), strict=True)
    return [read(atom) for atom in jaxpr.outvars]


def _results(equation: JaxprEqn, operands: list[Digest], effects: list[Digest]) -> list[Digest]:
    operation = equation.primitive.name

    # Inline calls, so that `jax.jit` within the program has no effect.
    called = equation.params.get("jaxpr", equation.params.get("call_jaxpr"))
    if operation in _INLINED and isinstance(called, ClosedJaxpr):
        return _outputs(called.jaxpr, [_value(const) for const in called.consts], operands, effects)
    # Printing has no effect on the results.
    if operation in _IGNORED_OPERATIONS:
        return [_joined(operation) for _ in equation.outvars]

    # The position distinguishes the results. An operation with effects is digested even if unused.
    kept = {
        name: value for name, value in equation.params.items() if name not in _IGNORED_PARAMETERS
    }
    whole = _joined(operation, _value(kept), *operands)
    if equation.effects:
        effects.append(whole)
    return [_joined(whole, place) for place in range(len(equation.outvars))]


def _value(value: Any) -> Digest:
    """Digests a constant or a parameter of an operation; all functions have the same digest."""
    match value:
        case ClosedJaxpr():
            return _program(value.jaxpr, value.consts)
        case Jaxpr():
            return _program(value, [])
        case jax.Array() | np.ndarray() | np.generic():
            return _array(value)
        case None | bool() | int() | float() | complex() | str() | bytes():
            return _joined(type(value).__name__, repr(value))
        case Enum() | np.dtype() | type():
            return _joined(str(value))
        case tuple() | list():
            return _joined("sequence", *map(_value, value))
        # Mappings and sets are sorted by the digests of their items, as their order is arbitrary.
        case dict():
            return _joined(
                "mapping", *sorted(_joined(str(key), _value(each)) for key, each in value.items())
            )
        case set() | frozenset():
            return _joined("set", *sorted(map(_value, value)))
        case partial():
            return _joined("partial", _value(value.args), _value(value.keywords))
    if is_dataclass(value) and not callable(value):
        return _joined(
            type(value).__name__, *(_value(getattr(value, field.name)) for field in fields(value))
        )
    if callable(value) or hasattr(value, "call_wrapped"):
        return _joined("function")
    # The representation of any other object may hold its address.
    return _joined(type(value).__name__, re.sub(r"0x[0-9a-f]+", "", repr(value)))


def _array(array: Any) -> Digest:
    # Arrays of random keys have no numpy dtype.
    if isinstance(array, jax.Array) and jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        return _joined(str(array.dtype), _array(jax.random.key_data(array)))
    return _joined(digest_of_array(np.asarray(array)))


def _joined(*parts: Digest | str | int) -> Digest:
    # Each part is preceded by its length, so that the borders between parts matter.
    total = sha256()
    for part in parts:
        content = part if isinstance(part, bytes) else str(part).encode()
        total.update(len(content).to_bytes(8) + content)
    return total.digest()
