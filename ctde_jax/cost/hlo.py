"""The text of a compiled program (optimized HLO) as data: which instruction runs where, and how often.

A program is a set of computations; an instruction may call further ones. A loop says how often it turns in
`known_trip_count` where the backend writes that down (CPU, GPU). Where it does not (TPU), the loop is read: those of
JAX's `scan` and `fori_loop` count from one number up to another in constant steps.
"""

import re
from collections.abc import Iterator
from math import ceil, prod
from typing import NamedTuple

from ctde_jax.errors import InputError


class Instruction(NamedTuple):
    """One line of a computation: `%name = shape opcode(operands), attributes`."""

    name: str
    shape: str
    opcode: str
    inside: str  # what stands in the parentheses: names, or the value of a constant
    attributes: str

    @property
    def operands(self) -> list[str]:
        """The names of the operands, in order."""
        return re.findall(r"%([\w.\-]+)", self.inside)

    def attribute(self, name: str) -> str:
        """Returns what follows `name=` up to the next attribute, or nothing."""
        match = re.search(rf"[ ,]{name}=(.*?)(?:, [\w\-]+=|$)", _QUOTED.sub('""', self.attributes))
        return match[1] if match else ""

    def called(self, *attributes: str) -> list[str]:
        """Returns the computations that these attributes name, in order."""
        return [
            name for key in attributes for name in re.findall(r"%([\w.\-]+)", self.attribute(key))
        ]


class Computation(NamedTuple):
    """Instructions by name, in the order in which they run."""

    name: str
    instructions: dict[str, Instruction]
    root: str  # the name of the result
    is_entry: bool


class Program(NamedTuple):
    """All computations of a program, and on how many devices it runs."""

    computations: dict[str, Computation]
    entry: Computation
    devices: int


class Frame(NamedTuple):
    """A computation as it is being called: by which instruction, and from where."""

    program: Program
    computation: Computation
    caller: "Frame | None" = None
    call: Instruction | None = None

    def enter(self, name: str, call: Instruction) -> "Frame":
        """Returns the frame of a computation that one of this frame's instructions calls."""
        return Frame(self.program, self.program.computations[name], self, call)


def parse(text: str) -> Program:
    """Reads the text of an HLO module, such as `compiled.as_text()`."""
    computations = {
        computation.name: computation for computation in _computations(text.splitlines())
    }
    entries = [computation for computation in computations.values() if computation.is_entry]
    if len(entries) != 1:
        raise InputError(
            "hlo_text",
            f"must be one HLO module, got a text with {len(entries)} ENTRY computations.",
        )
    header = re.search(r"^HloModule .*", text, re.MULTILINE)
    counts = [
        re.search(rf"{name}=(\d+)", header[0] if header else "")
        for name in ("replica_count", "num_partitions")
    ]
    return Program(computations, entries[0], prod(int(match[1]) for match in counts if match))


def count_bytes(shape: str) -> int:
    """Returns the bytes of an array or of a tuple of arrays."""
    return sum(_array_bytes(*array) for array in _arrays(shape))


def dtypes(shape: str) -> list[str]:
    """Returns the dtypes of an array or of a tuple of arrays, each as HLO writes it."""
    return [dtype for dtype, _, _ in _arrays(shape)]


def trip_count(loop: Instruction, frame: Frame) -> int | None:
    """Returns how often a `while` turns, None where that is not known before it runs."""
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
    if known:
        return int(known[1])
    condition, body = (frame.enter(name, loop) for name in loop.called("condition", "body"))
    test = condition.computation.instructions[condition.computation.root]
    if test.opcode != "compare" or "direction=LT" not in test.attributes:
        return None
    counter, limit = test.operands
    index = _loop_index(counter, condition)
    if index is None:
        return None
    start, stop, step = (
        _value(frame, loop.operands[0], index),
        _value(condition, limit),
        _moved(body, index),
    )
    if start is None or stop is None or not step:
        return None
    return max(0, ceil((stop - start) / step))


_QUOTED = re.compile(r'"(?:[^"\\]|\\.)*"')
_DEFINITION = re.compile(r"\s+(ROOT )?%([\w.\-]+) = (.*)")
_HEADER = re.compile(r"(ENTRY )?%([\w.\-]+) .*\{$")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,<=]*)\](\{[^}]*\})?")


def _computations(lines: list[str]) -> Iterator[Computation]:
    header, root, instructions = None, "", {}
    for line in lines:
        if match := _HEADER.match(line):
            header, root, instructions = match, "", {}
        elif header and line.startswith("}"):
            yield Computation(header[2], instructions, root, bool(header[1]))
            header = None
        elif header and (match := _DEFINITION.match(line)):
            instructions[match[2]] = _instruction(match[2], match[3])
            root = match[2] if match[1] else root


def _instruction(name: str, text: str) -> Instruction:
    end = _closing(text, 0) if text.startswith("(") else text.index(" ")
    shape, text = text[:end], text[end:].lstrip()
    opening = text.index("(")
    closing = _closing(text, opening)
    return Instruction(name, shape, text[:opening], text[opening + 1 : closing - 1], text[closing:])


def _closing(text: str, opening: int) -> int:
    """Returns the position after the parenthesis that closes the one at `opening`."""
    depth = 0
    for match in re.finditer(rf"{_QUOTED.pattern}|[()]", text[opening:]):
        depth += {"(": 1, ")": -1}.get(match[0], 0)
        if depth == 0:
            return opening + match.end()
    raise InputError(
        "hlo_text", f"must be the text of an HLO module, got an open parenthesis in {text[:80]!r}."
    )


def _arrays(shape: str) -> list[tuple[str, str, str]]:
    return _ARRAY.findall(shape)


def _array_bytes(dtype: str, dimensions: str, layout: str) -> int:
    elements = prod(int(size) for size in re.findall(r"\d+", dimensions))
    packed = re.search(r"E\((\d+)\)", layout)
    return ceil(elements * (int(packed[1]) if packed else _bits(dtype)) / 8)


def _bits(dtype: str) -> int:
    """Returns the bits that an element takes; where the layout does not pack them, that is a byte at least."""
    if dtype in ("token", "opaque"):
        return 0
    size = re.match(r"[a-z]+(\d+)", dtype)
    return max(8, int(size[1])) if size else 8


def _value(frame: Frame, name: str, index: int | None = None) -> int | None:
    """Returns the integer constant that an instruction, or element `index` of a tuple, is known to be."""
    instruction = frame.computation.instructions[name]
    match instruction.opcode:
        case "constant" if index is None and re.fullmatch(r"-?\d+", instruction.inside):
            return int(instruction.inside)
        case "copy" | "bitcast":
            return _value(frame, instruction.operands[0], index)
        case "tuple" if index is not None:
            return _value(frame, instruction.operands[index])
        case "get-tuple-element" if index is None:
            return _value(frame, instruction.operands[0], int(instruction.attribute("index")))
        case "parameter" if (
            index is not None and frame.call and frame.caller and frame.call.opcode == "while"
        ):
            (body,) = frame.call.called("body")
            moved = _moved(frame.caller.enter(body, frame.call), index)
            return _value(frame.caller, frame.call.operands[0], index) if moved == 0 else None
    return None


def _loop_index(name: str, frame: Frame) -> int | None:
    """Returns which element of the loop's state this is."""
    instruction = frame.computation.instructions[name]
    if instruction.opcode in ("copy", "bitcast"):
        return _loop_index(instruction.operands[0], frame)
    if instruction.opcode != "get-tuple-element":
        return None
    source = frame.computation.instructions[instruction.operands[0]]
    return int(instruction.attribute("index")) if source.opcode == "parameter" else None


def _moved(body: Frame, index: int) -> int | None:
    """Returns by how much one turn of a loop moves this element of its state, None where it is no constant."""
    instructions = body.computation.instructions
    root = instructions[body.computation.root]
    if root.opcode != "tuple":
        return None
    if _loop_index(root.operands[index], body) == index:
        return 0
    moved = instructions[root.operands[index]]
    while moved.opcode in ("copy", "bitcast"):
        moved = instructions[moved.operands[0]]
    if moved.opcode != "add" or _loop_index(moved.operands[0], body) != index:
        return None
    return _value(body, moved.operands[1])
