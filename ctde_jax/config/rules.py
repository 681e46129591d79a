"""Rules between options, as tables: options that require others, and mutually exclusive ones."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ctde_jax.config.options import AggregationOptions, DataOptions
from ctde_jax.errors import InputError, check_at_least, check_at_most

_MOST_FRAGMENTS = 1000
"""Maximum number of fragments; each one adds to the compiled program of a round."""


class Exclusion(NamedTuple):
    """Options of the aggregation that must have their default values if a condition holds."""

    applies: Callable[[AggregationOptions], Any]
    """The condition, whose result is true or false."""

    options: tuple[str, ...]
    sentence: str
    """End of the error message; names of options in braces are replaced by their values."""


EXCLUSIONS = (
    # Exactness, and options of rounds with local steps.
    Exclusion(
        lambda chosen: chosen.exact,
        ("sync_every", "per_host", "reduce", "combine", "dp_clip_norm"),
        "must not be set with exact, which sums the uncompressed gradients of every step.",
    ),
    Exclusion(
        lambda chosen: chosen.sync_every < 1,
        (
            *("outer", "isotropic", "proximal", "synchronous_steps", "fragments", "graph"),
            *("sync_growth", "shared_steps"),
        ),
        "requires sync_every of at least 1, got {sync_every}.",
    ),
    Exclusion(
        lambda chosen: chosen.sync_growth,
        ("synchronous_steps", "shared_steps", "fragments"),
        "must not be set with sync_growth.",
    ),
    Exclusion(
        lambda chosen: chosen.synchronous_steps,
        ("shared_steps",),
        "must be 0 with synchronous_steps, got {shared_steps}.",
    ),
    # Gossip and fragments, which determine what is sent.
    Exclusion(
        lambda chosen: chosen.graph != "none",
        ("per_host", "reduce", "combine", "dp_clip_norm", "fragments"),
        "must not be set with graph {graph}, which mixes the parameters of neighbors.",
    ),
    Exclusion(
        lambda chosen: chosen.fragments > 1 and chosen.reduce == "power_sgd",
        ("reduce",),
        "must not be power_sgd with fragments, which split matrices into vectors.",
    ),
    Exclusion(
        lambda chosen: chosen.fragments > 1,
        ("isotropic",),
        "must not be set with fragments, which split matrices into vectors.",
    ),
    # Hosts: their devices have equal parameters, and exchange parts of one message.
    Exclusion(
        lambda chosen: chosen.fragments > 1,
        ("per_host",),
        "must be 1 with fragments, after which the parameters of devices differ, got {per_host}.",
    ),
    Exclusion(
        lambda chosen: chosen.reduce == "power_sgd",
        ("per_host",),
        "must be 1 with reduce power_sgd, which sends factors of whole matrices, got {per_host}.",
    ),
    Exclusion(
        lambda chosen: chosen.dp_clip_norm is not None,
        ("per_host",),
        "must be 1 with dp_clip_norm, which clips the message of each device, got {per_host}.",
    ),
    # Combination of messages: only the owner of a slice can apply a robust rule to it.
    Exclusion(
        lambda chosen: chosen.reduce == "power_sgd" or chosen.exchange == "gathered",
        ("combine",),
        "must be average with reduce power_sgd or exchange gathered, got {combine}.",
    ),
    Exclusion(
        lambda chosen: chosen.combine != "average",
        ("synchronous_steps",),
        "must be 0 with combine {combine}, as synchronous steps average the gradients.",
    ),
    # Differential privacy: the noise is calibrated for the exact average of clipped messages.
    Exclusion(
        lambda chosen: chosen.dp_clip_norm is None,
        ("dp_noise_multiplier",),
        "requires dp_clip_norm, got none.",
    ),
    Exclusion(
        lambda chosen: chosen.dp_clip_norm is not None,
        ("synchronous_steps",),
        "must be 0 with dp_clip_norm, as synchronous steps send unclipped gradients.",
    ),
    Exclusion(
        lambda chosen: chosen.dp_clip_norm is not None,
        ("shared_steps",),
        "must be 0 with dp_clip_norm, as steps on shared batches add no noise.",
    ),
    Exclusion(
        lambda chosen: chosen.dp_clip_norm is not None and chosen.dp_noise_multiplier,
        ("reduce", "combine"),
        "must not be set with dp_noise_multiplier, as the noise is calibrated for the mean.",
    ),
)

_COMPRESSED = ("int8", "int4", "int2", "sign", "top_k", "random_k")

NEEDS: Mapping[str, tuple[str, tuple[Any, ...]]] = {
    # Compression, combination and outer optimizer.
    "keep": ("reduce", ("top_k", "random_k")),
    "chunk": ("reduce", ("top_k", "random_k")),
    "kept_as": ("reduce", ("top_k", "random_k")),
    "levels": ("reduce", ("int8", "int4", "int2", "top_k", "random_k")),
    "rank": ("reduce", ("power_sgd",)),
    "sync_growth": ("schedule", ("cosine", "linear")),
    "error_feedback": ("reduce", _COMPRESSED),
    "feedback_decay": ("error_feedback", (True,)),
    "exchange": ("reduce", _COMPRESSED),
    "byzantine": ("combine", ("trimmed_mean", "krum", "multi_krum")),
    "clip_radius": ("combine", ("centered_clipping",)),
    "outer_learning_rate": ("outer", ("momentum", "nesterov", "adam")),
    "outer_momentum": ("outer", ("momentum", "nesterov")),
    # Pictures, texts, and data with one label per example.
    "image_size": ("dataset", ("folder",)),
    "skip_unreadable": ("dataset", ("folder",)),
    "context_length": ("dataset", ("text",)),
    "stride": ("dataset", ("text",)),
    "prompt": ("dataset", ("text",)),
    "sample_length": ("dataset", ("text",)),
    "report": (
        "dataset",
        ("digits", "mnist", "fashion_mnist", "cifar10", "folder", "npz", "csv", "parquet"),
    ),
    # Networks and their optimizer.
    "hidden_sizes": ("model", ("mlp",)),
    "channels": ("model", ("resnet",)),
    "activation": ("model", ("mlp",)),
    "hidden_size": ("model", ("lstm", "gru", "transformer")),
    "layers": ("model", ("resnet", "lstm", "gru", "transformer")),
    "heads": ("model", ("transformer",)),
    "dropout_rate": ("model", ("cnn", "lstm", "gru", "transformer")),
    "norm": ("model", ("resnet",)),
    "batch_statistics": ("norm", ("batch",)),
    "reestimate_batches": ("norm", ("batch",)),
    "base_width": ("init", ("mup",)),
    "weight_decay": ("optimizer", ("adamw", "lion", "muon")),
    # Partitions.
    "label_shards": ("partition", ("by_label",)),
    "dirichlet_alpha": ("partition", ("dirichlet",)),
}
"""Options that have no effect unless another option has one of the listed values.

By option: the name of the other option and these values.
"""

_FILES = {
    "data_dir": ("mnist", "fashion_mnist", "cifar10", "folder"),
    "data_file": ("text", "npz", "csv", "parquet"),
    "label_column": ("csv", "parquet"),
    "drop": ("csv", "parquet"),
    "categorical": ("csv", "parquet"),
    "weights": ("csv", "parquet"),
}
"""Options that name files or columns, and the data sets that are read from them."""


def check_aggregation(chosen: AggregationOptions) -> None:
    """Raises InputError if options of the aggregation conflict, or `fragments` is out of range."""
    # An option is regarded as given if it differs from its default.
    default = AggregationOptions()
    check_at_least(1, fragments=chosen.fragments, per_host=chosen.per_host)
    check_at_most(_MOST_FRAGMENTS, fragments=chosen.fragments)
    for rule in EXCLUSIONS:
        if not rule.applies(chosen):
            continue
        for option in rule.options:
            if getattr(chosen, option) != getattr(default, option):
                raise InputError(option, rule.sentence.format(**vars(chosen)))


def check_files(chosen: DataOptions) -> None:
    """Raises InputError if a file or a column is given that the data set does not use."""
    for option, datasets in _FILES.items():
        if getattr(chosen, option) not in (None, ()) and chosen.dataset not in datasets:
            known = " or ".join(datasets)
            raise InputError(option, f"requires --dataset {known}, got --dataset {chosen.dataset}.")
    if chosen.task != "auto" and chosen.dataset not in ("npz", "csv", "parquet"):
        raise InputError(
            "task", f"must be auto with --dataset {chosen.dataset}, got {chosen.task}."
        )
    if chosen.task == "multilabel" and chosen.dataset != "npz":
        raise InputError("task", "must not be multilabel with a table, which has one label column.")
