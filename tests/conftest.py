"""Every test runs on up to eight fake CPU devices, which must exist before JAX starts.

Most of the time goes into compiling small programs that run once. So machine code is not optimized, which takes a third
off; the programs themselves are, so collectives and bytes are those that users get.
"""

import os

import jax
import pytest

from ctde_jax import data, devices

os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # for the processes that tests start
jax.config.update("jax_enable_compilation_cache", False)
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0"
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_numpy_rank_promotion", "raise")
ALL_DEVICES = devices.start(8)


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
    """Thousands of small programs, all kept, would take gigabytes and Python's garbage collector minutes."""
    yield
    jax.clear_caches()


@pytest.fixture
def key() -> jax.Array:
    return jax.random.key(0)


@pytest.fixture(scope="session")
def digits() -> data.Dataset:
    return data.digits()
