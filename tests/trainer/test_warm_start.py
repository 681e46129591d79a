"""Starting from given parameters: which are loaded, and that training continues from them."""

import shutil
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from flax import linen, nnx
from jax import numpy as jnp
from safetensors.numpy import save_file

import ctde_jax as ctde
from ctde_jax import data, devices, models
from ctde_jax.errors import InputError
from ctde_jax.rounds import state
from ctde_jax.trainer.warm_start import Start, read_source, start_from

PARAMS = {
    "body": {"kernel": jnp.zeros((3, 4)), "bias": jnp.zeros(4)},
    "head": {"kernel": jnp.zeros((4, 2))},
}
STATE = {"body": {"mean": jnp.zeros(4)}}
GIVEN = jax.tree.map(lambda x: np.arange(x.size, dtype=np.float32).reshape(x.shape) + 1, PARAMS)
GIVEN_STATE = {"body": {"mean": np.full(4, 7, np.float32)}}


class Small(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.body = nnx.Linear(3, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)


def start(source, params, model_state, only=None) -> Start:
    return start_from(read_source(source), params, model_state, only)


def same(tree, other):
    jax.tree.map(np.testing.assert_array_equal, tree, other)


def rows(started: Start) -> dict[str, str]:
    """The table that is shown: the origin of each parameter."""
    names, _, kinds = (list(column.cells) for column in started.table.columns)
    return dict(zip(names, kinds, strict=True))


def test_parameter_tree_is_loaded_and_the_model_state_is_kept():
    started = start(GIVEN, PARAMS, STATE)
    same(started.params, GIVEN)
    same(started.model_state, STATE)
    assert rows(started) == {
        **dict.fromkeys(state.named(PARAMS), "loaded"),
        "body/mean": "initialized, no model state in the source",
    }


@pytest.mark.slow
def test_other_conversion_of_a_table_is_noted(tmp_path, capsys):
    """The same names and shapes, but other medians, so other inputs for the same row."""

    def table(shift: int) -> data.Dataset:
        rows = [f"{i % 5 + shift},{'xy'[i % 2]},{'uv'[i % 2]}" for i in range(40)]
        path = tmp_path / f"{shift}.csv"
        path.write_text("\n".join(["a,b,y", *rows]))
        return data.from_table(path)

    def fit(dataset: data.Dataset, **options) -> str:
        model = models.mlp([len(dataset.columns), 2])
        ctde.fit(model, dataset, optax.sgd(0.1), steps=1, batch_size=8, **options)
        return capsys.readouterr().out

    first, second = table(0), table(3)
    fit(first, run_dir=tmp_path / "run")
    assert "the recipe of the columns differed" in fit(second, init_from=tmp_path / "run")
    like = data.from_table(tmp_path / "3.csv", like=first)
    for same_conversion in (first, like):
        assert "differed" not in fit(same_conversion, init_from=tmp_path / "run")


def test_linen_variables_include_the_model_state():
    module = linen.BatchNorm(use_running_average=True)
    variables = module.init(jax.random.key(0), jnp.ones((1, 3)))
    given = jax.tree.map(lambda x: x + 3, variables)
    started = start(given, variables["params"], {"batch_stats": variables["batch_stats"]})
    same(started.params, given["params"])
    same(started.model_state, {"batch_stats": given["batch_stats"]})


def test_nnx_module_provides_parameters_and_model_state():
    module, other = Small(nnx.Rngs(0)), Small(nnx.Rngs(1))
    module.norm.mean[...] += 5
    _, params, rest = nnx.split(other, nnx.Param, nnx.Not(nnx.Param))
    started = start(module, nnx.to_pure_dict(params), nnx.to_pure_dict(rest))
    same(started.params["body"]["kernel"], module.body.kernel[...])
    same(started.model_state["norm"]["mean"], np.full(4, 5))


@pytest.mark.parametrize("separator", ["/", "."])
def test_safetensors_file_is_read_by_path(tmp_path, separator):
    named = {name.replace("/", separator): np.asarray(x) for name, x in state.named(GIVEN).items()}
    save_file(named, tmp_path / "weights.safetensors")
    same(start(tmp_path / "weights.safetensors", PARAMS, STATE).params, GIVEN)


def test_pattern_selects_parameters_and_ignores_the_rest_of_the_source():
    given = {
        "body": GIVEN["body"],
        "head": {"kernel": np.ones((4, 9), np.float32)},
        "extra": {"x": np.ones(1)},
    }
    started = start(given, PARAMS, STATE, ["body/*"])
    same(started.params, {"body": GIVEN["body"], "head": PARAMS["head"]})
    assert rows(started)["head/kernel"] == "initialized, not in init_only"
    assert rows(started)["extra/x"] == "unused"


def test_half_precision_is_cast_to_the_dtype_of_the_model():
    given = jax.tree.map(lambda x: x.astype(np.float16), GIVEN)
    started = start(given, PARAMS, STATE)
    assert started.params["body"]["bias"].dtype == np.float32
    same(started.params, GIVEN)


@pytest.mark.parametrize(
    ("given", "only", "sentence"),
    [
        ({"body": GIVEN["body"]}, None, "head/kernel is missing"),
        ({**GIVEN, "extra": {"x": np.ones(1)}}, None, "extra/x is not in the model"),
        (
            {**GIVEN, "head": {"kernel": np.ones((4, 9), np.float32)}},
            None,
            "float32[4, 9] instead of",
        ),
        ({**GIVEN, "head": {"kernel": np.ones((4, 2), np.int32)}}, None, "int32[4, 2] instead of"),
        ({"body": GIVEN["body"]}, ["head/*"], "head/kernel is missing"),
        (GIVEN, ["hed/*"], "must match parameters of the model, got 'hed/*'"),
        (GIVEN, [], "at least one pattern"),
        (3, None, "got int"),
        ("nowhere", None, "got 'nowhere'"),
        (__file__, None, "must be a readable .safetensors file"),
    ],
)
def test_incompatible_source_is_refused(given, only, sentence):
    with pytest.raises(InputError) as error:
        start(given, PARAMS, STATE, only)
    assert sentence in str(error.value)


def train(model, dataset, optimizer=None, **more) -> ctde.Trained:
    arguments = {"batch_size": 64, "steps": 8, "eval_every": 8, "log_every": 1, "show": False}
    arguments["devices"] = devices.start(2)
    return ctde.fit(model, dataset, optimizer or optax.sgd(0.1), **{**arguments, **more})


MODEL = models.mlp([64, 16, 10])


@pytest.fixture(scope="module")
def source_run(digits, tmp_path_factory) -> tuple[ctde.Trained, object]:
    folder = tmp_path_factory.mktemp("run")
    return train(MODEL, digits, run_dir=folder), folder


@pytest.mark.slow
def test_training_continues_from_a_trained_model_and_from_its_files(source_run, digits, tmp_path):
    """The first loss equals that of the given parameters on the first batch, computed in numpy."""
    trained, folder = source_run
    ctde.write_bundle(trained, digits, tmp_path / "bundle", ["numpy"], show=False)
    save_file(
        {k: np.asarray(v) for k, v in state.named(trained.params).items()},
        tmp_path / "w.safetensors",
    )
    sources = [trained, trained.params, folder, folder / "checkpoints" / "step-00000008"]
    sources += [tmp_path / "bundle", tmp_path / "w.safetensors"]
    runs = [train(MODEL, digits, init_from=source) for source in sources]

    first = data.deal(digits.train, 1, 64, 0).steps(0, 1)[0, 0]
    logits = trained.predict(digits.train.inputs[first])
    log_probabilities = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = -log_probabilities[np.arange(64), digits.train.labels[first]].mean()
    for run in runs:
        np.testing.assert_allclose(run.history[0]["loss"], expected, rtol=1e-5)
        same(run.params, runs[0].params)


@pytest.mark.slow
def test_model_of_a_trained_object_scales_inputs_once(source_run, digits, capsys):
    trained, _ = source_run
    continued = train(trained.model, digits, init_from=trained)
    same(continued.params, train(MODEL, digits, init_from=trained).params)
    fresh = train(trained.model, digits, show=True)
    same(fresh.params, trained.params)
    assert "init_from=trained" in capsys.readouterr().out


@pytest.mark.slow
def test_only_the_matching_layers_start_from_the_source(source_run, digits, capsys):
    trained, _ = source_run
    wider = models.mlp([64, 16, 16, 10])
    started = train(wider, digits, init_from=trained, init_only=["layers/0/*"], steps=1, show=True)
    fresh = train(wider, digits, steps=1)
    assert started.history[0]["loss"] != fresh.history[0]["loss"]
    printed = capsys.readouterr().out
    assert "layers/0/kernel" in printed
    assert "initialized, not in init_only" in printed


def test_run_with_other_initial_parameters_is_not_resumed(source_run, digits, tmp_path):
    trained, _ = source_run
    train(MODEL, digits, init_from=trained, run_dir=tmp_path)
    # The same parameters in another form.
    train(MODEL, digits, init_from=trained.params, run_dir=tmp_path)
    other = jax.tree.map(lambda x: x + 1, trained.params)
    for options in ({"init_from": other}, {}):
        with pytest.raises(
            InputError, match=r"different options: the initial parameters \(init_from[,)]"
        ):
            train(MODEL, digits, run_dir=tmp_path, **options)


@pytest.mark.slow
def test_source_run_that_has_changed_is_refused(source_run, digits, tmp_path):
    shutil.copytree(source_run[1], tmp_path / "source")
    started = train(MODEL, digits, init_from=tmp_path / "source", run_dir=tmp_path / "run")
    train(MODEL, digits, run_dir=tmp_path / "later", steps=9)
    newer = Path("checkpoints", "step-00000009")
    shutil.copytree(tmp_path / "later" / newer, tmp_path / "source" / newer)
    remedy = (
        r"which change if this is a run that is still training; pass one of its checkpoints or a "
        r"bundle\)\."
    )
    with pytest.raises(
        InputError, match=rf"different options: the initial parameters \(init_from, {remedy}"
    ):
        train(MODEL, digits, init_from=tmp_path / "source", run_dir=tmp_path / "run")
    first = tmp_path / "source" / "checkpoints" / "step-00000008"
    assert (
        train(MODEL, digits, init_from=first, run_dir=tmp_path / "run").history == started.history
    )


@pytest.mark.slow
def test_source_in_the_folder_of_the_run_is_refused(digits, tmp_path, monkeypatch):
    """For any spelling of the path. An earlier run in a subfolder is a valid source."""
    monkeypatch.chdir(tmp_path)
    train(MODEL, digits, run_dir="run")
    train(MODEL, digits, run_dir="run", seed=1, resume=False)
    rule = (
        r"^init_from must not be in the folder of this run, .*; choose another folder for this "
        r"run\.$"
    )
    for source in (
        "run",
        tmp_path / "run",
        "run/checkpoints/step-00000008",
        "run/bundle",
        "run/../run",
    ):
        for resume in (True, False):
            with pytest.raises(InputError, match=rule):
                train(MODEL, digits, init_from=source, run_dir="run", resume=resume)
    again = train(MODEL, digits, init_from="run/previous-1", run_dir="run", resume=False)
    assert train(MODEL, digits, init_from="run/previous-1", run_dir="run").history == again.history


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"init_only": ["*"]}, "requires init_from"),
        (
            {"init_from": {}, "branch_from": "x", "run_dir": "y"},
            "cannot be combined with branch_from",
        ),
    ],
)
def test_contradictory_options_of_the_start_are_refused(digits, arguments, sentence):
    with pytest.raises(InputError, match=sentence):
        train(MODEL, digits, **arguments)


@pytest.mark.slow
def test_checkpoint_of_a_schedule_free_optimizer_is_refused(digits, tmp_path):
    optimizer = optax.contrib.schedule_free_adamw(0.01)
    trained = train(MODEL, digits, optimizer=optimizer, run_dir=tmp_path)
    same(
        train(MODEL, digits, init_from=trained, steps=1).params,
        train(MODEL, digits, init_from=trained.params, steps=1).params,
    )
    with pytest.raises(
        InputError, match=r"must not be .*, because its optimizer is evaluated at other parameters"
    ):
        train(MODEL, digits, init_from=tmp_path)


def test_model_derived_from_a_trained_object_is_refused(source_run, digits):
    """Inputs would be scaled twice, or the changes would be lost."""
    trained, _ = source_run
    for changed in (
        trained.model._replace(init=lambda *_: None),
        models.in_bfloat16(trained.model),
    ):
        with pytest.raises(InputError, match="must not be derived from the model of a Trained"):
            train(changed, digits)


@pytest.mark.slow
def test_integer_parameters_are_loaded_from_a_module(digits):
    class Net(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.order, self.out = nnx.Param(jnp.arange(64)), nnx.Linear(64, 10, rngs=rngs)

        def __call__(self, x):
            return self.out(x.reshape(len(x), -1)[:, self.order[...]])

    net = Net(nnx.Rngs(3))
    same(train(Net, digits, init_from=net, steps=1).params, train(net, digits, steps=1).params)


@pytest.mark.slow
def test_branch_uses_the_hyperparameters_of_its_optimizer(digits, tmp_path):
    make = optax.inject_hyperparams(optax.sgd)
    train(MODEL, digits, make(learning_rate=0.1), run_dir=tmp_path / "trunk", steps=4)
    start = tmp_path / "trunk" / "checkpoints" / "step-00000004"
    branch = train(
        MODEL, digits, make(learning_rate=0.001), run_dir=tmp_path / "branch", branch_from=start
    )
    rates = {
        row["learning_rate"]
        for row in branch.history
        if row["split"] == "train" and row["step"] > 4
    }
    assert rates == {np.float32(0.001)}
