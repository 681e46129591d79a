"""Runs whose strategy has several phases."""

from dataclasses import replace

import jax
import numpy as np
import optax
import pytest
from jax import numpy as jnp

import ctde_jax as ctde
from ctde_jax import aggregate
from ctde_jax.devices import AXIS
from ctde_jax.errors import InputError
from ctde_jax.rounds import state

MODEL = ctde.models.mlp([64, 16, 10])
OUTER = optax.sgd(0.7, momentum=0.6, nesterov=True)


def local(inner_steps: int, codec: aggregate.Codec | None = None) -> ctde.Strategy:
    codec = aggregate.quantize(4) if codec is None else codec
    reduce = aggregate.two_phase(aggregate.error_feedback(codec))
    return ctde.Strategy(inner_steps, reduce, OUTER, aggregate.proximal(0.01))


def fit(digits, strategy: ctde.Strategy, steps: int = 48, **options) -> ctde.Trained:
    options = {"devices": ctde.devices.start(4), "batch_size": 32, "eval_every": 48} | options
    arguments = {"model": MODEL, "optimizer": optax.adam(0.01), "show": False} | options
    return ctde.fit(data=digits, strategy=strategy, steps=steps, **arguments)


def assert_same_bits(one: ctde.Trained, other: ctde.Trained) -> None:
    jax.tree.map(np.testing.assert_array_equal, one.params, other.params)


@pytest.mark.slow
def test_phase_with_the_same_strategy_changes_no_bit(digits):
    """Residuals, outer momentum and the states of all replicas continue."""
    assert_same_bits(
        fit(digits, replace(local(4), later={16: local(4), 32: local(4)})), fit(digits, local(4))
    )


@pytest.mark.slow
@pytest.mark.parametrize("codec", [aggregate.quantize(2, block=8), aggregate.sign(8)])
def test_residual_continues_in_the_next_phase(digits, codec):
    """The exact codec of the last phase sends all residuals, so nothing is lost.

    The gradient of a weighted sum of the outputs does not depend on the parameters. The parameters
    are therefore those of exact averages, up to rounding.
    """

    def averaging(codec: aggregate.Codec) -> ctde.Strategy:
        return ctde.Strategy(4, aggregate.two_phase(aggregate.error_feedback(codec)))

    # Of 2,080 parameters, each of four replicas owns 65 blocks of 8.
    linear = ctde.models.mlp([64, 32])
    task = ctde.Task(lambda outputs, labels: outputs @ jnp.sin(jnp.arange(32.0)))
    compressed = averaging(codec)
    trained, exact, lossy = (
        fit(digits, each, 16, model=linear, task=task, optimizer=optax.sgd(0.1))
        for each in (
            replace(compressed, later={12: averaging(aggregate.exact())}),
            ctde.Strategy(4),
            compressed,
        )
    )
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4),
        trained.params,
        exact.params,
    )
    distances = [
        optax.tree.norm(optax.tree.sub(each.params, exact.params)) for each in (trained, lossy)
    ]
    assert distances[1] > 100 * distances[0]


def test_residual_of_gradients_is_not_one_of_outer_gradients():
    """They differ in size, so the reducer starts afresh; the optimizer's state continues."""
    params = {"w": np.ones(64, np.float32)}
    reduce = local(4).reduce
    before = ctde.Strategy(reduce=reduce)

    def begin(row):
        created = state.create(params, {}, optimizer=optax.adam(0.1), strategy=before)
        used = jax.tree.map(lambda x: x + jnp.ones((), x.dtype), created)
        return used, state.changed(used, before, local(4))

    used, begun = jax.vmap(begin, axis_name=AXIS)(np.zeros(2))
    assert optax.tree.norm(used.reduce_state) > 0
    assert optax.tree.norm(begun.reduce_state) == 0
    jax.tree.map(np.testing.assert_array_equal, begun.opt_state[1], used.opt_state[1])


@pytest.mark.slow
def test_bytes_are_those_of_the_phases(digits):
    int4, one_bit = local(4), local(8, aggregate.sign())
    phases = fit(digits, replace(int4, later={16: one_bit}), log_every=8)
    sent = {name: fit(digits, each, 8).traffic.sent for name, each in [("4", int4), ("1", one_bit)]}
    rows = {row["step"]: row for row in phases.history if row["split"] == "train"}
    assert rows[16]["bytes_sent"] == 4 * sent["4"]
    assert rows[48]["bytes_sent"] == 4 * sent["4"] + 4 * sent["1"]
    assert phases.traffic.sent == sent["1"]


def test_wire_is_shown_for_each_phase_and_in_all(digits, capsys):
    strategy = ctde.Strategy(shared_batches=True, later={16: ctde.Strategy(4)})
    trained = ctde.fit(
        MODEL, digits, optax.adam(0.01), strategy, devices=ctde.devices.start(4), steps=48
    )
    shown = " ".join(capsys.readouterr().out.split())
    assert "wire no communication between devices, from step 0" in shown
    assert "every 4 steps in 1 collective" in shown
    total = [row for row in trained.history if row["split"] == "train"][-1]["bytes_sent"]
    assert f"each device sends {total / 1000:.1f} kB in 48 steps, 6 times fewer bytes" in shown


@pytest.mark.slow
def test_shared_batches_are_those_of_the_first_replica(digits):
    """The reference is a loop by hand over the batches of the first replica."""
    shared = ctde.Strategy(shared_batches=True)
    trained = fit(digits, shared, 30, optimizer=optax.sgd(0.1))

    training = ctde.Training(
        MODEL,
        digits,
        optax.sgd(0.1),
        shared,
        ctde.tasks.classification,
        ctde.devices.start(4),
        batch_size=32,
        steps=30,
    )
    model = training.raw_model
    key, _ = jax.random.split(jax.random.key(0))
    params, _ = model.init(key, training.source.inputs(0))

    @jax.jit
    def step(params, inputs, labels):
        def loss(params):
            logits, _ = model.apply(params, {}, inputs, None)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        return optax.apply_updates(params, optax.tree.scale(-0.1, jax.grad(loss)(params)))

    for batch in training.source.batches.steps(0, 30)[:, 0]:
        rows = batch[batch >= 0]
        params = step(params, digits.train.inputs[rows], digits.train.labels[rows])
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), trained.params, params
    )
    assert trained.traffic is not None
    assert trained.traffic.sent == 0


def test_data_that_are_assigned_to_replicas_are_not_shared(digits):
    parts = np.array_split(np.arange(len(digits.train.labels)), 4)
    shared = ctde.Strategy(shared_batches=True, later={8: ctde.Strategy(4)})
    with pytest.raises(InputError, match=r"partition must be reshuffled .* with shared batches"):
        fit(digits, shared, partition=parts)


@pytest.mark.slow
def test_sampled_clients_need_rounds_of_one_length(digits):
    clients = np.array_split(np.arange(len(digits.train.labels)), 12)
    growing = ctde.Strategy(2, later={8: ctde.Strategy(4)})
    with pytest.raises(InputError, match="partition must have one part for each device"):
        fit(digits, growing, partition=clients)
    post_local = ctde.Strategy(later={8: ctde.Strategy(4)})
    assert fit(digits, post_local, partition=clients).step == 48
