"""Damaged and malicious bundles are refused with one sentence, before they run or use memory.

Damage changes bytes but not the checksums. An attacker can update the checksums; then the card and
the files are still validated, and errors of a runtime are also reported in one sentence.
"""

import json
import pickle
import random
import shutil
import struct
import tracemalloc
from collections.abc import Callable
from hashlib import sha256
from math import prod
from pathlib import Path
from typing import Any

import bundles
import numpy as np
import pytest

from ctde_jax import bundle as node
from ctde_jax import execute, verify
from ctde_jax.bundle import card as card_module
from ctde_jax.bundle.card import CARD, EXAMPLES, SUMS, WEIGHTS
from ctde_jax.errors import InputError
from ctde_jax.export.weights import to_safetensors

FILES = (CARD, SUMS, WEIGHTS, EXAMPLES, "model.onnx", "model.stablehlo")
USED = {WEIGHTS: "numpy", "model.onnx": "onnx", "model.stablehlo": "jax"}


@pytest.fixture
def copy(tmp_path) -> Path:
    return Path(shutil.copytree(bundles.written("mlp").bundle.folder, tmp_path / "bundle"))


def refuse(folder: Path) -> str:
    """Reads a bundle and runs its artifacts; one must be refused. Returns the error message."""

    def use() -> None:
        opened = node.open_bundle(folder)
        for name in opened.card.files:
            opened.read(name)
        for name in opened.card.artifacts:
            node.load(opened, name)(
                np.zeros((1, *opened.card.input_shape), opened.card.input_dtype)
            )

    with pytest.raises(InputError) as refusal:
        use()
    message = str(refusal.value)
    assert message.endswith((".", "?"))
    assert "\n" not in message
    assert "Traceback" not in message
    return message


def seal(folder: Path, card: Any = None, **files: bytes) -> None:
    """Writes files and updates all checksums, as an attacker would."""
    card = json.loads((folder / CARD).read_bytes()) if card is None else card
    for name, content in files.items():
        name = name.replace("_", ".")
        (folder / name).write_bytes(content)
        card["files"][name] = {"bytes": len(content), "sha256": sha256(content).hexdigest()}
    content = card if isinstance(card, bytes) else json.dumps(card).encode()
    (folder / CARD).write_bytes(content)
    lines = {CARD: sha256(content).hexdigest()}
    if isinstance(card, dict) and isinstance(card.get("files"), dict):
        lines |= {
            name: file.get("sha256")
            for name, file in card["files"].items()
            if isinstance(file, dict)
        }
    (folder / SUMS).write_text("".join(f"{digest}  {name}\n" for name, digest in lines.items()))


@pytest.mark.parametrize("name", FILES)
def test_flipped_bit_is_detected_in_every_file(name, copy):
    """Flips 20 random bits of each file, one at a time: 120 bundles."""
    path, draw = copy / name, random.Random(name)
    original = path.read_bytes()
    for _ in range(20):
        position, bit = draw.randrange(len(original)), draw.randrange(8)
        path.write_bytes(
            original[:position] + bytes([original[position] ^ 1 << bit]) + original[position + 1 :]
        )
        assert name in refuse(copy)


@pytest.mark.parametrize("name", FILES)
def test_truncated_extended_or_missing_file_is_detected(name, copy):
    path = copy / name
    original = path.read_bytes()
    for content in (b"", original[: len(original) // 2], original[:-1], original + b"\0"):
        path.write_bytes(content)
        refuse(copy)
    path.unlink()
    assert f"{name} is missing" in refuse(copy)
    path.symlink_to("/etc/passwd")
    assert f"{name} is missing" in refuse(copy)
    path.unlink()
    path.mkdir()
    assert f"{name} is missing" in refuse(copy)


def set_at(*keys: Any) -> Callable[[dict, Any], None]:
    """Returns a function that sets the value at these nested keys."""

    def set_value(card: dict, value: Any) -> None:
        for key in keys[:-1]:
            card = card[key]
        card[keys[-1]] = value

    return set_value


CARDS = {
    "format": [None, "1", 1.0, True, [1], -1.5],
    "predicts": [None, "anything else", 3, ["classes"]],
    "input": [None, [], {}, {"shape": [8, 8]}, {"dtype": "uint8"}],
    ("input", "shape"): [
        None,
        "8x8",
        [8, -8],
        [0],
        [8, 8.0],
        [True, 8],
        [2**40],
        [2**20, 2**20],
        [[8]],
        [None],
        [9, 8],
    ],
    ("input", "dtype"): [None, "object", "float64", "uint8; import os", 8, ["uint8"]],
    ("input", "highest"): [None, 0, 256, -1, "255", True],
    "output": [None, [], {}],
    ("output", "shape"): [[-1], [10**12], "ten", [2.5]],
    "carry": [None, [3], [["a"]], [[-1]], "none"],
    "classes": [None, [1, 2], "0123456789", {"0": 1}],
    "vocabulary": [None, [None], 5],
    "layers": [
        3,
        [],
        {},
        {"activation": "__import__", "kernels": []},
        {"activation": "tanh", "kernels": [1]},
        {"activation": "tanh", "kernels": ["no/such/kernel"]},
        {"activation": "tanh", "kernels": ["inputs/scale"]},
        {"activation": "tanh", "kernels": ["params/layers/1/kernel", "params/layers/0/kernel"]},
    ],
    "artifacts": [
        None,
        [],
        {"numpy": None},
        {"numpy": {"file": WEIGHTS}},
        {"numpy": {"file": "no", "receipt": {}}},
    ],
    ("artifacts", "numpy", "file"): [
        None,
        "../bundle/weights.safetensors",
        "/etc/passwd",
        "",
        CARD,
        ["weights.safetensors"],
    ],
    ("artifacts", "numpy", "step"): [3, "../step", "no.onnx"],
    ("artifacts", "numpy", "receipt"): [None, [], "good"],
    "files": [None, [], {}, {WEIGHTS: 3}, {WEIGHTS: {"bytes": 3}}],
    ("files", WEIGHTS, "bytes"): [None, -1, "3", 2.5, 3, 10**30],
    ("files", WEIGHTS, "sha256"): [None, "", "0" * 64, "g" * 64, 3],
    "versions": [None, [], "new"],
}
NAMES = [
    "../weights",
    "/etc/passwd",
    "a/b",
    "..",
    ".",
    "",
    "C:\\x",
    "a\0b",
    "~root",
    "-rf",
    ".hidden",
    "x" * 300,
    "a b",
]
INVALID = [(keys, value) for keys, values in CARDS.items() for value in values]


@pytest.mark.parametrize(("keys", "value"), INVALID, ids=lambda each: repr(each)[:40])
def test_invalid_card_with_valid_checksums_is_refused(keys, value, copy):
    card = json.loads((copy / CARD).read_bytes())
    set_at(*([keys] if isinstance(keys, str) else keys))(card, value)
    seal(copy, card)
    message = refuse(copy)
    assert str(copy) in message or "must be" in message


CONTRADICTIONS = {
    ("input", "dtype"): ["float32", "int32"],
    ("input", "shape"): [[9, 8], [64], []],
    ("output", "shape"): [[], [3], [10, 1], [11]],
    "predicts": ["tokens"],
    "classes": [[str(number) for number in range(11)]],
    ("artifacts", "numpy", "receipt"): [
        {"measured": 3},
        {"measured": {"loss": "x"}},
        {"relative": "small"},
    ],
}
"""Values that are valid in a card but contradict the files."""

ACCEPTED_BY_NUMPY = [
    (("input", "dtype"), "float32"),
    (("input", "dtype"), "int32"),
    (("input", "shape"), [64]),
]
"""The numpy runtime accepts any dtype and any shape with the size of the first layer."""

CONTRADICTION_CASES = [
    (runtime, keys, value)
    for runtime in USED.values()
    for keys, values in CONTRADICTIONS.items()
    for value in values
    if runtime != "numpy" or (keys, value) not in ACCEPTED_BY_NUMPY
]


@pytest.mark.parametrize(("runtime", "keys", "value"), CONTRADICTION_CASES, ids=repr)
def test_card_that_contradicts_its_files_is_reported_when_they_run(
    runtime, keys, value, copy, tmp_path, capsys
):
    card = json.loads((copy / CARD).read_bytes())
    set_at(*([keys] if isinstance(keys, str) else keys))(card, value)
    seal(copy, card)
    np.savez(
        tmp_path / "x.npz",
        x_test=np.zeros((2, *card["input"]["shape"]), card["input"]["dtype"]),
        y_test=[1, 2],
    )
    given = [str(copy), "--input", str(tmp_path / "x.npz"), "--runtime", runtime]
    for more in ([], ["--score"]):
        assert execute.main([*given, *more]) == 2
        captured = capsys.readouterr()
        assert captured.err.startswith("error: ")
        assert captured.err.count("\n") == 1


def test_control_characters_in_class_names_are_not_printed(copy, tmp_path, capsys):
    card = json.loads((copy / CARD).read_bytes())
    card["classes"] = ["\x1b[2J\n 1 9 1.0", *(f"\ud800{number}" for number in range(9))]
    seal(copy, card)
    np.save(tmp_path / "x.npy", np.random.default_rng(0).integers(0, 17, (9, 8, 8)))
    assert execute.main([str(copy), "--input", str(tmp_path / "x.npy")]) == 0
    output = capsys.readouterr().out
    assert output.count("\n") == 10
    assert output.replace("\n", "").isprintable()


@pytest.mark.parametrize("count", [1, 40])
def test_numbers_of_thousands_of_digits_are_never_multiplied(count, copy, monkeypatch):
    """The product of all numbers that fit into a card would take hours."""
    monkeypatch.setattr(
        card_module, "prod", lambda lengths: prod(lengths) if max(lengths) < 2**30 else 1 / 0
    )
    content = (
        (copy / CARD)
        .read_text()
        .replace("[\n   8,\n   8\n  ]", f"[{', '.join(['9' * 4300] * count)}]", 1)
    )
    assert content.count("9" * 4300) == count
    seal(copy, content.encode())
    refuse(copy)


def layer(bias: tuple[int, ...], kernel: tuple[int, ...] = (64, 16)) -> dict[str, np.ndarray]:
    """The weights of a perceptron whose first layer has these shapes."""
    return {
        "inputs/shift": np.zeros((), np.float32),
        "inputs/scale": np.ones((), np.float32),
        "params/layers/0/kernel": np.zeros(kernel, np.float32),
        "params/layers/0/bias": np.zeros(bias, np.float32),
        "params/layers/1/kernel": np.zeros((16, 10), np.float32),
        "params/layers/1/bias": np.zeros(10, np.float32),
    }


BROADCASTING = {
    "bias that is a column": layer((2**19, 1)),
    "kernel of three axes": layer((16,), (1, 64, 16)),
    "kernel for other inputs": layer((16,), (63, 16)),
    "shift that is larger than the inputs": {
        **layer((16,)),
        "inputs/shift": np.zeros((2**16, 1, 1), np.float32),
    },
}


@pytest.mark.parametrize("fault", BROADCASTING)
def test_weights_that_would_broadcast_are_refused_before_use(fault, copy):
    seal(copy, weights_safetensors=to_safetensors(BROADCASTING[fault]))
    tracemalloc.start()
    with pytest.raises(InputError, match=r"numpy rejects weights\.safetensors"):
        node.load(node.open_bundle(copy), "numpy")
    assert tracemalloc.get_traced_memory()[1] < 2**25
    tracemalloc.stop()


EXAMPLES_OF = {
    "no axis": ((), np.uint8, (0, 10)),
    "fewer outputs": ((3, 8, 8), np.uint8, (2, 10)),
    "other dtype": ((3, 8, 8), np.float32, (3, 10)),
    "other outputs": ((3, 8, 8), np.uint8, (3, 9)),
}


@pytest.mark.parametrize("fault", EXAMPLES_OF)
def test_examples_that_contradict_the_card_are_reported(fault, copy, capsys):
    inputs, dtype, outputs = EXAMPLES_OF[fault]
    arrays = {"inputs": np.zeros(inputs, dtype), "outputs": np.zeros(outputs, np.float32)}
    seal(copy, examples_safetensors=to_safetensors(arrays))
    assert verify.main(["bundle", str(copy)]) == 2
    assert "cannot be used: examples.safetensors is invalid" in capsys.readouterr().err


@pytest.mark.parametrize("name", NAMES, ids=lambda name: repr(name)[:20])
def test_file_outside_the_folder_is_never_opened(name, copy, monkeypatch):
    card = json.loads((copy / CARD).read_bytes())
    card["files"][name] = card["files"].pop(WEIGHTS)
    card["artifacts"]["numpy"]["file"] = name
    card["layers"] = None
    seal(copy, card)
    opened = []
    monkeypatch.setattr(
        Path, "read_bytes", lambda self, read=Path.read_bytes: opened.append(self) or read(self)
    )
    assert "lists the file" in refuse(copy)
    assert {path.name for path in opened} <= {CARD, SUMS}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"null",
        b"[]",
        b"3",
        b'"card"',
        b"{",
        b"\xff\xfe",
        b'{"format": 1}',
        b"[" * 100_000,
        b'{"format": ' + b"9" * 5000 + b"}",
        b'{"format": NaN}',
        pickle.dumps({"format": 1}),
    ],
    ids=lambda content: repr(content[:20]),
)
def test_malformed_card_is_refused(content, copy):
    seal(copy, content)
    refuse(copy)


def test_newer_format_is_refused(copy):
    card = json.loads((copy / CARD).read_bytes())
    seal(copy, {**card, "format": 2})
    assert "has the format 2, but this version reads formats up to 1; install" in refuse(copy)


def test_unknown_format_is_named_and_skipped(copy, tmp_path, capsys):
    """An earlier version wrote `litert`; the other formats still run."""
    card = json.loads((copy / CARD).read_bytes())
    card["artifacts"]["litert"] = card["artifacts"].pop("jax") | {"file": "model.tflite"}
    seal(copy, card, model_tflite=b"TFL3")
    images = bundles.trained("mlp")[1].test.inputs[:3]
    np.save(tmp_path / "x.npy", images)
    given = [str(copy), "--input", str(tmp_path / "x.npy")]
    assert execute.main(given) == 0
    assert verify.main(["bundle", str(copy)]) == 0
    assert "'litert': skipped, this version does not support the format" in capsys.readouterr().out
    assert execute.main([*given, "--runtime", "litert"]) == 2
    assert (
        capsys.readouterr().err
        == f"error: --runtime must be one of {', '.join(node.RUNTIMES)}, got 'litert'.\n"
    )

    card["artifacts"] = {"litert": card["artifacts"]["litert"]}
    seal(copy, card)
    assert execute.main(given) == 2
    rule = f"must be one of {', '.join(node.RUNTIMES)}, but {copy} has only ['litert']"
    assert capsys.readouterr().err == f"error: --runtime {rule}; export the model again.\n"
    assert verify.main(["bundle", str(copy)]) == 2
    assert (
        capsys.readouterr().err
        == "error: FOLDER has no artifact that can run on this machine; see the lines above.\n"
    )


def test_newer_jax_is_reported_before_its_file_is_read(copy):
    card = json.loads((copy / CARD).read_bytes())
    card["versions"]["jax"] = "99.1.0"
    seal(copy, card)
    with pytest.raises(
        InputError, match=r"jax must be at least 99\.1\.0, .* got .*; install jax 99\.1\.0 or newer"
    ):
        node.load(node.open_bundle(copy), "jax")


def safetensors(header: Any, content: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + content


FLOAT = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
MALFORMED = {
    "weights": [
        b"",
        b"\0" * 7,
        struct.pack("<Q", 2**63) + b"{}",
        safetensors(b"{}"),
        safetensors(b"["),
        safetensors([1, 2]),
        safetensors(b'{"a": ' * 100_000),
        safetensors({"inputs/shift": 3}),
        safetensors({"inputs/shift": {**FLOAT, "dtype": "O"}}, b"\0" * 4),
        safetensors({"inputs/shift": {**FLOAT, "shape": [2**40]}}, b"\0" * 4),
        safetensors({"inputs/shift": {**FLOAT, "shape": [-1]}}, b"\0" * 4),
        safetensors({"inputs/shift": {**FLOAT, "shape": [1.0]}}, b"\0" * 4),
        safetensors({"inputs/shift": {**FLOAT, "shape": "1"}}, b"\0" * 4),
        safetensors({"inputs/shift": {**FLOAT, "data_offsets": [0, 8]}}, b"\0" * 4),
        safetensors({"inputs/shift": {**FLOAT, "data_offsets": [-4, 0]}}, b"\0" * 4),
        safetensors({"inputs/shift": {**FLOAT, "data_offsets": [0]}}, b"\0" * 4),
        safetensors({"inputs/shift": {**FLOAT, "data_offsets": [2**70, 2**70 + 4]}}, b"\0" * 4),
        safetensors({"inputs/shift": FLOAT, "inputs/scale": FLOAT}, b"\0" * 4),
        pickle.dumps({"inputs/shift": np.zeros(1)}),
    ],
    "onnx": [b"", b"onnx", b"\0" * 1000, pickle.dumps(3), b"\x08\x0a" * 50],
    "stablehlo": [b"", b"MLIR", b"\0" * 1000, pickle.dumps(3), b"\xff" * 64],
}
FILE_OF = {"weights": "weights_safetensors", "onnx": "model_onnx", "stablehlo": "model_stablehlo"}


@pytest.mark.parametrize(
    ("kind", "content"),
    [(kind, content) for kind, contents in MALFORMED.items() for content in contents],
    ids=lambda each: repr(each)[:30],
)
def test_malformed_file_with_valid_checksums_is_refused(kind, content, copy):
    seal(copy, **{FILE_OF[kind]: content})
    runtime = USED[FILE_OF[kind].replace("_", ".")]
    with pytest.raises(InputError) as refusal:
        node.load(node.open_bundle(copy), runtime)
    assert " rejects " in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_onnx_file_reads_no_other_file(copy, tmp_path, monkeypatch):
    """External data of an ONNX file is never read, from any location, not even from memory."""
    onnx = pytest.importorskip("onnx")
    (tmp_path / "secret").write_bytes(b"\0" * 4096)
    (copy / "secret").write_bytes(b"\0" * 4096)
    monkeypatch.chdir(tmp_path)
    locations = [
        "secret",
        "./secret",
        "bundle/secret",
        "../secret",
        str(tmp_path / "secret"),
        "/etc/passwd",
    ]
    for location in [*locations, "*/_ORT_MEM_ADDR_/*"]:
        model = onnx.load_from_string((copy / "model.onnx").read_bytes())
        kernel = next(tensor for tensor in model.graph.initializer if len(tensor.dims) == 2)
        kernel.ClearField("raw_data")
        kernel.data_location = onnx.TensorProto.EXTERNAL
        kernel.external_data.add(key="location", value=location)
        seal(copy, model_onnx=model.SerializeToString())
        with pytest.raises(InputError, match="onnxruntime rejects "):
            node.load(node.open_bundle(copy), "onnx")


def test_pickles_are_never_read(copy, tmp_path, capsys):
    """Neither as a file of the bundle nor as an input."""
    mark = tmp_path / "mark"

    class Payload:
        def __reduce__(self):
            return Path.touch, (mark,)

    content = pickle.dumps(Payload())
    for name in ("weights_safetensors", "model_onnx", "model_stablehlo", "examples_safetensors"):
        damaged = Path(shutil.copytree(copy, tmp_path / name))
        seal(damaged, **{name: content})
        assert verify.main(["bundle", str(damaged)]) == 2
    np.save(tmp_path / "x.npy", np.array([Payload()]), allow_pickle=True)
    np.savez(tmp_path / "x.npz", x_test=np.array([Payload()]))
    for file in ("x.npy", "x.npz"):
        assert execute.main([str(copy), "--input", str(tmp_path / file)]) == 2
    assert "Traceback" not in capsys.readouterr().err
    assert not mark.exists()


def test_path_without_a_bundle_is_refused(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "none", tmp_path / "file", tmp_path):
        assert execute.main([str(path), "--input", "x.npy"]) == 2
        assert "error: BUNDLE " in capsys.readouterr().err
