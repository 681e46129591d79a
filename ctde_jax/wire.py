"""The command `python -m ctde_jax.wire`: what a run with these options would send, without training.

python -m ctde_jax.wire --sync-every 16                          # takes the options of ctde_jax.train
python -m ctde_jax.wire --sync-every 16 --target tpu:v5e:2x4     # compiled for hardware that is not there
"""

import sys
from collections.abc import Sequence
from dataclasses import replace

import jax
from rich.console import Console

from ctde_jax import config
from ctde_jax.bundle import streams
from ctde_jax.config import build
from ctde_jax.cost import measure, table, targets
from ctde_jax.data import deal
from ctde_jax.devices import FAKE_DEVICES, hosts, start
from ctde_jax.errors import InputError
from ctde_jax.models import count_params, with_raw_inputs
from ctde_jax.trainer import check_exact


def main(arguments: Sequence[str]) -> int:
    """Prints what a run with these options would send; returns the exit status, 2 for a mistake in the options."""
    if {"-h", "--help"} & set(arguments):
        print(f"--target TARGET  compile for {targets.EXAMPLES}; all other options are those of a run:")
    try:
        target, arguments = config.take("target", arguments, f"be such as {targets.EXAMPLES}")
        _print_table(config.parse(arguments), target)
        return 0
    except InputError as error:
        option = "--target" if error.option == "target" else config.flag(error.option)
        print(f"error: {option} {error.sentence}", file=sys.stderr)
        return 2


def _print_table(chosen: config.Config, target: str | None) -> None:
    hosts.check_alone(hosts.find_meeting(**vars(chosen.hosts)))
    if target is None:
        devices = start(chosen.aggregation.devices, FAKE_DEVICES)
    else:
        jax.config.update("jax_platforms", "cpu")  # nothing runs, and the plugin would look for its hardware
        devices = targets.devices(target)
    batch_size, seed = chosen.optimization.batch_size, chosen.optimization.seed
    data = build.load_data(chosen.data, seed)
    model = with_raw_inputs(build.build_model(chosen.model, data), data.shift, data.scale)
    strategy = build.build_strategy(chosen.aggregation)
    if strategy.is_exact:
        check_exact(len(devices), batch_size, chosen.optimization.accumulate)
    partition = build.make_partition(chosen.data, data.train.labels, len(devices), seed)
    batches = deal(data.train, len(devices), batch_size, seed, partition, max(1, strategy.inner_steps))
    constant = replace(chosen.optimization, schedule="constant", warmup_steps=0, schedule_start=0)
    optimizer = build.build_optimizer(replace(chosen, optimization=constant), data, total_steps=1)
    task = build.build_task(chosen.optimization, data)
    program = targets.compile_rounds(
        model,
        data,
        task,
        optimizer,
        strategy,
        batches,
        devices,
        accumulate=chosen.optimization.accumulate,
    )
    traffic = measure(program.as_text() or "", strategy.inner_steps, [device.process_index for device in devices])
    params, _ = jax.eval_shape(model.init, jax.random.key(0), data.train.inputs[:1])
    Console().print(table(traffic, count_params(params), len(devices)))


if __name__ == "__main__":
    sys.exit(streams.run(main))
