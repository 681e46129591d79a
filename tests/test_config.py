"""Every option is explained, checked, and saved so that it can be read again."""

from dataclasses import fields

import pytest

from ctde_jax import config
from ctde_jax.errors import InputError

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


def test_saved_configuration_is_read_back_and_the_command_line_wins(tmp_path):
    chosen = config.parse(["--widths", "32", "16", "--steps", "7", "--learning-rate", "0.25", "--run-dir", "x"])
    config.save(chosen, tmp_path / "config.json")

    again = config.parse(["--config", str(tmp_path / "config.json"), "--seed", "5"])

    assert (again.model, again.data, again.aggregation) == (chosen.model, chosen.data, chosen.aggregation)
    assert (again.optimization.steps, again.optimization.learning_rate, again.optimization.seed) == (7, 0.25, 5)
    assert again.run.run_dir is None, "a repeated run has a folder of its own"


def test_epochs_on_the_command_line_win_over_saved_steps(tmp_path):
    config.save(config.parse(["--steps", "7"]), tmp_path / "config.json")
    again = config.parse(["--config", str(tmp_path / "config.json"), "--epochs", "3"])
    assert (again.optimization.epochs, again.optimization.steps) == (3, None)


def test_saved_paths_hold_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config.save(config.parse(["--dataset", "csv", "--data-file", "mine.csv"]), tmp_path / "config.json")
    assert config.parse(["--config", "config.json"]).data.data_file == tmp_path / "mine.csv"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--batchsize", "8"], "--batchsize is no option; did you mean '--batch-size'? --help lists them all."),
        (["--dataset", "mnits"], "--dataset must be one of digits, mnist, fashion_mnist, npz, csv, got 'mnits'; did"),
        (["--optimizer=adm"], "did you mean 'adam'?"),
        (["--activation"], "--activation takes one value, got none."),
        (["--seed", "1", "-e", "3"], "--seed takes one value, got 1 -e 3."),
        (["extra"], "extra is no option."),
        (["--model", "cnn"], "--model must be one of mlp, got 'cnn'."),
        (["--epochs", "many"], "--epochs must be a whole number, got 'many'."),
        (["--steps", "2.5"], "--steps must be a whole number, got '2.5'."),
        (["--learning-rate", "1e"], "--learning-rate must be a number, got '1e'."),
        (["--widths", "12,34"], "--widths must be a whole number, got '12,34'."),
        (
            ["--config", "nowhere.json"],
            "config must name the config.json that a run has left in its folder, but nowhere.json cannot be read",
        ),
    ],
)
def test_unknown_name_gets_the_nearest_known_one(arguments, sentence):
    with pytest.raises(InputError) as caught:
        config.parse(arguments)
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    ("saved", "sentence"),
    [
        ('{"epochs": 3', "is no JSON (Expecting"),
        ("[1, 2]", "holds a list instead of an object."),
        ('{"epoch": 3}', "--epoch is no option; did you mean '--epochs'?"),
        ('{"epochs": "many"}', "--epochs must be a whole number, got 'many'."),
        ('{"model": "mpl"}', "--model must be one of mlp, got 'mpl'"),
    ],
)
def test_broken_saved_configuration_is_refused_in_a_sentence(tmp_path, saved, sentence):
    (tmp_path / "config.json").write_text(saved)
    with pytest.raises(InputError) as caught:
        config.parse(["--config", str(tmp_path / "config.json")])
    assert sentence in str(caught.value)


def test_argument_of_the_library_is_named_as_the_option_that_sets_it():
    assert config.flag("batch_size") == "--batch-size"
    assert config.flag("inner_steps") == "--sync-every"
    assert config.flag("x_train") == "x_train"
