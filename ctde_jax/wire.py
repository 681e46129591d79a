"""Command `python -m ctde_jax.wire`: counts the bytes that a run would send, without training.

python -m ctde_jax.wire --sync-every 16                       # options of ctde_jax.train
python -m ctde_jax.wire --sync-every 16 --target tpu:v5e:2x4  # compiles for absent hardware
"""

import sys
from collections.abc import Sequence

import jax
from rich.console import Console

from ctde_jax import config
from ctde_jax.aggregate import Strategy
from ctde_jax.bundle import streams
from ctde_jax.config import build
from ctde_jax.cost import Traffic, measure, sentence_of_run, table, targets
from ctde_jax.devices import FAKE_DEVICES, hosts, one_for_each, start
from ctde_jax.errors import InputError
from ctde_jax.models import count_params
from ctde_jax.rounds import count_rounds
from ctde_jax.trainer import Training


def main(arguments: Sequence[str]) -> int:
    """Prints the bytes that a run with these options would send.

    Args:
        arguments: Arguments of the command line.

    Returns:
        The exit status: 0, or 2 for invalid options.
    """
    # Help on the one option of this command; the parser of the other options prints the rest.
    if {"-h", "--help"} & set(arguments):
        print(
            f"--target TARGET  compile for this hardware, which may be absent, such as "
            f"{targets.EXAMPLES}; all other options are those of python -m ctde_jax.train:"
        )
    try:
        target, arguments = config.take(
            "target", arguments, f"be a target such as {targets.EXAMPLES}"
        )
        _print_table(config.parse(arguments, "wire"), target)
        return 0
    except InputError as error:
        option = "--target" if error.option == "target" else config.flag(error.option)
        print(f"error: {option} {error.sentence}", file=sys.stderr)
        return 2


def _print_table(chosen: config.Config, target: str | None) -> None:
    """Compiles the rounds of a run, and prints the bytes of their collectives.

    Args:
        chosen: Options of the run.
        target: Hardware to compile for, such as `tpu:v5e:2x4`; None for the present devices.

    Raises:
        InputError: An option or the target is invalid.
    """
    # Devices of this machine, or descriptions of the devices of the target.
    hosts.check_alone(hosts.find_meeting(**vars(chosen.hosts)))
    if target is None:
        given = start(
            chosen.aggregation.devices, FAKE_DEVICES, replicas=chosen.aggregation.replicas
        )
        devices = one_for_each(given)
    else:
        # Nothing runs on the target, and its plugin would search for hardware.
        jax.config.update("jax_platforms", "cpu")
        devices = targets.devices(target)
        if chosen.aggregation.replicas not in (None, len(devices)):
            raise InputError(
                "replicas",
                f"must be the {len(devices)} devices of --target, got "
                f"{chosen.aggregation.replicas}.",
            )

    # Compile the rounds of the run, and count the bytes in the compiled program.
    data = build.load_data(chosen.data, chosen.optimization.seed)
    training = build.build_training(chosen, data, devices)
    phases = training.phases(training.log_every)
    count = count_params(training.shapes[0])
    hosts_of_devices = [device.process_index for device in devices]
    sent = 0.0
    for phase in phases:
        traffic = measure_phase(training, phase.strategy, hosts_of_devices)
        sent += traffic.sent * count_rounds(phase.spans)
        shown = table(traffic, count, len(devices))
        if len(phases) > 1:
            shown.title = f"bytes sent by each device, from step {phase.start:,}"
        Console().print(shown)
    if len(phases) > 1:
        print(sentence_of_run(sent, training.total_steps, count, len(devices)))


def measure_phase(
    training: Training, strategy: Strategy, hosts_of_devices: Sequence[int]
) -> Traffic:
    """Compiles the rounds of a phase, and counts the bytes that one of them sends.

    Args:
        training: The training, with one replica on each device.
        strategy: Strategy of the phase.
        hosts_of_devices: Host of each device.
    """
    program = targets.compile_rounds(
        training.raw_model,
        training.data,
        training.weighted_task,
        training.optimizer,
        strategy,
        training.source,
        training.devices,
        augment=training.augment,
        accumulation_steps=training.accumulation_steps,
        ema_decay=training.ema_decay,
        skip_nonfinite=training.on_nonfinite == "skip",
        divide=training.divide,
    )
    return measure(program.as_text() or "", strategy.inner_steps, hosts_of_devices)


if __name__ == "__main__":
    sys.exit(streams.run(main))
