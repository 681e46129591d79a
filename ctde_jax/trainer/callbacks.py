"""Callbacks: code of the user that a run calls at rows, evaluations, checkpoints and its end.

A callback is a function of a row, or an object with any of the methods of `Callback`. Callbacks run
on host 0, between dispatches: rows arrive in batches, one dispatch after they were computed, so the
devices do not wait for a callback that is faster than a dispatch. A callback can stop a run; it
must not modify the rows and arrays that it receives.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from signal import SIGINT
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, TypeAlias

from ctde_jax.devices import PyTree, hosts
from ctde_jax.errors import InputError
from ctde_jax.trainer.history import Row
from ctde_jax.trainer.stop import Stop

if TYPE_CHECKING:
    from ctde_jax.trainer.trained import Trained


class Callback:
    """The methods that a callback may have. Inheriting from this class is not required.

    If `on_row` or `on_evaluation` returns True, the run stops after the current dispatch, as after
    Ctrl-C. A callback that is a context manager is entered when the run starts, and exited when it
    ends, also after an exception.

    Examples:
        >>> class Enough(ctde.Callback):
        ...     def on_evaluation(self, rows, params, model_state):
        ...         return rows["test"]["accuracy"] > 0.9
        >>> model, data = ctde.models.mlp([64, 10]), ctde.data.digits()
        >>> enough = [Enough()]
        >>> trained = ctde.fit(model, data, optax.sgd(0.1), steps=1, callbacks=enough, show=False)
    """

    def on_start(self, options: Mapping[str, Any], rows: Sequence[Row]) -> None:
        """Called before the first step.

        Args:
            options: Options that determine the result of the run, by name.
            rows: Rows of the history up to the checkpoint from which a run is resumed.
        """

    def on_row(self, row: Row) -> bool | None:
        """Called for every new row, of training and of evaluations."""

    def on_evaluation(
        self, rows: Mapping[str, Row], params: PyTree, model_state: PyTree
    ) -> bool | None:
        """Called after every evaluation.

        Args:
            rows: The new row of each split, by name: "validation" if there is one, and "test".
            params: The evaluated parameters, as numpy arrays.
            model_state: The evaluated state of the model, as numpy arrays.
        """

    def on_checkpoint(self, path: Path) -> None:
        """Called after a checkpoint is complete."""

    def on_end(self, trained: "Trained") -> None:
        """Called with the result, unless the run ends with an exception."""


AnyCallback: TypeAlias = Callback | Callable[[Row], bool | None]
"""An object with methods of `Callback`, or a function that is called as `on_row`."""

_EVENTS = [name for name in vars(Callback) if name.startswith("on_")]


class Callbacks:
    """Calls the callbacks of a run; made by `open_callbacks`."""

    def __init__(self, callbacks: Sequence[Any], stop: Stop):
        self._methods = {
            event: [getattr(each, event) for each in callbacks if hasattr(each, event)]
            for event in _EVENTS
        }
        self._stop = stop

    def __call__(self, event: str, *arguments: Any) -> None:
        """Calls the method `event`, such as `on_row`, of all callbacks; stops the run on True."""
        for method in self._methods[event]:
            if method(*arguments) is True:
                self._stop.note(SIGINT)

    def have(self, event: str) -> bool:
        """Returns whether a callback has a method for this event."""
        return bool(self._methods[event])


@contextmanager
def open_callbacks(callbacks: Sequence[Any], stop: Stop) -> Iterator[Callbacks]:
    """Enters callbacks that are context managers, and yields the caller of all callbacks.

    On hosts other than host 0, no callback is entered or called.

    Args:
        callbacks: The callbacks of the user.
        stop: The stop of the run, which is set if a callback returns True.
    """
    with ExitStack() as stack:
        used = []
        for callback in callbacks if hosts.index() == 0 else ():
            if isinstance(callback, AbstractContextManager):
                callback = stack.enter_context(callback)
            used.append(callback if _has_methods(callback) else SimpleNamespace(on_row=callback))
        yield Callbacks(used, stop)


def check_callbacks(callbacks: Sequence[AnyCallback]) -> None:
    """Raises InputError unless each callback is a function, or has a method of `Callback`."""
    if callable(callbacks) or not isinstance(callbacks, Sequence):
        raise InputError("callbacks", f"must be a list, such as [{callbacks!r}].")
    for callback in callbacks:
        if isinstance(callback, type) or not (_has_methods(callback) or callable(callback)):
            raise InputError(
                "callbacks",
                f"must be functions of a row, or objects with {', '.join(_EVENTS)}, got "
                f"{callback!r}.",
            )


def _has_methods(callback: Any) -> bool:
    return any(hasattr(callback, event) for event in _EVENTS)
