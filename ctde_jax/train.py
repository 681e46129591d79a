"""Command `python -m ctde_jax.train`: trains with the given options, and writes metrics and curves.

It calls the library in the same order as a notebook would, with arguments from the options.
"""

import os
import signal
import sys
import time
import traceback
from collections.abc import Sequence

import ctde_jax as ctde
from ctde_jax import config as options
from ctde_jax.bundle import streams
from ctde_jax.errors import (
    HostLost,
    InputError,
    NonFiniteLoss,
    Preempted,
    ReplicasDiverged,
    shortened,
)


def main(arguments: Sequence[str]) -> int:
    """Trains according to the options; if there are several hosts, in a child process.

    Args:
        arguments: Arguments of the command line.

    Returns:
        The exit status: 0; 2 for invalid options or data, a loss that is not finite, or too little
        memory; 69 if another host is lost; 70 if state that must be equal on all devices differs;
        75 after SIGTERM or SIGHUP; 130 after Ctrl-C; on several hosts, 1 for any other exception,
        and 128 plus its number for a signal that ended the training immediately.
    """
    started = time.perf_counter()

    # Parse the options before JAX is imported, so that a mistake is reported at once.
    try:
        config = options.parse(arguments)
        _import_jax()
        meeting = ctde.devices.hosts.find_meeting(**vars(config.hosts))
    except InputError as error:
        print(f"error: {options.flag(error.option)} {error.sentence}", file=sys.stderr)
        return 2

    # One host: train in this process.
    if meeting is None:
        status, sentence = _outcome(config, started)
        if sentence:
            print(sentence if status == os.EX_TEMPFAIL else f"error: {sentence}", file=sys.stderr)
        return status

    # Several hosts: supervise a child, as JAX aborts the process if another host is lost.
    if not ctde.devices.supervisor.is_child():
        return ctde.devices.supervisor.run("ctde_jax.train", arguments, meeting)

    # In the child: train. After a failure `leave` ends this process and those of the other hosts.
    ctde.devices.supervisor.follow_supervisor()
    status, sentence = _outcome(config, started, meeting)
    if sentence and status != os.EX_TEMPFAIL:
        ctde.devices.hosts.leave(status, sentence)
    if sentence:
        print(f"host {meeting.index}: {sentence}", file=sys.stderr)
    ctde.devices.hosts.part()
    return status


def _import_jax() -> None:
    """Raises InputError if the import of JAX fails, for example for its environment variables."""
    try:
        import jax  # noqa: F401  # not at the top: invalid options are reported without it
    except Exception as error:
        raise InputError(
            "JAX", f"must be importable, got {type(error).__name__}: {shortened(str(error))}."
        ) from error


def _outcome(
    config: options.Config, started: float, meeting: "ctde.devices.hosts.Meeting | None" = None
) -> tuple[int, str]:
    """Trains, and converts exceptions to exit statuses.

    Args:
        config: Options of the run.
        started: Start of the command, by `time.perf_counter`.
        meeting: Meeting point of the hosts; None for a single host.

    Returns:
        The exit status, as of `main`, and a message, which is empty if there was no exception.

    Raises:
        Exception: An exception that has no status, if there is only one host.
    """
    from ctde_jax.config import sweep, walk  # not at the top, as they import JAX

    # Each exception of the library has its status.
    try:
        if meeting is not None:
            ctde.devices.hosts.join(meeting)
        run = config.run
        is_many = run.seeds is not None or run.sweep or run.halving is not None
        train = sweep.train_many if is_many else walk.train
        return (130 if train(config, started).interrupted else 0), ""
    except InputError as error:
        return 2, f"{options.flag(error.option)} {error.sentence}"
    except NonFiniteLoss as error:
        return 2, str(error)
    except ReplicasDiverged as error:
        return os.EX_SOFTWARE, str(error)
    except Preempted as error:
        return os.EX_TEMPFAIL, str(error)
    except HostLost as error:
        return ctde.devices.hosts.LOST, str(error)
    except KeyboardInterrupt:
        return 130, "interrupted twice; the metrics up to there are in the run folder"
    except Exception as error:
        # XLA reports a lack of memory as a JaxRuntimeError with this status in its text.
        if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
            reason = " ".join(str(error).split()[:12]) or "an allocation failed"
            return (
                2,
                f"out of memory ({reason}); use a smaller model or a smaller --batch-size.",
            )

        # On one host, an unknown exception is raised, so that Python prints the traceback.
        if meeting is None:
            raise

        # If a host is lost, a collective may raise before the coordinator ends this process.
        if ctde.devices.hosts.may_be_lost(error):
            ctde.devices.hosts.wait_for_verdict()
        traceback.print_exc()  # no host was lost
        return 1, f"{type(error).__name__}: {error}"


if __name__ == "__main__":
    # Until training starts, there is nothing to save after Ctrl-C.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.exit(streams.run(main))
