"""Resuming a run from its folder, or branching off from the checkpoint of another run."""

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
from ctde_jax.checkpoint.mirror import Mirror
from ctde_jax.checkpoint.position import Position
from ctde_jax.checkpoint.run_folder import CHECKPOINTS, check_new, make_way
from ctde_jax.devices import hosts
from ctde_jax.errors import InputError


class Options(dict[str, Any]):
    """Options that determine the result of a run, its parameters and metrics, by name.

    Args:
        options: Values by name.
        flag: Function from a name to the command-line option, for messages about a run of the
            command; None if the names are arguments of `fit`.
    """

    def __init__(self, options: Mapping[str, Any] = {}, flag: Callable[[str], str] | None = None):
        super().__init__(options)
        self.flag = flag


Say = Callable[[str], None]

_IN_WORDS = {"steps": "the number of steps"}
"""Descriptions of options that the user may have given in another form, such as epochs."""

_DECIDE_NOTHING = ("log_every",)
"""Options in older checkpoints that may change when a run continues."""


def plain(options: Mapping[str, Any]) -> dict[str, Any]:
    """Converts the values of options to types of JSON."""

    # numpy scalars become Python numbers; other unsupported types, such as paths, become strings.
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
    mirror: Mirror | None = None,
) -> Checkpoint | None:
    """Returns the newest intact checkpoint of a run or, if it has none, the one to branch from.

    If the mirror has a newer checkpoint than the folder, it is downloaded first.

    Args:
        folder: Folder of the run.
        resume: Whether to continue the run in the folder; if False, its checkpoints are ignored.
        branch_from: Checkpoint of another run, from which a new run branches off, or None.
        options: Options that determine the result of the run.
        identity: Digests of the data and the program of the run.
        say: Prints a line.
        mirror: Mirror of the run, or None.

    Returns:
        The checkpoint, or None if the run starts from the beginning.

    Raises:
        InputError: If the run in the folder or in the mirror has different options, data or
            program, which are listed, or no intact checkpoint; or if `branch_from` is not an intact
            checkpoint before the last step of this run.
    """
    # With `resume=True`, this only completes a move that was interrupted.
    make_way(folder, resume=True, say=say)
    found = newest_intact(folder / CHECKPOINTS, say) if resume else None
    notes = [] if found is None else _check_same(found, options, identity, "run_dir")

    # The mirror must be of this run as well, and may have a newer checkpoint.
    if mirror is not None and resume:

        def check(there: Checkpoint) -> None:
            notes[:] = _check_same(there, options, identity, "mirror")

        found = mirror.fetch(folder, found, check, say) or found
    elif mirror is not None:
        mirror.check_new()

    if found is None:
        if resume:
            check_new(folder)
        return None if branch_from is None else _branch(branch_from, options, identity, say)
    say(f"resume     {found.path}")
    for note in notes:
        say(f"           not compared with the checkpoint: {note}")
    return found


def completed(step: int, options: Options) -> str:
    """Returns the line to print if a run is already complete, so that nothing is trained."""
    way = (
        "--resume never or another --run-dir" if options.flag else "resume=False or another run_dir"
    )
    return (
        f"complete   nothing was trained, because this run is complete at step {step:,}; to train "
        f"it from the start, pass {way}"
    )


def found_by_the_first(find: Callable[[], Checkpoint | None]) -> Checkpoint | None:
    """Calls `find` on host 0, and returns its result on all hosts.

    Raises:
        InputError: On all hosts, if `find` raises it.
        HostLost: On the other hosts, if host 0 fails.
    """
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

    # All hosts must pass arrays of the same shapes, so the shapes are sent first.
    described = hosts.of_the_first(describe)
    if described is None:
        return None
    # Host 0 passes the tensors of the checkpoint, the others zeros of these shapes.
    like = (
        found[0].tensors
        if found
        else {name: np.zeros(*each) for name, each in described["tensors"].items()}
    )
    tensors = hosts.arrays_of_the_first(like)
    return Checkpoint(Path(described["path"]), tensors, described["facts"])


def _check_same(found: Checkpoint, options: Options, identity: Identity, option: str) -> list[str]:
    """Checks that a checkpoint belongs to this run.

    Args:
        found: The checkpoint, of which only the facts are read.
        options: Options that determine the result of the run.
        identity: Digests of the data and the program of the run.
        option: `run_dir` or `mirror`, the argument that refers to the checkpoint.

    Returns:
        Notes on the parts that were not compared.

    Raises:
        InputError: If it has different options, data or program, or a malformed manifest.
    """
    check_facts(found, option)
    different, notes = _differences(found, options, identity)
    if not different:
        return notes
    if option == "mirror":
        end = "Pass another address, or the options of that run."
    else:
        ways = "another run_dir, resume=False to train from the start, or branch_from"
        if options.flag:
            ways = "another --run-dir, --resume never to train from the start, or --branch-from"
        end = f"Pass {ways} {found.path} to continue that run with these changes."
    raise InputError(option, f"contains a run with {'; '.join(different)}. {end}")


def _branch(path: Path, options: Options, identity: Identity, say: Say) -> Checkpoint:
    # The path of a run instead of a checkpoint is a likely mistake, so suggest a checkpoint.
    if (path / CHECKPOINTS).is_dir() and steps(path / CHECKPOINTS):
        raise InputError(
            "branch_from",
            f"must be a checkpoint, such as {newest(path / CHECKPOINTS)}, got a run.",
        )
    try:
        found = read(path)
    except Damaged as error:
        raise InputError(
            "branch_from", f"must be the folder of an intact checkpoint, but {error}."
        ) from error
    check_facts(found, "branch_from")

    # Steps count from the start of the parent, so the branch must end after its checkpoint.
    gone_through = found.facts["position"]["gone_through"]
    if options["steps"] <= gone_through:
        longer = "--epochs or --steps" if options.flag else "epochs or steps"
        raise InputError(
            "branch_from",
            f"must be a checkpoint before the end of this run at step {options['steps']:,}, got "
            f"{path} of step {gone_through:,}; increase {longer}, which count from the start of "
            "the parent run.",
        )

    # A branch may differ from its parent in anything; print the differences.
    different, _ = _differences(found, options, identity)
    others = "; all other options are unchanged" if different and options.flag else ""
    say(f"branch     {path}, with {'; '.join(different) or 'the same options'}{others}")
    return found


def check_facts(found: Checkpoint, option: str) -> None:
    """Checks the facts of a checkpoint that a run needs to continue.

    Args:
        found: The checkpoint.
        option: Name of the argument that refers to the checkpoint, for messages.

    Raises:
        InputError: If a fact is missing or malformed.
    """
    # Facts that every version has written.
    kinds = {"position": dict, "rows": int, "replicas": int, "options": dict}
    for name, kind in kinds.items():
        if not isinstance(found.facts.get(name), kind):
            raise InputError(
                option,
                f"refers to the checkpoint {found.path}, whose manifest has no valid {name}.",
            )

    # Facts that older versions did not write may be missing, but not malformed.
    if "identity" in found.facts and not is_identity(found.facts["identity"]):
        raise InputError(
            option,
            f"refers to the checkpoint {found.path}, whose manifest has a malformed identity.",
        )
    if not isinstance(found.facts.get("best"), dict | None):
        raise InputError(
            option, f"refers to the checkpoint {found.path}, whose manifest has a malformed best."
        )
    position = found.facts["position"]
    if position.keys() != {*Position._fields} or not all(
        isinstance(value, int | float) for value in position.values()
    ):
        raise InputError(
            option,
            f"refers to the checkpoint {found.path}, whose manifest has a malformed position.",
        )


def different_options(before: Mapping[str, Any], now: Options) -> list[str]:
    """Returns a description of each option that differs, with both values unless they are digests.

    Args:
        before: Options of the checkpoint.
        now: Options of this run.
    """
    spelled = now.flag or str
    missing = "not recorded"

    def differs(name: str) -> str:
        # The values of this option are digests, which are not printed.
        if name == "init_from":
            are_given = None not in (before.get(name), now.get(name))
            hint = (
                ", which change if this is a run that is still training; pass one of its "
                "checkpoints or a bundle"
            )
            return f"the initial parameters ({spelled(name)}{hint if are_given else ''})"
        option = _IN_WORDS.get(name) or spelled(name)
        return (
            f"{option} {before.get(name, missing)} in the checkpoint and {now.get(name, missing)} "
            "here"
        )

    names = [name for name in dict.fromkeys((*before, *now)) if before.get(name) != now.get(name)]
    return [differs(name) for name in names if name not in _DECIDE_NOTHING]


def _differences(
    found: Checkpoint, options: Options, identity: Identity
) -> tuple[list[str], list[str]]:
    """Compares the options, the data and the program of a run with those of a checkpoint.

    Returns:
        A sentence for each of these that differs, and notes on parts that were not compared. If
        command-line options differ, only these are described, because data and program are built
        from them.
    """
    others = different_options(found.facts["options"], options)
    difference = identity.compare(found.facts.get("identity"))
    kinds = {"options": others, "data": difference.data, "program": difference.program}
    if others and options.flag:
        kinds = {"options": others}
    # "different options", "different data", but "a different program".
    article = {"program": "a "}
    named = [
        f"{article.get(kind, '')}different {kind}: {'; '.join(names)}"
        for kind, names in kinds.items()
        if names
    ]
    return named, difference.notes
