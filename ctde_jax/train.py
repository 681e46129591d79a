"""The command `python -m ctde_jax.train`: options in; a trained model's numbers and curves out.

It does with options what a notebook does with calls, and reads the same.
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
    """Trains as the options say; on one of several hosts, in a process of its own under this one.

    Returns:
        The exit status: 0, 2 for a mistake in options or data or a loss that is not finite, 69 where another host is
        lost, 70 where devices that must hold the same do not, 75 after SIGTERM, 130 after Ctrl-C, and on several hosts
        128 and its number for a signal that has ended the training at once.
    """
    started = time.perf_counter()
    try:
        config = options.parse(arguments)
        _import_jax()
        meeting = ctde.devices.hosts.find_meeting(**vars(config.hosts))
    except InputError as error:
        print(f"error: {options.flag(error.option)} {error.sentence}", file=sys.stderr)
        return 2
    if meeting is None:
        status, sentence = _outcome(config, started)
        if sentence:
            print(sentence if status == os.EX_TEMPFAIL else f"error: {sentence}", file=sys.stderr)
        return status
    if not ctde.devices.supervisor.is_child():
        return ctde.devices.supervisor.run("ctde_jax.train", arguments, meeting)
    ctde.devices.supervisor.follow_supervisor()
    status, sentence = _outcome(config, started, meeting)
    if sentence and status != os.EX_TEMPFAIL:
        ctde.devices.hosts.leave(status, sentence)
    if sentence:
        print(f"host {meeting.index}: {sentence}", file=sys.stderr)
    ctde.devices.hosts.part()
    return status


def _import_jax() -> None:
    """Raises InputError if JAX cannot be imported, such as for an unknown value of one of its environment variables."""
    try:
        import jax  # noqa: F401  # here, so that a mistake in the options costs no import of it
    except Exception as error:
        raise InputError(
            "JAX", f"must be importable, got {type(error).__name__}: {shortened(str(error))}."
        ) from error


def _outcome(
    config: options.Config, started: float, meeting: "ctde.devices.hosts.Meeting | None" = None
) -> tuple[int, str]:
    """Trains, and returns the exit status and what there is to say of it."""
    from ctde_jax.config import walk  # here, as it imports JAX

    try:
        if meeting is not None:
            ctde.devices.hosts.join(meeting)
        return (130 if walk.train(config, started).interrupted else 0), ""
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
        return 130, "interrupted twice; what was measured is in the run's folder"
    except Exception as error:
        if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
            said = " ".join(str(error).split()[:12]) or "no more to be had"
            return (
                2,
                f"memory does not suffice ({said}): take a smaller model, or a lower --batch-size.",
            )
        if meeting is None:
            raise
        if ctde.devices.hosts.may_be_lost(error):
            ctde.devices.hosts.wait_for_verdict()
        traceback.print_exc()  # nobody was lost
        return 1, f"{type(error).__name__}: {error}"


if __name__ == "__main__":
    signal.signal(
        signal.SIGINT, signal.SIG_DFL
    )  # until training starts, Ctrl-C has nothing to save
    sys.exit(streams.run(main))
