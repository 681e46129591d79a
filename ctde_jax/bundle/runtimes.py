"""What runs a bundle: numpy for perceptrons, ONNX Runtime, LiteRT, or JAX; each is imported when it is asked for."""

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np

from ctde_jax.bundle import perceptron, tensors
from ctde_jax.bundle.card import WEIGHTS, Bundle
from ctde_jax.errors import InputError, check_known, shortened

Predict = Callable[[np.ndarray], np.ndarray]
"""From raw inputs `[examples, ...]` to outputs, float32 `[examples, ...]`."""

Carry = list[np.ndarray]
"""What is carried from place to place, float32 `[examples, ...]` each."""

Step = Callable[[np.ndarray, Carry], tuple[np.ndarray, Carry]]
"""From the inputs of one place and what is carried to outputs and what is carried on."""


class Runtime(NamedTuple):
    """A way to run a model."""

    package: str
    """What it imports."""

    install: str
    """What pip installs for that."""

    run: Callable[[Bundle, bytes], Callable[..., Sequence[np.ndarray]]]
    """Makes of a file the function from its inputs to its outputs."""


def load(bundle: Bundle, runtime: str) -> Predict:
    """Makes the function that a runtime computes; it holds inputs against the card.

    Raises:
        InputError: The bundle has no such artifact, the runtime is not installed, or it refuses the file.
    """
    run = _load(bundle, runtime, bundle.card.artifacts[_known(bundle, runtime)].file)
    shape, dtype = bundle.card.input_shape, bundle.card.input_dtype

    def predict(inputs: np.ndarray) -> np.ndarray:
        if inputs.shape[1:] != shape or inputs.dtype != dtype:
            rule = f"must be {dtype}, examples of the shape {list(shape)}"
            raise InputError("input", f"{rule}, got {inputs.dtype} of the shape {list(inputs.shape[1:])}.")
        (outputs,) = run(inputs)
        return outputs

    return predict


def load_step(bundle: Bundle, runtime: str) -> Step | None:
    """Makes the function that reads one place of a sequence, or returns None where the bundle has none.

    Raises:
        InputError: As `load`.
    """
    file = bundle.card.artifacts[_known(bundle, runtime)].step
    if file is None:
        return None
    run = _load(bundle, runtime, file)

    def step(inputs: np.ndarray, carry: Carry) -> tuple[np.ndarray, Carry]:
        outputs, *carry = run(inputs, *carry)
        return outputs, carry

    return step


def pick(bundle: Bundle) -> str:
    """Names the first runtime that has an artifact in the bundle and is installed here.

    Raises:
        InputError: There is none.
    """
    there = [name for name in RUNTIMES if name in bundle.card.artifacts]
    for name in filter(is_installed, there):
        return name
    ways = " or ".join(f"`pip install {RUNTIMES[name].install}`" for name in there)
    raise InputError("runtime", f"must be one that is installed, and the bundle needs {ways or 'none that is known'}.")


def is_installed(runtime: str) -> bool:
    """Says whether a runtime can be used here."""
    return find_spec(RUNTIMES[runtime].package) is not None


def _known(bundle: Bundle, runtime: str) -> str:
    check_known("runtime", runtime, RUNTIMES)
    if runtime not in bundle.card.artifacts:
        there = ", ".join(name for name in RUNTIMES if name in bundle.card.artifacts) or "none"
        raise InputError("runtime", f"must be one that {bundle.folder} has an artifact for ({there}), got {runtime}.")
    return runtime


def _load(bundle: Bundle, runtime: str, file: str) -> Callable[..., Sequence[np.ndarray]]:
    """Gives a file to a runtime, which may find in its own way that it is none of its own."""
    own, content = RUNTIMES[runtime], bundle.read(file)
    if not is_installed(runtime):
        raise InputError("runtime", f"{runtime} needs a package that is not here; `pip install {own.install}`.")
    try:
        return own.run(bundle, content)
    except InputError:
        raise
    except Exception as error:  # of whatever type the runtime has for it
        fault = f"{file} is refused by {own.package} ({shortened(str(error))})"
        raise InputError("bundle", f"names {bundle.folder}, whose {fault}: export the model again.") from error


def _numpy(bundle: Bundle, content: bytes) -> Callable[..., Sequence[np.ndarray]]:
    if bundle.card.layers is None:
        raise ValueError(f"the card does not say how {WEIGHTS} make a perceptron")
    predict = perceptron.make_predict(bundle.card.layers, tensors.parse(content))
    predict(np.zeros((1, *bundle.card.input_shape), bundle.card.input_dtype))  # so what does not fit is found here
    return lambda inputs: [predict(inputs)]


def _onnx(bundle: Bundle, content: bytes) -> Callable[..., Sequence[np.ndarray]]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]
    return lambda *inputs: [np.asarray(each) for each in session.run(None, dict(zip(names, inputs, strict=True)))]


def traceable(bundle: Bundle, content: bytes) -> Callable[..., Any]:
    """Makes of a StableHLO file a function of JAX, which may be part of a larger program.

    Raises:
        InputError: This JAX is older than the one that wrote it.
    """
    import jax
    from jax import export

    written = bundle.card.versions.get("jax", "0")
    if _numbers(jax.__version__) < _numbers(written):
        way_out = f"install jax {written} or newer, or take another runtime"
        raise InputError("runtime", f"jax is {jax.__version__} here, older than the {written} that wrote: {way_out}.")
    return export.deserialize(bytearray(content)).call


def _jax(bundle: Bundle, content: bytes) -> Callable[..., Sequence[np.ndarray]]:
    import jax

    call = jax.jit(traceable(bundle, content))
    return lambda *inputs: [np.asarray(each) for each in jax.tree.leaves(call(*inputs))]


def _litert(bundle: Bundle, content: bytes) -> Callable[..., Sequence[np.ndarray]]:
    interpreter = import_module("ai_edge_litert.interpreter").Interpreter(model_content=content)
    run = interpreter.get_signature_runner("serving_default")
    return lambda inputs: [run(inputs=inputs)["outputs"]]


def _numbers(version: str) -> list[int]:
    return [int(part) for part in version.split(".")[:3] if part.isdecimal()]


_ONNX: Any = ("onnxruntime", "onnxruntime", _onnx)
RUNTIMES: Mapping[str, Runtime] = {
    "numpy": Runtime("numpy", "numpy", _numpy),
    "onnx": Runtime(*_ONNX),
    "jax": Runtime("jax", "jax flatbuffers", _jax),
    "litert": Runtime("ai_edge_litert", "ai-edge-litert", _litert),
    "onnx-int8": Runtime(*_ONNX),
    "onnx-int8-static": Runtime(*_ONNX),
}
"""By name; what comes first is taken first."""
