"""What goes wrong at the boundary, said in sentences.

A library user catches these as ordinary exceptions; the command line prints the sentence and exits with status 2.
"""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """A mistake in what the user passed in.

    Args:
        option: The argument at fault, as it is written in Python (the command line shows `batch_size` as
            `--batch-size`).
        sentence: The rest of the sentence: which rule, which value, and the way out.
    """

    def __init__(self, option: str, sentence: str):
        super().__init__(f"{option} {sentence}")
        self.option = option
        self.sentence = sentence


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


def check_known(option: str, name: str, known: Iterable[str]) -> None:
    """Raises InputError for a name that is not among the known ones, and suggests the nearest of them."""
    names = list(known)
    if name not in names:
        raise InputError(
            option, f"must be one of {', '.join(names)}, got {name!r}; did you mean {nearest(name, names)!r}?"
        )


def check_positive(**options: int | None) -> None:
    """Raises InputError for a count that is less than 1; None is a default yet to be chosen."""
    for option, count in options.items():
        if count is not None and count < 1:
            raise InputError(option, f"must be at least 1, got {count}.")


def nearest(name: str, known: Iterable[str]) -> str:
    """Returns the known name that is spelled most like this one."""
    return difflib.get_close_matches(name, known, n=1, cutoff=0)[0]
