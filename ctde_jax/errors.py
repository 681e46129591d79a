"""What goes wrong at the boundary, said in sentences.

A library user catches these as ordinary exceptions; the command line prints the sentence and exits with status 2.
"""

import difflib
from collections.abc import Iterable
from pathlib import Path


class InputError(ValueError):
    """A mistake in what the user passed in.

    Args:
        option: The argument at fault, as it is written in Python (the command line shows `batch_size` as
            `--batch-size`).
        sentence: The rest of the sentence: which rule, which value, and the way out.
    """

    def __init__(self, option: str, sentence: str):
        self.option, self.sentence = on_one_line(option), on_one_line(sentence)
        super().__init__(f"{self.option} {self.sentence}")


class NonFiniteLoss(ArithmeticError):
    """The training loss became NaN or infinite; what was measured before is kept.

    Args:
        step: The first optimizer step, counted from 1, whose loss is not finite.
    """

    def __init__(self, step: int):
        super().__init__(
            f"the loss is not finite at step {step}, so training stopped; the metrics up to there are kept. "
            "Lower the learning rate, add warm-up steps, or look for extreme values in the inputs."
        )
        self.step = step


class ReplicasDiverged(RuntimeError):
    """Devices that must hold the same do not, so training stopped; checkpoints from before are kept.

    Args:
        leaves: The names of what differs.
        groups: The replicas that hold the same of the first of them, the largest group first.
        since: After this step all were alike.
        until: After this step they were not.
    """

    def __init__(self, leaves: list[str], groups: list[list[int]], since: int, until: int):
        more = f" and {len(leaves) - 1} more" if len(leaves) > 1 else ""
        super().__init__(
            f"{leaves[0]}{more} should be the same on all devices, but differs between the devices "
            f"{' and '.join(map(str, groups))} since a step from {since + 1} to {until}, so training stopped. A "
            "reduction is missing in the strategy, or a device computes wrongly; older checkpoints are as they were."
        )
        self.leaves, self.groups, self.since, self.until = leaves, groups, since, until


class Preempted(Exception):
    """SIGTERM or SIGHUP has ended the training, and a checkpoint is written.

    Args:
        step: The optimizer steps that it has gone through.
        folder: Of the run, with which the same command goes on.
        by: The name of the signal.
    """

    def __init__(self, step: int, folder: Path, by: str = "SIGTERM"):
        super().__init__(
            f"{by} ended the training at step {step:,}, which is saved; the same command with --run-dir {folder} "
            "goes on."
        )
        self.step, self.folder = step, folder


class HostLost(RuntimeError):
    """Another host does not come where this one waits for it; says which, and where."""


def on_one_line(text: str) -> str:
    """Escapes what cannot be printed, such as line ends, so that no content of a file breaks a sentence."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode()
        for character in text
    )


def quoted(value: object) -> str:
    """Quotes what a file or a user has said, without its middle where it is long."""
    return shortened(repr(value))


def shortened(text: str) -> str:
    """Leaves out the middle of a long text, such as what another library says of a file by quoting it."""
    return text if len(text) <= 200 else f"{text[:120]}...{text[-77:]}"


def check_known(option: str, name: str, known: Iterable[str]) -> None:
    """Raises InputError for a name that is not among the known ones, and suggests the nearest of them."""
    names = list(known)
    if name not in names:
        raise InputError(
            option,
            f"must be one of {', '.join(names)}, got {quoted(name)}{did_you_mean(name, names)}",
        )


def check_at_least(least: int, **options: int | None) -> None:
    """Raises InputError for an option that is less than this; None is a default yet to be chosen."""
    for option, value in options.items():
        if value is not None and value < least:
            raise InputError(option, f"must be at least {least}, got {value}.")


def check_whole(**options: object) -> None:
    """Raises InputError for an option that is no integer; None is a default yet to be chosen."""
    for option, value in options.items():
        if value is not None and (isinstance(value, bool) or not hasattr(value, "__index__")):
            raise InputError(option, f"must be a whole number, got {value!r:.60}.")


def check_at_most(most: int, **options: int | None) -> None:
    """Raises InputError for an option that is greater than this; None is a default yet to be chosen."""
    for option, value in options.items():
        if value is not None and value > most:
            raise InputError(option, f"must be at most {most:,}, got {value}.")


def check_seed(seed: int) -> None:
    """Raises InputError for a seed that is not from 0 to 2**32 - 1."""
    if not 0 <= seed < 2**32:
        raise InputError("seed", f"must be from 0 to {2**32 - 1}, got {seed}.")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Ends a sentence with the known name that is spelled most like this one, where there is one like it."""
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {nearest[0]!r}?" if nearest else "."
