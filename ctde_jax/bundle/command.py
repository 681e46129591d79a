"""Command lines that also run on a node: invalid input is reported in one sentence."""

import os
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from ctde_jax.errors import InputError


class Parser(ArgumentParser):
    """Argument parser with one-sentence errors and the module's docstring as description."""

    def __init__(self, command: str, description: str):
        super().__init__(
            f"python -m {command}",
            description=description,
            formatter_class=RawDescriptionHelpFormatter,
        )

    def error(self, message: str) -> NoReturn:
        """Prints the error and ends the process with status 2."""
        print(f"error: {message}; --help lists all options.", file=sys.stderr)
        sys.exit(2)


def run(command: Callable[[], Any], names: Mapping[str, str]) -> int:
    """Runs a command and returns its exit status; prints InputError and returns 2.

    Args:
        command: Function to run.
        names: Command-line names of library arguments that are not options under their name.
    """
    # Flush here, so that a closed pipe is noticed in this function.
    try:
        command()
        sys.stdout.flush()
    except InputError as error:
        option = names.get(error.option) or "--" + error.option.replace("_", "-")
        print(f"error: {option} {error.sentence}", file=sys.stderr)
        return 2
    # The reader, such as `head`, has exited. Python would flush once more at exit, and fail.
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    # 128 plus the number of SIGINT, as in a shell.
    except KeyboardInterrupt:
        return 130
    return 0
