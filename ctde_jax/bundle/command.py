"""Parsing and exit statuses of the commands, with errors as one line."""

import os
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from ctde_jax.errors import InputError


class Parser(ArgumentParser):
    """Argument parser for `python -m {command}` that prints each error as one line.

    The usage text is printed only for `--help`.

    Args:
        command: Name of the module.
        description: Description in the help text, printed without reformatting.
    """

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
    """Runs a command and returns its exit status.

    Args:
        command: Function to run.
        names: Maps library arguments to their command-line names, for those that are not
            `--argument-name`.

    Returns:
        0; 1 if the reader of standard output has exited; 2 after an InputError, which is printed as
        one line; 130 after Ctrl-C.
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
