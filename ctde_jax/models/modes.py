"""Which arguments of a module's `__call__` tell it whether it trains, by their names or by what they change."""

import re
from collections.abc import Callable, Mapping
from inspect import Parameter, signature
from typing import Any, NamedTuple

import jax
from jax import numpy as jnp
from jax.interpreters.partial_eval import dce_jaxpr

from ctde_jax.devices import PyTree
from ctde_jax.errors import InputError

_TRUE_IN_TRAINING = (
    "train",
    "training",
    "is_training",
    "is_train",
    "train_mode",
    "enable_dropout",
    "update_stats",
)
_TRUE_IN_INFERENCE = (
    "deterministic",
    "use_running_average",
    "eval",
    "evaluate",
    "is_eval",
    "eval_mode",
    "evaluation",
    "inference",
    "is_inference",
    "infer",
    "test",
    "testing",
    "is_test",
)
MODES = {**dict.fromkeys(_TRUE_IN_TRAINING, True), **dict.fromkeys(_TRUE_IN_INFERENCE, False)}
"""Names that are known, and their value in training."""

_WORDS = (
    "train",
    "training",
    "eval",
    "evaluation",
    "test",
    "testing",
    "infer",
    "inference",
    "predict",
    "valid",
)

RANDOM = ("rngs", "rng", "key", "rng_key", "prng_key")
"""Names of an argument that takes random streams or a key."""


class Modes(NamedTuple):
    """Keyword arguments of a module's `__call__`."""

    train: Mapping[str, Any]
    infer: Mapping[str, Any]


class Effect(NamedTuple):
    """What a call in training does."""

    draws: bool
    """Whether its outputs or its state depend on its key."""

    writes: int
    """How many arrays of its state it changes."""

    outputs: PyTree
    """Shapes and types."""

    program: str


def effect_of(
    call: Callable[..., tuple[PyTree, PyTree]], state: PyTree, inputs: PyTree, *rest: PyTree
) -> Effect | None:
    """Traces `call(key, state, inputs, *rest) -> (outputs, state)`; returns None if it raises.

    Raises:
        InputError: As the call does.
    """
    key = jax.eval_shape(jax.random.key, 0)
    try:
        traced, shapes = jax.make_jaxpr(call, return_shape=True)(key, state, inputs, *rest)
    except InputError:
        raise
    except Exception:
        return None
    outputs, after = shapes
    count, old = len(jax.tree.leaves(after)), len(jax.tree.leaves(state))
    _, used = dce_jaxpr(traced.jaxpr, [True] * len(traced.jaxpr.outvars), instantiate=False)
    before, end = traced.jaxpr.invars[1 : 1 + old], len(traced.jaxpr.outvars)
    written = [after for after in traced.jaxpr.outvars[end - count :] if after not in before]
    return Effect(used[0], len(written), outputs, without_addresses(str(traced)))


def without_addresses(program: str) -> str:
    """Removes the addresses of functions from a printed program, so that equal programs are equal texts."""
    return re.sub("0x[0-9a-f]+", "", program)


def find_modes(
    call: Callable[..., Any],
    name: str,
    effect: Callable[[Mapping[str, Any]], Effect | None],
    given: Modes,
    fixed: tuple[str, ...] = (),
) -> Modes:
    """Finds the arguments that a call needs beside its inputs.

    A name in `MODES` decides by itself. Any other boolean argument is a mode if it decides whether the call draws
    random numbers or writes to its state: its value in training is the one with which the call does. A boolean that
    changes the outputs alone, in values and not in shape, may be a mode or not, so it must be given.

    Args:
        call: The module's `__call__`.
        name: The module's class, for errors.
        effect: Traces a call in training with these keyword arguments.
        given: Arguments that the user has given.
        fixed: Names that the module itself has a value for.

    Raises:
        InputError: The meaning of an argument cannot be known.
    """
    parameters = list(signature(call).parameters.values())
    if not parameters or parameters[0].kind in (Parameter.KEYWORD_ONLY, Parameter.VAR_KEYWORD):
        raise InputError(
            "model", f"must take the inputs as the first argument, and {name}.__call__ takes none."
        )
    others = parameters[1:]
    takes_any = any(other.kind == Parameter.VAR_KEYWORD for other in others)
    others = [
        other
        for other in others
        if other.kind not in (Parameter.VAR_KEYWORD, Parameter.VAR_POSITIONAL)
    ]
    for key in {**given.train, **given.infer}:
        if key not in {other.name for other in others} and not takes_any:
            raise InputError(
                "model",
                f"must take the arguments given, and {name}.__call__ has no argument {key}.",
            )
    others = [
        other for other in others if other.name not in {*given.train, *given.infer, *RANDOM, *fixed}
    ]

    known = {
        other.name: MODES[other.name]
        for other in others
        if other.name in MODES and _may_be_boolean(other)
    }
    unknown = [other for other in others if other.name not in known]
    for other in unknown:
        if isinstance(other.default, str) and (
            other.default in _WORDS or other.name in ("mode", "phase")
        ):
            raise InputError("model", _sentence(name, other.name))
    base = {
        **known,
        **given.train,
        **{other.name: False for other in unknown if other.default is Parameter.empty},
    }
    flags = [other for other in unknown if _is_boolean(other) or other.default is Parameter.empty]
    if takes_any:
        flags += [
            Parameter(key, Parameter.KEYWORD_ONLY, default=None) for key in MODES if key not in base
        ]
    for flag in flags:
        value = _value_in_training(flag, name, base, effect)
        if value is not None:
            known[flag.name] = value
    return Modes(
        {**known, **given.train},
        {**{key: not value for key, value in known.items()}, **given.infer},
    )


def _value_in_training(
    flag: Parameter,
    name: str,
    base: Mapping[str, Any],
    effect: Callable[[Mapping[str, Any]], Effect | None],
) -> bool | None:
    """Returns the value in training of an argument that turns out to be a mode, else None."""
    try:
        on, off = (effect({**base, flag.name: value}) for value in (True, False))
    except InputError:
        if flag.default is Parameter.empty:
            raise
        return None  # a value that the call refuses is not needed, as there is a default
    if on is None or off is None:
        if flag.default is Parameter.empty:
            raise InputError("model", _sentence(name, flag.name))
        return None
    if (on.draws, on.writes) != (off.draws, off.writes):
        if on.draws >= off.draws and on.writes >= off.writes:
            return True
        if on.draws <= off.draws and on.writes <= off.writes:
            return False
        raise InputError("model", _sentence(name, flag.name))
    changes_values = on.program != off.program and _same_shapes(on.outputs, off.outputs)
    if flag.default is Parameter.empty or (isinstance(flag.default, bool) and changes_values):
        raise InputError("model", _sentence(name, flag.name))
    return None


def _sentence(name: str, argument: str) -> str:
    return (
        "must be called with its inputs alone, or with a mode of a known name such as train or deterministic, and "
        f"{name}.__call__ also takes {argument}: pass from_linen or from_nnx(module, train={{'{argument}': ...}}, "
        f"infer={{'{argument}': ...}}), or several arrays as one."
    )


def _may_be_boolean(parameter: Parameter) -> bool:
    is_flag = (
        parameter.default is None
        or parameter.default is Parameter.empty
        or isinstance(parameter.default, bool)
    )
    return is_flag and (
        parameter.annotation in (Parameter.empty, Any) or "bool" in str(parameter.annotation)
    )


def _is_boolean(parameter: Parameter) -> bool:
    return isinstance(parameter.default, bool) or "bool" in str(parameter.annotation)


def _same_shapes(one: PyTree, other: PyTree) -> bool:
    def shapes(tree: PyTree) -> list[tuple[tuple[int, ...], Any]]:
        return [(jnp.shape(leaf), leaf.dtype) for leaf in jax.tree.leaves(tree)]

    return jax.tree.structure(one) == jax.tree.structure(other) and shapes(one) == shapes(other)
