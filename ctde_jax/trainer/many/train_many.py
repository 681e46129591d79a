"""Training of families: by one program each, or one run after another."""

import resource
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace

import jax

from ctde_jax.checkpoint import check_no_run
from ctde_jax.devices import hosts
from ctde_jax.errors import (
    InputError,
    NonFiniteLoss,
    Preempted,
)
from ctde_jax.trainer.claim import claim
from ctde_jax.trainer.fit import train
from ctde_jax.trainer.log import console
from ctde_jax.trainer.many.family import Family, Outcome, Variant
from ctde_jax.trainer.many.preparing import Say
from ctde_jax.trainer.many.together import train_together
from ctde_jax.trainer.plan import line


def train_many(
    families: Sequence[Family],
    devices: Sequence[jax.Device],
    *,
    show: bool = True,
    until: int | None = None,
) -> list[Outcome]:
    """Trains the runs of all families.

    Args:
        families: Runs; each family has a separate program.
        devices: Devices over which the runs of a family are divided.
        show: Whether to show progress.
        until: Step after which the runs stop, the end of an evaluation interval, with checkpoints;
            by default their last step.

    Returns:
        The result of each run, in order.

    Raises:
        Exception: The exceptions of `fit_many`.
    """
    if hosts.count() > 1:
        raise InputError("seeds", "must be left out on several hosts; train each run on one host.")
    _check_folders([variant for family in families for variant in family.variants])
    say = console(quiet=not show).print
    outcomes: list[Outcome] = []
    for family in families:
        if family.is_joint or until is not None:
            outcomes += _train_joint(family, devices, show, say, until)
        else:
            outcomes += _train_in_turn(family, show)
        if is_interrupted(outcomes):
            has_folder = families[0].variants[0].saving.folder is not None
            way_on = "; the same call continues them" if has_folder else ""
            say(line("stopped", f"before all runs were complete{way_on}"))
            break
    if not any(each.trained for each in outcomes):
        raise NonFiniteLoss(outcomes[0].step)
    return outcomes


def _train_joint(
    family: Family, devices: Sequence[jax.Device], show: bool, say: Say, until: int | None
) -> list[Outcome]:
    """Trains a family by one program; runs that continue from another step by one more."""
    with ExitStack() as stack:
        # A line for each run would hide those on damaged checkpoints.
        def say_once(text: str) -> None:
            if not text.startswith("resume"):
                say(text)

        found = [
            stack.enter_context(claim(variant.training, variant.saving, say_once))
            for variant in family.variants
        ]
        resumed = sum(not each.is_new for each in found)
        if resumed:
            say(line("resume", f"{resumed} of {len(found)} runs"))

        # After an interruption while checkpoints were written, some runs are behind others.
        groups: dict[int, list[int]] = {}
        for place, each in enumerate(found):
            groups.setdefault(each.position.gone_through, []).append(place)
        outcomes: dict[int, Outcome] = {}
        for _, places in sorted(groups.items()):
            part = replace(family, variants=[family.variants[place] for place in places])
            of_part = train_together(
                part, [found[place] for place in places], devices, show, say, until
            )
            outcomes |= dict(zip(places, of_part, strict=True))
            if is_interrupted(of_part):
                break
    return [outcomes[place] for place in sorted(outcomes)]


def _train_in_turn(family: Family, show: bool) -> list[Outcome]:
    """Trains the runs of a family one after another, each by a separate program."""
    outcomes: list[Outcome] = []
    for values, training, saving in family.variants:
        try:
            trained = train(training, saving, show=show)
        except NonFiniteLoss as error:
            outcomes.append(Outcome(values, training.seed, None, error.step, str(error)))
            continue
        # The same command continues all runs, so it has their common folder.
        except Preempted as error:
            raise Preempted(error.step, error.folder.parent, error.by) from error
        outcomes.append(Outcome(values, training.seed, trained, trained.step))
        if trained.interrupted:
            break
    return outcomes


def is_interrupted(outcomes: Sequence[Outcome]) -> bool:
    """Returns whether Ctrl-C has ended a run, and so the training of all runs."""
    return any(each.trained is not None and each.trained.interrupted for each in outcomes)


def _check_folders(variants: Sequence[Variant]) -> None:
    """Checks the folders of the runs, and raises the limit of open files if it is too low.

    Raises:
        InputError: Two runs have the same folder, the folder of all runs is that of a single run,
            or this process cannot open the files of all runs.
    """
    folders = [variant.saving.folder for variant in variants if variant.saving.folder is not None]
    if not folders:
        return
    twice = [folder.name for folder, count in Counter(folders).items() if count > 1]
    if twice:
        raise InputError("sweep", f"must have different values, got {twice[0]} twice.")
    check_no_run(folders[0].parent)

    # A run holds its lock, its rows and the files of a checkpoint; JAX needs some hundred.
    needed = 4 * len(folders) + 300
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise InputError(
            "seeds",
            f"must be fewer, as {len(folders):,} runs with files need {needed:,} open files, but "
            f"this process may have {hard:,}; raise the limit by ulimit -n.",
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
