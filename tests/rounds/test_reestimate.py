"""Batch statistics are reestimated exactly, for any previous running averages."""

import jax
import numpy as np
import pytest
from flax import linen, nnx
from jax import numpy as jnp

from ctde_jax import devices, models
from ctde_jax.data import Split
from ctde_jax.devices import replica
from ctde_jax.rounds.reestimate import make_reestimate


class Nnx(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.first, self.norm = (
            nnx.Linear(4, 6, rngs=rngs),
            nnx.BatchNorm(6, momentum=0.99, rngs=rngs),
        )
        self.calls = nnx.BatchStat(jnp.int32(7))

    def __call__(self, x):
        return self.norm(self.first(x))


class Linen(linen.Module):
    @linen.compact
    def __call__(self, x, train: bool):
        return linen.BatchNorm(use_running_average=not train, momentum=0.9)(
            linen.Dense(6, name="first")(x)
        )


@pytest.mark.parametrize("shared", ["averaged", "synchronized"])
@pytest.mark.parametrize("api", ["nnx", "linen"])
def test_statistics_are_the_weighted_mean_over_the_batches(api, shared, key):
    """Two devices with three batches each; the last batch has one example."""
    model = models.from_nnx(Nnx, shared) if api == "nnx" else models.from_linen(Linen(), shared)
    two = devices.start(2)
    inputs = np.random.default_rng(0).normal(3, 2, (40, 4)).astype(np.float32)
    split = Split(inputs, np.zeros(40, np.int32))
    batches = np.arange(24, dtype=np.int32).reshape(2, 3, 4)
    batches[1, 2, 1:] = ~batches[1, 2, 1:]
    params, model_state = model.init(key, inputs[:1])

    center = replica.replicate((params, model_state, split, key), two)
    estimated = make_reestimate(model, two, None)(
        *center[:3], replica.shard(batches, two), center[3]
    )

    first = params["first"]
    separate = (
        batches.reshape(6, 4) if shared == "averaged" else batches.swapaxes(0, 1).reshape(3, 8)
    )
    rows = [batch[batch >= 0] for batch in separate]
    hidden, sizes = (
        [inputs[batch] @ first["kernel"] + first["bias"][None] for batch in rows],
        list(map(len, rows)),
    )
    averages = [leaf for leaf in jax.tree.leaves(estimated) if leaf.dtype == jnp.float32]
    expected = [
        np.average([f(h, 0) for h in hidden], axis=0, weights=sizes) for f in (np.mean, np.var)
    ]
    for found, right in zip(averages, expected, strict=True):
        np.testing.assert_allclose(found, right, rtol=1e-3)
    counters = [leaf for leaf in jax.tree.leaves(estimated) if leaf.dtype == jnp.int32]
    assert all(counter == 7 for counter in counters)
