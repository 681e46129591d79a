"""From options to objects: the data, the partition, the model and the strategy that a configuration names."""

from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import optax

from ctde_jax import aggregate, config, data, models
from ctde_jax.aggregate import Codec, Combine, Strategy
from ctde_jax.data import Dataset
from ctde_jax.errors import InputError, check_at_least, check_known
from ctde_jax.models import Model
from ctde_jax.presets import PRESETS


def load_data(chosen: config.Data) -> Dataset:
    """Loads the data set that the options name."""
    goes_with = {"data_dir": ("mnist", "fashion_mnist"), "data_file": ("npz", "csv"), "label_column": ("csv",)}
    for option, datasets in goes_with.items():
        if getattr(chosen, option) is not None and chosen.dataset not in datasets:
            raise InputError(option, f"goes with --dataset {' or '.join(datasets)}, got --dataset {chosen.dataset}.")
    match chosen.dataset:
        case "digits":
            return data.digits()
        case "mnist":
            return data.mnist(chosen.data_dir)
        case "fashion_mnist":
            return data.fashion_mnist(chosen.data_dir)
        case "npz":
            return data.from_npz(_data_file(chosen))
        case "csv":
            return data.from_csv(_data_file(chosen), chosen.label_column)


def make_partition(chosen: config.Data, labels: np.ndarray, replicas: int, seed: int) -> list[np.ndarray] | None:
    """Shares the training examples out to the devices, or to clients, for good; or not at all."""
    if chosen.clients is not None and chosen.partition == "reshuffled":
        raise InputError("clients", "need a --partition that stays, such as iid, got --partition reshuffled.")
    parts = replicas if chosen.clients is None else chosen.clients
    match chosen.partition:
        case "reshuffled":
            return None
        case "iid":
            return data.partition.iid(labels, parts, seed)
        case "by_label":
            return data.partition.by_label(labels, parts, chosen.label_shards, seed)
        case "dirichlet":
            return data.partition.dirichlet(labels, parts, chosen.dirichlet_alpha, seed)


def build_model(chosen: config.Model, dataset: Dataset) -> Model:
    """Builds the network between the data's inputs and its classes."""
    widths = [prod(dataset.train.inputs.shape[1:]), *chosen.widths, len(dataset.classes)]
    model = models.mlp(widths, chosen.activation)
    return models.in_bfloat16(model) if chosen.precision == "bf16" else model


def strategy(name: str, **options: Any) -> Strategy:
    """Makes a published strategy, its options replaced by those given: `strategy("diloco", sync_every=64)`.

    The optimizer of the inner steps is not part of it: `mu-loco` is DiLoCo with Muon inside, so give `fit` that.

    Args:
        name: One of `presets.PRESETS`.
        **options: Fields of `config.Aggregation`.

    Raises:
        InputError: The name or an option is not known, or options exclude each other.
    """
    check_known("strategy", name, PRESETS)
    known = config.Aggregation.__dataclass_fields__
    for option in options:
        check_known("strategy's option", option, known)
    preset = {option: value for option, value in PRESETS[name].options.items() if option in known}
    return build_strategy(config.Aggregation(**{**preset, **options}))


def build_strategy(chosen: config.Aggregation) -> Strategy:
    """Composes the strategy of the options.

    Raises:
        InputError: An option is out of its range, or options exclude each other.
    """
    reduce, outer = _build_reduce(chosen), _build_outer(chosen)
    inner = aggregate.proximal(chosen.proximal) if chosen.proximal else aggregate.UNCHANGED
    check_at_least(1, fragments=chosen.fragments)
    if chosen.graph != "none":
        for option in ("reduce", "combine", "clip_norm"):
            if getattr(chosen, option) != getattr(_DEFAULT, option):
                raise InputError(option, f"must be left out with --graph {chosen.graph}, which sends parameters.")
        reduce = aggregate.gossip(chosen.graph)
    diverges = chosen.graph != "none" or chosen.fragments > 1
    if chosen.fragments > 1:
        streamed = None if chosen.reduce == "mean" and chosen.combine == "average" else reduce
        reduce, outer = aggregate.streaming(chosen.fragments, streamed, outer), aggregate.AVERAGE
    return Strategy(chosen.sync_every, reduce, outer, inner, chosen.synchronous_steps, diverges)


_DEFAULT = config.Aggregation()


def _build_reduce(chosen: config.Aggregation) -> optax.GradientTransformation:
    combine = _build_combine(chosen)
    if chosen.combine != "average" and (chosen.reduce == "power_sgd" or chosen.exchange == "gathered"):
        how = "--reduce power_sgd" if chosen.reduce == "power_sgd" else "--exchange gathered"
        raise InputError("combine", f"must be average with {how}, which has no owners, got {chosen.combine}.")
    if chosen.reduce == "power_sgd":
        reduce = aggregate.power_sgd(chosen.rank)
    elif chosen.reduce == "mean" and chosen.combine == "average":
        reduce = aggregate.mean()
    else:
        codec = _build_codec(chosen)
        reduce = aggregate.two_phase(codec, combine) if chosen.exchange == "two_phase" else aggregate.gathered(codec)
    if chosen.clip_norm is None:
        return reduce
    return aggregate.private(chosen.clip_norm, chosen.noise_multiplier, reduce)


def _build_codec(chosen: config.Aggregation) -> Codec:
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
    return aggregate.error_feedback(codec, chosen.feedback_decay) if chosen.error_feedback else codec


def _build_values(chosen: config.Aggregation) -> Codec:
    """Builds what writes the numbers that a sparse codec keeps, in blocks as large as one chunk's or smaller."""
    block = 8 * max(1, min(chosen.keep, 256) // 8)
    match chosen.kept_as:
        case "f32":
            return aggregate.exact()
        case "sign":
            return aggregate.sign(block)
        case bits:
            return aggregate.quantize(int(bits.removeprefix("int")), chosen.levels, block)


def _build_combine(chosen: config.Aggregation) -> Combine:
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


def _build_outer(chosen: config.Aggregation) -> optax.GradientTransformation:
    rate, momentum = chosen.outer_learning_rate, chosen.outer_momentum
    outers = {
        "average": lambda: aggregate.AVERAGE,
        "momentum": lambda: optax.sgd(rate, momentum=momentum),
        "nesterov": lambda: optax.sgd(rate, momentum=momentum, nesterov=True),
        "adam": lambda: optax.adam(rate, b2=0.99, eps=1e-3),  # as Reddi et al., 2021
    }
    outer = outers[chosen.outer]()
    return optax.chain(aggregate.isotropic(), outer) if chosen.isotropic else outer


def _data_file(chosen: config.Data) -> Path:
    if chosen.data_file is None:
        raise InputError("data_file", f"must name your file for --dataset {chosen.dataset}, got none.")
    return chosen.data_file
