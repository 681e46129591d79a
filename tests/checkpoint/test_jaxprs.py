"""A program's digest depends on its computation, not on its source or location."""

from functools import partial

import jax
import numpy as np
import pytest
from jax import lax
from jax import numpy as jnp

from ctde_jax.checkpoint.jaxprs import digest_of, digest_of_shapes
from ctde_jax.devices.replica import AXIS

X = jax.ShapeDtypeStruct((4,), jnp.float32)
TABLE = np.arange(4, dtype=np.float32)
ONE_BIT = np.nextafter(TABLE, np.float32(9), where=[False, False, False, True], out=TABLE.copy())
digest = partial(digest_of, replicas=2)


@jax.custom_vjp
def steep(x):
    return 2 * x


steep.defvjp(lambda x: (2 * x, None), lambda _, g: (3 * g,))


@jax.custom_vjp
def steeper(x):
    return 2 * x


steeper.defvjp(lambda x: (2 * x, None), lambda _, g: (4 * g,))


def scanned(factor: float):
    return lambda x: lax.scan(lambda carry, each: (carry * factor + each, carry), 0.0, x)


def chosen(factor: float):
    return lambda x: lax.cond(x.sum() > 0, lambda x: x, lambda x: factor * x, x)


def repeated(last: int):
    return lambda x: lax.fori_loop(0, last, lambda _, x: jnp.sin(x), x)


def printing(x):
    jax.debug.print("{x}", x=x)
    return 0.1 * x


SAME = {
    "another name": (lambda x: 0.1 * x, lambda inputs: 0.1 * inputs),
    "jit": (lambda x: jnp.sin(0.1 * x), jax.jit(lambda x: jax.jit(jnp.sin)(0.1 * x))),
    "unused results": (lambda x: 0.1 * x, lambda x: (x @ x, 0.1 * x)[1]),
    "independent order": (
        lambda x: (jnp.sin(x), jnp.cos(x)),
        lambda x: (jnp.cos(x), jnp.sin(x))[::-1],
    ),
    "a copy of a constant": (lambda x: x + TABLE, lambda x: x + TABLE.copy()),
    "a constant on the device": (lambda x: x + TABLE, lambda x: x + jnp.asarray(TABLE)),
    "a print": (lambda x: 0.1 * x, printing),
}
OTHER = {
    "a literal": (lambda x: 0.1 * x, lambda x: 0.11 * x),
    "one bit of a constant": (lambda x: x + TABLE, lambda x: x + ONE_BIT),
    "an operation": (jnp.sin, jnp.cos),
    "the order of operands": (lambda x: x - TABLE, lambda x: TABLE - x),
    "the order of results": (lambda x: (x, 2 * x), lambda x: (2 * x, x)),
    "a constant in a scan": (scanned(0.5), scanned(0.6)),
    "a constant in a branch": (chosen(0.5), chosen(0.6)),
    "the length of a loop": (repeated(3), repeated(4)),
    "a dtype": (lambda x: x.astype(jnp.bfloat16), lambda x: x.astype(jnp.float16)),
    "a custom gradient": (
        jax.grad(lambda x: steep(x).sum()),
        jax.grad(lambda x: steeper(x).sum()),
    ),
    "a collective": (lambda x: lax.pmean(x, AXIS), lambda x: lax.pmax(x, AXIS)),
    "an axis": (lambda x: jnp.ones((4, 4)).sum(0) + x, lambda x: jnp.ones((4, 4)).sum(1) + x),
}


@pytest.mark.parametrize("name", SAME)
def test_same_program_has_the_same_digest(name):
    one, other = SAME[name]
    assert digest(one, X) == digest(other, X)


@pytest.mark.parametrize("name", OTHER)
def test_different_program_has_a_different_digest(name):
    one, other = OTHER[name]
    assert digest(one, X) == digest(one, X)
    assert digest(one, X) != digest(other, X)


def test_shapes_are_digested_with_structure_and_dtype():
    tree = {"a": np.zeros((2, 3), np.float32), "b": np.zeros(1, np.int32)}
    assert digest_of_shapes(tree) == digest_of_shapes(dict(reversed(tree.items())))
    for other in (
        {**tree, "b": np.zeros(1, np.uint32)},
        {**tree, "b": np.zeros(2, np.int32)},
        {"a": tree["a"], "c": tree["b"]},
    ):
        assert digest_of_shapes(tree) != digest_of_shapes(other)
