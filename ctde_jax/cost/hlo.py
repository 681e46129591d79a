"""A parser for optimized HLO text: the instructions of a compiled program, and how often they run.

A program is a set of computations, whose instructions may call other computations. The trip count
of a loop is in `known_trip_count` if the backend writes it (CPU, GPU). If it does not (TPU), the
count is derived from the loop: those of JAX's `scan` and `fori_loop` count up to a limit in
constant steps.
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
    inside: str  # text in the parentheses: names of operands, or the value of a constant
    attributes: str

    @property
    def operands(self) -> list[str]:
        """The names of the operands, in order."""
        return re.findall(r"%([\w.\-]+)", self.inside)

    def attribute(self, name: str) -> str:
        """Returns the text from `name=` to the next attribute, or an empty string."""
        # Quoted strings may contain anything, also text that looks like an attribute.
        match = re.search(rf"[ ,]{name}=(.*?)(?:, [\w\-]+=|$)", _QUOTED.sub('""', self.attributes))
        return match[1] if match else ""

    def called(self, *attributes: str) -> list[str]:
        """Returns the names of the computations that these attributes contain, in order."""
        return [
            name for key in attributes for name in re.findall(r"%([\w.\-]+)", self.attribute(key))
        ]


class Computation(NamedTuple):
    """Instructions by name, in the order in which they run."""

    name: str
    instructions: dict[str, Instruction]
    root: str  # the name of the result
    is_entry: bool


class HloModule(NamedTuple):
    """All computations of a program, and the number of devices on which it runs."""

    computations: dict[str, Computation]
    entry: Computation
    devices: int


class Frame(NamedTuple):
    """A computation with its call: the instruction that calls it, and the frame of the caller.

    The frame of the entry computation has neither.
    """

    program: HloModule
    computation: Computation
    caller: "Frame | None" = None
    call: Instruction | None = None

    def enter(self, name: str, call: Instruction) -> "Frame":
        """Returns the frame of the computation `name`, called by an instruction of this frame."""
        return Frame(self.program, self.program.computations[name], self, call)


def parse(text: str) -> HloModule:
    """Parses the text of an HLO module, such as `compiled.as_text()`.

    Raises:
        InputError: The text is not one HLO module.
    """
    computations = {
        computation.name: computation for computation in _computations(text.splitlines())
    }
    entries = [computation for computation in computations.values() if computation.is_entry]
    if len(entries) != 1:
        raise InputError(
            "hlo_text",
            f"must be one HLO module, got a text with {len(entries)} ENTRY computations.",
        )

    # A program runs on replicas times partitions; HLO leaves out a number that is 1.
    header = re.search(r"^HloModule .*", text, re.MULTILINE)
    counts = [
        re.search(rf"{name}=(\d+)", header[0] if header else "")
        for name in ("replica_count", "num_partitions")
    ]
    return HloModule(computations, entries[0], prod(int(match[1]) for match in counts if match))


def count_bytes(shape: str) -> int:
    """Returns the bytes of a shape, which is that of an array or of a tuple of arrays."""
    return sum(_array_bytes(*array) for array in _arrays(shape))


def dtypes(shape: str) -> list[str]:
    """Returns the dtypes of an array or of a tuple of arrays, as HLO writes them."""
    return [dtype for dtype, _, _ in _arrays(shape)]


def trip_count(loop: Instruction, frame: Frame) -> int | None:
    """Returns the trip count of a `while`, or None if it is not known at compile time."""
    # CPU and GPU: the compiler has written it.
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
    if known:
        return int(known[1])

    # TPU: derive it if the condition is `counter < limit`, as in loops of JAX.
    condition, body = (frame.enter(name, loop) for name in loop.called("condition", "body"))
    test = condition.computation.instructions[condition.computation.root]
    if test.opcode != "compare" or "direction=LT" not in test.attributes:
        return None
    counter, limit = test.operands
    index = _loop_index(counter, condition)
    if index is None:
        return None

    # The count follows from three constants: the initial value, the limit and the step.
    start = _value(frame, loop.operands[0], index)
    stop = _value(condition, limit)
    step = _increment(body, index)
    if start is None or stop is None or not step:
        return None
    return max(0, ceil((stop - start) / step))


# A quoted string, with escaped quotes inside.
_QUOTED = re.compile(r'"(?:[^"\\]|\\.)*"')
# `  ROOT %name = shape opcode(operands), attributes`
_DEFINITION = re.compile(r"\s+(ROOT )?%([\w.\-]+) = (.*)")
# `ENTRY %name (parameters) -> shape {`
_HEADER = re.compile(r"(ENTRY )?%([\w.\-]+) .*\{$")
# `f32[8,128]{1,0}`: dtype, dimensions and layout.
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,<=]*)\](\{[^}]*\})?")


def _computations(lines: list[str]) -> Iterator[Computation]:
    # `header` is None outside of a computation.
    header = None
    root = ""
    instructions = {}
    for line in lines:
        if match := _HEADER.match(line):
            header = match
            root = ""
            instructions = {}
        elif header and line.startswith("}"):
            yield Computation(header[2], instructions, root, bool(header[1]))
            header = None
        elif header and (match := _DEFINITION.match(line)):
            instructions[match[2]] = _instruction(match[2], match[3])
            root = match[2] if match[1] else root


def _instruction(name: str, text: str) -> Instruction:
    # A tuple shape contains spaces, so it ends at its closing parenthesis.
    end = _closing(text, 0) if text.startswith("(") else text.index(" ")
    shape = text[:end]
    text = text[end:].lstrip()

    # The rest is `opcode(operands), attributes`.
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
    # `E(4)` in the layout: elements of 4 bits are packed, two to a byte.
    packed = re.search(r"E\((\d+)\)", layout)
    return ceil(elements * (int(packed[1]) if packed else _bits(dtype)) / 8)


def _bits(dtype: str) -> int:
    """Returns the bits of an element if its layout is not packed: at least 8, or 0 for a token."""
    if dtype in ("token", "opaque"):
        return 0
    # `pred` has no number in its name and takes a byte.
    size = re.match(r"[a-z]+(\d+)", dtype)
    return max(8, int(size[1])) if size else 8


def _value(frame: Frame, name: str, index: int | None = None) -> int | None:
    """Returns the value of an instruction if it is a known integer constant, otherwise None.

    Args:
        frame: Frame of the computation that contains the instruction.
        name: Name of the instruction.
        index: Index of an element, whose value is returned, if the instruction is a tuple.
    """
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
            # An element of a loop's state that the body does not change keeps its initial value.
            (body,) = frame.call.called("body")
            increment = _increment(frame.caller.enter(body, frame.call), index)
            return _value(frame.caller, frame.call.operands[0], index) if increment == 0 else None
    return None


def _loop_index(name: str, frame: Frame) -> int | None:
    """Returns the index of an instruction's value in the loop state, or None if it has none.

    Args:
        name: Name of the instruction.
        frame: Frame of the body or the condition of the loop.
    """
    instruction = frame.computation.instructions[name]
    if instruction.opcode in ("copy", "bitcast"):
        return _loop_index(instruction.operands[0], frame)
    if instruction.opcode != "get-tuple-element":
        return None
    source = frame.computation.instructions[instruction.operands[0]]
    return int(instruction.attribute("index")) if source.opcode == "parameter" else None


def _increment(body: Frame, index: int) -> int | None:
    """Returns the constant that an iteration adds to an element of the loop state, or None.

    Args:
        body: Frame of the body of the loop.
        index: Index of the element in the loop state.
    """
    # The body returns the new state as a tuple.
    instructions = body.computation.instructions
    root = instructions[body.computation.root]
    if root.opcode != "tuple":
        return None
    if _loop_index(root.operands[index], body) == index:
        return 0

    # Otherwise the new element must be the sum of the old one and a constant, in either order.
    updated = instructions[root.operands[index]]
    while updated.opcode in ("copy", "bitcast"):
        updated = instructions[updated.operands[0]]
    if updated.opcode != "add":
        return None
    element, constant = updated.operands
    if _loop_index(element, body) != index:
        element, constant = constant, element
    if _loop_index(element, body) != index:
        return None

    # A second element is a constant only if the body does not change it.
    second = _loop_index(constant, body)
    if second is not None and _loop_index(root.operands[second], body) != second:
        return None
    return _value(body, constant)
