"""Whole runs: any number of devices and dispatches, and user-defined models, losses and data."""

import json
import signal
import threading
import time

import flax.linen
import jax
import numpy as np
import optax
import pytest
from cases import some
from flax import nnx
from jax import numpy as jnp

import ctde_jax as ctde
from ctde_jax import data, devices, models
from ctde_jax.data import batches
from ctde_jax.errors import InputError
from ctde_jax.models.tasks import is_correct
from ctde_jax.rounds import schedule, sources

MODEL = models.mlp([64, 16, 10])
LOCAL = ctde.Strategy(inner_steps=4)


def losses(trained: ctde.Trained) -> list[float]:
    return [row["loss"] for row in trained.history if row["split"] == "train"]


def assert_same_bits(tree, other):
    jax.tree.map(np.testing.assert_array_equal, tree, other)


def plain_loop(dataset: data.Dataset, steps: int, batch_size: int, seed: int) -> list[float]:
    """A hand-written training loop for one device; returns the loss of each step."""
    optimizer = optax.adam(0.01)
    params, _ = MODEL.init(jax.random.split(jax.random.key(seed))[0], jnp.zeros((1, 64)))
    opt_state = optimizer.init(params)
    order = batches.deal(dataset.train, 1, batch_size, seed).steps(0, steps)[:, 0]

    @jax.jit
    def step(params, opt_state, inputs, labels):
        def loss_of(params):
            outputs = jnp.tanh(
                inputs @ params["layers"][0]["kernel"] + params["layers"][0]["bias"][None]
            )
            outputs = outputs @ params["layers"][1]["kernel"] + params["layers"][1]["bias"][None]
            return -jax.nn.log_softmax(outputs)[jnp.arange(len(labels)), labels].mean()

        loss, grads = jax.value_and_grad(loss_of)(params)
        updates, opt_state = optimizer.update(grads, opt_state)
        return optax.apply_updates(params, updates), opt_state, loss

    found = []
    for row in order:
        present = row[row >= 0]
        inputs = dataset.train.inputs[present].reshape(len(present), 64) / np.float32(16)
        params, opt_state, loss = step(params, opt_state, inputs, dataset.train.labels[present])
        found.append(float(loss))
    return found


@pytest.fixture(scope="module")
def plain_losses(digits) -> list[float]:
    return plain_loop(digits, steps=50, batch_size=64, seed=3)


@pytest.mark.parametrize("count", some([1, 2, 4, 8], 4))
def test_losses_equal_those_of_a_plain_loop_on_any_number_of_devices(digits, plain_losses, count):
    """Fifty steps include the short last batches of two epochs."""
    trained = ctde.fit(
        MODEL,
        digits,
        optax.adam(0.01),
        devices=devices.start(count),
        batch_size=64,
        steps=50,
        seed=3,
        log_every=1,
        show=False,
    )
    np.testing.assert_allclose(losses(trained), plain_losses, rtol=1e-5)


@pytest.mark.slow
def test_gossip_of_two_replicas_equals_local_sgd(digits):
    """Gossip with weights 1/2 computes the mean, so it equals local SGD."""
    local, gossip = (
        ctde.fit(
            MODEL,
            digits,
            optax.adam(0.01),
            ctde.strategy(name, sync_every=4, **options),
            devices=devices.start(2),
            batch_size=64,
            steps=20,  # whole rounds of full batches
            eval_every=20,
            show=False,
        )
        for name, options in [("local-sgd", {}), ("gossip", {"graph": "exponential"})]
    )
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5),
        gossip.params,
        local.params,
    )
    assert gossip.history[-1]["loss"] == pytest.approx(local.history[-1]["loss"], rel=1e-4)


def test_strategy_starts_after_its_synchronous_steps(digits):
    """The first losses equal those of synchronous training; the optimizer state is kept."""

    def losses_of(strategy: ctde.Strategy, steps: int) -> list[float]:
        arguments = {"devices": devices.start(2), "batch_size": 64, "eval_every": 8, "log_every": 4}
        return losses(
            ctde.fit(
                MODEL, digits, optax.adam(0.01), strategy, steps=steps, show=False, **arguments
            )
        )

    post_local = ctde.Strategy(later={8: ctde.Strategy(inner_steps=4)})
    synchronous = losses_of(ctde.Strategy(), 16)
    later = losses_of(post_local, 16)
    np.testing.assert_array_equal(later[:2], synchronous[:2])
    assert later[2:] != synchronous[2:]
    np.testing.assert_allclose(later[2:], synchronous[2:], rtol=0.1)
    assert losses_of(post_local, 6) == losses_of(ctde.Strategy(), 6)


@pytest.mark.slow
def test_model_with_a_single_parameter_trains(digits):
    """The parameters have one leaf, and the model state has none."""

    class Linear(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.lines = nnx.Linear(64, 10, use_bias=False, rngs=rngs)

        def __call__(self, x):
            return self.lines(x.reshape(len(x), -1))

    arguments = {"devices": devices.start(2), "batch_size": 64, "epochs": 3, "show": False}
    for strategy in (ctde.Strategy(), LOCAL):
        trained = ctde.fit(models.from_nnx(Linear), digits, optax.adam(0.01), strategy, **arguments)
        assert trained.history[-1]["accuracy"] > 0.85


def test_history_counts_the_bytes_sent_by_each_device(digits):
    """Two rounds of synchronous gradients; each device sends the gradients and the weight."""
    arguments = {
        "devices": devices.start(4),
        "batch_size": 64,
        "steps": 2,
        "log_every": 1,
        "show": False,
    }
    trained = ctde.fit(MODEL, digits, optax.adam(0.01), **arguments)
    bytes_per_round = 2 * 3 / 4 * 4 * (64 * 16 + 16 + 16 * 10 + 10 + 1)
    assert [row["bytes_sent"] for row in trained.history if row["split"] == "train"] == [
        bytes_per_round,
        2 * bytes_per_round,
    ]
    assert trained.traffic.sent == bytes_per_round


def test_strategy_that_cannot_run_is_refused_before_compilation(digits):
    strategy = ctde.strategy("ddp", combine="krum", byzantine=2)
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, seconds, **_: compiled.append(event) if "backend_compile" in event else None
    )
    try:
        with pytest.raises(
            InputError, match=r"devices must be at least 7 .* for Krum with 2 Byzantine devices"
        ):
            ctde.fit(
                MODEL,
                digits,
                optax.adam(0.01),
                strategy,
                devices=jax.devices()[:4],
                batch_size=64,
                epochs=1,
            )
        assert not compiled
        jax.jit(lambda x: x + len(compiled))(1.0)
        assert compiled, "the listener must record compilations"
    finally:
        jax.monitoring.clear_event_listeners()


@pytest.mark.slow
@pytest.mark.parametrize("strategy", [ctde.Strategy(), LOCAL], ids=["synchronous", "local"])
def test_run_does_not_depend_on_its_division_into_dispatches(digits, strategy, monkeypatch):
    """One or several rounds per dispatch, a partial last dispatch and small spans: equal bits."""

    def run(eval_every: int, log_every: int, seconds: float, places: int = 2**20) -> ctde.Trained:
        monkeypatch.setattr(schedule, "_DISPATCH_SECONDS", seconds)
        monkeypatch.setattr(sources, "_PLACES", places)
        periods = {"eval_every": eval_every, "log_every": log_every}
        arguments = {
            "devices": devices.start(4),
            "batch_size": 64,
            "steps": 36,
            "show": False,
            **periods,
        }
        return ctde.fit(MODEL, digits, optax.adam(0.01), strategy, **arguments)

    first = run(36, 4, seconds=0)
    for other in (
        run(36, 4, seconds=100),
        run(36, 4, 100, places=64 * 12),
        run(36, 36, 0),
        run(36, 20, 0.1),
    ):
        assert_same_bits(other.params, first.params)
        assert other.history[-1]["loss"] == first.history[-1]["loss"]
    rows = [
        [(row["step"], row["loss"]) for row in run(16, 8, seconds).history] for seconds in (0, 100)
    ]
    assert rows[0] == rows[1]
    assert [step for step, _ in rows[0]] == [8, 16, 16, 24, 32, 32, 36, 36]


def test_every_function_is_traced_once_in_a_run(digits):
    """Full and partial dispatches, several epochs: one trace each to check, train and evaluate."""
    traces = []

    def loss(outputs, labels):
        traces.append(outputs.shape)
        return optax.softmax_cross_entropy_with_integer_labels(outputs, labels)

    ctde.fit(
        MODEL,
        digits,
        optax.sgd(0.1),
        task=ctde.Task(loss),
        devices=devices.start(2),
        batch_size=100,
        steps=40,
        log_every=4,
        show=False,
    )

    assert traces == [(2, 10), (50, 10), (180, 10)]


def test_examples_of_unequal_parts_are_seen_once_per_epoch(digits):
    """The metrics of an epoch count every example once, although the parts differ in size."""
    order = np.random.default_rng(0).permutation(len(digits.train.inputs))
    parts = np.split(order, [1000, 1400, 1420])
    trained = ctde.fit(
        MODEL,
        digits,
        optax.sgd(0.1),
        LOCAL,
        devices=devices.start(4),
        batch_size=64,
        epochs=2,
        partition=parts,
        show=False,
    )
    seen = sum(row["examples"] for row in trained.history if row["split"] == "train")
    assert seen == 2 * len(digits.train.inputs)
    assert trained.history[-1]["step"] == 2 * -(-1000 // 16)


@pytest.mark.slow
def test_devices_without_data_do_not_change_the_result(digits):
    """If one replica has all the data, local training equals training on that replica alone."""
    parts = [np.arange(len(digits.train.inputs)), *[np.zeros(0, int)] * 3]
    options = {"steps": 12, "show": False, "seed": 1}
    four = ctde.fit(
        MODEL,
        digits,
        optax.sgd(0.1),
        LOCAL,
        devices=devices.start(4),
        batch_size=64,
        partition=parts,
        **options,
    )
    one = ctde.fit(
        MODEL,
        digits,
        optax.sgd(0.1),
        LOCAL,
        devices=devices.start(1),
        batch_size=16,
        partition=parts[:1],
        **options,
    )
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), four.params, one.params
    )


class UserNnx(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.hidden = nnx.Linear(2, 32, rngs=rngs)
        self.norm = nnx.BatchNorm(32, rngs=rngs)
        self.out = nnx.Linear(32, 2, rngs=rngs)

    def __call__(self, x):
        return self.out(nnx.relu(self.norm(self.hidden(x))))


class UserLinen(flax.linen.Module):
    @flax.linen.compact
    def __call__(self, x, train: bool):
        x = flax.linen.relu(flax.linen.Dense(32)(x))
        x = flax.linen.Dropout(0.1, deterministic=not train)(x)
        return flax.linen.Dense(2)(x)


USER_MODELS = {"nnx": models.from_nnx(UserNnx), "linen": models.from_linen(UserLinen())}
STRATEGIES = {"synchronous": ctde.Strategy(), "local": LOCAL}


@pytest.mark.parametrize(
    "names",
    some([(model, name) for model in USER_MODELS for name in STRATEGIES], ("linen", "local")),
    ids="-".join,
)
def test_user_model_loss_and_optax_chain_learn(names):
    """Classifies points inside and outside a circle; model, loss and optimizer are the user's."""
    rng = np.random.default_rng(0)
    points = rng.normal(size=(1200, 2)).astype(np.float32)
    labels = (np.linalg.norm(points, axis=1) < 1.2).astype(np.int64)
    dataset = data.from_arrays(points[:1000], labels[:1000], points[1000:], labels[1000:])
    hinge = ctde.Task(
        loss=lambda outputs, labels: optax.hinge_loss(
            outputs[:, 1] - outputs[:, 0], 2.0 * labels - 1
        ),
        metrics={"accuracy": is_correct},
    )
    chain = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.01))

    trained = ctde.fit(
        USER_MODELS[names[0]],
        dataset,
        chain,
        STRATEGIES[names[1]],
        task=hinge,
        devices=devices.start(4),
        batch_size=40,
        epochs=12,
        show=False,
    )

    measured = trained.evaluate(dataset.test)
    assert measured["accuracy"] > 0.93
    assert measured["examples"] == 200
    predicted = trained.predict(dataset.test.inputs).argmax(-1)
    assert (predicted == dataset.test.labels).mean() == pytest.approx(measured["accuracy"])


def test_regression_requires_a_task_and_learns():
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(400, 3)).astype(np.float32)
    dataset = data.from_arrays(inputs, inputs @ np.float32([[1.0], [-2.0], [0.5]]))
    arguments = {"devices": devices.start(2), "batch_size": 20, "epochs": 20, "show": False}
    with pytest.raises(ctde.InputError, match=r"task must be given, as 'regression' or Task"):
        ctde.fit(models.mlp([3, 1]), dataset, optax.sgd(0.1), **arguments)

    task = ctde.Task(lambda outputs, targets: optax.squared_error(outputs, targets).mean(-1))
    trained = ctde.fit(models.mlp([3, 1]), dataset, optax.sgd(0.1), task=task, **arguments)

    assert trained.history[-1]["loss"] < 1e-6


def test_loss_averaged_over_the_batch_is_refused(digits):
    task = ctde.Task(
        lambda outputs, labels: optax.softmax_cross_entropy_with_integer_labels(
            outputs, labels
        ).mean()
    )
    with pytest.raises(ctde.InputError, match=r"one loss for each example.*\(2,\), got shape \(\)"):
        ctde.fit(
            MODEL,
            digits,
            optax.sgd(0.1),
            task=task,
            devices=devices.start(2),
            batch_size=64,
            steps=1,
        )


def test_metric_with_a_reserved_name_is_refused(digits):
    task = ctde.Task(
        optax.softmax_cross_entropy_with_integer_labels, {"loss": is_correct, "step": is_correct}
    )
    with pytest.raises(
        ctde.InputError, match="task must not have a metric with a reserved name, got loss, step;"
    ):
        ctde.fit(
            MODEL,
            digits,
            optax.sgd(0.1),
            task=task,
            devices=devices.start(2),
            batch_size=64,
            steps=1,
        )


def test_arrays_of_the_user_are_not_donated(digits):
    """The optimizer state may alias the parameters or a user's array, although it is donated."""
    anchor = jnp.ones(3)

    def init(params):
        return params, anchor

    chain = optax.chain(
        optax.GradientTransformation(init, lambda updates, state, params=None: (updates, state))
    )
    for strategy in (ctde.Strategy(), LOCAL):
        ctde.fit(
            MODEL,
            digits,
            optax.chain(chain, optax.sgd(0.1)),
            strategy,
            devices=devices.start(2),
            batch_size=64,
            steps=8,
            show=False,
        )
    np.testing.assert_array_equal(anchor, np.ones(3))


def test_state_is_donated_and_examples_stay_uint8(digits, monkeypatch):
    """During training, devices hold one copy of the state, and the examples as stored."""
    placed, states = [], []
    replicate, place = ctde.devices.replica.replicate, ctde.rounds.state.place
    monkeypatch.setattr(
        ctde.devices.replica, "replicate", lambda *a: placed.append(replicate(*a)) or placed[-1]
    )
    monkeypatch.setattr(
        ctde.rounds.state, "place", lambda *a: states.append(place(*a)) or states[-1]
    )
    ctde.fit(
        MODEL,
        digits,
        optax.adam(0.1),
        devices=devices.start(2),
        batch_size=64,
        steps=8,
        log_every=2,
        show=False,
    )

    examples = [tree for tree in placed if isinstance(tree, data.Split)]
    assert [tree.inputs.dtype for tree in examples] == [np.uint8]
    assert not examples[0].inputs.is_deleted()
    (first,) = states
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((first.params, first.opt_state))), (
        "the initial state must be donated"
    )


@pytest.mark.curves
def test_nonfinite_loss_stops_the_run_and_names_the_step(tmp_path, digits):
    """The learning rate becomes infinite at the fifth step."""
    optimizer = optax.sgd(lambda count: jnp.where(count == 4, jnp.inf, 0.01))
    with pytest.raises(ctde.NonFiniteLoss, match="step 6") as caught:
        ctde.fit(
            MODEL,
            digits,
            optimizer,
            devices=devices.start(2),
            batch_size=64,
            steps=40,
            log_every=2,
            run_dir=tmp_path,
            show=False,
        )
    assert caught.value.step == 6
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4]
    assert (tmp_path / "curves.png").stat().st_size > 1000


def test_nonfinite_update_in_the_last_step_is_detected(digits):
    """The loss of every step is finite; only the evaluation detects the last update."""
    optimizer = optax.sgd(lambda count: jnp.where(count == 4, jnp.inf, 0.01))
    with pytest.raises(ctde.NonFiniteLoss, match="step 5"):
        ctde.fit(
            MODEL, digits, optimizer, devices=devices.start(2), batch_size=64, steps=5, show=False
        )


@pytest.mark.curves
def test_ctrl_c_returns_the_model_trained_so_far(tmp_path, digits):
    """The signal arrives during the run; the folder then matches the result."""
    metrics = tmp_path / "metrics.jsonl"

    def interrupt():
        while not (metrics.exists() and metrics.stat().st_size):
            time.sleep(0.05)
        signal.raise_signal(signal.SIGINT)

    interrupter = threading.Thread(target=interrupt)
    interrupter.start()
    trained = ctde.fit(
        MODEL,
        digits,
        optax.adam(0.01),
        devices=devices.start(2),
        batch_size=64,
        epochs=100_000,
        run_dir=tmp_path,
        show=False,
    )
    interrupter.join()

    assert trained.interrupted
    assert trained.history[-1]["split"] == "test"
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert rows == trained.history
    assert (tmp_path / "curves.png").stat().st_size > 1000


def test_fake_devices_on_too_small_a_thread_pool_are_refused(monkeypatch, digits):
    monkeypatch.setenv("NPROC", "2")
    with pytest.raises(ctde.InputError, match=r"thread pool .* ctde_jax.devices.start\(4\)"):
        ctde.fit(MODEL, digits, optax.sgd(0.1), devices=jax.devices()[:4], batch_size=64, steps=1)


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        (
            "model",
            3,
            r"model must be an nnx or linen module, .* such as models.mlp\(...\), .* got int 3",
        ),
        (
            "model",
            models.mlp([64, 5]),
            r"model must return outputs of shape \[examples, 10\].* got \[1, 5\]",
        ),
        (
            "accumulation_steps",
            3,
            "accumulation_steps must divide the 16 examples of a device's batch, got 3",
        ),
        ("ema_decay", 1.0, "ema_decay must be at least 0 and less than 1, got 1.0"),
        ("patience", 2, "patience requires a validation split"),
        (
            "reestimate_batches",
            4,
            "reestimate_batches requires a model with batch statistics; set it to 0",
        ),
        (
            "model",
            models.mlp([10, 10]),
            "layer_sizes must start with the size of a flattened input, 64, got 10",
        ),
        (
            "optimizer",
            optax.adam,
            r"optimizer must be an optax transformation, such as optax.adam\(0.001\), got function",
        ),
        ("strategy", 8, r"strategy must be a Strategy, .*, got int 8"),
        ("task", is_correct, r"task must be a Task, such as Task\("),
        ("data", (1, 2), r"data must be a Dataset, such as data.digits\(\)"),
        ("seed", -1, "seed must be from 0 to 4294967295, got -1"),
    ],
)
def test_invalid_argument_is_named(digits, name, value, sentence):
    arguments = {
        "model": MODEL,
        "data": digits,
        "optimizer": optax.sgd(0.1),
        "batch_size": 64,
        "steps": 1,
    }
    with pytest.raises(ctde.InputError, match=sentence):
        ctde.fit(**arguments | {name: value}, devices=devices.start(4))


def test_repr_of_data_and_results_is_one_line(digits):
    trained = ctde.fit(
        MODEL, digits, optax.sgd(0.1), batch_size=64, steps=2, devices=devices.start(2), show=False
    )
    assert repr(digits) == "Dataset('digits', 1,438 training and 359 test examples, 10 classes)"
    assert repr(trained).startswith("Trained(step 2, epoch 0.087, loss 2.")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            {"batch_size": 66, "steps": 1},
            "batch_size must be a multiple of the 4 devices, got 66; use 64.",
        ),
        (
            {"batch_size": 1440, "steps": 1},
            "at most the number of training examples, 1,438, got 1440; use 1436.",
        ),
        (
            {"batch_size": 64},
            "epochs or steps must be set, but not both, got epochs=None and steps=None.",
        ),
        ({"batch_size": 64, "epochs": 0}, "epochs must be at least 1, got 0."),
        ({"batch_size": 64, "steps": 1, "eval_every": 0}, "eval_every must be at least 1, got 0."),
        ({"batch_size": 64, "steps": 1, "log_every": 0}, "log_every must be at least 1, got 0."),
        (
            {"batch_size": 64, "steps": 1, "partition": [np.arange(9)] * 4},
            "partition must assign each",
        ),
    ],
)
def test_invalid_batch_size_or_period_is_named(digits, arguments, sentence):
    with pytest.raises(ctde.InputError) as caught:
        ctde.fit(MODEL, digits, optax.sgd(0.1), devices=devices.start(4), **arguments)
    assert sentence in str(caught.value)


@pytest.mark.slow
def test_average_of_the_parameters_is_evaluated_and_returned(digits):
    """With decay 0 the average equals the parameters; with decay near 1, the initial parameters."""
    arguments = {"batch_size": 64, "steps": 46, "devices": devices.start(2), "show": False}
    plain = ctde.fit(MODEL, digits, optax.adam(0.01), **arguments)
    same = ctde.fit(MODEL, digits, optax.adam(0.01), ema_decay=0.0, **arguments)
    start = ctde.fit(MODEL, digits, optax.adam(0.01), ema_decay=0.99999, **arguments)
    assert same.tested["loss"] == pytest.approx(plain.tested["loss"], rel=1e-5)
    assert losses(start) == losses(plain), "the average must not change the training"
    assert start.tested["accuracy"] < 0.5 < plain.tested["accuracy"]
    assert start.evaluate(digits.test)["loss"] == pytest.approx(start.tested["loss"], rel=1e-5)


def test_patience_ends_the_training_and_returns_the_best(digits):
    """A learning rate that is too high after step 40 makes the validation loss rise."""
    held = data.hold_out(digits, 0.2)
    too_fast = optax.sgd(optax.piecewise_constant_schedule(0.1, {40: 100.0}))
    options = {
        "batch_size": 64,
        "epochs": 20,
        "eval_every": 8,
        "patience": 3,
        "devices": devices.start(2),
    }
    trained = ctde.fit(MODEL, held, too_fast, LOCAL, show=False, **options)
    validated = {
        row["step"]: row["loss"] for row in trained.history if row["split"] == "validation"
    }
    assert trained.stopped_early
    assert trained.step == min(validated, key=validated.get)
    assert trained.history[-1]["step"] == trained.step + 3 * 8
    assert trained.evaluate(held.validation)["loss"] == pytest.approx(
        validated[trained.step], rel=1e-5
    )
    assert trained.tested["step"] == trained.step


def test_run_with_a_falling_loss_is_not_stopped_early(digits):
    held = data.hold_out(digits, 0.2)
    trained = ctde.fit(
        MODEL, held, optax.sgd(0.01), batch_size=64, epochs=2, patience=5, show=False
    )
    assert not trained.stopped_early
    assert trained.step == trained.history[-1]["step"] == 2 * 18


@pytest.mark.slow
def test_reestimated_statistics_are_evaluated(digits):
    """After a few steps, initial running averages still affect the test loss."""
    model = models.resnet((8, 8), 10, channels=(8,), norm="batch")
    arguments = {"batch_size": 64, "steps": 20, "devices": devices.start(2), "show": False}
    running = ctde.fit(model, digits, optax.adam(0.01), **arguments)
    reestimated = ctde.fit(model, digits, optax.adam(0.01), reestimate_batches=10, **arguments)
    assert losses(reestimated) == losses(running)
    assert reestimated.tested["loss"] < running.tested["loss"]
