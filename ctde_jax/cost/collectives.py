"""The collectives of a compiled program, and the bytes that each sends between devices.

In a collective over a group of `g` devices that each contribute `n` bytes, each device sends

    all-reduce          2 (g - 1) / g x n    once around the ring to reduce, once more to broadcast
    reduce-scatter        (g - 1) / g x n
    all-gather            (g - 1)     x n
    all-to-all            (g - 1) / g x n    an equal part to every other device
    collective-permute                  n    nothing from a device that is in no pair

A ring visits its group in the order in which the program lists it and returns to the start, and a
device sends only to the next one. Bytes therefore cross hosts if two neighbors in the list are on
different hosts.

Of the branches of a conditional, the one that sends the most is counted. Its collectives are marked
`certain=False` unless all branches send the same.
"""

import re
from collections import Counter
from collections.abc import Sequence
from math import prod
from typing import NamedTuple

import numpy as np

from ctde_jax.cost import hlo
from ctde_jax.errors import InputError


class Collective(NamedTuple):
    """A collective of a compiled program; all numbers of bytes are those of one launch."""

    op: str
    """Name of the operation, such as `all-reduce`."""

    dtypes: tuple[str, ...]
    """Dtypes of the payload, as HLO writes them; merged messages may have several."""

    payload: int
    """Bytes that each device contributes."""

    group_size: int
    """Number of devices that communicate; for a permutation, of those that send."""

    loops: tuple[int, ...]
    """Trip counts of the enclosing loops, outermost first; a loop over rounds counts as 1."""

    certain: bool
    """False if other branches of a conditional send fewer bytes, so the count is an upper bound."""

    sent: float
    """Bytes sent by the device that sends the most."""

    total: float
    """Bytes sent by all devices together."""

    across: float
    """Part of `total` that is sent to another host."""

    @property
    def times(self) -> int:
        """Launches in one call of the program, or in one round if the program loops over rounds."""
        return prod(self.loops)


def read(hlo_text: str, hosts: Sequence[int] | None = None) -> list[Collective]:
    """Lists the collectives of a compiled program that send any bytes.

    An outermost loop whose trip count is not a constant is a loop over rounds, of which one round
    is counted. If several such loops contain collectives, only the last is counted, which runs the
    rounds that remain after the blocks of rounds.

    Args:
        hlo_text: Text of the optimized HLO module, `compiled.as_text()`.
        hosts: Process of each device (default: all devices are on one host).

    Raises:
        InputError: The text is not one HLO module, an inner loop with collectives has an unknown
            trip count, the bytes of a collective cannot be determined, or `hosts` has fewer entries
            than the program has devices.
    """
    program = hlo.parse(hlo_text)
    hosts = [0] * program.devices if hosts is None else hosts
    if len(hosts) < program.devices:
        raise InputError(
            "hosts", f"must name the host of each of {program.devices} devices, got {len(hosts)}."
        )
    return _walk(hlo.Frame(program, program.entry), (), hosts)


_COLLECTIVES = ("all-reduce", "reduce-scatter", "all-gather", "all-to-all", "collective-permute")
_UNCOUNTABLE = ("ragged-all-to-all", "collective-broadcast", "send", "recv")
_Link = tuple[int, int, float]
"""`(source device, target device, bytes)`"""


def _walk(frame: hlo.Frame, loops: tuple[int, ...], hosts: Sequence[int]) -> list[Collective]:
    found = []
    in_rounds = []
    for instruction in frame.computation.instructions.values():
        # An asynchronous collective is a `-start` with the payload and a `-done` without one.
        op = instruction.opcode.removesuffix("-start")
        if op.endswith(("-done", "-update")):
            continue

        # Transfers to and from the host do not leave the machine.
        if op in _UNCOUNTABLE and "is_host_transfer=true" not in instruction.attributes:
            raise InputError(
                "hlo_text",
                f"must only contain collectives of known size, got {op} %{instruction.name}.",
            )

        # Loops and conditionals have separate rules. Any other instruction that calls computations,
        # such as a call or a fusion, is assumed to run each of them once.
        if op in _COLLECTIVES:
            found += _collective(op, instruction, frame, loops, hosts)
        elif op == "while":
            trip_count = hlo.trip_count(instruction, frame)
            inside = _loop(instruction, trip_count, frame, loops, hosts)
            # The last loop over rounds replaces an earlier one, which runs blocks of rounds.
            if trip_count is None and not loops:
                in_rounds = inside or in_rounds
            else:
                found += inside
        elif op == "conditional":
            found += _largest_branch(instruction, frame, loops, hosts)
        else:
            for name in instruction.called("calls", "to_apply", "called_computations"):
                found += _walk(frame.enter(name, instruction), loops, hosts)
    return found + in_rounds


def _loop(
    loop: hlo.Instruction,
    trip_count: int | None,
    frame: hlo.Frame,
    loops: tuple[int, ...],
    hosts: Sequence[int],
) -> list[Collective]:
    # A loop of unknown trip count is one over rounds if it is outermost, and counts as one round.
    # An inner one counts as 0, which does not matter: it must not contain collectives.
    counted = int(not loops) if trip_count is None else trip_count

    # The condition of a loop runs once more than its body.
    found: list[Collective] = []
    for name, times in zip(loop.called("body", "condition"), (counted, counted + 1), strict=True):
        found += _walk(frame.enter(name, loop), (*loops, times), hosts)
    if found and trip_count is None and loops:
        raise InputError(
            "hlo_text",
            "must have a constant trip count for every loop with collectives within a round, but "
            f"%{loop.name} runs until a condition holds; use lax.scan, or lax.fori_loop with "
            "constant bounds.",
        )
    return [one for one in found if one.times]


def _largest_branch(
    conditional: hlo.Instruction, frame: hlo.Frame, loops: tuple[int, ...], hosts: Sequence[int]
) -> list[Collective]:
    # HLO has a list of branches for an index, and two attributes for a boolean.
    names = conditional.called("branch_computations", "true_computation", "false_computation")
    branches = [_walk(frame.enter(name, conditional), loops, hosts) for name in names]

    # The count is exact only if all branches send the same, in any order.
    largest = max(branches, key=lambda branch: sum(one.sent * one.times for one in branch))
    same = all(Counter(branch) == Counter(largest) for branch in branches)
    return [one._replace(certain=one.certain and same) for one in largest]


def _collective(
    op: str,
    instruction: hlo.Instruction,
    frame: hlo.Frame,
    loops: tuple[int, ...],
    hosts: Sequence[int],
) -> list[Collective]:
    # Bytes that a device contributes. Merged messages are several operands of one collective.
    operands = [frame.computation.instructions[name].shape for name in instruction.operands]
    payload = sum(map(hlo.count_bytes, operands))

    # Bytes between each pair of devices. A device that sends to itself sends nothing.
    if op == "collective-permute":
        pairs = _lists(instruction.attribute("source_target_pairs"))
        links = [(source, target, float(payload)) for source, target in pairs if source != target]
        group_size = len(links)
    else:
        groups = _groups(instruction.attribute("replica_groups"), frame.program.devices)
        links = [link for group in groups for link in _links(op, payload, group)]
        group_size = max(map(len, groups))
    if not payload or not links:
        return []

    # Bytes that leave each device, all devices, and a host.
    sent: dict[int, float] = {}
    for source, _, size in links:
        sent[source] = sent.get(source, 0.0) + size
    total = sum(size for _, _, size in links)
    across = sum(size for source, target, size in links if hosts[source] != hosts[target])
    dtypes = tuple(dict.fromkeys(dtype for shape in operands for dtype in hlo.dtypes(shape)))
    return [
        Collective(op, dtypes, payload, group_size, loops, True, max(sent.values()), total, across)
    ]


def _links(op: str, payload: int, group: list[int]) -> list[_Link]:
    others = len(group) - 1
    if op == "all-to-all":
        part = payload / len(group)
        return [(source, target, part) for source in group for target in group if source != target]

    # All others are rings: every device sends the same number of bytes to the next one.
    around = {
        "all-reduce": 2 * others * payload / len(group),
        "reduce-scatter": others * payload / len(group),
        "all-gather": float(others * payload),
    }[op]
    return [
        (source, target, around)
        for source, target in zip(group, group[1:] + group[:1], strict=True)
        if others
    ]


def _groups(text: str, devices: int) -> list[list[int]]:
    """Parses the attribute `replica_groups` of a collective to lists of device numbers.

    Its form is `{{0,1},{2,3}}`, `{}` for one group of all devices, or the iota form
    `[groups,size]<=[dimensions]T(permutation)`.
    """
    iota = re.fullmatch(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if not iota:
        return _lists(text) or [list(range(devices))]
    # Device numbers in an array of `dimensions`, transposed, then cut into rows of `size`.
    shape, dimensions, permutation = (_integers(part or "") for part in iota.groups())
    numbers = np.arange(prod(dimensions)).reshape(dimensions)
    return numbers.transpose(permutation or range(len(dimensions))).reshape(shape).tolist()


def _lists(text: str) -> list[list[int]]:
    return [_integers(numbers) for numbers in re.findall(r"\{([\d,]+)\}", text)]


def _integers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]
