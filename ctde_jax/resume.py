"""Going on: where a run's folder has a checkpoint of the same run, or where another run is branched off."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ctde_jax import hosts
from ctde_jax.checkpoint import Checkpoint, Damaged, Facts, newest_intact, read, write
from ctde_jax.errors import InputError, NonFiniteLoss
from ctde_jax.meter import Position
from ctde_jax.run_folder import CHECKPOINTS, check_new, claimed, writing_to

ROLLBACKS = 3
"""How often a run is rolled back at most."""

Options = dict[str, Any]
"""What decides the numbers of a run, by name; as JSON has it."""

Say = Callable[[str], None]


def plain(options: Mapping[str, Any]) -> Options:
    """Writes options as JSON has them, so that they can be compared with those of a checkpoint."""

    def as_json(value: object) -> object:
        return value.item() if isinstance(value, np.generic) else str(value)

    return json.loads(json.dumps(options, default=as_json))


def find(folder: Path, resume: bool, branch_from: Path | None, options: Options, say: Say) -> Checkpoint | None:
    """Returns what a run goes on from: its newest intact checkpoint, or where it has none yet, another run's.

    Raises:
        InputError: The folder has the run of other options, of which all are listed, or a run that is not to go on; or
            the other run's checkpoint is damaged.
    """
    found = newest_intact(folder / CHECKPOINTS, say) if resume else None
    if found is None:
        check_new(folder)
        return None if branch_from is None else _branch(branch_from, options, say)
    check_facts(found, "run_dir")
    different = _differences(found.facts["options"], options)
    if different:
        raise InputError(
            "run_dir",
            f"holds a run with other options: {'; '.join(different)}; name another folder, or branch off from "
            f"{found.path}.",
        )
    say(f"resume     {found.path}")
    return found


def found_by_the_first(find: Callable[[], Checkpoint | None]) -> Checkpoint | None:
    """Returns on all hosts the checkpoint that host 0 finds, which alone must see its folder."""
    found: list[Checkpoint] = []

    def describe() -> Facts | None:
        checkpoint = find()
        if checkpoint is None:
            return None
        found.append(checkpoint)
        tensors = {name: [tensor.shape, str(tensor.dtype)] for name, tensor in checkpoint.tensors.items()}
        return {"path": str(checkpoint.path), "tensors": tensors, "facts": checkpoint.facts}

    told = hosts.of_the_first(describe)
    if told is None:
        return None
    like = found[0].tensors if found else {name: np.zeros(*each) for name, each in told["tensors"].items()}
    return Checkpoint(Path(told["path"]), hosts.arrays_of_the_first(like), told["facts"])


def roll_back(folder: Path, error: NonFiniteLoss, say: Say) -> bool:
    """Halves all updates from the newest checkpoint of a run's folder on, in the checkpoint.

    Returns False where that has been done too often.
    """
    with claimed(folder), writing_to(folder):
        found = newest_intact(folder / CHECKPOINTS, say)
        if found is None:
            return False
        factors = {name: tensor / 2 for name, tensor in found.tensors.items() if name.endswith("/update_factor")}
        factor = min(float(tensor.min()) for tensor in factors.values())
        if factor < 2.0**-ROLLBACKS:
            return False
        say(
            f"rollback   not finite at step {error.step:,}; on from {found.path.name} with all updates times {factor:g}"
        )
        write(found.path, {**found.tensors, **factors}, found.facts)
    return True


def _branch(path: Path, options: Options, say: Say) -> Checkpoint:
    try:
        found = read(path)
    except Damaged as error:
        raise InputError("branch_from", f"must name the folder of an intact checkpoint, but {error}.") from error
    check_facts(found, "branch_from")
    gone_through = found.facts["position"]["gone_through"]
    if options["steps"] <= gone_through:
        raise InputError("steps", f"must be more than the {gone_through:,} of {path}, got {options['steps']:,}.")
    different = _differences(found.facts["options"], options)
    say(f"branch     {path}, with {'; '.join(different) or 'the same options'}")
    return found


def check_facts(found: Checkpoint, option: str) -> None:
    """Raises InputError for a checkpoint that does not say what a run needs to go on."""
    kinds = {"position": dict, "rows": int, "replicas": int, "options": dict}
    for name, kind in kinds.items():
        if not isinstance(found.facts.get(name), kind):
            raise InputError(option, f"leads to the checkpoint {found.path}, whose manifest does not say its {name}.")
    if not isinstance(found.facts.get("best"), dict | None):
        raise InputError(option, f"leads to the checkpoint {found.path}, whose best is not that of a run.")
    position = found.facts["position"]
    if position.keys() != {*Position._fields} or not all(isinstance(value, int | float) for value in position.values()):
        raise InputError(option, f"leads to the checkpoint {found.path}, whose position is not that of a run.")


def _differences(before: Options, now: Options) -> list[str]:
    """Says which options are different, what they were, and what they are."""
    names = [*before, *(name for name in now if name not in before)]
    return [
        f"{name} {before.get(name, 'not known')} there and {now.get(name, 'not known')} here"
        for name in names
        if before.get(name) != now.get(name)
    ]
