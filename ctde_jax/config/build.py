"""Builds the data, partition, model, optimizer and strategy that a configuration names."""

from collections.abc import Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import jax
import numpy as np
import optax

from ctde_jax import aggregate, data, models
from ctde_jax.aggregate import Codec, Combine, Strategy
from ctde_jax.config import optimizers
from ctde_jax.config.options import (
    AggregationOptions,
    Config,
    DataOptions,
    ModelOptions,
)
from ctde_jax.config.presets import PRESETS
from ctde_jax.config.rules import check_aggregation, check_files
from ctde_jax.data import (
    Augment,
    Dataset,
    DiskArray,
    augment,
    count_steps,
    steps_per_epoch,
    targets_or_classes,
)
from ctde_jax.errors import (
    InputError,
    check_at_least,
    check_at_most,
    check_fraction,
    check_known,
    check_positive,
    is_zero,
    quoted,
)
from ctde_jax.models import Model, Task, focal, initializers, mup, smoothed, tasks
from ctde_jax.trainer import Training, trackers


def build_training(chosen: Config, dataset: Dataset, devices: Sequence[jax.Device]) -> Training:
    """Builds the `Training` that a configuration describes.

    Args:
        chosen: Options of the run.
        dataset: Data set, from `load_data`.
        devices: Devices, with one replica on each.

    Raises:
        InputError: If an option is invalid, alone or in combination with other options, the data or
            the devices.
    """
    optimization = chosen.optimization
    run = chosen.run
    parts = make_partition(chosen.data, dataset.train.labels, len(devices), optimization.seed)

    # A schedule needs the number of steps, which may be given in epochs.
    steps = count_total_steps(chosen, dataset, len(devices), parts)

    # `Training` checks its arguments when it is created.
    return Training(
        model=build_model(chosen.model, dataset),
        data=dataset,
        optimizer=build_optimizer(chosen, dataset, steps),
        strategy=build_phases(chosen, steps),
        task=build_task(chosen, dataset),
        devices=devices,
        batch_size=optimization.batch_size,
        steps=steps,
        partition=parts,
        seed=optimization.seed,
        init_from=run.init_from,
        init_only=run.init_only or None,
        freeze=optimization.freeze or None,
        lora_rank=optimization.lora_rank,
        class_weights=class_weights(optimization.class_weights),
        augment=build_augment(chosen.data),
        accumulation_steps=optimization.accumulation_steps,
        ema_decay=optimization.ema_decay,
        reestimate_batches=run.reestimate_batches,
        patience=optimization.patience,
        on_nonfinite=optimization.on_nonfinite,
        eval_every=run.eval_every,
        log_every=run.log_every,
    )


def count_total_steps(
    chosen: Config, dataset: Dataset, replicas: int, parts: Sequence[np.ndarray] | None
) -> int:
    """Returns the number of optimizer steps of a run, which may be given in epochs.

    Args:
        chosen: Options of the run.
        dataset: Data set.
        replicas: Number of replicas.
        parts: Example indices of each device or client, if the examples are partitioned.

    Raises:
        InputError: As for `data.steps_per_epoch` and `data.count_steps`.
    """
    optimization = chosen.optimization
    epoch = steps_per_epoch(len(dataset.train.inputs), replicas, optimization.batch_size, parts)
    epochs = optimization.epochs if optimization.steps is None else None
    return count_steps(epoch, epochs, optimization.steps)


def load_data(chosen: DataOptions, seed: int = 0) -> Dataset:
    """Loads the data set that the options name, with sequences and a validation split if chosen.

    Args:
        chosen: Options of the data.
        seed: Random seed of the validation split.

    Raises:
        InputError: If an option is invalid, a file cannot be read or is malformed, or the data have
            neither classes nor a vocabulary.
    """
    check_files(chosen)
    dataset = _load(chosen)

    # A file may contain targets for which the command line has no task.
    has_targets = chosen.task in ("multilabel", "regression")
    if not has_targets and not dataset.classes and not dataset.vocabulary:
        rule = "must contain class labels in y_train, integers from 0 of the shape [examples]"
        raise InputError("data_file", f"{rule}, {targets_or_classes(dataset.train.labels)}.")
    if chosen.sequence != "none":
        dataset = data.as_sequence(dataset, chosen.sequence)
    return (
        data.hold_out(dataset, chosen.validation_fraction, seed)
        if chosen.validation_fraction
        else dataset
    )


def _load(chosen: DataOptions) -> Dataset:
    match chosen.dataset:
        case "digits":
            return data.digits()
        case "mnist":
            return data.mnist(chosen.data_dir)
        case "fashion_mnist":
            return data.fashion_mnist(chosen.data_dir)
        case "cifar10":
            return data.cifar10(chosen.data_dir)
        case "folder":
            return data.from_folder(
                _data_dir(chosen), chosen.image_size or None, skip_unreadable=chosen.skip_unreadable
            )
        case "text":
            return data.from_text(_data_file(chosen), chosen.context_length, chosen.stride)
        case "npz":
            return data.from_npz(_data_file(chosen), chosen.task)
        case "csv" | "parquet":
            return data.from_table(
                _data_file(chosen),
                chosen.label_column,
                drop=chosen.drop,
                categorical=chosen.categorical,
                weights=chosen.weights,
                task=chosen.task,
            )


def build_task(chosen: Config, dataset: Dataset) -> Task:
    """Returns the task of the options, with the chosen objective.

    Raises:
        InputError: If the labels are unsuitable for the task, an option is out of range, or options
            conflict.
    """
    task = tasks.for_data(dataset, chosen.data.task)
    gamma = chosen.optimization.focal_gamma
    smoothing = chosen.optimization.label_smoothing
    if gamma and not is_zero(smoothing):
        raise InputError(
            "focal_gamma",
            f"must be 0 with --label-smoothing, which replaces the same loss, got {gamma}.",
        )
    return focal(smoothed(task, smoothing), gamma)


def class_weights(words: Sequence[str]) -> Sequence[float] | Literal["balanced"] | None:
    """Converts the words of `--class-weights` to the argument of `Training`.

    Raises:
        InputError: If a word is neither a number nor `balanced` alone.
    """
    if tuple(words) == ("balanced",):
        return "balanced"
    try:
        return [float(word) for word in words] or None
    except ValueError as error:
        given = quoted(" ".join(words))
        raise InputError(
            "class_weights", f"must be balanced, or a number for each class, got {given}."
        ) from error


def build_augment(chosen: DataOptions) -> Augment | None:
    """Chains the augmentations of the options; returns None if there are none.

    Raises:
        InputError: If an option is out of range, or images are also to be read as sequences.
    """
    check_at_least(0, shift=chosen.shift, cutout=chosen.cutout)
    # In the order in which they are applied.
    parts = [
        *([augment.shift(chosen.shift)] if chosen.shift else []),
        *([augment.flip()] if chosen.flip else []),
        *([augment.cutout(chosen.cutout)] if chosen.cutout else []),
    ]
    if parts and chosen.sequence != "none":
        raise InputError(
            "sequence",
            "must be none with --shift, --flip and --cutout, which augment images, got "
            f"{chosen.sequence}.",
        )
    return augment.chain(*parts) if parts else None


def make_partition(
    chosen: DataOptions, labels: np.ndarray | DiskArray, replicas: int, seed: int
) -> list[np.ndarray] | None:
    """Partitions the training examples over devices or clients.

    Args:
        chosen: Options of the data.
        labels: Labels of the training examples, `[examples, ...]`; classes have no further axes.
        replicas: Number of devices.
        seed: Random seed of the partition.

    Returns:
        An integer array of example indices for each part; None if examples are reshuffled.

    Raises:
        InputError: If an option is out of range, or unsuitable for the labels.
    """
    if chosen.clients is not None and chosen.partition == "reshuffled":
        raise InputError(
            "clients", "requires a fixed --partition, such as iid, got --partition reshuffled."
        )

    # Every device trains one client in each round, so there must be enough clients.
    check_at_least(replicas, clients=chosen.clients)
    check_at_most(len(labels), clients=chosen.clients)

    # Texts and targets have no classes to partition by.
    has_classes = labels.ndim == 1 and labels.dtype.kind != "f"
    if not has_classes and chosen.partition in ("by_label", "dirichlet"):
        raise InputError(
            "partition",
            f"must be reshuffled or iid if examples have no classes, got {chosen.partition}.",
        )

    # One part per client, or else per device.
    parts = chosen.clients or replicas
    match chosen.partition:
        case "reshuffled":
            return None
        case "iid":
            return data.partition.iid(labels, parts, seed)
        case "by_label":
            # Labels on disk are read into memory, by this and the next partition.
            return data.partition.by_label(np.asarray(labels), parts, chosen.label_shards, seed)
        case "dirichlet":
            return data.partition.dirichlet(np.asarray(labels), parts, chosen.dirichlet_alpha, seed)


def build_model(chosen: ModelOptions, dataset: Dataset) -> Model:
    """Builds the network for the data, with the chosen initialization and precision.

    Raises:
        InputError: If the network is unsuitable for the data, or an option is out of range.
    """
    model = _build_network(chosen, dataset)
    base = _build_base(chosen, dataset)
    # Maximal update parametrization replaces the initialization; bfloat16 affects the computation
    # alone.
    model = initializers.initialize(model, chosen.init) if base is None else mup.mup(model, base)
    return models.in_bfloat16(model) if chosen.precision == "bf16" else model


def build_optimizer(
    chosen: Config, dataset: Dataset, total_steps: int
) -> optax.GradientTransformation:
    """Builds the optimizer of a run.

    Args:
        chosen: Options of the run.
        dataset: Data set of the run.
        total_steps: Number of optimizer steps of the whole run.

    Raises:
        InputError: If an option is out of range, or the optimizer does not support `--init mup`.
    """
    options = chosen.optimization
    optimizer = optimizers.build(
        options.optimizer,
        options.learning_rate,
        options.schedule,
        options.warmup_steps,
        total_steps,
        options.weight_decay,
        options.clip_grad_norm,
        options.schedule_start,
    )

    if options.learning_rate_scales:
        scales = _learning_rate_scales(options.learning_rate_scales)
        optimizer = optax.chain(optimizer, optimizers.scale_updates(scales))

    # The scaling of maximal update parametrization is derived for updates of a fixed size.
    base = _build_base(chosen.model, dataset)
    if base is None:
        return optimizer
    if options.freeze or options.lora_rank is not None:
        name = "freeze" if options.freeze else "lora_rank"
        raise InputError(name, "must not be set with --init mup, which scales all parameters.")
    if options.optimizer not in ("adam", "adamw", "lion"):
        raise InputError(
            "optimizer", f"must be adam, adamw or lion with --init mup, got {options.optimizer}."
        )
    return optax.chain(optimizer, mup.scale_learning_rates(base, dataset.train.inputs[:1]))


def _learning_rate_scales(words: Sequence[str]) -> dict[str, float]:
    """Converts the words of `--learning-rate-scales`, such as `layers/0/*=0.1`, to a mapping.

    Raises:
        InputError: If a word is not a pattern and a number.
    """
    scales: dict[str, float] = {}
    for word in words:
        pattern, _, number = word.rpartition("=")
        try:
            factor = float(number)
        except ValueError:
            factor = None
        if not pattern or factor is None:
            raise InputError(
                "learning_rate_scales",
                f"must be patterns and numbers, such as 'layers/0/*=0.1', got {quoted(word)}.",
            )
        if pattern in scales:
            raise InputError(
                "learning_rate_scales", f"must not contain {quoted(pattern)} twice; remove one."
            )
        scales[pattern] = factor
    return scales


def _build_base(chosen: ModelOptions, dataset: Dataset) -> Model | None:
    """Builds the network at `--base-width`; returns None unless `--init` is mup.

    Raises:
        InputError: If there is no base width, it is out of range, or the network has layers of
            different widths.
    """
    if chosen.init != "mup":
        return None
    check_at_least(1, base_width=chosen.base_width)
    base = chosen.base_width
    if base is None:
        raise InputError(
            "base_width",
            "must be the width at which the learning rate was tuned, for --init mup, got none.",
        )
    match chosen.model:
        case "mlp":
            return _build_network(
                replace(chosen, hidden_sizes=(base,) * len(chosen.hidden_sizes)), dataset
            )
        case "lstm" | "gru":
            return _build_network(replace(chosen, hidden_size=base), dataset)
        case "transformer":
            # The size of a head must stay the same, as attention logits depend on it.
            if base * chosen.heads % chosen.hidden_size:
                size = chosen.hidden_size // chosen.heads
                raise InputError(
                    "base_width",
                    f"must be a multiple of {size}, the size of an attention head, got {base}.",
                )
            return _build_network(
                replace(chosen, hidden_size=base, heads=base * chosen.heads // chosen.hidden_size),
                dataset,
            )
        case _:
            raise InputError(
                "init",
                f"must not be mup with --model {chosen.model}, whose layers have different widths.",
            )


_MOST_LAYERS = 1000
"""Maximum number of layers, as each of them is traced and compiled separately."""

_LARGEST_WIDTH = 10_000_000
"""Maximum width of a layer, at which the product of two widths does not overflow.

`devices/memory.py` refuses smaller networks that exceed the memory."""


def _build_network(chosen: ModelOptions, dataset: Dataset) -> Model:
    # Sizes that would fail late or without a message are rejected here.
    check_at_most(_MOST_LAYERS, layers=chosen.layers)
    check_at_most(
        _LARGEST_WIDTH,
        hidden_size=chosen.hidden_size,
        hidden_sizes=max(chosen.hidden_sizes, default=0),
        channels=max(chosen.channels, default=0),
    )
    shape = dataset.train.inputs.shape[1:]
    outputs = len(dataset.classes) or dataset.targets
    if dataset.vocabulary:
        return _build_language_model(chosen, dataset)

    # Networks with one output per class or target: of an array, a picture or a sequence.
    if chosen.model in ("cnn", "resnet") and len(shape) not in (2, 3):
        raise InputError(
            "model",
            f"{chosen.model} requires images, but the inputs have the shape {shape}; use mlp.",
        )
    match chosen.model:
        case "mlp":
            return models.mlp([prod(shape), *chosen.hidden_sizes, outputs], chosen.activation)
        case "cnn":
            return models.cnn(shape, outputs, chosen.dropout_rate)
        case "resnet":
            return models.resnet(
                shape, outputs, chosen.channels, chosen.layers, chosen.norm, chosen.batch_statistics
            )
        case "lstm" | "gru":
            # Images `[height, width, channels]` can be read as sequences by --sequence.
            if len(shape) != 2:
                way_out = "; pass --sequence rows or pixels" if len(shape) == 3 else ""
                raise InputError(
                    "model",
                    f"{chosen.model} requires sequences [length, features], got examples of the "
                    f"shape {shape}{way_out}.",
                )
            return models.rnn_classifier(
                shape[-1],
                outputs,
                chosen.hidden_size,
                chosen.layers,
                chosen.model,
                chosen.dropout_rate,
            )
        case _:
            raise InputError(
                "model",
                f"{chosen.model} requires --dataset text, got the data set {dataset.name}.",
            )


def _build_language_model(chosen: ModelOptions, dataset: Dataset) -> Model:
    vocabulary = len(dataset.vocabulary)
    length = dataset.train.inputs.shape[1]
    match chosen.model:
        case "lstm" | "gru":
            return models.rnn_language_model(
                vocabulary, chosen.hidden_size, chosen.layers, chosen.model, chosen.dropout_rate
            )
        case "transformer":
            return models.transformer(
                vocabulary,
                length,
                chosen.hidden_size,
                chosen.layers,
                chosen.heads,
                chosen.dropout_rate,
            )
        case _:
            raise InputError(
                "model", f"must be lstm, gru or transformer for --dataset text, got {chosen.model}."
            )


def strategy(name: str, **options: Any) -> Strategy:
    """Builds the strategy of a preset, with options overridden.

    The inner optimizer is not part of a strategy: `mu-loco` is DiLoCo with Muon as its inner
    optimizer, so pass Muon to `fit`.

    Args:
        name: Name of a preset, one of `presets.PRESETS`.
        **options: Fields of `AggregationOptions`.

    Raises:
        InputError: If the name or an option is unknown, a value is invalid or out of range, or
            options conflict.

    Examples:
        >>> diloco = ctde.strategy("diloco", sync_every=64, reduce="int4")
        >>> diloco.inner_steps
        64
    """
    # The command line checks names and values when it parses them; here they come from Python.
    check_known("strategy", name, PRESETS)
    kinds = get_type_hints(AggregationOptions)
    known = [option for option in kinds if option not in ("devices", "replicas", "strategy")]
    for option, value in options.items():
        check_known("strategy's option", option, known)
        if get_origin(kinds[option]) is Literal:
            check_known(option, value, get_args(kinds[option]))

    # Presets also have options of the inner optimizer, which are left out.
    preset = {option: value for option, value in PRESETS[name].options.items() if option in kinds}
    return build_strategy(AggregationOptions(**{**preset, **options}))


def build_strategy(chosen: AggregationOptions) -> Strategy:
    """Builds the strategy that the options describe.

    Raises:
        InputError: If an option is out of range, or options conflict.
    """
    check_aggregation(chosen)
    if chosen.sync_growth:
        raise InputError(
            "sync_growth",
            "requires the learning rate of a run; in Python, use "
            "ctde.aggregate.quadratic_synchronization.",
        )
    if chosen.exact:
        return Strategy(exact=True)

    # Gossip replaces the reducer; streaming contains it, and the outer optimizer of each fragment.
    reduce = _build_reduce(chosen)
    outer = _build_outer(chosen)
    if chosen.graph != "none":
        reduce = aggregate.gossip(chosen.graph)
    if chosen.fragments > 1:
        reduce = aggregate.streaming(chosen.fragments, reduce, outer)
        outer = aggregate.AVERAGE

    # Replicas diverge if a round does not end with equal parameters on all of them.
    inner = aggregate.proximal(chosen.proximal) if chosen.proximal else aggregate.UNCHANGED
    diverges = chosen.graph != "none" or chosen.fragments > 1
    strategy = Strategy(
        chosen.sync_every,
        reduce,
        outer,
        inner,
        diverges,
        # Without local steps, the reducer averages the gradients of a host.
        per_host=chosen.per_host if chosen.sync_every else 1,
    )
    for option, start in (
        ("synchronous_steps", Strategy()),
        ("shared_steps", Strategy(shared_batches=True)),
    ):
        steps = getattr(chosen, option)
        check_at_least(0, **{option: steps})
        if steps % max(1, chosen.sync_every):
            rule = f"must be a multiple of the {chosen.sync_every} inner steps of a round"
            raise InputError(option, f"{rule}, got {steps}.")
        if steps:
            strategy = replace(start, later={steps: strategy})
    return strategy


def build_phases(chosen: Config, total_steps: int) -> Strategy:
    """Builds the strategy of a run, whose rounds may grow as its learning rate decays.

    Args:
        chosen: Options of the run.
        total_steps: Number of optimizer steps of the run.

    Raises:
        InputError: If an option is out of range, or options conflict.
    """
    growth = chosen.aggregation.sync_growth
    if not growth:
        return build_strategy(chosen.aggregation)
    optimization = chosen.optimization
    # Only ratios to the peak matter, so that the learning rate may be swept.
    learning_rate = optimizers.build_schedule(
        1.0,
        optimization.schedule,
        optimization.warmup_steps,
        total_steps,
        optimization.schedule_start,
    )
    constant = build_strategy(replace(chosen.aggregation, sync_growth=0.0))
    return aggregate.quadratic_synchronization(constant, learning_rate, total_steps, growth)


def _build_reduce(chosen: AggregationOptions) -> optax.GradientTransformation:
    # A compiler may merge the all-reduce of `mean()` with that of the metrics; with fragments, it
    # would then not overlap the local steps.
    combine = _build_combine(chosen)
    if chosen.reduce == "power_sgd":
        reduce = aggregate.power_sgd(chosen.rank)
    elif chosen.reduce == "mean" and chosen.combine == "average" and chosen.fragments == 1:
        per_host = chosen.per_host
        reduce = aggregate.MEAN if per_host == 1 else aggregate.hierarchical_mean(per_host)
    else:
        codec = _build_codec(chosen)
        reduce = (
            aggregate.two_phase(codec, combine, chosen.per_host)
            if chosen.exchange == "two_phase"
            else aggregate.gathered(codec, chosen.per_host)
        )
    if chosen.dp_clip_norm is None:
        return reduce
    return aggregate.private(chosen.dp_clip_norm, chosen.dp_noise_multiplier, reduce)


def _build_codec(chosen: AggregationOptions) -> Codec:
    # Functions, so that only the chosen codec checks its options.
    codecs = {
        "mean": aggregate.exact,
        "int8": lambda: aggregate.quantize(8, chosen.levels),
        "int4": lambda: aggregate.quantize(4, chosen.levels),
        "int2": lambda: aggregate.quantize(2, chosen.levels),
        "sign": aggregate.sign,
        "top_k": lambda: aggregate.top_k(chosen.keep, chosen.chunk, _build_values(chosen)),
        "random_k": lambda: aggregate.random_k(chosen.keep, chosen.chunk, _build_values(chosen)),
    }
    codec = codecs[chosen.reduce]()
    return (
        aggregate.error_feedback(codec, chosen.feedback_decay) if chosen.error_feedback else codec
    )


def _build_values(chosen: AggregationOptions) -> Codec:
    """Builds the codec that encodes the values that top_k or random_k keeps."""
    if chosen.kept_as == "f32":
        return aggregate.exact()
    if chosen.keep % 8:
        raise InputError(
            "keep",
            f"must be a multiple of 8 with kept_as {chosen.kept_as}, got {chosen.keep}.",
        )

    # The largest block of at most 256 values that divides the values kept in each chunk.
    block = max(size for size in range(8, min(chosen.keep, 256) + 1, 8) if chosen.keep % size == 0)
    if chosen.kept_as == "sign":
        return aggregate.sign(block)
    return aggregate.quantize(int(chosen.kept_as.removeprefix("int")), chosen.levels, block)


def _build_combine(chosen: AggregationOptions) -> Combine:
    match chosen.combine:
        case "average":
            return aggregate.average()
        case "median":
            return aggregate.median()
        case "trimmed_mean":
            return aggregate.trimmed_mean(chosen.byzantine)
        case "krum":
            return aggregate.krum(chosen.byzantine)
        case "multi_krum":
            return aggregate.multi_krum(chosen.byzantine)
        case "geometric_median":
            return aggregate.geometric_median()
        case "centered_clipping":
            return aggregate.centered_clipping(chosen.clip_radius)


def _build_outer(chosen: AggregationOptions) -> optax.GradientTransformation:
    rate = chosen.outer_learning_rate
    momentum = chosen.outer_momentum
    # optax does not check these numbers.
    check_positive(outer_learning_rate=rate)
    check_fraction(outer_momentum=momentum)
    outers = {
        "average": lambda: aggregate.AVERAGE,
        "momentum": lambda: optax.sgd(rate, momentum=momentum),
        "nesterov": lambda: optax.sgd(rate, momentum=momentum, nesterov=True),
        # The values of Reddi et al., 2021, but with optax's correction of the bias.
        "adam": lambda: optax.adam(rate, b2=0.99, eps=1e-3),
    }
    outer = outers[chosen.outer]()
    return optax.chain(aggregate.isotropic(), outer) if chosen.isotropic else outer


def build_trackers(names: Sequence[str], folder: Path) -> list[trackers.Tracker]:
    """Builds trackers by name.

    Args:
        names: Names of trackers, as in `RunOptions.track`.
        folder: Folder of the run. Tracked runs have its name; TensorBoard's files are written to
            its subfolder `tensorboard`.

    Raises:
        InputError: If the package of a tracker is not installed.
    """

    def build(name: str) -> trackers.Tracker:
        match name:
            case "tensorboard":
                return trackers.TensorBoard(folder / "tensorboard")
            case "mlflow":
                return trackers.MLflow(name=folder.name)
            case "wandb":
                return trackers.WandB(name=folder.name)
            case _:
                return trackers.Trackio(name=folder.name)

    return [build(name) for name in names]


def _data_dir(chosen: DataOptions) -> Path:
    if chosen.data_dir is None:
        raise InputError(
            "data_dir", "must be the folder of the pictures for --dataset folder, got none."
        )
    return chosen.data_dir


def _data_file(chosen: DataOptions) -> Path:
    if chosen.data_file is None:
        raise InputError(
            "data_file", f"must be the path of a file for --dataset {chosen.dataset}, got none."
        )
    return chosen.data_file
