"""A bundle runs without the trainer: correct outputs in all formats and runtimes, clear errors."""

import csv
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import bundles
import numpy as np
import optax
import pytest
from jax import random

import ctde_jax as ctde
from ctde_jax import bundle as node
from ctde_jax import execute, verify
from ctde_jax.bundle import answers, inputs, parity
from ctde_jax.errors import InputError


@pytest.fixture(scope="module")
def digits() -> Path:
    return bundles.written("mlp").bundle.folder


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return bundles.trained("mlp")[1].test.inputs


@pytest.fixture(scope="module")
def labels() -> np.ndarray:
    return bundles.trained("mlp")[1].test.labels


def output_lines(capsys, *arguments: object) -> list[str]:
    """Executes a bundle, and returns the lines that are printed."""
    assert execute.main([str(argument) for argument in arguments]) == 0
    return capsys.readouterr().out.splitlines()


def error_of(capsys, *arguments: object) -> str:
    """Executes a bundle with invalid options, and returns the error."""
    assert execute.main([str(argument) for argument in arguments]) == 2
    captured = capsys.readouterr()
    assert not captured.out
    assert captured.err.startswith("error: ")
    assert captured.err.endswith((".\n", "?\n"))
    assert captured.err.count("\n") == 1
    return captured.err


def predicted(images: np.ndarray) -> tuple[list[str], np.ndarray]:
    probabilities = bundles.probabilities(bundles.trained("mlp")[0].predict(images))
    return [str(label) for label in probabilities.argmax(-1)], probabilities.max(-1)


@pytest.mark.parametrize("runtime", [None, "numpy", "onnx", "jax"])
@pytest.mark.parametrize("kind", ["npy", "npz", "csv", "png"])
def test_files_of_every_kind_are_predicted(kind, runtime, digits, images, tmp_path, capsys):
    files = [tmp_path / f"x.{kind}"]
    if kind == "npy":
        np.save(files[0], images[:4])
    elif kind == "npz":
        np.savez(files[0], x_test=images[:4])
    elif kind == "csv":
        np.savetxt(files[0], images[:4].reshape(4, -1), "%d", ",")
    else:
        image = pytest.importorskip("PIL.Image")
        files = [tmp_path / f"{number}.png" for number in range(4)]
        for file, picture in zip(files, images, strict=False):
            image.fromarray(np.rint(picture * (255 / 16)).astype(np.uint8)).save(file)
    chosen = [] if runtime is None else ["--runtime", runtime]
    rows = [
        json.loads(line)
        for line in output_lines(capsys, digits, "--input", *files, "--json", *chosen)
    ]
    names, probabilities = predicted(images[:4])
    assert [row["label"] for row in rows] == names
    assert [row["example"] for row in rows] == [0, 1, 2, 3]
    np.testing.assert_allclose([row["probability"] for row in rows], probabilities, atol=1e-5)


def test_16_bit_and_opaque_pictures_are_predicted_like_others(digits, images, tmp_path, capsys):
    image = pytest.importorskip("PIL.Image")
    deep = np.rint(images[0] * (65535 / 16)).astype(np.uint16)
    image.fromarray(deep).save(tmp_path / "deep.png")
    pixels = np.rint(images[0] * (255 / 16)).astype(np.uint8)
    image.fromarray(np.dstack([pixels] * 3 + [np.full((8, 8), 255, np.uint8)])).save(
        tmp_path / "opaque.png"
    )
    np.save(tmp_path / "x.npy", images[:1])
    expected = output_lines(capsys, digits, "--input", tmp_path / "x.npy", "--json")
    for name in ("deep.png", "opaque.png"):
        assert output_lines(capsys, digits, "--input", tmp_path / name, "--json") == expected


@pytest.mark.parametrize("start", [0, 1])
def test_line_of_consecutive_numbers_is_a_header(start, digits, images, tmp_path, capsys):
    """Columns without names are numbered by pandas."""
    with (tmp_path / "x.csv").open("w") as file:
        csv.writer(file).writerows([range(start, start + 64), *images[:2].reshape(2, -1)])
    assert len(output_lines(capsys, digits, "--input", tmp_path / "x.csv", "--json")) == 2


def test_closed_pipe_causes_no_traceback(digits, images, tmp_path):
    np.save(tmp_path / "x.npy", np.resize(images, (20_000, 8, 8)))
    command = [
        sys.executable,
        "-m",
        "ctde_jax.execute",
        str(digits),
        "--input",
        str(tmp_path / "x.npy"),
    ]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline().split() == ["example", "label", "probability"]
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait() == 1


def test_default_output_is_a_table(digits, images, tmp_path, capsys):
    np.save(tmp_path / "x.npy", images[:3])
    lines = output_lines(capsys, digits, "--input", tmp_path / "x.npy")
    names, probabilities = predicted(images[:3])
    assert lines[0].split() == ["example", "label", "probability"]
    expected = [
        [str(i), name, f"{p:.4f}"]
        for i, (name, p) in enumerate(zip(names, probabilities, strict=True))
    ]
    assert [line.split() for line in lines[1:]] == expected


@pytest.mark.parametrize("runtime", ["numpy", "onnx", "jax"])
def test_score_equals_that_of_evaluate(runtime, digits, images, labels, tmp_path, capsys):
    """For every batch size, with the same number of correct examples."""
    expected = bundles.trained("mlp")[0].evaluate(bundles.trained("mlp")[1].test)
    np.savez(tmp_path / "x.npz", x_test=images, y_test=labels)
    for size in (1, 50, 1000):
        arguments = ["--score", "--json", "--runtime", runtime, "--batch-size", size]
        (line,) = output_lines(capsys, digits, "--input", tmp_path / "x.npz", *arguments)
        score = json.loads(line)
        assert score["examples"] == expected["examples"]
        assert round(score["accuracy"] * 359) == round(expected["accuracy"] * 359)
        assert score["loss"] == pytest.approx(expected["loss"], rel=1e-5)


@pytest.mark.parametrize("label_format", ["{}", "{}.0"])
@pytest.mark.parametrize("label_column", [None, "digit"])
def test_table_of_numbers_may_have_a_label_column(
    label_column, label_format, digits, images, labels, tmp_path, capsys
):
    """The labels are in the last column or in a named one."""
    with (tmp_path / "x.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        names = [f"pixel {number}" for number in range(64)]
        writer.writerow([*names, "digit"] if label_column is None else ["digit", *names])
        for picture, label in zip(
            images.reshape(-1, 64), map(label_format.format, labels), strict=True
        ):
            writer.writerow([*picture, label] if label_column is None else [label, *picture])
    chosen = [] if label_column is None else ["--label-column", label_column]
    (line,) = output_lines(capsys, digits, "--input", tmp_path / "x.csv", "--score", *chosen)
    accuracy = bundles.trained("mlp")[0].tested["accuracy"]
    assert f"examples 359  accuracy {accuracy:.2%}" in line


@pytest.mark.parametrize("kind", ["U", "S"])
def test_labels_in_arrays_may_be_class_names(kind, digits, images, tmp_path):
    card = replace(node.open_bundle(digits).card, classes=("owl", "dog", *"abcdefgh"))
    np.savez(tmp_path / "x.npz", x_test=images[:3], y_test=np.array(["dog", "owl", "c"], kind))
    assert inputs.read([tmp_path / "x.npz"], card, labeled=True).labels.tolist() == [1, 0, 4]
    np.savez(tmp_path / "x.npz", x_test=images[:1], y_test=["cow"])
    with pytest.raises(InputError, match="has the label 'cow'; use one of owl, dog, a"):
        inputs.read([tmp_path / "x.npz"], card, labeled=True)


def test_copies_on_all_devices_are_independent_and_agree(digits, images, tmp_path, capsys):
    np.save(tmp_path / "x.npy", images[:21])
    execute.main(
        [
            str(digits),
            "--input",
            str(tmp_path / "x.npy"),
            "--json",
            "--all-devices",
            "--batch-size",
            "10",
        ]
    )
    captured = capsys.readouterr()
    assert "independent copies; their program contains no collective" in captured.err
    assert [json.loads(line)["label"] for line in captured.out.splitlines()] == predicted(
        images[:21]
    )[0]


@pytest.mark.parametrize("name", ["lstm-text", pytest.param("transformer", marks=pytest.mark.slow)])
@pytest.mark.parametrize("runtime", ["onnx", "jax"])
def test_text_at_temperature_0_equals_that_of_generate(name, runtime, capsys):
    """One position at a time with a state, or in a window; the text is longer than the window."""
    trained, data = bundles.trained(name)
    window = bundles.WINDOW if name == "transformer" else None
    prompt, length = "To be", 3 * bundles.WINDOW
    tokens = ctde.generate(
        trained.model,
        trained.params,
        trained.model_state,
        ctde.data.encode(prompt, data.vocabulary),
        length,
        random.key(0),
        temperature=0,
        window=window,
    )
    options = ["--prompt", prompt, "--length", length, "--temperature", 0, "--runtime", runtime]
    lines = output_lines(capsys, bundles.written(name).bundle.folder, *options)
    assert "\n".join(lines) == prompt + ctde.data.decode(tokens, data.vocabulary)


def test_seed_determines_the_text(capsys):
    folder = bundles.written("lstm-text").bundle.folder
    texts = [
        output_lines(capsys, folder, "--prompt", "T", "--seed", seed, "--temperature", 2)
        for seed in (0, 0, 1)
    ]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.slow
def test_sampled_characters_follow_the_probabilities():
    """At temperature 1, the frequency of each first character is its probability."""
    bundle = bundles.written("lstm-text").bundle
    trained, data = bundles.trained("lstm-text")
    tokens = ctde.data.encode("To be", data.vocabulary)
    logits = trained.predict(tokens[None])[0, -1]
    samples = [next(answers.write(bundle, "onnx", "To be", 1, 1.0, seed)) for seed in range(400)]
    frequencies = np.array([samples.count(character) / 400 for character in data.vocabulary])
    np.testing.assert_allclose(frequencies, bundles.probabilities(logits), atol=0.1)


def test_next_character_is_predicted_for_tokens(tmp_path, capsys):
    trained, data = bundles.trained("lstm-text")
    np.save(tmp_path / "x.npy", data.test.inputs[:2])
    lines = output_lines(
        capsys, bundles.written("lstm-text").bundle.folder, "--input", tmp_path / "x.npy", "--json"
    )
    best = trained.predict(data.test.inputs[:2])[:, -1].argmax(-1)
    assert [json.loads(line)["next"] for line in lines] == [
        repr(data.vocabulary[token]) for token in best
    ]


@pytest.mark.slow
def test_outputs_are_printed_if_the_model_has_no_classes(tmp_path, capsys):
    points = np.random.default_rng(0).normal(size=(60, 2)).astype(np.float32)
    data = ctde.data.from_arrays(points, points[:, 0] + points[:, 1])
    task = ctde.Task(lambda outputs, targets: optax.squared_error(outputs[:, 0], targets))
    options = {"devices": ctde.devices.start(1), "batch_size": 20, "steps": 3, "show": False}
    trained = ctde.fit(ctde.models.mlp([2, 4, 1]), data, optax.adam(0.01), task=task, **options)
    written = ctde.write_bundle(trained, data, tmp_path / "bundle", ["numpy"], show=False)
    assert written.bundle.card.artifacts["numpy"].receipt["measured"].keys() == {"loss"}
    np.save(tmp_path / "x.npy", points[:2])
    lines = output_lines(capsys, tmp_path / "bundle", "--input", tmp_path / "x.npy", "--json")
    found = np.array([json.loads(line)["outputs"] for line in lines])
    np.testing.assert_allclose(found, trained.predict(points[:2]), atol=1e-5)
    error = error_of(capsys, tmp_path / "bundle", "--input", tmp_path / "x.npy", "--score")
    assert "--input cannot be scored, as the model predicts neither classes nor tokens" in error
    np.savez(tmp_path / "x.npz", x_test=points[:2], y_test=np.zeros(2, np.float32))
    assert (
        output_lines(capsys, tmp_path / "bundle", "--input", tmp_path / "x.npz", "--json") == lines
    )
    np.savetxt(tmp_path / "x.csv", np.c_[points[:2], [7, 8]], delimiter=",")
    assert (
        output_lines(capsys, tmp_path / "bundle", "--input", tmp_path / "x.csv", "--json") == lines
    )
    for labels in (np.zeros(2, np.float32), np.zeros(2, np.int32)):
        np.savez(tmp_path / "x.npz", x_test=points[:2], y_test=labels)
        assert (
            verify.main(["bundle", str(tmp_path / "bundle"), "--input", str(tmp_path / "x.npz")])
            == 2
        )


@pytest.mark.slow
def test_tokens_without_a_vocabulary_are_printed_as_numbers(tmp_path, capsys):
    tokens = np.random.default_rng(0).integers(0, 5, (40, 9))
    data = ctde.data.from_arrays(tokens[:, :-1], tokens[:, 1:])
    model = ctde.models.rnn_language_model(5, 8, 1)
    options = {"devices": ctde.devices.start(1), "batch_size": 20, "steps": 3, "show": False}
    trained = ctde.fit(model, data, optax.adam(0.01), task=ctde.tasks.language_modeling, **options)
    ctde.write_bundle(trained, data, tmp_path / "bundle", ["jax"], show=False)
    np.save(tmp_path / "x.npy", data.test.inputs[:2])
    rows = map(
        json.loads,
        output_lines(capsys, tmp_path / "bundle", "--input", tmp_path / "x.npy", "--json"),
    )
    expected = trained.predict(data.test.inputs[:2])[:, -1].argmax(-1)
    assert [row["next"] for row in rows] == expected.tolist()


def test_execute_imports_no_package_of_the_trainer(digits, images, tmp_path):
    """Imports neither JAX nor flax nor rich, only numpy and the requested runtime."""
    np.save(tmp_path / "x.npy", images[:1])
    trainer = {"jax", "jaxlib", "flax", "optax", "rich", "tyro", "sklearn", "safetensors"}
    for runtime in ("numpy", "onnx"):
        arguments = [str(digits), "--input", str(tmp_path / "x.npy"), "--runtime", runtime]
        code = (
            "import sys; from ctde_jax import execute\n"
            f"assert execute.main({arguments}) == 0\n"
            f"print(sorted({trainer} & {{*sys.modules}}))"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        )
        assert done.stdout.splitlines()[-1] == "[]"


def test_first_installed_runtime_is_selected(digits, monkeypatch):
    bundle = node.open_bundle(digits)
    assert node.pick(bundle) == "numpy"
    monkeypatch.setattr(node.runtimes, "find_spec", lambda name: None if name == "numpy" else name)
    assert node.pick(bundle) == "onnx"
    monkeypatch.setattr(node.runtimes, "find_spec", lambda name: None)
    with pytest.raises(
        InputError,
        match=r"but none of numpy, onnx, .* is; run `pip install numpy` or `pip install onnx",
    ):
        node.pick(bundle)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--input", "x.npy", "--runtime", "onyx"], "--runtime must be one of numpy, onnx"),
        (
            ["--input", "x.npy", "--runtime", "onnx-int8"],
            "must be one of the artifacts in .* (numpy, onnx",
        ),
        (
            ["--input", "x.npy", "--expect", "0123"],
            "--expect must be the first eight or more digits of the SHA-256",
        ),
        (["--input", "x.npy", "--batch-size", "0"], "--batch-size must be at least 1, got 0"),
        (["--input", "x.npy", "--score"], "--input requires labels: y_test in a .npz file"),
        (["--input", "x.npy", "--label-column", "digit"], "--label-column requires a .csv file"),
        (
            ["--input", "x.npy", "--all-devices", "--runtime", "onnx"],
            "--all-devices requires the runtime jax, got onnx",
        ),
        (["--input", "x.npy", "x.npz"], "--input must be one file, or several .png files"),
        (["--input", "x.jpg"], "--input must be a .npy, .npz, .csv or .png file, got '.jpg'"),
        (["--input", "missing.npy"], "--input must be a file, but missing.npy is not one."),
        (
            ["--input", "floats.npy"],
            "--input floats.npy must be integers, as the model was trained on uint8",
        ),
        (
            ["--input", "large.npy"],
            "large.npy has the shape [2, 9, 8]; provide examples of the shape [8, 8]",
        ),
        (["--input", "none.npy"], "none.npy contains no example"),
        (["--input", "words.npy"], "words.npy contains <U3"),
        (
            ["--input", "pickle.npy"],
            "is not a complete .npy file (Array can't be memory-mapped: Python objects",
        ),
        (["--input", "empty.csv"], "has lines with different numbers of cells, or no lines"),
        (
            ["--input", "short.csv"],
            "short.csv has 3 columns; provide 64 features per line",
        ),
        (["--input", "word.csv"], "word.csv has 'x' in example"),
        (["--input", "odd.png"], "is not a complete PNG image"),
        (["--input", "size.png"], "size.png has 9 x 8 pixels; provide an image of 8 x 8"),
        (
            ["--input", "labels.npz", "--score"],
            "labels.npz has labels from 0 to 10; provide labels from 0 to 9",
        ),
        (
            ["--input", "halves.npz", "--score"],
            "has labels of float64 [2]; provide integers of the shape [examples]",
        ),
        (
            ["--input", "few.npz", "--score"],
            "few.npz has 1 labels for 2 examples; provide one label per example",
        ),
        (
            ["--input", "clear.png"],
            "clear.png has transparent pixels; save it without transparency",
        ),
        (
            ["--input", "x.npy", "--length", "3"],
            "--length cannot be combined with --input; leave one of them out.",
        ),
        (
            ["--prompt", "To be", "--json"],
            "--json cannot be combined with --prompt; leave one of them out.",
        ),
        (["--prompt", "To be"], "--prompt requires a language model"),
    ],
)
def test_mistake_is_reported_in_one_sentence(
    arguments, sentence, digits, images, tmp_path, monkeypatch, capsys
):
    image = pytest.importorskip("PIL.Image")
    monkeypatch.chdir(tmp_path)
    np.save("x.npy", images[:2])
    np.savez("x.npz", x_test=images[:2])
    np.savez("halves.npz", x_test=images[:2], y_test=[0.5, 1])
    np.savez("few.npz", x_test=images[:2], y_test=np.zeros(1, int))
    image.fromarray(np.zeros((8, 8, 4), np.uint8)).save("clear.png")
    np.save("floats.npy", images[:2] + 0.5)
    np.save("large.npy", np.zeros((2, 9, 8), np.uint8))
    np.save("none.npy", images[:0])
    np.save("words.npy", np.full((1, 8, 8), "one"))
    np.save("pickle.npy", np.full((1, 8, 8), None), allow_pickle=True)
    Path("empty.csv").write_text("")
    Path("short.csv").write_text("1,2,3\n")
    Path("word.csv").write_text(",".join(["0"] * 64) + "\n" + ",".join(["x"] * 64) + "\n")
    Path("odd.png").write_bytes(b"\x89PNG and no more")
    image.fromarray(np.zeros((9, 8), np.uint8)).save("size.png")
    np.savez("labels.npz", x_test=images[:2], y_test=[0, 10])
    error = error_of(capsys, digits, *arguments)
    for part in sentence.split(".*"):
        assert part in error


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--prompt", ""], "--prompt must be one or more of the model's"),
        (["--prompt", "To be ☃"], "characters, got '☃'."),
        (["--prompt", "To", "--length", "0"], "--length must be at least 1, got 0"),
        (
            ["--prompt", "To", "--temperature", "-1"],
            "--temperature must be at least 0 and finite, got -1.0",
        ),
        (["--prompt", "To", "--seed", "-1"], "--seed must be at least 0, got -1"),
    ],
)
def test_invalid_prompt_option_is_reported_in_one_sentence(arguments, sentence, capsys):
    assert execute.main([str(bundles.written("lstm-text").bundle.folder), *arguments]) == 2
    assert sentence in capsys.readouterr().err


def test_missing_input_is_reported_in_one_sentence(capsys):
    with pytest.raises(SystemExit) as end:
        execute.main(["bundle"])
    assert end.value.code == 2
    assert (
        "one of the arguments --input --prompt is required; --help lists all options."
        in capsys.readouterr().err
    )


def test_verify_repeats_the_measurements_of_the_receipt(digits, images, labels, tmp_path, capsys):
    np.savez(tmp_path / "x.npz", x_test=images, y_test=labels)
    sha256 = node.open_bundle(digits).sha256
    assert (
        verify.main(
            ["bundle", str(digits), "--input", str(tmp_path / "x.npz"), "--expect", sha256[:10]]
        )
        == 0
    )
    output = capsys.readouterr().out
    accuracy = bundles.trained("mlp")[0].tested["accuracy"]
    for name in ("numpy", "onnx", "jax"):
        assert f"{name}: maximum difference" in output
    assert output.count(f"accuracy {accuracy:.4f} on 359 examples; receipt loss") == 3
    assert (
        "holds: every file matches its SHA-256; the outputs of numpy, onnx, jax agree with the "
        "trained model\n"
    ) in output


def test_artifact_with_different_outputs_is_reported(digits, monkeypatch, capsys):
    """A runtime may compute wrong outputs on this machine."""

    def make_wrong_predict(*arguments):
        predict = make_predict(*arguments)
        return lambda inputs: predict(inputs) + np.float32(1e-3)

    make_predict = node.perceptron.make_predict
    monkeypatch.setattr(node.perceptron, "make_predict", make_wrong_predict)
    assert verify.main(["bundle", str(digits)]) == 1
    assert (
        "wrong: numpy differs from the trained model by more than 1.0e-05"
        in capsys.readouterr().err
    )


def test_verify_of_a_bundle_without_examples_requires_an_input(tmp_path, capsys):
    trained, data = bundles.trained("mlp")
    ctde.write_bundle(trained, data, tmp_path / "bundle", ["numpy"], examples=0, show=False)
    assert verify.main(["bundle", str(tmp_path / "bundle")]) == 2
    assert "--input must name a file with labels, because" in capsys.readouterr().err
    np.savez(tmp_path / "x.npz", x_test=data.test.inputs, y_test=data.test.labels)
    assert (
        verify.main(["bundle", str(tmp_path / "bundle"), "--input", str(tmp_path / "x.npz")]) == 0
    )
    assert (
        f"accuracy {trained.evaluate(data.test)['accuracy']:.4f} on 359 examples"
        in capsys.readouterr().out
    )


@pytest.mark.slow
def test_quantized_artifact_is_compared_with_its_receipt(tmp_path, monkeypatch, capsys):
    trained, data = bundles.trained("mlp")
    ctde.write_bundle(trained, data, tmp_path / "bundle", ["numpy", "onnx-int8"], show=False)
    assert verify.main(["bundle", str(tmp_path / "bundle")]) == 0
    output = capsys.readouterr().out
    assert (
        "the outputs of numpy agree with the trained model; "
        "the outputs of onnx-int8 differ by no more than at the export\n"
    ) in output
    load = parity.load
    monkeypatch.setattr(
        parity,
        "load",
        lambda *arguments: lambda inputs: load(*arguments)(inputs) * np.float32(np.nan),
    )
    assert verify.main(["bundle", str(tmp_path / "bundle")]) == 1
    assert "onnx-int8 differs" in capsys.readouterr().err
