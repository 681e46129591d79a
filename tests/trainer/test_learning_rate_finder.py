"""The learning rate finder: which rate it finds, and what the command prints."""

from math import inf

import pytest
from runs import rows

from ctde_jax import profile, train
from ctde_jax.trainer import learning_rate_finder as finder


def comparison(*losses: float) -> finder.Comparison:
    rates = (0.001, 0.01, 0.1, 1.0)
    tried = [finder.Tried(rate, loss) for rate, loss in zip(rates, losses, strict=True)]
    return finder.Comparison(tried, 100)


def test_lowest_loss_and_its_neighbors_are_found():
    found = comparison(2.0, 1.2, 1.0, inf)
    assert found.best.rate == 0.1
    assert found.range == (0.01, 0.1)
    (first, _) = finder.advice(found)
    assert "0.1 has the lowest" in first
    assert "from 0.01 to 0.1" in first
    (alone, _) = finder.advice(comparison(2.0, 1.5, 1.0, inf))
    assert "from" not in alone


@pytest.mark.parametrize("losses", [(2.0, 1.2, 1.0, inf), (-1.0, -2.0, 3.0, 4.0)])
def test_picture_shows_finite_losses(losses):
    axes = finder.plot(comparison(*losses), "title").axes[0]
    assert [*axes.lines[0].get_ydata()] == [loss for loss in losses if loss < inf]


@pytest.mark.slow
def test_command_judges_each_rate_by_the_loss_of_its_own_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(finder, "RATES", [0.01, 0.3])
    monkeypatch.setattr(finder, "STEPS", 20)
    options = ["--hidden-sizes", "8", "--optimizer", "sgd", "--devices", "1"]
    assert profile.main(["--find", "learning-rate", "--run-dir", "found", *options]) == 0
    out = capsys.readouterr().out
    assert "0.3 has the lowest training loss after 20 steps" in out
    assert (tmp_path / "found" / "learning-rate.png").exists()

    short = ["--steps", "20", "--schedule", "constant", "--log-every", "2", "--eval-every", "20"]
    alone = ["--learning-rate", "0.3", "--run-dir", "alone", *short, *options]
    assert train.main(alone) == 0
    last = [row for row in rows(tmp_path / "alone") if row["split"] == "train"][-2:]
    loss = sum(row["loss"] * row["examples"] for row in last)
    loss /= sum(row["examples"] for row in last)
    assert f"{loss:.4f}" in out
