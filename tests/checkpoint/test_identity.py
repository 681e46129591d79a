"""A run resumes only with the same data and program; differences are reported by name."""

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from cases import some
from flax import linen, nnx
from jax import numpy as jnp

import ctde_jax as ctde
from ctde_jax import checkpoint, data, devices, models
from ctde_jax.checkpoint.identity import parts_of
from ctde_jax.models.tasks import classification, is_correct, smoothed, weighted

RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(96, 6)).astype(np.float32), RNG.integers(0, 3, 96)
DATA = data.hold_out(data.from_arrays(X[:80], Y[:80], X[80:], Y[80:]), 0.2)
PARTS = [np.arange(32), np.arange(32, 64)]
QUICK = {
    "model": models.mlp([6, 8, 3]),
    "strategy": ctde.Strategy(),
    "augment": None,
    "partition": None,
}
"""Options that compile faster."""


class Net(nnx.Module):
    """Has dropout and batch normalization, whose rate and momentum are constants of the program."""

    def __init__(
        self,
        rngs: nnx.Rngs,
        rate: float = 0.2,
        momentum: float = 0.9,
        slope: float = 0.1,
        width: int = 8,
    ):
        self.first, self.last = nnx.Linear(6, width, rngs=rngs), nnx.Linear(width, 3, rngs=rngs)
        self.norm = nnx.BatchNorm(width, momentum=momentum, rngs=rngs)
        self.dropout, self.slope = nnx.Dropout(rate, rngs=rngs), slope

    def __call__(self, x):
        return self.last(self.dropout(nnx.leaky_relu(self.norm(self.first(x)), self.slope)))


class Dense(linen.Module):
    """Another module with the same number of outputs."""

    @linen.compact
    def __call__(self, x):
        return linen.Dense(3)(x)


def net(**options) -> models.Model:
    return models.from_nnx(lambda rngs: Net(rngs, **options))


def shifted(key, example, by: float = 0.1):
    return example + by * jax.random.normal(key, example.shape)


def error(outputs, labels, power: float = 1.0):
    return jnp.mean(jnp.abs(jax.nn.softmax(outputs) - jax.nn.one_hot(labels, 3)) ** power, axis=-1)


def make_task(power: float = 1.0, double: float = 2.0, factor: float = 1.0) -> ctde.Task:
    return ctde.Task(
        lambda outputs, labels: factor * classification.loss(outputs, labels),
        {"accuracy": is_correct, "error": partial(error, power=power)},
        {"double": lambda averages: double * averages["loss"]},
    )


def diloco(**options) -> ctde.Strategy:
    return ctde.strategy("diloco", sync_every=4, reduce="int4", error_feedback=True, **options)


def fit(folder, **changes) -> ctde.Trained:
    arguments = {"model": net(), "data": DATA, "optimizer": optax.adam(0.01), "strategy": diloco()}
    arguments |= {
        "task": make_task(),
        "augment": shifted,
        "partition": PARTS,
        "devices": devices.start(2),
    }
    arguments |= {"batch_size": 16, "steps": 8, "log_every": 4, "run_dir": folder, "show": False}
    return ctde.fit(**{**arguments, **changes})


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    fit(folder)
    return folder


def with_split(name: str, **arrays) -> data.Dataset:
    return replace(DATA, **{name: getattr(DATA, name)._replace(**arrays)})


def changed(array: np.ndarray) -> np.ndarray:
    """Returns a copy in which a single number differs."""
    other = array.copy()
    other.flat[-1] = other.flat[-1] == 0
    return other


CHANGES = {
    "learning rate": ({"optimizer": optax.adam(0.02)}, ["the optimizer"]),
    "schedule": (
        {"optimizer": optax.adam(optax.cosine_decay_schedule(0.01, 8))},
        ["the optimizer"],
    ),
    "other optimizer": ({"optimizer": optax.sgd(0.01)}, ["the optimizer"]),
    "dropout rate": ({"model": net(rate=0.3)}, ["the model"]),
    "no dropout": ({"model": net(rate=0.0)}, ["the model"]),
    "momentum of batch statistics": ({"model": net(momentum=0.8)}, ["the model"]),
    "constant of the module": ({"model": net(slope=0.2)}, ["the model"]),
    "width": ({"model": net(width=9)}, ["the model"]),
    "other module": ({"model": models.from_linen(Dense())}, ["the model"]),
    "initialization": (
        {"model": net()._replace(init=lambda *of: optax.tree.scale(2.0, net().init(*of)))},
        ["the initialization"],
    ),
    "loss": ({"task": make_task(factor=100.0)}, ["the loss"]),
    "objective": ({"task": smoothed(make_task(), 0.1)}, ["the loss"]),
    "class weights": ({"task": weighted(make_task(), [1, 2, 3], DATA)}, ["the loss"]),
    "metric": ({"task": make_task(power=2.0)}, ["the metric error"]),
    "function of the loss": ({"task": make_task(double=3.0)}, ["the metric double"]),
    "no metric": ({"task": make_task()._replace(derived={})}, ["the metric double"]),
    "augmentation": ({"augment": partial(shifted, by=0.2)}, ["the augmentation"]),
    "no augmentation": ({"augment": None}, ["the augmentation"]),
    "outer learning rate": ({"strategy": diloco(outer_learning_rate=0.6)}, ["the strategy"]),
    "outer momentum": ({"strategy": diloco(outer_momentum=0.8)}, ["the strategy"]),
    "feedback": ({"strategy": diloco(feedback_decay=0.9)}, ["the strategy"]),
    "proximal pull": ({"strategy": diloco(proximal=0.1)}, ["the strategy"]),
    "training inputs": (
        {"data": with_split("train", inputs=changed(DATA.train.inputs))},
        ["the inputs of the training split"],
    ),
    "training labels": (
        {"data": with_split("train", labels=changed(DATA.train.labels))},
        ["the labels of the training split"],
    ),
    "test inputs": (
        {"data": with_split("test", inputs=changed(DATA.test.inputs))},
        ["the inputs of the test split"],
    ),
    "test labels": (
        {"data": with_split("test", labels=changed(DATA.test.labels))},
        ["the labels of the test split"],
    ),
    "validation split": (
        {"data": with_split("validation", inputs=changed(DATA.validation.inputs))},
        ["the inputs of the validation split"],
    ),
    "scale": ({"data": replace(DATA, scale=np.float32(0.5))}, ["the scale of the inputs"]),
    "class names": ({"data": replace(DATA, classes=("ant", "bee", "cat"))}, ["the class names"]),
    "partition": ({"partition": [PARTS[0][::-1], PARTS[1]]}, ["the partition"]),
    "several": (
        {
            "optimizer": optax.adam(0.02),
            "task": make_task(factor=2.0),
            "data": replace(DATA, scale=np.float32(2)),
        },
        ["the scale of the inputs", "the loss", "the optimizer"],
    ),
}


QUICK_CHANGES = (
    "learning rate",
    "dropout rate",
    "constant of the module",
    "initialization",
    "loss",
    "metric",
    "augmentation",
    "outer learning rate",
    "training inputs",
    "test labels",
    "scale",
    "partition",
    "several",
)


@pytest.mark.parametrize("name", some(CHANGES, *QUICK_CHANGES))
def test_change_is_named_before_compilation(name, run, monkeypatch):
    change, names = CHANGES[name]
    monkeypatch.setattr(jax.stages.Lowered, "compile", lambda *_, **__: pytest.fail("compiled"))
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    with pytest.raises(ctde.InputError) as caught:
        fit(run, **change)
    differences = (
        str(caught.value)
        .split(" with ", 1)[1]
        .split(". Pass another run_dir, resume=False to train")[0]
    )
    listed = [part.split(": ")[-1] for part in differences.split("; ")]
    assert listed == names
    assert f"or branch_from {run}/checkpoints/step-00000008" in str(caught.value)
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.slow
def test_options_that_affect_no_number_may_change(run, capsys):
    """Equal copies, other containers, equal functions, and options that only affect the output."""
    again = fit(
        run,
        model=models.from_nnx(jax.tree_util.Partial(Net)),
        data=data.hold_out(
            data.from_arrays(X[:80].tolist(), list(Y[:80]), X[80:].copy(), Y[80:].astype(np.int8)),
            0.2,
        ),
        optimizer=optax.chain(optax.scale_by_adam(), optax.scale_by_learning_rate(0.01)),
        task=make_task()._replace(lower_is_better=["error"]),
        augment=jax.jit(shifted),
        partition=tuple(map(list, PARTS)),
        log_every=3,
        save_every=2,
        keep_checkpoints=5,
        callbacks=[lambda row: None],
        show=True,
    )
    output = capsys.readouterr().out
    assert (
        "nothing was trained, because this run is complete at step 8; to train it from the "
        "start, pass resume=False or another run_dir"
    ) in output
    assert "train" not in again.seconds
    assert repr(again).startswith("Trained(loaded, ")


@pytest.mark.slow
def test_digests_do_not_depend_on_the_process(tmp_path):
    """They do not depend on Python's hash seed, object ids or the location of the code."""
    source = (
        "import sys; sys.path[:0] = sys.argv[1:]; import test_identity as t; "
        "print(sorted(t.digests().items()))"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "7", "JAX_PLATFORMS": "cpu"}
    here = Path(__file__).parent
    command = [sys.executable, "-c", source, str(here), str(here.parent)]
    other = subprocess.run(
        command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert other.stdout.strip() == str(sorted(digests().items()))


def digests() -> dict:
    found = {}
    pictures = data.from_arrays(
        np.zeros((4, 8, 8, 1), np.uint8),
        np.zeros(4, int),
        np.zeros((4, 8, 8, 1), np.uint8),
        np.zeros(4, int),
    )
    cases = {
        "net": (net(), DATA),
        "linen": (models.from_linen(Dense()), DATA),
        "resnet": (models.resnet((8, 8, 1), 1, (4,), 1, "batch", "synchronized"), pictures),
    }
    for name, (model, dataset) in cases.items():
        parts = parts_of(model, dataset, make_task(), optax.adamw(0.1), diloco(), None, 4)
        found |= {f"{name}, {part}": digest for part, digest in parts.items()}
    return found


@pytest.mark.slow
def test_run_continues_on_another_number_of_devices(tmp_path):
    """The checkpoint that it writes on them is compared as well."""
    shared = {
        **QUICK,
        "strategy": ctde.Strategy(4, ctde.aggregate.two_phase(ctde.aggregate.quantize(8))),
    }
    fit(tmp_path, **shared, devices=devices.start(4), save_every=4)
    shutil.rmtree(checkpoint.path_of(tmp_path / "checkpoints", 8))
    for count in (2, 1):
        assert fit(tmp_path, **shared, devices=devices.start(count)).step == 8
    with pytest.raises(ctde.InputError, match="a different program: the strategy"):
        fit(tmp_path, **{**shared, "strategy": ctde.Strategy(4)}, devices=devices.start(1))


def rewritten(run, tmp_path, change) -> None:
    """Copies a run and changes the facts of its checkpoint."""
    shutil.copytree(run, tmp_path / "run")
    found = checkpoint.read(checkpoint.newest(tmp_path / "run" / "checkpoints"))
    checkpoint.write(found.path, found.tensors, change(found.facts))


@pytest.mark.slow
def test_program_traced_by_another_version_is_not_compared(run, tmp_path, capsys):
    def traced_by_another_jax(facts):
        versions = {**facts["identity"]["versions"], "jax": "0.4.1"}
        return {**facts, "identity": {**facts["identity"], "versions": versions}}

    rewritten(run, tmp_path, traced_by_another_jax)
    fit(tmp_path / "run", show=True, optimizer=optax.adam(0.5))
    versions = f"traced with jax 0.4.1 in the checkpoint and jax {jax.__version__} here"
    assert f"not compared with the checkpoint: the program, {versions}" in capsys.readouterr().out
    with pytest.raises(
        ctde.InputError, match=r"different data: the labels of the test split\. Pass"
    ):
        fit(tmp_path / "run", data=with_split("test", labels=changed(DATA.test.labels)))


def test_checkpoint_without_digests_is_not_compared(run, tmp_path, capsys):
    rewritten(
        run,
        tmp_path,
        lambda facts: {name: fact for name, fact in facts.items() if name != "identity"},
    )
    fit(tmp_path / "run", show=True, optimizer=optax.adam(0.5))
    assert (
        "not compared with the checkpoint: data and program, as the checkpoint has no digests"
        in capsys.readouterr().out
    )


@pytest.mark.parametrize(
    "identity", [None, 3, {}, {"data": {}, "versions": {}, "replicas": 2, "program": {"a": 1}}]
)
def test_malformed_digests_are_refused(run, tmp_path, identity):
    rewritten(run, tmp_path, lambda facts: {**facts, "identity": identity})
    with pytest.raises(ctde.InputError, match="whose manifest has a malformed identity"):
        fit(tmp_path / "run")


@pytest.mark.slow
def test_program_that_is_traced_differently_each_time_is_not_compared(tmp_path, capsys):
    def unstable(outputs, labels):
        return classification.loss(outputs, labels) + np.random.default_rng().normal()

    for show in (False, True):
        fit(tmp_path, **QUICK, task=ctde.Task(unstable), show=show)
    assert (
        "not compared with the checkpoint: the loss, as two traces of it differ"
        in capsys.readouterr().out
    )


@pytest.mark.slow
def test_streamed_batches_are_not_compared_but_test_arrays_are(tmp_path, capsys):
    def stream(test_labels=Y[80:]):
        return data.from_batches(lambda epoch: [(X[:16], Y[:16])] * 4, 4, X[80:], test_labels)

    run = partial(fit, tmp_path, **QUICK)
    run(data=stream())
    run(data=stream(), show=True)
    assert (
        "not compared with the checkpoint: the training batches, as a stream is read only once"
        in capsys.readouterr().out
    )
    with pytest.raises(ctde.InputError, match="different data: the labels of the test split"):
        run(data=stream(changed(Y[80:])))


@pytest.mark.slow
def test_interrupted_run_is_compared_as_well(tmp_path):
    fit(tmp_path, **QUICK, save_every=4)
    shutil.rmtree(checkpoint.path_of(tmp_path / "checkpoints", 8))
    with pytest.raises(ctde.InputError, match="a different program: the optimizer"):
        fit(tmp_path, **QUICK, optimizer=optax.adam(0.5))
    again = fit(tmp_path, **QUICK)
    assert again.step == 8
    assert "train" in again.seconds
