"""Going on: where a run's folder has a checkpoint of the same run, or where another run is branched off."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ctde_jax.checkpoint import Checkpoint, Damaged, newest_intact, read, write
from ctde_jax.errors import InputError, NonFiniteLoss
from ctde_jax.run_folder import CHECKPOINTS, check_new, writing_to

ROLLBACKS = 3
"""How often a run is rolled back at most."""

Options = Mapping[str, Any]
"""What a run was told, by name; only what decides its numbers."""


def find(folder: Path, options: Options, say: Callable[[str], None]) -> Checkpoint | None:
    """Returns the newest intact checkpoint of a run's folder, or None where the folder has no run yet.

    Raises:
        InputError: The folder has the run of other options, of which all are listed, or a run without a checkpoint.
    """
    found = newest_intact(folder / CHECKPOINTS, say)
    if found is None:
        check_new(folder)
        return None
    different = differences(found.facts["options"], options)
    if different:
        raise InputError(
            "run_dir",
            f"holds a run with other options: {'; '.join(different)}; name another folder, or branch off from "
            f"{found.path}.",
        )
    return found


def branch(path: Path, options: Options, say: Callable[[str], None]) -> Checkpoint:
    """Returns a checkpoint of another run, and says which of its options are different now.

    Raises:
        InputError: It is no checkpoint, or is damaged.
    """
    try:
        found = read(path)
    except Damaged as error:
        raise InputError("branch_from", f"must name the folder of an intact checkpoint, but {error}.") from error
    different = differences(found.facts["options"], options)
    say(f"branch     {path}, {'with ' + '; '.join(different) if different else 'with the same options'}")
    return found


def roll_back(folder: Path, error: NonFiniteLoss, say: Callable[[str], None]) -> None:
    """Halves all updates from the newest checkpoint of a run's folder on, in the checkpoint.

    Raises:
        NonFiniteLoss: That has been done too often; raises the error.
    """
    found = newest_intact(folder / CHECKPOINTS, say)
    if found is None:
        raise error
    factors = {name: tensor / 2 for name, tensor in found.tensors.items() if name.endswith("/update_factor")}
    factor = min(float(tensor.min()) for tensor in factors.values())
    if factor < 2.0**-ROLLBACKS:
        raise error
    say(f"rollback   not finite at step {error.step:,}; on from {found.path.name} with all updates times {factor:g}")
    with writing_to(folder):
        write(found.path, {**found.tensors, **factors}, found.facts)


def differences(before: Options, now: Options) -> list[str]:
    """Says which options are different, what they were, and what they are."""
    now = json.loads(json.dumps(now, default=str))
    names = [*before, *(name for name in now if name not in before)]
    return [
        f"{name} {before.get(name, 'not known')} there and {now.get(name, 'not known')} here"
        for name in names
        if before.get(name) != now.get(name)
    ]
