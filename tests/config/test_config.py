"""Every option is documented, checked, and saved so that it can be loaded."""

import re
from dataclasses import fields, replace
from importlib import import_module
from itertools import pairwise
from typing import get_args, get_type_hints

import jax
import numpy as np
import pytest

from ctde_jax import config
from ctde_jax.config import build, command_line, output, presets
from ctde_jax.errors import InputError
from ctde_jax.models import initializers, tasks

GROUPS = [field.default_factory for field in fields(config.Config)]
OPTIONS = [option.name for group in GROUPS for option in fields(group)]


def test_help_explains_every_option_with_its_default(capsys):
    with pytest.raises(SystemExit) as ended:
        config.parse(["--help"])
    text = capsys.readouterr().out
    assert ended.value.code == 0
    for option in OPTIONS:
        assert f"--{option.replace('_', '-')}" in text
    text = " ".join(text.replace("│", " ").split())
    assert text.count("(default:") + text.count("by default") == len(OPTIONS)


@pytest.fixture
def help_at(capsys, monkeypatch):
    """Prints `--help` in a terminal of a given number of columns."""

    def print_help(columns):
        monkeypatch.setenv("COLUMNS", str(columns))
        with pytest.raises(SystemExit):
            config.parse(["--help"])
        return capsys.readouterr().out

    return print_help


@pytest.mark.parametrize(
    ("word", "option"),
    {
        "clip": "--clip-grad-norm",
        "hidden": "--hidden-sizes",
        "lr": "--learning-rate",
        "dropout": "--dropout-rate",
        "accumulat": "--accumulation-steps",
        "seed": "--seed",
        "gpu": "--devices",
    }.items(),
)
def test_first_match_of_a_word_in_help_is_its_option(help_at, word, option):
    """The match is in the name or in the description of the option."""
    text = help_at(80).lower()
    position = text.index(word)
    match = re.search(r"\S*$", text[:position]).group()
    if not match.startswith("--"):
        *_, match = re.findall(r"^ +(--\S+)", text[:position], re.MULTILINE)
    assert option.startswith(match)


def test_examples_at_the_top_of_help_are_valid(help_at):
    lines = [line for line in help_at(80).splitlines() if line.startswith("  python")]
    assert len(lines) == 3
    for line in lines:
        config.parse(line.split()[3:])


@pytest.mark.parametrize("columns", [80, 120, 160])
def test_lines_of_help_break_only_if_the_next_word_does_not_fit(help_at, columns):
    """A line with room for the first word of the next line ends a paragraph."""
    lines = [line.rstrip("│ ") for line in help_at(columns).splitlines()]
    assert max(map(len, lines)) <= columns
    inner = [line[28:] if line.startswith("│" + " " * 27) else None for line in lines]
    texts = [command_line.usage.help_text(group, o.name) for group in GROUPS for o in fields(group)]
    paragraphs = {line for text in texts for line in text.split("\n")}
    for line, following in pairwise(inner):
        if (
            line
            and following
            and not any(p.startswith(following.split(":")[0]) for p in paragraphs)
        ):
            word = following.split()[0]
            assert 28 + len(line) + 1 + len(word) > columns - 3, (line, following)


def test_command_line_overrides_a_saved_configuration(tmp_path):
    chosen = config.parse(
        ["--hidden-sizes", "32", "16", "--steps", "7", "--learning-rate", "0.25", "--run-dir", "x"]
    )
    config.save(chosen, tmp_path / "config.json")

    again = config.parse(["--config", str(tmp_path / "config.json"), "--seed", "5"])

    assert (again.model, again.data, again.aggregation) == (
        chosen.model,
        chosen.data,
        chosen.aggregation,
    )
    assert (
        again.optimization.steps,
        again.optimization.learning_rate,
        again.optimization.seed,
    ) == (7, 0.25, 5)
    assert again.run.run_dir is None, "a repeated run must have a new folder"


def test_epochs_on_the_command_line_override_saved_steps(tmp_path):
    config.save(config.parse(["--steps", "7"]), tmp_path / "config.json")
    again = config.parse(["--config", str(tmp_path / "config.json"), "--epochs", "3"])
    assert (again.optimization.epochs, again.optimization.steps) == (3, None)


def test_saved_paths_are_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config.save(
        config.parse(["--dataset", "csv", "--data-file", "mine.csv"]), tmp_path / "config.json"
    )
    assert config.parse(["--config", "config.json"]).data.data_file == tmp_path / "mine.csv"


def test_command_line_overrides_the_defaults_of_a_preset():
    chosen = config.parse(
        ["--strategy", "diloco", "--sync-every", "64", "--reduce", "int4", "--error-feedback"]
    )
    aggregation = chosen.aggregation
    assert (
        aggregation.strategy,
        aggregation.sync_every,
        aggregation.reduce,
        aggregation.error_feedback,
    ) == (
        "diloco",
        64,
        "int4",
        True,
    )
    assert (aggregation.outer, aggregation.outer_learning_rate, aggregation.outer_momentum) == (
        "nesterov",
        0.7,
        0.9,
    )
    assert (
        config.parse(["--outer-momentum", "0.5", "--strategy", "diloco"]).aggregation.outer_momentum
        == 0.5
    )
    assert config.parse(["--strategy", "mu-loco"]).optimization.optimizer == "muon"
    assert (
        config.parse(["--strategy", "mu-loco", "--optimizer", "adamw"]).optimization.optimizer
        == "adamw"
    )
    assert not config.parse(
        ["--strategy", "sparse-loco", "--no-error-feedback"]
    ).aggregation.error_feedback


def test_preset_replaces_a_saved_strategy(tmp_path):
    saved = config.parse(["--strategy", "sparse-loco", "--devices", "2", "--batch-size", "32"])
    config.save(saved, tmp_path / "config.json")
    path = ["--config", str(tmp_path / "config.json")]
    assert config.parse(path).aggregation == saved.aggregation
    assert config.parse(path).optimization.optimizer == "adamw"
    again = config.parse([*path, "--strategy", "local-sgd"])
    assert again.optimization.optimizer == "adam", (
        "the optimizer of the first strategy must not be kept"
    )
    assert (
        again.aggregation == config.parse(["--strategy", "local-sgd", "--devices", "2"]).aggregation
    )
    assert again.optimization.batch_size == 32


def test_command_line_overrides_the_defaults_of_a_network(tmp_path):
    saved = config.parse(
        ["--model", "transformer", "--strategy", "fedavg", "--layers", "5", "--seed", "3"]
    )
    assert (
        saved.model.layers,
        saved.optimization.clip_grad_norm,
        saved.optimization.optimizer,
    ) == (
        5,
        1.0,
        "sgd",
    )
    config.save(saved, tmp_path / "config.json")
    path = ["--config", str(tmp_path / "config.json")]
    assert config.parse(path).model == saved.model
    again = config.parse([*path, "--model", "resnet"])
    assert again.model == config.parse(["--model", "resnet"]).model
    assert (again.optimization.clip_grad_norm, again.optimization.seed) == (None, 3)
    assert again.aggregation == saved.aggregation


def test_new_preset_over_a_saved_configuration_sets_its_defaults(tmp_path):
    config.save(config.parse(["--seed", "3"]), tmp_path / "config.json")
    path = ["--config", str(tmp_path / "config.json")]
    chosen = config.parse([*path, "--model", "lstm", "--strategy", "diloco"])
    fresh = config.parse(["--model", "lstm", "--strategy", "diloco", "--seed", "3"])
    assert (chosen.model, chosen.optimization, chosen.aggregation) == (
        fresh.model,
        fresh.optimization,
        fresh.aggregation,
    )
    assert (chosen.optimization.clip_grad_norm, chosen.optimization.optimizer) == (1.0, "adamw")


def test_options_list_every_initializer_and_network():
    assert set(get_args(get_type_hints(config.ModelOptions)["init"])) == {
        *initializers.INITIALIZERS,
        "mup",
    }
    for name, preset in presets.MODELS.items():
        assert preset.options.keys() <= set(OPTIONS), name


def test_preset_in_a_configuration_file_equals_that_of_the_command_line(tmp_path):
    (tmp_path / "config.json").write_text('{"strategy": "diloco", "sync_every": 8}')
    chosen = config.parse(["--config", str(tmp_path / "config.json")])
    assert (
        chosen.aggregation
        == config.parse(["--strategy", "diloco", "--sync-every", "8"]).aggregation
    )


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--strategy", "dilco"], "got 'dilco'; did you mean 'diloco'?"),
        (["--error-feedback", "yes"], "--error-feedback takes no value, got yes."),
        (
            ["--no-error-feedbak"],
            "--no-error-feedbak is not an option; did you mean '--no-error-feedback'?",
        ),
        (["--dp-clip-norm", "one"], "--dp-clip-norm must be a number, got 'one'."),
        (
            ["--batchsize", "8"],
            "--batchsize is not an option; did you mean '--batch-size'? --help lists all options.",
        ),
        (
            ["--dataset", "mnits"],
            "fashion_mnist, cifar10, folder, text, npz, csv, parquet, got 'mnits'; did you mean "
            "'mnist'?",
        ),
        (["--optimizer=adm"], "did you mean 'adam'?"),
        (["--activation"], "--activation takes one value, got none."),
        (["--seed", "1", "-e", "3"], "--seed takes one value, got 1 -e 3."),
        (["word"], "word is not an option."),
        (
            ["--model", "ccn"],
            (
                "--model must be one of mlp, cnn, resnet, lstm, gru, transformer, got 'ccn'; did "
                "you mean"
            ),
        ),
        (
            ["--hidden-size", "8"],
            "hidden_size requires --model lstm or --model gru or --model transformer.",
        ),
        (
            ["--model", "resnet", "--batch-statistics", "averaged"],
            "batch_statistics requires --norm batch.",
        ),
        (
            ["--weight-decay", "0.1"],
            "weight_decay requires --optimizer adamw or --optimizer lion or --optimizer muon.",
        ),
        (["--epochs", "many"], "--epochs must be a whole number, got 'many'."),
        (["--steps", "2.5"], "--steps must be a whole number, got '2.5'."),
        (["--class-weights"], "--class-weights takes at least one value, got none."),
        (["--learning-rate", "1e"], "--learning-rate must be a number, got '1e'."),
        (
            ["--hidden-sizes", "12,34"],
            "--hidden-sizes must be a whole number, got '12,34'; separate the values by spaces.",
        ),
        (
            ["--config", "nowhere.json"],
            (
                "config must be the config.json in the folder of a run, but nowhere.json cannot "
                "be read"
            ),
        ),
    ],
)
def test_invalid_command_line_is_refused(arguments, sentence):
    with pytest.raises(InputError) as caught:
        config.parse(arguments)
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    ("saved", "sentence"),
    [
        ('{"epochs": 3', "is not valid JSON (Expecting"),
        ("[1, 2]", "contains a list instead of an object."),
        ('{"epoch": 3}', "config.json contains the unknown option 'epoch'; did you mean 'epochs'?"),
        ('{"epochs": "many"}', "--epochs must be a whole number, got 'many'."),
        ('{"model": "mpl"}', "got 'mpl'; did you mean 'mlp'?"),
    ],
)
def test_invalid_saved_configuration_is_refused(tmp_path, saved, sentence):
    (tmp_path / "config.json").write_text(saved)
    with pytest.raises(InputError) as caught:
        config.parse(["--config", str(tmp_path / "config.json")])
    assert sentence in str(caught.value)


@pytest.mark.parametrize("weights", ["balanced", " ".join(["1"] * 9 + ["2.5"])])
def test_class_weights_and_focal_loss_are_saved_and_shown(tmp_path, digits, weights):
    chosen = config.parse(["--focal-gamma", "2", "--class-weights", *weights.split()])
    config.save(chosen, tmp_path / "config.json")
    assert config.parse(["--config", str(tmp_path / "config.json")]) == replace(
        chosen, run=replace(chosen.run, config=tmp_path / "config.json")
    )
    shown = output.names(chosen, digits)["optimizer"]
    assert shown.endswith(f"focal loss with gamma 2, class weights {weights}")

    # The objective is that of the library.
    built = build.build_training(chosen, digits, jax.devices()[:1]).weighted_task
    numbers = "balanced" if weights == "balanced" else [1.0] * 9 + [2.5]
    expected = tasks.weighted(tasks.focal(tasks.classification, 2), numbers, digits)
    logits, labels = np.eye(10, dtype=np.float32), np.arange(10)
    np.testing.assert_array_equal(
        built.objective(logits, labels), expected.objective(logits, labels)
    )


def test_library_argument_is_named_by_its_option():
    assert config.flag("batch_size") == "--batch-size"
    assert config.flag("inner_steps") == "--sync-every"
    assert config.flag("k") == "--keep"
    assert config.flag("x_train") == "x_train"


def test_home_folder_is_expanded_in_every_path(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    parsed = config.parse(["--run-dir=~/run", "--dataset=csv", "--data-file=~/mine.csv"])
    assert parsed.run.run_dir == tmp_path / "run"
    assert parsed.data.data_file == tmp_path / "mine.csv"


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("--lr", "--learning-rate"),
        ("--bs", "--batch-size"),
        ("--clip", "--clip-grad-norm"),
        ("--wd", "--weight-decay"),
        ("--gpus", "--devices"),
        ("--val-split", "--validation-fraction"),
        ("--learning-rat", "--learning-rate"),
    ],
)
def test_common_synonym_is_answered_with_the_option(name, option):
    with pytest.raises(InputError, match=f"is not an option; did you mean '{option}'?"):
        config.parse([name, "1"])


def test_synonyms_refer_to_options_and_are_not_options():
    options = command_line._option_types()
    assert {*command_line._SYNONYMS.values()} <= {*options}
    assert not {*command_line._SYNONYMS} & {*options}


@pytest.mark.parametrize("command", ["train", "wire", "profile"])
def test_help_names_the_command(command, capsys):
    with pytest.raises(SystemExit) as ended:
        import_module(f"ctde_jax.{command}").main(["--help"])
    assert ended.value.code == 0
    assert f"usage: python -m ctde_jax.{command} " in capsys.readouterr().out
