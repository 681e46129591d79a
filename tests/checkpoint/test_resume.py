"""A run that was interrupted in any way and at any point resumes with the same bits and rows."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from cases import some
from runs import DropoutNet, Killed, killed_after, rows

import ctde_jax as ctde
from ctde_jax import aggregate, checkpoint, data, devices, models
from ctde_jax.trainer import meter
from ctde_jax.trainer.log import Log
from ctde_jax.trainer.run import Run

MODEL = models.mlp([64, 8, 10])


def local(inner_steps: int, codec: aggregate.Codec) -> ctde.Strategy:
    """Local steps with an outer momentum and a residual, which continue in a later phase."""
    reduce = aggregate.two_phase(aggregate.error_feedback(codec))
    return ctde.Strategy(inner_steps, reduce, optax.sgd(0.7, momentum=0.5, nesterov=True))


INT4 = aggregate.quantize(4)
GROWING = replace(local(2, INT4), later={4: local(4, INT4), 16: local(8, INT4)})
FEWER_BITS = ctde.Strategy(
    shared_batches=True, later={8: local(4, INT4), 20: local(4, aggregate.sign())}
)
RUNS: dict[str, dict] = {
    "ddp": {},
    "periods that do not divide the steps": {"log_every": 7, "eval_every": 11, "steps": 41},
    "dropout and batch statistics": {"model": models.from_nnx(DropoutNet)},
    "average of the parameters": {"ema_decay": 0.9},
    "int4 with error feedback": {
        "strategy": ctde.strategy("ddp", reduce="int4", error_feedback=True)
    },
    "power_sgd": {"strategy": ctde.strategy("ddp", reduce="power_sgd", rank=1)},
    "diloco": {"strategy": ctde.strategy("diloco", sync_every=4), "steps": 42},
    "diloco int4": {
        "strategy": ctde.strategy("diloco", sync_every=4, reduce="int4", error_feedback=True)
    },
    "centered clipping": {
        "strategy": ctde.strategy("diloco", sync_every=4, combine="centered_clipping")
    },
    "sparse-loco": {"strategy": ctde.strategy("sparse-loco", sync_every=3)},
    "streaming-diloco": {
        "strategy": ctde.strategy("streaming-diloco", sync_every=2, reduce="int8")
    },
    "post-local-sgd": {
        "strategy": ctde.strategy("post-local-sgd", sync_every=4, synchronous_steps=12)
    },
    "growing rounds": {"strategy": GROWING, "steps": 42},
    "fewer bits, after shared batches": {"strategy": FEWER_BITS},
    "gossip": {"strategy": ctde.strategy("gossip")},
    "no-loco": {"strategy": ctde.strategy("no-loco", sync_every=4)},
    "by host, int4 across": {
        "strategy": ctde.strategy(
            "diloco", sync_every=4, reduce="int4", error_feedback=True, per_host=2
        )
    },
}


@pytest.fixture(autouse=True)
def clear_programs_of_each_test():
    """Together, the programs of this file need more memory maps than Linux gives a process."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="module")
def small(digits) -> data.Dataset:
    return data.from_arrays(
        digits.train.inputs[:320],
        digits.train.labels[:320],
        digits.test.inputs[:40],
        digits.test.labels[:40],
    )


def fit(small: data.Dataset, folder: Path, count: int = 2, **more) -> ctde.Trained:
    arguments = {
        "model": MODEL,
        "optimizer": optax.adam(0.01),
        "batch_size": 32,
        "steps": 40,
        "log_every": 4,
    }
    arguments |= {
        "devices": devices.start(count),
        "save_every": 4,
        "run_dir": folder,
        "show": False,
    } | more
    return ctde.fit(data=small, **arguments)


@pytest.fixture(scope="module")
def whole(small, tmp_path_factory) -> tuple[Path, ctde.Trained]:
    """An uninterrupted run of `fit` with all of its checkpoints; tests only read its folder."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    return folder, fit(small, folder, keep_checkpoints=20)


@pytest.fixture
def finished(whole, tmp_path) -> Path:
    """A copy of that run, which a test may change."""
    return Path(shutil.copytree(whole[0], tmp_path / "finished"))


def tensors(folder: Path) -> dict[str, bytes]:
    """Returns the tensors of the newest checkpoint of a run."""
    found = checkpoint.read(checkpoint.newest(folder / "checkpoints"))
    return {name: tensor.tobytes() for name, tensor in found.tensors.items()}


@pytest.mark.parametrize("name", some(RUNS, "ddp"))
def test_run_killed_at_several_moments_ends_with_the_same_bits(name, small, tmp_path, monkeypatch):
    run = partial(fit, small, **RUNS[name])
    whole = run(tmp_path / "whole")
    for lines in (1, 4, len(whole.history) - 2):
        killed_after(monkeypatch, lines, partial(run, tmp_path / "killed"))
    again = run(tmp_path / "killed")

    assert tensors(tmp_path / "killed") == tensors(tmp_path / "whole")
    assert rows(tmp_path / "killed") == rows(tmp_path / "whole")
    assert [row["loss"] for row in again.history] == [row["loss"] for row in whole.history]
    assert again.tested == whole.tested


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_run_resumes_on_another_number_of_devices(name, small, tmp_path, monkeypatch):
    """8 -> 2 -> 4 devices; synchronous float32 aggregation is equal on any number of devices."""
    run = partial(fit, small, **RUNS[name])
    killed_after(monkeypatch, 4, partial(run, tmp_path / "run", 8))
    killed_after(monkeypatch, 7, partial(run, tmp_path / "run", 2))
    run(tmp_path / "run", 4)
    whole = run(tmp_path / "whole", 4)

    assert [row["step"] for row in rows(tmp_path / "run")] == [
        row["step"] for row in rows(tmp_path / "whole")
    ]
    resumed, last = rows(tmp_path / "run")[-1], whole.history[-1]
    if name in ("ddp", "periods that do not divide the steps", "average of the parameters"):
        for part, tensor in checkpoint.read(
            checkpoint.newest(tmp_path / "run" / "checkpoints")
        ).tensors.items():
            other = checkpoint.read(checkpoint.newest(tmp_path / "whole" / "checkpoints")).tensors[
                part
            ]
            np.testing.assert_allclose(tensor, other, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(resumed["loss"], last["loss"], rtol=0.3)


@pytest.mark.slow
def test_copy_of_a_run_resumes_with_the_same_bits(small, whole, tmp_path, monkeypatch):
    """The copy has other permissions and times, like a download from an object store."""
    folder, trained = whole
    killed_after(monkeypatch, 4, partial(fit, small, tmp_path / "killed"))
    shutil.copytree(tmp_path / "killed", tmp_path / "copy", copy_function=shutil.copyfile)
    assert fit(small, tmp_path / "copy").tested == trained.tested
    assert tensors(tmp_path / "copy") == tensors(folder)
    assert rows(tmp_path / "copy") == rows(folder)


@pytest.mark.slow
def test_resumed_run_keeps_its_patience(small, tmp_path, monkeypatch):
    """The checkpoint has the best parameters and the number of evaluations without improvement."""
    run = partial(
        fit,
        data.hold_out(small, 0.2, 0),
        patience=2,
        eval_every=4,
        optimizer=optax.adam(0.2),
        steps=200,
    )
    whole = run(tmp_path / "whole")
    assert whole.stopped_early
    killed_after(monkeypatch, len(whole.history) - 3, partial(run, tmp_path / "killed"))
    again = run(tmp_path / "killed")
    assert rows(tmp_path / "killed") == rows(tmp_path / "whole")
    assert again.step == whole.step < again.history[-1]["step"]
    jax.tree.map(np.testing.assert_array_equal, again.params, whole.params)


RISING_LOSS = {
    "optimizer": optax.adam(lambda step: 0.2 - 0.3 * (step >= 20)),
    "eval_every": 4,
    "save_every": 12,
}
"""A run whose loss rises after step 20."""


BEST = {"loss": min, "accuracy": max}


@pytest.mark.slow
@pytest.mark.parametrize("name", BEST)
def test_killed_run_keeps_the_same_best_checkpoint(name, small, tmp_path, monkeypatch):
    run = partial(fit, data.hold_out(small, 0.2, 0), **RISING_LOSS, keep_best=name)
    whole = run(tmp_path / "whole")
    validated = [row for row in whole.history if row["split"] == "validation"]
    best = BEST[name](validated, key=lambda row: row[name])
    assert [40, best["step"]] == checkpoint.steps(tmp_path / "whole" / "checkpoints")[::2]
    kept = checkpoint.read(checkpoint.path_of(tmp_path / "whole" / "checkpoints", best["step"]))
    assert kept.facts["measured"] == best

    for lines in (3, 14, len(whole.history) - 2):
        killed_after(monkeypatch, lines, partial(run, tmp_path / "killed"))
    run(tmp_path / "killed")
    assert rows(tmp_path / "killed") == rows(tmp_path / "whole")
    assert tensors(tmp_path / "killed") == tensors(tmp_path / "whole")
    again = checkpoint.read(checkpoint.path_of(tmp_path / "killed" / "checkpoints", best["step"]))
    jax.tree.map(np.testing.assert_array_equal, again.tensors, kept.tensors)


@pytest.mark.slow
def test_keep_best_changes_no_row_and_may_be_added_on_resuming(
    small, tmp_path, monkeypatch, capsys
):
    whole = fit(small, tmp_path / "whole", **RISING_LOSS)
    killed_after(monkeypatch, 6, partial(fit, small, tmp_path / "killed", **RISING_LOSS))
    again = fit(small, tmp_path / "killed", **RISING_LOSS, keep_best="accuracy", show=True)
    assert rows(tmp_path / "killed") == rows(tmp_path / "whole")
    assert again.tested == whole.tested
    assert f"best       {tmp_path / 'killed' / 'checkpoints' / 'step-'}" in capsys.readouterr().out


@pytest.mark.slow
def test_branch_from_the_best_checkpoint_has_its_parameters(small, tmp_path):
    run = partial(fit, small, **RISING_LOSS | {"keep_best": "accuracy"})
    trunk = run(tmp_path / "trunk")
    step = checkpoint.steps(tmp_path / "trunk" / "checkpoints")[-1]
    branch = run(
        tmp_path / "branch",
        branch_from=checkpoint.path_of(tmp_path / "trunk" / "checkpoints", step),
        optimizer=optax.adam(lambda step: 0.0),
        steps=step + 4,
    )
    tested = {row["step"]: row["accuracy"] for row in trunk.history if row["split"] == "test"}
    assert branch.tested["accuracy"] == tested[step] == max(tested.values())


def test_unknown_metric_of_keep_best_is_refused_before_anything_is_written(small, tmp_path):
    with pytest.raises(
        ctde.InputError,
        match="keep_best must be one of loss, accuracy, got 'acuracy'; did you mean",
    ):
        fit(small, tmp_path / "run", keep_best="acuracy")
    assert not (tmp_path / "run").exists()
    with pytest.raises(ctde.InputError, match="keep_best requires run_dir"):
        fit(small, None, save_every=None, keep_best="loss")


@pytest.mark.slow
def test_run_on_a_stream_resumes(small, tmp_path, monkeypatch):
    """The stream is read again up to the position of the checkpoint."""
    x, y = small.train

    def batches(epoch: int):
        order = np.random.default_rng(epoch).permutation(len(x)).reshape(-1, 32)
        return ((x[indices], y[indices]) for indices in order)

    stream = data.from_batches(batches, 10, *small.test)
    whole = fit(stream, tmp_path / "whole")
    killed_after(monkeypatch, 6, partial(fit, stream, tmp_path / "killed"))
    again = fit(stream, tmp_path / "killed")
    assert rows(tmp_path / "killed") == rows(tmp_path / "whole")
    assert again.tested == whole.tested


def test_finished_run_is_loaded_and_not_repeated(small, whole):
    folder, trained = whole
    before = {path: path.stat().st_mtime_ns for path in (folder / "checkpoints").rglob("*")}
    again = fit(small, folder, keep_checkpoints=20)
    assert again.history == trained.history
    assert again.tested == trained.tested
    np.testing.assert_array_equal(
        again.predict(small.test.inputs), trained.predict(small.test.inputs)
    )
    assert {path: path.stat().st_mtime_ns for path in (folder / "checkpoints").rglob("*")} == before


def test_killed_run_loses_at_most_save_every_steps(small, tmp_path, monkeypatch):
    """At any kill, the newest checkpoint is at most `save_every` steps older than the last row."""
    for lines in (2, 5, 9):
        folder = tmp_path / str(lines)
        killed_after(
            monkeypatch,
            lines,
            partial(fit, small, folder, save_every=6, log_every=3, eval_every=10),
        )
        seen = rows(folder)[-1]["step"]
        assert checkpoint.steps(folder / "checkpoints")[0] >= seen - 6


def test_damaged_checkpoint_is_skipped(small, whole, tmp_path, monkeypatch, capsys):
    folder, _ = whole
    killed_after(monkeypatch, 6, partial(fit, small, tmp_path / "killed"))
    newest = checkpoint.newest(tmp_path / "killed" / "checkpoints") / checkpoint.TENSORS
    newest.write_bytes(newest.read_bytes()[:-1] + b"?")
    fit(small, tmp_path / "killed", show=True)
    assert f"damaged    {newest.parent}" in capsys.readouterr().out
    assert tensors(tmp_path / "killed") == tensors(folder)
    assert rows(tmp_path / "killed") == rows(folder)


def test_different_options_are_listed(small, tmp_path):
    fit(small, tmp_path, options={"learning_rate": 0.01})
    before = tensors(tmp_path)
    sentence = (
        "run_dir contains a run with different options: learning_rate 0.01 in the checkpoint and "
        "0.02 here; seed 0 in the checkpoint and 1 here"
    )
    with pytest.raises(ctde.InputError, match=sentence):
        fit(small, tmp_path, seed=1, options={"learning_rate": 0.02})
    assert tensors(tmp_path) == before


def test_every_parameter_of_another_model_is_listed(small, whole, tmp_path):
    trunk = checkpoint.newest(whole[0] / "checkpoints")
    with pytest.raises(
        ctde.InputError, match="branch_from must refer to a checkpoint of the same model"
    ) as caught:
        fit(small, tmp_path / "branch", model=models.mlp([64, 9, 10]), branch_from=trunk, steps=50)
    for part in (
        "0/bias is float32[8] instead of float32[9]",
        "0/kernel is float32[64, 8] instead of",
        "1/kernel is",
    ):
        assert part in str(caught.value)


def test_every_tensor_of_another_optimizer_is_listed(small, whole, tmp_path):
    trunk = checkpoint.newest(whole[0] / "checkpoints")
    with pytest.raises(ctde.InputError, match=r"opt_state/.*mu/.* is not expected"):
        fit(small, tmp_path / "branch", optimizer=optax.sgd(0.1), branch_from=trunk, steps=50)


@pytest.mark.slow
def test_run_without_resume_restarts_and_keeps_earlier_runs(small, tmp_path, capsys):
    (tmp_path / "previous-1").mkdir()
    runs = [fit(small, tmp_path, resume=False, seed=seed, show=True) for seed in range(2)]
    assert (
        f"previous   the earlier run in {tmp_path} was moved to {tmp_path / 'previous-2'}"
        in capsys.readouterr().out
    )
    for seed, folder in enumerate([tmp_path / "previous-2", tmp_path]):
        assert {"metrics.jsonl", "curves.png", "checkpoints"} <= {
            path.name for path in folder.iterdir()
        }
        assert fit(small, folder, seed=seed).history == runs[seed].history


@pytest.mark.slow
@pytest.mark.parametrize("renames", [1, 2, 3])
def test_interrupted_move_is_completed_by_the_next_call(small, finished, monkeypatch, renames):
    before, rename, done = tensors(finished), Path.rename, []

    def rename_or_kill(path: Path, target: Path) -> Path:
        done.append(path)
        if len(done) > renames:
            raise Killed
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", rename_or_kill)
        with pytest.raises(Killed):
            fit(small, finished, resume=False, seed=1)
    fit(small, finished, seed=1)
    assert tensors(finished / "previous-1") == before != tensors(finished)
    assert {path.name for path in (finished / "previous-1").iterdir()} == {
        "metrics.jsonl",
        "curves.png",
        "checkpoints",
    }


def test_call_that_fails_before_its_first_step_moves_nothing(small, whole, finished):
    wrong = optax.GradientTransformation(optax.adam(0.1).init, lambda *_: 1 / 0)
    with pytest.raises(ctde.InputError, match="raised ZeroDivisionError"):
        fit(small, finished, resume=False, optimizer=wrong)
    assert rows(finished) == rows(whole[0])
    assert tensors(finished) == tensors(whole[0])
    assert not (finished / "previous-1").exists()


def test_branch_may_start_from_the_run_that_is_moved(small, finished):
    branch = fit(
        small,
        finished,
        resume=False,
        branch_from=checkpoint.newest(finished / "checkpoints"),
        steps=44,
    )
    assert [row["step"] for row in branch.history if row["split"] == "train"] == [44]
    assert checkpoint.steps(finished / "previous-1" / "checkpoints")[0] == 40


@pytest.mark.slow
def test_branch_continues_from_a_checkpoint_with_other_options(
    small, whole, finished, tmp_path, capsys
):
    start = checkpoint.path_of(finished / "checkpoints", 20)
    branch = fit(small, finished / "branch", branch_from=start, seed=1, show=True)
    assert "seed 0 in the checkpoint and 1 here" in capsys.readouterr().out
    assert branch.history[0]["step"] == 24
    assert branch.history[-1]["step"] == 40
    same = fit(small, tmp_path, branch_from=start)  # this folder contains the trunk
    assert same.tested == whole[1].tested


@pytest.mark.parametrize("fact", ["position", "rows", "replicas", "options"])
def test_checkpoint_without_the_facts_of_a_run_is_refused(small, finished, fact):
    found = checkpoint.read(checkpoint.newest(finished / "checkpoints"))
    checkpoint.write(
        found.path, found.tensors, {name: x for name, x in found.facts.items() if name != fact}
    )
    with pytest.raises(ctde.InputError, match=f"whose manifest has no valid {fact}"):
        fit(small, finished)


def test_branch_requires_an_intact_checkpoint(small, tmp_path):
    with pytest.raises(
        ctde.InputError, match="branch_from must be the folder of an intact checkpoint"
    ):
        fit(small, tmp_path / "branch", branch_from=tmp_path / "nowhere")


@pytest.mark.slow
def test_killed_branch_resumes_with_the_same_call(small, whole, tmp_path, monkeypatch):
    start = checkpoint.path_of(whole[0] / "checkpoints", 20)
    branch = partial(fit, small, branch_from=start, seed=1)
    trained = branch(tmp_path / "whole")
    killed_after(monkeypatch, 2, partial(branch, tmp_path / "killed"))
    assert branch(tmp_path / "killed").tested == trained.tested
    assert rows(tmp_path / "killed") == rows(tmp_path / "whole")


@pytest.mark.slow
def test_branch_from_an_early_stopped_run_resets_patience(small, tmp_path):
    held = data.hold_out(small, 0.2, 0)
    run = partial(fit, held, patience=2, eval_every=4, optimizer=optax.adam(0.2), steps=200)
    trunk = run(tmp_path / "trunk")
    branch = run(
        tmp_path / "branch",
        branch_from=checkpoint.newest(tmp_path / "trunk" / "checkpoints"),
        seed=1,
    )
    assert branch.history[0]["step"] > trunk.history[-1]["step"]
    assert branch.tested["step"] == branch.step


def test_branch_must_have_steps_left(small, whole, tmp_path):
    """The error names both steps and epochs, because a call may give either."""
    trunk = checkpoint.newest(whole[0] / "checkpoints")
    rule = (
        "^branch_from must be a checkpoint before the end of this run at step 40, got .* of step "
        "40; "
    )
    with pytest.raises(
        ctde.InputError,
        match=f"{rule}increase epochs or steps, which count from the start of the parent run",
    ):
        fit(small, tmp_path / "branch", branch_from=trunk)


@pytest.mark.slow
@pytest.mark.parametrize("rows_before", [0, 5])
def test_ctrl_c_before_the_first_step_returns_the_current_model(
    small, whole, tmp_path, monkeypatch, rows_before
):
    """At the start of a new run and of a resumed run."""
    if rows_before:
        killed_after(monkeypatch, rows_before, partial(fit, small, tmp_path / "run"))
    advance = Run.advance

    def interrupt(run, program):
        signal.raise_signal(signal.SIGINT)
        advance(run, program)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "advance", interrupt)
        trained = fit(small, tmp_path / "run")
    assert trained.interrupted
    assert trained.tested["step"] == trained.step < 40
    assert fit(small, tmp_path / "run").tested == whole[1].tested
    assert rows(tmp_path / "run") == rows(whole[0])


@pytest.mark.slow
def test_signal_in_the_last_evaluation_does_not_interrupt_the_run(small, tmp_path):
    class AtEvaluation(ctde.Callback):
        def on_evaluation(self, rows, params, model_state):
            signal.raise_signal(signal.SIGTERM)

    trained = fit(small, tmp_path, eval_every=40, callbacks=[AtEvaluation()])
    assert not trained.interrupted
    assert trained.step == 40


@pytest.mark.slow
def test_run_resumes_after_sigterm_within_a_span_and_at_its_end(
    small, whole, tmp_path, monkeypatch
):
    """The same call continues from the step of the signal."""
    add = Log.add
    # The third row of the second span, which ends at step 20, and the evaluation after that span.
    for moment in (4, 11):

        def add_and_signal(log: Log, row, moment=moment):
            add(log, row)
            if len(log.rows) == moment:
                signal.raise_signal(signal.SIGTERM)

        with monkeypatch.context() as patch:
            patch.setattr(Log, "add", add_and_signal)
            with pytest.raises(ctde.Preempted, match=f"--run-dir {tmp_path / 'run'} to continue"):
                fit(small, tmp_path / "run")
    assert fit(small, tmp_path / "run").tested == whole[1].tested
    assert rows(tmp_path / "run") == rows(whole[0])


@pytest.mark.slow
@pytest.mark.parametrize("ignored", [False, True])
def test_sighup_saves_unless_it_is_ignored(small, tmp_path, ignored):
    """`nohup` ignores SIGHUP."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)

    class AtEvaluation(ctde.Callback):
        def on_evaluation(self, rows, params, model_state):
            signal.raise_signal(signal.SIGHUP)

    try:
        if ignored:
            assert fit(small, tmp_path, callbacks=[AtEvaluation()]).step == 40
        else:
            with pytest.raises(ctde.Preempted, match="SIGHUP stopped the training after step"):
                fit(small, tmp_path, callbacks=[AtEvaluation()])
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.slow
def test_default_period_of_checkpoints_is_a_minute(small, tmp_path, monkeypatch):
    """Also if every span is one row and therefore one dispatch."""
    fit(small, tmp_path / "soon", save_every=None, keep_checkpoints=20)
    assert checkpoint.steps(tmp_path / "soon" / "checkpoints") == [40, 0]
    monkeypatch.setattr(meter, "_SAVE_SECONDS", 0)
    fit(small, tmp_path / "late", save_every=None, keep_checkpoints=20, eval_every=4, log_every=20)
    assert checkpoint.steps(tmp_path / "late" / "checkpoints") == [*range(40, -1, -4)]


@pytest.mark.slow
def test_options_may_be_numpy_numbers_and_paths(small, tmp_path):
    options = {"learning_rate": np.float32(0.1), "where": tmp_path}
    for _ in range(2):
        fit(small, tmp_path, options=options, seed=np.int64(3), steps=np.int64(8))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "after", "sentence"),
    [
        (
            {"strategy": ctde.Strategy(4)},
            {"strategy": ctde.Strategy(5)},
            "sync_every 4 in the checkpoint and 5 here",
        ),
        (
            {"partition": np.array_split(np.arange(320), 4), "count": 4},
            {"partition": np.array_split(np.arange(320), 4), "eval_every": 10},
            "partition 4 parts, on their devices in the checkpoint and 4 parts, clients here",
        ),
        (
            {"on_nonfinite": "rollback", "keep_best": "loss"},
            {"on_nonfinite": "rollback"},
            "keep_best loss in the checkpoint and None here",
        ),
    ],
)
def test_options_that_would_change_the_numbers_are_refused(
    small, tmp_path, before, after, sentence
):
    fit(small, tmp_path, **{"eval_every": 10, **before})
    with pytest.raises(ctde.InputError, match=sentence):
        fit(small, tmp_path, **{"eval_every": 10, **after})


def test_second_trainer_on_a_folder_is_refused(small, tmp_path):
    script = (
        "import sys; from pathlib import Path; from ctde_jax.checkpoint import run_folder\n"
        "with run_folder.claimed(Path(sys.argv[1])): print('mine', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "mine\n"
        with pytest.raises(ctde.InputError, match="run_dir must not be used by two runs at once"):
            fit(small, tmp_path)
        other.kill()
    fit(small, tmp_path)


def command(folder: Path, *more: str) -> list[str]:
    shared = [
        "--steps",
        "600",
        "--batch-size",
        "32",
        "--save-every",
        "20",
        "--log-every",
        "10",
        "--eval-every",
        "50",
    ]
    return [
        sys.executable,
        "-m",
        "ctde_jax.train",
        "--devices",
        "2",
        "--run-dir",
        str(folder),
        *shared,
        *more,
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [(), ("--strategy", "diloco", "--sync-every", "5", "--reduce", "int4", "--error-feedback")],
)
def test_command_killed_at_15_random_moments_ends_with_the_same_bits(tmp_path, more):
    """During start, compilation, training and saving; a finished run is started again."""
    subprocess.run(command(tmp_path / "whole", *more), check=True, capture_output=True)
    draw, kills, number = random.Random(0), 0, 0
    while kills < 15:
        folder = tmp_path / str(number)
        process = subprocess.Popen(
            command(folder, *more), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        wait_for_checkpoint = draw.random() < 0.8
        while (
            wait_for_checkpoint
            and process.poll() is None
            and not checkpoint.steps(folder / "checkpoints")
        ):
            time.sleep(0.005)
        try:
            process.wait(draw.uniform(0, 0.6))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            kills += 1
        _, errors = process.communicate()
        assert process.returncode in (0, -signal.SIGKILL), errors
        if process.returncode == 0:
            assert tensors(folder) == tensors(tmp_path / "whole")
            assert rows(folder) == rows(tmp_path / "whole")
            number += 1
    subprocess.run(command(folder, *more), check=True, capture_output=True)
    assert tensors(folder) == tensors(tmp_path / "whole")
    assert rows(folder) == rows(tmp_path / "whole")


@pytest.mark.slow
def test_sigterm_saves_and_the_same_command_resumes(tmp_path):
    more = ("--steps", "5000")
    process = subprocess.Popen(
        command(tmp_path / "run", *more),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    while not (metrics.exists() and metrics.stat().st_size):
        time.sleep(0.01)
    process.terminate()
    _, errors = process.communicate(timeout=30)
    assert process.returncode == os.EX_TEMPFAIL == 75
    assert "SIGTERM stopped the training after step" in errors
    step = checkpoint.steps(tmp_path / "run" / "checkpoints")[0]
    assert step == rows(tmp_path / "run")[-1]["step"]

    after = subprocess.run(
        command(tmp_path / "run", *more), check=True, capture_output=True, text=True
    )
    assert f"step-{step:08d}" in after.stdout
    subprocess.run(command(tmp_path / "whole", *more), check=True, capture_output=True)
    assert tensors(tmp_path / "run") == tensors(tmp_path / "whole")
    assert rows(tmp_path / "run") == rows(tmp_path / "whole")
