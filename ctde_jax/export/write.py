"""Writes a trained model as a bundle.

Each format is run as on a node, and kept only if its outputs agree with those of the trained model.
"""

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
from ctde_jax.export.program import Inference, LeftOut, leaving_out, make_program
from ctde_jax.export.stablehlo import to_stablehlo
from ctde_jax.export.weights import find_layers, gather, to_safetensors
from ctde_jax.models import count_params
from ctde_jax.trainer import Trained, accepts, console

Format = Literal["numpy", "onnx", "jax", "onnx-int8"]
FORMATS: tuple[Format, ...] = get_args(Format)
DEFAULT: tuple[Format, ...] = ("numpy", "onnx", "jax")

# Packages whose versions are recorded in the card, if they are installed.
_PACKAGES = ("ctde_jax", "jax", "flax", "numpy", "jax2onnx", "onnx", "onnxruntime")
_MOST_EXAMPLE_BYTES = 2**20

Facts = dict[str, Any]


class Written(NamedTuple):
    """Result of `write_bundle`."""

    bundle: Bundle
    left_out: Mapping[str, str]
    """The requested formats that are not in the bundle, each with the reason."""


class _Form(NamedTuple):
    """The model in one format."""

    file: str
    content: bytes
    step: tuple[str, bytes] | None = None
    """Name and content of the file that processes one position of a sequence, if there is one."""


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
    """Writes a trained model as a folder that runs on any node, with measurements of each format.

    Each format is run over the whole test split as on a node, with batches of 1, 3, 7 and 64. A
    format whose outputs differ from those of the trained model by more than `PARITY` is left out.
    "onnx-int8" may differ more; its receipt records the difference.

    Args:
        trained: Result of `fit`.
        data: Data set of the training; formats are measured on its test split, and the bundle
            contains its class names.
        folder: Folder to create; an existing bundle is replaced once the new one is complete.
        formats: Names of formats. "numpy" supports only perceptrons; "onnx" requires the extra
            `ctde_jax[onnx]`.
        examples: Maximum number of test examples in the bundle, in at most about a megabyte. They
            are stored with the outputs of the trained model, so that `verify bundle` can compare
            without the test split.
        options: Facts about the training to add to the card, serializable as JSON.
        show: Whether to show progress.

    Returns:
        The open bundle, and the reasons for formats that were left out.

    Raises:
        InputError: A format is unknown, `examples` is negative, the test averages differ from those
            of the training, the model does not return one float32 array or cannot be exported in
            any of the formats, or the folder cannot be written to or contains files that do not
            belong to a bundle.

    Examples:
        >>> model, data = ctde.models.mlp([64, 10]), ctde.data.digits()
        >>> trained = ctde.fit(model, data, optax.sgd(0.1), steps=1, show=False)
        >>> written = ctde.write_bundle(trained, data, "bundle", ["numpy"], show=False)
        >>> sorted(written.bundle.card.artifacts), written.left_out
        (['numpy'], {})
    """
    # Check the arguments.
    for name in formats:
        check_known("formats", name, FORMATS)
    check_at_least(0, examples=examples)

    # Write to a temporary folder, which replaces the target only after it is complete.
    given = folder
    folder = Path(folder).resolve()
    try:
        put_back(folder)  # undo an interrupted replacement, so that the check sees the old bundle
        _check_replaceable(folder)
        with written_whole(folder) as partial:
            left_out = _write(trained, data, partial, formats, examples, options, show)
    except OSError as error:
        raise InputError(
            "folder",
            f"must be a writable folder with enough free space, but writing to {given} failed: "
            f"{error.strerror}.",
        ) from error

    # The caller gets the path that it passed, not the resolved one.
    return Written(open_bundle(folder)._replace(folder=Path(given)), left_out)


def _check_replaceable(folder: Path) -> None:
    """Raises InputError unless the folder does not exist, or has only the files of a bundle."""
    if not folder.exists():
        return

    # The lines of the sums are `digest  name`, as `sha256sum` writes them.
    named = {CARD, SUMS}
    if (folder / SUMS).is_file():
        named |= {
            line.split("  ", 1)[-1]
            for line in (folder / SUMS).read_text("utf-8", "replace").splitlines()
        }
    others = {path.name for path in folder.iterdir()} - named if folder.is_dir() else {folder.name}
    if others or not (folder / SUMS).is_file() or not (folder / CARD).is_file():
        content = f", which contains {min(others)}" if others else ""
        raise InputError(
            "folder",
            f"must be new or an existing bundle, got {folder}{content}; choose another folder.",
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
    """Writes a bundle to an empty folder; returns the reasons for formats that were left out.

    Arguments and exceptions are those of `write_bundle`.
    """
    # Check the model, and that the data are those of the training, before the export.
    _check_outputs(trained, data)
    measured = trained.evaluate(data.test)
    receipt.check_same(trained, measured)

    # Export in each format.
    few = np.asarray(data.test.inputs[:64])
    weights = gather(trained, data)
    reference = receipt.make_reference(trained)
    layers = find_layers(trained, weights, few)
    forms, left_out = _make_forms(
        trained, data, formats, to_safetensors(weights), layers is not None
    )
    _check_any(forms, left_out)

    # Write the files: weights, artifacts, their step files, and examples.
    files = {WEIGHTS: to_safetensors(weights)}
    files |= {form.file: form.content for form in forms.values()}
    files |= {
        name: content for form in forms.values() if form.step for name, content in [form.step]
    }
    if examples:
        files[EXAMPLES] = _examples(reference, data.test, examples)
    for name, content in files.items():
        (folder / name).write_bytes(content)

    # A preliminary card, with empty receipts, so that the bundle can be opened as on a node.
    facts = _facts(trained, data, options)
    facts["layers"] = layers and {"activation": layers.activation, "kernels": list(layers.kernels)}
    facts["artifacts"] = {
        name: {"file": form.file, "step": form.step and form.step[0], "receipt": {}}
        for name, form in forms.items()
    }
    _seal(folder, facts, files)

    # Measure. This fills in receipts and drops formats that fail.
    bundle = open_bundle(folder)
    _measure(bundle, facts, left_out, trained, data, reference, show)
    facts["trained_model"]["measured"] = measured
    _check_any(facts["artifacts"], left_out)

    # Remove the files of dropped formats, and write the final card.
    artifacts = facts["artifacts"].values()
    kept = {artifact[kind] for artifact in artifacts for kind in ("file", "step")}
    kept |= {WEIGHTS, EXAMPLES}
    for name in files.keys() - kept:
        (folder / name).unlink()
    facts["left_out"] = left_out
    _seal(folder, facts, {name: content for name, content in files.items() if name in kept})
    return left_out


def _check_outputs(trained: Trained, data: Dataset) -> None:
    """Raises InputError unless the model returns one array, float32 `[examples, ...]`."""
    # Two examples, as axis 0 of a single one could be any axis of length 1.
    two = np.asarray(data.test.inputs[:1]).repeat(2, axis=0)
    outputs, _ = jax.eval_shape(trained.model.apply, trained.params, trained.model_state, two, None)
    leaves = jax.tree.leaves(outputs)
    if [*leaves] != [outputs]:
        rule = (
            f"must return one array to be exported, got a {type(outputs).__name__} of "
            f"{len(leaves)} arrays"
        )
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
    """Raises InputError, with the reasons in `left_out`, if there are no `forms`."""
    if not forms:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in left_out.items())
        raise InputError(
            "formats", f"must contain one in which the model can be exported ({reasons})."
        )


def _make_forms(
    trained: Trained, data: Dataset, formats: Sequence[Format], weights: bytes, is_perceptron: bool
) -> tuple[dict[str, _Form], dict[str, str]]:
    """Exports the model in each format.

    Args:
        trained: The model.
        data: Data set of the training.
        formats: Names of formats.
        weights: The arrays of the model in the safetensors format.
        is_perceptron: Whether the numpy runtime supports the model.

    Returns:
        The results by format, and the reasons for formats that were left out.
    """
    metadata = {"classes": data.classes, "vocabulary": data.vocabulary}

    # Traced at most once, and only if a format needs it.
    @cache
    def programs() -> tuple[Inference, Inference | None]:
        with leaving_out("jax.export"):
            return _programs(trained, data)

    def numpy() -> _Form:
        if not is_perceptron:
            raise LeftOut("supports only float32 dense layers with one activation between them")

        # The artifact is the file of the weights itself.
        return _Form(WEIGHTS, weights)

    def in_jax() -> _Form:
        whole, step = programs()
        return _Form(
            "model.stablehlo",
            to_stablehlo(whole),
            step and ("step.stablehlo", to_stablehlo(step)),
        )

    # Shared by onnx and onnx-int8.
    @cache
    def whole_in_onnx() -> bytes:
        return to_onnx(programs()[0], ["inputs"], ["outputs"], metadata)

    def onnx() -> _Form:
        # The step reads `inputs` and `carry_0`, ..., and returns `outputs` and `next_0`, ...
        step = programs()[1]
        carried = [] if step is None else [f"carry_{index}" for index in range(len(step.like) - 1)]
        names = [name.replace("carry", "next") for name in carried]
        return _Form(
            "model.onnx",
            whole_in_onnx(),
            step
            and (
                "step.onnx",
                to_onnx(step, ["inputs", *carried], ["outputs", *names], metadata),
            ),
        )

    # A format that cannot express the model is left out.
    writers: Mapping[str, Callable[[], _Form]] = {
        "numpy": numpy,
        "jax": in_jax,
        "onnx": onnx,
        "onnx-int8": lambda: _Form("model.int8.onnx", to_int8(whole_in_onnx())),
    }
    forms = {}
    left_out = {}
    for name in formats:
        try:
            forms[name] = writers[name]()
        except LeftOut as error:
            left_out[name] = str(error)
    return forms, left_out


def _programs(trained: Trained, data: Dataset) -> tuple[Inference, Inference | None]:
    """Returns the program of the model, and that of one position of a sequence or None.

    The latter requires a model with a `stream` whose initial carry is zero.
    """
    model = trained.model
    stream = trained.model.stream
    center = (trained.params, trained.model_state)
    shape = data.test.inputs.shape[1:]
    dtype = data.test.inputs.dtype

    # A key of None selects inference mode.
    whole = make_program(
        lambda inputs: [model.apply(*center, inputs, None)[0]], jax.ShapeDtypeStruct(shape, dtype)
    )
    if stream is None:
        return whole, None

    # A card has only the shapes of the carry, which is zero before the first position.
    start = stream.start(1)
    if any(np.any(part) for part in jax.tree.leaves(start)):
        return whole, None
    structure = jax.tree.structure(start)

    def step(inputs: jax.Array, *carry: jax.Array) -> list[jax.Array]:
        # The leaves of the carry are separate arguments and results, as artifacts have no pytrees.
        outputs, after = stream.step(*center, structure.unflatten(carry), inputs)
        return [outputs, *jax.tree.leaves(after)]

    carry = [jax.ShapeDtypeStruct(one.shape[1:], one.dtype) for one in jax.tree.leaves(start)]
    return whole, make_program(step, jax.ShapeDtypeStruct(shape[1:], dtype), *carry)


def _examples(reference: Predict, split: Split, most: int) -> bytes:
    """Serializes the first examples of a split with the outputs of the trained model.

    These are at most `most` examples and `_MOST_EXAMPLE_BYTES` bytes, but at least one example.
    """
    # The size of one example determines how many are kept.
    inputs, labels = (np.asarray(array[:1]) for array in split)
    each = inputs.nbytes + labels.nbytes + reference(inputs).nbytes
    count = max(1, min(most, _MOST_EXAMPLE_BYTES // each, len(split.inputs)))
    inputs, labels = (np.ascontiguousarray(array[:count]) for array in split)
    return to_safetensors({"inputs": inputs, "labels": labels, "outputs": reference(inputs)})


def _facts(trained: Trained, data: Dataset, options: Mapping[str, Any]) -> Facts:
    """Returns the facts of the card that are known before the formats are measured."""
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
        "recipe": None if data.recipe is None else data.recipe.facts,
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
    """Returns the largest uint8 input that a node accepts, as `Trained.predict` does.

    Returns 255 if the inputs are not uint8.
    """
    largest = accepts(data).inputs.largest
    return 255 if largest is None or data.test.inputs.dtype != np.uint8 else largest


def _versions() -> dict[str, str]:
    """Returns the versions of the installed packages among `_PACKAGES`."""
    found = {}
    for package in _PACKAGES:
        # Packages for optional formats may be missing.
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
    """Measures every artifact of a bundle, and adds the receipts to the facts of its card.

    Args:
        bundle: The bundle, opened as on a node.
        facts: Facts of the card. Receipts are added, and artifacts that fail are removed.
        left_out: Reasons by format, to which those of the removed artifacts are added.
        trained: The trained model.
        data: Data set whose test split is used.
        reference: Function of the trained model.
        show: Whether to show progress.
    """
    # A progress bar, on terminals only.
    screen = console(quiet=not show)
    artifacts = facts["artifacts"]
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=screen,
        transient=True,
        disable=not screen.is_terminal,
    )

    # Run each artifact over the test split, loaded as on a node.
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
            except InputError as error:  # the runtime is not installed, or refuses the file
                left_out[name] = f"cannot be measured on this machine: {error}"
                del artifacts[name]
                continue

            # An exact format must reach parity; of an inexact one, the difference must be finite.
            found["bytes"] = bundle.card.files[artifacts[name]["file"]].size
            if not found["relative"] <= (PARITY if is_exact(name) else sys.float_info.max):
                left_out[name] = _misses(found["relative"])
                del artifacts[name]
                continue
            contestants[name] = predict
            artifacts[name]["receipt"] = found
            if artifacts[name]["step"] is not None:
                _measure_steps(bundle, name, artifacts[name], left_out, reference, data)

        # Time all of them in the same turns, the trained model included.
        bar.update(task, description="timing")
        milliseconds = receipt.time_all(contestants, np.asarray(data.test.inputs[:64]))
    facts["trained_model"] = {"milliseconds": milliseconds.pop("trained model")}
    for name, quartiles in milliseconds.items():
        artifacts[name]["receipt"]["milliseconds"] = quartiles


def _measure_steps(
    bundle: Bundle,
    name: str,
    artifact: Facts,
    left_out: dict[str, str],
    reference: Predict,
    data: Dataset,
) -> None:
    """Compares an artifact that processes one position at a time with the trained model.

    The difference on at most 64 test sequences is added to the receipt. If it exceeds `PARITY`, the
    step file is removed from `artifact`, and the reason is added to `left_out`.
    """
    step = load_step(bundle, name)
    inputs = np.asarray(data.test.inputs[:64])
    assert step is not None

    # A carry starts at zero, with the shapes of the card.
    start = [np.zeros((len(inputs), *shape), np.float32) for shape in bundle.card.carry]
    relative = artifact["receipt"]["place_by_place"] = receipt.compare_steps(
        step, start, reference, inputs
    )
    if not relative <= PARITY:
        left_out[f"{name}, one position at a time"] = _misses(relative)
        artifact["step"] = None


def _misses(relative: float) -> str:
    return f"differs by {relative:.2g} from the trained model, which is more than {PARITY:g}"


def _seal(folder: Path, facts: Facts, files: Mapping[str, bytes]) -> None:
    """Writes the card, with the size and SHA-256 of each file, and the file of checksums.

    Args:
        folder: Folder of the bundle.
        facts: Facts of the card, to which `files` is added.
        files: Contents of all other files by name.
    """
    entries = {
        name: File(len(content), sha256(content).hexdigest()) for name, content in files.items()
    }
    facts["files"] = {
        name: {"bytes": file.size, "sha256": file.sha256} for name, file in entries.items()
    }

    # The sums contain the digest of the card, which contains those of all other files.
    card = json.dumps(facts, indent=1, ensure_ascii=False).encode() + b"\n"
    (folder / CARD).write_bytes(card)
    (folder / SUMS).write_text(sums_of(sha256(card).hexdigest(), entries), encoding="utf-8")
