"""The harness of the benchmarks, and the start of each benchmark."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

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


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_every_benchmark_starts(script):
    finished = subprocess.run(
        [sys.executable, script, "--help"], capture_output=True, text=True, timeout=120
    )
    assert finished.returncode == 0, finished.stderr[-2000:]
    assert f"python benchmarks/{script.name}" in finished.stdout
