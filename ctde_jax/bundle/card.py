"""The card of a bundle: the model, its inputs and outputs, and the SHA-256 of every file.

    bundle/
        card.json             see `Card`
        weights.safetensors   parameters and model state by name, and the scaling of raw inputs
        model.stablehlo       the model as a JAX program, for any batch size
        model.onnx            the same in ONNX
        step.stablehlo, .onnx the model for one position of a sequence, if it can run stepwise
        examples.safetensors  some test examples, with the outputs of the trained model
        SHA256SUMS            SHA-256 of all files, in the format of `sha256sum --check`

Models take raw inputs: in the dtype and scale in which the data set stores them. A bundle contains
no Python code, and a file is used only if it matches its SHA-256. The digests detect damage. To
detect forgery, pass the SHA-256 of the card that the author has published to `open_bundle`.
"""

import json
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from math import prod
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, get_args

from ctde_jax.bundle.accepted import Accepted
from ctde_jax.bundle.recipe import Recipe, parse_recipe
from ctde_jax.bundle.tensors import MOST_AXES
from ctde_jax.errors import InputError, quoted

T = TypeVar("T")
FORMAT = 1
CARD = "card.json"
SUMS = "SHA256SUMS"
WEIGHTS = "weights.safetensors"
EXAMPLES = "examples.safetensors"
DTYPES = ("uint8", "int32", "float32")

# In bytes.
_LONGEST_CARD = 2**23
_LARGEST_ARRAY = 2**28
"""Maximum number of elements in one input or output."""

Facts = Mapping[str, Any]
"""A JSON object."""


class File(NamedTuple):
    """Size and SHA-256 of a file, as listed in the card."""

    size: int  # bytes
    sha256: str


class Artifact(NamedTuple):
    """The model in the format of a runtime."""

    file: str
    """Name of the file with the model for whole examples."""

    step: str | None
    """Name of the file with the model for one position of a sequence, or None."""

    receipt: Facts
    """Measurements made at the export; see `export/receipt.py`."""


Predicts = Literal["anything", "classes", "tokens", "targets"]
Activation = Literal["tanh", "relu", "gelu", "silu"]


class Layers(NamedTuple):
    """A chain of dense layers, which runs with numpy alone."""

    activation: Activation
    """Activation function between two layers."""

    kernels: tuple[str, ...]
    """Names of the kernels in the weights, in the order of execution.

    The bias of a layer, if any, has the same name with `bias` instead of `kernel`.
    """


@dataclass(frozen=True)
class Card:
    """Content of a bundle's card."""

    predicts: Predicts
    """Output of one example.

    Logits `[classes]` for "classes", logits `[length, vocabulary]` for "tokens", any array for
    "anything". For "targets", `[targets]` in the units of the data set, or logits of labels that
    are 0 or 1.
    """

    input_shape: tuple[int, ...]
    """Shape of one example, as the data set stores it."""

    input_dtype: str
    highest: int
    """Value of a white pixel, to which .png files are scaled.

    If it is below 255, the model receives it as 1.0, and rejects larger uint8 inputs.
    """

    output_shape: tuple[int, ...]
    """Shape of the output for one example, float32."""

    carry: tuple[tuple[int, ...], ...]
    """Shapes of the carry between positions, for one example; empty if there is no step function.

    The carry is float32, and initially zero.
    """

    classes: tuple[str, ...]
    """Class names, in the order of the logits."""

    vocabulary: tuple[str, ...]
    """Characters of a language model, in the order of their tokens; else empty."""

    layers: Layers | None
    """The model as a chain of dense layers, for the numpy runtime; None if it is not one."""

    artifacts: Mapping[str, Artifact]
    """Artifacts by the name of the runtime."""

    files: Mapping[str, File]
    """All files of the bundle except the card and SHA256SUMS, by name."""

    versions: Mapping[str, str]
    """Versions of the packages that wrote the bundle."""

    facts: Facts
    """The whole card as JSON."""

    columns: tuple[str, ...] = ()
    """Names of a table's features, in the order of the inputs; empty if they have no names."""

    recipe: Recipe | None = None
    """Conversion of the rows of a table to inputs; None if nodes read the inputs themselves."""

    @property
    def accepted(self) -> Accepted:
        """Specification of the inputs that the model accepts."""
        # Tokens are bounded by the vocabulary, pixels by `highest` if it is below 255.
        is_dark = self.input_dtype == "uint8" and self.highest < 255
        largest = len(self.vocabulary) - 1 if self.vocabulary else self.highest if is_dark else None
        return Accepted(self.input_dtype, self.input_shape, largest)


class Bundle(NamedTuple):
    """An open bundle, whose card matches its SHA-256."""

    folder: Path
    card: Card
    sha256: str
    """SHA-256 of the card, which covers all files that the card lists."""

    def read(self, name: str) -> bytes:
        """Reads a file that the card lists, and checks its size and SHA-256.

        Raises:
            InputError: If the file is missing, cannot be read, or does not match the card.
        """
        # No more than the listed size is read into memory.
        entry = self.card.files[name]
        content = _read(self.folder, name, entry.size)
        if len(content) != entry.size or sha256(content).hexdigest() != entry.sha256:
            raise faulty(self.folder, f"{name} does not match its SHA-256", "copy the bundle again")
        return content


def open_bundle(folder: Path | str, expect: str | None = None) -> Bundle:
    """Opens a bundle and reads its card.

    Args:
        folder: Folder of the bundle.
        expect: SHA-256 of the card as published by its author, or its first eight or more digits.

    Raises:
        InputError: If the folder is not a bundle, its card or SHA256SUMS is damaged or invalid, the
            SHA-256 of the card does not start with `expect`, or a newer version of ctde_jax wrote
            the bundle.

    Examples:
        >>> model, data = ctde.models.mlp([64, 10]), ctde.data.digits()
        >>> trained = ctde.fit(model, data, optax.sgd(0.1), steps=1, show=False)
        >>> written = ctde.write_bundle(trained, data, "bundle", ["numpy"], show=False)
        >>> ctde.open_bundle("bundle").card.input_shape
        (8, 8)
    """
    # The folder of a run, which contains the bundle, is a common mistake.
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(
            "bundle", f"must be the folder of a bundle, but {quoted(str(folder))} is not a folder."
        )
    if not (folder / CARD).exists() and (folder / "bundle" / CARD).exists():
        raise InputError(
            "bundle", f"must be the folder of a bundle, got {folder}; pass {folder / 'bundle'}."
        )

    # Damage: the first line of SHA256SUMS is that of the card, in a format fixed to the byte.
    content = _read(folder, CARD, _LONGEST_CARD)
    found = sha256(content).hexdigest()
    sums = _read(folder, SUMS, _LONGEST_CARD)
    if not sums.startswith(f"{found}  {CARD}\n".encode()):
        raise faulty(folder, f"{CARD} does not match {SUMS}", "copy the bundle again")

    # Forgery: the author's digest, of which eight digits suffice.
    if expect is not None and not (
        re.fullmatch("[0-9a-f]{8,64}", expect.lower()) and found.startswith(expect.lower())
    ):
        rule = f"must be the first eight or more digits of the SHA-256 of {CARD}"
        raise InputError(
            "expect", f"{rule}, got {quoted(expect)}, but that of {folder} is {found}."
        )

    # Deeply nested JSON raises RecursionError.
    try:
        facts = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise faulty(
            folder, f"{CARD} is not valid JSON ({error})", "export the model again"
        ) from error
    try:
        card = _parse(facts)
    except _Odd as error:
        raise faulty(folder, f"{CARD} {error}", "export the model again") from error
    except _Newer as error:
        raise InputError(
            "bundle", f"{folder} has the {error}; install a newer ctde_jax."
        ) from error

    # The card lists the SHA-256 of every file, too, and both lists must agree.
    if sums != sums_of(found, card.files).encode():
        raise faulty(folder, f"{SUMS} does not match {CARD}", "copy the bundle again")
    return Bundle(folder, card, found)


def sums_of(card: str, files: Mapping[str, File]) -> str:
    """Returns the content of SHA256SUMS, in the format of `sha256sum --check`.

    Args:
        card: SHA-256 of the card.
        files: All other files by name.
    """
    # Two spaces stand between digest and name.
    lines = {CARD: card} | {name: file.sha256 for name, file in files.items()}
    return "".join(f"{digest}  {name}\n" for name, digest in lines.items())


class _Odd(Exception):
    """Raised if the card violates the schema."""


class _Newer(Exception):
    """Raised if the card was written by a newer version."""


def _parse(facts: Any) -> Card:
    # The format number comes first: a newer one may have a different schema.
    facts = _check(facts, dict, "is not a JSON object")
    number = _take(facts, "format", int)
    if number > FORMAT:
        raise _Newer(f"format {number}, but this version reads formats up to {FORMAT}")

    # Check the type and range of every field.
    files = {_name(name): _file(name, entry) for name, entry in _take(facts, "files", dict).items()}
    inputs = _take(facts, "input", dict)
    layers = facts.get("layers")
    carry = [_shape("carry", shape) for shape in _take(facts, "carry", list)]
    artifacts = {
        name: _artifact(name, entry, files)
        for name, entry in _take(facts, "artifacts", dict).items()
    }
    if layers is not None and WEIGHTS not in files:
        raise _Odd(f"has layers, but no {WEIGHTS}")
    card = Card(
        predicts=_one_of("predicts", facts.get("predicts"), get_args(Predicts)),
        input_shape=_shape("input", inputs.get("shape")),
        input_dtype=_one_of("input", inputs.get("dtype"), DTYPES),
        highest=_highest(inputs.get("highest")),
        output_shape=_shape("output", _take(facts, "output", dict).get("shape")),
        carry=tuple(carry),
        classes=_names("classes", facts.get("classes")),
        vocabulary=_names("vocabulary", facts.get("vocabulary")),
        layers=None if layers is None else _layers(_check(layers, dict, "has invalid layers")),
        artifacts=artifacts,
        files=files,
        versions={name: str(version) for name, version in _take(facts, "versions", dict).items()},
        facts=facts,
        columns=_names("columns", facts.get("columns", [])),
        recipe=_recipe(facts.get("recipe")),
    )

    # Named columns are the features of a table, one for each input.
    if card.columns and (len(card.columns),) != card.input_shape:
        raise _Odd(
            f"has {len(card.columns)} columns for inputs of the shape {list(card.input_shape)}"
        )

    # The recipe makes the inputs.
    if card.recipe is not None and (
        (len(card.recipe.features),),
        "float32",
    ) != (card.input_shape, card.input_dtype):
        raise _Odd(
            f"has a recipe of {len(card.recipe.features)} inputs for inputs of the shape "
            f"{list(card.input_shape)}"
        )

    # Outputs have one axis for classes or targets and two for tokens. There may be more logits than
    # names.
    axes = {"classes": 1, "targets": 1, "tokens": 2}.get(card.predicts)
    names = card.vocabulary if card.predicts == "tokens" else card.classes
    if axes is not None and (len(card.output_shape) != axes or len(names) > card.output_shape[-1]):
        raise _Odd(
            f"has outputs of the shape {list(card.output_shape)} for {len(names)} {card.predicts}"
        )

    # A language model maps one token per position to logits at the same position.
    if (
        axes == 2
        and card.vocabulary
        and (card.input_shape, card.input_dtype) != (card.output_shape[:1], "int32")
    ):
        raise _Odd("has a vocabulary, but its inputs are not tokens")
    return card


def _check(value: Any, kind: type[T], fault: str) -> T:
    # In Python, a boolean is an int.
    if not isinstance(value, kind) or isinstance(value, bool):
        raise _Odd(fault)
    return value


def _take(facts: Facts, name: str, kind: type[T]) -> T:
    return _check(facts.get(name), kind, f"has no valid {name}")


def _one_of(name: str, value: Any, known: tuple[Any, ...]) -> Any:
    if value not in known:
        raise _Odd(f"has the {name} {quoted(value)}, which is not one of {', '.join(known)}")
    return value


def _highest(value: Any) -> int:
    if not 0 < _check(value, int, "has no valid value of white") < 256:
        raise _Odd(f"has the value of white {value}, which is not from 1 to 255")
    return value


def _shape(name: str, value: Any) -> tuple[int, ...]:
    fault = f"has an invalid shape of its {name}"
    lengths = [_check(length, int, fault) for length in _check(value, list, fault)]
    # Bounds, so that an invalid card cannot make a runtime allocate any amount of memory.
    is_odd = len(lengths) > MOST_AXES or not all(0 < length <= _LARGEST_ARRAY for length in lengths)
    if is_odd or prod(lengths) > _LARGEST_ARRAY:
        raise _Odd(f"has for its {name} the invalid shape {quoted(lengths)}")
    return tuple(lengths)


def _names(name: str, value: Any) -> tuple[str, ...]:
    return tuple(
        _check(each, str, f"has invalid {name}")
        for each in _check(value, list, f"has invalid {name}")
    )


def _recipe(facts: Any) -> Recipe | None:
    try:
        return None if facts is None else parse_recipe(facts)
    except ValueError as error:
        raise _Odd(f"has a recipe that {error}") from error


def _name(name: str) -> str:
    """Returns the name; raises `_Odd` unless it is that of a file directly in the folder."""
    # Without separators and a leading dot, no name leads out of the folder.
    if not re.fullmatch(r"[a-z0-9][a-z0-9._-]{0,99}", name):
        raise _Odd(f"lists the file {quoted(name)}, whose name is invalid")
    return name


def _file(name: str, entry: Any) -> File:
    entry = _check(entry, dict, f"has no valid entry for {name}")
    size = _take(entry, "bytes", int)
    digest = _take(entry, "sha256", str)
    if size < 0 or not re.fullmatch("[0-9a-f]{64}", digest):
        raise _Odd(f"has an invalid size or SHA-256 of {name}")
    return File(size, digest)


def _artifact(name: str, entry: Any, files: Facts) -> Artifact:
    entry = _check(entry, dict, f"has no valid entry for the artifact {quoted(name)}")
    file = _take(entry, "file", str)
    step = entry.get("step")
    # The files must be listed, so that their SHA-256 is checked.
    for each in (file, *([] if step is None else [step])):
        if each not in files:
            raise _Odd(
                f"has the artifact {quoted(name)} in {quoted(each)}, which is not one of its files"
            )

    # Comparisons compute with these numbers of the receipt, so they must be finite.
    receipt = _take(entry, "receipt", dict)
    fault = f"has an invalid receipt of the artifact {quoted(name)}"
    for number in (
        receipt.get("relative", 0.0),
        *_check(receipt.get("measured", {}), dict, fault).values(),
    ):
        if not isinstance(number, float | int) or not abs(number) <= sys.float_info.max:
            raise _Odd(fault)
    return Artifact(file, step, receipt)


def _layers(entry: Facts) -> Layers:
    kernels = _names("layers", entry.get("kernels"))
    return Layers(_one_of("activation", entry.get("activation"), get_args(Activation)), kernels)


def _read(folder: Path, name: str, most: int) -> bytes:
    """Reads a file of the bundle.

    Raises:
        InputError: If the file is missing, is a symbolic link, has more than `most` bytes, or
            cannot be read.
    """
    # A symbolic link could lead out of the folder.
    path = folder / name
    try:
        if path.is_symlink() or not path.is_file():
            raise faulty(folder, f"{name} is missing", "copy the bundle again")
        if path.stat().st_size > most:
            raise faulty(folder, f"{name} is larger than expected", "copy the bundle again")
        return path.read_bytes()
    except OSError as error:
        raise faulty(
            folder, f"{name} cannot be read ({error.strerror})", "copy the bundle again"
        ) from error
    except MemoryError as error:
        raise faulty(folder, f"{name} does not fit into memory", "use another machine") from error


def faulty(folder: Path, fault: str, way_out: str) -> InputError:
    """Returns the InputError for a bundle.

    Args:
        folder: Folder of the bundle.
        fault: Reason for which it cannot be used, a clause.
        way_out: Remedy, as an imperative.
    """
    return InputError("bundle", f"{folder} cannot be used: {fault}; {way_out}.")
