"""Exceptions with messages for users, and the checks of arguments that raise them.

Library users catch them as ordinary exceptions. The commands print the message and exit with status
2 for invalid input; `train.main` lists the other statuses.
"""

import difflib
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from math import inf
from pathlib import Path


class InputError(ValueError):
    """Raised if an argument or a file from the user is invalid.

    Args:
        option: Name of the argument in Python; the command line shows `batch_size` as
            `--batch-size`.
        sentence: Rest of the message: the rule, the value, and the way out.

    Examples:
        >>> try:
        ...     ctde.models.mlp([64])
        ... except ctde.InputError as error:
        ...     error.option
        'layer_sizes'
    """

    def __init__(self, option: str, sentence: str):
        # A message may quote the content of a file, which must not break or style the line.
        self.option = on_one_line(option)
        self.sentence = on_one_line(sentence)
        super().__init__(f"{self.option} {self.sentence}")


class NonFiniteLoss(ArithmeticError):
    """Raised if the loss or a parameter becomes NaN or infinite; earlier metrics are kept.

    It is also raised if too many consecutive rounds are skipped for this reason.

    Args:
        step: First optimizer step, counted from 1, whose training loss is not finite or that was
            skipped. For an evaluated loss or a parameter, the last step before it was checked.
    """

    def __init__(self, step: int):
        super().__init__(
            f"the loss is not finite at step {step}, so training stopped; earlier metrics are "
            "kept. Lower the learning rate, add warmup steps, or check the inputs for extreme "
            "values."
        )
        self.step = step


class ReplicasDiverged(RuntimeError):
    """Raised if state that must be equal on all devices differs; earlier checkpoints are kept.

    Args:
        leaves: Names of the leaves of the training state that differ.
        groups: Indices of the replicas, grouped by equal values of the first of these leaves;
            largest group first.
        since: Last step after which all replicas agreed.
        until: Step after which the replicas were found to differ.
    """

    def __init__(self, leaves: list[str], groups: list[list[int]], since: int, until: int):
        # The message names the first leaf only; the attributes have all of them.
        more = f" and {len(leaves) - 1} more" if len(leaves) > 1 else ""
        super().__init__(
            f"{leaves[0]}{more} must be equal on all devices. All devices agreed after step "
            f"{since}, but devices {' and '.join(map(str, groups))} differ after step {until}, so "
            "training stopped. Either the strategy lacks a reduction, or a device computes wrong "
            "results; earlier checkpoints are unchanged."
        )
        self.leaves = leaves
        self.groups = groups
        self.since = since
        self.until = until


class Preempted(Exception):
    """Raised after SIGTERM or SIGHUP has stopped the training and a checkpoint has been written.

    Args:
        step: Number of optimizer steps completed.
        folder: Folder of the run, from which the same command continues.
        by: Name of the signal.
    """

    def __init__(self, step: int, folder: Path, by: str = "SIGTERM"):
        super().__init__(
            f"{by} stopped the training after step {step:,}, and a checkpoint was saved; run the "
            f"same command with --run-dir {folder} to continue."
        )
        self.step = step
        self.folder = folder
        self.by = by


class HostLost(RuntimeError):
    """Raised if another host fails, or if this host has waited for it for an hour."""


def on_one_line(text: str) -> str:
    """Escapes the characters of a text that are not printable, such as line ends."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode()
        for character in text
    )


def quoted(value: object) -> str:
    """Returns the repr of a value from a file or a user, shortened to at most 200 characters."""
    return shortened(repr(value))


def shortened(text: str) -> str:
    """Shortens a text to at most 200 characters by replacing its middle with an ellipsis.

    An example is a message of another library that quotes the content of a file.
    """
    # 200 characters in all: 120 + 3 + 77.
    return text if len(text) <= 200 else f"{text[:120]}...{text[-77:]}"


def check_known(option: str, name: str, known: Iterable[str]) -> None:
    """Raises InputError if `name` is not in `known`; the message suggests the most similar name.

    Args:
        option: Name of the argument in the error message.
        name: Name that the user passed.
        known: Valid names.
    """
    names = list(known)
    if name not in names:
        raise InputError(
            option,
            f"must be one of {', '.join(names)}, got {quoted(name)}{did_you_mean(name, names)}",
        )


def check_at_least(least: int, **options: int | None) -> None:
    """Raises InputError if an option is less than `least`; None, an unresolved default, passes."""
    for option, value in options.items():
        if value is not None and value < least:
            raise InputError(option, f"must be at least {least}, got {value}.")


def check_whole(**options: object) -> None:
    """Raises InputError if an option is not an integer; None, an unresolved default, passes."""
    for option, value in options.items():
        # numpy integers are integers; bool is one in Python, but a mistake here.
        if value is not None and (isinstance(value, bool) or not hasattr(value, "__index__")):
            raise InputError(option, f"must be an integer, got {value!r:.60}.")


def check_at_most(most: int, **options: int | None) -> None:
    """Raises InputError if an option is more than `most`; None, an unresolved default, passes."""
    for option, value in options.items():
        if value is not None and value > most:
            raise InputError(option, f"must be at most {most:,}, got {value}.")


def check_positive(**options: float | None) -> None:
    """Raises InputError if an option is not positive and finite; None and traced numbers pass."""
    for option, value in _known(options):
        if not 0 < value < inf:
            raise InputError(option, f"must be greater than 0 and finite, got {value}.")


def check_not_negative(**options: float | None) -> None:
    """Raises InputError if an option is negative or infinite; None and traced numbers pass."""
    for option, value in _known(options):
        if not 0 <= value < inf:
            raise InputError(option, f"must be at least 0 and finite, got {value}.")


def check_fraction(**options: float | None) -> None:
    """Raises InputError unless an option is from 0 to below 1; None and traced numbers pass."""
    for option, value in _known(options):
        if not 0 <= value < 1:
            raise InputError(option, f"must be at least 0 and less than 1, got {value}.")


def is_zero(value: float) -> bool:
    """Returns whether a number is zero; False for a traced number, which stands for any value."""
    return not is_traced(value) and value == 0


def is_traced(value: object) -> bool:
    """Returns whether JAX traces a value, as it does the numbers of many runs in one program.

    These numbers were checked before, when the runs were made.
    """
    # This module does not import JAX.
    jax = sys.modules.get("jax")
    return jax is not None and isinstance(value, jax.core.Tracer)


def _known(options: Mapping[str, float | None]) -> list[tuple[str, float]]:
    return [
        (option, value)
        for option, value in options.items()
        if value is not None and not is_traced(value)
    ]


def check_seed(seed: int) -> None:
    """Raises InputError if a seed is not from 0 to 2**32 - 1."""
    if not 0 <= seed < 2**32:
        raise InputError("seed", f"must be from 0 to {2**32 - 1}, got {seed}.")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Returns the end of an error message: "; did you mean 'x'?", or "." if no name is similar."""
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {nearest[0]!r}?" if nearest else "."


@contextmanager
def writing_to(folder: Path, option: str = "run_dir") -> Iterator[None]:
    """Converts an OSError of the body to an InputError that names the folder.

    Args:
        folder: Folder that the body writes to.
        option: Name of the argument that the folder comes from, for the message.

    Raises:
        InputError: If the folder cannot be written to, or is full.
    """
    try:
        yield
    except OSError as error:
        raise InputError(
            option,
            "must be a writable folder with enough free space, but writing to "
            f"{shortened(str(folder))} failed: {error.strerror}; choose another folder.",
        ) from error
