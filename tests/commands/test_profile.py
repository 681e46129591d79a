"""Profiling: parts of a step, advice based on measurements, and the command. Asserts no times."""

import re
from dataclasses import replace

import numpy as np
import optax
import pytest
from conftest import ALL_DEVICES
from rich.console import Console

from ctde_jax import Strategy, data, models, profile
from ctde_jax.aggregate import gossip
from ctde_jax.errors import InputError
from ctde_jax.models.tasks import classification
from ctde_jax.trainer import Training, stopwatch
from ctde_jax.trainer.contestant import Spread, spread
from ctde_jax.trainer.stopwatch import Profile, measure


def constant(seconds: float) -> Spread:
    return Spread(seconds, seconds, seconds)


def parts(**milliseconds: float) -> dict[str, Spread]:
    """The parts of a step that is mostly compute, with these changes."""
    defaults = {"input": 0.1, "dispatch": 0.1, "compute": 9.0, "aggregation": 0.8}
    return {
        part: constant(duration / 1e3) for part, duration in {**defaults, **milliseconds}.items()
    }


FAST = Profile(
    replicas=4,
    cores=None,
    batch_size=256,
    steps=1000,
    steps_per_dispatch=20,
    steps_per_evaluation=100,
    once={"imports": 1.0, "trace": 0.5, "lower": 0.5, "compile": 3.0, "compile evaluation": 1.0},
    parts=parts(),
    scaling={1: constant(0.038), 2: constant(0.019), 4: constant(0.010)},
    evaluation=constant(0.05),
    half_batch=constant(0.55),
    turns=9,
)


def test_step_that_is_mostly_compute_has_no_bottleneck():
    assert profile.advice(FAST) == ["No bottleneck was found: compute takes 90% of a step."]


SLOW = {
    "4 fake devices share 2 cores, so they cannot be faster than these. They are": {"cores": 2},
    "4 fake devices share 1 core, so they": {"cores": 1},
    "With half the batch size, a step takes 93% of the time: 64 examples per device do not": {
        "half_batch": constant(0.93)
    },
    "Every step is a separate dispatch, because the model is evaluated after every step.": {
        "steps_per_evaluation": 1,
        "evaluation": constant(0),
    },
    "Input takes 12 ms per step, and all other parts take 9.9 ms, so the devices wait": {
        "parts": parts(input=12)
    },
    "Aggregation, with the wait for the slowest device, takes 53% of a step.": {
        "parts": parts(aggregation=10.2)
    },
    "Compilation takes 5.00 s, and all 100 steps take 1.00 s, so faster steps": {"steps": 100},
    "Evaluation every 3 steps takes 25% of the time of training and evaluation.": {
        "steps_per_evaluation": 3,
        "evaluation": constant(0.01),
    },
}


@pytest.mark.parametrize("sentence", SLOW)
def test_bottleneck_is_named(sentence: str):
    (advice,) = profile.advice(replace(FAST, **SLOW[sentence]))
    assert advice.startswith(sentence)


@pytest.mark.parametrize("changes", [{"cores": 2}, {"parts": parts(aggregation=10.2)}])
def test_advice_on_many_devices_is_not_given_for_one(changes: dict):
    single = replace(FAST, replicas=1, scaling={1: constant(0.010)}, **changes)
    assert profile.advice(single)[0].startswith("No bottleneck was found")


def test_batch_that_cannot_be_halved_causes_no_advice():
    assert profile.advice(replace(FAST, half_batch=None)) == profile.advice(FAST)


def shown(table) -> str:
    console = Console(width=160)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def test_percentages_of_a_step_relate_to_the_sum_of_its_parts():
    text = shown(profile.step_table(FAST, "a network"))
    assert [int(percentage) for percentage in re.findall(r"(\d+)%", text)] == [1, 1, 90, 8, 100]
    assert "sum of parts  │     10.000" in text
    assert "Measured in 9 turns with 20 steps per dispatch. Compute is" in text
    on_cpu = shown(profile.step_table(replace(FAST, cores=2), "a network"))
    assert "only the sum of dispatch and compute is certain" not in " ".join(text.split())
    assert "only the sum of dispatch and compute is certain" in " ".join(on_cpu.split())


def test_run_table_sums_startup_steps_and_evaluations():
    text = shown(profile.run_table(FAST))
    assert "1,000 steps, estimated    │   10.00" in text
    assert "10 evaluations, estimated │    0.50" in text
    assert "total                     │   16.50" in text


def test_speed_up_is_relative_to_one_device():
    text = shown(profile.scaling_table(FAST))
    assert re.search(r"1 │.* 1.00 │ +100%", text)
    assert re.search(r"4 │.* 25,600 │ +3.80 │ +95%", text)


def test_speed_up_of_two_devices_is_two_if_one_is_not_measured():
    text = shown(
        profile.scaling_table(replace(FAST, scaling={2: constant(0.02), 4: constant(0.01)}))
    )
    assert re.search(r"2 │.* 2.00 │ +100%", text)
    assert re.search(r"4 │.* 4.00 │ +100%", text)


def test_spread_has_quartiles_and_no_negative_time():
    assert spread([5, 1, 2, 3, 4]) == (3, 2, 4)
    assert spread([-3, -2, -1, 1, 2]) == (0, 0, 1)


@pytest.mark.slow
def test_every_part_is_measured_with_a_partition_and_gossip(digits: data.Dataset):
    """Gossip requires a neighbor, so one device is not measured; nor is half of a batch of two."""

    def partition(replicas: int) -> list[np.ndarray]:
        return data.partition.iid(digits.train.labels, replicas, 0)

    training = Training(
        model=models.mlp([64, 10]),
        data=digits,
        devices=ALL_DEVICES[:2],
        optimizer=optax.adam(0.001),
        strategy=Strategy(later={2: Strategy(2, gossip("ring"), diverges=True)}),
        task=classification,
        batch_size=2,
        steps=8,
        eval_every=4,
        log_every=4,
        partition=partition(2),
        ema_decay=0.9,
    )

    measured = measure(training, partition, seconds=0, say=lambda text: None)

    assert tuple(measured.parts) == stopwatch.PARTS
    for measurement in [*measured.parts.values(), measured.evaluation, measured.step]:
        assert 0 <= measurement.low <= measurement.median <= measurement.high
    assert min(measured.once.values()) > 0
    assert list(measured.scaling) == [2]
    assert measured.half_batch is None
    assert (measured.steps_per_dispatch, measured.steps_per_evaluation) == (4, 4)
    assert measured.cores


def test_data_on_disk_is_refused(digits: data.Dataset, tmp_path):
    np.save(tmp_path / "x.npy", digits.train.inputs)
    pictures = np.load(tmp_path / "x.npy", mmap_mode="r")
    training = Training(
        model=models.mlp([64, 10]),
        data=data.from_arrays(pictures, digits.train.labels, *digits.test),
        devices=ALL_DEVICES[:2],
        optimizer=optax.adam(0.001),
        strategy=Strategy(),
        task=classification,
        batch_size=8,
        steps=8,
        eval_every=4,
        log_every=4,
    )

    with pytest.raises(
        InputError, match="dataset must be in memory to be profiled, got arrays, which is on disk"
    ):
        measure(training, lambda replicas: None, seconds=0)


def test_command_prints_times_and_writes_picture_and_trace(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(profile, "SECONDS", 0)
    folder, trace = tmp_path / "run", tmp_path / "trace"

    options = [
        "--devices",
        "2",
        "--hidden-sizes",
        "8",
        "--log-every",
        "4",
        "--run-dir",
        str(folder),
        f"--trace={trace}",
    ]
    assert profile.main(options) == 0

    assert (folder / "profile.png").stat().st_size > 10_000
    assert list(trace.rglob("*.xplane.pb"))
    assert list(trace.rglob("perfetto_trace.json.gz"))
    output = capsys.readouterr().out
    for text in [
        "mlp on digits, 2 devices, 64 examples",
        *stopwatch.PARTS,
        "total",
        "efficiency",
    ]:
        assert text in output
    assert "2 fake devices share" in output
    assert f"trace      {trace}: open perfetto_trace.json.gz in its deepest subfolder" in output


@pytest.mark.slow
def test_command_finds_a_batch_size_and_writes_its_picture(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(profile, "SECONDS_PER_SIZE", 0)
    options = ["--find=batch-size", "--devices=2", "--hidden-sizes=8", "--batch-size=1024"]
    assert profile.main([*options, "--run-dir", str(tmp_path / "run")]) == 0

    assert (tmp_path / "run" / "batch-size.png").stat().st_size > 10_000
    output = capsys.readouterr().out
    assert "speed by batch size, mlp on digits, 2 devices" in output
    assert re.search(r"│ +1,024 │ .* │ +1\.00 │ +[\d.]+ kB │", output)
    assert "The search ended, as 2,048 examples exceed the 1,438 training examples." in output
    assert "1,024 is the smallest that reaches 90% of the best speed" in output


MISTAKES = {
    "--find": "--find must be one of batch-size, learning-rate, got none.",
    "--find batch_sise": "--find must be one of batch-size, learning-rate, got 'batch_sise'; did",
    "--find batch-size --trace x": "--trace must be left out with --find, which writes no trace.",
    "--trace": "--trace must name a folder, got none.",
    "--trace --devices 2": "--trace must name a folder, got none.",
    "--trace file/trace": (
        "--trace must be a folder that can be created, got file/trace: Not a directory."
    ),
    "--eval-every 0": "--eval-every must be at least 1, got 0.",
    "--batch-size 66 --devices 4": (
        "--batch-size must be a multiple of the 4 devices, got 66; use 64."
    ),
    "--run-dir file/run": "--run-dir must be a writable folder with enough free space, but",
    "--trase x": "--trase is not an option",
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_is_reported_in_one_sentence_with_status_2(
    tmp_path, monkeypatch, capsys, mistake: str
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")

    assert profile.main(mistake.split()) == 2

    errors = capsys.readouterr().err
    assert errors.startswith(f"error: {MISTAKES[mistake]}")
    assert errors.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_help_lists_trace_and_the_options_of_a_run(capsys):
    with pytest.raises(SystemExit):
        profile.main(["--help"])
    shown = capsys.readouterr().out
    assert re.search(
        r"--trace FOLDER .*--find batch-size\|learning-rate .*--batch-size", shown, flags=re.DOTALL
    )
