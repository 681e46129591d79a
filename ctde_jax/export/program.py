"""Traces functions for export with a symbolic number of examples.

Constants are folded and dead code is removed: a trace of inference still contains unused PRNG keys,
custom JVP and VJP rules, and constant masks, which some runtimes do not support.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import jax
from jax import export
from jax.core import Tracer
from jax.extend.core import (
    ClosedJaxpr,  # pyright: ignore[reportPrivateImportUsage]
    Jaxpr,  # pyright: ignore[reportPrivateImportUsage]
    JaxprEqn,  # pyright: ignore[reportPrivateImportUsage]
    Literal,  # pyright: ignore[reportPrivateImportUsage]
    Var,  # pyright: ignore[reportPrivateImportUsage]
)
from jax.interpreters.partial_eval import dce_jaxpr

from ctde_jax.devices import PyTree
from ctde_jax.errors import on_one_line, shortened

Arrays = Sequence[jax.Array]

Rule = Callable[..., Any]
"""`rule(*operands, **parameters)` replaces a primitive; returns its result, or all in a list."""


class LeftOut(Exception):
    """Raised if a model cannot be exported in a format; the message is the reason."""


@contextmanager
def leaving_out(tool: str) -> Iterator[None]:
    """Converts any exception of the body to `LeftOut`, with the first line of its message.

    Args:
        tool: Name of the library that the body calls, for the message.

    Raises:
        LeftOut: The body raised an exception.
    """
    try:
        yield
    except LeftOut:
        raise
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise LeftOut(
            f"{tool} cannot convert the model ({shortened(on_one_line(reason))})"
        ) from error


class Inference(NamedTuple):
    """A function from arrays to arrays, each `[examples, ...]`, for any number of examples."""

    run: Callable[..., Arrays]
    like: tuple[jax.ShapeDtypeStruct, ...]
    """Shapes and dtypes of the arguments; the length of axis 0 is symbolic."""


def make_program(function: Callable[..., Arrays], *one: jax.ShapeDtypeStruct) -> Inference:
    """Traces a function as a program, folds constants and eliminates dead code.

    If the function raises for a symbolic number of examples, the program applies it to single
    examples under `jax.vmap`.

    Args:
        function: Function from arrays `[examples, ...]` to a sequence of arrays `[examples, ...]`.
        *one: Shape and dtype of each argument, without the axis of examples.

    Returns:
        The program.
    """
    # Trace with a symbolic number of examples. Code such as `reshape(len(inputs), -1)` refuses a
    # symbol, with exceptions of several types.
    scope = export.SymbolicScope()
    like = tuple(_with_symbol(each, scope) for each in one)
    try:
        traced = jax.make_jaxpr(function)(*like)
    except Exception:

        def of_one(*arrays: jax.Array) -> Arrays:
            # `vmap` removes axis 0; the function gets an axis of length 1 instead.
            return [result[0] for result in function(*(array[None] for array in arrays))]

        traced = jax.make_jaxpr(jax.vmap(of_one))(*like)

    # Fold constants, then eliminate dead code.
    folded = jax.make_jaxpr(lambda *arrays: _evaluate(traced.jaxpr, traced.consts, arrays))(*like)
    needed, _ = dce_jaxpr(folded.jaxpr, [True] * len(folded.jaxpr.outvars), instantiate=True)
    return Inference(lambda *arrays: _evaluate(needed, folded.consts, arrays), like)


def with_rules(program: Inference, rules: Mapping[str, Rule]) -> Inference:
    """Returns a program in which rules replace primitives, also inside loops and branches.

    Args:
        program: The program to rewrite.
        rules: Rules by the name of the primitive that they replace.
    """
    traced = jax.make_jaxpr(program.run)(*program.like)

    def run(*arrays: jax.Array) -> Arrays:
        return _evaluate(traced.jaxpr, traced.consts, arrays, rules)

    return program._replace(run=run)


_CALLS = {
    "jit": "jaxpr",
    "remat2": "jaxpr",
    "closed_call": "call_jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
}
"""Primitives that only call a jaxpr, and the parameter that holds it."""

_CONTROL = {"scan": ("jaxpr",), "while": ("cond_jaxpr", "body_jaxpr"), "cond": ("branches",)}
"""Loops and branches, and the parameters that hold their jaxprs."""


def _evaluate(
    program: Jaxpr,
    constants: Sequence[PyTree],
    arrays: Sequence[PyTree],
    rules: Mapping[str, Rule] = {},
) -> list[PyTree]:
    """Evaluates a jaxpr; equations that do not depend on traced arrays are computed immediately.

    Args:
        program: The jaxpr.
        constants: Values of its constants.
        arrays: Values of its arguments, concrete or traced.
        rules: Rules by the name of the primitive that they replace.

    Returns:
        The results, concrete if they do not depend on traced arrays.
    """
    known: dict[Var, PyTree] = dict(zip(program.constvars, constants, strict=True))
    known |= zip(program.invars, arrays, strict=True)

    def read(atom: Var | Literal) -> PyTree:
        return atom.val if isinstance(atom, Literal) else known[atom]

    for equation in program.eqns:
        operands = [read(atom) for atom in equation.invars]
        name = equation.primitive.name
        if name in _CALLS:
            # Inline the call, which also drops custom gradient rules.
            inner = equation.params[_CALLS[name]]
            inner, consts = (inner, ()) if isinstance(inner, Jaxpr) else (inner.jaxpr, inner.consts)
            results = _evaluate(inner, consts, operands, rules)
        elif _is_known(equation, operands):
            # Fold the constant, even under a trace.
            with jax.ensure_compile_time_eval():
                results = equation.primitive.bind(*operands, **equation.params)
        elif name == "call_hi_primitive":
            # JAX 0.12 has some functions, such as `searchsorted`, as such primitives.
            results = _inlined(partial(equation.params["_prim"].expand, *operands), rules)
        elif name in rules:
            # No rules inside, as a rule may bind the primitive that it replaces.
            results = _inlined(partial(rules[name], *operands, **equation.params), {})
        else:
            results = equation.primitive.bind(*operands, **_with_rules_inside(equation, rules))

        # A rule may return one array instead of a list.
        known |= zip(
            equation.outvars, results if isinstance(results, Sequence) else [results], strict=True
        )
    return [read(atom) for atom in program.outvars]


def _inlined(function: Callable[[], PyTree], rules: Mapping[str, Rule]) -> list[PyTree]:
    """Returns the results of a function without arguments, with calls such as `jit` inlined."""
    traced = jax.make_jaxpr(function)()
    return _evaluate(traced.jaxpr, traced.consts, (), rules)


def _with_rules_inside(equation: JaxprEqn, rules: Mapping[str, Rule]) -> dict[str, Any]:
    """Returns the parameters of an equation, with rules applied inside loops and branches."""

    def applied(inner: ClosedJaxpr) -> ClosedJaxpr:
        avals: Any = inner.in_avals
        like = [jax.ShapeDtypeStruct(each.shape, each.dtype) for each in avals]
        return jax.make_jaxpr(lambda *arrays: _evaluate(inner.jaxpr, inner.consts, arrays, rules))(
            *like
        )

    params = dict(equation.params)
    # `branches` is a tuple of jaxprs; all other parameters hold one.
    for name in _CONTROL.get(equation.primitive.name, ()) if rules else ():
        inner = params[name]
        params[name] = tuple(map(applied, inner)) if isinstance(inner, tuple) else applied(inner)
    return params


def _is_known(equation: JaxprEqn, operands: Sequence[PyTree]) -> bool:
    """Returns whether an equation can be folded to constants.

    This requires that no operand is a tracer, and that no result has a symbolic dimension.
    """
    # `dim_as_value` has no operands and a scalar result: its symbolic dimension is a parameter.
    if equation.primitive.name == "dim_as_value":
        return False
    lengths = [
        length for result in equation.outvars for length in getattr(result.aval, "shape", ())
    ]
    is_symbolic = not all(isinstance(length, int) for length in lengths)
    return not is_symbolic and not any(isinstance(operand, Tracer) for operand in operands)


def _with_symbol(one: jax.ShapeDtypeStruct, scope: export.SymbolicScope) -> jax.ShapeDtypeStruct:
    # The symbol is the name of axis 0 in ONNX files.
    shape = export.symbolic_shape(", ".join(["examples", *map(str, one.shape)]), scope=scope)
    return jax.ShapeDtypeStruct(shape, one.dtype)
