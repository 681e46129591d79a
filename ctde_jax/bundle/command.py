"""Command lines that a node has, too: mistakes are sentences, and nothing is imported for them."""

import os
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from ctde_jax.errors import InputError


class Parser(ArgumentParser):
    """Says in one sentence what is wrong with a command line, and explains it by the module's own words."""

    def __init__(self, command: str, says: str):
        super().__init__(
            f"python -m {command}", description=says, formatter_class=RawDescriptionHelpFormatter
        )

    def error(self, message: str) -> NoReturn:
        """Ends the process with status 2."""
        print(f"error: {message}; --help explains every option.", file=sys.stderr)
        sys.exit(2)


def run(command: Callable[[], Any], names: Mapping[str, str]) -> int:
    """Runs a command, and returns its exit status: 2 for a mistake, of which it prints a sentence.

    Args:
        command: What to do.
        names: How the command line calls arguments of the library that are no options of that name there.
    """
    try:
        command()
        sys.stdout.flush()
    except InputError as error:
        option = names.get(error.option) or "--" + error.option.replace("_", "-")
        print(f"error: {option} {error.sentence}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # nobody reads on, such as `head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return 130
    return 0
