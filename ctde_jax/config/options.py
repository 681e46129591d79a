"""Options of a run and of the command line: a field is an option, its docstring the help text."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ctde_jax.config.presets import MODELS, PRESETS

# Options that default to None: their docstrings describe the default, so tyro must not append it.
File = Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="")]
Folder = Annotated[Path | None, tyro.conf.arg(metavar="FOLDER", help_behavior_hint="")]
Name = Annotated[str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint="")]
Names = Annotated[
    tuple[str, ...], tyro.conf.arg(metavar="PATTERN [PATTERN ...]", help_behavior_hint="")
]
Sweeps = Annotated[
    tuple[str, ...], tyro.conf.arg(metavar="NAME=VALUES [NAME=VALUES ...]", help_behavior_hint="")
]
Weights = Annotated[
    tuple[str, ...],
    tyro.conf.arg(metavar="{balanced,FLOAT [FLOAT ...]}", help_behavior_hint=""),
]
Columns = Annotated[
    tuple[str, ...], tyro.conf.arg(metavar="NAME [NAME ...]", help_behavior_hint="")
]
Sizes = Annotated[tuple[int, ...], tyro.conf.arg(metavar="INT [INT]", help_behavior_hint="")]
Address = Annotated[str | None, tyro.conf.arg(metavar="ADDRESS", help_behavior_hint="")]
Text = Annotated[str | None, tyro.conf.arg(metavar="TEXT", help_behavior_hint="")]
Count = Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="")]
ModelName = Literal[tuple(MODELS)]  # pyright: ignore[reportInvalidTypeForm]
StrategyName = Literal[tuple(PRESETS)]  # pyright: ignore[reportInvalidTypeForm]
Trackers = Annotated[
    tuple[Literal["tensorboard", "mlflow", "wandb", "trackio"], ...],
    tyro.conf.arg(help_behavior_hint=""),
]
Number = Annotated[float | None, tyro.conf.arg(metavar="FLOAT", help_behavior_hint="")]


@dataclass(frozen=True)
class DataOptions:
    """Data set, augmentation, and assignment of examples to devices."""

    # Source of the examples.
    dataset: Literal[
        "digits", "mnist", "fashion_mnist", "cifar10", "folder", "text", "npz", "csv", "parquet"
    ] = "digits"
    """Data set; digits comes with scikit-learn, the MNIST family and CIFAR-10 are downloaded if
    absent, folder is read from --data-dir, and text, npz, csv and parquet are read from
    --data-file."""

    data_dir: Folder = None
    """Folder with one folder of PNG and JPEG pictures for each class, for --dataset folder; or with
    the files of the MNIST family (IDX, plain or gz) or of CIFAR-10 (binary), by default your cache
    folder."""

    data_file: File = None
    """UTF-8 text, .npz file (x_train, y_train and optionally x_test, y_test), folder of .npy files
    with these names, .csv or .parquet file; by default none."""

    # Pictures in folders.
    image_size: Sizes = ()
    """Height and width, or one number for both, to which the pictures of --dataset folder are
    resized and center-cropped; by default all pictures must have the same size."""

    skip_unreadable: bool = False
    """Leave out files of --dataset folder that are not complete pictures."""

    # Texts, and images as sequences.
    context_length: int = 128
    """Context length: number of characters per example, for --dataset text."""

    stride: Count = None
    """Characters between the starts of training windows of a text; by default --context-length."""

    sequence: Literal["none", "rows", "pixels"] = "none"
    """Read images as sequences, row by row or pixel by pixel."""

    # Augmentations, applied on the devices during training.
    shift: int = 0
    """Augmentation: maximum random shift of training images in pixels, different in every epoch."""

    flip: bool = False
    """Augmentation: random horizontal flips of training images."""

    cutout: int = 0
    """Augmentation: side length of a random square cut out of training images, in pixels."""

    validation_fraction: float = 0.0
    """Fraction of the training examples held out for validation; see --patience."""

    label_column: Name = None
    """Name of the label column of a csv or parquet file; by default the last one."""

    drop: Columns = ()
    """Names of columns of a csv or parquet file that are not used, such as identifiers;
    by default all are used."""

    categorical: Columns = ()
    """Names of columns of a csv or parquet file whose numbers are categories, such as zip codes;
    by default numbers are quantities."""

    weights: Name = None
    """Name of the column of sample weights of a csv or parquet file, which multiply the loss in
    training; by default all examples have equal weight."""

    task: Literal["auto", "classification", "multilabel", "regression"] = "auto"
    """Task of an npz, csv or parquet file: classification, several labels of 0 or 1 per example
    (multilabel, npz only), or regression of targets;
    auto is classification, but refuses numbers that look like measurements."""

    # Which device trains on which examples.
    partition: Literal["reshuffled", "iid", "by_label", "dirichlet"] = "reshuffled"
    """Assignment of examples to devices: reshuffled in every epoch, or fixed;
    iid assigns them at random, by_label and dirichlet by label."""

    label_shards: int = 2
    """Number of shards of the label-sorted examples per device, for --partition by_label."""

    clients: Count = None
    """Number of clients among which a fixed --partition divides the examples.
    Each round draws one client for every device; by default one client per device."""

    dirichlet_alpha: float = 0.5
    """Concentration of --partition dirichlet: small divides each label unevenly, large evenly."""


@dataclass(frozen=True)
class ModelOptions:
    """Network, initialization and precision."""

    model: ModelName = "mlp"
    """Network, and default values for the options of its kind."""

    # Architecture.
    hidden_sizes: tuple[int, ...] = (128,)
    """Hidden sizes of an mlp; the sizes of its input and output follow from the data."""

    channels: tuple[int, ...] = (16, 32, 64)
    """Number of channels of each stage of a resnet."""

    activation: Literal["tanh", "relu", "gelu", "silu"] = "tanh"
    """Activation function of an mlp."""

    hidden_size: int = 128
    """Hidden size of recurrent layers; embedding size of the transformer."""

    layers: int = 1
    """Number of recurrent layers, of transformer blocks, or of blocks per stage of a resnet."""

    heads: int = 4
    """Number of attention heads of the transformer."""

    dropout_rate: float = 0.0
    """Dropout rate of a cnn, lstm, gru or transformer."""

    norm: Literal["group", "batch"] = "group"
    """Normalization of a resnet: over groups of channels of one example, or over all examples."""

    batch_statistics: Literal["averaged", "synchronized"] = "synchronized"
    """Examples over which --norm batch computes its statistics.
    synchronized: the global batch, so the number of devices has no effect; with --sync-every, the
    examples of one device. averaged: always the examples of one device."""

    # Initialization and precision.
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
    """Initialization of the weights."""

    base_width: Count = None
    """Width at which the learning rate was tuned, for --init mup; by default none."""

    precision: Literal["f32", "bf16"] = "f32"
    """Precision of the network, with JAX's default precision of matrix products;
    parameters and updates are always f32."""


@dataclass(frozen=True)
class OptimizationOptions:
    """Optimizer, learning-rate schedule, batch and early stopping."""

    # Optimizer and schedule.
    optimizer: Literal["sgd", "momentum", "adam", "adamw", "lion", "muon"] = "adam"
    """Optimizer; with --sync-every, that of the local steps."""

    learning_rate: float = 0.008
    """Peak learning rate (lr)."""

    schedule: Literal["constant", "cosine", "linear"] = "cosine"
    """Learning-rate schedule after warmup; cosine and linear decay to zero."""

    warmup_steps: int = 0
    """Optimizer steps of linear learning-rate warmup from zero."""

    schedule_start: int = 0
    """Optimizer step at which warmup and schedule start; for --branch-from with --learning-rate,
    --schedule or --warmup-steps, the step of that checkpoint."""

    weight_decay: Number = None
    """Decoupled weight decay, in units of the learning rate; applied to parameters with two or more
    axes; by default 0.0001 for adamw, 0.001 for lion, and 0 for muon."""

    clip_grad_norm: Number = None
    """Clip gradients to this global norm, and log the norm before; by default no clipping."""

    # Loss and batch.
    label_smoothing: float = 0.0
    """Label smoothing: weight of the uniform distribution in the training targets."""

    focal_gamma: float = 0.0
    """Focal loss: exponent of the factor by which examples that are already classified well count
    less, such as 2; 0 minimizes the cross-entropy."""

    class_weights: Weights = ()
    """Weights of the classes in the minimized loss, for imbalanced data: balanced (inversely
    proportional to their numbers of training examples), or a number for each class in the order of
    the classes; by default all are 1."""

    batch_size: int = 64
    """Global batch size: examples per optimizer step, over all devices together."""

    accumulation_steps: int = 1
    """Number of microbatches per device for gradient accumulation, to save memory."""

    # Fine-tuning.
    freeze: Names = ()
    """Patterns of the parameters that are not trained, such as 'layers/0/*';
    by default none, or with --lora-rank all."""

    lora_rank: Count = None
    """LoRA: train low-rank changes of this rank instead of the frozen kernels; by default none."""

    learning_rate_scales: Names = ()
    """Factors of the learning rate of some parameters, such as 'layers/0/*=0.1'; the first pattern
    that matches applies; by default all are 1."""

    # Averaging and stopping.
    ema_decay: Number = None
    """Decay of an exponential moving average of the parameters, updated at every aggregation.
    The average starts at the initial parameters; it is evaluated and returned; by default none."""

    patience: Count = None
    """Early stopping: stop after this many evaluations without improvement of the validation loss;
    by default no early stopping."""

    on_nonfinite: Literal["stop", "skip", "rollback"] = "stop"
    """Action if the loss or parameters become NaN or infinite: stop; skip the round on all devices;
    or roll back to the newest checkpoint and halve all updates, at most three times."""

    # Length of the run.
    epochs: int = 10
    """Number of epochs."""

    steps: Count = None
    """Number of optimizer steps, instead of --epochs; by default the steps of --epochs."""

    seed: int = 0
    """Random seed for initialization, data order, augmentation and dropout."""


@dataclass(frozen=True)
class AggregationOptions:
    """When devices communicate, what they send, and how the result updates the parameters."""

    devices: Count = None
    """Number of devices (GPUs, TPU cores) per host; by default all accelerators, or if there are
    none 4 fake CPU devices (1 per host with several hosts)."""

    replicas: Count = None
    """Number of replicas on all devices together, a multiple of the number of devices; by default
    one per device. Without accelerators and --devices, each replica has a fake CPU device."""

    strategy: StrategyName = "ddp"
    """Published method: default values for the options below and --optimizer."""

    # When devices communicate.
    sync_every: int = 0
    """Number of local steps before each aggregation of parameters;
    0 aggregates the gradients of every step."""

    exact: bool = False
    """Train to the same bits on 1, 2, 4 and 8 fake CPU devices: 8 shards of each batch are computed
    one after another, and every device sums their gradients in the same order."""

    sync_growth: float = 0.0
    """QSR: let --sync-every grow with the square of (SYNC_GROWTH * peak / learning rate), in powers
    of two up to 32 times; at most 1; 0 for no growth."""

    synchronous_steps: int = 0
    """Number of initial steps that average the gradients, before --sync-every applies."""

    shared_steps: int = 0
    """Number of initial steps in which all devices train on the same batches, those of the first
    device, and send nothing."""

    per_host: int = 1
    """Number of consecutive devices, such as those of a host, that average their gradients in
    float32 at every step. --reduce then applies between hosts: to gradients, or with --sync-every
    to parameters."""

    # Compression, exchange and combination of messages.
    reduce: Literal["mean", "int8", "int4", "int2", "sign", "top_k", "random_k", "power_sgd"] = (
        "mean"
    )
    """Compression of messages: none, in float32 (mean); quantization (int8, int4, int2, sign);
    sparsification (top_k, random_k); or low rank (power_sgd)."""

    combine: Literal[
        "average",
        "median",
        "trimmed_mean",
        "krum",
        "multi_krum",
        "geometric_median",
        "centered_clipping",
    ] = "average"
    """Combination of messages: the average weighted by examples, or a Byzantine-robust rule."""

    exchange: Literal["two_phase", "gathered"] = "two_phase"
    """Exchange of compressed messages: through the owner of each slice, or by all-gather."""

    error_feedback: bool = False
    """Error feedback: add the residual of compressing a message to the next one."""

    feedback_decay: float = 1.0
    """Factor of the residual in --error-feedback, from 0 to 1."""

    levels: Literal["linear", "statistical"] = "linear"
    """Quantization levels: evenly spaced, or optimal for normally distributed values."""

    # Sparse and low-rank messages.
    keep: int = 128
    """Number of values per chunk that top_k and random_k keep."""

    chunk: int = 4096
    """Chunk size of top_k and random_k, in values."""

    kept_as: Literal["f32", "int8", "int4", "int2", "sign"] = "f32"
    """Format of the values that top_k and random_k keep."""

    rank: int = 4
    """Rank of the approximation by power_sgd."""

    # Byzantine-robust combination.
    byzantine: int = 1
    """Number of Byzantine devices that trimmed_mean, krum and multi_krum tolerate."""

    clip_radius: float = 1.0
    """Radius of centered_clipping around the last aggregated message, as a global norm."""

    # Differential privacy.
    dp_clip_norm: Number = None
    """Differential privacy: clip each device's message to this global norm; by default none."""

    dp_noise_multiplier: float = 0.0
    """Differential privacy: standard deviation of the noise on the sum of clipped messages,
    in units of --dp-clip-norm."""

    # Update of the parameters.
    outer: Literal["average", "momentum", "nesterov", "adam"] = "average"
    """Outer optimizer of the aggregated change; average applies the change as it is."""

    outer_learning_rate: float = 1.0
    """Learning rate of the outer optimizer."""

    outer_momentum: float = 0.9
    """Momentum of the outer optimizers momentum and nesterov."""

    isotropic: bool = False
    """Make the singular values of each matrix of the aggregated change equal before --outer."""

    proximal: float = 0.0
    """FedProx: weight of the proximal term, which keeps local and shared parameters close."""

    fragments: int = 1
    """Streaming DiLoCo: number of fragments of the model, aggregated in turn, one per round,
    during the local steps of the next round."""

    graph: Literal["none", "ring", "exponential", "pairs"] = "none"
    """Gossip: graph in which each device mixes its parameters with those of its neighbors only."""


@dataclass(frozen=True)
class RunOptions:
    """Output folder, checkpoints, evaluation and logging."""

    # Folders and other runs.
    config: File = None
    """The config.json of a run to repeat; options given here override it; by default none."""

    run_dir: Folder = None
    """Folder for configuration, metrics, curves and checkpoints;
    by default runs/ with data set, model and time."""

    resume: Literal["auto", "never"] = "auto"
    """auto: continue the run in --run-dir. never: train from the start, and move an earlier run to
    the subfolder previous-1, or the next number."""

    init_from: Folder = None
    """Start from the parameters of this run, checkpoint, bundle or .safetensors file
    (default: random initialization). Optimizer state and step are not loaded;
    see --branch-from to continue a run with both."""

    init_only: Names = ()
    """Patterns of the parameters to take from --init-from, such as 'layers/0/*'
    (default: all parameters must match)."""

    branch_from: Folder = None
    """Continue from this checkpoint of another run, with its options except those given here
    (default: none)."""

    # Many runs.
    seeds: Count = None
    """Number of runs with different seeds, from --seed on, which one program trains; the table
    shows the mean and the standard deviation of their metrics; by default one run."""

    sweep: Sweeps = ()
    """Values of options, such as learning-rate=log:0.001:0.1:5 or batch-size=32,64: trains a run
    for each combination, and for each of --seeds; by default none."""

    halving: Count = None
    """Successive halving: compare the combinations of --sweep by their validation loss after
    fractions of the steps, and each time continue only the best one in HALVING of them;
    by default all are trained to the end."""

    # Checkpoints.
    save_every: Count = None
    """Maximum number of optimizer steps between checkpoints, or a round if that is longer;
    by default about a minute of steps."""

    keep_checkpoints: int = 2
    """Number of newest checkpoints to keep."""

    keep_best: Name = None
    """Also keep the checkpoint that is best by this metric, such as loss or accuracy, on the
    validation split or else the test split. A new best is saved at once;
    by default only the newest checkpoints are kept."""

    mirror: Address = None
    """Upload every checkpoint to this folder, such as s3://bucket/run, in the background, and
    continue from there if --run-dir has no newer checkpoint; by default none."""

    # Evaluation and logging.
    eval_every: Count = None
    """Optimizer steps between evaluations, each at the end of a round; by default an epoch."""

    log_every: int = 20
    """Maximum number of optimizer steps between rows of metrics, or a round if that is longer."""

    reestimate_batches: int = 0
    """Number of training batches from which the statistics of --norm batch are re-estimated
    before every evaluation; 0 uses the running averages."""

    report: bool = False
    """Write report.html to the run folder at the end: metrics on the test split with confidence
    intervals, confusion matrix, calibration, and the examples with the highest loss."""

    track: Trackers = ()
    """Trackers to which all metrics are written, each of which needs the extra of its name;
    tensorboard writes to the run folder; by default none."""

    prompt: Text = None
    """Prompt of the text that a language model generates at every evaluation;
    by default the first character of the training text."""

    sample_length: int = 200
    """Number of characters to generate after --prompt; 0 for none."""


@dataclass(frozen=True)
class HostOptions:
    """Hosts, each of which runs this command; by default those of Slurm, MPI or a TPU pod."""

    coordinator: Text = None
    """Address and port of host 0, reachable from all other hosts, such as 10.0.0.1:1234;
    by default that of the launcher."""

    num_processes: Count = None
    """Number of hosts; by default that of the launcher."""

    process_id: Count = None
    """Index of this host, from 0; by default that of the launcher."""

    coordinator_bind: Text = None
    """Address and port on which host 0 listens, if not --coordinator, such as 0.0.0.0:1234;
    connections are not authenticated."""

    join_timeout: int = 300
    """Timeout in seconds until all hosts have joined."""


@dataclass(frozen=True)
class Config:
    """Trains one model on many devices, and evaluates the aggregated parameters."""

    data: DataOptions = field(default_factory=DataOptions)
    model: ModelOptions = field(default_factory=ModelOptions)
    optimization: OptimizationOptions = field(default_factory=OptimizationOptions)
    aggregation: AggregationOptions = field(default_factory=AggregationOptions)
    run: RunOptions = field(default_factory=RunOptions)
    hosts: HostOptions = field(default_factory=HostOptions)
