"""The command line as users run it: valid runs, and one sentence for every mistake."""

import gzip
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from cases import some

from ctde_jax import config, data, train
from ctde_jax.config import build, walk

MNIST = Path(__file__).parents[3] / "shared" / "data" / "mnist"
QUICK = ["--devices", "2", "--steps", "4", "--log-every", "2"]


def command(
    *arguments: str, cwd: Path | None = None, before: str = "true"
) -> subprocess.Popen[str]:
    """Starts the command in a subprocess, from a shell that first runs `before`."""
    environment = {
        name: value for name, value in os.environ.items() if name not in ("NPROC", "XLA_FLAGS")
    }
    return subprocess.Popen(
        [
            "bash",
            "-c",
            f'{before} && exec "$@"',
            "-",
            sys.executable,
            "-m",
            "ctde_jax.train",
            *arguments,
        ],
        env={**environment, "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=cwd,
    )


def wait_for(path: Path) -> None:
    """Waits until this file has content."""
    deadline = time.monotonic() + 120
    while not (path.exists() and path.stat().st_size):
        assert time.monotonic() < deadline, f"{path.name} was not written"
        time.sleep(0.02)


def rows_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.curves
def test_default_command_reaches_97_percent_and_writes_its_results(tmp_path):
    process = command(cwd=tmp_path)
    output, errors = process.communicate(timeout=300)

    assert (process.returncode, errors) == (0, "")
    (folder,) = (tmp_path / "runs").iterdir()
    names = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    assert names == ["checkpoints", "config.json", "curves.png", "metrics.jsonl"]
    assert (folder / "curves.png").stat().st_size > 10_000
    last = rows_of(folder)[-1]
    assert last["split"] == "test"
    assert last["accuracy"] >= 0.97
    assert last["examples"] == 359
    plan = [
        "4 fake CPU devices",
        "they show how devices communicate",
        "1,438 training and 359 test",
        "mlp 64-128-10 with tanh",
        "9,610 parameters",
    ]
    plan += [
        "64 examples, 16 per device",
        "mean of the gradients",
        str(folder.relative_to(tmp_path)),
    ]
    table = [
        "test accuracy",
        f"{last['accuracy']:.2%}",
        "start-up",
        "compile",
        "train",
        "evaluate",
        "wall time",
    ]
    for text in [*plan, *table]:
        assert text in output
    assert "step 230 of 230" in output, "output without a terminal must be plain lines"


@pytest.mark.slow
@pytest.mark.skipif(not MNIST.exists(), reason="needs the MNIST files in ../shared/data/mnist")
def test_mnist_reaches_97_5_percent_in_ten_epochs(tmp_path):
    arguments = [
        "--dataset",
        "mnist",
        "--data-dir",
        str(MNIST),
        "--devices",
        "4",
        "--run-dir",
        str(tmp_path),
    ]
    process = command(*arguments, "--eval-every", "4690")
    output, errors = process.communicate(timeout=300)
    assert (process.returncode, errors) == (0, ""), output
    last = rows_of(tmp_path)[-1]
    assert last["epoch"] <= 10
    assert last["accuracy"] >= 0.975
    assert last["examples"] == 10_000


@pytest.mark.slow
def test_run_is_repeated_bit_for_bit_from_its_configuration(tmp_path):
    options = [
        "--hidden-sizes",
        "24",
        "--sync-every",
        "2",
        "--partition",
        "dirichlet",
        "--seed",
        "3",
        "--precision",
        "bf16",
    ]
    assert train.main([*QUICK, *options, "--run-dir", str(tmp_path / "first")]) == 0
    config = str(tmp_path / "first" / "config.json")
    assert train.main(["--config", config, "--run-dir", str(tmp_path / "second")]) == 0

    first, second = rows_of(tmp_path / "first"), rows_of(tmp_path / "second")
    for row in [*first, *second]:
        row.pop("examples_per_second", None)
        row.pop("time", None)
    assert first == second
    assert (tmp_path / "first" / "partition.png").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("partition", "schedule"), [("iid", "constant"), ("by_label", "linear")])
def test_partitions_and_schedules_run(tmp_path, partition, schedule):
    options = [
        "--partition",
        partition,
        "--schedule",
        schedule,
        "--optimizer",
        "momentum",
        "--warmup-steps",
        "2",
    ]
    assert train.main([*QUICK, *options, "--run-dir", str(tmp_path)]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("sync_every", ["0", "2"])
def test_run_works_with_jax_enable_x64(tmp_path, sync_every):
    """The command computes in 32 bits even if the user sets `jax_enable_x64`."""
    process = command(
        *QUICK,
        "--sync-every",
        sync_every,
        "--run-dir",
        str(tmp_path),
        before="export JAX_ENABLE_X64=1",
    )
    _, errors = process.communicate(timeout=120)
    assert (process.returncode, errors) == (0, "")


@pytest.mark.slow
@pytest.mark.curves
def test_run_works_in_an_unusual_environment(tmp_path):
    """Combines settings of notebooks, job scripts and serial terminals."""
    shell = (
        "export MPLBACKEND=garbage PYTHONIOENCODING=ascii COLUMNS=1 TERM=dumb NPROC=many "
        "HOME=/proc/none LC_ALL=C"
    )
    shell += (
        " MPLCONFIGDIR=/proc/none TMPDIR=/nowhere PYTHONOPTIMIZE=2 TZ=none/x JAX_DEBUG_NANS=1; "
        "unset XDG_CACHE_HOME"
    )
    process = command(*QUICK, "--run-dir", str(tmp_path / "run"), before=shell)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert "Traceback" not in errors
    assert "test accuracy" in output
    assert f"{rows_of(tmp_path / 'run')[-1]['accuracy']:.2%}" in output
    assert (tmp_path / "run" / "curves.png").stat().st_size > 10_000


@pytest.mark.slow
def test_output_on_a_full_disk_is_refused_and_no_file_remains(tmp_path):
    process = command(*QUICK, cwd=tmp_path, before="exec > /dev/full")
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 2
    assert errors == (
        "error: standard output must be writable, got No space left on device; redirect it to "
        "a writable file.\n"
    )
    assert not list(tmp_path.iterdir())


def test_csv_and_npz_files_of_the_user_run(tmp_path, capsys):
    rng = np.random.default_rng(0)
    table = "\n".join(
        f"{x:.3f},{y:.3f},{'in' if x * x + y * y < 1 else 'out'}"
        for x, y in rng.normal(size=(300, 2))
    )
    (tmp_path / "ring.csv").write_text("x,y,side\n" + table)
    np.savez(
        tmp_path / "own.npz", x_train=rng.normal(size=(200, 3)), y_train=rng.integers(0, 2, 200)
    )
    for name in ("ring.csv", "own.npz"):
        kind = ["--dataset", name[-3:], "--data-file", str(tmp_path / name)]
        assert train.main([*QUICK, *kind, "--run-dir", str(tmp_path / name[:-4])]) == 0
    output = " ".join(capsys.readouterr().out.split())
    assert "60 of the 300 examples" in output
    assert "standardized" in output


@pytest.mark.slow
def test_ctrl_c_ends_the_run_with_its_results(tmp_path):
    process = command("--epochs", "1000000", "--schedule", "constant", "--run-dir", str(tmp_path))
    wait_for(tmp_path / "metrics.jsonl")
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)

    assert (process.returncode, errors) == (130, "")
    assert "interrupted at step" in output
    assert rows_of(tmp_path)[-1]["split"] == "test"
    assert (tmp_path / "curves.png").exists()


@pytest.mark.slow
def test_ctrl_c_before_training_ends_at_once(tmp_path):
    """There is nothing to save while programs are compiled."""
    process = command(
        "--epochs",
        "1000000",
        "--run-dir",
        str(tmp_path / "run"),
        before="export PYTHONUNBUFFERED=1",
    )
    assert process.stdout is not None
    # The plan, which is printed before programs are compiled.
    assert "devices" in process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)

    assert (process.returncode, errors) == (-signal.SIGINT, "")


@pytest.mark.parametrize("blocks", some([2, 160], 2))
def test_full_disk_is_reported_in_one_sentence(tmp_path, blocks):
    """A file size limit simulates a full disk: no checkpoint fits, or only the first lines fit."""
    many_rows = ["--devices", "1", "--epochs", "60", "--log-every", "1"]
    without_programs = f"ulimit -f {blocks}; export JAX_ENABLE_COMPILATION_CACHE=false"
    process = command(*many_rows, "--run-dir", str(tmp_path / "run"), before=without_programs)
    _, errors = process.communicate(timeout=120)

    assert process.returncode == 2
    assert errors.startswith(
        "error: --run-dir must be a writable folder with enough free space, but writing to"
    )
    assert errors.count("\n") == 1
    if blocks == 2:
        assert not list(tmp_path.iterdir()), "a run that did not start must leave no files"
    else:
        lines, saved = (
            (tmp_path / "run" / "metrics.jsonl").read_text().splitlines(),
            tmp_path / "run" / "checkpoints",
        )
        assert json.loads(lines[0])["step"] > 0
        assert [path.name for path in saved.iterdir()] == ["step-00000000"]


def write_bad_files(folder: Path) -> None:
    images, labels = np.zeros((4, 28, 28), np.uint8), np.zeros(3, np.uint8)
    header = {"images": b"\0\0\x08\x03" + b"".join(n.to_bytes(4, "big") for n in images.shape)}
    header["labels"] = b"\0\0\x08\x01" + len(labels).to_bytes(4, "big")
    for kind in ("short", "magic", "lengths", "gz"):
        (folder / kind).mkdir()
        for part in ("train", "t10k"):
            pictures, targets = (
                header["images"] + images.tobytes(),
                header["labels"] + labels.tobytes(),
            )
            if kind == "short":
                pictures = pictures[:-5]
            if kind == "magic":
                pictures = b"\1" + pictures[1:]
            name = folder / kind / f"{part}-images-idx3-ubyte"
            if kind == "gz":
                name.with_name(name.name + ".gz").write_bytes(gzip.compress(pictures)[:-9])
            else:
                name.write_bytes(pictures)
            (folder / kind / f"{part}-labels-idx1-ubyte").write_bytes(targets)
    np.savez(folder / "pickled.npz", x_train=np.array([{}], object), y_train=np.array([0]))
    np.savez(folder / "lengths.npz", x_train=np.zeros((4, 2)), y_train=np.array([0, 1]))
    np.savez(folder / "nan.npz", x_train=np.array([[0.0], [np.nan]]), y_train=np.array([0, 1]))
    np.savez(
        folder / "outside.npz",
        x_train=np.zeros((4, 2)),
        y_train=np.array([0, 1, 0, 1]),
        x_test=np.zeros((1, 2)),
        y_test=np.array([7]),
    )
    (folder / "corrupt.npz").write_bytes((folder / "nan.npz").read_bytes()[:100])
    (folder / "words.csv").write_text("a,b\n1,2\nhello,3\n4,5\n")
    (folder / "file").write_text("")
    (folder / "some.txt").write_text("To be, or not to be. " * 800)
    (folder / "short.txt").write_text("To be.")
    (folder / "latin.txt").write_bytes("Weiß".encode("latin-1"))
    (folder / "table.csv").write_text("1,2,0\n3,4,1\n" * 200)
    (folder / "used").mkdir()
    (folder / "used" / "metrics.jsonl").write_text("{}\n")


@pytest.mark.slow
def test_clients_take_turns_on_the_devices(tmp_path, capsys):
    clients = [
        "--strategy",
        "fedavg",
        "--sync-every",
        "2",
        "--partition",
        "by_label",
        "--clients",
        "12",
    ]
    assert train.main([*QUICK, *clients, "--run-dir", str(tmp_path)]) == 0
    plan = " ".join(capsys.readouterr().out.split())
    assert (
        "by_label (partition.png): 12 clients with 119 to 120 examples each; 2 of them, drawn at "
        "random, train in each round"
    ) in plan
    assert "fedavg: mean of the parameters after every 2 local steps" in plan


@pytest.mark.slow
def test_language_model_trains_on_a_partition_and_samples_text(tmp_path, capsys):
    (tmp_path / "some.txt").write_text("To be, or not to be, that is the question. " * 120)
    text = [
        "--dataset",
        "text",
        "--data-file",
        str(tmp_path / "some.txt"),
        "--model",
        "transformer",
        "--context-length",
        "16",
    ]
    small = [
        "--hidden-size",
        "16",
        "--heads",
        "2",
        "--layers",
        "1",
        "--steps",
        "20",
        "--devices",
        "2",
        "--partition",
        "iid",
    ]
    sample = [
        "--prompt",
        "To be",
        "--sample-length",
        "20",
        "--eval-every",
        "10",
        "--run-dir",
        str(tmp_path / "run"),
    ]
    assert train.main([*text, *small, *sample]) == 0
    shown = capsys.readouterr().out
    assert len(re.findall(r"^To be.{20}$", shown, flags=re.MULTILINE | re.DOTALL)) == 2
    assert "test perplexity" in shown
    assert "partition.png" not in shown


MISTAKES = {
    "--batch-size 66 --devices 4": (
        "--batch-size must be a multiple of the 4 devices, got 66; use 64."
    ),
    "--batch-size 4000": (
        "--batch-size must be at most the number of training examples, 1,438, got 4000; use 1436."
    ),
    "--devices 0": "--devices must be at least 1, got 0.",
    "--epochs 0": "--epochs must be at least 1, got 0.",
    "--steps 0": "--steps must be at least 1, got 0.",
    "--eval-every 0": "--eval-every must be at least 1, got 0.",
    "--sync-every -1": "--sync-every must be at least 0, got -1.",
    "--strategy diloco --sync-every 0": ("--outer requires sync_every of at least 1, got 0."),
    "--strategy gossip --devices 1": (
        "--devices must be at least 2 for gossip, which needs a neighbor, got 1."
    ),
    "--combine krum --byzantine 1": (
        "--devices must be at least 5 .* for Krum with 1 Byzantine device"
    ),
    "--reduce power_sgd --rank 0": "--rank must be at least 1, got 0.",
    "--reduce top_k --keep 5000": "--keep must be from 1 to 4096, the chunk size, got 5000.",
    "--reduce int4 --error-feedback --feedback-decay 2": (
        "--feedback-decay must be from 0 to 1, got 2.0."
    ),
    "--clients 10": (
        "--clients requires a fixed --partition, such as iid, got --partition reshuffled."
    ),
    "--clients 2 --partition iid": "--clients must be at least 4, got 2.",
    "--rank 2": "--rank requires --reduce power_sgd.",
    "--error-feedback": "--error-feedback requires --reduce int8 or --reduce int4 or",
    "--outer-momentum 0.5 --strategy fedadam": (
        "--outer-momentum requires --outer momentum or --outer nesterov."
    ),
    "--learning-rate -1": "--learning-rate must be greater than 0 and finite, got -1.0.",
    "--warmup-steps 900": (
        "--warmup-steps must be less than the 230 steps of the schedule, got 900."
    ),
    "--seed -1": "--seed must be from 0 to 4294967295, got -1.",
    "--seed 99999999999999999999": "--seed must be from 0 to 4294967295",
    "--dirichlet-alpha inf --partition dirichlet": (
        "--dirichlet-alpha must be greater than 0 and at most 1e6, got inf."
    ),
    "--epochs 3 --steps 4": "--epochs and --steps are mutually exclusive; pass only one of them.",
    "--epochs many": "--epochs must be a whole number, got 'many'.",
    "--hidden-sizes 0": "--hidden-sizes must be at least 1, got 0.",
    "--hidden-sizes 4294967295": "--hidden-sizes must be at most 2147483647, got '4294967295'.",
    "--save-every 0": "--save-every must be at least 1, got 0.",
    "--keep-checkpoints 0": "--keep-checkpoints must be at least 1, got 0.",
    "--dataset mnits": "did you mean 'mnist'?",
    "--batchsize 3": "--batchsize is not an option; did you mean '--batch-size'?",
    "--dataset npz": "--data-file must be the path of a file for --dataset npz, got none.",
    "--dataset csv --data-file nowhere.csv": "--data-file .*nowhere.csv",
    "--data-file words.csv": (
        "--data-file requires --dataset text or npz or csv or parquet, got --dataset digits."
    ),
    "--dataset text --data-file latin.txt --model lstm": (
        "--data-file .*latin.txt.*0xdf at the offset 3, .*not valid UTF-8"
    ),
    "--dataset text --data-file short.txt --model lstm": (
        "--data-file .*short.txt has 1 characters in the test part, but .* need 129"
    ),
    "--dataset text --data-file file --model lstm": (
        "--data-file .*file is empty; pass a file that contains text."
    ),
    "--dataset text --data-file some.txt": (
        "--model must be lstm, gru or transformer for --dataset text, got mlp."
    ),
    "--dataset text --data-file some.txt --model lstm --prompt X": (
        "--prompt must consist of the 10 characters of"
    ),
    "--dataset text --data-file some.txt --model lstm --prompt=": (
        "--prompt must be at least one character, got none."
    ),
    "--dataset text --data-file some.txt --model lstm --partition dirichlet": (
        "--partition must be reshuffled or iid"
    ),
    "--dataset text --data-file some.txt --model transformer --heads 3": (
        "--heads must divide the hidden_size of 128, got 3."
    ),
    "--model transformer": (
        "--model transformer requires --dataset text, got the data set digits."
    ),
    "--dataset csv --data-file table.csv --model cnn": (
        "--model cnn requires images, but the inputs have the shape .2,.; use mlp."
    ),
    "--dataset csv --data-file table.csv --model lstm": (
        "--model lstm requires sequences .length, features., got examples"
    ),
    "--dataset csv --data-file table.csv --sequence rows": (
        "--sequence requires images of the shape .height, width."
    ),
    "--model resnet --channels 16 20": (
        "--channels must be multiples of the 8 groups of group normalization, got 20."
    ),
    "--model resnet --channels 8 8 8 8 8": (
        "image_shape must have at least 16 x 16 pixels for 4 halvings, got 8 x 8."
    ),
    "--model cnn --init recurrent": (
        "--init must not be recurrent for a model without a recurrent cell"
    ),
    "--model resnet --layers 0": "--layers must be at least 1, got 0.",
    "--base-width 8": "--base-width requires --init mup.",
    "--init mup": (
        "--base-width must be the width at which the learning rate was tuned, for --init mup, got "
        "none."
    ),
    "--init mup --base-width 8 --optimizer sgd": (
        "--optimizer must be adam, adamw or lion with --init mup, got sgd."
    ),
    "--model cnn --dropout-rate 1": "--dropout-rate must be at least 0 and less than 1, got 1.0.",
    "--shift 8": "--shift must be less than the shorter side of an image of 8 x 8, got 8.",
    "--cutout 9": "--cutout must be at most the shorter side of an image of 8 x 8, got 9.",
    "--flip --sequence rows": (
        "--sequence must be none with --shift, --flip and --cutout, which augment images, got rows."
    ),
    "--accumulation-steps 3 --devices 4": (
        "--accumulation-steps must divide the 16 examples of a device's batch, got 3."
    ),
    "--ema-decay 1": "--ema-decay must be at least 0 and less than 1, got 1.0.",
    "--patience 2": (
        "--patience requires a validation split; use data.hold_out.*or --validation-fraction."
    ),
    "--validation-fraction 1": (
        "--validation-fraction must leave some of the 1,438 training examples for training"
    ),
    "--label-smoothing 1": "--label-smoothing must be at least 0 and less than 1, got 1.0.",
    "--focal-gamma -1": "--focal-gamma must be at least 0 and finite, got -1.0.",
    "--focal-gamma 2 --label-smoothing 0.1": (
        "--focal-gamma must be 0 with --label-smoothing, which replaces the same loss, got 2.0."
    ),
    "--class-weights 1 2": (
        "--class-weights must be balanced, or 10 numbers, one for each class, got .1.0, 2.0"
    ),
    "--class-weights balanced 2": (
        "--class-weights must be balanced, or a number for each class, got 'balanced 2'."
    ),
    "--class-weights balanced --dataset text --data-file some.txt --model lstm": (
        "--class-weights requires labels that are classes, one for each example"
    ),
    "--clip-grad-norm 0": "--clip-grad-norm must be greater than 0 and finite, got 0.0.",
    "--dataset mnist --data-dir nowhere": "--data-dir .*nowhere",
    "--dataset mnist --data-dir short": "--data-dir .*train-images",
    "--dataset mnist --data-dir magic": "--data-dir .*train-images.*magic",
    "--dataset mnist --data-dir lengths": (
        "--data-dir .*must have one label for each of the 4 examples, got 3 labels"
    ),
    "--dataset mnist --data-dir gz": "--data-dir .*train-images",
    "--dataset npz --data-file pickled.npz": "--data-file .*pickled.npz",
    "--dataset npz --data-file corrupt.npz": "--data-file .*corrupt.npz",
    "--dataset npz --data-file lengths.npz": (
        "--data-file .*one label for each of the 4 examples, got 2 labels"
    ),
    "--dataset npz --data-file nan.npz": "--data-file .*NaN or infinity",
    "--dataset npz --data-file outside.npz": "--data-file .*y_test must be from 0 to 1.* got 7",
    "--dataset csv --data-file words.csv": "--data-file .*words.csv.*hello",
    "--dataset csv --data-file words.csv --label-column c": (
        "--label-column must be one of a, b, got 'c'"
    ),
    "--run-dir file/run": (
        "--run-dir must be a writable folder with enough free space, .*Not a directory"
    ),
    "--run-dir used": (
        "--run-dir must not contain another run, but used has metrics.jsonl or checkpoints; choose "
        "another"
    ),
    "--optimizer sgd --schedule constant --learning-rate 1e38": (
        "the loss is not finite at step 2, so training stopped"
    ),
}


EXTREME = {
    "--devices 100000": "--devices must be at most 1,024, got 100000.",
    "--hidden-sizes 2147483647 2147483647": (
        "--hidden-sizes must be at most 10,000,000, got 2147483647."
    ),
    "--hidden-sizes 9999999 9999999": (
        "--model must fit into memory: 100,000,739,999,935 .* take at least"
    ),
    "--model resnet --layers 2147483647": "--layers must be at most 1,000, got 2147483647.",
    "--epochs 2147483647": (
        "--epochs must result in at most 2,147,483,647 optimizer steps, got 2,147,483,647."
    ),
    "--steps 2147483647 --eval-every 1": (
        "--eval-every must be at least 2,048, so that 2,147,483,647 steps have at"
    ),
    "--partition iid --clients 2147483647": "--clients must be at most 1,438, got 2147483647.",
    "--strategy sparse-loco --chunk 2147483647": (
        "--strategy must fit into memory: 9,610 .*; lower chunk, rank or"
    ),
    "--strategy streaming-diloco --fragments 2147483647": (
        "--fragments must be at most 1,000, got 2147483647."
    ),
    "--dataset text --data-file some.txt --model lstm --sample-length 2147483647": (
        "--sample-length must be at most"
    ),
    "--run-dir=": "--run-dir must be a path, got ''.",
    "--run-dir a/b --branch-from nowhere": (
        "--branch-from must be the folder of an intact checkpoint, but nowhere is"
    ),
    "--config=/dev/zero": (
        "--config must be .* cannot be read .it is a device, not a regular file"
    ),
}
MISTAKES |= EXTREME


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_is_reported_in_one_sentence_with_status_2(tmp_path, monkeypatch, capsys, mistake):
    monkeypatch.chdir(tmp_path)
    write_bad_files(tmp_path)
    before = set(tmp_path.rglob("*"))

    assert train.main(mistake.split()) == 2

    errors = capsys.readouterr().err
    assert re.search(MISTAKES[mistake].replace("?", r"\?"), errors), errors
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1, "the error must be one line without a traceback"
    after = {
        path
        for path in tmp_path.rglob("*")
        if path.parts[len(tmp_path.parts)] != "runs" or "finite" not in errors
    }
    assert after == before, "a run that did not start must leave no files"


def test_read_only_run_folder_is_reported_in_one_sentence(tmp_path, monkeypatch, capsys):
    """Simulated, because the tests may run as root, which ignores permissions."""

    def refuse(self, *arguments, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    assert train.main([*QUICK, "--run-dir", str(tmp_path / "run")]) == 2
    assert "--run-dir must be a writable folder with enough free space" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error",
    [
        jax.errors.JaxRuntimeError(
            "RESOURCE_EXHAUSTED: Out of memory allocating 1099511627520 bytes.\nStack:"
        ),
        MemoryError("Unable to allocate 745. GiB for an array"),
        MemoryError(),
    ],
    ids=["on a device", "in numpy", "in Python"],
)
def test_exhausted_memory_is_reported_in_one_sentence(tmp_path, monkeypatch, capsys, error):
    """Simulated, because a system may overcommit memory and kill the process later."""

    def raise_error(*_, **__):
        raise error

    monkeypatch.setattr(walk.trainer, "train", raise_error)
    assert train.main([*QUICK, "--run-dir", str(tmp_path / "run")]) == 2
    error_text = capsys.readouterr().err
    assert error_text.startswith("error: out of memory (")
    assert error_text.endswith("); use a smaller model or a smaller --batch-size.\n")
    assert error_text.count("\n") == 1


def test_mistake_is_reported_before_jax_is_imported():
    """An unknown option is reported at once."""
    program = (
        "import sys; from ctde_jax import train; "
        "print(train.main(['--epoch', '3']), 'jax' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout == "2 False\n"


def test_default_dataset_of_the_command_is_digits():
    assert build.load_data(config.DataOptions()).name == data.digits().name


@pytest.mark.slow
def test_branch_inherits_options_and_restarts_the_schedule(tmp_path, capsys):
    """It inherits the data set too; a new learning rate applies from its first step."""
    table = "a,b,y\n" + "".join(f"{i % 3 + i / 100},{i % 7},{'xyz'[i % 3]}\n" for i in range(60))
    (tmp_path / "t.csv").write_text(table)
    parent, branch = tmp_path / "parent", tmp_path / "branch"
    data_options = [
        "--dataset",
        "csv",
        "--data-file",
        str(tmp_path / "t.csv"),
        "--batch-size",
        "12",
    ]
    assert train.main([*data_options, *QUICK, "--run-dir", str(parent)]) == 0
    start = parent / "checkpoints" / "step-00000004"
    capsys.readouterr()
    given = [
        "--branch-from",
        str(start),
        "--steps",
        "8",
        "--learning-rate",
        "0.001",
        "--log-every",
        "1",
    ]
    assert train.main([*given, "--run-dir", str(branch)]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "--learning-rate 0.008 in the checkpoint and 0.001 here" in printed
    assert "all other options are unchanged" in printed

    saved = json.loads((branch / "config.json").read_text())
    assert (saved["dataset"], saved["batch_size"], saved["schedule_start"]) == ("csv", 12, 4)
    rates = [row["learning_rate"] for row in rows_of(branch) if row["split"] == "train"]
    expected = [0.001 * (1 + np.cos(np.pi * step / 4)) / 2 for step in range(4)]
    np.testing.assert_allclose(rates, expected, rtol=1e-5)


def test_branch_from_a_run_of_the_library_is_refused(tmp_path, capsys):
    (tmp_path / "x" / "checkpoints" / "step-00000004").mkdir(parents=True)
    (tmp_path / "x" / "checkpoints" / "step-00000004" / "manifest.json").touch()
    assert train.main(["--branch-from", str(tmp_path / "x" / "checkpoints" / "step-00000004")]) == 2
    assert (
        "--branch-from must be a checkpoint of a run of python -m ctde_jax.train"
        in capsys.readouterr().err
    )


@pytest.mark.slow
def test_refused_start_does_not_move_the_earlier_run(tmp_path, capsys):
    """Also if the mistake is detected only just before training starts."""
    folder = str(tmp_path / "run")
    assert train.main([*QUICK, "--run-dir", folder]) == 0
    before = sorted((tmp_path / "run").rglob("*"))
    parent = str(shutil.copytree(folder, tmp_path / "parent"))
    for mistake in (
        ["--init-from", str(tmp_path / "nowhere")],
        ["--init-from", folder],
        ["--init-from", parent, "--hidden-sizes", "9"],
    ):
        assert train.main([*QUICK, "--run-dir", folder, "--resume", "never", *mistake]) == 2
        assert sorted((tmp_path / "run").rglob("*")) == before
    assert (
        train.main([*QUICK, "--run-dir", folder, "--resume", "never", "--init-from", parent]) == 0
    )
    assert (tmp_path / "run" / "previous-1" / "config.json").exists()
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert saved["init_from"] == parent
    capsys.readouterr()


@pytest.mark.slow
def test_branch_resumes_without_its_parent(tmp_path, capsys):
    parent, branch = tmp_path / "parent", tmp_path / "branch"
    assert train.main([*QUICK, "--batch-size", "32", "--run-dir", str(parent)]) == 0
    start = parent / "checkpoints" / "step-00000004"
    again = [
        "--branch-from",
        str(start),
        "--steps",
        "8",
        "--learning-rate",
        "0.001",
        "--run-dir",
        str(branch),
    ]
    assert train.main(again) == 0
    rows = rows_of(branch)
    shutil.rmtree(parent)
    assert train.main(again) == 0
    assert rows_of(branch) == rows
    capsys.readouterr()


def test_branch_without_remaining_steps_is_refused(tmp_path, capsys):
    parent = tmp_path / "parent"
    assert train.main([*QUICK, "--run-dir", str(parent)]) == 0
    start = str(parent / "checkpoints" / "step-00000004")
    assert (
        train.main(
            ["--branch-from", start, "--learning-rate", "0.1", "--run-dir", str(tmp_path / "b")]
        )
        == 2
    )
    assert "--steps must be greater than schedule_start, 4, got 4" in capsys.readouterr().err
    assert train.main(["--branch-from", str(parent), "--run-dir", str(tmp_path / "b")]) == 2
    assert "--branch-from must be a checkpoint, such as" in capsys.readouterr().err


@pytest.mark.slow
def test_early_stopping_is_described_in_the_plan_and_the_result(tmp_path, capsys):
    # No step changes a parameter, so the loss of the second evaluation is that of the first.
    options = ["--validation-fraction", "0.2", "--patience", "1", "--learning-rate", "1e-30"]
    command = ["--devices", "2", "--epochs", "9", *options, "--run-dir", str(tmp_path / "run")]
    for is_repeated in (False, True):
        assert train.main(command) == 0
        shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
        assert "stopping after 1 evaluation without a lower validation loss" in shown
        rows = [row for row in rows_of(tmp_path / "run") if row["split"] == "validation"]
        best = min(rows, key=lambda row: row["loss"])
        assert rows[-1]["step"] > best["step"]
        assert (
            f"stopped early at step {rows[-1]['step']}, as the validation loss no longer improved"
        ) in shown
        assert ("this run was complete, so nothing was trained" in shown) == is_repeated
        assert f"the parameters are those of step {best['step']}, the lowest validation" in shown
        assert f"validation loss {best['loss']:.4f}" in shown


def test_image_network_on_a_table_is_refused(tmp_path, capsys):
    (tmp_path / "mine.csv").write_text("a,b,c,y\n" + "1,2,3,u\n4,5,6,v\n" * 60)
    command = ["--dataset", "csv", "--data-file", str(tmp_path / "mine.csv"), "--model", "cnn"]
    assert train.main([*command, "--run-dir", str(tmp_path / "run")]) == 2
    assert "--model cnn requires images, but the inputs have the shape (3,); use mlp" in (
        capsys.readouterr().err
    )
