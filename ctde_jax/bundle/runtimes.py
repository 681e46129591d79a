"""What runs a bundle: numpy for perceptrons, ONNX Runtime, or JAX; each is imported when it is asked for."""

import os
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np

from ctde_jax.bundle import perceptron, tensors
from ctde_jax.bundle.card import CARD, WEIGHTS, Bundle
from ctde_jax.errors import InputError, check_known, quoted, shortened

Predict = Callable[[np.ndarray], np.ndarray]
"""From raw inputs `[examples, ...]` to outputs, float32 `[examples, ...]`."""

Carry = list[np.ndarray]
"""What is carried from place to place, float32 `[examples, ...]` each."""

Step = Callable[[np.ndarray, Carry], tuple[np.ndarray, Carry]]
"""From the inputs of one place and what is carried to outputs and what is carried on."""


class Runtime(NamedTuple):
    """A way to run a model."""

    packages: tuple[str, ...]
    """What it imports."""

    install: str
    """What pip installs for that."""

    run: Callable[[Bundle, bytes], Callable[..., Sequence[np.ndarray]]]
    """Makes of a file the function from its inputs to its outputs."""


def load(bundle: Bundle, runtime: str) -> Predict:
    """Returns the function that an artifact computes. It checks its inputs against the card.

    Raises:
        InputError: The bundle has no such artifact, the runtime is not installed, or it refuses the file.
    """
    run = _load(bundle, runtime, bundle.card.artifacts[_known(bundle, runtime)].file)
    accepted, output_shape = bundle.card.accepted, bundle.card.output_shape

    def predict(inputs: np.ndarray) -> np.ndarray:
        inputs = accepted.conform("inputs", inputs)
        if not len(inputs):  # which not every runtime accepts
            return np.zeros((0, *output_shape), np.float32)
        (outputs,) = _checked(bundle, run, [output_shape], inputs)
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
    run, card = _load(bundle, runtime, file), bundle.card
    of_a_place = {"tokens": card.output_shape[1:], "classes": card.output_shape, "anything": None}[
        card.predicts
    ]
    like = [of_a_place, *card.carry]

    def step(inputs: np.ndarray, carry: Carry) -> tuple[np.ndarray, Carry]:
        outputs, *carry = _checked(bundle, run, like, inputs, *carry)
        return outputs, carry

    return step


def pick(bundle: Bundle) -> str:
    """Names the first runtime that has an artifact in the bundle and is installed here.

    Raises:
        InputError: There is none.
    """
    there = [name for name in RUNTIMES if name in bundle.card.artifacts]
    if not there:
        rule, got = (
            f"must be one that this version knows ({', '.join(RUNTIMES)})",
            quoted([*bundle.card.artifacts]),
        )
        raise InputError(
            "runtime", f"{rule}, and {bundle.folder} has only {got}; export the model again."
        )
    for name in filter(is_installed, there):
        return name
    ways = " or ".join(f"`pip install {RUNTIMES[name].install}`" for name in there)
    raise InputError("runtime", f"must be one that is installed, and the bundle needs {ways}.")


def is_installed(runtime: str) -> bool:
    """Says whether a runtime can be used here."""
    return all(find_spec(package) is not None for package in RUNTIMES[runtime].packages)


def _known(bundle: Bundle, runtime: str) -> str:
    check_known("runtime", runtime, RUNTIMES)
    if runtime not in bundle.card.artifacts:
        there = ", ".join(name for name in RUNTIMES if name in bundle.card.artifacts) or "none"
        raise InputError(
            "runtime",
            f"must be one that {bundle.folder} has an artifact for ({there}), got {runtime}.",
        )
    return runtime


def _load(bundle: Bundle, runtime: str, file: str) -> Callable[..., Sequence[np.ndarray]]:
    """Gives a file to a runtime, which may find in its own way that it is none of its own."""
    own, content = RUNTIMES[runtime], bundle.read(file)
    if not is_installed(runtime):
        raise InputError(
            "runtime", f"{runtime} needs a package that is not here; `pip install {own.install}`."
        )
    try:
        return own.run(bundle, content)
    except InputError:
        raise
    except Exception as error:  # of whatever type the runtime has for it
        fault = f"{file} is refused by {own.packages[0]} ({shortened(str(error))})"
        way_out = f"install a newer {own.packages[0]}, or export the model again"
        raise InputError("bundle", f"names {bundle.folder}, whose {fault}: {way_out}.") from error


def _checked(
    bundle: Bundle,
    run: Callable[..., Sequence[np.ndarray]],
    like: Sequence[tuple[int, ...] | None],
    *inputs: np.ndarray,
) -> Sequence[np.ndarray]:
    """Runs a model, whose outputs must be what the card says of their shapes, where it says something."""
    try:
        outputs = run(*inputs)
    except Exception as error:  # of whatever type the runtime has for it
        fault = f"model does not run on what {CARD} says that it reads ({shortened(str(error))})"
        raise InputError(
            "bundle", f"names {bundle.folder}, whose {fault}: export the model again."
        ) from error
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
        fault = f"model returns {got} for {len(inputs[0])} examples, which is not what {CARD} says"
        raise InputError("bundle", f"names {bundle.folder}, whose {fault}: export the model again.")
    return outputs


def _numpy(bundle: Bundle, content: bytes) -> Callable[..., Sequence[np.ndarray]]:
    if bundle.card.layers is None:
        raise ValueError(f"the card does not say how {WEIGHTS} make a perceptron")
    predict = perceptron.make_predict(
        bundle.card.layers, tensors.parse(content), bundle.card.input_shape
    )
    predict(
        np.zeros((1, *bundle.card.input_shape), bundle.card.input_dtype)
    )  # so what does not fit is found here
    return lambda inputs: [predict(inputs)]


def _onnx(bundle: Bundle, content: bytes) -> Callable[..., Sequence[np.ndarray]]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    # A file may say that its weights are in another one, which would be looked for where the process runs.
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", os.devnull
    )
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]
    return lambda *inputs: [
        np.asarray(each) for each in session.run(None, dict(zip(names, inputs, strict=True)))
    ]


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
        raise InputError(
            "runtime",
            f"jax is {jax.__version__} here, older than the {written} that wrote: {way_out}.",
        )
    return export.deserialize(bytearray(content)).call


def _jax(bundle: Bundle, content: bytes) -> Callable[..., Sequence[np.ndarray]]:
    import jax

    call = jax.jit(traceable(bundle, content))
    return lambda *inputs: [np.asarray(each) for each in jax.tree.leaves(call(*inputs))]


def _numbers(version: str) -> list[int]:
    return [int(part) for part in version.split(".")[:3] if part.isdecimal()]


RUNTIMES: Mapping[str, Runtime] = {
    "numpy": Runtime(("numpy",), "numpy", _numpy),
    "onnx": Runtime(("onnxruntime",), "onnxruntime", _onnx),
    "jax": Runtime(("jax", "flatbuffers"), "jax flatbuffers", _jax),
    "onnx-int8": Runtime(("onnxruntime",), "onnxruntime", _onnx),
}
"""By name; what comes first is taken first."""
