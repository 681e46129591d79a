"""A bundle's card: what the model is, what goes in and comes out, and the SHA-256 of every file.

    bundle/
        card.json             see `Card`
        weights.safetensors   parameters and state by name, and what brings raw inputs to the scale of the model
        model.stablehlo       the model as a program of JAX, from raw inputs, for any number of them
        model.onnx            the same in ONNX
        step.stablehlo, .onnx what it does with one place of a sequence, where it can read place by place
        examples.safetensors  some test examples, with what the trained model says of them
        SHA256SUMS            of all of them, as `sha256sum --check` reads it

Nothing in a bundle is executed as code, and no byte is used that is not as it was written. Who wrote it is another
question: the sums guard against damage, and whoever knows the SHA-256 of the card from its author can insist on that.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from math import prod
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, get_args

from ctde_jax.bundle.accepted import Accepted
from ctde_jax.bundle.tensors import MOST_AXES
from ctde_jax.errors import InputError, quoted

T = TypeVar("T")
FORMAT = 1
CARD, SUMS, WEIGHTS, EXAMPLES = (
    "card.json",
    "SHA256SUMS",
    "weights.safetensors",
    "examples.safetensors",
)
DTYPES = ("uint8", "int32", "float32")
_LONGEST_CARD = 2**23
_LARGEST_ARRAY = 2**28
"""Numbers in one input or output."""

Facts = Mapping[str, Any]
"""What JSON can say."""


class File(NamedTuple):
    """What a card says of a file."""

    size: int  # bytes
    sha256: str


class Artifact(NamedTuple):
    """The model in the form that a runtime takes."""

    file: str
    step: str | None
    """Where it is for one place of a sequence."""

    receipt: Facts
    """What was measured of it when it was written; see `export/receipt.py`."""


Activation = Literal["tanh", "relu", "gelu", "silu"]


class Layers(NamedTuple):
    """A chain of dense layers, which needs no runtime but numpy."""

    activation: Activation
    """Between two layers."""

    kernels: tuple[str, ...]
    """Their names in the weights; the bias of each has `kernel` replaced by `bias`."""


@dataclass(frozen=True)
class Card:
    """What a bundle says of itself."""

    predicts: Literal["anything", "classes", "tokens"]
    """What outputs are: logits `[classes]`, logits `[length, vocabulary]`, or whatever the model was trained for."""

    input_shape: tuple[int, ...]
    """Of one example, as the data set stores it."""

    input_dtype: str
    highest: int
    """What white is in a picture of uint8, which reaches the model as 1."""

    output_shape: tuple[int, ...]
    """Of one example, float32."""

    carry: tuple[tuple[int, ...], ...]
    """Shapes of what is carried from place to place, for one example, float32 and zero at first; empty where the model
    does not read place by place."""

    classes: tuple[str, ...]
    vocabulary: tuple[str, ...]
    layers: Layers | None
    artifacts: Mapping[str, Artifact]
    """By the name of the runtime."""

    files: Mapping[str, File]
    versions: Mapping[str, str]
    """Of the packages that wrote the bundle."""

    facts: Facts
    """All that the card says."""

    columns: tuple[str, ...] = ()
    """The names of a table's features, in the order of the inputs; empty if they have no names."""

    @property
    def accepted(self) -> Accepted:
        """Which inputs the model takes."""
        is_dark = self.input_dtype == "uint8" and self.highest < 255
        largest = len(self.vocabulary) - 1 if self.vocabulary else self.highest if is_dark else None
        return Accepted(self.input_dtype, self.input_shape, largest)


class Bundle(NamedTuple):
    """An open bundle, whose card is as it was written."""

    folder: Path
    card: Card
    sha256: str
    """Of the card, and so of all that the card has sums of."""

    def read(self, name: str) -> bytes:
        """Reads a file of which every bit is as it was written.

        Raises:
            InputError: It is missing, or differs from its SHA-256.
        """
        said = self.card.files[name]
        content = _read(self.folder, name, said.size)
        if len(content) != said.size or sha256(content).hexdigest() != said.sha256:
            raise _faulty(self.folder, f"{name} differs from its SHA-256", "copy the bundle again")
        return content


def open_bundle(folder: Path | str, expect: str | None = None) -> Bundle:
    """Opens a bundle and reads its card.

    Args:
        folder: Of the bundle.
        expect: The SHA-256 of the card, or how it begins (eight digits or more), as its author has told it.

    Raises:
        InputError: It is no bundle, its card is damaged or another one than expected, it was written by a newer
            version, or what it says of itself makes no sense.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(
            "bundle", f"must be the folder of a bundle, and {quoted(str(folder))} is no folder."
        )
    if not (folder / CARD).exists() and (folder / "bundle" / CARD).exists():
        raise InputError(
            "bundle", f"must be the folder of a bundle, which in {folder} is {folder / 'bundle'}."
        )
    content = _read(folder, CARD, _LONGEST_CARD)
    found = sha256(content).hexdigest()
    sums = _read(folder, SUMS, _LONGEST_CARD)
    if not sums.startswith(f"{found}  {CARD}\n".encode()):
        raise _faulty(
            folder, f"{CARD} differs from what {SUMS} says of it", "copy the bundle again"
        )
    if expect is not None and not (
        re.fullmatch("[0-9a-f]{8,64}", expect.lower()) and found.startswith(expect.lower())
    ):
        rule = "must be eight or more of the first digits of the card's SHA-256"
        raise InputError(
            "expect", f"{rule}, got {quoted(expect)}, and that of {folder} is {found}."
        )
    try:
        facts = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise _faulty(folder, f"{CARD} is no JSON ({error})", "export the model again") from error
    try:
        card = _parse(facts)
    except _Odd as error:
        raise _faulty(folder, f"{CARD} {error}", "export the model again") from error
    except _Newer as error:
        raise InputError(
            "bundle", f"names {folder}, of {error}; install a newer ctde_jax."
        ) from error
    if sums != sums_of(found, card.files).encode():
        raise _faulty(folder, f"{SUMS} differs from what {CARD} says", "copy the bundle again")
    return Bundle(folder, card, found)


def sums_of(card: str, files: Mapping[str, File]) -> str:
    """Writes the SHA-256 of the card and of the files it names, as `sha256sum --check` reads them."""
    lines = {CARD: card} | {name: file.sha256 for name, file in files.items()}
    return "".join(f"{digest}  {name}\n" for name, digest in lines.items())


class _Odd(Exception):
    """A card says something that no card says."""


class _Newer(Exception):
    """A card was written by a newer version."""


def _parse(facts: Any) -> Card:
    facts = _check(facts, dict, "is no object")
    number = _take(facts, "format", int)
    if number > FORMAT:
        raise _Newer(f"format {number}, and this version reads up to {FORMAT}")
    files = {_name(name): _file(name, said) for name, said in _take(facts, "files", dict).items()}
    inputs, layers = _take(facts, "input", dict), facts.get("layers")
    carry = [_shape("carry", shape) for shape in _take(facts, "carry", list)]
    artifacts = {
        name: _artifact(name, said, files) for name, said in _take(facts, "artifacts", dict).items()
    }
    if layers is not None and WEIGHTS not in files:
        raise _Odd(f"has layers without {WEIGHTS}")
    card = Card(
        predicts=_one_of("predicts", facts.get("predicts"), ("anything", "classes", "tokens")),
        input_shape=_shape("input", inputs.get("shape")),
        input_dtype=_one_of("input", inputs.get("dtype"), DTYPES),
        highest=_highest(inputs.get("highest")),
        output_shape=_shape("output", _take(facts, "output", dict).get("shape")),
        carry=tuple(carry),
        classes=_names("classes", facts.get("classes")),
        vocabulary=_names("vocabulary", facts.get("vocabulary")),
        layers=None if layers is None else _layers(_check(layers, dict, "has odd layers")),
        artifacts=artifacts,
        files=files,
        versions={name: str(version) for name, version in _take(facts, "versions", dict).items()},
        facts=facts,
        columns=_names("columns", facts.get("columns", [])),
    )
    if card.columns and (len(card.columns),) != card.input_shape:
        raise _Odd(
            f"names {len(card.columns)} columns of inputs of the shape {list(card.input_shape)}"
        )
    axes = {"classes": 1, "tokens": 2}.get(card.predicts)
    names = card.vocabulary if card.predicts == "tokens" else card.classes
    if axes is not None and (len(card.output_shape) != axes or len(names) > card.output_shape[-1]):
        raise _Odd(
            f"says that outputs of the shape {list(card.output_shape)} are {card.predicts}, {len(names)} of them"
        )
    if (
        axes == 2
        and card.vocabulary
        and (card.input_shape, card.input_dtype) != (card.output_shape[:1], "int32")
    ):
        raise _Odd("has a vocabulary, and its input is no tokens")
    return card


def _check(value: Any, kind: type[T], fault: str) -> T:
    if not isinstance(value, kind) or isinstance(value, bool):
        raise _Odd(fault)
    return value


def _take(facts: Facts, name: str, kind: type[T]) -> T:
    return _check(facts.get(name), kind, f"does not say its {name}")


def _one_of(name: str, value: Any, known: tuple[Any, ...]) -> Any:
    if value not in known:
        raise _Odd(f"says of its {name} {quoted(value)}, which is none of {', '.join(known)}")
    return value


def _highest(value: Any) -> int:
    if not 0 < _check(value, int, "does not say what white is") < 256:
        raise _Odd(f"says that white is {value}")
    return value


def _shape(name: str, value: Any) -> tuple[int, ...]:
    fault = f"has an odd shape of its {name}"
    lengths = [_check(length, int, fault) for length in _check(value, list, fault)]
    is_odd = len(lengths) > MOST_AXES or not all(0 < length <= _LARGEST_ARRAY for length in lengths)
    if is_odd or prod(lengths) > _LARGEST_ARRAY:
        raise _Odd(f"has for its {name} the shape {quoted(lengths)}, which no example has")
    return tuple(lengths)


def _names(name: str, value: Any) -> tuple[str, ...]:
    return tuple(
        _check(each, str, f"has odd {name}") for each in _check(value, list, f"has odd {name}")
    )


def _name(name: str) -> str:
    """Lets through names of files that are in the bundle's own folder."""
    if not re.fullmatch(r"[a-z0-9][a-z0-9._-]{0,99}", name):
        raise _Odd(f"names the file {quoted(name)}, which is none of a bundle")
    return name


def _file(name: str, said: Any) -> File:
    said = _check(said, dict, f"says nothing of {name}")
    size, digest = _take(said, "bytes", int), _take(said, "sha256", str)
    if size < 0 or not re.fullmatch("[0-9a-f]{64}", digest):
        raise _Odd(f"has an odd size or SHA-256 of {name}")
    return File(size, digest)


def _artifact(name: str, said: Any, files: Facts) -> Artifact:
    said = _check(said, dict, f"says nothing of the artifact {quoted(name)}")
    file, step = _take(said, "file", str), said.get("step")
    for each in (file, *([] if step is None else [step])):
        if each not in files:
            raise _Odd(
                f"has the artifact {quoted(name)} in {quoted(each)}, which is none of its files"
            )
    receipt = _take(said, "receipt", dict)
    fault = f"has an odd receipt of the artifact {quoted(name)}"
    for number in (
        receipt.get("relative", 0.0),
        *_check(receipt.get("measured", {}), dict, fault).values(),
    ):
        if not isinstance(number, float | int):
            raise _Odd(fault)
    return Artifact(file, step, receipt)


def _layers(said: Facts) -> Layers:
    kernels = _names("layers", said.get("kernels"))
    return Layers(_one_of("activation", said.get("activation"), get_args(Activation)), kernels)


def _read(folder: Path, name: str, most: int) -> bytes:
    """Reads a file of the bundle; no more of it than it may be long."""
    path = folder / name
    try:
        if path.is_symlink() or not path.is_file():
            raise _faulty(folder, f"{name} is missing", "copy the bundle again")
        if path.stat().st_size > most:
            raise _faulty(folder, f"{name} is longer than it was written", "copy the bundle again")
        return path.read_bytes()
    except OSError as error:
        raise _faulty(
            folder, f"{name} cannot be read ({error.strerror})", "copy the bundle again"
        ) from error
    except MemoryError as error:
        raise _faulty(
            folder, f"{name} is larger than the memory here", "take another machine"
        ) from error


def _faulty(folder: Path, fault: str, way_out: str) -> InputError:
    return InputError("bundle", f"names {folder}, whose {fault}: {way_out}.")
