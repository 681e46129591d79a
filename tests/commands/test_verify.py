"""`verify` confirms guarantees that hold, and reports those that do not."""

import numpy as np
import pytest

import ctde_jax as ctde
from ctde_jax import checkpoint, config, verify
from ctde_jax.config import proofs
from ctde_jax.errors import ReplicasDiverged

RUN = ["--devices", "2", "--steps", "60"]


@pytest.fixture(autouse=True)
def working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_every_example_is_counted_once(capsys):
    assert verify.main(["eval", *RUN]) == 0
    assert (
        "all 359 test examples count once: the metrics of 2 devices equal those of an"
        in capsys.readouterr().out
    )


def test_examples_that_are_counted_twice_are_reported(monkeypatch, capsys):
    def twice(self):
        row = next(row for row in self.history if row["split"] == "test")
        return row | {"examples": 2 * row["examples"], "accuracy": 0.5}

    monkeypatch.setattr(ctde.Trained, "tested", property(twice))
    assert verify.main(["eval", *RUN]) == 1
    error = capsys.readouterr().err
    assert "the test accuracy is 0.500000 on all devices, but 0.9" in error
    assert "718 of 359 examples were counted" in error


def test_equal_replicas_are_confirmed(capsys):
    assert verify.main(["replicas", *RUN]) == 0
    assert "the replicated state was equal on all 2 devices after every dispatch, for 60 steps" in (
        capsys.readouterr().out
    )


def test_different_replicas_are_reported(monkeypatch, capsys):
    def diverge(chosen: config.Config, started: float):
        raise ReplicasDiverged(["params/w"], [[0], [1]], 0, 20)

    monkeypatch.setattr(proofs, "train", diverge)
    assert verify.main(["replicas", *RUN]) == 1
    assert (
        "wrong: params/w must be equal on all devices. All devices agreed after step 0, but "
        "devices [0] and [1] differ after step 20"
    ) in capsys.readouterr().err


def test_checkpoints_of_a_run_are_verified(tmp_path, capsys):
    for step in (3, 9):
        checkpoint.write(checkpoint.path_of(tmp_path / "checkpoints", step), {"x": np.zeros(3)}, {})
    assert verify.main(["checkpoint", str(tmp_path)]) == 0
    assert (
        "2 tensors in step-00000009, step-00000003 match their SHA-256" in capsys.readouterr().out
    )
    damaged = checkpoint.path_of(tmp_path / "checkpoints", 3) / checkpoint.TENSORS
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"1")
    assert verify.main(["checkpoint", str(tmp_path)]) == 1
    assert f"wrong: {damaged.parent}: SHA-256 mismatch in x in tensors" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ["resum"],
            (
                "verify must be one of resume, exact, replicas, eval, checkpoint, bundle, got "
                "'resum'; did you"
            ),
        ),
        (
            ["checkpoint"],
            "verify checkpoint requires one argument, the folder of a run or a checkpoint, got 0.",
        ),
        (
            ["replicas", "--devices", "1"],
            "--devices must be at least 2, so that replicas can be compared, got 1.",
        ),
        (
            ["exact", "--devices", "2"],
            "--devices must not be set, as exact trains on 1, 2, 4 and 8 devices.",
        ),
        (
            [
                "eval",
                "--coordinator",
                "127.0.0.1:1234",
                "--num-processes",
                "2",
                "--process-id",
                "0",
            ],
            "--num-processes must be 1 for this command, which runs on one host, got 2.",
        ),
        (["eval", "--lr", "3"], "--lr is not an option"),
        (["resume", "--run-dir", "x"], "--run-dir must not be set"),
        (
            ["checkpoint", "nowhere"],
            (
                "verify checkpoint requires the folder of a run or a checkpoint, but nowhere is "
                "neither."
            ),
        ),
    ],
)
def test_mistake_is_reported_in_one_sentence(arguments, sentence, capsys):
    assert verify.main(arguments) == 2
    assert f"error: {sentence}" in capsys.readouterr().err


@pytest.mark.slow
def test_killed_run_ends_with_the_same_bits(capsys):
    assert verify.main(["resume", *RUN, "--save-every", "5"]) == 0
    assert "tensors and 16 rows equal those of the uninterrupted run" in capsys.readouterr().out


@pytest.mark.slow
def test_exact_run_has_the_same_bits_on_any_number_of_devices(capsys):
    assert (
        verify.main(["exact", *(word for word in RUN if word not in ("--devices", "4", "2"))]) == 0
    )
    assert "tensors have the same bits on 1, 2, 4, 8 devices" in capsys.readouterr().out
