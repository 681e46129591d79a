"""Every test runs on up to eight fake CPU devices, which must exist before JAX starts."""

import jax
import pytest

from ctde_jax import data, devices

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_numpy_rank_promotion", "raise")
ALL_DEVICES = devices.start(8)


@pytest.fixture
def key() -> jax.Array:
    return jax.random.key(0)


@pytest.fixture(scope="session")
def digits() -> data.Dataset:
    return data.digits()
