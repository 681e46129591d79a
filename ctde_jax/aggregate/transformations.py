"""Any optax transformation as an optimizer: its extra arguments, the point it is evaluated at, what is refused."""

import logging
import re
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import optax
from jax import numpy as jnp
from jax.extend.core import ClosedJaxpr, Var  # pyright: ignore[reportPrivateImportUsage]
from optax import contrib

from ctde_jax.devices import PyTree
from ctde_jax.errors import InputError, shortened

Value = Callable[[], jax.Array]
"""`value() -> float32[]`, the mean objective; called only if an update depends on it, as it may use a collective."""


class LookaheadSlow(NamedTuple):
    """The state of an optimizer that contains `optax.lookahead`, whose slow parameters are kept here."""

    state: PyTree
    slow: PyTree  # like the parameters


_WITH_OWN_POINT = (
    contrib.ScheduleFreeState,
    optax.LookaheadState,
    contrib.SAMState,
    contrib.COCOBState,
    contrib.MadgradState,
)
"""States that hold positions in parameter space, from which the next parameters are computed."""

_NOT_PER_STEP = {
    "value_fn": "the objective as a function of the parameters, to evaluate it several times in a step; use a learning "
    "rate or schedule instead, such as optax.lbfgs(0.1, linesearch=None)",
    "grad_fn": "the gradient as a function of the parameters; use optax.contrib.sam(..., opaque_mode=False), whose "
    "adversarial steps are steps of the run",
    "obj_fn": "the objective as a function of the parameters, to differentiate it twice; use optax.adamw or optax.lion",
}
"""Arguments of `update` that a step cannot pass, and what to use instead."""


def as_transformation(optimizer: Any) -> optax.GradientTransformationExtraArgs:
    """Returns a transformation that hands all arguments to `optimizer.update`, also of `optax.MultiSteps`.

    Unlike `optax.with_extra_args_support` it drops none: `MultiSteps(...).gradient_transformation()` takes extra
    arguments although its type does not show it.
    """
    return optax.GradientTransformationExtraArgs(optimizer.init, optimizer.update)


def adapted(optimizer: Any) -> optax.GradientTransformationExtraArgs:
    """Makes a transformation that a training step can call, whichever extra arguments the given one takes.

    Its `update(updates, state, params, *, value=None, **extra_args)` passes on `value` (a `Value`), the same as `loss`,
    the incoming updates as `grad`, and `extra_args`; arguments that a signature rejects are left out. If the result
    does not depend on the value, `value` is not called, and the program is that of an update without it.

    `optax.lookahead` is given its pair of fast and slow parameters, of which the slow ones are kept in the state.

    Args:
        optimizer: Any optax transformation, or an object with `init` and `update`.
    """
    inner = as_transformation(optimizer)

    def init(params: PyTree) -> PyTree:
        with _without_absl_warnings():  # lookahead warns if it is not given its pair
            like = jax.eval_shape(inner.init, params)
        if _found(like, contrib.DifferentiallyPrivateAggregateState):
            raise InputError(
                "optimizer",
                "must not contain differentially_private_aggregate (dpsgd), which needs the gradient of every example, "
                "and a step has only their mean; aggregate.private in the strategy protects each device's message.",
            )
        if _found(like, optax.LookaheadState):
            pair = optax.LookaheadParams.init_synced(params)
            return LookaheadSlow(_with_lasting_types(inner, inner.init(pair), params, pair), params)
        return _with_lasting_types(inner, inner.init(params), params, params)

    def update(
        updates: PyTree,
        state: PyTree,
        params: PyTree = None,
        *,
        value: Value | None = None,
        **extra_args: Any,
    ):
        if not isinstance(state, LookaheadSlow):
            return _update(inner, updates, state, params, value, extra_args)
        pair = optax.LookaheadParams(fast=params, slow=state.slow)
        moved, own = _update(inner, updates, state.state, pair, value, extra_args)
        return moved.fast, LookaheadSlow(own, optax.apply_updates(state.slow, moved.slow))

    return optax.GradientTransformationExtraArgs(init, update)


def evaluated_point(opt_state: PyTree, params: PyTree) -> PyTree:
    """Returns the parameters at which an optimizer that trains at another point is evaluated.

    That is the average of `optax.contrib.schedule_free`, the slow parameters of `optax.lookahead`, and the parameters
    before the adversarial steps of `optax.contrib.sam`, wherever these are in the state. Any other optimizer is
    evaluated at `params`.
    """
    for state in _found(opt_state, LookaheadSlow):
        params = state.slow
    for state in _found(opt_state, contrib.SAMState):
        if state.cache is not None:
            is_synced = state.steps_since_sync == 0
            params = _map_unmasked(
                lambda old, x, own=is_synced: jnp.where(own, x, old), state.cache, params
            )
    for state in _found(opt_state, contrib.ScheduleFreeState):
        params = _map_unmasked(
            lambda z, y, b1=state.b1: ((y - (1.0 - b1) * z) / b1).astype(y.dtype), state.z, params
        )
    return params


def has_evaluated_point(opt_state: PyTree) -> bool:
    """Returns whether `evaluated_point` may differ from the parameters; only the structure of the state is read."""
    return bool(_found(opt_state, (LookaheadSlow, contrib.SAMState, contrib.ScheduleFreeState)))


def own_point(opt_state: PyTree) -> str | None:
    """Returns the name of an optimizer that computes parameters from positions in its state, or None."""
    found = _found(opt_state, _WITH_OWN_POINT)
    if not found:
        return None
    names = ("schedule_free", "lookahead", "sam", "cocob", "madgrad")
    return names[_WITH_OWN_POINT.index(type(found[0]))]


def learning_rate(opt_state: PyTree) -> jax.Array | None:
    """Returns the learning rate of the last update, float32[], if `optax.inject_hyperparams` keeps it in the state.

    If the state holds several, as that of `optax.multi_transform` may, none of them is that of all parameters: None.
    """
    states = _found(opt_state, (optax.InjectHyperparamsState, optax.InjectStatefulHyperparamsState))
    rates = [
        state.hyperparams["learning_rate"]
        for state in states
        if "learning_rate" in state.hyperparams
    ]
    return rates[0] if len(rates) == 1 and jnp.ndim(rates[0]) == 0 else None


def with_hyperparams_of(fresh: PyTree, opt_state: PyTree) -> PyTree:
    """Returns a state with the constant hyperparameters that `optax.inject_hyperparams` keeps in another one.

    A run that branches off another has the numbers that its own optimizer was made with; schedules are part of the
    program, and continue by their step.
    """
    kinds = (optax.InjectHyperparamsState, optax.InjectStatefulHyperparamsState)

    def merge(new: PyTree, old: PyTree) -> PyTree:
        if not isinstance(new, kinds):
            return old
        scheduled = getattr(new, "hyperparams_states", {})
        constant = {name: value for name, value in new.hyperparams.items() if name not in scheduled}
        return old._replace(hyperparams={**old.hyperparams, **constant})

    return jax.tree.map(merge, fresh, opt_state, is_leaf=lambda leaf: isinstance(leaf, kinds))


def traced(optimizer: Any, params: PyTree, option: str) -> PyTree:
    """Traces the first update of an optimizer, and returns its state; runs under `jax.eval_shape`.

    Args:
        optimizer: As for `adapted`.
        params: Of the model.
        option: The argument that holds the optimizer, for errors.

    Raises:
        InputError: `init` or `update` fails, needs what a step does not have, or returns another tree of updates.
    """
    transformation = adapted(optimizer)
    try:
        state = transformation.init(params)
        updates, _ = transformation.update(
            params, state, params, value=lambda: jnp.float32(0), anchor=params
        )
    except InputError as error:
        raise InputError(option, error.sentence) from error  # raised where the option is not known
    except Exception as error:
        raise InputError(option, _refusal(error, params)) from error
    if _types(updates, shapes_only=True) != _types(params, shapes_only=True):
        rule = "must return updates with the tree and shapes of the parameters"
        raise InputError(option, f"{rule} ({_shapes(params)}), got {_shapes(updates)}.")
    return state


def depends_on(program: ClosedJaxpr, inputs: list[Var]) -> bool:
    """Returns whether any result of a traced program depends on these of its inputs."""
    reached = set(inputs)
    for equation in program.jaxpr.eqns:
        if not reached.isdisjoint(x for x in equation.invars if isinstance(x, Var)):
            reached.update(equation.outvars)
    return not reached.isdisjoint(x for x in program.jaxpr.outvars if isinstance(x, Var))


def _update(
    inner: optax.GradientTransformationExtraArgs,
    updates: PyTree,
    state: PyTree,
    params: PyTree,
    value: Value | None,
    extra_args: dict[str, Any],
) -> tuple[PyTree, PyTree]:
    """Calls an update with those of the extra arguments that its signature accepts."""
    names = ["value", "loss", "grad", *extra_args]

    def call(value, updates, state, params, extra_args):
        offered = {"value": value, "loss": value, "grad": updates, **extra_args}
        return inner.update(updates, state, params, **{name: offered[name] for name in names})

    zero = jnp.float32(0)
    while True:
        try:
            program = jax.make_jaxpr(call)(zero, updates, state, params, extra_args)
            break
        except TypeError as error:
            rejected = re.search(r"unexpected keyword argument '(\w+)'", str(error))
            if rejected is None or rejected[1] not in names:
                raise
            names.remove(rejected[1])
    is_used = depends_on(program, program.jaxpr.invars[:1]) or bool(program.effects)
    return call(
        value() if is_used and value is not None else zero, updates, state, params, extra_args
    )


def _with_lasting_types(
    inner: optax.GradientTransformationExtraArgs, state: PyTree, params: PyTree, given: PyTree
) -> PyTree:
    """Gives a first state the types that it has after an update, if these can hold its numbers.

    Args:
        inner: Whose state it is.
        state: From `inner.init`.
        params: Of the model, in whose types gradients come.
        given: What the update gets as parameters.

    Raises:
        InputError: An update changes the tree of the state, a shape, or a type to a narrower one.
    """

    def after(state: PyTree) -> PyTree:
        return jax.eval_shape(
            lambda grads, state, given: _update(
                inner, grads, state, given, None, {"anchor": given}
            )[1],
            *(params, state, given),
        )

    for _ in range(3):
        then = after(state)
        before, now = _types(state), _types(then)
        if before == now:
            return state
        if before.keys() != now.keys() or jax.tree.structure(state) != jax.tree.structure(then):
            raise InputError("optimizer", "must keep the structure of its state in an update.")
        for name, (shape, dtype) in before.items():
            new_shape, new_dtype = now[name]
            if (shape, dtype) == (new_shape, new_dtype):
                continue
            if shape != new_shape or jnp.promote_types(dtype, new_dtype) != new_dtype:
                raise InputError(
                    "optimizer",
                    f"must keep shapes and types of its state in an update, but {name} goes from "
                    f"{dtype}{list(shape)} to {new_dtype}{list(new_shape)}.",
                )
        state = jax.tree.map(
            lambda x, like: jnp.asarray(x, like.dtype) if _type(x) != _type(like) else x,
            state,
            then,
        )
    raise InputError(
        "optimizer",
        "must keep the types of its state in an update, but they change at every update.",
    )


def _type(leaf: Any) -> tuple[tuple[int, ...], Any]:
    return jnp.shape(leaf), jnp.result_type(leaf)


def _types(tree: PyTree, shapes_only: bool = False) -> dict[str, Any]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    of = jnp.shape if shapes_only else _type
    return {
        jax.tree_util.keystr(path, simple=True, separator="/") or "it": of(leaf)
        for path, leaf in leaves
    }


def _found(tree: PyTree, kinds: Any) -> list[Any]:
    """Returns the outermost nodes of these kinds."""
    leaves = jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, kinds))
    return [leaf for leaf in leaves if isinstance(leaf, kinds)]


def _map_unmasked(function: Callable[..., jax.Array], own: PyTree, params: PyTree) -> PyTree:
    """Maps over parameters, except those that `optax.masked` hides from the transformation that has `own`."""

    def is_masked(node: Any) -> bool:
        return isinstance(node, optax.MaskedNode)

    return jax.tree.map(
        lambda x, p: p if is_masked(x) else function(x, p), own, params, is_leaf=is_masked
    )


@contextmanager
def _without_absl_warnings() -> Iterator[None]:
    logger = logging.getLogger("absl")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def _refusal(error: Exception, params: PyTree) -> str:
    """Returns the sentence on an optimizer that has raised this error while it was traced."""
    text = str(error)
    name = _transformation(error)
    for argument, reason in _NOT_PER_STEP.items():
        if argument in text:
            return f"must work with what a step has, but {name} needs `{argument}`, {reason}."
    missing = re.search(r"missing \d+ required keyword-only arguments?: (.*)", text)
    if missing:
        return (
            f"must work with what a step passes (value, loss, grad), but {name} needs {missing[1]}."
        )
    first_line = shortened(text.strip().partition("\n")[0]).rstrip(".")
    hint = (
        " Labels and masks must match this tree, or be functions of it."
        if "tree" in first_line
        else ""
    )
    return (
        f"must work with the parameters of this model ({_shapes(params)}), but {name} raised {type(error).__name__}: "
        f"{first_line}.{hint}"
    )


def _transformation(error: Exception) -> str:
    """Returns the name of the innermost transformation that an error comes from."""
    in_message = re.match(r"(\w+)\.<locals>\.\w+\(\)", str(error))
    if in_message:
        return in_message[1]
    for frame, _ in reversed(list(traceback.walk_tb(error.__traceback__))):
        if frame.f_globals.get("__name__") == __name__:
            continue
        made_by = re.match(
            r"(?:.*\.)?(\w+)\.(?:<locals>\.)?\w*(?:init|update)\w*$", frame.f_code.co_qualname
        )
        if made_by and made_by[1] not in (
            "<locals>",
            "chain",
            "named_chain",
            "with_extra_args_support",
        ):
            return made_by[1]
    return "it"


def _shapes(tree: PyTree) -> str:
    """Lists the first leaves of a tree with their shapes."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    shown = [
        f"{jax.tree_util.keystr(path, simple=True, separator='/')} {list(jnp.shape(leaf))}"
        for path, leaf in leaves[:3]
    ]
    more = len(leaves) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more > 0 else "")
