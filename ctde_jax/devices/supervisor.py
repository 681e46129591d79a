"""What a host's command runs under where there are several hosts: it says in a sentence what JAX has ended it for.

Where a host is lost, does not come, or comes twice, JAX's coordinator ends all others by abort, with a dump of C++
frames. So the command of each host is the child of a process that only listens to it, hands signals on, and turns such
an end into a sentence and an exit status.
"""

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from typing import IO

from ctde_jax.devices.hosts import HEARTBEAT_SECONDS, LOST, Meeting

_MARK = "CTDE_JAX_SUPERVISED"

_COORDINATION = re.compile(
    r"[IWEF]\d{4} [\d:.]+ +\d+ (coordination_\w+\.cc|client\.(cc|h)|add_port\.cc):"
)
"""How lines of the coordinator's own begin; those that follow without a beginning of their own belong to them."""

_OTHER = re.compile(r"[IWEF]\d{4} [\d:.]+ |error: |Traceback |warning: ")


def is_child() -> bool:
    """Says whether this process has a supervisor."""
    return _MARK in os.environ


def run(module: str, arguments: Sequence[str], meeting: Meeting) -> int:
    """Runs a command as a child to its end, and returns its exit status.

    An end that the coordinator has brought about is told in a sentence, of status `hosts.LOST`; another signal's is 128
    and its number, as in a shell.
    """
    command = [sys.executable, "-m", module, *arguments]
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, _MARK: "1"},
        text=True,
        errors="replace",
        process_group=0,  # so that a terminal's Ctrl-C comes to it once, from here
    ) as child:
        assert child.stderr is not None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda number, frame: child.send_signal(number))
        said = _listen(child.stderr)
        status = child.wait()
    if status >= 0:
        return status
    sentence = _sentence(said, meeting)
    why = sentence or f"{signal.Signals(-status).name} has ended the training. {said}"
    print(f"error: host {meeting.index}: {why}", file=sys.stderr)
    return LOST if sentence else 128 - status


def follow_supervisor() -> None:
    """Ends this process when its supervisor is gone, even if that was killed."""

    def wait() -> None:
        os.read(sys.stdin.fileno(), 1)  # which nobody writes: it ends with the supervisor
        os._exit(LOST)

    threading.Thread(target=wait, name="supervisor", daemon=True).start()


def _listen(errors: IO[str]) -> str:
    """Hands on what the child says, and returns what the coordinator in it has said."""
    own: list[str] = []
    is_own = False
    for line in errors:
        if _COORDINATION.match(line):
            is_own = True
        elif _OTHER.match(line):
            is_own = False
        if is_own:
            own.append(line)
        else:
            sys.stderr.write(line)
            sys.stderr.flush()
    return "".join(own)


def _sentence(said: str, meeting: Meeting) -> str:
    """Says for what the coordinator has ended the child; nothing where it has not."""
    unhealthy = re.findall(r"stopped sending heartbeats\):\n((?:\d+\n)+)", said)
    if unhealthy:
        lost = [host for host in unhealthy[0].split() if int(host) != meeting.index] or unhealthy[
            0
        ].split()
        names = f"host {lost[0]} has" if len(lost) == 1 else f"the hosts {', '.join(lost)} have"
        return (
            f"{names} not answered for {HEARTBEAT_SECONDS} seconds, so the run ended; the same command on all hosts "
            "goes on from its newest checkpoint."
        )
    if "incarnation" in said:
        return (
            f"two processes of the {meeting.count} have come with the same --process-id, so the run ended; give each "
            f"host its own, from 0 to {meeting.count - 1}."
        )
    if "RegisterTask" in said:
        who = (
            "the others have not all come"
            if meeting.index == 0
            else "host 0, or another one, has not come"
        )
        return (
            f"{who} to {meeting.coordinator} within {meeting.patience} seconds, where {meeting.count} hosts were to "
            "meet; start the same command on each of them, or look at their output."
        )
    if "PollForError" in said or "Heartbeat" in said:
        return (
            f"host 0 at {meeting.coordinator} is gone or does not answer, so the run ended; the same command on all "
            "hosts goes on from its newest checkpoint."
        )
    return ""
