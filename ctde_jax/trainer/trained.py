"""The result of a training: the aggregated model, and the measurements of the run."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from numpy.typing import ArrayLike

from ctde_jax.bundle import Accepted
from ctde_jax.checkpoint import named
from ctde_jax.cost import Traffic
from ctde_jax.data import Dataset, DiskArray, Split, TrainingSplit, look_up, plain, slices
from ctde_jax.devices import PyTree, replica
from ctde_jax.errors import InputError
from ctde_jax.models import Model, Task, module_of, tasks
from ctde_jax.rounds import Averages, make_evaluate
from ctde_jax.trainer import saved
from ctde_jax.trainer.history import Row
from ctde_jax.trainer.reports import Report, check_task, make_report

_MOST_AT_ONCE = 1024
_MOST_BYTES_AT_ONCE = 2**25
"""`predict` computes at most this many examples, and this many bytes of inputs, at a time."""


class Accepts(NamedTuple):
    """Specification of the inputs and labels that a trained model accepts, as in training."""

    inputs: Accepted
    labels: Accepted
    classes: tuple[str, ...]
    """The names of the labels; empty if the labels are not classes."""


def accepts(data: Dataset) -> Accepts:
    """Returns the specification of inputs and labels for a model trained on `data`.

    The sequence length is unconstrained if the inputs are int32 tokens with one label per token.
    """
    inputs = data.train.inputs
    labels = data.train.labels
    classes = len(data.vocabulary or data.classes)
    largest = len(data.vocabulary) - 1 if data.vocabulary else _scaled_to_one(data)
    example = inputs.shape[1:]
    label = labels.shape[1:]
    # One label for each token: any length.
    if inputs.dtype == np.int32 and len(label) == 1 and label == example[:1]:
        example = (None, *example[1:])
        label = (None,)
    return Accepts(
        Accepted(str(inputs.dtype), example, largest),
        Accepted(str(labels.dtype), label, classes - 1 if classes else None),
        data.classes,
    )


def _scaled_to_one(data: Dataset) -> int | None:
    """Returns the uint8 value that is scaled to 1.0, if it is below 255 and no input exceeds it.

    Returns None otherwise, and also if inputs are not uint8, are shifted, or are scaled per feature
    or by a factor that is not positive.
    """
    if (
        data.train.inputs.dtype != np.uint8
        or data.scale.ndim
        or data.shift.any()
        or not data.scale > 0
    ):
        return None
    value = round(1 / float(data.scale))
    if not 0 < value < 255:
        return None
    # Reads all inputs, in slices, as those on disk may exceed the memory.
    splits = [split for split in (data.train, data.validation, data.test) if split]
    is_largest = all(
        np.asarray(piece).max() <= value for split in splits for _, piece in slices(split.inputs)
    )
    return value if is_largest else None


@dataclass(frozen=True, repr=False)
class Trained:
    """The aggregated model, and the measurements of its training.

    Examples:
        >>> model, data = ctde.models.mlp([64, 10]), ctde.data.digits()
        >>> trained = ctde.fit(model, data, optax.sgd(0.1), steps=1, show=False)
        >>> trained.step, sorted(trained.seconds)
        (1, ['compile', 'evaluate', 'start-up', 'train'])
    """

    model: Model
    """The model, which takes inputs as the data set stores them."""

    params: PyTree  # numpy arrays
    model_state: PyTree  # numpy arrays
    opt_state: PyTree
    """The state of the optimizer after the last step of the training.

    This holds even if `patience` returned earlier parameters. The leaves are numpy arrays, with a
    leading axis `[replica, ...]` if the strategy has local steps. If the optimizer trains other
    parameters than `params`, as `optax.contrib.schedule_free` does, these are not included.
    """

    step: int  # number of optimizer steps after which the parameters were evaluated
    history: list[Row]
    """The rows of training and evaluations, in order; see `history.py` for their entries."""

    seconds: dict[str, float]
    """Wall time by part: `start-up`, `compile`, `train`, `evaluate`.

    There is no `train` if nothing was trained because the run in the folder was complete.
    """

    interrupted: bool
    """Whether Ctrl-C ended the training before its last step."""

    stopped_early: bool
    """Whether early stopping ended the training.

    With `patience`, the parameters are those of the lowest validation loss.
    """

    task: Task
    devices: Sequence[jax.Device]
    traffic: Traffic | None
    """Bytes that a round sends, from the compiled program; None if loaded from a folder, or
    trained by nodes."""

    accepts: Accepts
    """Inputs and labels of `predict` and `evaluate`: dtype, shape and range as in training."""

    platform: str | None = None
    """Platform of the devices that measured the history, such as `cpu`; None if not recorded."""

    plan: tuple[tuple[str, str], ...] = ()
    """Rows of the plan of the training, for reports; see `plan_rows`."""

    def __repr__(self) -> str:
        averages = ", ".join(
            f"{name} {value:.4g}" for name, value in self.tested.items() if name != "split"
        )
        loaded = "" if "train" in self.seconds else "loaded, "
        return f"Trained({'interrupted, ' if self.interrupted else loaded}{averages})"

    @property
    def tested(self) -> Row:
        """The row of the history with the averages of these parameters over the test split."""
        return next(
            row for row in self.history if row["split"] == "test" and row["step"] == self.step
        )

    def predict(self, inputs: ArrayLike | DiskArray) -> PyTree:
        """Computes the model's outputs on one device, in inference mode.

        At most 1,024 examples, or 32 MiB of inputs, are computed at a time.

        Args:
            inputs: `[examples, ...]`, in the units and the kind of dtype of the training data:
                uint8 pixels if the model was trained on uint8, floats of any precision if on
                floats, integers of any width in the range of training if on integers. Lists are
                converted. There may be 0 examples.

        Returns:
            float32 `[examples, ...]`, or a tree of such arrays if the model returns one.

        Raises:
            InputError: The dtype, shape or range of the inputs differs from that in training.

        Examples:
            >>> model, data = ctde.models.mlp([64, 10]), ctde.data.digits()
            >>> trained = ctde.fit(model, data, optax.sgd(0.1), steps=1, show=False)
            >>> trained.predict(data.test.inputs[:5]).shape
            (5, 10)
        """
        array = _conforming("inputs", inputs, self.accepts.inputs)
        center = jax.device_put((self.params, self.model_state))
        apply = jax.jit(self.model.apply)

        # Pad every piece to the same size with copies of its last example: one compilation.
        def compute(piece: np.ndarray, places: int) -> PyTree:
            piece = self.accepts.inputs.conform("inputs", piece)
            filled = np.concatenate([piece, np.repeat(piece[-1:], places - len(piece), axis=0)])
            outputs, _ = apply(*center, filled, None)
            return jax.tree.map(lambda output: np.asarray(output)[: len(piece)], outputs)

        # Without examples, only the shapes of the outputs are needed.
        if not len(array):
            one = np.zeros((1, *array.shape[1:]), array.dtype)
            outputs, _ = jax.eval_shape(self.model.apply, *center, one, None)
            return jax.tree.map(
                lambda output: np.zeros((0, *output.shape[1:]), output.dtype), outputs
            )

        # Compute in pieces of at most 1,024 examples or 32 MiB of inputs.
        example_bytes = max(1, array.dtype.itemsize * prod(array.shape[1:]))
        places = min(len(array), _MOST_AT_ONCE, max(1, _MOST_BYTES_AT_ONCE // example_bytes))
        outputs = [
            compute(array[first : first + places], places) for first in range(0, len(array), places)
        ]
        return jax.tree.map(lambda *parts: np.concatenate(parts), *outputs)

    def evaluate(self, split: Split) -> Averages:
        """Averages loss and metrics over all examples of a split, on all devices of the training.

        Args:
            split: Examples like those of the training. Labels are class indices, or class names as
                in training; or targets, if the model was trained on targets.

        Returns:
            The averages by name, and the number of examples as `examples`.

        Raises:
            InputError: The argument is not a `Split` or is empty, or the dtype, shape or range of
                inputs or labels differs from that in training.

        Examples:
            >>> model, data = ctde.models.mlp([64, 10]), ctde.data.digits()
            >>> trained = ctde.fit(model, data, optax.sgd(0.1), steps=1, show=False)
            >>> averages = trained.evaluate(data.test)
            >>> sorted(averages)
            ['accuracy', 'examples', 'loss']
        """
        checked = self._checked(split)
        # Each device evaluates a part of the examples, with a copy of the parameters.
        params, model_state = replica.replicate((self.params, self.model_state), self.devices)
        return make_evaluate(self.model, self.task, checked, self.devices, params, model_state)(
            params, model_state
        )

    def report(self, split: Split) -> Report:
        """Measures the model on a split in detail: metrics with intervals, and the worst examples.

        For a classifier, the report has the confusion matrix (as exact counts), precision, recall
        and F1 of each class, AUROC, average precision, log loss and calibration. For targets, it
        has MAE, RMSE and R². Outputs are those of `predict`, which counts every example once.

        Args:
            split: Examples as for `evaluate`, such as `data.test`.

        Raises:
            InputError: The split is invalid as for `evaluate`, the model is a language model, the
                outputs are neither logits of classes nor predictions of the labels, or an output is
                not finite.

        Examples:
            >>> model, data = ctde.models.mlp([64, 10]), ctde.data.digits()
            >>> trained = ctde.fit(model, data, optax.adam(0.01), epochs=2, show=False)
            >>> report = trained.report(data.test)
            >>> report.metrics["accuracy"].low < trained.tested["accuracy"]
            True
        """
        checked = self._checked(split)
        check_task(self.task, self.accepts.classes)
        return make_report(
            self.task,
            self.predict(checked.inputs),
            checked,
            self.accepts.classes,
            self.step,
            self.history,
            self.plan,
        )

    def _checked(self, split: object) -> Split:
        """Returns a split with the dtypes of training; raises InputError if it is invalid."""
        if not isinstance(split, TrainingSplit):
            rule = "must be a Split, such as data.test or data.Split(inputs, labels)"
            raise InputError("split", f"{rule}, got {type(split).__name__} {split!r:.60}.")
        inputs = _conforming("inputs", split.inputs, self.accepts.inputs)
        labels = self._labels(split.labels)
        if not len(inputs) or len(labels) != len(inputs):
            raise InputError(
                "split",
                f"must have one label for each example, got {len(labels)} for {len(inputs)}.",
            )
        return Split(inputs, labels)

    def save(self, folder: Path | str) -> Path:
        """Writes the trained model to a folder, from which `load` reads it.

        The folder contains the parameters, the model state, the scaling of the inputs, the history
        and the other fields except `opt_state`, `seconds` and `traffic`. It is written whole or not
        at all, and SHA-256 sums detect every damaged bit. The model and the task are code, which
        must be passed to `load`. `init_from` accepts the folder as well. On several hosts, all must
        call this method, and host 0 writes.

        To continue a training with its optimizer state after an interruption, pass `run_dir` to
        `fit` instead.

        Args:
            folder: A new or empty folder; parent folders are created if necessary.

        Returns:
            The folder.

        Raises:
            InputError: The folder exists and is not empty, it cannot be written to, or the model
                was changed after the training.

        Examples:
            >>> model, data = ctde.models.mlp([64, 10]), ctde.data.digits()
            >>> trained = ctde.fit(model, data, optax.sgd(0.1), steps=1, show=False)
            >>> trained.save("models/digits").name
            'digits'
        """
        path = named("folder", folder)
        saved.check_new(path)

        # The model is code. Its outputs for an example identify it when it is passed to `load`.
        inputs = saved.make_example(self.accepts.inputs)
        example = {"inputs": inputs, "outputs": self.predict(inputs)}
        facts = {
            "inputs": self.accepts.inputs,
            "labels": self.accepts.labels,
            "classes": self.accepts.classes,
            "task": tasks.name_of(self.task),
            "measures": self.task.names,
            "step": self.step,
            "history": self.history,
            "interrupted": self.interrupted,
            "stopped_early": self.stopped_early,
            "platform": self.platform,
            "plan": self.plan,
            "example_platform": jax.default_backend(),
        }
        center = {"params": self.params, "model_state": self.model_state}
        saved.write(path, self.model, self.task.units, center, example, facts)
        return path

    def module(self) -> Any:
        """Returns the user's flax module with the trained parameters and model state.

        The module receives scaled inputs, `(inputs - data.shift) * data.scale`, as in training. For
        regression, its outputs are standardized by the `mean` and `deviation` of `task.units`. Its
        random streams are those of `nnx.Rngs(0)`, and it is in inference mode; arguments such as
        `train=False` must be passed in each call.

        Returns:
            For an nnx module, the module. For a linen module, the pair `(module, variables)` for
            `module.apply(variables, inputs)`.

        Raises:
            InputError: The model was not made from a module, or computes in another precision.

        Examples:
            >>> data = ctde.data.digits()
            >>> trained = ctde.fit(
            ...     ctde.models.mlp([64, 10]), data, optax.sgd(0.1), steps=1, show=False
            ... )
            >>> trained.module()(data.test.inputs[:5] * data.scale).shape
            (5, 10)
        """
        return module_of(self.model, self.params, self.model_state)

    def _labels(self, given: ArrayLike | DiskArray) -> np.ndarray | DiskArray:
        labels = plain("labels", given)
        classes = self.accepts.classes
        # Names of classes become their indices.
        if isinstance(labels, np.ndarray) and labels.dtype.kind == "U" and classes:
            return look_up("labels", labels, classes)
        return _conforming("labels", given, self.accepts.labels)

    def __reduce__(self) -> Any:
        raise InputError(
            "trained",
            "cannot be pickled, because its model contains functions; write it to a folder with "
            "trained.save, export it with ctde_jax.write_bundle, or pickle trained.params and "
            "trained.model_state, which are numpy arrays.",
        )


def _conforming(
    option: str, given: ArrayLike | DiskArray, accepted: Accepted
) -> np.ndarray | DiskArray:
    """Validates and converts values by `accepted.conform`; arrays on disk remain on disk.

    Of an array on disk, only the first row is validated, or all rows if there is a largest integer.
    Its floats are converted when they are read.

    Args:
        option: Name of the argument, for messages.
        given: Array or list `[examples, ...]`.
        accepted: Specification of the values.

    Raises:
        InputError: The values do not match the specification.
    """
    if not isinstance(given, DiskArray):
        array = plain(option, given)
        # Only lists pass unchanged: in a list, integers may stand for floats.
        return accepted.conform(option, given if isinstance(given, list | tuple) else array)
    # Read all of an array on disk only if its range must be checked.
    for _, piece in slices(given) if accepted.largest is not None else [(0, given[:1])]:
        accepted.conform(option, np.asarray(piece))
    wanted = np.dtype(accepted.dtype)
    return given.astype(wanted) if given.dtype.kind == wanted.kind == "f" else given
