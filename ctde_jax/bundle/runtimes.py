"""Runtimes of a bundle: numpy for perceptrons, ONNX Runtime, or JAX; imported only if selected."""

import os
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np

from ctde_jax.bundle import perceptron, tensors
from ctde_jax.bundle.card import CARD, WEIGHTS, Bundle, faulty
from ctde_jax.errors import InputError, check_known, quoted, shortened

Predict = Callable[[np.ndarray], np.ndarray]
"""Function from raw inputs `[examples, ...]` to outputs, float32 `[examples, ...]`."""

Carry = list[np.ndarray]
"""State between positions of a sequence, float32 `[examples, ...]` each."""

Step = Callable[[np.ndarray, Carry], tuple[np.ndarray, Carry]]
"""Function from the inputs of one position and the carry to the outputs and the next carry."""


class Runtime(NamedTuple):
    """Implementation that runs an artifact."""

    packages: tuple[str, ...]
    """Names of the top-level modules that the runtime imports."""

    install: str
    """Arguments of `pip install` for these modules."""

    run: Callable[[Bundle, bytes], Callable[..., Sequence[np.ndarray]]]
    """`run(bundle, content)` loads a file and returns a function from its inputs to its outputs."""


def load(bundle: Bundle, runtime: str) -> Predict:
    """Loads an artifact and returns its function from inputs to outputs.

    The function maps raw inputs `[examples, ...]`, in the units and the dtype of the data set, to
    outputs, `float32[examples, ...]`. There may be 0 examples. It raises InputError if the inputs
    violate the card's specification (`Card.accepted`), or the runtime fails.

    Args:
        bundle: An open bundle; see `open_bundle`.
        runtime: Name of the runtime, one of `RUNTIMES`; see `pick`.

    Raises:
        InputError: If the bundle has no such artifact, its file is damaged, or the runtime is not
            installed or rejects the file.

    Examples:
        >>> model, data = ctde.models.mlp([64, 10]), ctde.data.digits()
        >>> trained = ctde.fit(model, data, optax.sgd(0.1), steps=1, show=False)
        >>> bundle, _ = ctde.write_bundle(trained, data, "bundle", ["numpy"], show=False)
        >>> predict = ctde.bundle.load(bundle, ctde.bundle.pick(bundle))
        >>> predict(data.test.inputs[:5]).shape
        (5, 10)
    """
    run = _load(bundle, runtime, bundle.card.artifacts[_known(bundle, runtime)].file)
    accepted = bundle.card.accepted
    output_shape = bundle.card.output_shape

    def predict(inputs: np.ndarray) -> np.ndarray:
        inputs = accepted.conform("inputs", inputs)
        # Not every runtime accepts an empty batch.
        if not len(inputs):
            return np.zeros((0, *output_shape), np.float32)
        (outputs,) = _checked(bundle, run, [output_shape], inputs)
        return outputs

    return predict


def load_step(bundle: Bundle, runtime: str) -> Step | None:
    """Loads the step function of an artifact, which processes one position of a sequence.

    Args:
        bundle: An open bundle.
        runtime: Name of the runtime, one of `RUNTIMES`.

    Returns:
        The step function, or None if the artifact has none.

    Raises:
        InputError: As for `load`.
    """
    file = bundle.card.artifacts[_known(bundle, runtime)].step
    if file is None:
        return None

    # Expected shapes of the outputs at one position and of the carry; None accepts any shape.
    run = _load(bundle, runtime, file)
    card = bundle.card
    of_a_place = {"tokens": card.output_shape[1:], "anything": None}.get(
        card.predicts, card.output_shape
    )
    like = [of_a_place, *card.carry]

    def step(inputs: np.ndarray, carry: Carry) -> tuple[np.ndarray, Carry]:
        outputs, *carry = _checked(bundle, run, like, inputs, *carry)
        return outputs, carry

    return step


def pick(bundle: Bundle) -> str:
    """Returns the first of `RUNTIMES` that has an artifact in the bundle and is installed here.

    Raises:
        InputError: If the bundle has no artifact of a known runtime, or none of its runtimes is
            installed.
    """
    # The order of RUNTIMES is that of preference.
    there = [name for name in RUNTIMES if name in bundle.card.artifacts]
    if not there:
        rule = f"must be one of {', '.join(RUNTIMES)}"
        got = quoted([*bundle.card.artifacts])
        raise InputError(
            "runtime", f"{rule}, but {bundle.folder} has only {got}; export the model again."
        )
    for name in filter(is_installed, there):
        return name
    ways = " or ".join(f"`pip install {RUNTIMES[name].install}`" for name in there)
    raise InputError(
        "runtime", f"must be installed, but none of {', '.join(there)} is; run {ways}."
    )


def is_installed(runtime: str) -> bool:
    """Returns whether the packages of a runtime are installed."""
    # `find_spec` does not import top-level packages.
    return all(find_spec(package) is not None for package in RUNTIMES[runtime].packages)


def _known(bundle: Bundle, runtime: str) -> str:
    check_known("runtime", runtime, RUNTIMES)
    if runtime not in bundle.card.artifacts:
        there = ", ".join(name for name in RUNTIMES if name in bundle.card.artifacts) or "none"
        raise InputError(
            "runtime",
            f"must be one of the artifacts in {bundle.folder} ({there}), got {runtime}.",
        )
    return runtime


def _load(bundle: Bundle, runtime: str, file: str) -> Callable[..., Sequence[np.ndarray]]:
    """Loads a file of a bundle with a runtime.

    Raises:
        InputError: If the file is damaged, or the runtime is not installed or rejects it.
    """
    own = RUNTIMES[runtime]
    content = bundle.read(file)
    if not is_installed(runtime):
        raise InputError("runtime", f"{runtime} is not installed; run `pip install {own.install}`.")
    try:
        return own.run(bundle, content)
    except InputError:
        raise
    # The type of the exception depends on the runtime.
    except Exception as error:
        fault = f"{own.packages[0]} rejects {file} ({shortened(str(error))})"
        way_out = f"install a newer {own.packages[0]}, or export the model again"
        raise faulty(bundle.folder, fault, way_out) from error


def _checked(
    bundle: Bundle,
    run: Callable[..., Sequence[np.ndarray]],
    like: Sequence[tuple[int, ...] | None],
    *inputs: np.ndarray,
) -> Sequence[np.ndarray]:
    """Runs a model and checks the dtype and shapes of its outputs.

    Args:
        bundle: Bundle of the model, for errors.
        run: Function that `_load` returned.
        like: Shape of each output for one example; None accepts any shape.
        *inputs: Inputs of the model, `[examples, ...]` each.

    Raises:
        InputError: If the model fails, or an output has a different shape or is not float32.
    """
    # The type of an exception depends on the runtime.
    try:
        outputs = run(*inputs)
    except Exception as error:
        fault = f"the model does not run on the inputs in {CARD} ({shortened(str(error))})"
        raise faulty(bundle.folder, fault, "export the model again") from error

    # float32 outputs `[examples, *like]`, one row for each example.
    fits = [
        each.dtype == np.float32 and each.shape[1:] == (each.shape[1:] if shape is None else shape)
        for each, shape in zip(outputs, like, strict=False)
    ]
    if (
        len(outputs) != len(like)
        or not all(fits)
        or {len(each) for each in outputs} != {len(inputs[0])}
    ):
        got = ", ".join(f"{each.dtype} {list(each.shape)}" for each in outputs)
        fault = f"the model returns {got} for {len(inputs[0])} examples, unlike {CARD}"
        raise faulty(bundle.folder, fault, "export the model again")
    return outputs


def _numpy(bundle: Bundle, content: bytes) -> Callable[..., Sequence[np.ndarray]]:
    if bundle.card.layers is None:
        raise ValueError(f"the card has no layers for {WEIGHTS}")
    predict = perceptron.make_predict(
        bundle.card.layers, tensors.parse(content), bundle.card.input_shape
    )
    # Run it once, so that a mismatch is found at loading.
    predict(np.zeros((1, *bundle.card.input_shape), bundle.card.input_dtype))
    return lambda inputs: [predict(inputs)]


def _onnx(bundle: Bundle, content: bytes) -> Callable[..., Sequence[np.ndarray]]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    # Log fatal errors only: others are raised.
    options.log_severity_level = 4
    # A model may refer to weights in another file, which ONNX Runtime would look up in the working
    # directory.
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", os.devnull
    )
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]
    return lambda *inputs: [
        np.asarray(each) for each in session.run(None, dict(zip(names, inputs, strict=True)))
    ]


def traceable(bundle: Bundle, content: bytes) -> Callable[..., Any]:
    """Deserializes the content of a StableHLO file to a function that JAX can trace and compile.

    Raises:
        InputError: If this JAX is older than the one that exported the bundle.
    """
    import jax
    from jax import export

    written = bundle.card.versions.get("jax", "0")
    if _numbers(jax.__version__) < _numbers(written):
        way_out = f"install jax {written} or newer, or use another runtime"
        raise InputError(
            "runtime",
            f"jax must be at least {written}, which exported the bundle, got {jax.__version__}; "
            f"{way_out}.",
        )
    return export.deserialize(bytearray(content)).call


def _jax(bundle: Bundle, content: bytes) -> Callable[..., Sequence[np.ndarray]]:
    import jax

    call = jax.jit(traceable(bundle, content))
    return lambda *inputs: [np.asarray(each) for each in jax.tree.leaves(call(*inputs))]


def _numbers(version: str) -> list[int]:
    # Development versions have further parts, such as 0.10.0.dev20260101.
    return [int(part) for part in version.split(".")[:3] if part.isdecimal()]


RUNTIMES: Mapping[str, Runtime] = {
    "numpy": Runtime(("numpy",), "numpy", _numpy),
    "onnx": Runtime(("onnxruntime",), "onnxruntime", _onnx),
    "jax": Runtime(("jax", "flatbuffers"), "jax flatbuffers", _jax),
    "onnx-int8": Runtime(("onnxruntime",), "onnxruntime", _onnx),
}
"""Runtimes by name, in the order of preference."""
