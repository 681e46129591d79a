"""Callbacks receive the results of a run in order, may stop it, and change none of its numbers."""

import json
from pathlib import Path
from unittest import mock

import jax
import numpy as np
import optax
import pytest

import ctde_jax as ctde
from ctde_jax.devices import replica
from ctde_jax.errors import InputError

MODEL = ctde.models.mlp([64, 8, 10])


class Recorder(ctde.Callback):
    """Keeps every call, and whether it was entered and left."""

    def __init__(self):
        self.calls = []

    def __enter__(self):
        self.calls.append(("enter",))
        return self

    def __exit__(self, *error):
        self.calls.append(("exit", error[0]))

    def on_start(self, options, rows):
        self.calls.append(("start", options, list(rows)))

    def on_row(self, row):
        self.calls.append(("row", row))

    def on_evaluation(self, rows, params, model_state):
        self.calls.append(("evaluation", rows, params))

    def on_checkpoint(self, path):
        assert (path / "manifest.json").exists()
        self.calls.append(("checkpoint", path))

    def on_end(self, trained):
        self.calls.append(("end", trained))

    def of(self, event):
        return [call[1] for call in self.calls if call[0] == event]


def fit(folder: Path | None = None, callbacks=(), **options):
    settings = {"batch_size": 64, "steps": 40, "eval_every": 20, "log_every": 5, "show": False}
    return ctde.fit(
        MODEL,
        ctde.data.digits(),
        optax.adam(0.01),
        run_dir=folder,
        callbacks=callbacks,
        **(settings | options),
    )


def test_callback_receives_the_rows_evaluations_checkpoints_and_result_of_a_run(tmp_path):
    recorder = Recorder()
    trained = fit(tmp_path / "run", [recorder], seed=3)

    # The order: entered and started first, with the options, ended and left last.
    events = [call[0] for call in recorder.calls]
    assert events[:2] == ["enter", "start"]
    (options,) = recorder.of("start")
    assert (options["batch_size"], options["seed"]) == (64, 3)
    assert events[-2:] == ["end", "exit"]
    # Every row of the file once, in order, and the rows of an evaluation before the evaluation.
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert recorder.of("row") == [json.loads(line) for line in lines] == trained.history
    assert [rows["test"] for rows in recorder.of("evaluation")] == [
        row for row in trained.history if row["split"] == "test"
    ]
    for place, (event, *content) in enumerate(recorder.calls):
        if event == "evaluation":
            assert recorder.calls[place - 1] == ("row", content[0]["test"])
    # The parameters of the last evaluation are those of the result.
    *_, (_, _, params) = [call for call in recorder.calls if call[0] == "evaluation"]
    jax.tree.map(np.testing.assert_array_equal, params, trained.params)
    # Every checkpoint once, when it is complete; the last one is of the last step.
    steps = [int(path.name.removeprefix("step-")) for path in recorder.of("checkpoint")]
    assert steps == sorted(set(steps))
    assert (steps[0], steps[-1]) == (0, 40)
    assert recorder.of("end") == [trained]
    assert recorder.of("exit") == [None]


def test_callbacks_change_no_bit_program_or_dispatch(monkeypatch):
    """Only the center of an evaluation that a callback receives is copied to the host."""
    compiled, calls, copies = [], [], []
    compile_program, device_get = replica.compiled, jax.device_get

    def counted(lowered, *arguments):
        compiled.append(lowered.as_text())
        program = compile_program(lowered, *arguments)
        counting = mock.Mock(wraps=program)
        counting.side_effect = lambda *inputs: calls.append(1) or program(*inputs)
        return counting

    monkeypatch.setattr(replica, "compiled", counted)
    monkeypatch.setattr(jax, "device_get", lambda tree: copies.append(1) or device_get(tree))

    def watched_by(*callbacks):
        for counts in (compiled, calls, copies):
            counts.clear()
        # One row in each interval, so that the number of dispatches does not depend on their time.
        trained = fit(callbacks=callbacks, log_every=20)
        return trained.params, [*compiled], len(calls), len(copies)

    params, *plain = watched_by()
    of_function, *with_function = watched_by(lambda row: None)
    of_object, *with_object = watched_by(Recorder())
    jax.tree.map(np.testing.assert_array_equal, params, of_function)
    jax.tree.map(np.testing.assert_array_equal, params, of_object)
    assert with_function == plain
    assert with_object == [*plain[:2], plain[2] + 2]


def test_function_receives_every_row():
    rows = []
    assert fit(callbacks=[rows.append]).history == rows


@pytest.mark.slow
@pytest.mark.parametrize("event", ["on_row", "on_evaluation"])
def test_callback_that_returns_true_stops_the_run_which_can_be_resumed(tmp_path, event, capsys):
    whole = fit()

    class AtTwenty(ctde.Callback):
        pass

    def stop(self, row, *_):
        return (row.get("test") or row)["step"] >= 20

    setattr(AtTwenty, event, stop)
    stopped = fit(tmp_path / "run", [AtTwenty()], show=True)
    assert stopped.interrupted
    assert 20 <= stopped.step < 40
    end = f"stopped    at step {stopped.step}; the same call continues this run"
    assert end in capsys.readouterr().out

    recorder = Recorder()
    resumed = fit(tmp_path / "run", [recorder])
    assert not resumed.interrupted
    jax.tree.map(np.testing.assert_array_equal, resumed.params, whole.params)
    # The rows of before are passed at the start, and only the others are new.
    (_, _, kept) = recorder.calls[1]
    assert kept + recorder.of("row") == resumed.history
    assert kept


def test_result_that_is_only_true_like_does_not_stop_a_run():
    assert fit(callbacks=[lambda row: "written", lambda row: 1]).step == 40


def test_error_of_a_callback_ends_the_run_and_leaves_every_callback(tmp_path):
    recorder = Recorder()

    def fail(row):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fit(tmp_path / "run", [recorder, fail])
    assert recorder.of("exit") == [ZeroDivisionError]
    assert not recorder.of("end")


def test_complete_run_starts_and_ends_its_callbacks(tmp_path):
    fit(tmp_path / "run")
    recorder = Recorder()
    again = fit(tmp_path / "run", [recorder])
    assert recorder.of("row") == []
    assert recorder.of("end") == [again]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "devices"),
    [(ctde.Strategy(), 4), (ctde.Strategy(exact=True), 1), (ctde.Strategy(inner_steps=1), 1)],
    ids=["synchronous", "exact", "local"],
)
def test_rows_contain_the_gradient_norm_that_the_optimizer_keeps(strategy, devices):
    """A step of SGD is the gradient times the learning rate."""
    recorder = Recorder()
    ctde.fit(
        MODEL,
        ctde.data.digits(),
        optax.chain(optax.snapshot("gradient_norm", optax.tree.norm), optax.sgd(0.1)),
        strategy=strategy,
        devices=ctde.devices.start(devices),
        steps=2,
        eval_every=1,
        callbacks=[recorder],
        show=False,
    )
    first, last = [call[2] for call in recorder.calls if call[0] == "evaluation"]
    step = optax.tree.norm(optax.tree.sub(last, first))
    *_, row = [row for row in recorder.of("row") if row["split"] == "train"]
    assert row["gradient_norm"] == pytest.approx(float(step) / 0.1, rel=1e-4)


@pytest.mark.parametrize("callbacks", [print, Recorder(), 3])
def test_callback_that_is_not_in_a_list_is_refused(callbacks):
    with pytest.raises(InputError, match=r"callbacks must be a list, such as \["):
        fit(callbacks=callbacks)


@pytest.mark.parametrize("callback", [3, "print", Recorder])
def test_value_that_is_no_callback_is_refused_before_training(callback):
    with pytest.raises(InputError, match="callbacks must be functions of a row, or objects with"):
        fit(callbacks=[callback])
