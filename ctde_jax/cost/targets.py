"""Ahead-of-time compilation of rounds, also for TPUs and GPUs that are not present.

This needs only the compiler, which is part of the platform's plugin: `pip install 'jax[tpu]'` or
`'jax[cuda12]'`.
"""

import os
import re
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec

import jax
import numpy as np
import optax
from jax.experimental import topologies

from ctde_jax.aggregate import Strategy
from ctde_jax.data import Augment, Dataset
from ctde_jax.devices import AXIS, PyTree, replica
from ctde_jax.errors import InputError
from ctde_jax.models import Model, Task
from ctde_jax.rounds import ExampleSource, Span, make_gradient_for, parallel_rounds, state

EXAMPLES = "tpu:v5e:2x4 (a slice of 2 x 4 chips) or gpu:h100:2x4 (2 hosts with 4 GPUs each)"
"""Examples of targets, for messages."""

# XLA's `GpuTargetConfigProto` as text: properties that the compiler would query from the device.
_H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048 \
core_count: 132 fpus_per_core: 128
  shared_memory_per_block: 49152 shared_memory_per_core: 233472 \
shared_memory_per_block_optin: 232448
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98 \
device_memory_size: 84929347584
  registers_per_core_limit: 65536 registers_per_block_limit: 65536 \
cuda_compute_capability { major: 9 }
}
platform_name: "CUDA" device_description_str: "NVIDIA H100 80GB HBM3"
dnn_version_info { major: 9 minor: 7 } runtime_version { major: 12 minor: 8 }
"""


def devices(target: str) -> Sequence[jax.Device]:
    """Returns descriptions of devices, for which programs can be compiled, but not run.

    Args:
        target: Platform, kind and topology, such as `tpu:v5e:2x4` or `gpu:h100:2x4`.

    Raises:
        InputError: The target is malformed, its plugin is not installed, or the plugin does not
            support it.
    """
    # Parse the target and check that the plugin of its platform is installed.
    match = re.fullmatch(r"(tpu):(.+:.+)|gpu:(h100):(\d+x\d+)", target)
    if not match:
        raise InputError("target", f"must be a target such as {EXAMPLES}, got {target}.")
    platform = "tpu" if match[1] else "gpu"
    if not _plugin_is_installed(platform):
        package = {"tpu": "jax[tpu]", "gpu": "jax[cuda12]"}[platform]
        raise InputError(
            "target",
            f"must be a target whose plugin is installed (pip install '{package}'), got {target}.",
        )

    # Otherwise libtpu queries the metadata server of a Cloud TPU.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    try:
        if platform == "tpu":
            return topologies.get_topology_desc(match[2], "tpu").devices
        return topologies.get_topology_desc(
            platform="cuda", topology=f"1x{match[4]}", target_config=_H100
        ).devices
    except (jax.errors.JaxRuntimeError, NotImplementedError) as error:
        raise InputError(
            "target", f"must be a target that the plugin supports, got {target} ({error})."
        ) from error


def compile_rounds(
    model: Model,
    data: Dataset,
    task: Task,
    optimizer: optax.GradientTransformation,
    strategy: Strategy,
    source: ExampleSource,
    devices: Sequence[jax.Device],
    *,
    augment: Augment | None = None,
    accumulation_steps: int = 1,
    ema_decay: float | None = None,
    skip_nonfinite: bool = False,
    divide: Callable[[PyTree], tuple[PyTree, PyTree]] | None = None,
) -> replica.Program:
    """Compiles the rounds that `fit` would run, also for devices that are not present.

    Args:
        model: Model of raw inputs, as the data set stores them.
        data: Data set; only the shapes and dtypes of its training examples are read.
        task: Loss and metrics.
        optimizer: Optimizer of every step.
        strategy: Strategy of the rounds.
        source: Source of the training examples.
        devices: Devices, with one replica on each; see `devices`.
        augment: Augmentation of each training example.
        accumulation_steps: Number of microbatches for gradient accumulation.
        ema_decay: Decay per round of the moving average of the parameters; None for no average.
        skip_nonfinite: Whether rounds with NaN or infinity are skipped.
        divide: Function from the parameters to the trained and the frozen ones, as
            `Training.divide`; None trains all of them.
    """
    # Shapes of the state, without computing it. Stacked parts get one row for each device.
    params, model_state = jax.eval_shape(model.init, jax.random.key(0), data.train.inputs[:1])
    parts = (params, ()) if divide is None else jax.eval_shape(divide, params)
    on_replicas = jax.vmap(
        partial(state.create, optimizer=optimizer, strategy=strategy, ema=ema_decay is not None),
        in_axes=None,
        out_axes=state.axes(strategy),
        axis_name=AXIS,
        axis_size=len(devices),
    )

    # Shapes of the arguments of `Rounds`: state, split, batches, first, last and key.
    round_steps = max(1, strategy.inner_steps)
    piece = source.shapes(Span(0, round_steps, round_steps))
    number = jax.ShapeDtypeStruct((), np.int32)
    arguments = (
        jax.eval_shape(on_replicas, parts[0], model_state, parts[1]),
        *piece,
        number,
        number,
        jax.eval_shape(jax.random.key, 0),
    )

    # The same program as in training, compiled and not run.
    gradient = make_gradient_for(strategy, model, task, augment, accumulation_steps)
    train_rounds = parallel_rounds(
        gradient, optimizer, strategy, devices, source.axis, ema_decay, skip_nonfinite
    )
    return replica.compiled(replica.lowered(train_rounds, *arguments), devices, strategy.exact)


def _plugin_is_installed(platform: str) -> bool:
    if platform == "tpu":
        return find_spec("libtpu") is not None
    plugins = [f"jax_plugins.xla_cuda{version}" for version in (12, 13)]
    return find_spec("jax_plugins") is not None and any(find_spec(plugin) for plugin in plugins)
