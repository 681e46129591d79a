"""Rows are written at once, shown as plain lines or a progress bar, and plotted at the end."""

import json

import pytest
from rich.console import Console

from ctde_jax.errors import InputError
from ctde_jax.trainer import log

pytestmark = pytest.mark.curves

TRAIN = {"split": "train", "step": 5, "epoch": 0.5, "loss": 0.5, "accuracy": 0.8, "examples": 320}
TRAIN["examples_per_second"] = 1234.5
TEST = {"split": "test", "step": 10, "epoch": 1.0, "loss": 0.4, "accuracy": 0.9, "examples": 100}


def test_each_row_is_written_at_once(tmp_path):
    with log.open_log(10, tmp_path, show=False) as opened:
        opened.add(TRAIN)
        assert json.loads((tmp_path / "metrics.jsonl").read_text()) == TRAIN
        opened.add(TEST)
    assert [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [
        TRAIN,
        TEST,
    ]
    assert opened.rows == [TRAIN, TEST]


def test_curves_are_drawn_even_if_the_run_fails(tmp_path):
    def failing_run():
        with log.open_log(10, tmp_path, show=False) as opened:
            opened.add(TRAIN)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        failing_run()
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_run_without_a_folder_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with log.open_log(10, show=False) as opened:
        opened.add(TRAIN)
    assert not list(tmp_path.iterdir())


def test_output_without_a_terminal_is_plain_lines(capsys):
    with log.open_log(10) as opened:
        opened.add(TRAIN)
        opened.add(TEST)
    assert capsys.readouterr().out == (
        "step 10 of 10  loss 0.5000 accuracy 0.8000 1,234 examples/s  test loss 0.4000 "
        "accuracy 0.9000\n"
    )


def test_bar_shows_loss_accuracy_speed_and_remaining_time(monkeypatch, capsys):
    monkeypatch.setattr(
        log, "console", lambda quiet=False: Console(force_terminal=True, width=150, quiet=quiet)
    )
    with log.open_log(10) as opened:
        for step in range(6):
            opened.add(TRAIN | {"step": step})
    shown = capsys.readouterr().out
    for words in ("━", "5/10", "loss 0.5000", "accuracy 0.8000", "1,234 examples/s", "0:00"):
        assert words in shown


@pytest.mark.parametrize("width", [80, 100, 200])
def test_bar_never_truncates_the_test_accuracy(monkeypatch, capsys, width):
    monkeypatch.setattr(
        log, "console", lambda quiet=False: Console(force_terminal=True, width=width, quiet=quiet)
    )
    with log.open_log(23_000) as opened:
        opened.add(TRAIN | {"step": 22_990})
        opened.add(TEST | {"step": 23_000})
    last = capsys.readouterr().out.split("\r")[-1]
    assert "test loss 0.4000 accuracy 0.9000" in last
    assert "23000/23000" in last
    assert ("examples/s" in last) == (width == 200)
    assert "…" not in last


def test_plain_lines_are_limited_to_a_few_per_minute(monkeypatch, capsys):
    """100 evaluations per second for ten minutes: a burst, a line per ten seconds, the last."""
    now = [0.0]
    monkeypatch.setattr(log.time, "perf_counter", lambda: now[0])
    with log.open_log(600_000) as opened:
        for step in range(1, 60_001):
            now[0] = step / 100
            opened.add(TEST | {"step": 10 * step})
    lines = capsys.readouterr().out.splitlines()
    assert 60 <= len(lines) <= 75
    assert [line.split("  ")[0] for line in lines[:2]] == [
        "step 10 of 600,000",
        "step 20 of 600,000",
    ]
    assert lines[-1].startswith("step 600,000 of 600,000")


def test_console_has_at_least_40_columns(monkeypatch):
    for columns in ("1", "0", "-3", "many"):
        monkeypatch.setenv("COLUMNS", columns)
        assert log.console().width >= 40


def test_curves_have_a_panel_for_the_loss_and_every_metric():
    figure = log.plot_curves([TRAIN, TEST])
    assert [axes.get_title() for axes in figure.axes] == ["loss", "accuracy"]
    for axes in figure.axes:
        assert [line.get_label() for line in axes.lines] == ["train", "test"]
        assert [list(line.get_xdata()) for line in axes.lines] == [[5], [10]]


def test_unwritable_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    sentence = r"run_dir must be a writable folder .* writing to .*file failed: Not a directory"
    with pytest.raises(InputError, match=sentence), log.open_log(10, tmp_path / "file", show=False):
        pass
