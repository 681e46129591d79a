"""Command lines that a node has, too: mistakes are sentences, and nothing is imported for them."""

import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable
from typing import Any, NoReturn

from ctde_jax.errors import InputError


class Parser(ArgumentParser):
    """Says in one sentence what is wrong with a command line, and explains it by the module's own words."""

    def __init__(self, command: str, says: str):
        super().__init__(f"python -m {command}", description=says, formatter_class=RawDescriptionHelpFormatter)

    def error(self, message: str) -> NoReturn:
        """Ends the process with status 2."""
        print(f"error: {message}; --help explains every option.", file=sys.stderr)
        sys.exit(2)


def run(command: Callable[[], Any], places: tuple[str, ...]) -> int:
    """Runs a command, and returns its exit status: 2 for a mistake, of which it prints a sentence.

    Args:
        command: What to do.
        places: Which arguments of the library are places on the command line and no options, such as `bundle`.
    """
    try:
        command()
    except InputError as error:
        option = error.option.upper() if error.option in places else "--" + error.option.replace("_", "-")
        print(f"error: {option} {error.sentence}", file=sys.stderr)
        return 2
    return 0
