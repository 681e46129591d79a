"""Adapts optax transformations to a training step: extra arguments, and points of evaluation."""

import logging
import re
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
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
"""`value() -> float32[]`, the mean objective.

It is called only if an update depends on it, because it may use a collective.
"""


class LookaheadSlow(NamedTuple):
    """The state of an optimizer that contains `optax.lookahead`, with the slow parameters."""

    state: PyTree
    slow: PyTree  # like the parameters


_WITH_OWN_POINT = (
    contrib.ScheduleFreeState,
    optax.LookaheadState,
    contrib.SAMState,
    contrib.COCOBState,
    contrib.MadgradState,
)
"""States that hold points in parameter space, from which the next parameters are computed."""

_NOT_PER_STEP = {
    "value_fn": "the objective as a function of the parameters; use a learning rate or schedule "
    "instead of a line search, such as optax.lbfgs(0.1, linesearch=None)",
    "grad_fn": "the gradient as a function of the parameters; use optax.contrib.sam(..., "
    "opaque_mode=False), whose adversarial steps are steps of the run",
    "obj_fn": "the objective as a function of the parameters; use optax.adamw or optax.lion",
}
"""Arguments of `update` that a training step cannot pass, and what to use instead."""


def as_transformation(optimizer: Any) -> optax.GradientTransformationExtraArgs:
    """Returns a transformation that passes all arguments to `optimizer.update`.

    Unlike `optax.with_extra_args_support`, it drops no extra arguments:
    `MultiSteps(...).gradient_transformation()` accepts them although its type does not show it.

    Args:
        optimizer: Any object with `init` and `update`, such as `optax.MultiSteps`.
    """
    return optax.GradientTransformationExtraArgs(optimizer.init, optimizer.update)


def adapted(optimizer: Any) -> optax.GradientTransformationExtraArgs:
    """Makes a transformation that a training step can call with any extra arguments.

    Its `update(updates, state, params, *, value=None, **extra_args)` calls `optimizer.update` with
    the result of `value` (a `Value`) as `value` and as `loss`, the incoming updates as `grad`, and
    `extra_args`; arguments that `optimizer.update` rejects are dropped. If the result does not
    depend on the value, `value` is not called, and the program is that of an update without it.

    `optax.lookahead` receives its pair of fast and slow parameters; the slow ones are kept in the
    state.

    Args:
        optimizer: Any optax transformation, or an object with `init` and `update`.

    Raises:
        InputError: In `init`, if the optimizer contains `differentially_private_aggregate`, or if
            its updates change the structure or a shape of its state, or narrow a dtype.
    """
    inner = as_transformation(optimizer)

    def init(params: PyTree) -> PyTree:
        # The structure of the state reveals the kind of optimizer. Lookahead warns if it is not
        # given its pair of parameters.
        with _without_absl_warnings():
            like = jax.eval_shape(inner.init, params)
        if _found(like, contrib.DifferentiallyPrivateAggregateState):
            raise InputError(
                "optimizer",
                "must not contain differentially_private_aggregate (dpsgd), which requires the "
                "gradient of every example, because a step has only their mean; use "
                "aggregate.private in the strategy to protect each device's message.",
            )

        # The slow parameters start equal to the fast ones.
        if _found(like, optax.LookaheadState):
            pair = optax.LookaheadParams.init_synced(params)
            return LookaheadSlow(_with_stable_types(inner, inner.init(pair), params, pair), params)
        return _with_stable_types(inner, inner.init(params), params, params)

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

        # The step updates the fast parameters; the slow ones are updated here, in the state.
        pair = optax.LookaheadParams(fast=params, slow=state.slow)
        moved, own = _update(inner, updates, state.state, pair, value, extra_args)
        return moved.fast, LookaheadSlow(own, optax.apply_updates(state.slow, moved.slow))

    return optax.GradientTransformationExtraArgs(init, update)


def evaluated_point(opt_state: PyTree, params: PyTree) -> PyTree:
    """Returns the parameters to evaluate, which for some optimizers are not those to train.

    They are the average of `optax.contrib.schedule_free`, the slow parameters of
    `optax.lookahead`, and the parameters before the adversarial steps of `optax.contrib.sam`,
    wherever they are in the state. For all other optimizers they are `params`.
    """
    for state in _found(opt_state, LookaheadSlow):
        params = state.slow
    for state in _found(opt_state, contrib.SAMState):
        if state.cache is not None:
            # Right after a synchronization, the parameters are not perturbed.
            is_synced = state.steps_since_sync == 0
            params = _map_unmasked(
                lambda old, x, own=is_synced: jnp.where(own, x, old), state.cache, params
            )

    # Training is at y = (1 - b1) z + b1 x; evaluation is at x.
    for state in _found(opt_state, contrib.ScheduleFreeState):
        params = _map_unmasked(
            lambda z, y, b1=state.b1: ((y - (1.0 - b1) * z) / b1).astype(y.dtype), state.z, params
        )
    return params


def has_evaluated_point(opt_state: PyTree) -> bool:
    """Returns whether `evaluated_point` may differ from `params`; reads only the tree structure."""
    return bool(_found(opt_state, (LookaheadSlow, contrib.SAMState, contrib.ScheduleFreeState)))


def own_point(opt_state: PyTree) -> str | None:
    """Returns the name of an optimizer that computes parameters from points in its state, or None.

    Such optimizers are `schedule_free`, `lookahead`, `sam`, `cocob` and `madgrad`.
    """
    found = _found(opt_state, _WITH_OWN_POINT)
    if not found:
        return None
    names = ("schedule_free", "lookahead", "sam", "cocob", "madgrad")
    return names[_WITH_OWN_POINT.index(type(found[0]))]


def learning_rate(opt_state: PyTree) -> jax.Array | None:
    """Returns the learning rate of the last update, float32[], from `optax.inject_hyperparams`.

    Returns None if the state contains no scalar learning rate, or several, as that of
    `optax.multi_transform` may.

    Examples:
        >>> opt_state = ctde.optimizers.build("sgd", 0.1).init({"kernel": np.ones(3)})
        >>> round(float(ctde.aggregate.learning_rate(opt_state)), 3)
        0.1
    """
    states = _found(opt_state, (optax.InjectHyperparamsState, optax.InjectStatefulHyperparamsState))
    return _the_only("learning_rate", [state.hyperparams for state in states])


def gradient_norm(opt_state: PyTree) -> jax.Array | None:
    """Returns the norm of the last gradient, float32[], from `optax.snapshot`.

    Returns None if the state contains no scalar snapshot of the name `gradient_norm`, or several.

    Examples:
        >>> keep_norm = optax.snapshot("gradient_norm", optax.tree.norm)
        >>> opt_state = optax.chain(keep_norm, optax.sgd(0.1)).init({"kernel": np.ones(4)})
        >>> float(ctde.aggregate.gradient_norm(opt_state))
        2.0
    """
    states = _found(opt_state, optax.SnapshotState)
    return _the_only("gradient_norm", [state.measurement for state in states])


def _the_only(name: str, entries: Sequence[Mapping[str, Any]]) -> jax.Array | None:
    """Returns the scalar of this name if exactly one of the mappings has the name, else None."""
    values = [each[name] for each in entries if name in each]
    # A snapshot may be a tree of arrays.
    return values[0] if len(values) == 1 and getattr(values[0], "ndim", None) == 0 else None


def with_hyperparams_of(fresh: PyTree, opt_state: PyTree) -> PyTree:
    """Returns `opt_state` with the constant hyperparameters of `fresh`.

    These are the numbers that `optax.inject_hyperparams` keeps in a state. A run that branches off
    an earlier run thus uses the numbers of its optimizer, not those of the earlier run. Schedules
    are part of the program, and continue from their step.

    Args:
        fresh: A state of the new run's optimizer, just initialized.
        opt_state: The state to continue from, with the same structure.
    """
    kinds = (optax.InjectHyperparamsState, optax.InjectStatefulHyperparamsState)

    def merge(new: PyTree, old: PyTree) -> PyTree:
        if not isinstance(new, kinds):
            return old

        # A hyperparameter with a schedule is computed from the step; only constants are replaced.
        scheduled = getattr(new, "hyperparams_states", {})
        constant = {name: value for name, value in new.hyperparams.items() if name not in scheduled}
        return old._replace(hyperparams={**old.hyperparams, **constant})

    return jax.tree.map(merge, fresh, opt_state, is_leaf=lambda leaf: isinstance(leaf, kinds))


def traced(optimizer: Any, params: PyTree, option: str) -> PyTree:
    """Traces the first update of an optimizer, and returns its initial state.

    It is called under `jax.eval_shape`, so that nothing is computed.

    Args:
        optimizer: Any optax transformation, or an object with `init` and `update`.
        params: Parameters of the model.
        option: Name of the argument that holds the optimizer, for errors.

    Raises:
        InputError: `init` or `update` fails, requires an argument that a step does not pass, or
            returns updates whose structure or shapes differ from those of the parameters.
    """
    transformation = adapted(optimizer)

    # Any optimizer of a user runs here for the first time, so any exception is possible.
    try:
        state = transformation.init(params)
        updates, _ = transformation.update(
            params, state, params, value=lambda: jnp.float32(0), anchor=params
        )
    except InputError as error:
        # `adapted` does not know the option; other errors name theirs.
        raise InputError(
            option if error.option == "optimizer" else error.option, error.sentence
        ) from error
    except Exception as error:
        raise InputError(option, _refusal(error, params)) from error
    if _types(updates, shapes_only=True) != _types(params, shapes_only=True):
        rule = "must return updates with the structure and shapes of the parameters"
        raise InputError(option, f"{rule} ({_shapes(params)}), got {_shapes(updates)}.")
    return state


def depends_on(program: ClosedJaxpr, inputs: list[Var]) -> bool:
    """Returns whether any result of a traced program depends on one of the given inputs."""
    # Any output of an equation, also of one with inner programs, may depend on any of its inputs.
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
    """Calls `inner.update` with those of the extra arguments that it accepts.

    Args:
        inner: Transformation to call.
        updates: Incoming updates, also offered as `grad`.
        state: State of the transformation.
        params: Argument `params` of the update.
        value: Mean objective, offered as `value` and `loss`; called only if the result depends on
            it.
        extra_args: Further extra arguments.

    Returns:
        The updates and the state.
    """
    names = ["value", "loss", "grad", *extra_args]

    def call(value, updates, state, params, extra_args):
        offered = {"value": value, "loss": value, "grad": updates, **extra_args}
        return inner.update(updates, state, params, **{name: offered[name] for name in names})

    # Trace the update with all arguments, and drop each one that it rejects, until it succeeds.
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

    # Compute the value only if a result depends on it. An effect, such as a callback, may use it
    # without a result.
    is_used = depends_on(program, program.jaxpr.invars[:1]) or bool(program.effects)
    return call(
        value() if is_used and value is not None else zero, updates, state, params, extra_args
    )


def _with_stable_types(
    inner: optax.GradientTransformationExtraArgs, state: PyTree, params: PyTree, given: PyTree
) -> PyTree:
    """Converts an initial state to the dtypes that it has after an update, if they are wider.

    A loop requires a state of constant dtypes, but some transformations return a state with wider
    dtypes than their initial state.

    Args:
        inner: Transformation that the state belongs to.
        state: Result of `inner.init`.
        params: Parameters of the model; gradients have their dtypes.
        given: The `params` argument of the update: the parameters, or the pair of
            `optax.lookahead`.

    Raises:
        InputError: An update changes the structure of the state, a shape, or a dtype to a narrower
            one.
    """

    def after(state: PyTree) -> PyTree:
        return jax.eval_shape(
            lambda grads, state, given: _update(
                inner, grads, state, given, None, {"anchor": given}
            )[1],
            *(params, state, given),
        )

    # A wider array may widen others at the next update, so try a few times.
    for _ in range(3):
        then = after(state)
        if jax.tree.structure(state) != jax.tree.structure(then):
            raise InputError(
                "optimizer", "must not change the structure of its state in an update."
            )
        before = _types(state)
        now = _types(then)
        if before == now:
            return state

        # Only a dtype may change, and only to a wider one, which holds all of its numbers.
        for name, (shape, dtype) in before.items():
            new_shape, new_dtype = now[name]
            if (shape, dtype) == (new_shape, new_dtype):
                continue
            if shape != new_shape or jnp.promote_types(dtype, new_dtype) != new_dtype:
                raise InputError(
                    "optimizer",
                    f"must keep the shapes and dtypes of its state, but an update changes {name} "
                    f"from {dtype}{list(shape)} to {new_dtype}{list(new_shape)}.",
                )
        state = jax.tree.map(
            lambda x, like: jnp.asarray(x, like.dtype) if _type(x) != _type(like) else x,
            state,
            then,
        )
    raise InputError(
        "optimizer",
        "must keep the dtypes of its state, but every update changes them.",
    )


def _type(leaf: Any) -> tuple[tuple[int, ...], Any]:
    return jnp.shape(leaf), jnp.result_type(leaf)


def _types(tree: PyTree, shapes_only: bool = False) -> dict[str, Any]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    of = jnp.shape if shapes_only else _type
    # The path of a tree that is a single leaf is empty.
    return {
        jax.tree_util.keystr(path, simple=True, separator="/") or "it": of(leaf)
        for path, leaf in leaves
    }


def _found(tree: PyTree, kinds: Any) -> list[Any]:
    """Returns the outermost nodes of the given kinds."""
    leaves = jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, kinds))
    return [leaf for leaf in leaves if isinstance(leaf, kinds)]


def _map_unmasked(function: Callable[..., jax.Array], own: PyTree, params: PyTree) -> PyTree:
    """Maps `function(own, param)` over parameters; masked ones are returned unchanged.

    Args:
        function: Function of a leaf of `own` and of `params`.
        own: Tree from an optimizer state, with `optax.MaskedNode` for the parameters that
            `optax.masked` hides from the optimizer.
        params: Parameters of the model.
    """

    def is_masked(node: Any) -> bool:
        return isinstance(node, optax.MaskedNode)

    return jax.tree.map(
        lambda x, p: p if is_masked(x) else function(x, p), own, params, is_leaf=is_masked
    )


@contextmanager
def _without_absl_warnings() -> Iterator[None]:
    logger = logging.getLogger("absl")
    before = logger.disabled
    logger.disabled = True
    try:
        yield
    finally:
        logger.disabled = before


def _refusal(error: Exception, params: PyTree) -> str:
    """Returns the error message for an optimizer that raised an exception while it was traced."""
    text = str(error)
    name = _transformation(error)

    # An argument that a step cannot pass: the message names it.
    for argument, reason in _NOT_PER_STEP.items():
        if argument in text:
            return (
                "must require only the arguments that a step passes (value, loss, grad), but "
                f"{name} requires `{argument}`, {reason}."
            )

    # Any other keyword-only argument without a default.
    missing = re.search(r"missing \d+ required keyword-only arguments?: (.*)", text)
    if missing:
        return (
            "must require only the arguments that a step passes (value, loss, grad), but "
            f"{name} requires {missing[1]}."
        )

    # Any other exception: its first line, and a hint if a tree of labels or a mask does not match.
    first_line = shortened(text.strip().partition("\n")[0]).rstrip(".")
    hint = (
        " Labels and masks must have the structure of the parameters, or be functions of them."
        if "tree" in first_line
        else ""
    )
    return (
        f"must work with the parameters of this model ({_shapes(params)}), but {name} raised "
        f"{type(error).__name__}: {first_line}.{hint}"
    )


def _transformation(error: Exception) -> str:
    """Returns the name of the innermost transformation in the traceback of an error."""
    # Python names the function itself if an argument is missing: `scale_by_x.<locals>.update()`.
    in_message = re.match(r"(\w+)\.<locals>\.\w+\(\)", str(error))
    if in_message:
        return in_message[1]

    # Otherwise, find the innermost function called init or update, except those that only pass
    # calls on. It is defined inside the function or class that gives the transformation its name.
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
    """Lists the first three leaves of a tree with their shapes, for messages."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    shown = [
        f"{jax.tree_util.keystr(path, simple=True, separator='/')} {list(jnp.shape(leaf))}"
        for path, leaf in leaves[:3]
    ]
    more = len(leaves) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more > 0 else "")
