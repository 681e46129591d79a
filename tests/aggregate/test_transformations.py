"""Any optax transformation trains as in a plain loop, or is refused by name before compilation."""

import shutil
from functools import cache, partial
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from cases import some
from jax import numpy as jnp
from optax import contrib

import ctde_jax as ctde
from ctde_jax import checkpoint, devices, models
from ctde_jax.aggregate import transformations
from ctde_jax.data import batches
from ctde_jax.models import tasks

FEATURES, CLASSES, EXAMPLES, BATCH, STEPS = 6, 3, 42, 16, 20
MODEL = models.mlp([FEATURES, 5, CLASSES])


def by_name(params):
    """Labels kernels and biases, as `optax.multi_transform` and `optax.masked` take them."""
    return jax.tree.map(lambda x: "kernel" if x.ndim > 1 else "bias", params)


def is_kernel(params):
    return jax.tree.map(lambda x: x.ndim > 1, params)


OPTIMIZERS = {
    "sgd": lambda: optax.sgd(0.1, momentum=0.9, nesterov=True),
    "adam": lambda: optax.adam(0.05),
    "clipped adamw": lambda: optax.chain(
        optax.clip_by_global_norm(0.5), optax.adamw(0.05, mask=is_kernel)
    ),
    "adafactor": lambda: optax.adafactor(0.05, min_dim_size_to_factor=2),
    "sm3": lambda: optax.sm3(0.1),
    "lars": lambda: optax.lars(0.1),
    "lamb": lambda: optax.lamb(0.01),
    "muon": lambda: contrib.muon(0.05),
    "galore": lambda: contrib.galore(0.05, rank=2),
    "ademamix": lambda: contrib.ademamix(0.01),
    "simplified ademamix": lambda: contrib.simplified_ademamix(0.01),
    "adan": lambda: optax.adan(0.01),
    "acprop": lambda: contrib.acprop(0.01),
    "adopt": lambda: contrib.adopt(0.01),
    "madgrad": lambda: contrib.madgrad(0.01),
    "d-adaptation": lambda: contrib.dadapt_adamw(1.0),
    "prodigy": lambda: contrib.prodigy(),
    "dog": lambda: contrib.dog(1.0),
    "cocob": lambda: contrib.cocob(),
    "mechanize": lambda: contrib.mechanize(optax.adam(0.01)),
    "optimistic": lambda: optax.optimistic_gradient_descent(0.1),
    "rprop": lambda: optax.rprop(0.01),
    "yogi": lambda: optax.yogi(0.05),
    "novograd": lambda: optax.novograd(0.01),
    "lion": lambda: optax.lion(0.01),
    "nadamw": lambda: optax.nadamw(0.01),
    "rmsprop": lambda: optax.rmsprop(0.01, momentum=0.9, centered=True),
    "noisy sgd": lambda: optax.noisy_sgd(0.1, key=jax.random.key(1)),
    "apply every": lambda: optax.chain(optax.apply_every(3), optax.sgd(0.1)),
    "apply if finite": lambda: optax.apply_if_finite(optax.adam(0.05), 3),
    "injected schedule": lambda: optax.inject_hyperparams(optax.adam)(
        optax.linear_schedule(0.1, 0.0, STEPS)
    ),
    "frozen biases": lambda: optax.multi_transform(
        {"kernel": optax.adam(0.05), "bias": optax.set_to_zero()}, by_name
    ),
    "MultiSteps": lambda: optax.MultiSteps(
        optax.adam(0.05), 3, should_skip_update_fn=optax.skip_not_finite
    ),
    "sam": lambda: contrib.sam(
        optax.sgd(0.1), optax.chain(contrib.normalize(), optax.sgd(0.05)), sync_period=3
    ),
    "polyak sgd": lambda: optax.polyak_sgd(0.5),
    "momo": lambda: contrib.momo(0.1),
    "momo adam": lambda: contrib.momo_adam(0.01),
    "reduce on plateau": lambda: optax.chain(
        optax.adam(0.05), contrib.reduce_on_plateau(patience=1, accumulation_size=2, rtol=0.2)
    ),
    "MultiSteps of momo": lambda: optax.MultiSteps(contrib.momo(0.1), 2).gradient_transformation(),
    "lookahead": lambda: optax.lookahead(optax.adam(0.05), 3, 0.5),
    "schedule-free": lambda: contrib.schedule_free_adamw(0.05, warmup_steps=2),
    "clipped schedule-free": lambda: optax.chain(
        optax.clip(1.0), contrib.schedule_free(optax.adam(0.05, b1=0.0), 0.05)
    ),
    "injected schedule-free": lambda: optax.inject_hyperparams(contrib.schedule_free_sgd)(0.1),
    "MultiSteps of schedule-free": lambda: optax.MultiSteps(contrib.schedule_free_sgd(0.2), 2),
    "schedule-free if finite": lambda: optax.apply_if_finite(contrib.schedule_free_sgd(0.1), 3),
    "schedule-free kernels": lambda: optax.multi_transform(
        {"kernel": contrib.schedule_free_sgd(0.1), "bias": contrib.schedule_free_sgd(0.2)}, by_name
    ),
}
TAKING_VALUE = {"polyak sgd", "momo", "momo adam", "reduce on plateau", "MultiSteps of momo"}
SCHEDULE_FREE_STATE = {
    "schedule-free": lambda state: state,
    "clipped schedule-free": lambda state: state[1],
    "injected schedule-free": lambda state: state.inner_state,
    "MultiSteps of schedule-free": lambda state: state.inner_opt_state,
    "schedule-free if finite": lambda state: state.inner_state,
}
"""Functions that return the state that optax's `schedule_free_eval_params` takes."""


@cache
def dataset() -> ctde.data.Dataset:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, CLASSES, EXAMPLES)
    inputs = (
        2 * rng.normal(size=(CLASSES, FEATURES))[labels] + rng.normal(size=(EXAMPLES, FEATURES))
    ).astype(np.float32)
    return ctde.data.from_arrays(inputs, labels, inputs[:8], labels[:8])


def fit(optimizer, count: int = 4, **more) -> ctde.Trained:
    options = {"batch_size": BATCH, "steps": STEPS, "log_every": 1, "show": False, **more}
    return ctde.fit(
        options.pop("model", MODEL),
        options.pop("data", dataset()),
        optimizer,
        devices=devices.start(count),
        **options,
    )


def losses(trained: ctde.Trained) -> list[float]:
    return [row["loss"] for row in trained.history if row["split"] == "train"]


def plain_loop(name: str) -> tuple[list[float], dict]:
    """Returns the losses of a loop as in optax's documentation, and the parameters to evaluate."""
    optimizer, train = OPTIMIZERS[name](), dataset().train
    params, _ = MODEL.init(jax.random.split(jax.random.key(0))[0], jnp.zeros((1, FEATURES)))
    if name == "lookahead":
        params = optax.LookaheadParams.init_synced(params)
    state = optimizer.init(params)

    @jax.jit
    def step(params, state, inputs, labels):
        def loss_of(params):
            hidden = jnp.tanh(
                inputs @ params["layers"][0]["kernel"] + params["layers"][0]["bias"][None]
            )
            outputs = hidden @ params["layers"][1]["kernel"] + params["layers"][1]["bias"][None]
            return -jax.nn.log_softmax(outputs)[jnp.arange(len(labels)), labels].mean()

        loss, grads = jax.value_and_grad(loss_of)(params.fast if name == "lookahead" else params)
        extra_args = {"value": loss} if name in TAKING_VALUE else {}
        updates, state = optimizer.update(grads, state, params, **extra_args)
        return optax.apply_updates(params, updates), state, loss

    found = []
    for row in batches.deal(train, 1, BATCH, 0).steps(0, STEPS)[:, 0]:
        present = row[row >= 0]
        params, state, loss = step(params, state, train.inputs[present], train.labels[present])
        found.append(float(loss))
    if name == "lookahead":
        params = params.slow
    if name == "sam":
        params = state.cache  # the last step was adversarial
    if name in SCHEDULE_FREE_STATE:
        params = contrib.schedule_free_eval_params(SCHEDULE_FREE_STATE[name](state), params)
    if name == "schedule-free kernels":
        states = {label: masked.inner_state for label, masked in state.inner_states.items()}
        params = jax.tree.map(
            lambda label, y, z, other: (
                (y - (1 - states[label].b1) * (z if label == "kernel" else other))
                / states[label].b1
            ),
            by_name(params),
            params,
            _filled(states["kernel"].z, params),
            _filled(states["bias"].z, params),
        )
    return found, params


def _filled(masked, params):
    """Replaces masked leaves by the parameters."""

    def is_masked(node) -> bool:
        return isinstance(node, optax.MaskedNode)

    return jax.tree.map(lambda z, y: y if is_masked(z) else z, masked, params, is_leaf=is_masked)


@pytest.fixture(scope="module")
def on_four(tmp_path_factory):
    """Returns a cached run on four devices, with a checkpoint after every five steps."""

    @cache
    def run(name: str) -> tuple[ctde.Trained, Path]:
        folder = tmp_path_factory.mktemp("four") / "run"
        return fit(OPTIMIZERS[name](), run_dir=folder, **SAVED), folder

    return run


SAVED = {"save_every": 5, "keep_checkpoints": 5}


@pytest.mark.parametrize("name", some(OPTIMIZERS, "MultiSteps", "lookahead"))
def test_optimizer_trains_as_in_a_plain_loop_on_one_and_four_devices(name, on_four):
    """Losses and evaluated parameters are equal, also with short last batches."""
    expected, params = plain_loop(name)
    for trained in (fit(OPTIMIZERS[name](), 1), on_four(name)[0]):
        np.testing.assert_allclose(losses(trained), expected, rtol=1e-5)
        jax.tree.map(
            partial(np.testing.assert_allclose, rtol=1e-4, atol=2e-5), trained.params, params
        )
        outputs, _ = MODEL.apply(params, {}, dataset().test.inputs, None)
        loss = optax.softmax_cross_entropy_with_integer_labels(
            outputs, dataset().test.labels
        ).mean()
        assert trained.tested["loss"] == pytest.approx(float(loss), rel=1e-4)


@pytest.mark.slow
def test_lbfgs_with_a_learning_rate_trains_as_in_a_plain_loop():
    """Five steps on all examples: L-BFGS amplifies rounding errors a thousandfold within twenty."""
    optimizer, params, expected = optax.lbfgs(0.1, linesearch=None), first_params(), []
    state = optimizer.init(params)

    @jax.jit
    def step(params, state):
        loss, grads = jax.value_and_grad(first_loss)(params, np.arange(EXAMPLES))
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    for _ in range(5):
        params, state, loss = step(params, state)
        expected.append(float(loss))
    for count in (1, 2):
        trained = fit(optimizer, count, batch_size=EXAMPLES, steps=5)
        np.testing.assert_allclose(losses(trained), expected, rtol=1e-5)


def tensors(folder: Path) -> dict[str, bytes]:
    found = checkpoint.read(checkpoint.newest(folder / "checkpoints"))
    return {name: tensor.tobytes() for name, tensor in found.tensors.items()}


@pytest.mark.parametrize("name", some(OPTIMIZERS, "noisy sgd", "lookahead", "MultiSteps"))
def test_resumed_run_has_the_bits_of_an_uninterrupted_run(name, on_four, tmp_path):
    """The later checkpoints are deleted, as if the run had been killed after step 10."""
    whole, folder = on_four(name)
    shutil.copytree(folder, tmp_path / "killed")
    for step in checkpoint.steps(tmp_path / "killed" / "checkpoints"):
        if step > 10:
            shutil.rmtree(checkpoint.path_of(tmp_path / "killed" / "checkpoints", step))
    again = fit(OPTIMIZERS[name](), run_dir=tmp_path / "killed", **SAVED)
    assert again.seconds["train"] > 0, "nothing was trained, so nothing was compared"
    assert tensors(tmp_path / "killed") == tensors(folder)
    assert losses(again) == losses(whole)
    assert again.tested["loss"] == whole.tested["loss"]
    jax.tree.map(np.testing.assert_array_equal, again.params, whole.params)


# Extra arguments


def recorder(*names: str) -> optax.GradientTransformationExtraArgs:
    """Keeps the parameters unchanged, and the last extra arguments in its state."""

    def init(params):
        return {
            name: optax.tree.zeros_like(params) if name == "grad" else jnp.zeros(())
            for name in names
        }

    def update(updates, state, params=None, **extra_args):
        return optax.tree.zeros_like(updates), {name: extra_args[name] for name in names}

    return optax.GradientTransformationExtraArgs(init, update)


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [{}, {"accumulation_steps": 2}, {"strategy": ctde.Strategy(exact=True)}],
    ids=["batch", "microbatches", "exact"],
)
def test_extra_arguments_are_those_of_the_global_batch(more):
    """The third batch has 10 examples, so 4 replicas have unequal numbers of them."""
    trained = fit(recorder("value", "loss", "grad"), steps=3, **more)
    order = batches.deal(dataset().train, 1, BATCH, 0).steps(0, 3)[2].ravel()
    value, grads = jax.value_and_grad(first_loss)(first_params(), order[order >= 0])
    assert trained.opt_state["value"] == pytest.approx(float(value), rel=1e-6)
    assert trained.opt_state["loss"] == trained.opt_state["value"]
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-6), trained.opt_state["grad"], grads)


def first_params():
    return MODEL.init(jax.random.split(jax.random.key(0))[0], jnp.zeros((1, FEATURES)))[0]


def first_loss(params, examples, targets=None):
    """The mean loss over some training examples."""
    outputs, _ = MODEL.apply(params, {}, dataset().train.inputs[examples], None)
    one_hot = jax.nn.one_hot(dataset().train.labels[examples], CLASSES)
    return optax.softmax_cross_entropy(
        outputs, one_hot if targets is None else targets(one_hot)
    ).mean()


def test_value_is_the_minimized_loss_and_not_the_reported_loss():
    smoothed = tasks.smoothed(tasks.classification, 0.3)
    trained = fit(recorder("value"), task=smoothed, steps=1)
    order = batches.deal(dataset().train, 1, BATCH, 0).steps(0, 1).ravel()
    expected = first_loss(first_params(), order, lambda one_hot: 0.7 * one_hot + 0.1)
    assert trained.opt_state["value"] == pytest.approx(float(expected), rel=1e-5)
    assert "objective" not in trained.history[0]
    assert trained.history[0]["loss"] != pytest.approx(float(expected), rel=1e-3)


@pytest.mark.slow
def test_value_in_local_steps_is_the_loss_of_the_examples_of_the_replica():
    trained = fit(recorder("value"), strategy=ctde.Strategy(inner_steps=1), steps=1)
    values = trained.opt_state["value"]
    assert values.shape == (4,)
    for order, value in zip(
        batches.deal(dataset().train, 4, BATCH, 0).steps(0, 1)[0], values, strict=True
    ):
        assert value == pytest.approx(float(first_loss(first_params(), order)), rel=1e-5)


@pytest.mark.slow
def test_value_of_the_outer_optimizer_is_the_mean_loss_of_the_round(tmp_path):
    """The rounds have 32 and 28 examples."""
    outer = optax.chain(optax.sgd(1.0), contrib.reduce_on_plateau(accumulation_size=10**6))
    strategy = ctde.Strategy(inner_steps=2, outer=outer)
    trained = fit(optax.sgd(0.1), strategy=strategy, steps=4, log_every=2, run_dir=tmp_path)
    found = checkpoint.read(checkpoint.newest(tmp_path / "checkpoints"))
    assert len(losses(trained)) == 2
    assert found.tensors["outer_state/1/avg_value"] == pytest.approx(
        np.mean(losses(trained)), rel=1e-5
    )


def scaled_by_value() -> optax.GradientTransformationExtraArgs:
    """Accepts no other extra argument."""

    def update(updates, state, params=None, *, value):
        return optax.tree.scale(-0.1 * value, updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


@pytest.mark.slow
def test_update_receives_only_the_arguments_in_its_signature():
    """Alone, in a chain, and in local steps, which pass `anchor` as well."""
    expected = losses(fit(scaled_by_value(), steps=5))
    assert losses(fit(optax.chain(scaled_by_value(), optax.identity()), steps=5)) == expected
    assert expected != losses(fit(optax.sgd(0.1), steps=5))
    fit(scaled_by_value(), strategy=ctde.Strategy(inner_steps=2), steps=5)


@pytest.mark.slow
def test_value_is_sent_only_if_the_optimizer_reads_it():
    """A float32 and its weight: 2 (R - 1) / R * 8 bytes."""
    sent = {
        name: fit(optimizer, steps=1).traffic.sent
        for name, optimizer in {
            "plain": optax.GradientTransformation(*optax.sgd(0.1)),
            "takes extra arguments": optax.chain(optax.clip(1.0), optax.adam(0.1)),
            "reads the value": optax.polyak_sgd(0.1),
        }.items()
    }
    assert sent["takes extra arguments"] == sent["plain"]
    assert sent["reads the value"] == sent["plain"] + 2 * 3 / 4 * 8


# States


def with_state(first, then=lambda x: x) -> optax.GradientTransformation:
    def update(updates, state, params=None):
        return optax.tree.scale(-0.1, updates), then(state)

    return optax.GradientTransformation(lambda params: first(params), update)


STATES = {
    "Python numbers": (lambda params: {"count": 0, "rate": 0.5, "done": False}, None),
    "none and empty": (lambda params: (None, (), {"nothing": []}, jnp.zeros((0, 3))), None),
    "keys": (lambda params: {"typed": jax.random.key(3), "raw": jax.random.PRNGKey(3)}, None),
    "becomes a float": (lambda params: jnp.int32(1), lambda x: x * 0.5),
    "Python number, becomes a float": (lambda params: 1, lambda x: x * jnp.float32(0.5)),
    "becomes a longer float": (lambda params: jnp.bfloat16(1), lambda x: x * jnp.float32(0.5)),
    "normalized parameters": (
        lambda params: jax.tree.map(lambda x: x / jnp.maximum(jnp.abs(x).max(), 1e-3), params),
        None,
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("inner_steps", [0, 2])
def test_state_may_have_any_leaves(inner_steps, tmp_path):
    """It is also restored from a checkpoint."""
    optimizer = with_state(
        lambda params: {name: first(params) for name, (first, _) in STATES.items()},
        lambda state: {
            name: state[name] if then is None else then(state[name])
            for name, (_, then) in STATES.items()
        },
    )
    run = partial(
        fit,
        strategy=ctde.Strategy(inner_steps=inner_steps),
        save_every=2,
        run_dir=tmp_path,
        steps=4,
    )
    trained, restored = run(optimizer), run(optimizer)
    assert jax.tree.structure(trained.opt_state) == jax.tree.structure(restored.opt_state)
    for leaf, other in zip(
        jax.tree.leaves(trained.opt_state), jax.tree.leaves(restored.opt_state), strict=True
    ):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf, other = jax.random.key_data(leaf), jax.random.key_data(other)
        np.testing.assert_array_equal(leaf, other)
        assert leaf.shape[:1] == (4,) or not inner_steps
    for name in STATES:
        if "becomes" in name:
            np.testing.assert_array_equal(
                trained.opt_state[name], np.full((4,) if inner_steps else (), 0.5**4)
            )


@pytest.mark.slow
def test_returned_optimizer_state_works_with_optax():
    trained = fit(optax.adam(0.05))
    assert optax.tree.get(trained.opt_state, "count") == STEPS
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(trained.opt_state))
    optax.adam(0.05).update(trained.params, trained.opt_state, trained.params)
    assert len(repr(trained)) < 120


@pytest.mark.slow
def test_optimizer_state_with_patience_or_rollback_is_that_of_the_last_step(tmp_path):
    held = ctde.data.hold_out(dataset(), 0.3, 0)
    trained = fit(optax.adam(1.0), data=held, patience=1, eval_every=2, steps=100)
    last = max(row["step"] for row in trained.history)
    assert trained.step < last
    assert optax.tree.get(trained.opt_state, "count") == last
    rolling = fit(
        optax.MultiSteps(optax.adam(0.05), 2), on_nonfinite="rollback", run_dir=tmp_path, steps=4
    )
    assert rolling.opt_state.gradient_step == 2


# Optimizers that are evaluated at another point than they are trained at


@pytest.mark.slow
def test_checkpoint_of_schedule_free_training_has_both_points(tmp_path):
    """The best parameters are an evaluated point, the current ones the point of the gradients."""
    held = ctde.data.hold_out(dataset(), 0.3, 0)
    optimizer = contrib.schedule_free_sgd(0.3)
    run = partial(fit, optimizer, data=held, patience=50, eval_every=5)
    whole = run(run_dir=tmp_path / "run")
    found = checkpoint.read(checkpoint.newest(tmp_path / "run" / "checkpoints"))
    assert (
        found.tensors["best/0/layers/0/kernel"].tobytes()
        == whole.params["layers"][0]["kernel"].tobytes()
    )
    assert (found.tensors["params/layers/0/kernel"] != whole.params["layers"][0]["kernel"]).any()
    averages = whole.evaluate(held.validation)
    assert averages["loss"] == pytest.approx(
        min(r["loss"] for r in whole.history if r["split"] == "validation"), 1e-5
    )


@pytest.mark.slow
def test_lookahead_equals_local_steps_with_an_outer_learning_rate():
    """On one device; `sync_period` is the local steps, `slow_step_size` the outer learning rate."""
    ahead = fit(optax.lookahead(optax.adam(0.05), 5, 0.5), count=1)
    local = fit(
        optax.adam(0.05), count=1, strategy=ctde.Strategy(inner_steps=5, outer=optax.sgd(0.5))
    )
    jax.tree.map(
        partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), ahead.params, local.params
    )


@pytest.mark.slow
def test_schedule_free_outer_optimizer_is_evaluated_at_its_average(tmp_path):
    outer = contrib.schedule_free_sgd(0.7)
    trained = fit(
        optax.sgd(0.1), strategy=ctde.Strategy(inner_steps=4, outer=outer), run_dir=tmp_path
    )
    found = checkpoint.read(checkpoint.newest(tmp_path / "checkpoints")).tensors
    y, z, b1 = (
        found[name]
        for name in ("params/layers/0/kernel", "outer_state/z/layers/0/kernel", "outer_state/b1")
    )
    np.testing.assert_allclose(
        trained.params["layers"][0]["kernel"], (y - (1 - b1) * z) / b1, rtol=1e-5
    )


# Refused optimizers


def scaled_by_curvature() -> optax.GradientTransformationExtraArgs:
    def update(updates, state, params=None, *, batch, **extra_args):
        return updates, state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


LOCAL = {"strategy": ctde.Strategy(inner_steps=2)}
REFUSED = {
    "lbfgs": (
        lambda: optax.lbfgs(),
        {},
        "optimizer .*scale_by_zoom_linesearch requires `value_fn`.* linesearch=None",
    ),
    "backtracking": (
        lambda: optax.chain(optax.sgd(0.1), optax.scale_by_backtracking_linesearch(5)),
        {},
        "scale_by_backtracking_linesearch requires `value_fn`.*use a learning rate",
    ),
    "opaque sam": (
        lambda: contrib.sam(optax.sgd(0.1), optax.sgd(0.1), opaque_mode=True),
        {},
        r"sam requires `grad_fn`.*use optax.contrib.sam\(..., opaque_mode=False\)",
    ),
    "sophia": (
        lambda: contrib.sophia(0.1),
        {},
        "hutchinson_estimator_diag_hessian requires `obj_fn`.*optax.adamw",
    ),
    "dpsgd": (
        lambda: optax.chain(
            contrib.differentially_private_aggregate(1.0, 1.0, key=0), optax.sgd(0.1)
        ),
        {},
        (
            "must not contain differentially_private_aggregate .*the gradient of every "
            "example.*aggregate.private"
        ),
    ),
    "unknown required argument": (
        lambda: optax.chain(optax.sgd(0.1), scaled_by_curvature()),
        {},
        r"that a step passes \(value, loss, grad\), but scaled_by_curvature requires 'batch'",
    ),
    "labels of another tree": (
        lambda: optax.multi_transform({"a": optax.sgd(0.1)}, {"dense": "a"}),
        {},
        (
            r"the parameters of this model \(layers/0/bias \[5\], .*\), but .*raised ValueError: "
            ".*must have the structure of the parameters"
        ),
    ),
    "mask of another tree": (
        lambda: optax.masked(optax.sgd(0.1), {"dense": True}),
        {},
        "but masked raised ValueError: .*must have the structure of the parameters",
    ),
    "updates of another shape": (
        lambda: optax.stateless(lambda updates, params: jax.tree.map(jnp.sum, updates)),
        {},
        (
            r"must return updates with the structure and shapes of the parameters .*got "
            r"layers/0/bias \[\]"
        ),
    ),
    "a state that grows": (
        lambda: with_state(lambda params: jnp.zeros(1), lambda x: jnp.append(x, 0)),
        {},
        (
            r"must keep the shapes and dtypes of its state, but an update changes .* from "
            r"float32\[1\] to float32\[2\]"
        ),
    ),
    "a state that becomes a list": (
        lambda: with_state(lambda params: (jnp.float32(0),), list),
        {},
        "optimizer must not change the structure of its state in an update",
    ),
    "a state that is rounded": (
        lambda: with_state(
            lambda params: {"x": jnp.float32(0)},
            lambda state: {"x": state["x"].astype(jnp.bfloat16)},
        ),
        {},
        r"but an update changes x from float32\[\] to bfloat16\[\]",
    ),
    "a function in the state": (
        lambda: with_state(lambda params: {"fn": jnp.tanh}),
        {},
        "raised TypeError",
    ),
    "Python control flow": (
        lambda: with_state(
            lambda params: jnp.int32(0), lambda state: state + 1 if state else state
        ),
        {},
        "raised TracerBoolConversionError",
    ),
    "not called": (lambda: optax.adam, {}, "must be an optax transformation, such as optax.adam"),
    "schedule-free in local steps": (
        lambda: contrib.schedule_free_sgd(0.1),
        LOCAL,
        "must not be schedule_free in local steps.*aggregate at every step",
    ),
    "lookahead in local steps": (
        lambda: optax.lookahead(optax.sgd(0.1), 5, 0.5),
        LOCAL,
        "must not be lookahead in",
    ),
    "cocob in local steps": (lambda: contrib.cocob(), LOCAL, "must not be cocob in local steps"),
    "schedule-free with EMA": (
        lambda: contrib.schedule_free_sgd(0.1),
        {"ema_decay": 0.9},
        "ema_decay cannot be combined with schedule_free",
    ),
    "schedule-free rolled back": (
        lambda: contrib.schedule_free_sgd(0.1),
        {"on_nonfinite": "rollback", "run_dir": "unused"},
        "on_nonfinite must not be rollback with schedule_free.*use skip",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_unsupported_optimizer_is_refused_before_compilation(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    make, more, sentence = REFUSED[name]
    monkeypatch.setattr(
        ctde.devices.replica, "compiled", lambda *arguments: pytest.fail("compiled")
    )
    with pytest.raises(ctde.InputError, match=sentence) as found:
        fit(make(), **more)
    assert not list(tmp_path.iterdir())
    assert "\n" not in str(found.value)
    print(f"{name}: {found.value}")


@pytest.mark.parametrize(
    ("names", "shapes"),
    [("abc", "a [2], b [2], c [2]"), ("abcde", "a [2], b [2], c [2] and 2 more")],
)
def test_refusal_lists_three_shapes_and_counts_the_others(names, shapes):
    only_first = optax.stateless(lambda updates, params: {"a": updates["a"]})
    with pytest.raises(ctde.InputError) as found:
        transformations.traced(only_first, dict.fromkeys(names, jnp.zeros(2)), "optimizer")
    assert str(found.value) == (
        "optimizer must return updates with the structure and shapes of the parameters "
        f"({shapes}), got a [2]."
    )


def test_error_of_an_outer_optimizer_names_outer():
    with pytest.raises(
        ctde.InputError,
        match=r"^outer must require only the arguments .*, but scale_by_zoom_linesearch requires",
    ):
        fit(optax.sgd(0.1), strategy=ctde.Strategy(inner_steps=2, outer=optax.lbfgs()))


def test_evaluated_point_of_an_ordinary_optimizer_is_its_parameters():
    params = first_params()
    for name in ("adam", "frozen biases", "mechanize"):
        state = OPTIMIZERS[name]().init(params)
        assert transformations.evaluated_point(state, params) is params
        assert not transformations.has_evaluated_point(state)
