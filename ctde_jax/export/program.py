"""What is exported: a function as a program for any number of examples, without what does not depend on its inputs.

A model in inference has leftovers of training in it: random keys that nobody draws from, rules for gradients, masks
that could be numbers already. Runtimes other than JAX do not know all of that, and need none of it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import jax
from jax import export
from jax.core import Tracer
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var  # pyright: ignore[reportPrivateImportUsage]
from jax.interpreters.partial_eval import dce_jaxpr

from ctde_jax.devices import PyTree
from ctde_jax.errors import on_one_line, shortened

Arrays = Sequence[jax.Array]

Rule = Callable[..., Any]
"""From the operands and the parameters of a primitive to its result, or to a list of its results if it has several."""


class LeftOut(Exception):
    """A form that a model does not leave in; says why."""


@contextmanager
def leaving_out(tool: str) -> Iterator[None]:
    """Turns any exception of a tool into one sentence, with the first line of its message.

    Raises:
        LeftOut: Instead of any other exception.
    """
    try:
        yield
    except LeftOut:
        raise
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise LeftOut(f"{tool} cannot write it ({shortened(on_one_line(reason))})") from error


class Program(NamedTuple):
    """A function from arrays `[examples, ...]` to arrays `[examples, ...]`, for any number of examples."""

    run: Callable[..., Arrays]
    like: tuple[jax.ShapeDtypeStruct, ...]
    """Of its arguments, whose first length is a symbol."""


def make_program(function: Callable[..., Arrays], *one: jax.ShapeDtypeStruct) -> Program:
    """Makes a program that computes what depends on its inputs, and nothing else.

    Where the function needs to know how many examples there are, as a number, the program is that of one example, for
    each of them.

    Args:
        function: Of arrays `[examples, ...]`; returns a sequence of such arrays.
        *one: Shape and type of each argument, for one example.
    """
    scope = export.SymbolicScope()
    like = tuple(_with_symbol(each, scope) for each in one)
    try:
        traced = jax.make_jaxpr(function)(*like)
    except (
        Exception
    ):  # of a symbolic length: len(inputs) and reshape(len(inputs), -1) raise several types

        def of_one(*arrays: jax.Array) -> Arrays:
            return [result[0] for result in function(*(array[None] for array in arrays))]

        traced = jax.make_jaxpr(jax.vmap(of_one))(*like)
    folded = jax.make_jaxpr(lambda *arrays: _evaluate(traced.jaxpr, traced.consts, arrays))(*like)
    needed, _ = dce_jaxpr(folded.jaxpr, [True] * len(folded.jaxpr.outvars), instantiate=True)
    return Program(lambda *arrays: _evaluate(needed, folded.consts, arrays), like)


def with_rules(program: Program, rules: Mapping[str, Rule]) -> Program:
    """Returns a program in which every equation of a primitive in `rules` is replaced, in loops and branches as well.

    Args:
        program: Any program.
        rules: By the primitive's name, the function that computes its results from its operands and its parameters.
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
"""Primitives that only call a program, and the parameter that holds it."""

_CONTROL = {"scan": ("jaxpr",), "while": ("cond_jaxpr", "body_jaxpr"), "cond": ("branches",)}
"""Loops and branches, and the parameters that hold their programs."""


def _evaluate(
    program: Jaxpr,
    constants: Sequence[PyTree],
    arrays: Sequence[PyTree],
    rules: Mapping[str, Rule] = {},
) -> list[PyTree]:
    """Evaluates a program; what does not depend on traced arrays is computed at once."""
    known: dict[Var, PyTree] = dict(zip(program.constvars, constants, strict=True))
    known |= zip(program.invars, arrays, strict=True)

    def read(atom: Var | Literal) -> PyTree:
        return atom.val if isinstance(atom, Literal) else known[atom]

    for equation in program.eqns:
        operands, name = [read(atom) for atom in equation.invars], equation.primitive.name
        if name in _CALLS:
            inner = equation.params[_CALLS[name]]
            inner, consts = (inner, ()) if isinstance(inner, Jaxpr) else (inner.jaxpr, inner.consts)
            results = _evaluate(inner, consts, operands, rules)
        elif _is_known(equation, operands):
            with jax.ensure_compile_time_eval():
                results = equation.primitive.bind(*operands, **equation.params)
        elif (
            name == "call_hi_primitive"
        ):  # JAX 0.12 has some functions, such as `searchsorted`, as such primitives
            results = _inlined(partial(equation.params["_prim"].expand, *operands), rules)
        elif name in rules:
            results = _inlined(partial(rules[name], *operands, **equation.params), {})
        else:
            results = equation.primitive.bind(*operands, **_with_rules_inside(equation, rules))
        known |= zip(
            equation.outvars, results if isinstance(results, Sequence) else [results], strict=True
        )
    return [read(atom) for atom in program.outvars]


def _inlined(function: Callable[[], PyTree], rules: Mapping[str, Rule]) -> list[PyTree]:
    """Calls a function, whose calls of others, as `jax.jit` makes them, become part of the program."""
    traced = jax.make_jaxpr(function)()
    return _evaluate(traced.jaxpr, traced.consts, (), rules)


def _with_rules_inside(equation: JaxprEqn, rules: Mapping[str, Rule]) -> dict[str, Any]:
    """Returns the parameters of an equation; rules are applied to the programs of loops and branches."""

    def applied(inner: ClosedJaxpr) -> ClosedJaxpr:
        avals: Any = inner.in_avals
        like = [jax.ShapeDtypeStruct(each.shape, each.dtype) for each in avals]
        return jax.make_jaxpr(lambda *arrays: _evaluate(inner.jaxpr, inner.consts, arrays, rules))(
            *like
        )

    params = dict(equation.params)
    for name in _CONTROL.get(equation.primitive.name, ()) if rules else ():
        inner = params[name]
        params[name] = tuple(map(applied, inner)) if isinstance(inner, tuple) else applied(inner)
    return params


def _is_known(equation: JaxprEqn, operands: Sequence[PyTree]) -> bool:
    """Returns whether results depend neither on traced arrays nor on a symbol, in a shape or as a number."""
    if equation.primitive.name == "dim_as_value":
        return False
    lengths = [
        length for result in equation.outvars for length in getattr(result.aval, "shape", ())
    ]
    is_symbolic = not all(isinstance(length, int) for length in lengths)
    return not is_symbolic and not any(isinstance(operand, Tracer) for operand in operands)


def _with_symbol(one: jax.ShapeDtypeStruct, scope: export.SymbolicScope) -> jax.ShapeDtypeStruct:
    shape = export.symbolic_shape(", ".join(["examples", *map(str, one.shape)]), scope=scope)
    return jax.ShapeDtypeStruct(shape, one.dtype)
