"""Streaming equals the loop of its paper: one fragment per round, applied one round late."""

import jax
import numpy as np
import optax
import pytest
from jax import numpy as jnp

from ctde_jax.aggregate import streaming
from ctde_jax.devices import replica

REPLICAS, SIZE, FRAGMENTS = 3, 10, 4


@pytest.mark.parametrize("mix", [0.0, 0.5])
def test_streaming_equals_the_loop_of_the_paper(mix, key):
    """Three passes over the fragments, compared with numpy; with outer momentum and mixing."""
    outer = optax.sgd(0.7, momentum=0.9)
    reduce = streaming(FRAGMENTS, outer=outer, mix=mix)
    rounds = 3 * FRAGMENTS
    steps = jax.random.normal(key, (REPLICAS, rounds, SIZE))
    start = jnp.arange(1.0, SIZE + 1)

    def on_replica(params, state, step):
        outer_grads, state = reduce.update({"p": step}, state, {"p": params}, weight=1.0, key=key)
        return params - outer_grads["p"], state

    run_round = jax.jit(jax.vmap(on_replica, axis_name=replica.AXIS))
    params = jnp.stack([start] * REPLICAS)
    state = jax.vmap(reduce.init, axis_name=replica.AXIS)({"p": params})

    padded = np.zeros((FRAGMENTS, 3), np.float32)
    padded.ravel()[:SIZE] = start
    local, center, momentum = np.stack([padded] * REPLICAS), padded.copy(), np.zeros_like(padded)
    message = None
    for number in range(rounds):
        local.reshape(REPLICAS, -1)[:, :SIZE] -= steps[:, number]
        if message is not None:
            late = (number - 1) % FRAGMENTS
            momentum[late] = 0.9 * momentum[late] + message.mean(axis=0)
            center[late] -= 0.7 * momentum[late]
            local[:, late] = mix * local[:, late] + (1 - mix) * center[late]
        message = center[number % FRAGMENTS] - local[:, number % FRAGMENTS]
        params, state = run_round(params, state, steps[:, number])
        np.testing.assert_allclose(params, local.reshape(REPLICAS, -1)[:, :SIZE], atol=1e-4)
        for replicas_center in state.center["p"]:
            # All replicas have the same bits.
            np.testing.assert_array_equal(replicas_center, state.center["p"][0])
            np.testing.assert_allclose(replicas_center, center, atol=1e-4)


@pytest.mark.slow
def test_message_does_not_depend_on_the_local_steps(key):
    """The message does not depend on the local steps of its round, so both can overlap."""
    reduce = streaming(2)
    params = jnp.ones(6)

    def next_center(step, state):
        return reduce.update(step, state, params, weight=1.0, key=key)[1].center

    state = jax.vmap(reduce.init, axis_name=replica.AXIS)(jnp.ones((2, 6)))
    slope = jax.jacobian(jax.vmap(next_center, axis_name=replica.AXIS))(jnp.ones((2, 6)), state)
    assert not slope.any()


def test_outer_state_of_each_fragment_starts_from_its_parameters():
    """Schedule-free outer optimizers keep a copy of the parameters in their state."""
    outer = optax.contrib.schedule_free_sgd(0.7)
    reduce = streaming(FRAGMENTS, outer=outer)
    params = jnp.arange(1.0, 4 * FRAGMENTS + 1)
    state = jax.vmap(reduce.init, axis_name=replica.AXIS)({"p": jnp.stack([params] * REPLICAS)})
    np.testing.assert_array_equal(state.outer.z["p"][0], params.reshape(FRAGMENTS, -1))
