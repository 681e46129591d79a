"""Every test runs on up to eight fake CPU devices, which must exist before JAX starts.

Compiling small programs takes most of the time. Machine code is therefore not optimized, which
saves a third; HLO is optimized, so that collectives and bytes equal those of users. Tests and
processes share a compilation cache that exists as long as the tests run, which saves a quarter.
"""

import gc
import os
import shutil
from tempfile import mkdtemp
from zlib import crc32

import jax
import pytest
from matplotlib.figure import Figure

from ctde_jax import data, devices
from ctde_jax.trainer import log

# At Python's threshold of 700 objects, garbage collection takes a tenth of the time.
gc.set_threshold(10_000)

IS_WORKER = "PYTEST_XDIST_WORKER" in os.environ
if not IS_WORKER:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = mkdtemp(prefix="ctde_jax-programs-")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0"
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_numpy_rank_promotion", "raise")
ALL_DEVICES = devices.start(8)


@pytest.hookimpl(tryfirst=True)  # before pytest selects tests by their marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Numbers the slow tests, of which CI runs a third."""
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.turn(number=crc32(item.nodeid.encode()) % 3))


def pytest_unconfigure() -> None:
    if not IS_WORKER:
        shutil.rmtree(os.environ["JAX_COMPILATION_CACHE_DIR"])


@pytest.fixture(scope="module", autouse=True)
def clear_programs():
    """Caching thousands of programs would take gigabytes, and minutes of garbage collection."""
    yield
    jax.clear_caches()


@pytest.fixture(autouse=True)
def empty_curves(request, monkeypatch):
    """Plotting takes as long as a small training; tests marked `curves` plot anyway."""
    if request.node.get_closest_marker("curves") is None:
        monkeypatch.setattr(log, "plot_curves", lambda rows: Figure(figsize=(1, 1)))


@pytest.fixture
def key() -> jax.Array:
    return jax.random.key(0)


@pytest.fixture(scope="session")
def digits() -> data.Dataset:
    return data.digits()
