"""Supervises the command of one of several hosts, and explains why JAX terminated it.

If a host is lost, does not join or joins twice, JAX's coordinator aborts all other hosts with a
dump of C++ frames. So each host's command runs as the child of a supervisor process, which forwards
its output and the signals that it receives, and replaces such a dump by one sentence and an exit
status.
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

# Environment variable that marks the child.
_MARK = "CTDE_JAX_SUPERVISED"

_COORDINATION = re.compile(
    r"[IWEF]\d{4} [\d:.]+ +\d+ (coordination_\w+\.cc|client\.(cc|h)|add_port\.cc):"
)
"""Prefix of the coordinator's log lines; lines without any prefix continue the line before."""

# Prefixes of all other log lines and messages, which end a message of the coordinator.
_OTHER = re.compile(r"[IWEF]\d{4} [\d:.]+ |error: |Traceback |warning: ")


def is_child() -> bool:
    """Returns whether this process has a supervisor."""
    return _MARK in os.environ


def run(module: str, arguments: Sequence[str], meeting: Meeting) -> int:
    """Runs `python -m {module}` as a child process and returns its exit status.

    Args:
        module: Name of the module.
        arguments: Arguments of the command line.
        meeting: The hosts of the run, for error messages.

    Returns:
        The exit status of the child; `hosts.LOST`, with an explanation on standard error, if the
        coordinator terminated it; 128 plus the number of any other signal that ended it.
    """
    command = [sys.executable, "-m", module, *arguments]
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, _MARK: "1"},
        text=True,
        errors="replace",
        # A separate process group: Ctrl-C in a terminal reaches the child only once, from here.
        process_group=0,
    ) as child:
        assert child.stderr is not None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda number, frame: child.send_signal(number))
        log = _forward(child.stderr)
        status = child.wait()
    if status >= 0:
        return status

    # A negative status means that a signal has ended the child: SIGABRT if by the coordinator.
    sentence = _sentence(log, meeting)
    why = sentence or f"{signal.Signals(-status).name} ended the training. {log}"
    print(f"error: host {meeting.index}: {why}", file=sys.stderr)
    return LOST if sentence else 128 - status


def follow_supervisor() -> None:
    """Ends this process when its supervisor has ended, even if the supervisor was killed."""

    def wait() -> None:
        # Nothing is ever written to this pipe: the read returns when the supervisor ends.
        os.read(sys.stdin.fileno(), 1)
        os._exit(LOST)

    threading.Thread(target=wait, name="supervisor", daemon=True).start()


def _forward(errors: IO[str]) -> str:
    """Forwards the child's standard error and returns the log lines of the coordinator."""
    kept: list[str] = []
    is_kept = False
    for line in errors:
        if _COORDINATION.match(line):
            is_kept = True
        elif _OTHER.match(line):
            is_kept = False
        if is_kept:
            kept.append(line)
        else:
            sys.stderr.write(line)
            sys.stderr.flush()
    return "".join(kept)


def _sentence(log: str, meeting: Meeting) -> str:
    """Explains in one sentence why the coordinator terminated the child.

    Args:
        log: The coordinator's log lines from the child's standard error.
        meeting: The hosts of the run.

    Returns:
        The sentence, or "" if the log shows no such termination.
    """
    # Lost hosts: the log lists their indices, possibly with this host among them.
    unhealthy = re.findall(r"stopped sending heartbeats\):\n((?:\d+\n)+)", log)
    if unhealthy:
        lost = [host for host in unhealthy[0].split() if int(host) != meeting.index] or unhealthy[
            0
        ].split()
        names = f"host {lost[0]} has" if len(lost) == 1 else f"hosts {', '.join(lost)} have"
        return (
            f"{names} not answered for {HEARTBEAT_SECONDS} seconds, so the run ended; run the same "
            "command on all hosts to continue from its newest checkpoint."
        )

    # A second process with the same index: the coordinator sees a changed incarnation of the task.
    if "incarnation" in log:
        return (
            "two processes have the same --process-id, so the run ended; give each of the "
            f"{meeting.count} hosts a different one, from 0 to {meeting.count - 1}."
        )

    # Not all hosts have joined in time.
    if "RegisterTask" in log:
        late = "another host" if meeting.index == 0 else "host 0, or another host,"
        return (
            f"{late} did not join at {meeting.coordinator} within {meeting.patience} seconds; "
            f"start the same command on all {meeting.count} hosts, or check their output."
        )

    # The coordinator itself does not answer any more.
    if "PollForError" in log or "Heartbeat" in log:
        return (
            f"host 0 at {meeting.coordinator} does not answer, so the run ended; run the same "
            "command on all hosts to continue from its newest checkpoint."
        )
    return ""
