"""A reducer in the parts of nodes and a server computes the bits of the reducer on replicas."""

import jax
import numpy as np
import pytest
from conftest import ALL_DEVICES
from jax import numpy as jnp

import ctde_jax as ctde
from ctde_jax.devices import replica

two_phase, feedback = ctde.aggregate.two_phase, ctde.aggregate.error_feedback
NODES = 3
REDUCERS = {
    "mean": ctde.aggregate.mean(),
    "two_phase": two_phase(),
    "int4": two_phase(feedback(ctde.aggregate.quantize(bits=4))),
    "int2": two_phase(feedback(ctde.aggregate.quantize(bits=2, levels="statistical"), 0.9)),
    "sign": two_phase(feedback(ctde.aggregate.sign())),
    "top_k": two_phase(feedback(ctde.aggregate.top_k(k=4, chunk=64))),
    "random_k": two_phase(feedback(ctde.aggregate.random_k(k=8, chunk=64))),
    "smooth": ctde.aggregate.smooth(
        two_phase(feedback(ctde.aggregate.quantize(bits=2))), image=(8, 5), keep=(4, 3)
    ),
    "gathered": ctde.aggregate.gathered(feedback(ctde.aggregate.top_k(k=4, chunk=64))),
    "median": two_phase(combine=ctde.aggregate.median()),
    "trimmed_mean": two_phase(combine=ctde.aggregate.trimmed_mean(1)),
    "krum": two_phase(combine=ctde.aggregate.krum(0)),
    "geometric_median": two_phase(combine=ctde.aggregate.geometric_median()),
    "centered_clipping": two_phase(combine=ctde.aggregate.centered_clipping(1.0)),
}
PARAMS = {
    "a": jnp.zeros((40, 30)),
    "b": jnp.zeros(30),
    "c": jnp.zeros((2, 5), jnp.complex64),
    "frozen": jnp.zeros(7),
}


def draw(seed: int):
    """Messages of all nodes, in which one leaf is zero, and their weights."""
    rng = np.random.default_rng(seed)

    def leaf(x):
        real, imaginary = rng.normal(size=(2, NODES, *x.shape))
        numbers = real + 1j * imaginary if jnp.iscomplexobj(x) else real
        return jnp.asarray(numbers, x.dtype)

    messages = jax.tree.map(leaf, PARAMS)
    messages["frozen"] *= 0
    return messages, jnp.asarray(rng.integers(1, 50, NODES), jnp.float32)


def on_replicas(reduce, rounds):
    devices = ALL_DEVICES[:NODES]
    rows = np.arange(NODES)
    init = replica.parallel(lambda _: reduce.init(PARAMS), devices, (0,), 0)

    def update(message, weight, state, key):
        return reduce.update(message, state, PARAMS, weight=weight, key=key)

    update = replica.parallel(update, devices, (0, 0, 0, None), (None, 0))
    state, results = init(rows), []
    for number in range(rounds):
        reduced, state = update(*draw(number), state, jax.random.key(number))
        results.append(reduced)
    return jax.device_get(results)


def in_a_star(reduce, rounds):
    star = reduce.star(NODES)
    send, combine = jax.jit(star.send), jax.jit(star.combine)
    receive, settle = jax.jit(star.receive), jax.jit(star.settle)
    states, server, results = [star.init(PARAMS)] * NODES, star.init_server(PARAMS), []
    for number in range(rounds):
        messages, weights = draw(number)
        key = jax.random.key(number)
        sent = [
            send(jax.tree.map(lambda x, i=i: x[i], messages), states[i], weights[i], key)
            for i in range(NODES)
        ]
        answer, server = combine(jnp.stack([payload for payload, _ in sent]), server, PARAMS, key)
        results.append(receive(answer, PARAMS, key))
        states = [
            settle(answer, PARAMS, before, after)
            for before, (_, after) in zip(states, sent, strict=True)
        ]
    return jax.device_get(results)


@pytest.mark.parametrize("name", REDUCERS)
def test_a_star_has_the_bits_of_the_reducer(name):
    expected = on_replicas(REDUCERS[name], 3)
    assert any(np.any(leaf) for leaf in jax.tree.leaves(expected[-1]))
    jax.tree.map(np.testing.assert_array_equal, in_a_star(REDUCERS[name], 3), expected)
