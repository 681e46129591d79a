"""A model of regression learns standardized targets, and predicts in the units of the data."""

import csv

import numpy as np
import optax
import pytest
from sklearn.datasets import load_diabetes
from sklearn.metrics import mean_absolute_error, r2_score, root_mean_squared_error
from sklearn.neural_network import MLPRegressor
from sklearn.preprocessing import StandardScaler

import ctde_jax as ctde
from ctde_jax import bundle, train
from ctde_jax.execute import main as execute

RNG = np.random.default_rng(0)
X = RNG.normal(size=(90, 3)).astype(np.float32)
Y = (5000 + 200 * (X[:, 0] - X[:, 1] * X[:, 2])).astype(np.float32)
DATA = ctde.data.from_arrays(X, Y)


def fit(data=DATA, model=None, replicas=2, **options) -> ctde.Trained:
    arguments = {"task": "regression", "batch_size": 24, "steps": 12, "show": False} | options
    model = ctde.models.mlp([3, 8, 1]) if model is None else model
    return ctde.fit(
        model, data, optax.adam(0.03), devices=ctde.devices.start(replicas), **arguments
    )


@pytest.fixture(scope="module")
def trained() -> ctde.Trained:
    return fit()


@pytest.mark.slow
@pytest.mark.parametrize("replicas", [1, 4])
def test_metrics_equal_those_of_predictions_on_any_number_of_devices(trained, replicas):
    """The test split has 18 examples, which 4 devices do not share equally."""
    outputs = trained.predict(DATA.test.inputs)
    y = DATA.test.labels
    tested = fit(init_from=trained.params, replicas=replicas, steps=1, seed=1).tested
    again = fit(init_from=trained.params, steps=1, seed=1).tested
    assert (outputs.shape, 4000 < outputs.mean() < 6000) == ((18, 1), True)
    assert [trained.tested[name] for name in ("mae", "rmse", "r2")] == pytest.approx(
        [
            mean_absolute_error(y, outputs),
            root_mean_squared_error(y, outputs),
            r2_score(y, outputs),
        ],
        rel=1e-4,
    )
    assert {name: tested[name] for name in trained.task.names} == pytest.approx(
        {name: again[name] for name in trained.task.names}, rel=1e-4
    )


def test_targets_do_not_depend_on_their_units(trained):
    """In other units, the network and the loss are the same."""
    scaled = fit(ctde.data.from_arrays(X, Y * 8 - 64))
    assert scaled.tested["loss"] == pytest.approx(trained.tested["loss"], rel=1e-2)
    assert scaled.tested["r2"] == pytest.approx(trained.tested["r2"], abs=1e-2)
    assert scaled.tested["mae"] == pytest.approx(8 * trained.tested["mae"], rel=1e-2)


def test_units_are_those_of_the_training_split(trained):
    units = trained.task.units
    assert units is not None
    np.testing.assert_allclose(units.mean, [[DATA.train.labels.mean()]], rtol=1e-6)
    np.testing.assert_allclose(units.deviation, [[DATA.train.labels.std()]], rtol=1e-5)


def test_model_that_is_trained_further_is_scaled_once(trained):
    again = fit(model=trained.model, init_from=trained.params, steps=1)
    assert abs(again.predict(DATA.test.inputs).mean() - 5000) < 1000
    assert again.tested["rmse"] < 2 * trained.tested["rmse"]


@pytest.mark.slow
def test_several_targets_have_a_unit_each():
    both = np.stack([Y, Y / 1000], axis=1)
    trained = fit(ctde.data.from_arrays(X, both), ctde.models.mlp([3, 8, 2]), steps=60)
    np.testing.assert_allclose(trained.predict(X).mean(axis=0), both.mean(axis=0), rtol=0.03)


@pytest.mark.parametrize("outputs", [3, 2])
def test_model_with_another_number_of_outputs_is_refused(outputs):
    with pytest.raises(ctde.InputError) as caught:
        fit(model=ctde.models.mlp([3, outputs]))
    assert str(caught.value) == (
        "model must return outputs of shape [examples, 1], one for each target, got "
        f"[1, {outputs}] for one example."
    )


@pytest.mark.slow
def test_recurrent_model_predicts_in_units_position_by_position():
    data = ctde.data.from_arrays(X[:, :, None], Y)
    model = ctde.models.rnn_classifier(1, 1, 4)
    trained = fit(data, model, steps=1)
    stream = trained.model.stream
    carry = stream.start(5)
    for position in range(3):
        outputs, carry = stream.step(trained.params, {}, carry, X[:5, position, None])
    np.testing.assert_allclose(outputs, trained.predict(X[:5, :, None]), rtol=1e-5)


@pytest.mark.slow
def test_bundle_predicts_in_units(trained, tmp_path, capsys):
    written = ctde.write_bundle(trained, DATA, tmp_path / "bundle", ["numpy", "jax"], show=False)
    assert not written.left_out
    for runtime in ("numpy", "jax"):
        predict = bundle.load(written.bundle, runtime)
        np.testing.assert_allclose(predict(X), trained.predict(X), rtol=1e-5)

    np.save(tmp_path / "x.npy", X[:2])
    assert execute([str(tmp_path / "bundle"), "--input", str(tmp_path / "x.npy"), "--json"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert float(lines[0].split("[")[1].rstrip("]}")) == pytest.approx(
        float(trained.predict(X[:1])[0, 0]), rel=1e-5
    )


def test_table_of_prices_is_trained_and_loaded_from_the_command_line(tmp_path, capsys):
    path = tmp_path / "prices.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["a", "b", "c", "price"], *np.column_stack([X, Y]).tolist()])
    run = [str(path), "--run-dir", str(tmp_path / "run"), "--task", "regression"]
    options = ["--steps", "3", "--devices", "1", "--batch-size", "24"]
    assert train.main(["--dataset", "csv", "--data-file", *run, *options]) == 0
    output = capsys.readouterr().out
    assert "1 target per example" in output
    assert all(f"test {name}" in output for name in ("mae", "rmse", "r2"))

    found, data, _ = ctde.load_run(tmp_path / "run")
    outputs = found.predict(data.test.inputs)
    assert found.tested["mae"] == pytest.approx(mean_absolute_error(data.test.labels, outputs))


@pytest.mark.slow
def test_npz_with_targets_is_trained_from_the_command_line(tmp_path, capsys):
    np.savez(tmp_path / "t.npz", x_train=X, y_train=np.rint(Y).astype(int))
    arguments = ["--dataset", "npz", "--data-file", str(tmp_path / "t.npz"), "--steps", "1"]
    arguments += ["--devices", "1", "--run-dir", str(tmp_path / "run")]
    assert train.main([*arguments, "--task", "regression"]) == 0
    np.savez(tmp_path / "t.npz", x_train=X, y_train=Y)
    assert train.main([*arguments, "--resume", "never"]) == 2
    assert capsys.readouterr().err == (
        f"error: --data-file {tmp_path / 't.npz'} does not contain class indices in y_train (got "
        "labels of the dtype float32 and the shape [90]); save them as integers from 0, or pass "
        "task='regression' (--task regression) to predict them.\n"
    )


@pytest.mark.slow
def test_npz_with_several_labels_is_trained_from_the_command_line(tmp_path, capsys):
    np.savez(tmp_path / "t.npz", x_train=X, y_train=X > 0)
    arguments = ["--dataset", "npz", "--data-file", str(tmp_path / "t.npz"), "--steps", "1"]
    arguments += ["--devices", "1", "--run-dir", str(tmp_path / "run"), "--task", "multilabel"]
    assert train.main(arguments) == 0
    output = capsys.readouterr().out
    assert "3 targets per example" in output
    assert "test exact match" in output


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            ["--dataset", "digits", "--task", "regression"],
            "--task must be auto with --dataset digits, got regression.",
        ),
        (
            ["--partition", "dirichlet"],
            "--partition must be reshuffled or iid if examples have no classes, got dirichlet.",
        ),
        (
            ["--dataset", "csv", "--data-file", "t.csv", "--task", "multilabel"],
            "--task must not be multilabel with a table, which has one label column.",
        ),
        (
            ["--label-smoothing", "0.1"],
            "--label-smoothing must be 0 if the task predicts no classes, got 0.1.",
        ),
    ],
)
def test_option_that_requires_classes_is_refused(tmp_path, capsys, options, sentence):
    np.savez(tmp_path / "t.npz", x_train=X, y_train=Y)
    data = ["--dataset", "npz", "--data-file", str(tmp_path / "t.npz"), "--task", "regression"]
    if "--dataset" in options:
        data = []
    assert train.main([*data, *options, "--devices", "1"]) == 2
    assert capsys.readouterr().err == f"error: {sentence}\n"


def prices() -> tuple[np.ndarray, np.ndarray]:
    """Returns the features and prices of 4,000 synthetic flats."""
    rng = np.random.default_rng(1)
    area, rooms, age, distance = rng.uniform([20, 1, 0, 0], [150, 6, 100, 30], size=(4000, 4)).T
    price = 3000 * area * np.exp(-distance / 20) + 20_000 * np.sqrt(rooms) - 500 * age
    x = np.column_stack([area, rooms, age, distance])
    return x, price + rng.normal(scale=10_000, size=4000)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["diabetes", "prices"])
def test_r2_equals_that_of_scikit_learn(tmp_path, name):
    """The same sizes, initialization, optimizer, batch size and epochs; seeds are averaged."""
    x, y = load_diabetes(return_X_y=True) if name == "diabetes" else prices()
    path = tmp_path / "t.csv"
    header = ",".join([*(f"f{place}" for place in range(x.shape[1])), "target"])
    np.savetxt(path, np.column_stack([x, y]), "%.9g", ",", header=header, comments="")
    arguments = ["--dataset", "csv", "--data-file", str(path), "--task", "regression"]
    arguments += ["--hidden-sizes", "32", "--init", "glorot", "--schedule", "constant"]
    arguments += ["--learning-rate", "0.001", "--batch-size", "32", "--epochs", "30"]

    data = ctde.data.from_table(path, task="regression")
    scaler = StandardScaler().fit(data.train.inputs)
    units = StandardScaler().fit(data.train.labels[:, None])
    ours, theirs = [], []
    for seed in range(4):
        folder = tmp_path / str(seed)
        run = ["--devices", "2", "--seed", str(seed), "--run-dir", str(folder)]
        assert train.main([*arguments, *run]) == 0
        ours.append(ctde.load_run(folder).trained.tested["r2"])

        peer = MLPRegressor(
            hidden_layer_sizes=32,
            activation="tanh",
            alpha=0.0,
            batch_size=32,
            max_iter=30,
            n_iter_no_change=30,
            random_state=seed,
        )
        with pytest.warns(match="Maximum iterations"):
            peer.fit(
                scaler.transform(data.train.inputs),
                units.transform(data.train.labels[:, None]).ravel(),
            )
        outputs = peer.predict(scaler.transform(data.test.inputs))[:, None]
        theirs.append(r2_score(data.test.labels, units.inverse_transform(outputs)))
    assert np.mean(ours) == pytest.approx(np.mean(theirs), abs=0.01)
