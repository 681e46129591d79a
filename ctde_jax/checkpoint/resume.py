"""Going on: where a run's folder has a checkpoint of the same run, or where another run is branched off."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ctde_jax.checkpoint.format import (
    Checkpoint,
    Damaged,
    Facts,
    newest,
    newest_intact,
    read,
    steps,
)
from ctde_jax.checkpoint.identity import Identity, is_identity
from ctde_jax.checkpoint.position import Position
from ctde_jax.checkpoint.run_folder import CHECKPOINTS, check_new, make_way
from ctde_jax.devices import hosts
from ctde_jax.errors import InputError


class Options(dict[str, Any]):
    """What determines the numbers of a run, by name.

    Args:
        options: The options.
        flag: How a command writes an option by its name; by default, messages name the arguments of `fit`.
    """

    def __init__(self, options: Mapping[str, Any] = {}, flag: Callable[[str], str] | None = None):
        super().__init__(options)
        self.flag = flag


Say = Callable[[str], None]

_IN_WORDS = {"steps": "the number of steps"}
"""Options that a user may have given by another name."""

_DECIDE_NOTHING = ("log_every",)
"""Options that older checkpoints list, and that may change in a run that continues."""


def plain(options: Mapping[str, Any]) -> dict[str, Any]:
    """Writes options in types of JSON."""

    def as_json(value: object) -> object:
        return value.item() if isinstance(value, np.generic) else str(value)

    return json.loads(json.dumps(options, default=as_json))


def find(
    folder: Path,
    resume: bool,
    branch_from: Path | None,
    options: Options,
    identity: Identity,
    say: Say,
) -> Checkpoint | None:
    """Returns the checkpoint from which a run continues: its newest intact one, or if it has none, another run's.

    Args:
        folder: The folder of the run.
        resume: Whether to continue the run that the folder holds; if not, that stays where it is for now.
        branch_from: The checkpoint of another run, for a new run.
        options: What decides the numbers of the run.
        identity: Of its data and program.
        say: Prints a line.

    Raises:
        InputError: The folder holds a run of other options, data or program, of which all differences are listed; or
            the other run's checkpoint is damaged.
    """
    make_way(folder, resume=True, say=say)
    found = newest_intact(folder / CHECKPOINTS, say) if resume else None
    if found is None:
        if resume:
            check_new(folder)
        return None if branch_from is None else _branch(branch_from, options, identity, say)
    check_facts(found, "run_dir")
    different, notes = _differences(found, options, identity)
    if different:
        ways = "another run_dir, resume=False to train from the start, or branch_from"
        if options.flag:
            ways = "another --run-dir, --resume never to train from the start, or --branch-from"
        raise InputError(
            "run_dir",
            f"holds a run with {'; '.join(different)}. Give {ways} {found.path} to continue it with the new ones.",
        )
    say(f"resume     {found.path}")
    for note in notes:
        say(f"           not compared with that run: {note}")
    return found


def completed(step: int, options: Options) -> str:
    """Returns the line that is printed of a run that was complete before it was called again."""
    way = (
        "--resume never or another --run-dir" if options.flag else "resume=False or another run_dir"
    )
    return f"complete   nothing was trained: this run was complete at step {step:,}; {way} trains it from the start"


def found_by_the_first(find: Callable[[], Checkpoint | None]) -> Checkpoint | None:
    """Returns on all hosts the checkpoint that host 0 finds, which alone must see its folder."""
    found: list[Checkpoint] = []

    def describe() -> Facts | None:
        checkpoint = find()
        if checkpoint is None:
            return None
        found.append(checkpoint)
        tensors = {
            name: [tensor.shape, str(tensor.dtype)] for name, tensor in checkpoint.tensors.items()
        }
        return {"path": str(checkpoint.path), "tensors": tensors, "facts": checkpoint.facts}

    told = hosts.of_the_first(describe)
    if told is None:
        return None
    like = (
        found[0].tensors
        if found
        else {name: np.zeros(*each) for name, each in told["tensors"].items()}
    )
    return Checkpoint(Path(told["path"]), hosts.arrays_of_the_first(like), told["facts"])


def _branch(path: Path, options: Options, identity: Identity, say: Say) -> Checkpoint:
    if (path / CHECKPOINTS).is_dir() and steps(path / CHECKPOINTS):
        raise InputError(
            "branch_from",
            f"must name a checkpoint, such as {newest(path / CHECKPOINTS)}, got a run.",
        )
    try:
        found = read(path)
    except Damaged as error:
        raise InputError(
            "branch_from", f"must name the folder of an intact checkpoint, but {error}."
        ) from error
    check_facts(found, "branch_from")
    gone_through = found.facts["position"]["gone_through"]
    if options["steps"] <= gone_through:
        longer = "--epochs or --steps" if options.flag else "epochs or steps"
        rule = f"must lead to a checkpoint from before the end of this run at step {options['steps']:,}"
        raise InputError(
            "branch_from",
            f"{rule}, got {path} of step {gone_through:,}; raise {longer}, which count from the start of its parent.",
        )
    different, _ = _differences(found, options, identity)
    others = "; all others as there" if different and options.flag else ""
    say(f"branch     {path}, with {'; '.join(different) or 'the same options'}{others}")
    return found


def check_facts(found: Checkpoint, option: str) -> None:
    """Raises InputError for a checkpoint that does not say what a run needs to go on."""
    kinds = {"position": dict, "rows": int, "replicas": int, "options": dict}
    for name, kind in kinds.items():
        if not isinstance(found.facts.get(name), kind):
            raise InputError(
                option,
                f"leads to the checkpoint {found.path}, whose manifest does not say its {name}.",
            )
    if "identity" in found.facts and not is_identity(found.facts["identity"]):
        raise InputError(
            option, f"leads to the checkpoint {found.path}, whose identity is not that of a run."
        )
    if not isinstance(found.facts.get("best"), dict | None):
        raise InputError(
            option, f"leads to the checkpoint {found.path}, whose best is not that of a run."
        )
    position = found.facts["position"]
    if position.keys() != {*Position._fields} or not all(
        isinstance(value, int | float) for value in position.values()
    ):
        raise InputError(
            option, f"leads to the checkpoint {found.path}, whose position is not that of a run."
        )


def different_options(before: Mapping[str, Any], now: Options) -> list[str]:
    """Lists the options that differ, with both values."""
    spelled, unknown = now.flag or str, "not known"

    def differs(name: str) -> str:
        if name == "init_from":  # whose values are digests
            are_given = None not in (before.get(name), now.get(name))
            why = ", which change if it names a run that is training (name one of its checkpoints, or a bundle)"
            return f"the initial parameters ({spelled(name)}){why if are_given else ''}"
        option = _IN_WORDS.get(name) or spelled(name)
        return f"{option} {before.get(name, unknown)} there and {now.get(name, unknown)} here"

    names = [name for name in dict.fromkeys((*before, *now)) if before.get(name) != now.get(name)]
    return [differs(name) for name in names if name not in _DECIDE_NOTHING]


def _differences(
    found: Checkpoint, options: Options, identity: Identity
) -> tuple[list[str], list[str]]:
    """Lists what differs between a checkpoint and a run, by kind, and what could not be compared.

    If options of a command line differ, they are the reason of whatever else does.
    """
    others = different_options(found.facts["options"], options)
    difference = identity.compare(found.facts.get("identity"))
    kinds = {"options": others, "data": difference.data, "program": difference.program}
    if others and options.flag:
        kinds = {"options": others}
    article = {"program": "another"}
    named = [
        f"{article.get(kind, 'other')} {kind}: {'; '.join(names)}"
        for kind, names in kinds.items()
        if names
    ]
    return named, difference.notes
