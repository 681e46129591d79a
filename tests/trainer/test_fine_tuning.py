"""Fine-tuning: frozen parameters stay and are not sent; low-rank changes are those of the paper."""

from functools import partial

import jax
import numpy as np
import optax
import pytest
from cases import STRATEGY_NAMES
from jax import numpy as jnp

import ctde_jax as ctde
from ctde_jax import aggregate, data, devices, models, train
from ctde_jax.aggregate import Strategy
from ctde_jax.cost import measure, targets
from ctde_jax.errors import InputError
from ctde_jax.models import Model, fine_tuning, tasks
from ctde_jax.rounds import Resident
from ctde_jax.trainer.warm_start import read_source

MODEL = models.mlp([64, 12, 10])
BODY, HEAD = "layers/0/*", "layers/1/*"
SPARSE = Strategy(2, aggregate.two_phase(aggregate.error_feedback(aggregate.top_k(8, 64))))


def same(tree, other) -> None:
    jax.tree.map(np.testing.assert_array_equal, tree, other)


def fitted(data_, optimizer=None, strategy=Strategy(), replicas=2, **options) -> ctde.Trained:
    defaults = {"batch_size": 64, "steps": 6, "show": False, "devices": devices.start(replicas)}
    return ctde.fit(MODEL, data_, optimizer or optax.adam(0.01), strategy, **defaults | options)


@pytest.fixture(scope="module")
def given(digits) -> ctde.Trained:
    return fitted(digits)


def test_split_and_merge_are_inverse():
    params = {
        "body": [{"kernel": jnp.ones((3, 4)), "bias": jnp.arange(4)}, {"kernel": jnp.ones((5, 6))}],
        "head": {"kernel": jnp.ones((4, 2))},
    }
    for patterns, rank in ((None, None), (["body/*"], None), (None, 1), (["body/*"], 1)):
        trained, frozen = fine_tuning.split(params, patterns, rank, seed=0)
        same(fine_tuning.merge(trained, frozen), params)


def test_low_rank_changes_share_no_random_numbers_with_the_run():
    """`Training` splits the key of the seed in two: for initialization and for training."""
    kernels = {"a": jnp.ones((64, 64)), "b": jnp.ones((64, 64))}
    trained, _ = fine_tuning.split(kernels, None, 2, seed=3)
    drawn = [
        jax.random.normal(jax.random.fold_in(key, number), (64, 2)) / 8
        for key in jax.random.split(jax.random.key(3))
        for number in range(2)
    ]
    downs = [trained["a"].down, trained["b"].down]
    assert len({np.asarray(each).tobytes() for each in (*drawn, *downs)}) == 6


def test_kernels_with_several_axes_become_nearly_square():
    """Attention kernels, whose projections have heads after their inputs, and those of outputs."""
    kernels = {"query": jnp.ones((64, 4, 16)), "out": jnp.ones((4, 16, 64)), "bias": jnp.ones(64)}
    trained, _ = fine_tuning.split(kernels, None, 2, seed=0)
    assert jax.tree.map(jnp.shape, trained) == {
        "query": ((64, 2), (2, 4, 16)),
        "out": ((4, 16, 2), (2, 64)),
        "bias": None,
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    "strategy",
    [Strategy(), Strategy(2), Strategy(exact=True)],
    ids=["synchronous", "local", "exact"],
)
def test_frozen_training_is_that_of_a_model_with_constants(strategy, digits, given):
    """The other route: a model whose body is a constant, and whose parameters are the head."""
    body, head = given.params["layers"].values()

    def apply(params, model_state, inputs, key, mask=None):
        return MODEL.apply({"layers": {0: body, 1: params["head"]}}, model_state, inputs, key)

    constant = Model(lambda key, inputs: ({"head": head}, {}), apply)
    frozen = fitted(digits, strategy=strategy, init_from=given, freeze=BODY)
    other = ctde.fit(
        constant,
        digits,
        optax.adam(0.01),
        strategy,
        batch_size=64,
        steps=6,
        devices=devices.start(2),
        show=False,
    )

    same(frozen.params["layers"][0], body)
    jax.tree.map(
        partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-7),
        frozen.params["layers"][1],
        other.params["head"],
    )
    assert frozen.tested["loss"] == pytest.approx(other.tested["loss"], rel=1e-6)


def test_first_step_of_a_low_rank_change_is_that_of_the_paper(digits, given):
    """With `up` at 0, its gradient is `down` transposed times that of the kernel (Hu et al.)."""
    rate, rank = 0.5, 3
    whole = fitted(digits, optax.sgd(rate), init_from=given, steps=1)
    tuned = fitted(digits, optax.sgd(rate), init_from=given, steps=1, lora_rank=rank)

    start, _ = fine_tuning.split(given.params, None, rank, seed=0)
    for before, after, moved, (down, _) in zip(
        *(each.params["layers"].values() for each in (given, tuned, whole)),
        [layer["kernel"] for layer in start["layers"].values()],
        strict=True,
    ):
        gradient = (before["kernel"] - moved["kernel"]) / rate
        expected = before["kernel"] - rate * down @ (down.T @ gradient)
        np.testing.assert_allclose(after["kernel"], expected, atol=1e-6)
        same(after["bias"], before["bias"])


@pytest.mark.slow
@pytest.mark.parametrize("name", STRATEGY_NAMES)
def test_only_trained_parameters_are_sent(name, digits):
    """The bytes are those of a model that has the low-rank factors as its only parameters."""
    strategy, replicas = ctde.strategy(name), 4
    model = models.with_raw_inputs(MODEL, digits.shift, digits.scale)
    params, _ = jax.eval_shape(model.init, jax.random.key(0), digits.train.inputs[:1])
    divide = partial(fine_tuning.split, patterns=[BODY], rank=2, seed=0)
    trained, _ = jax.eval_shape(divide, params)

    def apply(params, model_state, inputs, key, mask=None):
        total = sum(jnp.sum(leaf) for leaf in jax.tree.leaves(params))
        return total + jnp.zeros((len(inputs), 10)), model_state

    alone = Model(lambda *_: (jax.tree.map(lambda x: jnp.zeros(x.shape), trained), {}), apply)

    def bytes_of(model: Model, divide=None) -> int:
        program = targets.compile_rounds(
            model,
            digits,
            tasks.classification,
            optax.adam(0.01),
            strategy,
            Resident(data.deal(digits.train, replicas, 16, seed=0)),
            devices.start(replicas),
            divide=divide,
        )
        return measure(program.as_text(), strategy.inner_steps).sent

    assert bytes_of(model, divide) == bytes_of(alone)


@pytest.mark.slow
def test_interrupted_run_continues_bit_for_bit(digits, given, tmp_path):
    options = {"strategy": SPARSE, "init_from": given, "freeze": BODY, "lora_rank": 2}
    options |= {"ema_decay": 0.5, "log_every": 2}
    whole = fitted(digits, **options)
    stopped = fitted(
        digits, **options, run_dir=tmp_path / "run", callbacks=[lambda row: row["step"] >= 2]
    )
    continued = fitted(digits, **options, run_dir=tmp_path / "run")
    assert stopped.step < continued.step == 6
    same(continued.params, whole.params)

    # The folder is a source of parameters as well, and another rank is refused.
    names = read_source(tmp_path / "run").params
    same(list(names.values()), jax.tree.leaves(whole.params))
    with pytest.raises(InputError, match=r"lora_rank 2 in the checkpoint and 3 here"):
        fitted(digits, **options | {"lora_rank": 3}, run_dir=tmp_path / "run")


@pytest.mark.slow
def test_diverging_replicas_have_the_mean_of_their_factors(digits, given, tmp_path):
    strategy = ctde.strategy("gossip")
    tuned = fitted(digits, strategy=strategy, lora_rank=2, run_dir=tmp_path, init_from=given)
    params = read_source(tmp_path).params
    for found, leaf in zip(params.values(), jax.tree.leaves(tuned.params), strict=True):
        np.testing.assert_allclose(found, leaf, atol=1e-6)


@pytest.mark.slow
def test_skipping_sees_a_product_that_overflows(digits):
    """The factors of a low-rank change are finite, but not their product."""
    tuned = fitted(digits, optax.sign_sgd(1e20), replicas=1, lora_rank=1, on_nonfinite="skip")
    assert tuned.history[-2]["skipped"] > 0
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(tuned.params))


def test_checkpoint_of_a_product_that_overflows_is_not_written(digits, tmp_path):
    with pytest.raises(ctde.NonFiniteLoss):
        fitted(
            digits, optax.sign_sgd(1e20), replicas=1, lora_rank=1, run_dir=tmp_path, save_every=1
        )
    for params in (read_source(path).params for path in (tmp_path / "checkpoints").iterdir()):
        assert all(np.isfinite(leaf).all() for leaf in params.values())


def test_factors_have_the_learning_rate_of_their_kernel(digits):
    scale = ctde.optimizers.scale_updates({"layers/0/kernel": 0.5})
    params = {"layers": {0: {"kernel": jnp.ones((9, 9))}, 1: {"kernel": jnp.ones((9, 9))}}}
    trained, _ = fine_tuning.split(params, None, 2, seed=0)
    updates, _ = scale.update(trained, scale.init(trained))
    same(
        updates["layers"][0]["kernel"],
        jax.tree.map(lambda x: x / 2, trained["layers"][0]["kernel"]),
    )
    same(updates["layers"][1], trained["layers"][1])


def test_command_names_the_option_of_a_pattern(capsys):
    options = ["--devices", "1", "--learning-rate-scales"]
    assert train.main([*options, "layer/*=0.1"]) == 2
    assert "--learning-rate-scales must match parameters" in capsys.readouterr().err
    assert train.main([*options, "layers/*=0.1", "layers/*=0.2"]) == 2
    assert "must not contain 'layers/*' twice" in capsys.readouterr().err


@pytest.mark.slow
def test_run_of_the_command_is_loaded_with_its_changes(tmp_path):
    run = tmp_path / "run"
    options = ["--devices", "1", "--hidden-sizes", "12", "--steps", "4", "--learning-rate-scales"]
    options += ["layers/1/*=0.5", "--lora-rank", "2", "--freeze", BODY, "--run-dir", str(run)]
    assert train.main(options) == 0
    loaded, digits, _ = ctde.load_run(run)
    assert loaded.evaluate(digits.test)["loss"] == pytest.approx(loaded.tested["loss"], rel=1e-6)
    assert jax.tree.leaves(loaded.opt_state)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"freeze": "layer/0/*"}, "freeze must match parameters of the model, got 'layer/0/*'"),
        ({"freeze": []}, "freeze must contain at least one pattern"),
        ({"freeze": "*"}, "freeze must leave parameters to train: the patterns match all of them"),
        ({"lora_rank": 60}, "lora_rank must leave parameters to train: no frozen kernel is large"),
        ({"freeze": 5}, "freeze must be a pattern of names or a list of them"),
        ({"lora_rank": 0}, "lora_rank must be at least 1, got 0"),
        ({"lora_rank": 1.5}, "lora_rank must be an integer"),
    ],
)
def test_unsuitable_options_are_refused(options, sentence, digits):
    with pytest.raises(InputError, match=sentence.replace("*", r"\*")):
        fitted(digits, **options)
