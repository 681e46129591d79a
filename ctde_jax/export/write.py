"""From a trained model to a bundle: each form is written, run as a node runs it, and kept if it says the same."""

import json
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import jax
import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ctde_jax.bundle import (
    BATCH_SIZES,
    CARD,
    EXAMPLES,
    FORMAT,
    PARITY,
    SUMS,
    WEIGHTS,
    Bundle,
    File,
    Predict,
    is_exact,
    load,
    load_step,
    open_bundle,
    sums_of,
)
from ctde_jax.checkpoint import put_back, written_whole
from ctde_jax.data import Dataset, Split
from ctde_jax.errors import InputError, check_at_least, check_known
from ctde_jax.export import receipt
from ctde_jax.export.int8 import to_int8
from ctde_jax.export.onnx import to_onnx
from ctde_jax.export.program import LeftOut, Program, leaving_out, make_program
from ctde_jax.export.stablehlo import to_stablehlo
from ctde_jax.export.weights import find_layers, gather, to_safetensors
from ctde_jax.models import count_params
from ctde_jax.trainer import Trained, accepts, console

Format = Literal["numpy", "onnx", "jax", "onnx-int8"]
FORMATS: tuple[Format, ...] = get_args(Format)
DEFAULT: tuple[Format, ...] = ("numpy", "onnx", "jax")
_PACKAGES = ("ctde_jax", "jax", "flax", "numpy", "jax2onnx", "onnx", "onnxruntime")
_MOST_EXAMPLE_BYTES = 2**20

Facts = dict[str, Any]


class Written(NamedTuple):
    """What has been written."""

    bundle: Bundle
    left_out: Mapping[str, str]
    """The formats that were asked for and are not in the bundle, and why."""


class _Form(NamedTuple):
    """The model in one form."""

    file: str
    content: bytes
    step: tuple[str, bytes] | None = None


def write_bundle(
    trained: Trained,
    data: Dataset,
    folder: Path | str,
    formats: Sequence[Format] = DEFAULT,
    *,
    examples: int = 100,
    options: Mapping[str, Any] = {},
    show: bool = True,
) -> Written:
    """Writes a trained model as a folder that runs on any node, and says how it was measured.

    Every form is run over the whole test split as a node runs it, at batches of 1, 3, 7 and 64. One that differs by
    more than `PARITY` from the trained model is not written; only those in one byte may, and say by how much.

    Args:
        trained: What `fit` has returned.
        data: What it was trained on; its test split is the measure, and its class names go along.
        folder: Is made; a bundle that is there already is replaced once the new one is whole.
        formats: Names of runtimes. A perceptron runs with numpy alone; "onnx" needs `ctde_jax[onnx]`.
        examples: Test examples that go along at most, with the trained model's outputs, so that `verify bundle` can
            repeat the receipt where the test split is not; about a megabyte of them.
        options: What else the card is to say of the training, as JSON can.
        show: Whether to show progress.

    Raises:
        InputError: A format is not known, a number is out of range, the test averages are not those of the training,
            the model does not return one array of float32 or leaves in none of the formats, or the folder is
            something else or cannot be written to.
    """
    for name in formats:
        check_known("formats", name, FORMATS)
    check_at_least(0, examples=examples)
    given, folder = folder, Path(folder).resolve()
    try:
        put_back(folder)  # so that what is checked is what would be replaced
        _check_replaceable(folder)
        with written_whole(folder) as partial:
            left_out = _write(trained, data, partial, formats, examples, options, show)
    except OSError as error:
        raise InputError(
            "folder",
            f"must be a folder that can be written to and has room, and {given} is none: {error.strerror}.",
        ) from error
    return Written(open_bundle(folder)._replace(folder=Path(given)), left_out)


def _check_replaceable(folder: Path) -> None:
    """Lets nothing be replaced but a bundle: what its sums name, and no file beside them."""
    if not folder.exists():
        return
    named = {CARD, SUMS}
    if (folder / SUMS).is_file():
        named |= {
            line.split("  ", 1)[-1]
            for line in (folder / SUMS).read_text("utf-8", "replace").splitlines()
        }
    others = {path.name for path in folder.iterdir()} - named if folder.is_dir() else {folder.name}
    if others or not (folder / SUMS).is_file() or not (folder / CARD).is_file():
        rule = f"must be new or a bundle, and {folder} is something else"
        raise InputError(
            "folder", f"{rule}{f', with {min(others)} in it' if others else ''}; name another one."
        )


def _write(
    trained: Trained,
    data: Dataset,
    folder: Path,
    formats: Sequence[Format],
    examples: int,
    options: Mapping[str, Any],
    show: bool,
) -> dict[str, str]:
    _check_outputs(trained, data)
    measured = trained.evaluate(data.test)
    receipt.check_same(trained, measured)
    few = np.asarray(data.test.inputs[:64])
    weights, reference = gather(trained, data), receipt.make_reference(trained)
    layers = find_layers(trained, weights, few)
    forms, left_out = _make_forms(
        trained, data, formats, to_safetensors(weights), layers is not None
    )
    _check_any(forms, left_out)
    files = {WEIGHTS: to_safetensors(weights)}
    files |= {form.file: form.content for form in forms.values()}
    files |= {
        name: content for form in forms.values() if form.step for name, content in [form.step]
    }
    if examples:
        files[EXAMPLES] = _examples(reference, data.test, examples)
    for name, content in files.items():
        (folder / name).write_bytes(content)

    facts = _facts(trained, data, options)
    facts["layers"] = layers and {"activation": layers.activation, "kernels": list(layers.kernels)}
    facts["artifacts"] = {
        name: {"file": form.file, "step": form.step and form.step[0], "receipt": {}}
        for name, form in forms.items()
    }
    _seal(folder, facts, files)
    bundle = open_bundle(folder)
    _measure(bundle, facts, left_out, trained, data, reference, show)
    facts["trained_model"]["measured"] = measured
    _check_any(facts["artifacts"], left_out)
    kept = {said[kind] for said in facts["artifacts"].values() for kind in ("file", "step")} | {
        WEIGHTS,
        EXAMPLES,
    }
    for name in files.keys() - kept:
        (folder / name).unlink()
    facts["left_out"] = left_out
    _seal(folder, facts, {name: content for name, content in files.items() if name in kept})
    return left_out


def _check_outputs(trained: Trained, data: Dataset) -> None:
    """Refuses a model that does not return one array of float32, with an axis of examples first."""
    two = np.asarray(data.test.inputs[:1]).repeat(2, axis=0)
    outputs, _ = jax.eval_shape(trained.model.apply, trained.params, trained.model_state, two, None)
    leaves = jax.tree.leaves(outputs)
    if [*leaves] != [outputs]:
        rule = f"must return one array to be exported, got a {type(outputs).__name__} of {len(leaves)} arrays"
        raise InputError(
            "trained",
            f"{rule}; wrap its model in one whose `apply` returns the array that nodes need.",
        )
    if outputs.dtype != np.float32 or outputs.shape[:1] != (2,):
        got = f"{outputs.dtype} {list(outputs.shape)} for 2 examples"
        raise InputError(
            "trained", f"must return float32 [examples, ...] to be exported, got {got}."
        )


def _check_any(forms: Mapping[str, Any], left_out: Mapping[str, str]) -> None:
    if not forms:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in left_out.items())
        raise InputError(
            "formats", f"must have one that the model leaves in, and it leaves in none ({reasons})."
        )


def _make_forms(
    trained: Trained, data: Dataset, formats: Sequence[Format], weights: bytes, is_perceptron: bool
) -> tuple[dict[str, _Form], dict[str, str]]:
    """Writes the model in each form that it has."""
    says = {"classes": data.classes, "vocabulary": data.vocabulary}

    @cache
    def programs() -> tuple[Program, Program | None]:
        with leaving_out("jax.export"):
            return _programs(trained, data)

    def numpy() -> _Form:
        if not is_perceptron:
            raise LeftOut("is for dense layers of float32 with one activation between them")
        return _Form(WEIGHTS, weights)

    def in_jax() -> _Form:
        whole, step = programs()
        return _Form(
            "model.stablehlo",
            to_stablehlo(whole),
            step and ("step.stablehlo", to_stablehlo(step)),
        )

    @cache
    def whole_in_onnx() -> bytes:
        return to_onnx(programs()[0], ["inputs"], ["outputs"], says)

    def onnx() -> _Form:
        step = programs()[1]
        carried = [] if step is None else [f"carry_{place}" for place in range(len(step.like) - 1)]
        names = [name.replace("carry", "next") for name in carried]
        return _Form(
            "model.onnx",
            whole_in_onnx(),
            step and ("step.onnx", to_onnx(step, ["inputs", *carried], ["outputs", *names], says)),
        )

    ways: Mapping[str, Callable[[], _Form]] = {
        "numpy": numpy,
        "jax": in_jax,
        "onnx": onnx,
        "onnx-int8": lambda: _Form("model.int8.onnx", to_int8(whole_in_onnx())),
    }
    forms, left_out = {}, {}
    for name in formats:
        try:
            forms[name] = ways[name]()
        except LeftOut as error:
            left_out[name] = str(error)
    return forms, left_out


def _programs(trained: Trained, data: Dataset) -> tuple[Program, Program | None]:
    """Makes the program of the whole model, and where it reads place by place that of one place."""
    model, stream, center = (
        trained.model,
        trained.model.stream,
        (trained.params, trained.model_state),
    )
    shape, dtype = data.test.inputs.shape[1:], data.test.inputs.dtype
    whole = make_program(
        lambda inputs: [model.apply(*center, inputs, None)[0]], jax.ShapeDtypeStruct(shape, dtype)
    )
    if stream is None:
        return whole, None
    start = stream.start(1)
    if any(np.any(part) for part in jax.tree.leaves(start)):
        return whole, None  # a card says that all begins with zeros
    structure = jax.tree.structure(start)

    def step(inputs: jax.Array, *carry: jax.Array) -> list[jax.Array]:
        outputs, after = stream.step(*center, structure.unflatten(carry), inputs)
        return [outputs, *jax.tree.leaves(after)]

    carry = [jax.ShapeDtypeStruct(one.shape[1:], one.dtype) for one in jax.tree.leaves(start)]
    return whole, make_program(step, jax.ShapeDtypeStruct(shape[1:], dtype), *carry)


def _examples(reference: Predict, split: Split, most: int) -> bytes:
    """Writes the first test examples with the trained model's outputs."""
    inputs, labels = (np.asarray(array[:1]) for array in split)
    each = inputs.nbytes + labels.nbytes + reference(inputs).nbytes
    count = max(1, min(most, _MOST_EXAMPLE_BYTES // each, len(split.inputs)))
    inputs, labels = (np.ascontiguousarray(array[:count]) for array in split)
    return to_safetensors({"inputs": inputs, "labels": labels, "outputs": reference(inputs)})


def _facts(trained: Trained, data: Dataset, options: Mapping[str, Any]) -> Facts:
    one = np.asarray(data.test.inputs[:1])
    outputs, _ = jax.eval_shape(trained.model.apply, trained.params, trained.model_state, one, None)
    stream = trained.model.stream
    return {
        "format": FORMAT,
        "predicts": trained.task.predicts,
        "input": {
            "shape": list(one.shape[1:]),
            "dtype": str(one.dtype),
            "highest": _highest(data),
        },
        "output": {"shape": list(outputs.shape[1:])},
        "carry": []
        if stream is None
        else [list(leaf.shape[1:]) for leaf in jax.tree.leaves(stream.start(1))],
        "classes": list(data.classes),
        "vocabulary": list(data.vocabulary),
        "columns": list(data.columns),
        "model": {"parameters": count_params(trained.params)},
        "data": {
            "name": data.name,
            "training": len(data.train.inputs),
            "test": len(data.test.inputs),
        },
        "training": {"step": trained.step, **options},
        "versions": {**_versions(), "python": platform.python_version()},
    }


def _highest(data: Dataset) -> int:
    """Returns the largest uint8 input that a node accepts, which is the one that `Trained` accepts."""
    largest = accepts(data).inputs.largest
    return 255 if largest is None or data.test.inputs.dtype != np.uint8 else largest


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _measure(
    bundle: Bundle,
    facts: Facts,
    left_out: dict[str, str],
    trained: Trained,
    data: Dataset,
    reference: Predict,
    show: bool,
) -> None:
    """Fills in the receipts, and takes out what does not say what the trained model says."""
    screen, artifacts = console(quiet=not show), facts["artifacts"]
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=screen,
        transient=True,
        disable=not screen.is_terminal,
    )
    contestants = {"trained model": reference}
    with bar:
        task = bar.add_task(
            "", total=len(artifacts) * len(BATCH_SIZES) * receipt.count_pieces(data.test)
        )
        for name in list(artifacts):
            bar.update(task, description=f"measuring {name}")
            try:
                predict = load(bundle, name)
                found = receipt.compare(
                    predict, reference, data.test, trained.task, lambda: bar.advance(task)
                )
            except InputError as error:  # its runtime is not here, or refuses it
                left_out[name] = f"cannot be measured here: {error}"
                del artifacts[name]
                continue
            found["bytes"] = bundle.card.files[artifacts[name]["file"]].size
            if not found["relative"] <= (PARITY if is_exact(name) else sys.float_info.max):
                left_out[name] = _misses(found["relative"])
                del artifacts[name]
                continue
            contestants[name], artifacts[name]["receipt"] = predict, found
            if artifacts[name]["step"] is not None:
                _measure_steps(bundle, name, artifacts[name], left_out, reference, data)
        bar.update(task, description="timing")
        milliseconds = receipt.time_all(contestants, np.asarray(data.test.inputs[:64]))
    facts["trained_model"] = {"milliseconds": milliseconds.pop("trained model")}
    for name, taken in milliseconds.items():
        artifacts[name]["receipt"]["milliseconds"] = taken


def _measure_steps(
    bundle: Bundle,
    name: str,
    artifact: Facts,
    left_out: dict[str, str],
    reference: Predict,
    data: Dataset,
) -> None:
    """Reads some sequences place by place, and takes that form out where it does not say what the whole says."""
    step, inputs = load_step(bundle, name), np.asarray(data.test.inputs[:64])
    assert step is not None
    start = [np.zeros((len(inputs), *shape), np.float32) for shape in bundle.card.carry]
    relative = artifact["receipt"]["place_by_place"] = receipt.compare_steps(
        step, start, reference, inputs
    )
    if not relative <= PARITY:
        left_out[f"{name}, place by place"], artifact["step"] = _misses(relative), None


def _misses(relative: float) -> str:
    return f"differs by {relative:.2g} from the trained model, which is more than {PARITY:g}"


def _seal(folder: Path, facts: Facts, files: Mapping[str, bytes]) -> None:
    """Writes the card and the sums."""
    said = {
        name: File(len(content), sha256(content).hexdigest()) for name, content in files.items()
    }
    facts["files"] = {
        name: {"bytes": file.size, "sha256": file.sha256} for name, file in said.items()
    }
    card = json.dumps(facts, indent=1, ensure_ascii=False).encode() + b"\n"
    (folder / CARD).write_bytes(card)
    (folder / SUMS).write_text(sums_of(sha256(card).hexdigest(), said), encoding="utf-8")
