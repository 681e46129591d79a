"""What is exported: a function as a program for any number of examples, without what does not depend on its inputs.

A model in inference has leftovers of training in it: random keys that nobody draws from, rules for gradients, masks
that could be numbers already. Runtimes other than JAX do not know all of that, and need none of it.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import jax
from jax import export
from jax.core import Tracer
from jax.extend.core import Jaxpr, JaxprEqn, Literal, Var
from jax.interpreters.partial_eval import dce_jaxpr

from ctde_jax.errors import on_one_line, shortened
from ctde_jax.replica import PyTree

Arrays = Sequence[jax.Array]


class LeftOut(Exception):
    """A form that a model does not leave in; says why."""


@contextmanager
def leaving_out(tool: str) -> Iterator[None]:
    """Says in a sentence that a tool cannot write a form, in whatever way it stumbles.

    Raises:
        LeftOut: Instead of any other exception.
    """
    try:
        yield
    except LeftOut:
        raise
    except Exception as error:
        raise LeftOut(f"{tool} cannot write it ({shortened(on_one_line(str(error)))})") from error


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
    except (TypeError, ValueError):  # such as len(inputs), or reshape(len(inputs), -1)

        def of_one(*arrays: jax.Array) -> Arrays:
            return [result[0] for result in function(*(array[None] for array in arrays))]

        traced = jax.make_jaxpr(jax.vmap(of_one))(*like)
    folded = jax.make_jaxpr(lambda *arrays: _evaluate(traced.jaxpr, traced.consts, arrays))(*like)
    needed, _ = dce_jaxpr(folded.jaxpr, [True] * len(folded.jaxpr.outvars), instantiate=True)
    return Program(lambda *arrays: _evaluate(needed, folded.consts, arrays), like)


_CALLS = {"jit": "jaxpr", "closed_call": "call_jaxpr", "custom_jvp_call": "call_jaxpr", "custom_vjp_call": "call_jaxpr"}
"""What does nothing but call a program of its own, and by which name it has that."""


def _evaluate(program: Jaxpr, constants: Sequence[PyTree], arrays: Sequence[PyTree]) -> list[PyTree]:
    """Goes through a program; what does not depend on traced arrays is computed at once."""
    known: dict[Var, PyTree] = dict(zip(program.constvars, constants, strict=True))
    known |= zip(program.invars, arrays, strict=True)

    def read(atom: Var | Literal) -> PyTree:
        return atom.val if isinstance(atom, Literal) else known[atom]

    for equation in program.eqns:
        operands, name = [read(atom) for atom in equation.invars], equation.primitive.name
        if name in _CALLS:
            inner = equation.params[_CALLS[name]]
            results = _evaluate(inner.jaxpr, inner.consts, operands)
        elif _is_known(equation, operands):
            with jax.ensure_compile_time_eval():
                results = equation.primitive.bind(*operands, **equation.params)
        else:
            results = equation.primitive.bind(*operands, **equation.params)
        known |= zip(equation.outvars, results if equation.primitive.multiple_results else [results], strict=True)
    return [read(atom) for atom in program.outvars]


def _is_known(equation: JaxprEqn, operands: Sequence[PyTree]) -> bool:
    """Says whether results depend neither on traced arrays nor on a symbol in a shape."""
    lengths = [length for result in equation.outvars for length in getattr(result.aval, "shape", ())]
    is_symbolic = not all(isinstance(length, int) for length in lengths)
    return not is_symbolic and not any(isinstance(operand, Tracer) for operand in operands)


def _with_symbol(one: jax.ShapeDtypeStruct, scope: export.SymbolicScope) -> jax.ShapeDtypeStruct:
    shape = export.symbolic_shape(", ".join(["examples", *map(str, one.shape)]), scope=scope)
    return jax.ShapeDtypeStruct(shape, one.dtype)
