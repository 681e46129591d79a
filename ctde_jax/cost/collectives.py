"""The collectives of a compiled program, and who sends how many bytes to whom in each.

A collective over a group of `g` devices that each put in `n` bytes makes each of them send

    all-reduce          2 (g - 1) / g x n    once around the ring to sum, once more to tell
    reduce-scatter        (g - 1) / g x n
    all-gather            (g - 1)     x n
    all-to-all            (g - 1) / g x n    an equal share to each of the others
    collective-permute                  n    nothing from a device that is in no pair

A ring goes through its group in the order of the program's listing and back to its start, and a device sends only to
the next one; so what crosses from one host to another is sent where two neighbors of a listing live on different ones.

Of the branches of a conditional the one that sends most counts; its collectives are marked `certain=False` unless all
branches send the same.
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
    """A collective of a compiled program; bytes are those of one launch."""

    op: str
    dtypes: tuple[str, ...]
    """What travels, as HLO writes it; a tuple as merged messages may differ."""

    payload: int
    """Bytes that each device puts in."""

    group_size: int
    """Devices that exchange with each other; for a permutation those that send."""

    loops: tuple[int, ...]
    """How often each of the loops around it turns, the outermost first; the loop over rounds counts as one turn."""

    certain: bool
    """False where a conditional may send something else instead, at most as much."""

    sent: float
    """Bytes that leave a device, the one that sends most."""

    total: float
    """Bytes that leave all devices together."""

    across: float
    """Those of the total that leave a host."""

    @property
    def times(self) -> int:
        """Launches in one call of the program, or in a round where it loops over rounds."""
        return prod(self.loops)


def read(hlo_text: str, hosts: Sequence[int] | None = None) -> list[Collective]:
    """Lists the collectives of a compiled program that send something.

    An outermost loop that turns as often as the program is told is one over rounds, of which one is counted; where
    there are several such loops, only that of the last, which goes through what blocks of rounds have left.

    Args:
        hlo_text: `compiled.as_text()`.
        hosts: The process of each device; by default all are on one host.

    Raises:
        InputError: Another loop with collectives turns an unknown number of times, or a collective's bytes cannot be
            known.
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
"""Who sends how many bytes to whom."""


def _walk(frame: hlo.Frame, loops: tuple[int, ...], hosts: Sequence[int]) -> list[Collective]:
    found, in_rounds = [], []
    for instruction in frame.computation.instructions.values():
        op = instruction.opcode.removesuffix("-start")
        if op.endswith(("-done", "-update")):
            continue
        if op in _UNCOUNTABLE and "is_host_transfer=true" not in instruction.attributes:
            raise InputError(
                "hlo_text",
                f"must send what can be counted before it runs, got {op} %{instruction.name}.",
            )
        if op in _COLLECTIVES:
            found += _collective(op, instruction, frame, loops, hosts)
        elif op == "while":
            turns = hlo.trip_count(instruction, frame)
            inside = _loop(instruction, turns, frame, loops, hosts)
            if turns is None and not loops:
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
    turns: int | None,
    frame: hlo.Frame,
    loops: tuple[int, ...],
    hosts: Sequence[int],
) -> list[Collective]:
    counted = int(not loops) if turns is None else turns
    found: list[Collective] = []
    for name, times in zip(loop.called("body", "condition"), (counted, counted + 1), strict=True):
        found += _walk(frame.enter(name, loop), (*loops, times), hosts)
    if found and turns is None and loops:
        raise InputError(
            "hlo_text",
            f"must say how often its loops with collectives turn, but %{loop.name} turns until a condition holds; "
            "use lax.scan, or lax.fori_loop with constant bounds.",
        )
    return [one for one in found if one.times]


def _largest_branch(
    conditional: hlo.Instruction, frame: hlo.Frame, loops: tuple[int, ...], hosts: Sequence[int]
) -> list[Collective]:
    names = conditional.called("branch_computations", "true_computation", "false_computation")
    branches = [_walk(frame.enter(name, conditional), loops, hosts) for name in names]
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
    operands = [frame.computation.instructions[name].shape for name in instruction.operands]
    payload = sum(map(hlo.count_bytes, operands))
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
        share = payload / len(group)
        return [(source, target, share) for source in group for target in group if source != target]
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
    """Reads `{{0,1},{2,3}}`, `{}` for all, or the iota form `[groups,size]<=[dimensions]T(permutation)`."""
    iota = re.fullmatch(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if not iota:
        return _lists(text) or [list(range(devices))]
    shape, dimensions, permutation = (_integers(part or "") for part in iota.groups())
    numbers = np.arange(prod(dimensions)).reshape(dimensions)
    return numbers.transpose(permutation or range(len(dimensions))).reshape(shape).tolist()


def _lists(text: str) -> list[list[int]]:
    return [_integers(numbers) for numbers in re.findall(r"\{([\d,]+)\}", text)]


def _integers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]
