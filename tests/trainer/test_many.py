"""Many runs in one program are the runs that they are alone."""

import csv
import json
import resource
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest
from cases import STRATEGY_NAMES, some
from jax import numpy as jnp
from runs import DropoutNet, Killed, rows

import ctde_jax as ctde
from ctde_jax import config, data, train
from ctde_jax.config.command_line import with_words
from ctde_jax.devices import runs
from ctde_jax.errors import InputError, NonFiniteLoss
from ctde_jax.trainer.history import History

MODEL = ctde.models.mlp([64, 8, 10])
OPTIONS: dict[str, Any] = {
    "steps": 12,
    "batch_size": 32,
    "eval_every": 6,
    "log_every": 3,
    "show": False,
}


@pytest.fixture(scope="module")
def few(digits) -> data.Dataset:
    """Not a multiple of the batch size, so the last batch is padded."""
    split = data.Split(digits.train.inputs[:130], digits.train.labels[:130])
    return data.from_arrays(*split, *split, name="few", classes=digits.classes)


def assert_equal(outcome, alone: ctde.Trained, tolerance: float = 1e-5) -> None:
    """The losses of all rows and the parameters are equal."""
    trained = outcome.trained
    assert [row["step"] for row in trained.history] == [row["step"] for row in alone.history]
    for one, other in zip(trained.history, alone.history, strict=True):
        assert one["split"] == other["split"]
        assert one["loss"] == pytest.approx(other["loss"], rel=tolerance)
        assert one.get("bytes_sent") == other.get("bytes_sent")
    for one, other in zip(
        jax.tree.leaves((trained.params, trained.model_state)),
        jax.tree.leaves((alone.params, alone.model_state)),
        strict=True,
    ):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
    assert jax.tree.structure(trained.opt_state) == jax.tree.structure(alone.opt_state)


PHASES = {
    "growing": ctde.Strategy(2, later={8: ctde.Strategy(4), 16: ctde.Strategy(8)}),
    "shared": ctde.Strategy(shared_batches=True, later={8: ctde.Strategy(4)}),
}


def preset(name: str) -> ctde.Strategy:
    if name in PHASES:
        return PHASES[name]
    options: dict[str, Any] = {} if name in ("ddp", "gossip") else {"sync_every": 3}
    if name == "streaming-diloco":
        options["fragments"] = 2
    if name == "post-local-sgd":
        options["synchronous_steps"] = 9
    return ctde.strategy(name, **options)


# A replica without neighbors cannot gossip.
ALL = [
    (name, replicas)
    for name in (*STRATEGY_NAMES, *PHASES)
    for replicas in (1, 2)
    if replicas > 1 or name not in ("gossip", "no-loco")
]


@pytest.mark.parametrize("case", some(ALL, ("diloco", 1), ("diloco", 2)), ids=str)
def test_each_run_equals_the_run_alone(few, case):
    name, replicas = case
    devices = ctde.devices.start(2)
    swept = ctde.fit_many(
        MODEL,
        few,
        optax.sgd,
        preset(name),
        seeds=[3, 1],
        sweep={"learning_rate": [0.02, 0.2]},
        devices=devices,
        replicas=replicas,
        **OPTIONS | {"steps": 50, "eval_every": 24},
    )
    assert [(each.values["learning_rate"], each.seed) for each in swept.outcomes] == [
        (0.02, 3),
        (0.02, 1),
        (0.2, 3),
        (0.2, 1),
    ]
    outcome = swept.outcomes[2]
    alone = ctde.fit(
        MODEL,
        few,
        optax.sgd(0.2),
        preset(name),
        seed=3,
        devices=devices[:replicas],
        **OPTIONS | {"steps": 50, "eval_every": 24},
    )
    assert_equal(outcome, alone)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*STRATEGY_NAMES, *PHASES])
def test_runs_that_are_computed_together_equal_the_run_alone(few, name, monkeypatch):
    """As on an accelerator."""
    monkeypatch.setattr(runs, "_one_by_one", runs._together)
    arguments = {"model": MODEL, "data": few, "strategy": preset(name), **OPTIONS}
    swept = ctde.fit_many(
        optimizer=optax.sgd,
        seeds=[0, 1],
        sweep={"learning_rate": [0.02, 0.2]},
        devices=ctde.devices.start(1),
        replicas=2,
        **arguments,
    )
    devices = ctde.devices.start(2)
    assert_equal(
        swept.outcomes[3], ctde.fit(optimizer=optax.sgd(0.2), seed=1, devices=devices, **arguments)
    )


CASES = {
    # Not Adam, which amplifies the rounding in gradients of biases before batch normalization.
    "dropout, batch statistics, average": {
        "model": DropoutNet,
        "optimizer": optax.sgd(0.1),
        "ema_decay": 0.5,
    },
    "augmentation, skipping, microbatches": {
        "augment": ctde.augment.shift(1),
        "on_nonfinite": "skip",
        "accumulation_steps": 2,
    },
    "class weights, low rank": {"class_weights": "balanced", "lora_rank": 2},
    "schedule-free": {"optimizer": optax.contrib.schedule_free_sgd(0.1)},
    "partition": {"partition": [np.arange(0, 60), np.arange(60, 130)]},
    "clients": {
        "partition": [np.arange(start, 130, 5) for start in range(5)],
        "strategy": ctde.Strategy(3),
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_options_hold_for_each_run(few, case):
    devices = ctde.devices.start(2)
    options = {"model": MODEL, "data": few, "optimizer": optax.adam(0.01), **OPTIONS, **CASES[case]}
    swept = ctde.fit_many(seeds=[0, 5], devices=devices, **options)
    assert_equal(swept.outcomes[1], ctde.fit(seed=5, devices=devices, **options))


def test_one_run_has_the_bits_of_fit(few):
    devices = ctde.devices.start(2)
    swept = ctde.fit_many(MODEL, few, optax.adam(0.01), seeds=[7], devices=devices, **OPTIONS)
    alone = ctde.fit(MODEL, few, optax.adam(0.01), seed=7, devices=devices, **OPTIONS)
    assert jax.tree.all(
        jax.tree.map(np.array_equal, swept.outcomes[0].trained.params, alone.params)
    )


@pytest.mark.slow
def test_numbers_of_optimizer_strategy_and_task(few):
    sweep = [
        {"momentum": 0.9, "outer_rate": 0.7, "smoothing": 0.0},
        {"momentum": 0.0, "outer_rate": 1.0, "smoothing": 0.2},
    ]

    def parts(momentum, outer_rate, smoothing):
        return {
            "optimizer": optax.sgd(0.1, momentum),
            "strategy": ctde.Strategy(3, outer=optax.sgd(outer_rate)),
            "task": ctde.tasks.smoothed(ctde.tasks.classification, smoothing),
        }

    swept = ctde.fit_many(
        MODEL,
        few,
        lambda momentum: optax.sgd(0.1, momentum),
        lambda outer_rate: ctde.Strategy(3, outer=optax.sgd(outer_rate)),
        task=lambda smoothing: ctde.tasks.smoothed(ctde.tasks.classification, smoothing),
        sweep=sweep,
        devices=ctde.devices.start(2),
        **OPTIONS,
    )
    for values, outcome in zip(sweep, swept.outcomes, strict=True):
        alone = ctde.fit(MODEL, few, devices=ctde.devices.start(2), **parts(**values), **OPTIONS)
        assert_equal(outcome, alone)


@pytest.mark.slow
def test_numbers_do_not_widen_the_state(few):
    def init(key, inputs):
        return {"w": jnp.zeros((64, 10), jnp.bfloat16)}, {}

    def apply(params, model_state, inputs, key):
        return inputs.reshape(-1, 64) @ params["w"], model_state

    model = ctde.models.Model(init, apply)
    swept = ctde.fit_many(
        model,
        few,
        lambda momentum: optax.sgd(0.1, momentum),
        sweep={"momentum": [0.5, 0.9]},
        **OPTIONS | {"steps": 1},
    )
    for outcome in swept.outcomes:
        assert all(
            leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(outcome.trained.opt_state)
        )


@pytest.mark.slow
def test_shapes_are_swept_by_programs_in_turn(few, capsys):
    options = {**OPTIONS, "show": True}
    del options["batch_size"]
    sweep = [
        {"batch_size": 16, "learning_rate": 0.1},
        {"batch_size": 32, "learning_rate": 0.1},
        {"batch_size": 16, "learning_rate": 0.2},
    ]
    swept = ctde.fit_many(MODEL, few, optax.sgd, seeds=range(2), sweep=sweep, **options)
    assert "6 by 2 programs in turn" in capsys.readouterr().out
    alone = ctde.fit(MODEL, few, optax.sgd(0.1), seed=1, batch_size=32, **options)
    assert_equal(swept.outcomes[3], alone)
    order = [(values, seed) for values in sweep for seed in range(2)]
    assert [(each.values, each.seed) for each in swept.outcomes] == order


def fold_numbers(fold: data.Dataset) -> list[bytes]:
    """The examples of a fold's validation split, which are all different."""
    return [example.tobytes() for example in fold.validation.inputs]


@pytest.mark.slow
def test_folds_are_runs(few):
    folds = data.folds(few, 5)[:2]
    assert [len(fold.validation.labels) for fold in folds] == [26, 26]
    assert not {*fold_numbers(folds[0])} & {*fold_numbers(folds[1])}
    swept = ctde.fit_many(MODEL, folds, optax.sgd(0.1), patience=5, **OPTIONS)
    assert [each.values for each in swept.outcomes] == [{"data": 0}, {"data": 1}]
    assert_equal(
        swept.outcomes[1], ctde.fit(MODEL, folds[1], optax.sgd(0.1), patience=5, **OPTIONS)
    )
    assert swept.summary[0]["runs"] == 2


@pytest.mark.slow
def test_constants_of_a_fold_are_its_own(few):
    # The units of regression targets, and the weights of classes, depend on the training split.
    points = np.linspace(-1, 1, 320, dtype=np.float32).reshape(80, 4)
    lines = data.from_arrays(points, points[:, :1] ** 2, points[:9], points[:9, :1], name="lines")
    cases = [
        (few, MODEL, {"class_weights": "balanced"}),
        (lines, ctde.models.mlp([4, 1]), {"task": "regression"}),
    ]
    for dataset, model, options in cases:
        options = {**OPTIONS, "steps": 2, **options}
        folds = data.folds(dataset, 2)
        swept = ctde.fit_many(model, folds, optax.sgd(0.1), **options)
        for fold, outcome in zip(folds, swept.outcomes, strict=True):
            assert_equal(outcome, ctde.fit(model, fold, optax.sgd(0.1), **options))


@pytest.mark.slow
def test_a_run_that_diverges_fails_alone(few):
    sweep = {"learning_rate": [0.1, 1e38]}
    swept = ctde.fit_many(MODEL, few, optax.sgd, sweep=sweep, **OPTIONS)
    failed = swept.outcomes[1]
    assert failed.trained is None
    assert "not finite" in failed.failure
    assert_equal(swept.outcomes[0], ctde.fit(MODEL, few, optax.sgd(0.1), **OPTIONS))
    assert [line["failed"] for line in swept.summary] == [0, 1]

    with pytest.raises(NonFiniteLoss):
        ctde.fit_many(MODEL, few, optax.sgd(1e38), seeds=range(2), **OPTIONS)


def test_early_stopping_ends_each_run_alone(few):
    held = data.hold_out(few, 0.3)
    options = {**OPTIONS, "steps": 40, "eval_every": 2, "patience": 1}
    sweep = {"learning_rate": [0.1, 3.0]}
    swept = ctde.fit_many(MODEL, held, optax.sgd, sweep=sweep, **options)
    ends = [each.trained.history[-1]["step"] for each in swept.outcomes]
    assert ends[0] != ends[1]
    for rate, outcome in zip((0.1, 3.0), swept.outcomes, strict=True):
        alone = ctde.fit(MODEL, held, optax.sgd(rate), **options)
        assert outcome.trained.stopped_early == alone.stopped_early
        assert outcome.step == alone.step
        assert_equal(outcome, alone)


def kill_after(monkeypatch, lines: int, run) -> None:
    """Ends the runs after this many rows of all of them together."""
    add, count = History.add, [0]

    def add_or_kill(history: History, row):
        count[0] += history._folder is not None
        if count[0] > lines:
            raise Killed
        add(history, row)

    with monkeypatch.context() as patch:
        patch.setattr(History, "add", add_or_kill)
        with pytest.raises(Killed):
            run()


@pytest.mark.slow
def test_killed_runs_continue_with_the_same_bits(few, tmp_path, monkeypatch):
    def run(folder, seeds=range(3)):
        return ctde.fit_many(
            MODEL,
            few,
            optax.adam(0.01),
            ctde.strategy("sparse-loco", sync_every=3, keep=8, chunk=64),
            seeds=seeds,
            devices=ctde.devices.start(2),
            run_dir=folder,
            save_every=3,
            **OPTIONS,
        )

    whole = run(tmp_path / "whole")
    kill_after(monkeypatch, 11, partial(run, tmp_path / "killed"))
    # One of the runs loses its newest checkpoint, so it is behind the others.
    newest = max((tmp_path / "killed" / "seed-1" / "checkpoints").iterdir())
    shutil.rmtree(newest)
    resumed = run(tmp_path / "killed")
    for seed in range(3):
        there = tmp_path / "whole" / f"seed-{seed}"
        assert rows(tmp_path / "killed" / f"seed-{seed}") == rows(there)
        one, other = (each.outcomes[seed].trained for each in (whole, resumed))
        assert jax.tree.all(jax.tree.map(np.array_equal, one.params, other.params))
        assert jax.tree.all(jax.tree.map(np.array_equal, one.opt_state, other.opt_state))

    # Completed runs are loaded, further seeds are trained.
    more = run(tmp_path / "killed", range(4))
    assert "train" in more.outcomes[3].trained.seconds
    assert rows(tmp_path / "killed" / "seed-0") == rows(tmp_path / "whole" / "seed-0")
    assert [row["seed"] for row in more.rows] == [0, 1, 2, 3]

    # A run of the sweep is a run like any other.
    alone = ctde.fit(
        MODEL,
        few,
        optax.adam(0.01),
        ctde.strategy("sparse-loco", sync_every=3, keep=8, chunk=64),
        seed=2,
        devices=ctde.devices.start(2),
        run_dir=tmp_path / "killed" / "seed-2",
        save_every=3,
        **OPTIONS,
    )
    assert "train" not in alone.seconds
    with pytest.raises(InputError, match="optimizer"):
        ctde.fit_many(
            MODEL, few, optax.adam(0.02), seeds=[0], run_dir=tmp_path / "whole", **OPTIONS
        )


RATES = [0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 1e38, 3.0]


def halved(few, folder) -> ctde.Sweep:
    return ctde.fit_many(
        MODEL,
        data.hold_out(few, 0.3),
        optax.sgd,
        sweep={"learning_rate": RATES},
        halving=3,
        run_dir=folder,
        **{**OPTIONS, "steps": 36, "eval_every": 2},
    )


@pytest.mark.slow
def test_halving_continues_the_best_runs(few, tmp_path, monkeypatch):
    whole = halved(few, tmp_path / "whole")
    steps = {row["learning_rate"]: row["step"] for row in whole.rows}
    assert sorted(steps.values())[1:] == [4] * 5 + [12] * 2 + [36]
    assert whole.outcomes[7].trained is None
    assert [line["step"] for line in whole.summary] == [row["step"] for row in whole.rows]
    assert "step" in [column.header for column in whole.table().columns]

    # The choice is that of the validation losses of the runs alone, which the best one equals.
    def alone(rate: float) -> ctde.Trained:
        options = {**OPTIONS, "steps": 36, "eval_every": 2}
        return ctde.fit(MODEL, data.hold_out(few, 0.3), optax.sgd(rate), **options)

    def loss(trained: ctde.Trained, step: int) -> float:
        rows = [row for row in trained.history if row["split"] == "validation"]
        return next(row["loss"] for row in rows if row["step"] == step)

    trained = {rate: alone(rate) for rate in RATES if rate < 1e38}
    kept = sorted(trained, key=lambda rate: loss(trained[rate], 4))[:3]
    assert {*kept} == {rate for rate, step in steps.items() if step > 4}
    best = min(kept, key=lambda rate: loss(trained[rate], 12))
    assert steps[best] == 36
    assert_equal(whole.outcomes[RATES.index(best)], trained[best])

    # An interrupted search is resumed as it was.
    kill_after(monkeypatch, 70, partial(halved, few, tmp_path / "killed"))
    resumed = halved(few, tmp_path / "killed")
    assert resumed.rows == whole.rows


UNSUITABLE = {
    "one": ({"sweep": {"learning_rate": [0.1]}}, "at least two combinations"),
    "factor": ({"halving": 1}, "at least 2"),
    "folder": ({"run_dir": None}, "run_dir"),
    "validation": ({"data": None}, "validation split"),
    "shapes": ({"sweep": {"learning_rate": [0.1], "batch_size": [16, 32]}}, "one program"),
}


@pytest.mark.parametrize("case", UNSUITABLE)
def test_unsuitable_halving_is_refused(few, tmp_path, case):
    wrong, sentence = UNSUITABLE[case]
    options = {
        "data": data.hold_out(few, 0.3),
        "sweep": {"learning_rate": [0.1, 0.2]},
        "halving": 2,
        "run_dir": tmp_path / "runs",
        **OPTIONS,
        **wrong,
    }
    if case == "validation":
        options["data"] = few
    if case == "shapes":
        del options["batch_size"]
    with pytest.raises(InputError, match=sentence):
        ctde.fit_many(MODEL, optimizer=optax.sgd, **options)
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_statistics_and_files(few, tmp_path):
    swept = ctde.fit_many(
        MODEL, few, optax.sgd(0.1), seeds=range(3), run_dir=tmp_path / "runs", **OPTIONS
    )
    losses = [each.trained.tested["loss"] for each in swept.outcomes]
    found = swept.summary[0]["test_loss"]
    assert found["mean"] == pytest.approx(np.mean(losses))
    assert found["sd"] == pytest.approx(np.std(losses, ddof=1))
    assert (found["min"], found["max"]) == (min(losses), max(losses))
    with (tmp_path / "runs" / "runs.csv").open() as file:
        read = [*csv.DictReader(file)]
    assert [float(row["test_loss"]) for row in read] == losses
    assert (tmp_path / "runs" / "curves.png").read_bytes().startswith(b"\x89PNG")
    (line, *_) = swept.plot().axes[0].lines
    np.testing.assert_allclose(line.get_ydata()[-1], np.mean(losses))


WRONG = {
    "seeds": ({"seeds": []}, "at least one seed"),
    "twice": ({"seeds": [1, 1]}, "1 twice"),
    "kind": ({"seeds": [1.5]}, "integer"),
    "unknown": ({"sweep": {"learnin_rate": [0.1]}}, "did you mean 'learning_rate'"),
    "empty": ({"sweep": {"learning_rate": []}}, "list of values for learning_rate"),
    "text": ({"sweep": {"learning_rate": ["a"]}}, "numbers for learning_rate"),
    "same": ({"sweep": {"learning_rate": [0.1, 0.1]}}, "learning_rate 0.1 twice"),
    "names": ({"sweep": [{"learning_rate": 0.1}, {}]}, "same names"),
    "array": (
        {"sweep": {"class_weights": [np.ones(10)], "learning_rate": [0.1]}},
        "numbers, texts",
    ),
    "no list": ({"sweep": 5}, "list of mappings"),
    "column": ({"sweep": {"learning_rate": [0.1], "seed": [1]}}, "the name seed"),
    "count": ({"seeds": 3}, "list of at least one seed"),
    "no data": ({"data": []}, "list of them"),
    "replicas": ({"replicas": 0}, "at least 1"),
    "missing": ({"sweep": {"patience": [1, 2]}}, "values for learning_rate"),
    "value": ({"sweep": {"learning_rate": [0.1], "steps": [1, -1]}, "steps": None}, "at least 1"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_refused(few, case):
    wrong, sentence = WRONG[case]
    given = {"data": few, **OPTIONS, **wrong}
    options = {name: value for name, value in given.items() if value is not None}
    with pytest.raises(InputError, match=sentence):
        ctde.fit_many(MODEL, optimizer=optax.sgd, **{"sweep": {"learning_rate": [0.1]}, **options})


def nothing_if_zero(momentum):
    return optax.sgd(0.1, momentum if momentum > 0 else None)


def of_numpy(momentum):
    return optax.sgd(0.1, np.sqrt(momentum))


@pytest.mark.parametrize("optimizer", [nothing_if_zero, of_numpy])
def test_function_that_cannot_be_traced_is_refused(few, optimizer):
    with pytest.raises(InputError, match="do not decide"):
        ctde.fit_many(MODEL, few, optimizer, sweep={"momentum": [0.5, 0.9]}, **OPTIONS)


@pytest.mark.slow
def test_too_many_runs_are_refused_before_allocation(few, monkeypatch):
    monkeypatch.setattr(ctde.devices.memory, "of_this_machine", lambda: 10**6)
    with pytest.raises(InputError, match=r"at most \d+ runs fit"):
        ctde.fit_many(MODEL, few, optax.adam(0.1), seeds=range(1000), **OPTIONS)


def test_folder_of_a_single_run_is_refused(few, tmp_path):
    ctde.fit(MODEL, few, optax.sgd(0.1), run_dir=tmp_path / "single", **OPTIONS | {"steps": 1})
    with pytest.raises(InputError, match="folder of a single run"):
        ctde.fit_many(MODEL, few, optax.sgd(0.1), run_dir=tmp_path / "single", **OPTIONS)


def test_limit_of_open_files_is_raised_or_named(few, tmp_path, monkeypatch):
    raised: list[tuple[int, int]] = []
    options: dict[str, Any] = {**OPTIONS, "run_dir": tmp_path / "runs"}
    monkeypatch.setattr(resource, "setrlimit", lambda _, to: raised.append(to))
    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, 4096))
    ctde.fit_many(MODEL, few, optax.sgd(0.1), **options | {"steps": 1})
    assert raised == [(304, 4096)]
    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, 256))
    with pytest.raises(InputError, match="ulimit"):
        ctde.fit_many(MODEL, few, optax.sgd(0.1), **options)


def test_unknown_option_is_a_type_error(few):
    with pytest.raises(TypeError, match="fit_many"):
        ctde.fit_many(MODEL, few, optax.sgd(0.1), seed=3, **OPTIONS)


COMMAND = ["--steps", "12", "--batch-size", "32", "--eval-every", "6", "--hidden-sizes", "8"]


@pytest.mark.slow
def test_command_trains_and_each_run_can_be_repeated(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = [*COMMAND, "--validation-fraction", "0.2", "--run-dir", "many"]
    status = train.main(
        [*command, "--seeds", "2", "--sweep", "learning-rate=0.01,0.1", "batch-size=16,32"]
    )
    assert status == 0
    out = capsys.readouterr().out
    assert "8 by 2 programs in turn" in out
    names = {path.name for path in (tmp_path / "many").iterdir() if path.is_dir()}
    assert "batch_size-32-learning_rate-0.1-seed-1" in names
    assert len(names) == 8
    own = tmp_path / "many" / "batch_size-32-learning_rate-0.1-seed-1"
    saved = json.loads((own / "config.json").read_text())
    assert (saved["seed"], saved["learning_rate"], saved["seeds"]) == (1, 0.1, None)

    assert train.main(["--config", str(own / "config.json"), "--run-dir", "alone"]) == 0
    for one, other in zip(rows(own), rows(tmp_path / "alone"), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
    assert train.main(["--config", "many/config.json", "--run-dir", "many"]) == 0


def test_swept_strategy_has_the_options_of_its_preset():
    swept = config.parse(["--keep-checkpoints", "3", "--learning-rate", "0.1"])
    words = {"strategy": "diloco", "sync_every": "4"}
    alone = ["--keep-checkpoints", "3", "--learning-rate", "0.1", "--strategy", "diloco"]
    assert with_words(swept, words) == config.parse([*alone, "--sync-every", "4"])


@pytest.mark.slow
def test_schedule_has_the_steps_of_the_run(tmp_path, monkeypatch):
    # A partition depends on the seed, and so does the number of steps.
    monkeypatch.chdir(tmp_path)
    command = ["--batch-size", "64", "--hidden-sizes", "8", "--epochs", "1", "--devices", "2"]
    command += ["--partition", "dirichlet"]
    assert train.main([*command, "--seeds", "2", "--run-dir", "runs"]) == 0
    # Only a run with the same program continues.
    assert train.main([*command, "--seed", "1", "--run-dir", "runs/seed-1"]) == 0


@pytest.mark.slow
def test_command_keeps_its_options_if_all_runs_fail(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = [*COMMAND, "--optimizer", "sgd", "--devices", "1", "--run-dir", "runs"]
    assert train.main([*command, "--seeds", "1", "--learning-rate", "1e38"]) == 2
    assert json.loads(Path("runs/config.json").read_text())["seeds"] == 1


@pytest.mark.slow
def test_refused_command_changes_no_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = [*COMMAND, "--seeds", "1", "--devices", "1", "--run-dir", "runs"]
    assert train.main(command) == 0
    before = Path("runs/config.json").read_text()
    assert train.main([*command, "--batch-size", "16"]) == 2
    assert Path("runs/config.json").read_text() == before


REFUSED = {
    "equal": (["--sweep", "learning-rate=0.1,0.10"], "twice"),
    "seed": (["--seeds", "2", "--seed", "4294967295"], "from 0 to"),
    "unknown": (["--sweep", "lerning-rate=1,2"], "learning_rate"),
    "no values": (["--sweep", "learning-rate="], "must have values"),
    "range": (["--sweep", "learning-rate=log:0:1:3"], "must have ranges"),
    "no range": (["--sweep", "learning-rate=log:1:2:0"], "must have ranges"),
    "long range": (["--sweep", "learning-rate=linear:1:2:1000000000"], "must have ranges"),
    "no effect": (["--sweep", "epochs=1,2"], "mutually exclusive"),
    "same": (["--sweep", "learning-rate=0.1,0.1"], "different values"),
    "twice": (["--sweep", "steps=1", "steps=2"], "steps twice"),
    "number": (["--sweep", "batch-size=a"], "whole number"),
    "effect": (["--sweep", "weight-decay=0.1,0.2"], "--optimizer"),
    "negative": (["--sweep", "learning-rate=0.1,-1"], "greater than 0"),
    "none": (["--seeds", "0"], "at least 1"),
    "report": (["--seeds", "2", "--report"], "--report must be left out"),
    "halving": (["--halving", "3"], "--halving requires a sweep"),
}


@pytest.mark.parametrize("case", some(REFUSED, "unknown", "range", "effect", "negative"))
def test_command_refuses(case, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments, sentence = REFUSED[case]
    assert train.main([*COMMAND, *arguments]) == 2
    assert sentence in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["wire", "profile"])
def test_other_commands_refuse_many_runs(command):
    with pytest.raises(InputError, match=r"ctde_jax\.train"):
        config.parse(["--seeds", "3"], command)
