"""The options of a run. This file is the command line: a field is an option, its docstring the help."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ctde_jax.config.presets import MODELS, PRESETS, describe

# The help of an option without a value of its own says in words what happens by default.
File = Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="")]
Folder = Annotated[Path | None, tyro.conf.arg(metavar="FOLDER", help_behavior_hint="")]
Name = Annotated[str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint="")]
Names = Annotated[
    tuple[str, ...], tyro.conf.arg(metavar="PATTERN [PATTERN ...]", help_behavior_hint="")
]
Text = Annotated[str | None, tyro.conf.arg(metavar="TEXT", help_behavior_hint="")]
Count = Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="")]
StrategyName = Annotated[
    Literal[tuple(PRESETS)],  # pyright: ignore[reportInvalidTypeForm]
    tyro.conf.arg(
        help=f"A published method: default values for the options below and --optimizer.\n{describe(PRESETS)}"
    ),
]
Number = Annotated[float | None, tyro.conf.arg(metavar="FLOAT", help_behavior_hint="")]


@dataclass(frozen=True)
class DataOptions:
    """Which examples there are, and which device gets them."""

    dataset: Literal["digits", "mnist", "fashion_mnist", "cifar10", "text", "npz", "csv"] = "digits"
    """Digits come with scikit-learn; the MNIST family and CIFAR-10 are downloaded where absent; text, npz and csv are
    your --data-file."""

    data_dir: Folder = None
    """Folder with the files of the MNIST family (IDX, plain or gz) or of CIFAR-10 (binary); by default your cache
    folder."""

    data_file: File = None
    """Your text in UTF-8, .npz file (x_train, y_train and maybe x_test, y_test) or folder of .npy files of these names,
    or .csv file; by default none."""

    window: int = 128
    """Characters of a text that make up an example."""

    stride: Count = None
    """Characters from the start of a training window to the start of the next; by default those of a window."""

    sequence: Literal["none", "rows", "pixels"] = "none"
    """Whether pictures are read as sequences, row by row or pixel by pixel."""

    shift: int = 0
    """Pixels by which a training picture is moved at random, at most, anew in every epoch."""

    flip: bool = False
    """Whether to mirror training pictures at random, left to right."""

    cutout: int = 0
    """Side of a square that is cut out of training pictures at random, in pixels."""

    validation_share: float = 0.0
    """Share of the training examples that is set aside to say when to stop; see --patience."""

    label_column: Name = None
    """Name of the csv column that holds the label; by default the last one."""

    partition: Literal["reshuffled", "iid", "by_label", "dirichlet"] = "reshuffled"
    """Who gets which examples: dealt anew in every epoch, or kept for good, shared out at random or by label."""

    label_shards: int = 2
    """Shards of the examples sorted by label that each device keeps, for the partition by_label."""

    clients: Count = None
    """Parts of the partition, of which each device trains one, drawn anew in every round; by default one a device."""

    dirichlet_alpha: float = 0.5
    """How even each label's shares are, for the partition dirichlet: small is uneven, large is even."""


@dataclass(frozen=True)
class ModelOptions:
    """What is trained."""

    model: Annotated[
        Literal[tuple(MODELS)],  # pyright: ignore[reportInvalidTypeForm]
        tyro.conf.arg(
            help=f"The network, and default values for the options of its kind.\n{describe(MODELS)}"
        ),
    ] = "mlp"

    widths: tuple[int, ...] = (128,)
    """Widths of an mlp's hidden layers, the input's and the output's being the data's; or the channels of a resnet's
    stages."""

    activation: Literal["tanh", "relu", "gelu", "silu"] = "tanh"
    """The function between two layers of an mlp."""

    width: int = 128
    """Numbers in the state of a recurrent layer, or in the vector of a transformer's token."""

    layers: int = 1
    """Recurrent layers, blocks of a transformer, or blocks in each stage of a resnet."""

    heads: int = 4
    """Parts of a vector that a transformer's attention looks at by themselves."""

    dropout: float = 0.0
    """Share of the numbers that are left out at random in training."""

    norm: Literal["group", "batch"] = "group"
    """What a resnet normalizes over: groups of channels of one example, or all examples."""

    batch_statistics: Literal["averaged", "synchronized"] = "synchronized"
    """Examples over which --norm batch takes its statistics. synchronized: the whole batch, so the number of devices
    changes nothing; with --sync-every, the examples of one device. averaged: always the examples of one device."""

    init: Literal[
        "flax",
        "glorot",
        "he",
        "orthogonal",
        "delta_orthogonal",
        "recurrent",
        "residual",
        "lsuv",
        "mup",
    ] = "flax"
    """How the weights start."""

    base_width: Count = None
    """Width at which the learning rate of --init mup was found; by default none."""

    precision: Literal["f32", "bf16"] = "f32"
    """What the network computes in, by JAX's default matrix products; parameters and updates are always f32."""


@dataclass(frozen=True)
class OptimizationOptions:
    """How each step goes downhill."""

    optimizer: Literal["sgd", "momentum", "adam", "adamw", "lion", "muon"] = "adam"
    """The rule that turns gradients into updates."""

    learning_rate: float = 0.008
    """The largest learning rate of the run."""

    schedule: Literal["constant", "cosine", "linear"] = "cosine"
    """How the learning rate goes on after the warm-up; cosine and linear end at zero."""

    warmup_steps: int = 0
    """Optimizer steps in which the learning rate rises from zero."""

    schedule_start: int = 0
    """Optimizer step at which warmup and schedule start; for --branch-from with --learning-rate, --schedule or
    --warmup-steps, the step of that checkpoint."""

    weight_decay: Number = None
    """Share of the kernels that a step takes off, in units of the learning rate; by default 0.0001 for adamw, 0.001 for
    lion, and 0 for muon."""

    max_grad_norm: Number = None
    """Norm to which longer gradients are shortened; by default they are not."""

    label_smoothing: float = 0.0
    """Share of the uniform distribution in the labels that training aims at."""

    batch_size: int = 64
    """Examples of one optimizer step, over all devices together."""

    accumulate: int = 1
    """Groups in which a device computes its part of a batch, one after another, to save memory."""

    ema_decay: Number = None
    """Share that an exponential moving average of the parameters keeps of itself whenever devices agree, from the first
    parameters on; then that average is evaluated and returned; by default there is none."""

    patience: Count = None
    """Evaluations in a row that may fail to lower the validation loss before training ends; by default any number."""

    on_nonfinite: Literal["stop", "skip", "rollback"] = "stop"
    """What to do where loss or parameters become NaN or infinite: stop; leave out that round on all devices; or go back
    to the newest checkpoint and halve all updates, at most three times."""

    epochs: int = 10
    """How often to go through the training data."""

    steps: Count = None
    """Optimizer steps to take, instead of --epochs; by default those of the epochs."""

    seed: int = 0
    """Of the model's start, the data's order and dropout."""


@dataclass(frozen=True)
class AggregationOptions:
    """How the devices agree."""

    devices: Count = None
    """Devices to train on, of each host; by default all accelerators, or if there is none 4 fake CPU devices, and of
    several hosts 1 each."""

    strategy: StrategyName = "ddp"

    sync_every: int = 0
    """Steps that a device takes alone before they agree on parameters; 0 agrees on the gradient of every step."""

    exact: bool = False
    """Whether the training has the same bits on 1, 2, 4 and 8 fake CPU devices: 8 shards of each batch are computed one
    after another, and their gradients summed in one order by every device."""

    synchronous_steps: int = 0
    """Steps at the start of the run at which the gradients are averaged, before --sync-every begins."""

    reduce: Literal["mean", "int8", "int4", "int2", "sign", "top_k", "random_k", "power_sgd"] = (
        "mean"
    )
    """What is sent: numbers in float32 or fewer bits, the largest or random ones only, or products of low rank."""

    combine: Literal[
        "average",
        "median",
        "trimmed_mean",
        "krum",
        "multi_krum",
        "geometric_median",
        "centered_clipping",
    ] = "average"
    """What is made of what arrives: the average by examples, or a rule that bears bad devices."""

    exchange: Literal["two_phase", "gathered"] = "two_phase"
    """How compressed messages travel: through the owner of each slice, or from everybody to everybody."""

    error_feedback: bool = False
    """Whether to send with the next message what this one could not say."""

    feedback_decay: float = 1.0
    """The part of it that is still sent, from 0 to 1."""

    levels: Literal["linear", "statistical"] = "linear"
    """The values that few bits can say: evenly spaced, or the best for normally distributed numbers."""

    keep: int = 128
    """Numbers that top_k and random_k keep in each chunk."""

    chunk: int = 4096
    """Numbers in a chunk."""

    kept_as: Literal["f32", "int8", "int4", "int2", "sign"] = "f32"
    """How the kept numbers are written."""

    rank: int = 4
    """Rank of the products that power_sgd sends."""

    byzantine: int = 1
    """How many bad devices trimmed_mean, krum and multi_krum must bear."""

    clip_radius: float = 1.0
    """How far from the last message centered_clipping follows a device, in the norm of a whole message."""

    clip_norm: Number = None
    """Norm to which each device's message is clipped, for differential privacy; by default none."""

    noise_multiplier: float = 0.0
    """Standard deviation of the noise on the sum of clipped messages, in units of --clip-norm."""

    outer: Literal["average", "momentum", "nesterov", "adam"] = "average"
    """What the center does with the agreed change: follow it, or an optimizer's step."""

    outer_learning_rate: float = 1.0
    """Of the outer optimizer."""

    outer_momentum: float = 0.9
    """Of the outer optimizers momentum and nesterov."""

    isotropic: bool = False
    """Whether to give the agreed change of each matrix equal singular values before the outer optimizer."""

    proximal: float = 0.0
    """How strongly a device is pulled to the round's first parameters while it is alone."""

    fragments: int = 1
    """Parts of the model that are agreed on in turn, one a round, during the next round's steps."""

    graph: Literal["none", "ring", "exponential", "pairs"] = "none"
    """The neighbors with whom each device mixes its own parameters, instead of a center."""


@dataclass(frozen=True)
class RunOptions:
    """Where the results go, and how often something is measured."""

    config: File = None
    """The config.json of a run to be repeated, its options replaced by those given here; by default none."""

    run_dir: Folder = None
    """The folder for configuration, metrics, curves and checkpoints; by default runs/ with data set, model and time."""

    resume: Literal["auto", "never"] = "auto"
    """Whether to continue the run in --run-dir; `never` trains from the start, and moves an earlier run into the
    subfolder previous-1, or the next number."""

    init_from: Folder = None
    """Start from the parameters of this run, checkpoint, bundle or .safetensors file (default: random
    initialization). The optimizer state and the step start anew; see --branch-from to continue a run with both."""

    init_only: Names = ()
    """Patterns of the parameters to take from --init-from, such as 'layers/0/*' (default: all of them must match)."""

    branch_from: Folder = None
    """Continue from this checkpoint of another run, with its options except those given here (default: none)."""

    save_every: Count = None
    """At most so many optimizer steps, or a round where that is longer, lie between two checkpoints; by default those
    of about a minute."""

    keep_checkpoints: int = 2
    """How many of the newest checkpoints stay."""

    keep_best: Name = None
    """The loss, or the metric such as accuracy, whose best checkpoint stays beside the newest, as measured on the
    validation split or else the test split; whatever is the best so far is saved at once; by default only the newest
    stay."""

    eval_every: Count = None
    """Optimizer steps between two evaluations, which wait for the end of a round; by default an epoch."""

    log_every: int = 20
    """At most so many optimizer steps, or a round where that is longer, lie between two lines of metrics."""

    reestimate_batches: int = 0
    """Training batches over which --norm batch takes its statistics anew before every evaluation."""

    prompt: Text = None
    """How the text starts that a language model writes at every evaluation; by default with the first character of its
    training text."""

    sample_length: int = 200
    """Characters of that text; 0 for none."""


@dataclass(frozen=True)
class HostOptions:
    """Where several hosts meet, each of which runs this command; by default what Slurm, MPI or a TPU pod says."""

    coordinator: Text = None
    """Address and port of host 0, which it opens and all others reach, such as 10.0.0.1:1234; by default that of the
    launcher."""

    num_processes: Count = None
    """How many hosts there are; by default as many as the launcher has started."""

    process_id: Count = None
    """Which of them this is, from 0; by default as the launcher says."""

    coordinator_bind: Text = None
    """Address and port that host 0 opens where it is another than --coordinator, such as 0.0.0.0:1234; nobody who
    reaches it is asked who they are."""

    join_timeout: int = 300
    """Seconds that the hosts may take to come."""


@dataclass(frozen=True)
class Config:
    """Trains one model centrally over many devices, and evaluates what they agreed on."""

    data: DataOptions = field(default_factory=DataOptions)
    model: ModelOptions = field(default_factory=ModelOptions)
    optimization: OptimizationOptions = field(default_factory=OptimizationOptions)
    aggregation: AggregationOptions = field(default_factory=AggregationOptions)
    run: RunOptions = field(default_factory=RunOptions)
    hosts: HostOptions = field(default_factory=HostOptions)
