"""Modules as users write them train as in a plain flax loop, or are refused with the cause."""

import re
from functools import cache, partial
from zlib import crc32

import jax
import numpy as np
import optax
import pytest
from cases import some
from flax import linen, nnx
from jax import numpy as jnp
from user_modules import (
    INDEPENDENT,
    INPUTS,
    LABELS,
    MIXING,
    MODULES,
    NNX,
    REFUSED,
    CalledWithRngs,
    Case,
    NnxBatchNorm,
    Plain,
    TupleOutputs,
    WordMode,
)

import ctde_jax as ctde
from ctde_jax import data, models
from ctde_jax.data import deal
from ctde_jax.trainer.checks import check_examples_apart

pytestmark = pytest.mark.filterwarnings("ignore:Using 'Module.sow:DeprecationWarning")

STEPS, BATCH, SHARDS = 20, 8, 8
OPTIMIZER = optax.sgd(0.1, momentum=0.9)


def data_of(case: Case) -> data.Dataset:
    inputs = INPUTS[case.inputs]
    return data.from_arrays(inputs, LABELS, inputs, LABELS)


def fit(case: Case, devices: int, **options):
    return ctde.fit(
        case.module,
        data_of(case),
        OPTIMIZER,
        task=case.task,
        devices=ctde.devices.start(devices),
        **{
            "batch_size": BATCH,
            "steps": STEPS,
            "eval_every": STEPS,
            "log_every": 1,
            "show": False,
            **options,
        },
    )


def newest(run_dir):
    return max((run_dir / "checkpoints").iterdir())


def train_losses(trained) -> list[float]:
    return [row["loss"] for row in trained.history if row["split"] == "train"]


def batches_of(dataset: data.Dataset, batch_size: int) -> list[np.ndarray]:
    """The examples of each step; the order is tested elsewhere."""
    return list(deal(dataset.train, 1, batch_size, seed=0).steps(0, STEPS)[:, 0])


def stream_key(key, name):
    return key if name == "dropout" else jax.random.fold_in(key, crc32(name.encode()))


def plain_nnx(case: Case, init_key):
    """Returns the trained state, and the loss of a part of a batch as computed by a flax loop."""
    module = case.make(nnx.Rngs(init_key)) if case.make else build(case.module, init_key)
    module.train()

    def seed(module, key):
        """Sets every random stream by the documented rule."""
        leaves, tree = jax.tree.flatten(nnx.state(module, nnx.RngState))
        keys = jax.random.split(key, max(1, len(leaves)))
        fresh = [
            jax.random.split(keys[i], ())
            if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
            else jnp.zeros_like(leaf)
            for i, leaf in enumerate(leaves)
        ]
        nnx.update(module, jax.tree.unflatten(tree, fresh))

    def trained(path, value):
        return isinstance(value, nnx.Param) and jnp.issubdtype(
            value.get_value().dtype, jnp.floating
        )

    def total_loss(module, inputs, labels, key):
        seed(module, key)
        given = {"rngs": nnx.Rngs(key)} if case.module is CalledWithRngs else {}
        outputs = module(inputs, **case.train, **given)
        nnx.pop(module, nnx.Intermediate)
        return case.task.loss(outputs, labels).sum()

    value_and_grad = nnx.value_and_grad(total_loss, argnums=nnx.DiffState(0, trained))
    optimizer = nnx.Optimizer(module, OPTIMIZER, wrt=trained)

    @nnx.jit
    def step(module, optimizer, shards, key):
        total, grads = 0.0, None
        before = nnx.state(module, nnx.Not(nnx.RngState))
        for number, (inputs, labels) in enumerate(shards):
            nnx.update(module, before)  # every shard starts from the state before the step
            loss, shard_grads = value_and_grad(
                module, inputs, labels, jax.random.fold_in(key, number)
            )
            total += loss
            grads = shard_grads if grads is None else jax.tree.map(jnp.add, grads, shard_grads)
        examples = sum(len(labels) for _, labels in shards)
        optimizer.update(module, jax.tree.map(lambda grad: grad / examples, grads))
        return total / examples

    return lambda shards, key: step(module, optimizer, shards, key)


def build(module, key):
    if isinstance(module, nnx.Module):
        return module
    try:
        return module(rngs=nnx.Rngs(key))
    except TypeError:
        return module(nnx.Rngs(key))


def plain_linen(case: Case, init_key):
    module = case.make or case.module
    inputs = INPUTS[case.inputs]
    start = case.infer if case.at_start is None else case.at_start
    variables = linen.meta.unbox(
        module.init({"params": init_key, "dropout": init_key}, inputs, **start)
    )
    params = variables["params"]
    state = {
        name: part
        for name, part in variables.items()
        if name not in ("params", "losses", "perturbations")
    }
    fixed = {name: leaf for name, leaf in params.items() if name == "order"}
    params = {name: leaf for name, leaf in params.items() if name not in fixed}
    carry = [params, state, OPTIMIZER.init(params)]

    @jax.jit
    def step(params, state, opt_state, shards, key):
        def mean_loss(params):
            total = 0.0
            for number, (inputs, labels) in enumerate(shards):
                shard_key = jax.random.fold_in(key, number)
                outputs, after = module.apply(
                    {"params": {**params, **fixed}, **state},
                    inputs,
                    **case.train,
                    rngs={name: stream_key(shard_key, name) for name in case.streams},
                    mutable=list(state),
                )
                total += case.task.loss(outputs, labels).sum()
            return total / sum(len(labels) for _, labels in shards), after

        (loss, after), grads = jax.value_and_grad(mean_loss, has_aux=True)(params)
        updates, opt_state = OPTIMIZER.update(grads, opt_state, params)
        return loss, optax.apply_updates(params, updates), after, opt_state

    def run(shards, key):
        loss, *carry[:] = step(*carry, shards, key)
        return loss

    return run


@cache
def on_one_device(name: str) -> ctde.Trained:
    """Returns the result of training on one device."""
    return fit(MODULES[name], 1)


@cache
def plain_losses(name: str) -> list[float]:
    """Returns the losses of a plain flax loop with the keys that `gradient` documents."""
    case = MODULES[name]
    dataset = data_of(case)
    init_key, train_key = jax.random.split(jax.random.key(0))
    train = (plain_nnx if name in NNX else plain_linen)(case, init_key)
    inputs = (np.asarray(dataset.train.inputs) - dataset.shift) * dataset.scale
    losses = []
    for number, batch in enumerate(batches_of(dataset, BATCH)):
        _, step_key = jax.random.split(jax.random.fold_in(train_key, number))
        _, model_key = jax.random.split(step_key)
        parts = [batch[shard::SHARDS] for shard in range(SHARDS)] if case.is_random else [batch]
        losses.append(float(train([(inputs[part], LABELS[part]) for part in parts], model_key)))
    return losses


@pytest.mark.parametrize("name", some(MODULES, "sow", "custom variable type", "linen batch norm"))
def test_losses_are_those_of_a_plain_loop(name):
    trained = fit(MODULES[name], 4)
    expected = plain_losses(name)
    np.testing.assert_allclose(train_losses(trained), expected, rtol=1e-5, atol=1e-5)
    assert abs(expected[-1] - expected[0]) > 1e-2, "nothing was learned, so nothing was compared"


@pytest.mark.slow
@pytest.mark.parametrize("name", MODULES)
def test_losses_are_those_of_a_plain_loop_on_one_device(name):
    np.testing.assert_allclose(
        train_losses(on_one_device(name)), plain_losses(name), rtol=1e-5, atol=1e-5
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", MODULES)
def test_run_resumes_from_its_checkpoint_and_its_export_equals_the_model(name, tmp_path):
    case = MODULES[name]
    whole = on_one_device(name)
    fit(case, 1, steps=STEPS // 2, run_dir=tmp_path / "run")
    resumed = fit(case, 1, branch_from=newest(tmp_path / "run"), run_dir=tmp_path / "rest")

    jax.tree.map(
        lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-6),
        resumed.params,
        whole.params,
    )
    jax.tree.map(np.testing.assert_array_equal, resumed.model_state, whole.model_state)

    inputs = np.asarray(INPUTS[case.inputs])
    outputs = resumed.predict(inputs)
    if isinstance(outputs, np.ndarray):
        bundle = ctde.write_bundle(
            resumed, data_of(case), tmp_path / "bundle", ["jax"], show=False
        ).bundle
        np.testing.assert_allclose(
            ctde.bundle.load(bundle, "jax")(inputs), outputs, rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize("name", REFUSED)
def test_unsupported_module_is_refused(name):
    module, inputs, sentence = REFUSED[name]
    with pytest.raises(ctde.InputError, match=re.compile(sentence, re.MULTILINE)) as caught:
        fit(Case(module, inputs), 1)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", some(["float32", "bfloat16"], "float32"))
@pytest.mark.parametrize("name", [*MIXING, *INDEPENDENT])
def test_module_that_mixes_examples_in_inference_is_found(name, dtype, key):
    module, inputs = (MIXING | INDEPENDENT)[name]
    model, dataset = models.as_model(module), data_of(Case(module, inputs))
    if dtype == "bfloat16":
        model = models.in_bfloat16(model)
    model = models.with_raw_inputs(model, dataset.shift, dataset.scale)
    check = partial(
        check_examples_apart, model, *model.init(key, dataset.train.inputs[:1]), dataset
    )
    if name in INDEPENDENT:
        check()
    else:
        with pytest.raises(
            ctde.InputError,
            match="model must compute the outputs of each example from that example",
        ):
            check()


def test_module_that_mixes_examples_is_refused_before_it_is_trained(tmp_path):
    with pytest.raises(
        ctde.InputError, match=r"x\.max\(\), normalize by constants or with BatchNorm\.$"
    ):
        fit(Case(*MIXING["mean"]), 2, run_dir=tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    with pytest.raises(
        ctde.InputError, match=r"and add a channel axis for convolutions, x\[..., None\]\.$"
    ):
        fit(Case(*MIXING["linen convolution"]), 2)


def test_mixing_is_found_with_a_single_example(key):
    model, one = models.as_model(MIXING["mean"][0]), INPUTS["features"][:1]
    dataset = data.from_arrays(one, np.float32([1.0]), one, np.float32([1.0]))
    with pytest.raises(ctde.InputError, match="must compute the outputs of each example"):
        check_examples_apart(model, *model.init(key, one), dataset)


def test_exception_in_a_module_is_the_cause_of_the_error():
    module, inputs, _ = REFUSED["no channel axis"]
    with pytest.raises(ctde.InputError) as caught:
        fit(Case(module, inputs), 1)
    assert isinstance(caught.value.__cause__, ValueError)
    assert "m.conv(x)" in str(caught.value)  # the line of the module


def test_error_in_a_loss_names_its_arguments():
    task = ctde.Task(lambda outputs, labels: outputs["logits"])
    with pytest.raises(
        ctde.InputError,
        match=r"task failed: your loss, called with outputs float32\[2, 3\] and labels",
    ):
        fit(Case(Plain, task=task), 1)


def test_mode_passed_as_a_word_is_used():
    module, mode = WordMode(), {"train": {"mode": "train"}, "infer": {"mode": "eval"}}
    model = ctde.models.from_linen(module, **mode)
    inputs, key = INPUTS["features"], jax.random.key(0)
    params, model_state = model.init(key, inputs)

    for given, train in ((key, "train"), (None, "eval")):
        outputs, _ = model.apply(params, model_state, inputs, given)
        expected = module.apply({"params": params}, inputs, train, rngs={"dropout": key})
        np.testing.assert_array_equal(outputs, expected)


def test_built_module_is_not_changed():
    module = NnxBatchNorm(nnx.Rngs(3))
    module.eval()
    before = jax.tree.map(np.array, nnx.to_pure_dict(nnx.state(module, nnx.Not(nnx.RngState))))
    trained = fit(Case(module), 1)
    after = nnx.to_pure_dict(nnx.state(module, nnx.Not(nnx.RngState)))
    jax.tree.map(np.testing.assert_array_equal, before, after)
    assert module.norm.use_running_average
    assert (trained.params["last"]["kernel"] != before["last"]["kernel"]).any()


def test_outputs_keep_their_containers_and_integers():
    model = ctde.models.as_model(TupleOutputs)
    params, model_state = model.init(jax.random.key(0), INPUTS["features"])
    logits, integers = model.apply(params, model_state, INPUTS["features"], None)[0]
    assert (logits.dtype, integers.dtype) == (jnp.float32, jnp.int32)
