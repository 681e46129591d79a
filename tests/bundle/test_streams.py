"""Closed, full, broken or ASCII-only standard streams cause at most one sentence, no traceback."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import ctde_jax

PRINT = "print('a' * 100_000)"
"""Prints more than the capacity of a pipe or a buffer."""


def command(body: str, redirection: str, cwd: Path | None = None, **environment: str):
    """Runs a command whose `main` has this body, from a shell."""
    program = (
        "import sys; from ctde_jax.bundle import streams\ndef main(arguments):\n"
        f"  {body}; return 0\n"
    )
    program += "sys.exit(streams.run(main))"
    return subprocess.run(
        ["bash", "-c", f'set -o pipefail; "$0" -c "$1" {redirection}', sys.executable, program],
        env={**os.environ, "PYTHONPATH": str(Path(ctde_jax.__file__).parents[1]), **environment},
        capture_output=True,
        text=True,
        cwd=cwd,
    )


@pytest.mark.parametrize("body", ["print('short')", PRINT, f"{PRINT}; sys.exit(0)"])
def test_full_output_is_reported_in_one_sentence(body):
    done = command(body, "> /dev/full")
    assert done.stderr == "error: standard output is not writable: No space left on device.\n"
    assert done.returncode == 2


def test_broken_pipe_ends_the_command_silently():
    done = command(f"{PRINT}; {PRINT}; {PRINT}", "| head -c 1")
    assert (done.returncode, done.stdout, done.stderr) == (1, "a", "")


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-", "<&- >&- 2>&-"])
def test_descriptors_of_closed_streams_are_not_reused(tmp_path, closed):
    body = (
        "import os; f = open('file', 'w'); print(f.fileno(), file=f); "
        "print('out'); print('err', file=sys.stderr)"
    )
    done = command(body, closed, cwd=tmp_path)
    assert done.returncode == 0
    assert int((tmp_path / "file").read_text()) > 2


def test_characters_outside_the_encoding_are_escaped():
    done = command("print('R\\u00e9nyi')", "", PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stdout) == (0, "R\\xe9nyi\n")


def test_deleted_working_folder_is_reported_in_one_sentence(tmp_path):
    (tmp_path / "gone").mkdir()
    done = command("print('never')", '"$(rmdir ../gone)"', cwd=tmp_path / "gone")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.endswith(
        "error: the working directory is not usable (No such file or directory); use another one.\n"
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("redirection", "reason"),
    [("> /dev/full", "No space left on device"), ("| true", "Broken pipe")],
)
def test_console_error_is_reported_once_and_the_command_continues(redirection, reason):
    body = "import time; from ctde_jax.trainer.log import console; time.sleep(0.3); "
    body += "[console().print('a' * 9999) for _ in range(9)]"
    done = command(f"{body}; print('done', file=sys.stderr)", redirection)
    assert done.returncode == 0
    assert (
        done.stderr
        == f"Standard output is not writable ({reason}); further output is dropped.\ndone\n"
    )


@pytest.mark.slow
def test_console_replaces_characters_outside_the_encoding():
    done = command(
        "from ctde_jax.trainer.log import console; console().print('R\\u00e9nyi')",
        "",
        PYTHONIOENCODING="ascii:strict",
    )
    assert (done.returncode, done.stdout) == (0, "R?nyi\n")
