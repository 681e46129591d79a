"""The harness of the benchmarks, and the start of each benchmark."""

import importlib.util
import json
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import NamedTuple

import optax
import pytest

import ctde_jax as ctde

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SCRIPTS = [
    path
    for path in sorted(BENCHMARKS.glob("*.py"))
    if "\n    command_line(main" in path.read_text()
]


@pytest.fixture(scope="module")
def harness():
    spec = importlib.util.spec_from_file_location("harness", BENCHMARKS / "harness.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_log_replaces_a_measurement_and_keeps_the_others(harness, tmp_path):
    log = harness.Log(tmp_path / "new" / "log.jsonl")
    log.put({"who": "a"}, seconds=1)
    log.put({"who": "b", "settings": {"rate": 0.1}}, seconds=2)
    log.put({"who": "a"}, seconds=3)

    assert harness.Log(log.file).find() == [
        {"who": "b", "settings": {"rate": 0.1}, "seconds": 2},
        {"who": "a", "seconds": 3},
    ]
    assert log.find(settings={"rate": 0.1}) == log.find(who="b")


def test_log_measures_only_missing_values(harness, tmp_path):
    log, calls = harness.Log(tmp_path / "log.jsonl"), []
    for value in (1, 2):
        log.make(lambda value=value: calls.append(value) or {"value": value}, who="a")

    assert calls == [1]
    assert [row["value"] for row in log.find(who="a")] == [1]


def test_turns_alternate_and_omit_warmup_and_failures(harness, tmp_path):
    log, calls = harness.Log(tmp_path / "log.jsonl"), []

    def contestant(name: str, fails_at: int | None = None):
        def run() -> float:
            calls.append(name)
            if calls.count(name) == fails_at:
                raise harness.Failed("out of memory")
            return float(len(calls))

        return {"contestant": name}, run

    harness.take_turns(
        log, [contestant("a"), contestant("b", fails_at=2), contestant("c")], turns=2
    )

    assert "".join(calls) == "abcabcac"
    assert log.find(contestant="a")[0]["seconds"] == [4.0, 7.0]
    assert log.find(contestant="b") == [{"contestant": "b", "failed": "out of memory"}]
    assert log.find(contestant="c")[0]["seconds"] == [6.0, 8.0]


@pytest.mark.slow
def test_points_are_measured_in_processes_that_may_fail_or_hang(harness, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import json, sys, time\n"
        "point = json.loads(sys.argv[2])\n"
        "if point['x'] == 1: sys.exit('no such point')\n"
        "if point['x'] == 2: time.sleep(60)\n"
        "print('a line that is not JSON')\n"
        "print(json.dumps({'measured': {'y': point['x'] + 1}}))\n"
    )
    log = harness.Log(tmp_path / "log.jsonl")
    points = [{"x": 0}, {"x": 1}, {"x": 2}, {"x": 3}]

    harness.measure(log, str(script), points, limit=3, can=lambda point: point["x"] != 3)

    found = {row["x"]: row.get("y", row.get("failed")) for row in log.find()}
    assert found == {0: 1, 1: "no such point", 2: "took more than 3 s"}


def test_tables_are_written_as_markdown(harness, tmp_path):
    harness.publish(
        tmp_path / "new" / "t.md", [harness.Table("Title", ("a", "b"), [["1", "2"]])], "A note."
    )
    text = (tmp_path / "new" / "t.md").read_text()
    assert text == "## Title\n\n| a | b |\n| --- | --- |\n| 1 | 2 |\n\nA note.\n"


def test_spread_is_median_and_quartiles(harness):
    assert harness.spread([5, 1, 2, 4, 3]) == "3.00 (2.00-4.00)"


def test_rows_are_appended_by_two_logs_of_a_file(harness, tmp_path):
    first, second = (harness.Log(tmp_path / "new" / "log.jsonl") for _ in range(2))
    first.append({"who": "a"})
    second.append({"who": "b"})
    first.append({"who": "c"})

    assert [row["who"] for row in second.find()] == ["a", "b", "c"]


def learn_small_digits(communication, _) -> NamedTuple:
    model, data = ctde.models.mlp([64, 10]), ctde.data.digits()
    return communication.Problem(model, data, ctde.tasks.classification, batch_size=64)


@pytest.mark.slow
def test_arms_repeat_the_best_setting_and_are_trained_once(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    communication, arms = map(importlib.import_module, ("communication", "arms"))
    rates = arms.grid(1e-6, 0.1)
    compared = {
        "synchronous, AdamW": arms.Arm(optax.adamw, arms.synchronous, rates),
        "averaging, AdamW, H=4": arms.Arm(optax.adamw, arms.averaging(4), rates),
    }
    learn = partial(learn_small_digits, communication)
    monkeypatch.setattr(communication, "PROBLEMS", {"mnist": learn})
    monkeypatch.setattr(communication, "ARMS", {"mnist": {32: compared}})
    run = partial(communication.main, seeds=(0, 1, 2), results=tmp_path)

    run()
    log = tmp_path / "communication.jsonl"
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    assert [(row["seed"], row["settings"]["learning_rate"]) for row in rows] == 2 * [
        (0, 1e-6),
        (0, 0.1),
        (1, 0.1),
        (2, 0.1),
    ]
    assert rows[0]["bytes"] == 4 * rows[4]["bytes"]
    assert "mnist, 32 steps" in (tmp_path / "communication.md").read_text()

    # Only the run whose row is lost is trained again.
    trained = []
    fit_many = ctde.fit_many

    def spy(*args, **options):
        trained.append((options["sweep"], options["seeds"]))
        return fit_many(*args, **options)

    monkeypatch.setattr(ctde, "fit_many", spy)
    run()
    assert trained == []
    log.write_text("".join(f"{json.dumps(row)}\n" for row in rows if row is not rows[2]))
    run()
    assert trained == [([{"learning_rate": 0.1}], [1])]


def read_tables(page: str) -> list[str]:
    """Returns the tables of a Markdown page, without the lines below their headers."""
    rows = re.sub(r"^\|[-| ]+\|\n", "", page, flags=re.MULTILINE)
    return re.findall(r"(?:^\|.*\|\n)+", rows, flags=re.MULTILINE)


def test_page_has_the_tables_of_the_communication_log(harness, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    communication = importlib.import_module("communication")
    results = BENCHMARKS / "results"

    communication.publish_results(harness.Log(results / "communication.jsonl"), tmp_path)

    report = (tmp_path / "communication.md").read_text()
    assert report == (results / "communication.md").read_text()
    page = read_tables((BENCHMARKS / "README.md").read_text())
    # The page compares runs by seed for one training only.
    compared = [table for table in read_tables(report) if "| settings |" in table]
    assert len(compared) > 1
    assert [table for table in compared if table not in page] == []


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_every_benchmark_starts(script):
    finished = subprocess.run(
        [sys.executable, script, "--help"], capture_output=True, text=True, timeout=120
    )
    assert finished.returncode == 0, finished.stderr[-2000:]
    assert f"python benchmarks/{script.name}" in finished.stdout
