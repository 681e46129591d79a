"""Finds the mode arguments of a module's `__call__`, by their names or by their effects.

A *mode* is training or inference. A *mode argument* is a Boolean that sets it, such as `train` or
`deterministic`; a *mode field* is such a Boolean attribute of the module.
"""

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
"""Known names of mode arguments, and their values in training."""

# Default values by which a string argument, such as mode="train", is recognized as a mode.
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
"""Names of arguments that take RNG streams or a key."""


class Modes(NamedTuple):
    """Keyword arguments of a module's `__call__` in training and in inference."""

    train: Mapping[str, Any]
    infer: Mapping[str, Any]


class Effect(NamedTuple):
    """The observable effects of a call, found by tracing it."""

    draws: bool
    """Whether the outputs or the state depend on the key."""

    writes: int
    """Number of arrays of the state that the call writes."""

    outputs: PyTree
    """Shapes and dtypes of the outputs."""

    program: str
    """The printed jaxpr, without addresses."""


def effect_of(
    call: Callable[..., tuple[PyTree, PyTree]], state: PyTree, inputs: PyTree, *rest: PyTree
) -> Effect | None:
    """Traces `call(key, state, inputs, *rest) -> (outputs, state)`; returns None if it raises.

    Raises:
        InputError: If the call raises it.
    """
    key = jax.eval_shape(jax.random.key, 0)
    try:
        traced, shapes = jax.make_jaxpr(call, return_shape=True)(key, state, inputs, *rest)
    except InputError:
        raise
    except Exception:
        return None
    outputs, after = shapes
    count = len(jax.tree.leaves(after))
    old = len(jax.tree.leaves(state))

    # Dead-code elimination shows which inputs affect a result; the first is the key. The last
    # `count` results are the state, of which an unchanged array is an input variable itself.
    _, used = dce_jaxpr(traced.jaxpr, [True] * len(traced.jaxpr.outvars), instantiate=False)
    before = traced.jaxpr.invars[1 : 1 + old]
    end = len(traced.jaxpr.outvars)
    written = [after for after in traced.jaxpr.outvars[end - count :] if after not in before]
    return Effect(used[0], len(written), outputs, without_addresses(str(traced)))


def without_addresses(program: str) -> str:
    """Removes function addresses from a printed program, so that equal programs print equally."""
    return re.sub("0x[0-9a-f]+", "", program)


def find_modes(
    call: Callable[..., Any],
    name: str,
    effect: Callable[[Mapping[str, Any]], Effect | None],
    given: Modes,
    fixed: tuple[str, ...] = (),
) -> Modes:
    """Finds the arguments to pass to a module in addition to its inputs, in both modes.

    An argument with a name in `MODES` is a mode argument. Any other Boolean argument is one if it
    determines whether the call draws random numbers or writes to its state; its value in training
    is the one with which the call does so. If a Boolean changes only the values of the outputs, not
    their shapes, it is ambiguous, and the user must pass it.

    Args:
        call: The module's `__call__`.
        name: Name of the module's class, for errors.
        effect: Function that traces a call in training with the given keyword arguments.
        given: Arguments that the user passed, which take precedence.
        fixed: Names of arguments that are not passed, because the module has mode fields of these
            names.

    Raises:
        InputError: If the meaning of an argument cannot be inferred.
    """
    # Check the signature: the inputs come first, and the arguments that the user passed exist.
    parameters = list(signature(call).parameters.values())
    if not parameters or parameters[0].kind in (Parameter.KEYWORD_ONLY, Parameter.VAR_KEYWORD):
        raise InputError(
            "model",
            f"must take the inputs as the first argument, but {name}.__call__ takes no positional "
            "argument.",
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
                f"must accept the arguments of train and infer, but {name}.__call__ has no "
                f"argument {key}.",
            )

    # Arguments with a name in `MODES` are mode arguments. A string, as mode="train", is rejected.
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

    # Compare the effects of True and False for every other Boolean or required argument, with False
    # for the remaining required ones. A `**kwargs` may forward any name in `MODES`.
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

    # In inference a mode has the opposite value. Arguments from the user take precedence.
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
    """Returns the value of an argument in training if it is a mode argument, else None.

    Args:
        flag: The argument.
        name: Name of the module's class, for errors.
        base: Values of all other arguments in training.
        effect: As for `find_modes`.

    Raises:
        InputError: If the argument is required or changes the outputs, but its meaning is unknown.
    """
    # Trace with both values.
    try:
        on, off = (effect({**base, flag.name: value}) for value in (True, False))
    except InputError:
        if flag.default is Parameter.empty:
            raise
        return None  # a value that the call rejects is not needed, as there is a default

    # An argument without a default must have a known meaning.
    if on is None or off is None:
        if flag.default is Parameter.empty:
            raise InputError("model", _sentence(name, flag.name))
        return None

    # In training, a call draws and writes at least as much. If one value draws and the other one
    # writes, neither is that of training.
    if (on.draws, on.writes) != (off.draws, off.writes):
        if on.draws >= off.draws and on.writes >= off.writes:
            return True
        if on.draws <= off.draws and on.writes <= off.writes:
            return False
        raise InputError("model", _sentence(name, flag.name))

    # Equal effects but different outputs: an ambiguous Boolean.
    changes_values = on.program != off.program and _same_shapes(on.outputs, off.outputs)
    if flag.default is Parameter.empty or (isinstance(flag.default, bool) and changes_values):
        raise InputError("model", _sentence(name, flag.name))
    return None


def _sentence(name: str, argument: str) -> str:
    return (
        "must take only its inputs and a mode argument with a known name, such as train or "
        f"deterministic, but {name}.__call__ also takes {argument}; pass from_linen or "
        f"from_nnx(module, train={{'{argument}': ...}}, infer={{'{argument}': ...}}), or combine "
        "several input arrays into one."
    )


def _may_be_boolean(parameter: Parameter) -> bool:
    # An argument with a known name may take something else, as `test: jax.Array` does.
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
