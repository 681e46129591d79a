"""Centralized training, decentralized execution: one Flax model, trained over many devices.

    import ctde_jax as ctde

Training
    fit               trains a model on data, with an optax optimizer and a strategy
    fit_many, Sweep   trains many runs in one program: seeds, numbers, folds; their results
    Training, Saving  all options of `trainer.train`, in two values
    Trained           the result: `predict`, `evaluate`, parameters, history
    Callback          the methods by which a run calls the user's code
    trackers          callbacks for TensorBoard, MLflow, Weights & Biases and Trackio
    load              reads a folder of `Trained.save`
    load_run          reads a run's folder as a `Trained`
    plot_curves       draws the metrics of a run

Data, models and tasks
    data              data sets from arrays, files and iterables; partitions
    augment           augmentations on the devices
    models            networks, and adapters of nnx and linen modules
    summary           table of a network: layers, output shapes, parameters, FLOPs
    tasks, Task       losses and metrics
    initializers, mup initializations; the maximal update parametrization
    optimizers        the optimizers and learning-rate schedules of the command line
    generate          continues a text with a language model

Aggregation and its cost
    Strategy          when devices communicate, what they send, and how it is applied
    strategy          a published method by name, such as `strategy("diloco")`
    aggregate         reducers, codecs, robust rules, differential privacy
    cost              bytes on the wire, read from the compiled program

Between machines
    nodes             federated training: a server, and nodes that keep their data

Execution
    write_bundle      writes a trained model as a bundle: numpy, ONNX, StableHLO
    write_page        writes a bundle as a web page
    open_bundle       opens a bundle, which `bundle.load` makes a function of inputs
    bundle, export    formats and runtimes of bundles; the export to each format

Devices and errors
    devices           `devices.start()`: accelerators, fake CPU devices, hosts
    InputError        an argument breaks a rule; all others end a training that has begun:
                      NonFiniteLoss, ReplicasDiverged, HostLost, Preempted (with a checkpoint)
    errors, config, checkpoint, rounds, trainer
                      the other rooms of the package; see `docs/architecture.md`

`python -m ctde_jax` lists the commands. Each name is imported on first use, so that
`import ctde_jax` neither imports JAX nor initializes a device.
"""

import ast
from importlib import import_module, metadata
from pathlib import Path

# The stub is the one list of public names: type checkers read it, and so does this module.
_STUB = ast.parse(Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8"))
_HOMES = {
    alias.name: node.module
    for node in _STUB.body
    if isinstance(node, ast.ImportFrom)
    for alias in node.names
}
__all__ = sorted(_HOMES)  # pyright: ignore[reportUnsupportedDunderAll]


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> object:
    if name == "__version__":
        return metadata.version(__name__)
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # `from . import name` in the stub has no module: the name is a submodule of this package.
    home = _HOMES[name]
    if home is None:
        return import_module(f"{__name__}.{name}")
    room = import_module(f"{__name__}.{home}")
    return getattr(room, name) if hasattr(room, name) else import_module(f"{room.__name__}.{name}")
